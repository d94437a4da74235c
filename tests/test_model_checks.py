"""What speaks against a model is noticed by every attack, and what does not is not; it is left as it came."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wda
from wda import Threat, attacks
from wda.errors import Untrustworthy
from wda.experiment import doubts
from wda.experiment.cells import load_inputs
from wda.inspection import inspected
from wda.passes import Oracle

Logits = Callable[[Tensor], Tensor]
RANDOM, COMPANY, AWAKE = "the model is random", "depend on the others in its batch", "puts itself into training mode"
FEW = {"steps": 3, "probe_steps": 1, "restarts": 1, "levels": 1}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def network(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, classes))


def sample(model: Logits, n: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, model(x).argmax(1)


def said(call: Callable[[], object]) -> list[str]:
    """What is said against the model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    messages = [str(w.message) for w in caught if issubclass(w.category, Untrustworthy)]
    return [part for part in (RANDOM, COMPANY, AWAKE) if any(part in message for message in messages)]


def attacked(
    method: str, model: Logits, x: Tensor, y: Tensor, threat: Threat | None = None, **options: object
) -> wda.AdversarialDistribution:
    few = {key: value for key, value in FEW.items() if key in attacks.options(method)}
    return wda.attack(method, model, x, y, threat or Threat("Linf", 0.05, 2), progress=False, **{**few, **options})


def sometimes(net: nn.Module, rate: float, seed: int) -> Logits:
    """The network, with noise in one call of so many."""
    generator = torch.Generator().manual_seed(seed)

    def model(x: Tensor) -> Tensor:
        logits = net(x)
        noisy = torch.rand((), generator=generator) < rate
        return logits + torch.randn(logits.shape, generator=generator) if noisy else logits

    return model


# -- chance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "least"), [(1.0, 60), (1 / 5, 60), (1 / 20, 54)])
def test_a_model_that_is_random_now_and_then_is_noticed(rate: float, least: int) -> None:
    """Of 60 seeds: all where one call in five is, and 1 - (19/20)^64 = 96 % of them, less three deviations, in 20."""
    net = network()
    x, y = sample(net)
    noticed = [said(lambda seed=seed: attacked("fgsm", sometimes(net, rate, seed), x, y)) for seed in range(60)]
    assert sum(told == [RANDOM] for told in noticed) >= least
    assert all(told in ([RANDOM], []) for told in noticed), "chance was taken for something else"


def test_as_many_calls_look_for_chance_as_are_said_to() -> None:
    calls = []
    net = network()
    x, y = sample(net)
    with Oracle(lambda x: calls.append(len(x)) or net(x)) as oracle, inspected(oracle, x, y, x + 1):
        before = len(calls)
    assert calls.count(1) >= 64
    assert min(before, len(calls) - before) >= 32
    assert oracle.forward == 0
    assert oracle.checks == sum(calls) <= 100


def test_noise_that_only_decides_at_the_boundary_is_noticed_there() -> None:
    """Far below what logits may differ by; but it decides of what class the points are that were found."""
    net = network()
    net[2].weight.data *= 10
    x, y = sample(net)
    noise = torch.Generator().manual_seed(0)

    def model(x: Tensor) -> Tensor:
        logits = net(x)
        return logits + 2e-5 * torch.randn(logits.shape, generator=noise)

    def look(found: Tensor) -> None:
        with Oracle(model) as oracle, inspected(oracle, x, y, found):
            pass

    assert said(lambda: look(x)) == []
    assert said(lambda: look(wda.distances(net, x, y, progress=False).x_adv)) == [RANDOM]


@pytest.mark.parametrize("method", attacks.available())
def test_every_attack_looks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for ensemble in ("_TOGETHER", "_ATTACKS"):  # AutoAttack sets its lengths itself, and they are long
        monkeypatch.setitem(getattr(attacks, ensemble), "autoattack", attacks.a3)
    net = network(4)
    x, y = sample(net)

    def mean_of_batch(x: Tensor) -> Tensor:
        return net(x - x.mean(0))

    assert said(lambda: attacked(method, net, x, y)) == []
    assert said(lambda: attacked(method, sometimes(net, 0.5, 0), x, y)) == [RANDOM]
    assert said(lambda: attacked(method, mean_of_batch, x, y)) == [COMPANY]


def test_distances_brackets_and_slopes_look_too() -> None:
    net = network()
    x, y = sample(net)
    hidden = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    for model, expected in ((net, []), (sometimes(net, 1.0, 0), [RANDOM]), (lambda x: net(x - x.mean(0)), [COMPANY])):
        assert said(lambda m=model: wda.distances(m, x, y, steps=2, restarts=1, progress=False)) == expected
        assert said(lambda m=model: attacks.sensitivity(m, x, y)) == expected
    images = x.view(-1, 1, 2, 2)
    spread = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), net)
    threat = Threat("Linf", 0.05)
    assert said(lambda: wda.bracket(spread, images, y, threat, steps=2, restarts=1, progress=False)) == [COMPANY]
    with pytest.raises(ValueError, match=r"takes no sample alone.* \(1\)"):
        wda.bracket(hidden, x, y, threat, progress=False)


# -- company ---------------------------------------------------------------------------------------------------------


class Standing(nn.Module):
    """A network behind a normalisation of images."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.net = norm, network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x.view(-1, 1, 2, 2)).flatten(1))


class Waking(Standing):
    """One that puts itself into training mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.train()
        return super().forward(x)


DEPENDENT: dict[str, Logits] = {
    "batch normalisation without running statistics": Standing(nn.BatchNorm2d(1, track_running_stats=False)),
    "the mean of the batch": lambda x: network()(x - x.mean(0)),
    "the largest of the batch": lambda x: network()(x / x.max()),
    "the rank in the batch": lambda x: network()(x) + x.argsort(0).argsort(0).to(x)[:, :3],
    "the place in the batch": lambda x: network()(x) + 0.1 * torch.arange(len(x)).to(x)[:, None] * torch.eye(3)[0],
    "the size of the batch": lambda x: network()(x) * (1 + 0.01 * len(x)),
    "one per cent of the batch's mean": lambda x: network()(x) + 0.01 * network(seed=1)(x).mean(0),
}
INDEPENDENT: dict[str, Logits] = {
    "batch normalisation": Standing(nn.BatchNorm2d(1)),
    "instance normalisation": Standing(nn.InstanceNorm2d(1)),
    "group normalisation": Standing(nn.GroupNorm(1, 1)),
    "an offset": lambda x: network()(x) + 1e4,
    "a factor": lambda x: 1e-6 * network()(x),
    "a large factor": lambda x: 1e6 * network()(x),
    "logits that are all the same": lambda x: 0 * network()(x),
    "half precision inside": lambda x: network().half()(x.half()).float(),
    "bfloat16 inside": lambda x: network().bfloat16()(x.bfloat16()).float(),
}


@pytest.mark.parametrize("case", DEPENDENT)
def test_logits_that_depend_on_the_batch_are_told(case: str) -> None:
    model = DEPENDENT[case]
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(20, dtype=torch.int64)
    assert said(lambda: attacked("fgsm", model, x, y)) == [COMPANY]
    [told] = [line for line in doubts(model, x, y) if RANDOM in line or COMPANY in line]
    assert COMPANY in told
    assert ("(norm)" in told) == isinstance(model, Standing)


@pytest.mark.parametrize("case", INDEPENDENT)
def test_others_are_not(case: str) -> None:
    model = INDEPENDENT[case]
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    assert said(lambda: attacked("pgd", model, x, torch.zeros(20, dtype=torch.int64))) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_rounding_is_not_taken_for_company(n: int, dtype: torch.dtype) -> None:
    """Deep and wide, so that sums of other batches round otherwise; from a found point on, one bit changes classes."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), *layers, nn.Linear(64, 5)).to(dtype)
    x, y = sample(model, n, dtype)
    assert said(lambda: attacked("closest", model, x, y)) == []


def test_a_model_that_wakes_itself_is_named() -> None:
    x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
    model = Waking(nn.BatchNorm2d(1)).eval()
    assert AWAKE in said(lambda: attacked("fgsm", model, x, y))
    assert any("(Waking, norm, net" in line for line in doubts(model, x, y))
    flat = Waking(nn.Identity()).eval()
    flat.net.append(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"takes no sample alone: batch normalisation .*\(net\.3\)"):
        attacked("fgsm", flat, x, y)


# -- the model is left as it came ------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A model with state of every kind: counted in place, replaced, and of batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = network(), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()[None]
        self.norm.train()
        if len(x) > 1:
            self.norm(x.detach())
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_modes_come_back(fails: bool) -> None:
    model = Counting().train()
    model.net.eval()
    kept = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    held = dict(model.named_buffers())
    x, y = sample(network())
    if fails:
        with pytest.raises(ValueError, match="K=3"):
            attacked("fgsm", model, x, y + 7)
    else:
        assert said(lambda: attacked("pgd", model, x, y)) == [AWAKE]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(buffer is held[name] for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == modes


# -- dtypes, scripts, checkpoints, what has no gradient ----------------------------------------------------------------


class Inside(nn.Module):
    """Computes in its own dtype whatever comes, and answers in the caller's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.own = network().to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.own)).to(x.dtype)


@pytest.mark.parametrize("outside", DTYPES, ids=str)
@pytest.mark.parametrize("inside", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["pgd", "wda"])
def test_a_model_that_casts_runs_in_any_dtype(method: str, inside: torch.dtype, outside: torch.dtype) -> None:
    model = Inside(inside)
    x, y = sample(model, dtype=outside)
    found = attacked(method, model, x, y)
    assert found.points.dtype == outside
    assert found.audit() <= 0.05


@pytest.mark.parametrize("outside", DTYPES, ids=str)
@pytest.mark.parametrize("inside", DTYPES, ids=str)
def test_one_that_does_not_is_named_with_both_dtypes(inside: torch.dtype, outside: torch.dtype) -> None:
    if inside == outside:
        return
    x, y = torch.rand(5, 4).to(outside), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(TypeError, match=rf"x has dtype {outside}, the model {inside}, .*x\.to\({inside}\)"):
        attacked("fgsm", network().to(inside), x, y)


def test_another_failure_is_not_blamed_on_the_dtype() -> None:
    with pytest.raises(RuntimeError, match=r"model\(x\) failed on x of shape \(1, 7\).*shapes cannot"):
        attacked("fgsm", Inside(torch.float16), torch.rand(5, 7), torch.zeros(5, dtype=torch.int64))


def test_scripts_give_what_the_module_gives() -> None:
    net = network().eval()
    x, y = sample(net)
    scripts = [torch.jit.script(net), torch.jit.trace(net, x[:2]), torch.jit.freeze(torch.jit.script(net))]
    for script in scripts:
        for method in ("pgd", "wda"):
            one, other = attacked(method, script, x, y), attacked(method, net, x, y)
            torch.testing.assert_close(one.x_adv, other.x_adv, atol=1e-4, rtol=0)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def test_gradient_checkpointing() -> None:
    x, y = sample(network())
    plain, again = (attacked("wda", model, x, y) for model in (network(), Checkpointed(False)))
    torch.testing.assert_close(plain.x_adv, again.x_adv)
    for method in ("fgsm", "closest"):
        with pytest.raises(ValueError, match=r"reentrant gradient checkpointing.*use_reentrant=False"):
            attacked(method, Checkpointed(True), x, y)


def of_numpy(x: Tensor) -> Tensor:
    """A forest of one tree, as it would be called outside torch."""
    return torch.from_numpy((x.numpy()[:, :3] > 0.5).astype("float32"))


@pytest.mark.parametrize("model", [of_numpy, lambda x: of_numpy(x.detach()), torch.no_grad()(network())])
def test_what_has_no_gradient_is_refused_in_words(model: Logits) -> None:
    x = torch.rand(8, 4)
    with pytest.raises(ValueError, match=r"model\(x\) carries no gradient, and attacks need one"):
        attacked("fgsm", model, x, torch.zeros(8, dtype=torch.int64))


def test_an_estimator_is_no_model_and_an_array_no_tensor() -> None:
    x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, or another callable"):
        attacked("fgsm", object(), x, y)
    with pytest.raises(ValueError, match=r"model\(x\) is ndarray for 1 samples"):
        attacked("fgsm", lambda x: x.detach().numpy(), x, y)


# -- memory and cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2, 5, 99])
def test_gradients_of_a_few_rivals_at_a_time_are_the_same(together: int) -> None:
    model, x = network(9), torch.rand(6, 4)
    y = model(x).argmax(1)
    rivals = model(x).argsort(1)[:, :-1]
    with Oracle(model) as whole, Oracle(model) as parted:
        logits, gradients = whole.margin_gradients(x, y, rivals)
        again, parts = parted.rival_gradients(x, y, rivals, together)
        parts = list(parts)
    assert torch.equal(logits, again)
    assert torch.equal(gradients, torch.cat([part for _, part in parts], 1))
    assert [some.start for some, _ in parts] == list(range(0, 8, together))
    assert (whole.forward, whole.backward, whole.vanished) == (parted.forward, parted.backward, parted.vanished)
    gaps = model(x.requires_grad_()).gather(1, rivals) - model(x).gather(1, y[:, None])
    for j in range(8):
        (own,) = torch.autograd.grad(gaps[:, j].sum(), x, retain_graph=True)
        torch.testing.assert_close(gradients[:, j], own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("box", [(0.0, 0.001), (0.1, 0.3), (-1e-3, 7e-3), (1 / 3, 2 / 3), (-0.1, 1.3)], ids=str)
def test_a_sample_on_the_sides_of_the_box_is_in_it_in_every_dtype(
    box: tuple[float, float], norm: str, dtype: torch.dtype
) -> None:
    """Whatever way the dtype rounds the sides, a coordinate there is on them; and a bit further out is outside."""
    low, high = torch.tensor(box, dtype=dtype)
    x = torch.stack([low.repeat(4), high.repeat(4), torch.stack([low, high, low, high])])
    net = nn.Linear(4, 3).to(dtype)
    y, width = net(x).argmax(1), box[1] - box[0]
    for method, eps in (("fgsm", 0.0), ("closest", 0.3 * width)):
        adv = attacked(method, net, x, y, Threat(norm, eps, 1, box=box))
        assert adv.audit() <= eps
        assert ((adv.points >= low) & (adv.points <= high)).all()
    for outside in (torch.nextafter(low, low - 1), torch.nextafter(high, high + 1)):
        with pytest.raises(ValueError, match="outside box="):
            wda.attack("fgsm", net, outside.repeat(1, 4), y[:1], Threat(norm, 0.1 * width, box=box))
        with pytest.raises(wda.BudgetExceeded, match="leaves box="):
            wda.AdversarialDistribution.from_points(
                x, torch.where(x == x[0, 0], outside, x), y, Threat(norm, 9.0, box=box)
            ).audit()


def test_a_bracket_is_about_the_box_of_its_sample() -> None:
    box = (0.0, 0.001)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = 0.001 * torch.rand(6, 4).round()
    b = wda.bracket(net, x, net(x).argmax(1), Threat("Linf", 2e-4, box=box), steps=5, progress=False)
    assert b.lower <= b.upper
    assert b.why is None
    assert b.distances is not None
    b.distances.distribution(b.threat).audit()


CASTS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 10).half()

    def forward(self, x):
        return self.inner(x.flatten(1).half()).to(x.dtype)


def casts():
    return Net()


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def half():
    return plain().half()
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "kept"), [("casts", "float16"), ("plain", None), ("half", None)])
def test_what_a_notebook_loads_runs_in_the_precision_it_asks_for(
    name: str, kept: str | None, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that casts inside keeps its own dtypes, and any other is converted."""
    (tmp_path / "own_casts.py").write_text(CASTS)
    monkeypatch.syspath_prepend(tmp_path)
    x, y, net, _ = load_inputs("digits", f"own_casts:{name}", 5, dtype, "cpu")
    assert str(x.dtype) == f"torch.{dtype}"
    assert str(next(net.parameters()).dtype) == f"torch.{kept or dtype}"
    assert net(x).dtype == x.dtype
    assert attacked("fgsm", net, x, y).audit() <= 0.05


@pytest.mark.parametrize(("classes", "method", "options", "told"), [
    (80, "wda", {"probe_steps": 2}, "wda takes 79 gradients of each sample.*158 backward passes"),
    (80, "deepfool", {}, "deepfool takes 79 gradients of each sample"),
    (80, "wda", {"rivals": 9}, None),
    (80, "wda", {"halving": True}, None),
    (10, "wda", {}, None),
    (80, "pgd", {}, None),
])  # fmt: skip
def test_many_gradients_a_step_are_told_before_the_first(
    classes: int, method: str, options: dict[str, object], told: str | None
) -> None:
    net = network(classes)
    x, y = sample(net, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*backward passes a sample")
        if told is None:
            attacked(method, net, x, y, **options)
        else:
            taken = []
            net.register_full_backward_hook(lambda *_: taken.append(1))
            with pytest.raises(UserWarning, match=told):
                attacked(method, net, x, y, **options)
            assert not taken


@pytest.mark.parametrize("method", ["wda", "deepfool"])
def test_no_more_than_a_batch_of_gradients_is_held_at_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixty classes and four samples: with batches of eight rows, those of two rivals at a time."""
    net, held = network(60), []
    x, y = sample(net, 4)
    whole = attacked(method, net, x, y)
    stack = torch.stack

    def counted(tensors: list[Tensor], dim: int = 0) -> Tensor:
        stacked = stack(tensors, dim)
        held.append(stacked.shape[:2].numel() if stacked.ndim == 3 else 0)
        return stacked

    monkeypatch.setattr(torch, "stack", counted)
    parted = attacked(method, net, x, y, batch_size=8)
    assert 0 < max(held) <= 8
    assert parted.counts.backward == whole.counts.backward
    torch.testing.assert_close(parted.x_adv, whole.x_adv)
