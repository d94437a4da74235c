"""What every attack keeps to: the ball, the seed, the batch, the count, and what it does with a bad model or sample."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable

import pyautoattack.autopgd_base
import pyautoattack.fab_tf
import pyautoattack.square
import pytest
import torch
from torch import Tensor, nn

import wda
from wda import Threat, allocate, attack, attacks, distances
from wda.attacks.distances import METHODS
from wda.errors import Untrustworthy
from wda.losses import margin
from wda.norms import norm
from wda.passes import Oracle

ALL = attacks.available()
NORMS = ("Linf", "L2", "L1")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BUDGETED = ("wfgsm", "wpgd")  # move the whole sample within the W_p ball, p > 1
COUPLED = ("autoattack", "a3", "a3++", *BUDGETED)  # what happens to a sample may depend on the others
KAPPA_IS_ONE = (*METHODS, *BUDGETED)
NEEDS_A_BOX = ("apgd-ce", "apgd-dlr", "autoattack", "fab")
FEW = {"steps": 8, "probe_steps": 3, "restarts": 2, "levels": 1}  # of an attack's options, those that it has
TIE = 1e-5  # the package AutoAttack computes in single precision

each_attack = pytest.mark.parametrize("method", ALL)
each_method = pytest.mark.parametrize("method", METHODS)
each_norm = pytest.mark.parametrize("name", NORMS)
one_by_one = pytest.mark.parametrize("method", [method for method in ALL if method not in COUPLED])


@pytest.fixture(autouse=True)
def _short_ensemble(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack sets the lengths of its members itself: 100 steps, and 5000 queries of the Square Attack."""
    for attack_class, option, length in (
        (pyautoattack.autopgd_base.APGDAttack, "n_iter", 5),
        (pyautoattack.autopgd_base.APGDAttack_targeted, "n_iter", 4),
        (pyautoattack.fab_tf.FABAttack_TF, "n_iter", 3),
        (pyautoattack.square.SquareAttack, "n_queries", 10),
    ):
        parameters = inspect.signature(attack_class).parameters.values()
        defaults = [length if p.name == option else p.default for p in parameters if p.default is not p.empty]
        monkeypatch.setattr(attack_class.__init__, "__defaults__", tuple(defaults))


class Rowwise(nn.Linear):
    """A linear layer that computes each row the same way, to the last bit, in whatever batch it comes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * self.weight).sum(2) + self.bias


def network(
    classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64, n: int = 20, linear: type = nn.Linear
) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network of (N, 2, 3), points in [0, 1], and its own answers for labels, one in five of them wrong."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), linear(6, 16), nn.ReLU(), linear(16, classes)).double()
    with torch.no_grad():
        model[1].weight *= 4
        model[1].bias -= model[1].weight.sum(1) / 2
    x = torch.rand(n, 2, 3, dtype=torch.float64).to(dtype)
    model = model.to(dtype)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % classes
    return model, x, y


def ball(method: str, name: str = "Linf", eps: float = 0.1, order: float | None = None, **box: object) -> Threat:
    """A ball that the attack accepts; W_2 for those that know no W_1."""
    return Threat(name, eps, order if order is not None else 2 if method in BUDGETED else 1, **box)


def run(
    method: str, model: object, x: Tensor, y: Tensor, threat: Threat | None = None, **options: object
) -> wda.AdversarialDistribution:
    """The attack, with few steps."""
    few = {key: value for key, value in FEW.items() if key in attacks.options(method)}
    return attack(method, model, x, y, threat or ball(method), progress=False, **{**few, **options})


def search(method: str, *arguments: object, **options: object) -> attacks.Distances:
    """The distances, with few steps."""
    few = {key: value for key, value in FEW.items() if key in attacks.options(method)}
    return distances(*arguments, method=method, progress=False, **{**few, **options})


def lengths(adv: wda.AdversarialDistribution) -> Tensor:
    """How far each sample's atom moved."""
    return norm(adv.x_adv.double() - adv.x.double(), adv.threat.norm)


def correct(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(model(x), y) < 0


# -- the ball --------------------------------------------------------------------------------------------------------


@each_attack
@each_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_distribution_lies_in_its_ball(method: str, name: str, dtype: torch.dtype) -> None:
    """Three balls for each norm and dtype, other ones for the next."""
    moved = 0
    balls = [
        (1e-3, 1, (0, 1)),
        ("128/255", 1.5, (-0.1, 1.3)),
        (0.4, 2, None),
        (0.1, math.inf, (0, 1)),
        (0.7, 40, (0, 1.2)),
    ]
    for k, (eps, order, box) in enumerate(balls):
        if (k + DTYPES.index(dtype) + NORMS.index(name)) % 5 > 2:
            continue
        if (order == 1 and method in BUDGETED) or (box is None and method in NEEDS_A_BOX):
            continue
        model, x, y = network(classes=3 + k % 3, seed=k, dtype=dtype, n=4)
        kappa = 1 if method in KAPPA_IS_ONE or math.isinf(order) else 1.2
        adv = run(method, model, x, y, ball(method, name, eps, order, box=box), kappa=kappa)
        assert 0 <= adv.audit() <= adv.threat.eps
        assert adv.points.dtype == dtype
        assert math.fsum(adv.mass.tolist()) == pytest.approx(1, abs=1e-12)
        moved += len(adv.moved)
    assert moved > 0


@each_attack
@each_norm
@pytest.mark.parametrize("order", [1.5, 2, math.inf])
def test_most_of_the_budget_can_be_spent(method: str, name: str, order: float) -> None:
    """A model that nobody flips within the ball; only those that look for flips keep their budget."""
    model, x, _ = network(n=6)
    adv = run(method, model, x, model(x).argmax(1), ball(method, name, 1e-4, order))
    if method in (*METHODS, "autoattack", "deepfool"):
        assert adv.accuracy(model) > 0.9
    else:
        assert adv.audit() > 0.2e-4


@each_attack
@pytest.mark.parametrize("order", [1.5, math.inf])
def test_no_budget_moves_nothing(method: str, order: float) -> None:
    model, x, y = network()
    adv = run(method, model, x, y, ball(method, eps=0, order=order))
    assert not len(adv.moved)
    assert adv.audit() == 0
    assert adv.accuracy(model) == pytest.approx(float(correct(model, x, y).double().mean()))


@each_attack
def test_an_attack_does_harm(method: str) -> None:
    model, x, y = network(n=40)
    clean = float(correct(model, x, y).double().mean())
    assert run(method, model, x, y, ball(method, eps=0.15, order=math.inf)).accuracy(model) < clean - 0.1


@pytest.mark.parametrize("method", KAPPA_IS_ONE)
def test_kappa_is_for_those_who_spend_the_budget_evenly(method: str) -> None:
    model, x, y = network()
    with pytest.raises(ValueError, match=r"kappa=1\.5: attack .* only 1 is accepted"):
        run(method, model, x, y, kappa=1.5)


@each_attack
def test_infinite_order_has_no_kappa(method: str) -> None:
    model, x, y = network()
    with pytest.raises(ValueError, match="kappa=2 with order=inf"):
        run(method, model, x, y, ball(method, order=math.inf), kappa=2)


@pytest.mark.parametrize("method", BUDGETED)
def test_a_first_order_attack_on_w_1_is_an_error_that_names_others(method: str) -> None:
    model, x, y = network()
    with pytest.raises(ValueError, match=r"order=1: an order > 1 .*'closest'"):
        run(method, model, x, y, ball(method, order=1))


# -- what must not matter --------------------------------------------------------------------------------------------


@each_attack
@each_norm
def test_the_same_seed_gives_the_same_result_and_leaves_torchs_random_state(method: str, name: str) -> None:
    model, x, y = network()
    first = run(method, model, x, y, ball(method, name), seed=3)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = run(method, model, x, y, ball(method, name), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.mass, again.mass)
    assert (first.counts.forward, first.counts.backward) == (again.counts.forward, again.counts.backward)


def fate(method: str, model: nn.Module, x: Tensor, y: Tensor, name: str, **options: object) -> Tensor:
    """What becomes of each sample: how far it goes, and to which rival if the method says so, (N, 2)."""
    if method in METHODS:
        found = search(method, model, x, y, name, **options)
        return torch.stack([found.distance, found.rival.double()], 1)
    moved = lengths(run(method, model, x, y, ball(method, name), **options))
    return torch.stack([moved, torch.zeros_like(moved)], 1)


# Rounding in single precision may lead far away, where two directions are as good; so there no layer sees the batch.
@each_attack
@pytest.mark.parametrize(
    ("name", "dtype", "linear"),
    [*((name, torch.float64, nn.Linear) for name in NORMS), ("L2", torch.float32, Rowwise)],
    ids=[*NORMS, "single"],
)
def test_neither_the_batch_size_nor_the_order_of_the_samples_matters(
    method: str, name: str, dtype: torch.dtype, linear: type
) -> None:
    """But A3 learns from one sample for the next, and AutoAttack's package draws for a batch."""
    model, x, y = network(dtype=dtype, linear=linear, n=7)
    reference = fate(method, model, x, y, name)
    assert reference.any()
    if method != "autoattack":
        for batch_size in (1, 6):
            other = fate(method, model, x, y, name, batch_size=batch_size)
            torch.testing.assert_close(other, reference, rtol=0, atol=TIE)
    if method not in COUPLED or method in BUDGETED:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        shuffled = fate(method, model, x[order], y[order], name)
        torch.testing.assert_close(shuffled, reference[order], rtol=0, atol=TIE)


@one_by_one
def test_duplicates_of_a_sample_share_its_fate(method: str) -> None:
    model, x, y = network(n=4)
    x, y = x[[1, 2, 1, 3, 1, 2]], y[[1, 2, 1, 3, 1, 2]]
    points = run(method, model, x, y, ball(method, order=math.inf)).x_adv
    for first, second in ((0, 2), (0, 4), (1, 5)):
        torch.testing.assert_close(points[first], points[second], rtol=0, atol=TIE)


@each_attack
def test_duplicates_without_memory_of_their_own_are_attacked(method: str) -> None:
    """A sample that is one point seen many times, as `expand` gives it."""
    model, x, y = network(n=2)
    x, y = x[1:].expand(6, 2, 3), y[1:].expand(6)
    before = x.clone()
    adv = run(method, model, x, y, ball(method, order=math.inf))
    assert torch.equal(x, before)
    torch.testing.assert_close(adv.x_adv, run(method, model, before, y.clone(), adv.threat).x_adv, rtol=0, atol=TIE)


@each_attack
def test_the_layout_of_the_sample_does_not_matter(method: str) -> None:
    model, x, y = network()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    torch.testing.assert_close(run(method, model, turned, y).x_adv, run(method, model, x, y).x_adv, rtol=0, atol=TIE)


@each_attack
@pytest.mark.parametrize(("given", "inside"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_logits_may_have_another_dtype_than_the_sample(method: str, given: torch.dtype, inside: torch.dtype) -> None:
    model, x, y = network(dtype=inside)
    threat = ball(method, order=math.inf)
    adv = run(method, lambda z: model(z.to(inside)), x.to(given), y, threat)
    assert adv.points.dtype == given
    assert adv.audit() <= threat.eps
    single = run(method, model, x, y, threat)
    assert adv.accuracy(lambda z: model(z.to(inside))) == pytest.approx(single.accuracy(model), abs=0.051)


# -- what is left as it was ------------------------------------------------------------------------------------------


class Spy(nn.Module):
    """Counts rows forward and backward; raises `failure` once so many rows have come."""

    def __init__(self, inner: nn.Module, failure: BaseException | None = None, after: float = math.inf) -> None:
        super().__init__()
        self.inner, self.failure, self.after = inner, failure, after
        self.forwards = self.backwards = 0
        self.trained = False

    def forward(self, x: Tensor) -> Tensor:
        if self.failure is not None and self.forwards >= self.after:
            raise self.failure
        self.forwards += len(x)
        self.trained |= any(module.training for module in self.modules())
        logits = self.inner(x)
        if logits.requires_grad:
            logits.register_hook(self._came_back)
        return logits

    def _came_back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@each_attack
@pytest.mark.parametrize("failure", [None, ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_the_model_is_left_as_it_was(method: str, failure: BaseException | None) -> None:
    _, x, y = network(dtype=torch.float32)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)
    model = Spy(nn.Sequential(nn.Flatten(), *layers), failure, after=len(x) // 2)
    model.train()
    layers[1].eval()
    layers[4].weight.grad = torch.ones(4, 8)
    layers[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if failure is None:
        run(method, model, x, y)
    else:
        with pytest.raises(type(failure)):
            run(method, model, x, y, batch_size=5)
    assert model.forwards > 0
    assert not model.trained
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(layers[4].weight.grad, torch.ones(4, 8))
    assert layers[4].bias.grad is None
    assert layers[4].bias.requires_grad
    assert not layers[0].weight.requires_grad


@each_attack
def test_the_sample_is_left_as_it_was_and_the_result_has_no_graph(method: str) -> None:
    model, x, y = network()
    before, labels = x.clone(), y.clone()
    adv = run(method, model, x.requires_grad_(), y.int())
    assert torch.equal(x, before)
    assert torch.equal(y, labels)
    assert x.grad is None
    assert not adv.points.requires_grad
    assert adv.labels.dtype == torch.int64


@each_attack
def test_a_model_that_changes_its_input_in_place_harms_nobody(method: str) -> None:
    inner, x, y = network()
    before = x.clone()
    adv = run(method, lambda z: inner(z.sub_(0.1)), x, y)
    assert torch.equal(x, before)
    torch.testing.assert_close(adv.x_adv, run(method, lambda z: inner(z - 0.1), x, y).x_adv)


@each_attack
def test_nothing_is_printed(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, x, y = network()
    run(method, model, x, y)
    shown = capfd.readouterr()
    assert not shown.out
    assert not shown.err


# -- cost ------------------------------------------------------------------------------------------------------------


@each_attack
@each_norm
@pytest.mark.parametrize(("batch_size", "autocast"), [(4, False), (256, False), (9, True)])
def test_the_model_sees_the_passes_that_are_counted(method: str, name: str, batch_size: int, autocast: bool) -> None:
    model, x, y = network(dtype=torch.float32, n=10)
    spy = Spy(model)
    adv = run(method, spy, x, y, ball(method, name), batch_size=batch_size, autocast=autocast)
    assert adv.audit() <= 0.1
    counts = adv.counts
    assert spy.forwards == round((counts.forward + counts.checks) * len(x), 6)
    assert spy.backwards == round(counts.backward * len(x), 6)
    assert spy.backwards > 0


class Cramped(nn.Module):
    """A model for which memory runs out beyond so many rows, forward or backward."""

    def __init__(self, inner: nn.Module, rows: int, error: type[RuntimeError], message: str, backward: bool) -> None:
        super().__init__()
        self.inner, self.rows, self.error, self.message, self.backward = inner, rows, error, message, backward

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        if self.backward and logits.requires_grad:
            logits.register_hook(lambda gradient: self.allocate(len(gradient)))
        elif not self.backward:
            self.allocate(len(x))
        return logits

    def allocate(self, rows: int) -> None:
        if rows > self.rows:
            raise self.error(self.message)


OUT_OF_MEMORY = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB", False),
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB", True),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory", False),
]


@each_attack
@pytest.mark.parametrize(("error", "message", "backward"), OUT_OF_MEMORY)
def test_where_memory_runs_out_batches_become_smaller(
    method: str, error: type[RuntimeError], message: str, backward: bool
) -> None:
    model, x, y = network(n=10)
    cramped = Cramped(model, 3, error, message, backward)
    adv = run(method, cramped, x, y)
    if method != "autoattack":  # whose package draws for a batch
        torch.testing.assert_close(adv.x_adv, run(method, model, x, y).x_adv, rtol=0, atol=TIE)
    assert adv.audit() <= adv.threat.eps
    cramped.rows = 0
    with pytest.raises(error) as raised:
        run(method, cramped, x, y)
    assert str(raised.value) == message


@one_by_one
def test_where_the_attack_itself_runs_out_of_memory_it_gets_fewer_samples(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of all rivals, say, of a thousand classes."""
    model, x, y = network()
    expected = run(method, model, x, y)
    batched, sizes = Oracle._batched, []

    def cramped(oracle: Oracle, compute: object, n: int) -> tuple[Tensor, ...]:
        sizes.append(n)
        if n > 6:
            raise torch.OutOfMemoryError("no room")
        return batched(oracle, compute, n)

    monkeypatch.setattr(Oracle, "_batched", cramped)
    adv = run(method, model, x, y)
    assert max(sizes) > 6
    torch.testing.assert_close(adv.x_adv, expected.x_adv, rtol=0, atol=TIE)


# -- bad models ------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Logits that are NaN or infinite at some of the inputs, all or one of them; their gradients are NaN."""

    def __init__(
        self, inner: nn.Module, at: Callable[[Tensor], Tensor], value: float = math.nan, one: int | None = None
    ) -> None:
        super().__init__()
        self.inner, self.at, self.value, self.one = inner, at, value, one

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        broken = self.at(x.detach())[:, None].expand_as(logits)
        if self.one is not None:
            broken = broken & (torch.arange(logits.shape[1]) == self.one)
        return torch.where(broken, self.value, logits * torch.where(broken, math.nan, 1.0))


MARK = 0.128


@each_attack
@pytest.mark.parametrize(
    ("width", "value", "one"),
    [(0.0, math.nan, None), (0.2, math.nan, None), (0.2, math.nan, 1), (0.2, math.inf, 1), (0.2, -math.inf, 1)],
    ids=["there alone", "around it", "one is NaN", "one is infinite", "one is minus infinite"],
)
def test_samples_without_logits_are_named_and_stay_where_they_are(
    method: str, width: float, value: float, one: int | None
) -> None:
    inner, x, y = network()
    good = torch.ones(len(x), dtype=torch.bool)
    good[[3, 11]] = False
    x[good, 0, 0] = x[good, 0, 0].clamp(min=0.6)
    x[~good, 0, 0] = MARK
    model = Broken(inner, lambda z: (z[:, 0, 0] - MARK).abs() <= width, value, one)
    threat = ball(method, order=math.inf)
    with pytest.warns(Untrustworthy, match=r"at 2 of 20 samples \(3, 11\), which stay where they are") as caught:
        adv = run(method, model, x, y, threat)
    assert {record.filename for record in caught} <= {inspect.getsourcefile(run)}
    assert torch.equal(adv.x_adv[~good], x[~good])
    if method in COUPLED:
        assert not torch.equal(adv.x_adv[good], x[good])
    else:
        alone = run(method, inner, x[good], y[good], threat)
        torch.testing.assert_close(adv.x_adv[good], alone.x_adv, rtol=0, atol=TIE)


@each_attack
def test_a_model_without_logits_is_an_error(method: str) -> None:
    inner, x, y = network()
    with pytest.raises(ValueError, match=r"model\(x\) has NaN .* at every sample"):
        run(method, Broken(inner, lambda z: z[:, 0, 0] < 2), x, y)


@each_attack
def test_a_point_without_logits_is_no_flip(method: str) -> None:
    """Logits end in NaN not far from each sample: who counts that as an error believes in flips that are none."""
    inner, x, y = network()
    with torch.no_grad():
        inner[3].weight.mul_(0.01)
        inner[3].bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    y = torch.zeros_like(y)
    x[:, 0, 0] = 0.5
    model = Broken(inner, lambda z: (z[:, 0, 0] - 0.5).abs() > 0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adv = run(method, model, x, y)
        accuracy = adv.accuracy(model)
    assert accuracy == 1 or any("count as misclassified" in str(record.message) for record in caught)


class Kinked(torch.autograd.Function):
    """The identity, with a derivative that is not a number where it is above 1/2."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x[:, :1, :1] > 0.5, torch.nan, gradient)


@each_attack
def test_gradients_that_are_no_numbers_are_warned_of(method: str) -> None:
    inner, x, y = network()
    with pytest.warns(Untrustworthy, match="NaN or infinite .*gradients"):
        adv = run(method, lambda z: inner(Kinked.apply(z)), x, y, ball(method, eps=0.2, order=math.inf))
    assert adv.audit() <= 0.2
    assert adv.accuracy(inner) < float(correct(inner, x, y).double().mean()), "the others are attacked"


@each_attack
@each_norm
def test_a_model_that_ignores_its_input_breaks_nothing(method: str, name: str) -> None:
    _, x, y = network()
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[1].weight)
    y = torch.full_like(y, int(model[1].bias.argmax()))
    with pytest.warns(Untrustworthy, match="of the gradients were zero"):
        adv = run(method, model, x, y, ball(method, name))
    assert adv.audit() <= 0.1
    assert adv.accuracy(model) == 1
    assert adv.counts.vanished == 1


@each_attack
def test_a_model_without_a_gradient_is_an_error(method: str) -> None:
    model, x, y = network()
    with pytest.raises(ValueError, match="carries no gradient"):
        run(method, lambda z: model(z.detach()).detach(), x, y)


@each_attack
@each_norm
def test_a_model_that_is_wrong_everywhere_stays_so(method: str, name: str) -> None:
    model, x, _ = network(n=12)
    y = model(x).argmin(1)
    adv = run(method, model, x, y, ball(method, name, eps=0.01))
    assert adv.accuracy(model) == 0
    if method in (*METHODS, "autoattack", "deepfool", "apgd-ce", "apgd-dlr", "a3", "a3++"):
        assert not len(adv.moved), "an error costs nothing"
    if method in METHODS:
        found = search(method, model, x, y, name)
        assert not found.distance.any()
        assert torch.equal(found.rival, model(x).argmax(1))


@each_attack
def test_ties_are_errors(method: str) -> None:
    """All logits are equal everywhere: nobody is right, and nothing is to be done."""
    _, x, y = network()
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    adv = run(method, model, x, y)
    assert adv.accuracy(model) == 0
    assert adv.counts.vanished == 0
    if method in METHODS:
        found = search(method, model, x, y)
        assert not found.distance.any()
        assert ((found.rival >= 0) & (found.rival != y)).all()


@each_attack
def test_a_random_model_is_warned_of(method: str) -> None:
    inner, x, y = network(dtype=torch.float32)

    def model(z: Tensor) -> Tensor:
        return inner(nn.functional.dropout(z, 0.3, training=True))

    with pytest.warns(Untrustworthy, match="the model is random"):
        run(method, model, x, y)


@each_attack
@pytest.mark.filterwarnings("error::wda.errors.Untrustworthy")
def test_a_good_model_is_not_warned_of(method: str) -> None:
    model, x, y = network()
    run(method, model, x, y)


# -- bad samples -----------------------------------------------------------------------------------------------------


@each_attack
@each_norm
@pytest.mark.filterwarnings("ignore:autoattack. with K")
def test_two_classes(method: str, name: str) -> None:
    model, x, y = network(classes=2, seed=2)
    threat = ball(method, name, eps={"Linf": 0.2, "L2": 0.5, "L1": 1.0}[name], order=math.inf)
    if method in (*BUDGETED, "apgd-dlr"):
        with pytest.raises(ValueError, match="needs K >= 3"):
            run(method, model, x, y, threat)
    if method != "apgd-dlr":
        options = {"loss": "margin"} if method in BUDGETED else {}
        adv = run(method, model, x, y, threat, **options)
        assert adv.accuracy(model) < float(correct(model, x, y).double().mean())


@each_attack
@each_norm
def test_one_sample_is_enough(method: str, name: str) -> None:
    model, x, y = network()
    row = int(correct(model, x, y).nonzero()[0])
    adv = run(method, model, x[row : row + 1], y[row : row + 1], ball(method, name))
    assert adv.audit() <= 0.1
    assert adv.x_adv.shape == (1, 2, 3)


@each_attack
@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_images_at_the_sides_of_the_box(method: str, name: str, dtype: torch.dtype) -> None:
    model, x, _ = network(dtype=dtype, n=30)
    x = (x > 0.5).to(dtype)
    y = model(x).argmax(1)
    eps = {"Linf": 0.3, "L2": 0.7, "L1": 1.5}[name]
    adv = run(method, model, x, y, ball(method, name, eps, math.inf))
    assert adv.audit() <= eps
    assert adv.accuracy(model) < 1


@each_attack
@pytest.mark.parametrize("shape", [(1,), (6,), (1, 2, 3), (3, 5, 5)], ids=str)
def test_a_sample_may_have_any_shape(method: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    adv = run(method, model, x, model(x).argmax(1), ball(method, "L2", 0.5))
    assert adv.audit() <= 0.5
    assert adv.x_adv.shape == x.shape


NAN = torch.full((20, 2, 3), math.nan, dtype=torch.float64)
BAD = [
    ({"x": NAN}, ValueError, "x has NaN"),
    ({"x": torch.ones(20, 2, 3) * 2}, ValueError, "outside box="),
    ({"x": torch.rand(20, 2, 3)}, TypeError, "x has dtype torch.float32, the model torch.float64"),
    ({"x": torch.rand(19, 2, 3).double()}, ValueError, "x of shape .19, 2, 3., y of shape .20,."),
    ({"x": NAN[:0], "y": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one sample"),
    ({"y": torch.full((20,), 4)}, ValueError, "y has the label 4, the model has K=4"),
    ({"y": torch.full((20,), -1)}, ValueError, "y has the label -1"),
    ({"y": torch.zeros(20)}, TypeError, "y: an integer tensor"),
    ({"model": None}, TypeError, "model=None"),
    ({"model": nn.Linear(4, 4).double()}, RuntimeError, r"model\(x\) failed on x of shape"),
    ({"threat": "Linf"}, TypeError, "threat='Linf'"),
    ({"kappa": 0.5}, ValueError, "kappa=0.5"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"batch_size": 0}, ValueError, "batch_size=0"),
]


@each_attack
@pytest.mark.parametrize(("changed", "error", "named"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_is_named(method: str, changed: dict[str, object], error: type[Exception], named: str) -> None:
    model, x, y = network()
    with pytest.raises(error, match=named):
        run(method, **{"model": model, "x": x, "y": y, **changed})


@each_attack
def test_options_that_it_has_not_are_named(method: str) -> None:
    model, x, y = network()
    shared = ["kappa"] * (method not in KAPPA_IS_ONE) + ["seed", "batch_size", "autocast", "progress"]
    accepted = ", ".join([*shared, *attacks.options(method)])
    with pytest.raises(TypeError, match=f"colour='red': attack '.*' accepts {accepted}$"):
        run(method, model, x, y, colour="red")


@each_attack
def test_bad_options_are_named(method: str) -> None:
    model, x, y = network()
    for option, default in attacks.options(method).items():
        bad = {bool: "perhaps", int: -1, float: math.nan, str: "nonsense", type(None): -1}[type(default)]
        with pytest.raises((ValueError, TypeError), match=rf"{option}={bad!r}"):
            attack(method, model, x, y, ball(method), **{option: bad})


@pytest.mark.parametrize("method", NEEDS_A_BOX)
def test_without_a_box_autoattacks_methods_are_an_error(method: str) -> None:
    model, x, y = network()
    with pytest.raises(ValueError, match="box=None"):
        run(method, model, x, y, ball(method, box=None))


# -- distances -------------------------------------------------------------------------------------------------------


@each_method
@each_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-0.1, 1.3)], ids=str)
def test_a_distance_is_that_of_an_error(method: str, name: str, dtype: torch.dtype, box: tuple[float, float]) -> None:
    model, x, y = network(n=40, seed=3, dtype=dtype)
    found = search(method, model, x, y, name, box)
    right = correct(model, x, y)
    assert torch.equal(found.distance == 0, ~right)
    reached = found.distance.isfinite()
    assert reached.double().mean() > 0.5
    stays = ~right | ~reached
    assert torch.equal(found.x_adv[stays], x[stays])
    assert torch.equal(found.distance[reached], norm(found.x_adv.double() - x.double(), name)[reached])
    assert found.distance.dtype == torch.float64
    assert found.x_adv.dtype == dtype
    low, high = wda.norms.bounds(box, x)
    assert low <= found.x_adv.min()
    assert found.x_adv.max() <= high
    assert torch.equal(found.rival == -1, ~reached)
    assert (found.rival != y).all()
    # one by one, in other company than that of the search
    for row in reached.nonzero()[:, 0].tolist():
        logits = model(found.x_adv[row : row + 1])[0]
        assert logits[found.rival[row]] == logits.max()


@each_method
@each_norm
def test_robust_accuracy_is_what_the_distribution_leaves(method: str, name: str) -> None:
    model, x, y = network(n=40, seed=4)
    found = search(method, model, x, y, name)
    typical = float(found.distance[found.distance.isfinite() & (found.distance > 0)].median())
    budgets = [typical * share for share in (0.0, 0.01, 0.1, 0.3, 1.0, 3.0)]
    for order in (1, 1.5, 2, math.inf):
        left = found.robust_accuracy(budgets, order)
        assert (left.diff() <= 0).all()
        assert left[0] == correct(model, x, y).double().mean()
        assert left[-1] < left[0] - 0.3
        for eps, accuracy in zip(budgets, left.tolist(), strict=True):
            threat = Threat(name, eps, order)
            adv = found.distribution(threat)
            assert adv.audit() <= eps
            assert adv.accuracy(model) == pytest.approx(accuracy, abs=1e-9)
            share = allocate(found.distance, threat)
            torch.testing.assert_close(adv.weight, share.where(found.distance > 0, 0))
            assert adv.counts == found.counts


@each_method
def test_the_attack_spends_the_budget_on_the_distances(method: str) -> None:
    model, x, y = network()
    threat = Threat("L2", 0.1, 2)
    adv, expected = run(method, model, x, y, threat), search(method, model, x, y, "L2").distribution(threat)
    assert torch.equal(adv.points, expected.points)
    assert torch.equal(adv.mass, expected.mass)


@each_method
@each_norm
def test_where_no_error_is_in_the_box_the_distance_is_infinite(method: str, name: str) -> None:
    model = nn.Linear(2, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]]))
        model.bias.copy_(torch.tensor([0.0, -2.01, -3.0]))
    x = torch.tensor([[0.9, 0.8], [0.1, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    found = search(method, model, x, y, name)
    assert found.distance.tolist() == [math.inf, 0]
    assert found.rival.tolist() == [-1, 0]
    assert torch.equal(found.x_adv, x)
    assert found.robust_accuracy(10.0).item() == 0.5
    assert found.distribution(Threat(name, 0.9)).accuracy(model) == 0.5
    assert repr(found) == f"Distances(2 samples, 1 with an error in reach, {name})"
    further = search(method, model, x, y, name, (0, 1.1))
    assert further.distance[0] == pytest.approx({"Linf": 0.155, "L2": 0.31 / math.sqrt(2), "L1": 0.31}[name], rel=0.2)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_points_stay_errors_when_rounding_changes(method: str, dtype: torch.dtype, scale: float) -> None:
    """Logits that depend on the company a sample is in, as those of a matrix product by blocks do."""
    inner, x, y = network(n=40, seed=5, dtype=dtype)
    with torch.no_grad():
        inner[3].weight.mul_(scale)
        inner[3].bias.mul_(scale)

    def model(z: Tensor) -> Tensor:
        logits = inner(z)
        place = torch.arange(logits.numel(), dtype=dtype).view_as(logits) + 17 * len(z)
        return logits + 4 * torch.finfo(dtype).eps * logits.abs().amax(1, keepdim=True) * (7 * place).sin()

    # bisected down to the boundary: what is found there changes sides
    found = search(method, model, x, y, "L2", **({"bisections": 60} if method == "wda++" else {}))
    reached = found.distance.isfinite().nonzero()[:, 0]
    assert len(reached) > 30
    for size in (1, 2, 3, 7, len(reached)):
        for rows in reached.split(size):
            assert (margin(model(found.x_adv[rows]), y[rows]) >= 0).all()


def test_distances_name_bad_arguments() -> None:
    model, x, y = network()
    for arguments, error, named in [
        ({"method": "pgd"}, ValueError, "method='pgd': one of 'fab', 'wda[+]{2}', 'closest'"),
        ({"method": None}, ValueError, "method=None"),
        ({"norm": "L3"}, ValueError, "norm='L3'"),
        ({"box": (1, 0)}, ValueError, "box="),
        ({"box": 1}, TypeError, "box=1"),
        ({"box": (0, 0.5)}, ValueError, "outside box="),
        ({"seed": 0.5}, ValueError, "seed=0.5"),
        ({"batch_size": -1}, ValueError, "batch_size=-1"),
        ({"kappa": 2}, TypeError, "kappa=2: method 'closest' accepts"),
        ({"method": "wda++", "bisections": -1}, ValueError, "bisections=-1"),
        ({"method": "wda++", "loss": "ce"}, TypeError, "loss='ce': method 'wda[+]{2}' accepts steps"),
        ({"method": "fab", "box": None}, ValueError, "box=None"),
        ({"model": "mlp"}, TypeError, "model='mlp'"),
        ({"y": y + 4}, ValueError, "y has the label"),
    ]:
        with pytest.raises(error, match=named):
            distances(**{"model": model, "x": x, "y": y, **arguments})
    found = search("wda++", model, x, y, "L2")
    for threat in (Threat("L1", 0.1), Threat("L2", 0.1, box=None), Threat("L2", 0.1, box=(0, 2))):
        with pytest.raises(ValueError, match=r"threat=W_1 .* norm='L2' and box=\(0.0, 1.0\) are accepted"):
            found.distribution(threat)
    with pytest.raises(ValueError, match="eps=-1"):
        found.robust_accuracy(-1)
