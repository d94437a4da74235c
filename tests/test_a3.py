"""Adaptive Auto Attack: what it learns, what it drops, and what it finds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wda
from wda import Threat
from wda.attacks.a3 import Directions, a3, a3_plus_plus, promising
from wda.attacks.pgd import pgd
from wda.distribution import AdversarialDistribution
from wda.losses import margin
from wda.norms import dual, norm, project, round_inward
from wda.passes import Oracle

NORMS = ("Linf", "L2", "L1")
INWARD = 1 - 2.0**-40
each_norm = pytest.mark.parametrize("name", NORMS)
each_attack = pytest.mark.parametrize("method", [a3, a3_plus_plus], ids=["a3", "a3++"])

Attack = Callable[..., Tensor]
Model = Callable[[Tensor], Tensor]


def ball(name: str, eps: float, box: tuple[float, float] | None = (0.0, 1.0)) -> Threat:
    return Threat(name, eps, order=math.inf, box=box)


def affine(classes: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """An affine classifier of (N, 2, 3), points in [0, 1], and its own answers for labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, classes)).to(dtype)
    x = torch.rand(8, 2, 3, dtype=torch.float64).to(dtype)
    return model, x, model(x).argmax(1).detach()


def curved(classes: int = 3, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network with several pieces within reach, points in [0, 1], and its own answers for labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, classes)).double()
    with torch.no_grad():
        model[1].weight *= 4
        model[1].bias -= model[1].weight.sum(1) / 2
    x = torch.rand(30, 2, 3, dtype=torch.float64)
    return model, x, model(x).argmax(1).detach()


def distances(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """How far the nearest class boundary of an affine model is, without a box, in float64."""
    w, b = (p.detach().double() for p in model[1].parameters())
    z = x.double().flatten(1) @ w.T + b
    gaps = z.gather(1, y[:, None]) - z
    slopes = torch.stack([norm(d, dual(name)) for d in (w - w[y][:, None]).transpose(0, 1)], dim=1)
    return (gaps / slopes).masked_fill(y[:, None] == torch.arange(len(b)), math.inf).amin(1)


def standing(model: Model, points: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(model(points), y) < 0


# -- what it finds ---------------------------------------------------------------------------------------------------


@each_attack
@each_norm
@pytest.mark.parametrize(
    ("classes", "seed", "dtype"),
    [(2, 0, torch.float32), (3, 1, torch.float64), (10, 0, torch.float32), (10, 1, torch.float64)],
    ids=str,
)
def test_an_affine_model_flips_where_the_boundary_is_within_reach_and_nowhere_else(
    method: Attack, name: str, classes: int, seed: int, dtype: torch.dtype
) -> None:
    model, x, y = affine(classes, seed, dtype)
    nearest = distances(model, x, y, name)
    between = nearest.sort().values[3:5].mean().item()  # half of the samples are within reach
    points = method(Oracle(model), x, y, ball(name, between, box=None), levels=3)
    assert torch.equal(standing(model, points, y), nearest > between)


@each_attack
def test_it_beats_as_many_steps_of_pgd(method: Attack) -> None:
    x, y = wda.data.load("digits", n=80)
    model = wda.models.load("digits-cnn")
    threat = ball("Linf", 0.1)
    with Oracle(model) as oracle:
        points = method(oracle, x, y, threat, levels=3)
        steps = math.ceil(oracle.backward / len(x))
        plain = [pgd(oracle, x, y, threat, steps=steps, loss=loss) for loss in ("ce", "margin")]
        best = min(int(standing(oracle.logits, point, y).sum()) for point in plain)
        assert 0 < standing(oracle.logits, points, y).sum() < best


@each_attack
@each_norm
def test_points_of_largest_margin_are_kept(method: Attack, name: str) -> None:
    """None is worse than the sample, and more levels are never worse than fewer: they go on from there."""
    model, x, y = curved()
    before = margin(model(x), y)
    for levels in (1, 2, 3):
        after = margin(model(method(Oracle(model), x, y, ball(name, 0.05), levels=levels, steps=10)), y)
        assert (after >= before).all()
        before = after


@each_attack
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-0.1, 1.3), None], ids=str)
def test_the_distribution_passes_its_audit(
    method: Attack, name: str, dtype: torch.dtype, box: tuple[float, float] | None
) -> None:
    model, x, y = curved()
    model, x = model.to(dtype), x.to(dtype)
    x[:, 0] = x[:, 0].round()  # half of the pixels touch a side
    threat = ball(name, 0.15, box)
    inner = ball(name, threat.eps * INWARD, box)
    points = method(Oracle(model), x, y, inner, levels=2, steps=10)
    if box is not None:
        low, high = wda.norms.bounds(box, points)
        assert (points >= low).all()
        assert (points <= high).all()
    points = round_inward(project(points, x, inner.eps, name, box), x, inner.eps, name)
    adv = AdversarialDistribution.from_points(x, points, y, threat)
    assert adv.audit() <= threat.eps
    assert adv.accuracy(model) < wda.attack("fgsm", model, x, y, Threat(name, 0.0, box=box)).accuracy(model)


# -- what must not matter --------------------------------------------------------------------------------------------


@each_attack
@each_norm
def test_the_seed_decides_and_nothing_else_is_random(method: Attack, name: str) -> None:
    model, x, y = curved()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    threat = ball(name, 0.2 if name == "L1" else 0.05)
    runs = [method(Oracle(model), x, y, threat, levels=2, steps=5, seed=seed) for seed in (0, 0, 1, 2**64 - 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())


@each_attack
@each_norm
@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(method: Attack, name: str, batch_size: int) -> None:
    model, x, y = (value[:12] if isinstance(value, Tensor) else value for value in curved())
    whole, parts = (method(Oracle(model, size), x, y, ball(name, 0.1), levels=2, steps=8) for size in (256, batch_size))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@each_attack
def test_the_sample_is_left_as_it_was(method: Attack) -> None:
    model, x, y = curved()
    before = x.clone()
    points = method(Oracle(model), x, y, ball("Linf", 0.1), levels=1)
    assert torch.equal(x, before)
    assert not points.requires_grad


# -- passes go to the samples that stand -----------------------------------------------------------------------------


@each_attack
def test_a_sample_that_is_wrong_costs_one_forward_pass(method: Attack) -> None:
    model, x, y = curved()
    oracle = Oracle(model)
    points = method(oracle, x, (y + 1) % 3, ball("Linf", 0.1))
    assert torch.equal(points, x)
    assert (oracle.forward, oracle.backward) == (len(x), 0)


@each_attack
def test_others_that_are_wrong_change_neither_the_points_nor_the_passes(method: Attack) -> None:
    model, x, y = curved()
    alone, together = Oracle(model), Oracle(model)
    expected = method(alone, x, y, ball("Linf", 0.05), levels=2)
    points = method(together, x.repeat(2, 1, 1), torch.cat([y, (y + 1) % 3]), ball("Linf", 0.05), levels=2)
    torch.testing.assert_close(points, torch.cat([expected, x]), rtol=0, atol=1e-9)
    assert (together.forward, together.backward) == (alone.forward + len(x), alone.backward)


def test_it_stops_when_all_samples_are_flipped() -> None:
    """On an affine model with two classes the first step flips what is within reach; then comes the look at it."""
    model, x, y = affine(2, seed=0)
    radius = 1.01 * distances(model, x, y, "L2").max().item()
    oracle = Oracle(model)
    assert not standing(model, a3(oracle, x, y, ball("L2", radius, box=None)), y).any()
    assert oracle.backward <= 2 * len(x)


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize(("method", "probes"), [(a3, 0), (a3_plus_plus, 3)], ids=["a3", "a3++"])
def test_each_level_halves_the_samples_and_doubles_the_restarts(
    method: Attack, probes: int, levels: int, steps: int
) -> None:
    """Where nothing can flip the schedule is exact. A3++ has 3 gradients for its first step in place of one."""
    model, x, y = affine(4, seed=0)
    oracle = Oracle(model)
    method(oracle, x, y, ball("Linf", 1e-9, box=None), levels=levels, steps=steps)
    restarts = sum(2 ** (level + 1) * math.ceil(len(x) / 2**level) for level in range(levels))
    assert oracle.backward == restarts * (steps + max(0, probes - 1))
    # the sample and the noise; each gradient's point, the last one, and with probes the start and one more for each
    assert oracle.forward == 2 * len(x) + restarts * (steps + 1 + (probes + 1) * (probes > 0))


def test_flipped_samples_leave_the_working_set() -> None:
    model, x, y = affine(2, seed=0)
    nearest = distances(model, x, y, "Linf")
    between = nearest.sort().values[3:5].mean().item()
    oracle = Oracle(model)
    a3(oracle, x, y, ball("Linf", between, box=None), levels=1)
    assert 4 * 2 * 25 <= oracle.backward <= 4 * 2 * 25 + 4 * 3


# -- hard cases ------------------------------------------------------------------------------------------------------


@each_attack
@each_norm
@pytest.mark.parametrize("classes", [2, 3])
def test_one_sample_and_few_classes(method: Attack, name: str, classes: int) -> None:
    model, x, y = affine(classes, seed=2)
    nearest = distances(model, x[:1], y[:1], name).item()
    for reach, stands in ((0.9, True), (1.1, False)):
        points = method(Oracle(model), x[:1], y[:1], ball(name, reach * nearest, box=None), levels=1)
        assert points.shape == x[:1].shape
        assert standing(model, points, y[:1]).tolist() == [stands]


@each_attack
@each_norm
def test_constant_logits_are_a_finite_search_for_nothing(method: Attack, name: str) -> None:
    x, y = torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)
    oracle = Oracle(lambda z: z @ torch.zeros(4, 3) + torch.tensor([1.0, 0.0, 0.5]))
    points = method(oracle, x, y, ball(name, 0.1), levels=2)
    assert torch.equal(points, x)
    assert oracle.vanished == oracle.backward > 0


@each_attack
@each_norm
def test_the_noise_finds_what_no_gradient_shows(method: Attack, name: str) -> None:
    """A plateau around the sample, and errors beyond it: the gradient at the sample is zero."""

    def plateau(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0] * 0, nn.functional.relu(norm(z, name) - 0.5) - 0.1], dim=1)

    x, y = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    points = method(Oracle(plateau), x, y, ball(name, 1.0, box=None), levels=1)
    assert not standing(plateau, points, y).any()


def sometimes_nan(bad: Callable[[Tensor], Tensor]) -> tuple[Model, Tensor, Tensor]:
    """A network whose logits are NaN where `bad` says so."""
    inner, x, y = curved()
    return lambda z: torch.where(bad(z)[:, None], math.nan, inner(z)), x, y


@each_attack
def test_samples_with_logits_that_are_no_numbers_are_left_alone(method: Attack) -> None:
    model, x, y = sometimes_nan(lambda z: z[:, 0, 0] == 0.125)
    x[3, 0, 0] = 0.125
    points = method(Oracle(model), x, y, ball("Linf", 0.1), levels=2)
    assert torch.equal(points[3], x[3])
    rest = torch.arange(len(x)) != 3
    assert standing(model, points, y)[rest].sum() < rest.sum()


@each_attack
@each_norm
def test_points_with_logits_that_are_no_numbers_are_not_taken(method: Attack, name: str) -> None:
    model, x, y = sometimes_nan(lambda z: z[:, 0, 0] > 0.6)
    x[:, 0, 0] *= 0.59
    points = method(Oracle(model), x, y, ball(name, 0.3), levels=2)
    logits = model(points)
    assert logits.isfinite().all()
    assert (margin(logits, y) >= 0).any()


@each_attack
@pytest.mark.parametrize(
    ("option", "named"),
    [({"steps": 2}, "steps=2: .*>= 3"), ({"steps": 5.0}, "steps=5.0"), ({"levels": 0}, "levels=0")],
)
def test_bad_options_are_named(method: Attack, option: dict[str, object], named: str) -> None:
    model, x, y = affine(3, seed=0)
    with pytest.raises(ValueError, match=named):
        method(Oracle(model), x, y, ball("Linf", 0.1), **option)


# -- adaptive direction initialisation -------------------------------------------------------------------------------


def draw(
    directions: Directions, n: int = 4000, classes: int = 10, rival: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, and the weights of the label, of the rival, and of all others, for n samples."""
    y = torch.arange(n) % 5
    weights = directions.draw(y, torch.full((n,), rival), classes)
    columns = torch.arange(classes)
    others = (columns != y[:, None]) & (columns != rival)
    return y, weights.gather(1, y[:, None])[:, 0], weights[:, rival], weights[others]


def from_uniform(values: Tensor, low: float, high: float) -> float:
    """The Kolmogorov-Smirnov statistic: a uniform sample of size n exceeds 1.95 / sqrt(n) once in 1000."""
    shares = (values.sort().values - low) / (high - low)
    return (shares - torch.linspace(0, 1, len(values), dtype=shares.dtype)).abs().max().item() * len(values) ** 0.5


def learnt(label: list[float], rival: list[float]) -> Directions:
    """After flips of samples of class 2 to class 4, with these weights at both."""
    directions = Directions(torch.Generator().manual_seed(3))
    weights = torch.full((len(label), 6), 0.3)
    weights[:, 2], weights[:, 4] = torch.tensor(label), torch.tensor(rival)
    directions.learn(weights, torch.full((len(label),), 2), torch.full((len(label),), 4))
    return directions


@pytest.mark.parametrize("directions", [learnt([], []), learnt([-1, 0.2], [0.4, -0.9])], ids=["no flips", "a tie"])
def test_without_a_majority_all_weights_are_uniform(directions: Directions) -> None:
    _, *kinds = draw(directions)
    for values in kinds:
        assert from_uniform(values, -1, 1) < 1.95


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("label", [-1, 1])
@pytest.mark.parametrize("rival", [-1, 1])
def test_the_signs_of_most_flips_are_favoured(classes: int, label: int, rival: int) -> None:
    """Two small weights against a large one: signs count, not sizes."""
    directions = learnt([label * 0.1, label * 0.2, -label * 1.0], [rival * 0.1, rival * 0.1, -rival * 0.9])
    n = 200 if classes == 1000 else 4000
    _, own, other, rest = draw(directions, n, classes)
    scale = max(1, classes / 10)
    assert from_uniform(own, *sorted((-0.1 * label * scale, 0.5 * label * scale))) < 1.95
    torch.testing.assert_close(other, torch.full_like(other, 0.8 * rival * scale))
    assert from_uniform(rest, -1, 1) < 1.95


def test_counts_add_up_over_calls() -> None:
    directions = learnt([-0.5, -0.5, 0.1], [0.5, 0.2, 0.1])
    y, reached = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0])
    directions.learn(torch.tensor([[0.3, 0.2], [0.9, 0.1], [-0.9, 0.1]]), y, reached)
    assert (directions.label, directions.rival) == (-1 + 3, 3 + 1)


def test_flips_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flip of a restart with drawn weights is counted, once, with the label and the class it went to."""
    model, x, y = curved(seed=7)
    counted: Counter[tuple[int, int]] = Counter()

    def learn(self: Directions, weights: Tensor, y: Tensor, reached: Tensor) -> None:
        assert weights.shape == (len(y), 3)
        counted.update(zip(y.tolist(), reached.tolist(), strict=True))

    monkeypatch.setattr(Directions, "learn", learn)
    few, many = (a3(Oracle(model), x, y, ball("Linf", 0.06), levels=levels, steps=3) for levels in (1, 4))
    late = standing(model, few, y) & ~standing(model, many, y)
    assert late.any()
    ends = Counter(zip(y[late].tolist(), model(many[late]).argmax(1).tolist(), strict=True))
    assert ends <= counted
    assert counted.total() <= 2 * (~standing(model, many, y)).sum()


# -- online statistics-based discarding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1.0, [5, 1, 4, 0, 6]), (0.5, [5, 1, 4]), (0.4, [5, 1]), (1e-9, [5])],
)
def test_those_nearest_to_a_flip_are_kept(share: float, expected: list[int]) -> None:
    margins = torch.tensor([-3.0, -1.0, 0.0, 2.0, -1.0, -0.5, -9.0, math.nan])
    assert promising(margins, share).tolist() == expected


@pytest.mark.parametrize("margins", [[], [0.0, 1.0], [math.nan, math.inf]], ids=str)
def test_nothing_is_kept_where_nothing_stands(margins: list[float]) -> None:
    assert promising(torch.tensor(margins), 1.0).tolist() == []
