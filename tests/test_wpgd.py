"""W-FGSM, W-PGD and the sensitivity: closed forms, a convex solver, and worst cases searched on fine grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

import wda
from wda import AdversarialDistribution, Threat
from wda.attacks.fgsm import fgsm
from wda.attacks.pgd import pgd
from wda.attacks.wpgd import contract, direction, sensitivity, wfgsm, wpgd
from wda.losses import get, margin
from wda.norms import dual, norm, project
from wda.passes import Oracle

NORMS = ("Linf", "L2", "L1")
ORDERS = (1.5, 2.0, 3.0, math.inf)
LOSSES = ("ce", "margin", "dlr", "redlr")
each_norm = pytest.mark.parametrize("name", NORMS)
each_order = pytest.mark.parametrize("order", ORDERS)
each_loss = pytest.mark.parametrize("loss", LOSSES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def length(moved: Tensor, name: str, order: float) -> float:
    """(mean ||d_i||_r^p)^(1/p)."""
    d = norm(moved.double(), name)
    return float(d.max() if math.isinf(order) else d.pow(order).mean() ** (1 / order))


def hoelder(gradient: Tensor, name: str, order: float) -> float:
    """(mean ||g_i||_s^q)^(1/q)."""
    q = 1.0 if math.isinf(order) else order / (order - 1)
    return float(norm(gradient.double(), dual(name)).pow(q).mean() ** (1 / q))


def small_network(seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), activation(), nn.Linear(16, 3)).double()


@pytest.fixture(scope="module")
def sample() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, 30 points of (2, 3) in the box, and its own answers for all but every fifth."""
    model = small_network()
    x = torch.rand(30, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 3
    return model, x, y


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = wda.data.load("digits", n=40)
    return wda.models.load("digits-mlp").double(), x.double(), y


# -- the direction ---------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("order", [1.01, 1.5, 2.0, 3.0, 40.0, math.inf])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (5, 2, 3)])
def test_the_direction_has_length_one_and_gains_what_hoelder_allows(
    name: str, order: float, shape: tuple[int, ...]
) -> None:
    for seed in range(5):
        gradient = normal(*shape, seed=seed) * 10 ** normal(shape[0], *[1] * (len(shape) - 1), seed=seed + 9)
        d = direction(gradient, Threat(name, order=order))
        assert length(d, name, order) == pytest.approx(1, rel=1e-12)
        gain = float((gradient * d).flatten(1).sum(1).mean())
        assert gain == pytest.approx(hoelder(gradient, name, order), rel=1e-12)


@each_norm
@each_order
@pytest.mark.parametrize("seed", [0, 1])
def test_no_displacement_gains_more_says_a_convex_solver(name: str, order: float, seed: int) -> None:
    import cvxpy as cp

    n = 4
    gradient = normal(n, 3, seed=seed)
    d = cp.Variable((n, 3))
    r = {"Linf": "inf", "L2": 2, "L1": 1}[name]
    lengths = cp.hstack([cp.norm(d[i], r) for i in range(n)])
    limit = 1.0 if math.isinf(order) else n ** (1 / order)
    problem = cp.Problem(
        cp.Maximize(cp.sum(cp.multiply(gradient.numpy(), d)) / n),
        [cp.pnorm(lengths, "inf" if math.isinf(order) else order) <= limit],
    )
    best = problem.solve(solver=cp.CLARABEL)
    found = direction(gradient, Threat(name, order=order))
    assert float((gradient * found).sum(1).mean()) == pytest.approx(best, rel=1e-5)


def test_equation_5_3_of_the_second_paper() -> None:
    gradient = normal(6, 3, 4)
    sums = gradient.abs().sum((1, 2))
    upsilon = sums.square().mean().sqrt()
    expected = gradient.sign() * sums[:, None, None] / upsilon
    torch.testing.assert_close(direction(gradient, Threat("Linf", order=2)), expected)


@each_norm
@each_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_unit_of_the_loss_does_not_matter(name: str, order: float, dtype: torch.dtype) -> None:
    gradient = normal(6, 5).to(dtype)
    small, large = (1e-30, 1e30) if dtype == torch.float32 else (1e-290, 1e290)
    ones = [direction(unit * gradient, Threat(name, order=order)) for unit in (1.0, small, large)]
    torch.testing.assert_close(ones[1], ones[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ones[2], ones[0], rtol=1e-5, atol=0)


@each_norm
@each_order
def test_samples_without_a_gradient_stay(name: str, order: float) -> None:
    gradient = normal(6, 5)
    gradient[[0, 3]] = 0
    d = direction(gradient, Threat(name, order=order))
    assert not d[[0, 3]].any()
    assert d[[1, 2, 4, 5]].flatten(1).any(1).all()
    assert not direction(torch.zeros(3, 5), Threat(name, order=order)).any()


# -- contraction -----------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("order", [1.5, 2.0, 3.0])
def test_one_factor_shrinks_all_displacements(name: str, order: float) -> None:
    x, moved = normal(6, 5), normal(6, 5, seed=1)
    eps = 0.4 * length(moved, name, order)
    inside = contract(x + moved, x, Threat(name, eps, order, box=None))
    torch.testing.assert_close(inside - x, 0.4 * moved, rtol=1e-9, atol=1e-12)
    assert length(inside - x, name, order) <= eps * (1 + 1e-15)
    larger = Threat(name, 1.001 * length(moved, name, order), order, box=None)
    torch.testing.assert_close(contract(x + moved, x, larger), x + moved, rtol=0, atol=1e-15)


@each_norm
@pytest.mark.parametrize("order", [1.5, 2.0, 3.0])
def test_no_displacement_of_the_ball_is_nearer_in_its_own_length(name: str, order: float) -> None:
    x, moved = torch.zeros(6, 5).double(), normal(6, 5, seed=1)
    whole = length(moved, name, order)
    inside = contract(moved, x, Threat(name, 0.4 * whole, order, box=None))
    assert length(moved - inside, name, order) == pytest.approx(0.6 * whole, rel=1e-9)
    for seed in range(50):  # anything else of the ball
        other = normal(6, 5, seed=seed + 2)
        other = inside + 0.05 * other
        other *= min(1.0, 0.4 * whole / length(other, name, order))
        assert length(moved - other, name, order) >= 0.6 * whole * (1 - 1e-12)


@each_norm
def test_with_order_inf_each_sample_has_a_ball_of_its_own(name: str) -> None:
    x = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = x + normal(6, 5, seed=1)
    threat = Threat(name, 0.3, math.inf)
    expected = project(points, x, 0.3, name, threat.box)
    torch.testing.assert_close(contract(points, x, threat), expected, rtol=0, atol=1e-15)


# -- linear models: exact gains --------------------------------------------------------------------------------------


@each_norm
@each_order
@pytest.mark.parametrize("method", [wfgsm, wpgd])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_linear_loss_grows_by_the_sensitivity_times_the_radius(
    name: str, order: float, method: Callable[..., Tensor], seed: int
) -> None:
    """Labels differ in their slopes, so that samples compete for the budget."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 2).double()
    x, y = normal(9, 4, seed=seed), torch.arange(9) % 2
    scale = torch.linspace(0.2, 3, 9).double()[:, None]

    def logits(z: Tensor) -> Tensor:
        return scale[: len(z)] * model(z)  # sample i has its own slope

    threat = Threat(name, 0.7, order, box=None)
    points = method(Oracle(logits), x, y, threat, loss="margin")
    gain = (margin(logits(points), y) - margin(logits(x), y)).mean().item()
    upsilon = sensitivity(logits, x, y, name, order, "margin", batch_size=9)
    assert gain == pytest.approx(0.7 * upsilon, rel=1e-9)
    assert length(points - x, name, order) == pytest.approx(0.7, rel=1e-9)


@each_norm
@each_loss
def test_with_order_inf_the_step_is_fgsms(sample: tuple[nn.Module, Tensor, Tensor], name: str, loss: str) -> None:
    model, x, y = sample
    threat = Threat(name, 0.1, math.inf, box=None)
    expected = fgsm(Oracle(model), x, y, threat, loss=loss)
    torch.testing.assert_close(wfgsm(Oracle(model), x, y, threat, loss=loss), expected, rtol=0, atol=1e-12)


@each_norm
def test_with_order_inf_the_attack_is_pgd_sample_by_sample(name: str) -> None:
    """On two classes of a linear model constant steps raise every margin, so that both keep their last iterate."""
    torch.manual_seed(3)
    model, x = nn.Linear(4, 2).double(), normal(9, 4)
    y = model(x).argmax(1)
    threat, options = Threat(name, 0.3, math.inf, box=None), {"steps": 7, "step_size": 0.06, "loss": "margin"}
    together = wpgd(Oracle(model), x, y, threat, **options)
    expected = pgd(Oracle(model), x, y, threat, random_start=False, **options)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)
    alone = torch.cat([wpgd(Oracle(model), x[i : i + 1], y[i : i + 1], threat, **options) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


# -- the attack ------------------------------------------------------------------------------------------------------


class Recorder(Oracle):
    """Keeps every iterate and its logits."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self.iterates: list[tuple[Tensor, Tensor]] = []

    def gradient(self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        logits, gradient = super().gradient(x, y, loss)
        self.iterates.append((x.clone(), logits))
        return logits, gradient

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        self.iterates.append((x.clone(), logits))
        return logits


@each_norm
@each_loss
@pytest.mark.parametrize("step_size", [None, 0.2])
def test_the_iterate_of_lowest_accuracy_is_kept(
    sample: tuple[nn.Module, Tensor, Tensor], name: str, loss: str, step_size: float | None
) -> None:
    model, x, y = sample
    oracle = Recorder(model)
    points = wpgd(oracle, x, y, Threat(name, 0.15, 2), loss=loss, steps=12, step_size=step_size)
    value = get(loss)
    scores = [(int((margin(z, y) >= 0).sum()), float(value(z, y).mean())) for _, z in oracle.iterates]
    assert len(scores) == 13
    kept = next(i for i, (point, _) in enumerate(oracle.iterates) if torch.equal(point, points))
    most = max(errors for errors, _ in scores)
    assert scores[kept][0] == most > scores[0][0]
    assert scores[kept][1] >= max(mean for errors, mean in scores if errors == most) - 1e-12


@each_norm
def test_redlr_leaves_errors_where_they_are(sample: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, x, y = sample
    wrong = margin(model(x), y) >= 0
    assert 0 < int(wrong.sum()) < len(x)
    for method in (wfgsm, wpgd):
        points = method(Oracle(model), x, y, Threat(name, 0.1, 2))
        assert torch.equal(points[wrong], x[wrong])
        assert (points[~wrong] != x[~wrong]).flatten(1).any(1).all()
        spent = method(Oracle(model), x, y, Threat(name, 0.1, 2), loss="ce")
        assert (spent[wrong] != x[wrong]).flatten(1).any(1).all()


@each_norm
@each_order
def test_short_steps_never_need_a_contraction(
    sample: tuple[nn.Module, Tensor, Tensor], name: str, order: float
) -> None:
    """20 steps of eps/20 stay in the ball by the triangle inequality; so under ReDLR errors neither move nor vanish."""
    model, x, y = sample
    oracle = Recorder(model)
    threat = Threat(name, 0.3, order, box=None)
    wpgd(oracle, x, y, threat, steps=20, step_size=0.3 / 20)
    wrong = [margin(logits, y) >= 0 for _, logits in oracle.iterates]
    for t, (point, _) in enumerate(oracle.iterates[:-1]):
        assert torch.equal(oracle.iterates[t + 1][0][wrong[t]], point[wrong[t]])
    assert int(wrong[-1].sum()) > int(wrong[0].sum())
    assert length(oracle.iterates[-1][0] - x, name, order) <= 0.3


def test_contraction_takes_from_errors_too(sample: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = sample
    oracle = Recorder(model)
    wpgd(oracle, x, y, Threat("Linf", 0.05, 2, box=None), steps=10, step_size=0.02)
    pulled = 0
    for (point, logits), (after, _) in zip(oracle.iterates, oracle.iterates[1:], strict=False):
        wrong = (margin(logits, y) >= 0) & (point != x).flatten(1).any(1)
        ratio = (after - x)[wrong].flatten() / (point - x)[wrong].flatten()
        if len(ratio):
            assert ratio.max() <= 1 + 1e-9
            assert ratio.max() - ratio.min() < 1e-6  # one factor for all of them
            pulled += int(ratio.max() < 1 - 1e-3)
    assert pulled > 0


@each_norm
@each_order
@pytest.mark.parametrize("method", [wfgsm, wpgd])
def test_batch_size_and_order_do_not_matter(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, order: float, method: Callable[..., Tensor]
) -> None:
    model, x, y = digits
    few = {} if method is wfgsm else {"steps": 8}
    threat = Threat(name, {"Linf": 0.05, "L2": 0.4, "L1": 1.5}[name], order)
    whole = method(Oracle(model), x, y, threat, **few)
    for batch_size in (1, 17):
        found = method(Oracle(model, batch_size), x, y, threat, **few)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
    shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found = method(Oracle(model), x[shuffle], y[shuffle], threat, **few)
    torch.testing.assert_close(found, whole[shuffle], rtol=0, atol=1e-9)


@each_norm
@each_order
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("eps", "box"), [(0.1, (0.0, 1.0)), (8 / 255, None), (0.7, (-0.1, 1.3))], ids=str)
def test_the_cost_is_at_most_eps_with_no_tolerance(
    name: str, order: float, dtype: torch.dtype, eps: float, box: tuple[float, float] | None
) -> None:
    model = small_network().to(dtype)
    x = torch.rand(8, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = model(x).argmax(1)
    threat = Threat(name, eps, order, box)
    inner = replace(threat, eps=eps * (1 - 2.0**-40))  # as wda.attack passes it on
    for n in (1, 3, 8):
        for points in (
            wfgsm(Oracle(model), x[:n], y[:n], inner, loss="margin"),
            wpgd(Oracle(model), x[:n], y[:n], inner, steps=4, loss="margin"),
        ):
            assert points.dtype == dtype
            cost = AdversarialDistribution.from_points(x[:n], points, y[:n], threat).audit()
            # without a box the budget is spent, but for what half precision rounds away
            assert box is not None or cost > eps * (0.8 if dtype.itemsize == 2 else 1 - 1e-5)


@each_norm
@each_order
@each_loss
def test_without_any_gradient_nothing_moves(name: str, order: float, loss: str) -> None:
    x, y = normal(5, 4), torch.zeros(5, dtype=torch.int64)

    def constant(z: Tensor) -> Tensor:
        return 0 * z[:, :3] + torch.tensor([3.0, 2.0, 1.0])

    for method in (wfgsm, wpgd):
        oracle = Oracle(constant)
        points = method(oracle, x, y, Threat(name, 1.0, order, box=None), loss=loss)
        assert torch.equal(points, x)
        assert oracle.backward == 5, "blind already after one pass"
    assert sensitivity(constant, x, y, name, order, loss) == 0


def test_a_sample_that_is_all_wrong_is_left_alone(sample: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = sample
    y = (model(x).argmax(1) + 1) % 3
    assert torch.equal(wpgd(Oracle(model), x, y, Threat("Linf", 0.1, 2)), x)
    assert sensitivity(model, x, y) == 0


@each_order
def test_no_budget_moves_nothing(sample: tuple[nn.Module, Tensor, Tensor], order: float) -> None:
    model, x, y = sample
    for method in (wfgsm, wpgd):
        assert torch.equal(method(Oracle(model), x, y, Threat("L2", 0, order)), x)


def test_one_pass_a_step(sample: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = sample
    oracle = Oracle(model)
    wpgd(oracle, x, y, Threat("Linf", 0.01, 2))
    assert (oracle.forward, oracle.backward) == (51 * len(x), 50 * len(x))


def test_copies_of_a_sample_move_alike(sample: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = sample
    points = wpgd(Oracle(model), x, y, Threat("L2", 0.2, 2))
    twice = wpgd(Oracle(model), torch.cat([x, x]), torch.cat([y, y]), Threat("L2", 0.2, 2))
    torch.testing.assert_close(twice, torch.cat([points, points]), rtol=0, atol=1e-9)


# -- the sensitivity -------------------------------------------------------------------------------------------------


def sphere(name: str) -> Tensor:
    """Directions of norm 1 in the plane, the corners of every norm's ball among them."""
    angle = torch.arange(240).double() * (2 * math.pi / 240)
    u = torch.stack([angle.cos(), angle.sin()], 1)
    return u / norm(u, name)[:, None]


def worst_mean_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    name: str,
    order: float,
    delta: float,
    box: tuple[float, float] | None = None,
) -> float:
    """V(delta) by the dual min_t t delta^p + mean_i sup_d [loss(x_i + d) - t ||d||^p], suprema over a polar grid."""
    near, far = (torch.linspace(*ends, dtype=torch.float64) for ends in ((0, 8, 161), (8 * delta, 3, 60)))
    radii = torch.cat([delta * near, far])
    reached = torch.full((len(x), len(radii)), -math.inf, dtype=torch.float64)
    for i, (centre, label) in enumerate(zip(x, y, strict=True)):
        points = centre + radii[:, None, None] * sphere(name)
        values = loss(points.flatten(0, 1), label.expand(points.shape[0] * points.shape[1])).detach()
        values = values.view(points.shape[:2])
        if box is not None:
            values[((points < box[0]) | (points > box[1])).any(2)] = -math.inf
        reached[i] = values.amax(1)
    if math.isinf(order):
        return float(reached[:, radii <= delta * (1 + 1e-12)].amax(1).mean())
    power = radii**order

    def bound(log_price: float) -> float:
        price = math.exp(log_price)
        return price * delta**order + float((reached - price * power).amax(1).mean())

    centre = -(order - 1) * math.log(delta)
    grid = np.linspace(centre - 8, centre + 8, 161)
    best = grid[np.argmin([bound(v) for v in grid])]
    return float(minimize_scalar(bound, bounds=(best - 0.2, best + 0.2), method="bounded", options={"xatol": 1e-9}).fun)


def plane(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth network on the plane, and points of [0.2, 0.8]^2."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].weight.mul_(2)
    return model, 0.2 + 0.6 * torch.rand(5, 2, dtype=torch.float64), torch.arange(5) % 3


@each_norm
@each_order
@pytest.mark.parametrize(("seed", "loss"), [(0, "ce"), (1, "margin")])
def test_the_worst_mean_loss_starts_with_slope_upsilon(name: str, order: float, seed: int, loss: str) -> None:
    """Theorem 4.1 (i) of the second paper: what is left of V(delta) - V(0) - delta Upsilon is of smaller order."""
    model, x, y = plane(seed)
    upsilon = sensitivity(model, x, y, name, order, loss)

    def value(points: Tensor, labels: Tensor) -> Tensor:
        return get(loss)(model(points), labels)

    start = value(x, y).mean().item()
    for delta in (0.1, 0.01, 0.001):
        slope = (worst_mean_loss(value, x, y, name, order, delta) - start) / delta
        assert slope == pytest.approx(upsilon, rel=2 * delta + 4e-4)  # the grid's directions are 1.5 degrees apart
        points = wfgsm(Oracle(model), x, y, Threat(name, delta, order, box=None), loss=loss)  # (ii): it attains V
        assert (value(points, y).mean().item() - start) / delta == pytest.approx(upsilon, rel=2 * delta)


@each_norm
@each_order
def test_at_the_border_of_the_box_only_free_coordinates_count(name: str, order: float) -> None:
    model, x, y = plane(0)
    x = x.clone()
    x[0], x[1, 0], x[2, 1], x[3] = torch.tensor([0.0, 1.0]), 1.0, 0.0, torch.tensor([1.0, 1.0])

    def value(points: Tensor, labels: Tensor) -> Tensor:
        return get("ce")(model(points), labels)

    delta, start = 1e-3, value(x, y).mean().item()
    slope = (worst_mean_loss(value, x, y, name, order, delta, (0.0, 1.0)) - start) / delta
    assert slope == pytest.approx(sensitivity(model, x, y, name, order, "ce", box=(0.0, 1.0)), rel=0.01)
    assert slope < 0.95 * sensitivity(model, x, y, name, order, "ce")


@each_order
def test_the_sensitivity_of_parts_gives_that_of_the_whole(
    sample: tuple[nn.Module, Tensor, Tensor], order: float
) -> None:
    """And eq. 5.5: an attack on a part with the radius delta (Upsilon_B / Upsilon)^(q-1) is the part of the attack."""
    model, x, y = sample
    q = 1.0 if math.isinf(order) else order / (order - 1)
    parts = [slice(0, 10), slice(10, 20), slice(20, 30)]
    whole = sensitivity(model, x, y, "Linf", order)
    own = [sensitivity(model, x[part], y[part], "Linf", order) for part in parts]
    assert whole == pytest.approx(np.mean([u**q for u in own]) ** (1 / q), rel=1e-12)
    together = wfgsm(Oracle(model), x, y, Threat("Linf", 0.1, order, box=None))
    for part, u in zip(parts, own, strict=True):
        threat = Threat("Linf", 0.1 * (u / whole) ** (q - 1), order, box=None)
        torch.testing.assert_close(wfgsm(Oracle(model), x[part], y[part], threat), together[part], rtol=0, atol=1e-12)


def test_the_sensitivity_leaves_the_model_as_it_was(sample: tuple[nn.Module, Tensor, Tensor]) -> None:
    _, x, y = sample
    model = nn.Sequential(small_network(), nn.Dropout(0.5)).train()
    first, again = (sensitivity(model, x, y) for _ in range(2))
    assert first == again, "dropout was on"
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threat": Threat("L2", 0.1, 1)}, r"order=1: an order > 1 is accepted.*steepest.*'closest'"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"steps": 0}, "steps=0"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"step_size": math.nan}, "step_size=nan"),
    ],
)
def test_bad_options_are_named(
    sample: tuple[nn.Module, Tensor, Tensor], options: dict[str, object], named: str
) -> None:
    model, x, y = sample
    given = {"threat": Threat("L2", 0.1, 2), **options}
    oracle = Oracle(model)
    with pytest.raises(ValueError, match=named):
        wpgd(oracle, x, y, given.pop("threat"), **given)
    assert oracle.forward == 0, "the model was called before the arguments were checked"


def test_order_one_is_an_error_everywhere(sample: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = sample
    with pytest.raises(ValueError, match="order=1"):
        wfgsm(Oracle(model), x, y, Threat("L2", 0.1, 1))
    with pytest.raises(ValueError, match="order=1"):
        sensitivity(model, x, y, order=1)
    with pytest.raises(ValueError, match="order=1"):
        direction(x, Threat("L2", 0.1, 1))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"norm": "L3"}, "norm='L3'"),
        ({"order": 0.5}, "order=0.5"),
        ({"loss": "kl"}, "loss='kl'"),
        ({"box": (0.5, 1.0)}, r"outside box=\(0.5, 1.0\)"),
        ({"y": torch.full((30,), 3)}, "y has the label 3"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input_of_the_sensitivity_is_named(
    sample: tuple[nn.Module, Tensor, Tensor], changed: dict[str, object], named: str
) -> None:
    model, x, y = sample
    with pytest.raises(ValueError, match=named):
        sensitivity(**{"model": model, "x": x, "y": y, **changed})
