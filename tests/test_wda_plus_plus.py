"""WDA++: the march and the bisection on affine models; flips that hold; nothing else matters. And the speed of WDA."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import wda
from wda import Threat, attack
from wda.attacks.pgd import pgd
from wda.attacks.wda import wda as search
from wda.attacks.wda_plus_plus import wda_plus_plus
from wda.losses import margin
from wda.norms import dual, dual_maximiser, norm
from wda.passes import Oracle

NORMS = ("Linf", "L2", "L1")
RADII = {"Linf": 0.08, "L2": 0.6, "L1": 1.5}  # within which half of the digits fall
each_norm = pytest.mark.parametrize("name", NORMS)
each_seed = pytest.mark.parametrize("seed", [0, 1])


def affine(classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """An affine classifier of (N, 2, 3), points in [0, 1], and its own answers for labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, classes)).to(dtype)
    x = torch.rand(8, 2, 3, dtype=torch.float64).to(dtype)
    return model, x, model(x).argmax(1).detach()


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = wda.data.load("digits", n=40)
    return wda.models.load("digits-mlp").double(), x.double(), y


def march(model: nn.Module, x: Tensor, y: int, name: str, step: float, steps: int) -> tuple[Tensor, float] | None:
    """For one sample of an affine model: the last step's start, direction and how far the boundary is along it."""
    w, b = (p.detach() for p in model[1].parameters())
    slopes, point = w - w[y], x.flatten()
    for _ in range(steps):
        directions = [dual_maximiser(slopes[None, j], name)[0] for j in range(len(b))]
        gaps = [
            [float(b[k] - b[y] + slopes[k] @ (point + step * u)) for k in range(len(b)) if k != y] for u in directions
        ]
        chosen = max((j for j in range(len(b)) if j != y), key=lambda j: max(gaps[j]))
        if max(gaps[chosen]) >= 0:
            u = directions[chosen]
            roots = [
                float(-(b[k] - b[y] + slopes[k] @ point) / (slopes[k] @ u))
                for k in range(len(b))
                if k != y and slopes[k] @ u > 0
            ]
            return point, u, min(roots)
        point = point + step * directions[chosen]
    return None


# -- affine models ---------------------------------------------------------------------------------------------------


@each_norm
@each_seed
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("bisections", [0, 3, 12])
def test_an_affine_model_is_marched_through_as_in_closed_form(
    name: str, seed: int, classes: int, bisections: int
) -> None:
    model, x, y = affine(classes, seed)
    step, found = 0.07, 0
    points = wda_plus_plus(Oracle(model), x, y, name, None, step_size=step, steps=12, bisections=bisections)
    for i in range(len(x)):
        expected = march(model, x[i], int(y[i]), name, step, 12)
        if expected is None:
            assert torch.equal(points[i], x[i])
            continue
        start, direction, boundary = expected
        moved = points[i].flatten() - start
        along = float(norm(moved[None], name))
        torch.testing.assert_close(moved, along * direction, rtol=0, atol=1e-12)
        assert -1e-12 <= along - boundary <= step / 2**bisections + 1e-12
        found += 1
    assert found >= 3


@each_norm
@each_seed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_two_classes_the_point_is_the_nearest_error(name: str, seed: int, dtype: torch.dtype) -> None:
    model, x, y = affine(2, seed, dtype)
    found = wda.distances(model, x, y, name, None, method="wda++", bisections=16)
    w, b = (p.detach().double() for p in model[1].parameters())
    nearest = (x.double().flatten(1) @ (w[1] - w[0]) + b[1] - b[0]).abs() / norm((w[1] - w[0])[None], dual(name))
    ratio = found.distance / nearest
    rounding = 1e-9 if dtype == torch.float64 else 1e-3  # of logits that nearly cancel
    assert (ratio >= 1 - rounding).all()
    assert (ratio <= 1 + 0.26 / 2**16 + rounding).all()
    assert (found.rival == 1 - y).all()


@each_norm
def test_one_rival_is_the_one_with_the_largest_logit(name: str) -> None:
    model, x, y = affine(10)
    second = model(x).scatter(1, y[:, None], -math.inf).argmax(1).detach()
    w, _ = (p.detach() for p in model[1].parameters())
    points = wda_plus_plus(Oracle(model), x, y, name, None, rivals=1)
    moved = (points - x).flatten(1)
    directions = dual_maximiser(w[second] - w[y], name)
    torch.testing.assert_close(moved, norm(moved, name)[:, None] * directions, rtol=0, atol=1e-12)
    assert (margin(model(points), y) >= 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@each_norm
def test_the_default_step_has_the_units_of_the_sample(name: str, scale: float) -> None:
    model, x, y = affine(3)
    points = wda_plus_plus(Oracle(model), x, y, name, None)
    rescaled = wda_plus_plus(Oracle(lambda z: model(z / scale)), scale * x, y, name, None)
    torch.testing.assert_close(rescaled / scale, points, rtol=1e-9, atol=1e-9)
    assert (margin(model(points), y) >= 0).all()


def test_passes_are_counted_for_samples_that_still_march() -> None:
    """Margins -1, -2, ..., which a step of 1 along the only slope raises by 1 each: sample i takes i steps."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]])), model.bias.zero_()
    x = -torch.arange(0, 8, dtype=torch.float64)[:, None]
    oracle = Oracle(model)
    points = wda_plus_plus(oracle, x, torch.zeros(8, dtype=torch.int64), "L2", None, step_size=1, steps=5, bisections=4)
    marched = 1 + 2 + 3 + 4 + 5 + 5 + 5  # the first is wrong already; the last two are too far away
    assert oracle.backward == marched
    assert oracle.forward == 8 + 2 * marched + 4 * 5
    assert torch.equal(points[6:], x[6:])
    assert points[:6].abs().max() <= 1e-12


# -- what holds for every model --------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("model_name", ["digits-mlp", "digits-cnn-adv"])
def test_flips_are_flips_within_the_box(name: str, model_name: str) -> None:
    x, y = wda.data.load("digits", n=40)
    model = wda.models.load(model_name)
    with torch.no_grad():
        correct = margin(model(x), y) < 0
    with Oracle(model) as oracle:
        points = wda_plus_plus(oracle, x, y, name, (0.0, 1.0))
        wrong = margin(oracle.logits(points), y) >= 0
    assert torch.equal(points[~correct], x[~correct])
    assert wrong.double().mean() > 0.9
    assert points.min() >= 0
    assert points.max() <= 1
    assert torch.equal((points != x).flatten(1).any(1), correct & wrong)


@each_norm
def test_more_bisections_come_nearer(digits: tuple[nn.Module, Tensor, Tensor], name: str) -> None:
    model, x, y = digits
    coarse, fine = (wda.distances(model, x, y, name, method="wda++", bisections=times) for times in (0, 12))
    assert torch.equal(coarse.distance.isfinite(), fine.distance.isfinite())
    assert fine.distance.mean() < 0.98 * coarse.distance.mean()


@each_norm
@pytest.mark.parametrize("options", [{}, {"step_size": 0.1}], ids=str)
def test_batches_and_order_do_not_matter(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, options: dict[str, float]
) -> None:
    model, x, y = digits[0], digits[1][:20], digits[2][:20]
    whole = wda.distances(model, x, y, name, method="wda++", **options)
    assert len(whole.distance[whole.distance.isfinite() & (whole.distance > 0)]) > 3
    for size in (1, 17):
        parts = wda.distances(model, x, y, name, method="wda++", batch_size=size, **options)
        torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=1e-9)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = wda.distances(model, x[order], y[order], name, method="wda++", seed=1, **options)
    torch.testing.assert_close(shuffled.distance, whole.distance[order], rtol=0, atol=1e-9)


@each_norm
def test_the_march_goes_where_the_box_leaves_room(name: str) -> None:
    """The steepest coordinate is stuck at the box; the other one reaches the boundary at 0.5."""
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 1.0]])), model.bias.copy_(torch.tensor([0.0, -3.5]))
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    points = wda_plus_plus(Oracle(model), x, y, name, (0.0, 1.0), bisections=20)
    torch.testing.assert_close(points, torch.tensor([[1.0, 0.5]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_samples_without_a_gradient_stay_and_cost_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[1].weight.zero_(), model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    x = torch.rand(4, 2, 3, dtype=torch.float64)
    oracle = Oracle(model)
    assert torch.equal(wda_plus_plus(oracle, x, torch.zeros(4, dtype=torch.int64), "L2", (0.0, 1.0)), x)
    assert oracle.backward == 4 * 2


@each_norm
def test_a_sample_without_logits_leaves_the_others_alone(name: str) -> None:
    model, x, y = affine(3)

    def broken(z: Tensor) -> Tensor:
        return torch.where(z[:, :1, 0] == x[2, 0, 0], math.nan, model(z))

    points = wda_plus_plus(Oracle(broken), x, y, name, None)
    others = torch.arange(len(x)) != 2
    assert torch.equal(points[2], x[2])
    torch.testing.assert_close(points[others], wda_plus_plus(Oracle(model), x[others], y[others], name, None))


def test_a_region_without_logits_is_no_error() -> None:
    """The way to the boundary at 1 is barred from 0.5 on."""
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])

    def barred(z: Tensor) -> Tensor:
        return torch.where(z > 0.5, math.nan, torch.cat([torch.zeros_like(z), z - 1], dim=1))

    assert torch.equal(wda_plus_plus(Oracle(barred), x, y, "L2", None), x)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"step_size": 0}, "step_size=0"),
        ({"step_size": math.nan}, "step_size=nan"),
        ({"rivals": 3}, "rivals=3: .*from 1 to 2"),
        ({"bisections": -1}, "bisections=-1"),
        ({"bisections": 1.5}, "bisections=1.5"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, float], named: str) -> None:
    model, x, y = affine(3)
    with pytest.raises(ValueError, match=named):
        wda_plus_plus(Oracle(model), x, y, "L2", None, **options)


# -- WDA: what makes it faster ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attacker", [search, pgd], ids=lambda f: f.__name__)
@each_norm
def test_stopping_at_the_flip_flips_the_same_for_less(
    digits: tuple[nn.Module, Tensor, Tensor], attacker: Callable[..., Tensor], name: str
) -> None:
    model, x, y = digits
    y = y.clone()
    y[0] = (y[0] + 1) % 10  # an error from the start
    ball = Threat(name, RADII[name], order=math.inf)
    oracles = Oracle(model), Oracle(model)
    full, stopped = (
        attacker(oracle, x, y, ball, stop_at_flip=stop) for oracle, stop in zip(oracles, (False, True), strict=True)
    )
    at_full, at_stopped = (margin(model(points), y).detach() for points in (full, stopped))
    stands = at_full < 0
    assert 0.2 < stands.double().mean() < 0.8
    assert torch.equal(at_stopped < 0, stands)
    torch.testing.assert_close(stopped[stands], full[stands], rtol=0, atol=1e-9)
    assert (at_stopped <= at_full + 1e-9).all()
    assert torch.equal(stopped[0], x[0])
    assert oracles[1].backward < 0.8 * oracles[0].backward
    assert oracles[1].forward < oracles[0].forward


@pytest.mark.parametrize("attacker", [search, pgd], ids=lambda f: f.__name__)
def test_a_sample_that_is_wrong_everywhere_costs_no_gradient(attacker: Callable[..., Tensor]) -> None:
    """Nor does the model see a batch of nothing."""
    model, x, y = affine(3)
    oracle = Oracle(lambda z: model(z) if len(z) else pytest.fail("no rows"))
    points = attacker(oracle, x, (y + 1) % 3, Threat("L2", 0.1, order=math.inf), stop_at_flip=True)
    assert torch.equal(points, x)
    assert oracle.backward == 0


@pytest.mark.parametrize(
    ("classes", "options", "forward", "backward"),
    [
        (10, {}, 1 + 20 + (9 + 5 + 3 + 2) + 1, 9 + 5 + 3 + 2 + 16),
        (10, {"probe_steps": 2}, 1 + 20 + (9 + 5) + 1, 9 + 5 + 18),
        (10, {"steps": 3, "probe_steps": 3, "rivals": 4}, 1 + 3 + (4 + 2) + 1, 4 + 2 + 1),
        (2, {}, 1 + 20 + 1, 20),
    ],
)
def test_half_of_the_rivals_go_at_each_step(classes: int, options: dict[str, int], forward: int, backward: int) -> None:
    model, x, y = affine(classes)
    oracle = Oracle(model)
    search(oracle, x, y, Threat(eps=0.05), halving=True, **options)
    assert (oracle.forward, oracle.backward) == (forward * len(x), backward * len(x))


@each_norm
@each_seed
def test_the_better_half_stays(name: str, seed: int) -> None:
    """Short steps on an affine model, far from the sphere: each step and each halving is known."""
    model, x, y = affine(6, seed)
    w, b = (p.detach() for p in model[1].parameters())
    seen: list[Tensor] = []

    def recorder(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return model(z)

    ball, alpha = Threat(name, 100.0, order=math.inf, box=None), 0.3
    search(Oracle(recorder), x, y, ball, steps=6, probe_steps=6, step_size=alpha, halving=True)
    for i, label in enumerate(y.tolist()):
        point, left = x[i].flatten(), [j for j in range(6) if j != label]
        for _ in range(6):
            steps = {j: alpha * dual_maximiser((w[j] - w[label])[None], name)[0] for j in left}
            gaps = {j: float((w[j] - w[label]) @ (point + steps[j]) + b[j] - b[label]) for j in left}
            left = sorted(left, key=lambda j: -gaps[j])
            point = point + steps[left[0]]
            left = left[: (len(left) + 1) // 2]
        torch.testing.assert_close(seen[-1][i].flatten(), point, rtol=0, atol=1e-9)


@each_norm
@each_seed
@pytest.mark.parametrize("classes", [3, 10])
def test_halving_keeps_the_best_rival_of_an_affine_model(name: str, seed: int, classes: int) -> None:
    model, x, y = affine(classes, seed)
    w, _ = (p.detach() for p in model[1].parameters())
    gaps = model(x) - model(x).gather(1, y[:, None])
    slopes = torch.stack([norm(w[k] - w[y], dual(name)) for k in range(classes)], dim=1)
    optimum = (gaps + 2 * slopes).scatter(1, y[:, None], -math.inf).amax(1)
    points = search(Oracle(model), x, y, Threat(name, 2.0, order=math.inf, box=None), halving=True)
    assert margin(model(points), y).tolist() == pytest.approx(optimum.tolist(), rel=1e-9)


@pytest.mark.parametrize(("model_name", "name"), [("digits-mlp", "L2"), ("digits-cnn-adv", "Linf")])
def test_halving_costs_no_accuracy_on_the_digits(model_name: str, name: str) -> None:
    x, y = wda.data.load("digits", n=60)
    model = wda.models.load(model_name)
    threat = Threat(name, {"Linf": 0.1, "L2": 0.5}[name], order=math.inf)
    full, halved = (attack("wda", model, x, y, threat, halving=halving).accuracy(model) for halving in (False, True))
    assert abs(full - halved) <= 0.02


# -- Algorithm 1 letter by letter ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).parents[1] / "benchmarks" / "attacks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@each_norm
@pytest.mark.parametrize(("steps", "probe_steps"), [(6, 3), (4, 4), (1, 1)])
def test_without_a_box_the_walk_is_that_of_algorithm_1(
    digits: tuple[nn.Module, Tensor, Tensor], benchmark: ModuleType, name: str, steps: int, probe_steps: int
) -> None:
    """What `wda` evaluates last, if it compares raw logits and takes constant steps, is what Algorithm 1 returns."""
    model, x, y = digits
    x, y = x[:12], y[:12]
    seen: list[Tensor] = []

    def recorder(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return model(z)

    ball, alpha = Threat(name, RADII[name], order=math.inf, box=None), 0.3 * RADII[name]
    options = {"steps": steps, "probe_steps": probe_steps}
    best = search(Oracle(recorder), x, y, ball, rule="logit", step_size=alpha, **options)
    oracle = Oracle(model)
    others = torch.tensor([[j for j in range(10) if j != k] for k in y.tolist()])
    last = benchmark.algorithm_1(oracle, x, y, ball, alpha, others, **options)
    torch.testing.assert_close(seen[-1], last, rtol=0, atol=1e-9)
    assert (margin(model(best), y) >= margin(model(last), y) - 1e-9).all()
    assert oracle.backward == len(x) * (9 * probe_steps + steps - probe_steps)
    assert oracle.forward == oracle.backward + len(x) * 9 * probe_steps
