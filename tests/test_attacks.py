"""Attacks in a ball around each sample: exact where the optimum is known, invariant where nothing should matter."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wda
from wda import Threat, attack, attacks, norms, passes
from wda.attacks.search import uniform_start
from wda.losses import margin
from wda.norms import dual, norm

NORMS = ("Linf", "L2", "L1")
NAMES = ("fgsm", "pgd", "deepfool", "wda")  # tests/test_every_attack.py has what holds for all
each_norm = pytest.mark.parametrize("name", NORMS)
each_attack = pytest.mark.parametrize("method", NAMES)


def affine(classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """An affine classifier of (N, 2, 3), points in [0, 1], and its own answers for labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, classes)).to(dtype)
    x = torch.rand(8, 2, 3, dtype=torch.float64).to(dtype)
    return model, x, model(x).argmax(1).detach()


def gaps_and_slopes(model: nn.Module, x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """z_j - z_y and the dual norm of its gradient for every class j, both (N, K), in float64."""
    w, b = (p.detach().double() for p in model[1].parameters())
    z = x.double().flatten(1) @ w.T + b
    differences = (w - w[y][:, None]).transpose(0, 1)  # (K, N, 6)
    slopes = torch.stack([norm(d, dual(name)) for d in differences], dim=1)
    return z - z.gather(1, y[:, None]), slopes


def elsewhere(y: Tensor, classes: int) -> Tensor:
    """True at the classes that are not the label, (N, K)."""
    return y[:, None] != torch.arange(classes)


# -- affine models: the optimum is known -----------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("method", "classes"), [("fgsm", 2), ("pgd", 2), ("wda", 2), ("wda", 3), ("wda", 10)])
@pytest.mark.parametrize("radius", [0.1, 2.0])
def test_the_largest_margin_of_an_affine_model_is_reached(
    name: str, dtype: torch.dtype, seed: int, method: str, classes: int, radius: float
) -> None:
    model, x, y = affine(classes, seed, dtype=dtype)
    y[::4] = (y[::4] + 1) % classes  # some samples that are wrong from the start
    adv = attack(method, model, x, y, Threat(name, radius, order=math.inf, box=None))
    gaps, slopes = gaps_and_slopes(model, x, y, name)
    optimum = torch.where(elsewhere(y, classes), gaps + radius * slopes, -math.inf).amax(1)
    gain = optimum - margin(gaps, y)
    reached = margin(model(adv.x_adv), y).double() - margin(gaps, y)
    assert (reached / gain >= 0.99).all()
    assert (reached / gain <= 1 + 1e-4).all()


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_deepfool_ends_just_behind_the_nearest_boundary(name: str, dtype: torch.dtype, seed: int, classes: int) -> None:
    model, x, y = affine(classes, seed, dtype=dtype)
    adv = attack("deepfool", model, x, y, Threat(name, 1e3, order=math.inf, box=None))
    gaps, slopes = gaps_and_slopes(model, x, y, name)
    nearest = torch.where(elsewhere(y, classes), -gaps / slopes, math.inf).amin(1)
    assert (margin(model(adv.x_adv), y) >= 0).all()
    ratio = norm(adv.x_adv.double() - x.double(), name) / nearest
    assert (ratio >= 1).all()
    assert (ratio <= 1.01).all()


def test_deepfool_leaves_errors_where_they_are() -> None:
    model, x, y = affine(3)
    assert not len(attack("deepfool", model, x, (y + 1) % 3, Threat(eps=1.0)).moved)


@each_norm
def test_wda_with_one_rival_pursues_the_largest_logit(name: str) -> None:
    model, x, y = affine(10)
    gaps, slopes = gaps_and_slopes(model, x, y, name)
    second = torch.where(elsewhere(y, 10), gaps, -math.inf).argmax(1, keepdim=True)
    adv = attack("wda", model, x, y, Threat(name, 2.0, order=math.inf, box=None), rivals=1)
    z = model(adv.x_adv).detach()
    reached = (z.gather(1, second) - z.gather(1, y[:, None]))[:, 0]
    assert reached.numpy() == pytest.approx((gaps + 2 * slopes).gather(1, second)[:, 0].numpy(), rel=1e-6)
    best = torch.where(elsewhere(y, 10), gaps + 2 * slopes, -math.inf).amax(1)
    assert (best > reached + 1e-3).any(), "another rival would be better for none of these samples"


# -- which rival: row 11 of the audit --------------------------------------------------------------------------------

ROW_11 = [[3.0, -4.0, 7.0], [5.0, -4.0, 4.0], [3.0, 1.0, 3.0]]  # theta = (7+3a-4b, 4+5a-4b, 3+3a+b)


def planar(shift: tuple[float, float] = (0.0, 0.0)) -> Callable[[Tensor], Tensor]:
    """The network of row 11 plus the function shift.x added to all three logits: the same classifier."""
    theta = torch.tensor(ROW_11, dtype=torch.float64)
    theta = theta + torch.tensor([*shift, 0.0])
    return lambda x: x @ theta[:, :2].T + theta[:, 2]


@pytest.mark.parametrize(
    ("rule", "shift", "flips"),
    [
        ("margin", (0.0, 0.0), True),
        ("margin", (-3.0, 4.0), True),
        ("margin", (50.0, -7.0), True),
        ("logit", (0.0, 0.0), False),
        ("logit", (-3.0, 4.0), True),
    ],
)
@pytest.mark.parametrize(("steps", "probe_steps"), [(2, 1), (2, 2), (20, 1), (20, 10), (20, 20)])
def test_only_the_margin_rule_depends_on_the_classifier_alone(
    rule: str, shift: tuple[float, float], flips: bool, steps: int, probe_steps: int
) -> None:
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    options = {"rule": rule, "steps": steps, "probe_steps": probe_steps, "step_size": 0.5}
    adv = attack("wda", planar(shift), x, y, Threat("L2", 1.0, order=math.inf, box=None), **options)
    expected = (3, 0, 4) if flips else (10, 9, 6)  # the logits at (0, 1), and where the raw logit leads: at (1, 0)
    assert planar()(adv.x_adv)[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert adv.accuracy(planar()) == (0 if flips else 1)


def test_a_proposal_that_is_not_followed_may_still_be_the_best_point() -> None:
    """With a step of 1 the raw rule follows the wrong rival, but has evaluated the right one."""
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    options = {"rule": "logit", "steps": 1, "probe_steps": 1, "step_size": 1.0}
    adv = attack("wda", planar(), x, y, Threat("L2", 1.0, order=math.inf, box=None), **options)
    assert adv.x_adv[0].tolist() == pytest.approx([0, 1], abs=1e-9)


# -- what must not matter --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = wda.data.load("digits", n=20)
    return wda.models.load("digits-mlp").double(), x.double(), y


@pytest.fixture(params=[(method, name) for method in NAMES for name in NORMS], ids="-".join)
def digits_attack(request: pytest.FixtureRequest, digits: tuple[nn.Module, Tensor, Tensor]) -> Callable[..., Tensor]:
    """An attack on the digits, half of which fall."""
    method, name = request.param
    model, *_ = digits
    threat = Threat(name, {"Linf": 0.08, "L2": 0.6, "L1": 2.5}[name], order=math.inf)
    few = {key: value for key, value in {"steps": 5, "probe_steps": 3}.items() if key in attacks.options(method)}

    def run(x: Tensor, y: Tensor, **options: object) -> Tensor:
        return attack(method, model, x, y, threat, **few, **options).x_adv

    return run


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(
    digits_attack: Callable[..., Tensor], digits: tuple[nn.Module, Tensor, Tensor], batch_size: int
) -> None:
    _, x, y = digits
    torch.testing.assert_close(digits_attack(x, y, batch_size=batch_size), digits_attack(x, y), rtol=0, atol=1e-9)


def test_the_order_of_the_samples_does_not_matter(
    digits_attack: Callable[..., Tensor], digits: tuple[nn.Module, Tensor, Tensor]
) -> None:
    _, x, y = digits
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(digits_attack(x[order], y[order]), digits_attack(x, y)[order], rtol=0, atol=1e-9)


@each_attack
@each_norm
def test_single_and_double_precision_find_the_same_accuracy(method: str, name: str) -> None:
    x, y = wda.data.load("digits", n=150)
    threat = Threat(name, {"Linf": 0.08, "L2": 0.6, "L1": 2.5}[name])
    model = wda.models.load("digits-mlp")
    single = attack(method, model, x, y, threat, kappa=1.5).accuracy(model)
    model = model.double()
    double = attack(method, model, x.double(), y, threat, kappa=1.5).accuracy(model)
    assert single == pytest.approx(double, abs=1e-12)
    clean = attack("fgsm", model, x.double(), y, Threat(eps=0)).accuracy(model)
    assert 0 < double < clean, "nothing to compare"


def test_the_random_start_depends_on_the_seed_alone() -> None:
    model, x, y = affine(3)
    torch.manual_seed(1)
    first, again, other = (
        attack("pgd", model, x, y, Threat(eps=0.01), steps=1, step_size=1e-6, seed=seed).x_adv for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_random_start_the_seed_does_not_matter() -> None:
    model, x, y = affine(3)
    options = {"steps": 1, "step_size": 1e-6, "random_start": False}
    runs = [attack("pgd", model, x, y, Threat(eps=0.01), seed=seed, **options).x_adv for seed in (0, 1)]
    assert torch.equal(*runs)


@each_norm
@pytest.mark.parametrize("dimension", [1, 4])
def test_the_random_start_is_uniform_in_the_ball(name: str, dimension: int) -> None:
    """The share of a ball within t times its radius is t^d: the radii to the power d are uniform in [0, 1]."""
    x = torch.linspace(0, 1, 2000 * dimension, dtype=torch.float64).view(2000, dimension)
    moved = (uniform_start(x, Threat(name, eps=0.25, box=None), seed=3) - x) / 0.25
    shares = norm(moved, name).pow(dimension).sort().values
    assert (shares - torch.linspace(0, 1, 2000)).abs().max() < 0.04  # Kolmogorov-Smirnov: 1.8 / sqrt(2000)
    assert moved.mean(0).abs().max() < 0.06


class Spy(nn.Module):
    """Counts rows forward and backward; raises `failure` in the call with number `at`."""

    def __init__(self, inner: nn.Module, failure: BaseException | None = None, at: int = 3) -> None:
        super().__init__()
        self.inner, self.failure, self.at = inner, failure, at
        self.calls = self.forwards = self.backwards = 0
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.forwards += len(x)
        self.modes += [module.training for module in self.modules()]
        if self.failure is not None and self.calls == self.at:
            raise self.failure
        logits = self.inner(x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.count_backward(len(gradient)))
        return logits

    def count_backward(self, rows: int) -> None:
        self.backwards += rows


@each_attack
@pytest.mark.parametrize("failure", [None, ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_the_model_is_left_as_it_was(method: str, failure: BaseException | None) -> None:
    _, x, _ = affine(3, dtype=torch.float32)
    model = Spy(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)),
        failure,
        at=2 if method == "fgsm" else 3,
    )
    y = model.inner.eval()(x).argmax(1)
    model.train()
    model.inner[2].eval()
    model.inner[4].weight.grad = torch.ones(3, 8)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if failure is None:
        attack(method, model, x, y, Threat(eps=0.1))
    else:
        with pytest.raises(type(failure)):
            attack(method, model, x, y, Threat(eps=0.1))
    assert not any(model.modes), "the attack ran in training mode"
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.inner[4].weight.grad, torch.ones(3, 8))
    assert model.inner[1].weight.grad is None
    assert all(p.requires_grad for p in model.parameters())


@each_attack
def test_the_sample_is_left_as_it_was_and_the_result_has_no_graph(method: str) -> None:
    model, x, y = affine(3)
    before = x.clone()
    adv = attack(method, model, x.requires_grad_(), y.int(), Threat(eps=0.2))
    assert torch.equal(x, before)
    assert not adv.points.requires_grad
    assert adv.y.dtype == torch.int64
    assert adv.labels.dtype == torch.int64


# -- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "forward", "backward"),
    [
        ("fgsm", {}, 1, 1),
        ("pgd", {}, 22, 20),
        ("pgd", {"steps": 7, "random_start": False}, 9, 7),
        ("wda", {}, 1 + 20 + 10 * 3 + 1, 10 * 3 + 10),
        ("wda", {"steps": 5, "probe_steps": 2, "rivals": 2}, 1 + 5 + 2 * 2 + 1, 2 * 2 + 3),
        ("wda", {"steps": 1, "probe_steps": 1, "rivals": 1}, 1 + 1 + 1, 1),
        ("deepfool", {"steps": 1}, 1 + 1 + 1, 3),
        ("deepfool", {"steps": 1, "rivals": 2}, 1 + 1 + 1, 2),
    ],
)
@pytest.mark.parametrize("batch_size", [3, 256])
def test_counts_are_exact(
    method: str, options: dict[str, object], forward: int, backward: int, batch_size: int
) -> None:
    """What passes to see whether the model is a function counts apart."""
    model, x, y = affine(4)
    spy = Spy(model)
    counts = attack(method, spy, x, y, Threat(eps=0.05), batch_size=batch_size, **options).counts
    assert (counts.forward, counts.backward) == (forward, backward)
    assert (spy.forwards, spy.backwards) == ((counts.forward + counts.checks) * len(x), counts.backward * len(x))


def test_deepfool_counts_only_the_samples_that_still_walk() -> None:
    _, x, y = affine(3)
    torch.manual_seed(5)
    spy = Spy(nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double())
    y = spy(x).argmax(1)
    spy.forwards = 0
    counts = attack("deepfool", spy, x, y, Threat("L2", 5.0, box=None)).counts
    assert (spy.forwards, spy.backwards) == ((counts.forward + counts.checks) * len(x), counts.backward * len(x))
    assert counts.backward < 2 * 50


# -- the budget ------------------------------------------------------------------------------------------------------


@each_attack
@each_norm
@pytest.mark.parametrize("order", [1, 2, 3])
def test_kappa_lengthens_the_moves_and_thins_the_mass(method: str, name: str, order: int) -> None:
    model, x, y = affine(2)
    y = y if method == "deepfool" else 1 - y
    threat = Threat(name, eps=0.001, order=order, box=None)
    adv = attack(method, model, x, y, threat, kappa=2.5)
    assert adv.weight.tolist() == pytest.approx([2.5**-order] * len(x), rel=1e-15)
    assert adv.distances().numpy() == pytest.approx(2.5 * 0.001, rel=1e-9)
    assert 0.001 * (1 - 1e-9) < adv.audit() <= 0.001


@pytest.mark.parametrize("kappa", [1.0, 1.1, 1.7, 3.0])
@pytest.mark.parametrize("order", [1, 1.5, 2, 3])
def test_a_budget_that_all_samples_spend_passes_the_audit(kappa: float, order: float) -> None:
    """Sums and powers of float64 numbers round, the audit forgives nothing."""
    model, x, y = affine(2)
    for n in range(1, len(x) + 1):
        for eps in (0.1, 8 / 255, 0.3):
            attack("fgsm", model, x[:n], y[:n], Threat("Linf", eps, order, box=None), kappa=kappa).audit()


@each_attack
@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("eps", "box"), [("1/1000", (0.0, 1.0)), ("8/255", None), (0.4, (-0.1, 1.3))], ids=str)
def test_every_attack_passes_its_audit_in_every_dtype(
    method: str, name: str, dtype: torch.dtype, eps: float, box: tuple[float, float] | None
) -> None:
    model, x, y = affine(3, dtype=dtype)
    adv = attack(method, model, x, y, Threat(name, eps, order=1.5, box=box), kappa=1.7)
    assert adv.audit() >= 0
    assert adv.moved.dtype == dtype
    if dtype in (torch.float32, torch.float64):
        assert len(adv.moved) == len(x)


@each_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_long_step_from_far_away_comes_back_into_the_ball(method: str, dtype: torch.dtype) -> None:
    """In L1 a step moves one coordinate; the way back subtracts two numbers much larger than the radius."""
    model, x, y = affine(3, dtype=dtype)
    far = {"step_size": 1e4, "loss": "margin"}
    options = {key: far[key] for key in far.keys() & attacks.options(method).keys()}
    with torch.no_grad():
        model[1].bias[0] += 1e4  # the nearest boundary is far away
    adv = attack(method, model, x, torch.zeros_like(y), Threat("L1", 0.01, box=None), **options)
    assert 0.009 < adv.audit() <= 0.01


@each_attack
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("name", NORMS)
def test_no_budget_moves_nothing(method: str, kappa: float, name: str) -> None:
    model, x, y = affine(3)
    adv = attack(method, model, x, y, Threat(name, eps=0), kappa=kappa)
    assert not len(adv.moved)
    assert torch.equal(adv.x_adv, x)
    assert adv.audit() == 0


@each_attack
def test_a_model_that_ignores_its_input_breaks_nothing(method: str) -> None:
    _, x, y = affine(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    nn.init.zeros_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    y = model(x).argmax(1)
    with pytest.warns(wda.Untrustworthy, match="100 % of the gradients were zero"):
        adv = attack(method, model, x, y, Threat(eps=0.1))
    assert adv.audit() <= 0.1
    assert adv.counts.vanished == (1 if adv.counts.backward else 0)


@pytest.mark.parametrize("method", ["fgsm", "pgd", "wda", "deepfool"])
def test_a_model_without_a_gradient_is_an_error_and_no_robust_model(method: str) -> None:
    model, x, y = affine(3)
    with pytest.raises(ValueError, match="carries no gradient"):
        attack(method, lambda z: model(z.detach()).detach(), x, y, Threat(eps=0.1))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        attack(method, model, x, y, Threat(eps=0.1))


@each_attack
def test_a_model_that_changes_its_input_in_place_harms_nobody(method: str) -> None:
    inner, x, y = affine(3)
    before = x.clone()

    def model(z: Tensor) -> Tensor:
        return inner(z.sub_(0.5))

    adv = attack(method, model, x, y, Threat("Linf", 0.1))
    assert torch.equal(x, before)
    torch.testing.assert_close(adv.x_adv, attack(method, lambda z: inner(z - 0.5), x, y, Threat("Linf", 0.1)).x_adv)


@pytest.mark.parametrize("method", ["fgsm", "pgd", "wda"])
@pytest.mark.parametrize("name", ["L1", "L2"])
def test_a_step_goes_where_the_box_leaves_room(method: str, name: str) -> None:
    """The steepest coordinate is stuck at the box; the next one has room, and reaches the boundary."""
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
        model.bias.copy_(torch.tensor([0.0, -3.5]))
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    threat = Threat(name, 0.8, order=math.inf)
    options = {} if method == "fgsm" else {"steps": 3}
    if method == "wda":
        options["probe_steps"] = 1
    adv = attack(method, model, x, y, threat, **options)
    torch.testing.assert_close(adv.x_adv, torch.tensor([[1.0, 0.8]], dtype=torch.float64))
    assert adv.accuracy(model) == 0


@pytest.mark.parametrize("method", ["fgsm", "pgd"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "redlr"])
def test_every_loss_leads_across_a_near_boundary(method: str, loss: str) -> None:
    model, x, y = affine(3)
    adv = attack(method, model, x, y, Threat("Linf", 1.0, order=math.inf, box=None), loss=loss)
    assert adv.accuracy(model) <= 0.2


@each_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_box_whose_sides_the_dtype_rounds_stops_nothing_else(method: str, dtype: torch.dtype) -> None:
    """At the lowest number within the box, the steepest coordinate is stopped and the other one goes on."""
    box = (-0.1, 1.3)
    low = norms.bounds(box, torch.zeros((), dtype=dtype))[0].item()
    model = nn.Linear(2, 2).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [-4.0, 1.0]]))
        model.bias.copy_(torch.tensor([0.0, -1.0]))
    x, y = torch.tensor([[low, 0.0]], dtype=dtype), torch.tensor([0])
    adv = attack(method, model, x, y, Threat("L1", 1.2, order=math.inf, box=box))
    assert adv.audit() > 0.5
    assert adv.accuracy(model) == 0


# -- progress --------------------------------------------------------------------------------------------------------


def test_a_bar_is_drawn_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, y = affine(3)
    attack("fgsm", model, x, y, Threat(eps=0.1), batch_size=3, progress=True)
    shown = capsys.readouterr().err
    assert "3/8 samples" in shown
    assert "8/8 samples" in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize(("progress", "lines"), [(None, 2), (False, 0)])
def test_off_a_terminal_progress_goes_to_the_log(
    progress: bool | None, lines: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(passes, "_SECONDS_BETWEEN_LOG_LINES", 0.0)
    caplog.set_level(logging.INFO, logger="wda")
    model, x, y = affine(3)
    attack("fgsm", model, x, y, Threat(eps=0.1), batch_size=4, progress=progress)
    assert len(caplog.records) == lines
    assert not capsys.readouterr().err


def test_the_progress_of_a_distributional_attack_names_kappa(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, y = affine(3)
    for kappa, label in ((1, "wda W_1 Linf 8/255: "), (1.5, "wda κ=1.5 W_1 Linf 8/255: ")):
        attack("wda", model, x, y, Threat(eps="8/255"), kappa=kappa, progress=True)
        assert f"] {label}" in capsys.readouterr().err


def test_the_models_own_error_is_kept() -> None:
    def fails(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(RuntimeError, match="failed on x of shape") as error:
        attack("fgsm", nn.Linear(4, 2), X, Y, Threat())
    assert "shapes" in str(error.value.__cause__)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no room$"):  # which callers catch, to halve the batch
        attack("fgsm", fails, X, Y, Threat())


@pytest.mark.filterwarnings("error")
def test_a_search_beyond_the_box_is_not_warned_of() -> None:
    model, x, y = affine(3)
    attack("fgsm", model, x, y, Threat(eps=0.6), kappa=2)


# -- bad input -------------------------------------------------------------------------------------------------------


def broken(value: float) -> Callable[[Tensor], Tensor]:
    """A model whose logits for the third sample are not finite."""
    return lambda x: torch.stack([x.sum((1, 2)), x.sum((1, 2)) * torch.where(x[:, 0, 0] == 0.125, value, 1.0)], dim=1)


class Kinked(torch.autograd.Function):
    """The identity, with a derivative that is not a number."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * math.nan


X = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0))
X[2, 0, 0] = 0.125
NAN, HIGH = X.clone(), X.clone()
NAN[1, 0, 0], HIGH[1, 0, 0] = math.nan, 1.01
Y = torch.tensor([0, 1, 2, 0])
INF = Threat(order=math.inf)

BAD = [
    # method, what is changed, the error, what its message names
    ("fgsm", {"x": HIGH}, ValueError, r"x has values in .*1\.0\d+\], outside box=\(0.0, 1.0\)"),
    ("fgsm", {"x": HIGH - 1, "threat": Threat(box=(-0.5, 1))}, ValueError, "x has values .*outside box"),
    ("fgsm", {"x": NAN}, ValueError, "x has NaN .*sample 1"),
    ("fgsm", {"x": NAN, "threat": Threat(box=None)}, ValueError, "x has NaN"),
    ("fgsm", {"x": X[:0], "y": Y[:0]}, ValueError, "x of shape .0, 2, 3.: at least one sample"),
    ("fgsm", {"x": X[:3]}, ValueError, "x of shape .3, 2, 3., y of shape .4,."),
    ("fgsm", {"x": X[:, 0, 0]}, ValueError, "x of shape .4,."),
    ("fgsm", {"x": (X > 0.5).long()}, TypeError, "x: .*not torch.int64"),
    ("fgsm", {"x": X.numpy()}, TypeError, "x: a floating-point tensor .*not numpy.ndarray; use torch.from_numpy"),
    ("fgsm", {"y": Y.numpy()}, TypeError, "y: an integer tensor .*not numpy.ndarray; use torch.from_numpy"),
    ("fgsm", {"x": 255 * X}, ValueError, "outside box=.*divide by 255, or store them as uint8"),
    ("fgsm", {"x": 4 * X - 2}, ValueError, "outside box=.*normalisation belongs inside the model"),
    ("fgsm", {"model": nn.Linear(4, 2)}, RuntimeError, r"model\(x\) failed on x of shape .*\(N, C, H, W\): "),
    ("fgsm", {"x": X.double()}, TypeError, "x has dtype torch.float64, the model torch.float32"),
    ("fgsm", {"y": Y + 1}, ValueError, "y has the label 3, the model has K=3"),
    ("fgsm", {"y": Y - 1}, ValueError, "y has the label -1"),
    ("fgsm", {"y": Y.float()}, TypeError, "y: an integer tensor .*not torch.float32"),
    ("fgsm", {"y": Y > 0}, TypeError, "y: .*not torch.bool"),
    ("fgsm", {"y": [0, 1, 2, 0]}, TypeError, "y: .*not list"),
    ("fgsm", {"y": Y[:, None]}, ValueError, "y of shape .4, 1."),
    ("fgsm", {"model": lambda x: torch.nan * x[:, 0]}, ValueError, r"model\(x\) has NaN .* at every sample"),
    ("fgsm", {"model": lambda x: x[:, 0] / 0}, ValueError, r"model\(x\) has NaN or infinite .* at every sample"),
    ("fgsm", {"model": lambda x: x[:, 0, :1]}, ValueError, r"model\(x\) is \(1, 1\) .*K >= 2"),
    ("fgsm", {"model": lambda x: x}, ValueError, r"model\(x\) is \(1, 2, 3\)"),
    ("fgsm", {"model": lambda x: x[:1, 0]}, ValueError, r"model\(x\) is \(1, 3\) for 4 samples"),
    ("fgsm", {"model": lambda x: None}, ValueError, r"model\(x\) is NoneType"),
    ("fgsm", {"model": "resnet"}, TypeError, "model='resnet'"),
    ("fgsm", {"threat": "Linf"}, TypeError, "threat='Linf'"),
    ("fgsm", {"kappa": 0.99}, ValueError, "kappa=0.99"),
    ("fgsm", {"kappa": math.nan}, ValueError, "kappa=nan"),
    ("fgsm", {"kappa": math.inf}, ValueError, "kappa=inf"),
    ("fgsm", {"kappa": "two"}, ValueError, "kappa='two'"),
    ("fgsm", {"kappa": True}, TypeError, "kappa=True"),
    ("fgsm", {"kappa": 2, "threat": Threat(order=1060)}, ValueError, "kappa=2.0 with order=1060"),
    ("fgsm", {"kappa": 2, "threat": INF}, ValueError, "kappa=2 with order=inf"),
    ("fgsm", {"seed": -1}, ValueError, "seed=-1"),
    ("fgsm", {"seed": 1.0}, ValueError, "seed=1.0"),
    ("pgd", {"seed": 2**64}, ValueError, "seed=18446744073709551616"),
    ("fgsm", {"batch_size": 0}, ValueError, "batch_size=0"),
    ("fgsm", {"batch_size": 2.5}, ValueError, "batch_size=2.5"),
    ("fgsm", {"batch_size": True}, ValueError, "batch_size=True"),
    (
        "fgsm",
        {"steps": 5},
        TypeError,
        "steps=5: attack 'fgsm' accepts kappa, seed, batch_size, autocast, progress, loss",
    ),
    ("wda", {"loss": "ce"}, TypeError, "loss='ce': attack 'wda' accepts"),
    ("wda", {"probe": 3}, TypeError, "probe=3: attack 'wda' accepts"),
    ("fgsm", {"loss": "hinge"}, ValueError, "loss='hinge'"),
    ("fgsm", {"loss": "dlr", "model": lambda x: x[:, 0, :2], "y": Y % 2}, ValueError, "loss='dlr' needs K >= 3"),
    ("pgd", {"loss": "redlr", "model": lambda x: x[:, 0, :2], "y": Y % 2}, ValueError, "loss='redlr' needs K >= 3"),
    ("pgd", {"loss": "CE"}, ValueError, "loss='CE'"),
    ("pgd", {"steps": 0}, ValueError, "steps=0"),
    ("pgd", {"steps": 2.0}, ValueError, "steps=2.0"),
    ("pgd", {"steps": None}, ValueError, "steps=None"),
    ("pgd", {"step_size": 0}, ValueError, "step_size=0"),
    ("pgd", {"step_size": math.nan}, ValueError, "step_size=nan"),
    ("pgd", {"step_size": math.inf}, ValueError, "step_size=inf"),
    ("pgd", {"step_size": "2/0"}, ValueError, "step_size='2/0'"),
    ("pgd", {"random_start": "no"}, (ValueError, TypeError), "random_start='no'"),
    ("wda", {"steps": -1}, ValueError, "steps=-1"),
    ("wda", {"probe_steps": 0}, ValueError, "probe_steps=0"),
    ("wda", {"probe_steps": 21}, ValueError, "probe_steps=21: .*from 1 to 20"),
    ("wda", {"step_size": -0.1}, ValueError, "step_size=-0.1"),
    ("wda", {"rivals": 0}, ValueError, "rivals=0"),
    ("wda", {"rivals": 3}, ValueError, "rivals=3: .*from 1 to 2"),
    ("wda", {"rule": "softmax"}, ValueError, "rule='softmax'"),
    ("deepfool", {"steps": 0}, ValueError, "steps=0"),
    ("deepfool", {"overshoot": -0.1}, ValueError, "overshoot=-0.1"),
    ("deepfool", {"overshoot": math.nan}, ValueError, "overshoot=nan"),
    ("deepfool", {"overshoot": "much"}, ValueError, "overshoot='much'"),
    ("deepfool", {"rivals": 3}, ValueError, "rivals=3"),
    ("FGSM", {}, ValueError, "attack='FGSM': one of 'fgsm', 'pgd', 'deepfool', .* is accepted"),
    (None, {}, ValueError, "attack=None"),
    (["wda"], {}, ValueError, "attack="),
]


@pytest.mark.parametrize(("method", "changed", "error", "named"), BAD, ids=[f"{row[0]}: {row[3]}" for row in BAD])
def test_bad_input_is_named(
    method: object, changed: dict[str, object], error: type[Exception] | tuple[type[Exception], ...], named: str
) -> None:
    model, *_ = affine(3, dtype=torch.float32)
    with pytest.raises(error, match=named):
        attack(method, **{"model": model, "x": X, "y": Y, "threat": Threat(), **changed})


def test_options_are_listed_with_their_defaults() -> None:
    pgd = {"loss": "ce", "steps": 20, "step_size": None, "random_start": True, "stop_at_flip": False}
    assert attacks.options("pgd") == pgd
    assert all("seed" not in attacks.options(method) for method in NAMES)
    with pytest.raises(ValueError, match="attack='nothing'"):
        attacks.options("nothing")
