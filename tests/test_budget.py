"""The optimal budget: against transport programs, brute force and exact worst-case risks; feasible to the last bit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from wda import AdversarialDistribution, BudgetExceeded, Threat, losses
from wda.budget import allocate, robust_accuracy, spend
from wda.certificates import lipschitz, worst_case_curve
from wda.norms import norm

ORDERS = [1.0, 1.5, 2.0, 3.0]
NORMS = ["L1", "L2", "Linf"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

Rule = Callable[[Tensor, Threat], Tensor]


def ball(eps: float, order: float = 1.0, name: str = "L2") -> Threat:
    return Threat(name, eps, order, box=None)


def random_distances(seed: int, count: int = 40) -> Tensor:
    """Distances with zeros, infinities and ties among them."""
    rng = np.random.default_rng(seed)
    d = rng.lognormal(sigma=rng.uniform(0.1, 1.5), size=count)
    d[rng.random(count) < 0.1] = 0
    d[rng.random(count) < 0.1] = math.inf
    ties = rng.random(count) < 0.3
    d[ties] = d[ties].round(1)
    return torch.tensor(d)


# -- a transport program that knows no distances to errors -----------------------------------------------------------


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A finite set of inputs: cost distances (N, G) from samples to inputs, and which inputs are errors for which.

    Integer coordinates make ties; samples that are errors themselves have distance 0; one label is never mistaken.
    """
    rng = np.random.default_rng(seed)
    inputs = np.array(list(itertools.product(range(6), range(6))), dtype=float)
    samples = inputs[rng.choice(len(inputs), 12)]
    labels = rng.integers(0, 3, 12)
    wrong = rng.random((3, len(inputs))) < 0.15
    wrong[2] = False
    r = (1, 2, np.inf)[seed % 3]
    return np.linalg.norm(samples[:, None] - inputs, r, axis=2), wrong[labels], labels


def transport(distance: np.ndarray, value: np.ndarray, eps: float, p: float) -> float:
    """The largest mean of `value` over all transport plans from the samples to the inputs within the budget."""
    n, g = distance.shape
    solved = linprog(
        -value.ravel() / n,
        A_ub=distance.ravel()[None] ** p / n,
        b_ub=[eps**p],
        A_eq=np.kron(np.eye(n), np.ones(g)),
        b_eq=np.ones(n),
        method="highs",
    )
    assert solved.status == 0
    return -float(solved.fun)


def assert_optimal(rule: Rule, seed: int, p: float) -> None:
    """The rule flips the mass that the transport program flips."""
    distance, wrong, _ = world(seed)
    nearest = torch.tensor(np.where(wrong, distance, np.inf).min(1))
    for eps in (0.0, 0.05, 0.3, 0.8, 2.0):
        weight = rule(nearest, ball(eps, p))
        assert ((weight >= 0) & (weight <= 1)).all()
        assert float(weight.mean()) == pytest.approx(transport(distance, wrong.astype(float), eps, p), abs=1e-7)


def assert_feasible(rule: Rule, seed: int, p: float) -> None:
    """The distribution of the rule's weights passes its audit, as float64 sums it up, from points of either dtype."""
    generator = torch.Generator().manual_seed(seed)
    name, dtype = NORMS[seed % 3], (torch.float32, torch.float64)[seed % 2]
    count = int(torch.randint(1, 200, (1,), generator=generator))
    x = torch.rand(count, 7, generator=generator, dtype=dtype)
    size = torch.rand(count, 1, generator=generator, dtype=dtype) ** (1 + seed % 5)
    x_adv = (x + size * torch.randn(count, 7, generator=generator, dtype=dtype)).clamp(0, 1)
    x_adv[torch.rand(count, generator=generator) < 0.1] = x[0]  # some are far, one does not move
    d = norm(x_adv.double() - x.double(), name)
    y = torch.zeros(count, dtype=torch.int64)
    for share in (0.0, 0.02, 0.3, 0.9, 1.0):  # of what it costs to move everything
        unit = float(d.max())
        eps = unit * float((share * ((d / unit) ** p).mean()) ** (1 / p)) if p < math.inf else float(d.quantile(share))
        adv = AdversarialDistribution.from_points(x, x_adv, y, Threat(name, eps, p, (0.0, 1.0)), rule(d, ball(eps, p)))
        assert adv.audit() <= eps


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("seed", range(9))
def test_allocation_is_optimal_among_all_transport_plans(seed: int, p: float) -> None:
    assert_optimal(allocate, seed, p)


def test_the_worlds_have_zeros_infinities_and_ties() -> None:
    for seed in range(9):
        distance, wrong, _ = world(seed)
        nearest = np.where(wrong, distance, np.inf).min(1)
        finite = nearest[(nearest > 0) & (nearest < np.inf)]
        assert (nearest == 0).any() or seed not in (0, 1, 2)
        assert (nearest == np.inf).any()
        assert len(np.unique(finite)) < len(finite)


@pytest.mark.parametrize("p", [1.0, 1.1, 2.0, 7.0, 60.0, 1e4, math.inf])
def test_the_audit_passes_without_tolerance(p: float) -> None:
    for seed in range(60):
        assert_feasible(allocate, seed, p)


def furthest_first(d: Tensor, threat: Threat) -> Tensor:
    return allocate(-d + d[d < math.inf].max() + d.min(), threat) if (d < math.inf).all() else allocate(d, threat) / 2


def equal_shares(d: Tensor, threat: Threat) -> Tensor:
    finite = d < math.inf
    total = (d[finite] ** threat.order).mean()
    return finite * (1 - 2.0**-40) * (threat.eps**threat.order / total.clamp(min=1e-300)).clamp(max=1)


def order_forgotten(d: Tensor, threat: Threat) -> Tensor:
    return allocate(d, ball(threat.eps, 1.0 + (threat.order == 1)))


def whole_samples_only(d: Tensor, threat: Threat) -> Tensor:
    return allocate(d, threat).floor()


def to_the_last_bit(d: Tensor, threat: Threat) -> Tensor:
    """The knapsack without room for rounding."""
    weight, left = torch.zeros(len(d), dtype=torch.float64), len(d) * threat.eps**threat.order
    for i in d.argsort().tolist():
        cost = float(d[i]) ** threat.order
        weight[i] = min(1.0, max(0.0, left / cost)) if cost else 1.0
        left -= float(weight[i]) * cost
    return weight


@pytest.mark.parametrize("wrong_rule", [furthest_first, equal_shares, order_forgotten, whole_samples_only])
def test_a_wrong_rule_is_noticed(wrong_rule: Rule) -> None:
    caught = 0
    for seed, p in itertools.product(range(3), ORDERS):
        try:
            assert_optimal(wrong_rule, seed, p)
        except AssertionError:
            caught += 1
    assert caught == 12


def test_a_budget_overspent_by_rounding_is_noticed() -> None:
    caught = 0
    for seed, p in itertools.product(range(30), ORDERS):
        try:
            assert_feasible(to_the_last_bit, seed, p)
        except BudgetExceeded:
            caught += 1
    assert caught > 30


# -- the allocation itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [*ORDERS, 50.0, math.inf])
@pytest.mark.parametrize("seed", range(10))
def test_nearest_first_and_at_most_one_sample_is_divided(seed: int, p: float) -> None:
    d = random_distances(seed)
    for eps in (0.0, 1e-3, 0.1, 0.5, 1.0, 3.0, 1e3):
        weight = allocate(d, ball(eps, p))
        assert ((weight > 0) & (weight < 1)).sum() <= 1
        assert (weight[d.argsort(stable=True)].diff() <= 0).all()
        assert (weight[d == 0] == 1).all()
        assert (weight[d == math.inf] == 0).all()
        finite = d < math.inf
        cost = float((weight[finite] * d[finite] ** p).sum()) if p < math.inf else 0.0
        if (weight[finite] < 1).any() and p < math.inf:  # where something is left to buy, all is spent
            assert cost == pytest.approx(len(d) * eps**p, rel=1e-9)


def test_a_closed_form() -> None:
    """Budget 4 * 1 for the costs 0.5, 1, 2, 4: whole, whole, whole, and 0.5 of 4."""
    assert allocate(torch.tensor([4.0, 0.5, 2.0, 1.0]), ball(1.0)).tolist() == pytest.approx([0.125, 1, 1, 1])
    # squares 16, 0.25, 4, 1: the budget 4 buys 0.25 + 1 and 2.75 of 4
    assert allocate(torch.tensor([4.0, 0.5, 2.0, 1.0]), ball(1.0, 2)).tolist() == pytest.approx([0, 1, 2.75 / 4, 1])
    assert allocate(torch.tensor([4.0, 0.5, 2.0, 1.0]), ball(1.0, math.inf)).tolist() == [0, 1, 0, 1]


def test_a_tie_is_broken_by_the_order_of_the_samples() -> None:
    assert allocate(torch.full((4,), 2.0), ball(1.0)).tolist() == pytest.approx([1, 1, 0, 0])


@pytest.mark.parametrize("count", [1, 100_000])
def test_rounding_errors_that_all_point_one_way_do_not_overspend(count: int) -> None:
    """Equal distances: adding one number again and again rounds the same way again and again."""
    length = 1 / 3
    x = torch.zeros(count, 1, dtype=torch.float64)
    d = torch.full((count,), length, dtype=torch.float64)
    threat = ball(0.9 * length)
    adv = AdversarialDistribution.from_points(x, x + length, torch.zeros(count).long(), threat, allocate(d, threat))
    adv.audit()
    assert float(adv.moved_mass.sum()) == pytest.approx(0.9, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-3, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("p", [1.0, 2.0, 37.0, 5000.0])
def test_units_do_not_matter(scale: float, p: float) -> None:
    d = random_distances(3)
    for eps in (0.1, 0.9, 2.0):
        there = allocate(scale * d, ball(scale * eps, p))
        assert torch.allclose(there, allocate(d, ball(eps, p)), rtol=0, atol=1e-9)
        assert robust_accuracy(scale * d, scale * eps, p) == pytest.approx(1 - float(there.mean()), abs=1e-8)


@pytest.mark.parametrize("eps", [0.3, 1.0, 2.0])
def test_a_high_order_is_nearly_the_infinite_one(eps: float) -> None:
    d = random_distances(1)
    high, infinite = allocate(d, ball(eps, 1e6)), allocate(d, ball(eps, math.inf))
    apart = (d - eps).abs() > 1e-3
    assert torch.equal(high[apart], infinite[apart])


def test_the_result_is_float64_on_the_device_of_the_distances() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64):
        for order in (1.0, math.inf):
            assert allocate(torch.tensor([1, 2, 0], dtype=dtype), ball(0.5, order)).dtype == torch.float64
        assert robust_accuracy(torch.tensor([1, 2, 0], dtype=dtype), 0.5).dtype == torch.float64
    for device in DEVICES:
        d = torch.rand(9).to(device)
        radii = torch.stack([torch.zeros_like(d), d], 1)
        for order in (1.0, math.inf):
            assert allocate(d, ball(0.5, order)).device == d.device
            assert spend(radii, radii.cpu(), ball(0.5, order)).device == d.device
        assert robust_accuracy(d, [0.5]).device == d.device
    assert not allocate(torch.ones(2, requires_grad=True), ball(0.5)).requires_grad


# -- accuracy over budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [*ORDERS, 50.0, math.inf])
@pytest.mark.parametrize("seed", range(6))
def test_robust_accuracy_is_what_the_allocation_leaves(seed: int, p: float) -> None:
    d = random_distances(seed)
    eps = torch.linspace(0, 4, 51, dtype=torch.float64)
    accuracy = robust_accuracy(d, eps, p)
    left = torch.stack([1 - allocate(d, ball(e, p)).mean() for e in eps.tolist()])
    assert torch.allclose(accuracy, left, rtol=0, atol=1e-9)
    assert (accuracy <= left + 1e-15).all()
    assert (accuracy.diff() <= 1e-15).all()
    assert accuracy[0] == (d > 0).double().mean()
    far = float(robust_accuracy(d, 1e9, p))
    assert far == pytest.approx(float((d == math.inf).double().mean()), abs=1e-15)
    if p == math.inf:
        assert torch.equal(accuracy, (d > eps[:, None]).double().mean(1))
    else:  # the optimum of a linear program is concave in the budget, which is eps^p
        budget = torch.linspace(0, 4**p, 51, dtype=torch.float64)
        assert (robust_accuracy(d, budget ** (1 / p), p).diff().diff() >= -1e-12).all()


def test_robust_accuracy_is_not_convex_in_the_radius_for_order_two() -> None:
    eps = torch.linspace(0, 0.9, 10)
    accuracy = robust_accuracy(torch.ones(5), eps, 2)
    assert torch.allclose(accuracy, 1 - eps.double() ** 2)
    assert (accuracy.diff().diff() < 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_balls_are_nested_in_the_order_and_nearer_errors_are_worse(seed: int) -> None:
    d, eps = random_distances(seed), torch.linspace(0, 4, 41)
    curves = [robust_accuracy(d, eps, p) for p in (1, 1.5, 2, 5, 30, math.inf)]
    assert all((a <= b + 1e-12).all() for a, b in itertools.pairwise(curves))
    for p in (1, 2, math.inf):
        assert (robust_accuracy(0.9 * d, eps, p) <= robust_accuracy(d, eps, p) + 1e-12).all()


def test_budgets_may_be_given_in_several_ways() -> None:
    d = torch.tensor([0.02, 0.05, 0.0])
    one = robust_accuracy(d, 8 / 255)
    assert one.shape == ()
    assert robust_accuracy(d, "8/255") == one
    assert torch.equal(robust_accuracy(d, [8 / 255, 0.0]), torch.stack([one, robust_accuracy(d, 0)]))
    assert robust_accuracy(d, torch.zeros(2, 3)).shape == (2, 3)
    assert robust_accuracy(d, []).shape == (0,)
    assert robust_accuracy(d, 0.02, "inf") == pytest.approx(1 / 3)


# -- other losses ----------------------------------------------------------------------------------------------------


def random_curves(seed: int, n: int = 6, r: int = 7) -> tuple[Tensor, Tensor]:
    """Radii and values without any order, with ties, a radius beyond reach and values that are of no use."""
    rng = np.random.default_rng(seed)
    radii, values = rng.uniform(0, 3, (n, r)), rng.normal(size=(n, r)) * rng.uniform(0.5, 4, (n, 1))
    if seed % 2:
        radii, values = radii.round(), values.round()  # ties in both, and points that lie on one line
    radii[:, 0] = 0
    radii[1, 3], values[2, 4] = math.inf, -math.inf
    return torch.tensor(radii), torch.tensor(values)


def of_plan(shares: Tensor, values: Tensor) -> float:
    return float((shares * values).where(shares > 0, 0.0).sum(1).mean())


def program(radii: Tensor, values: Tensor, eps: float, p: float) -> float:
    """`spend`'s linear program, by a solver."""
    use = (radii < math.inf) & (values > -math.inf)
    bounds = [(0, None if u else 0) for u in use.flatten().tolist()]
    n, r = radii.shape
    solved = linprog(
        -values.where(use, 0.0).flatten().numpy() / n,
        A_ub=radii.where(use, 0.0).flatten().numpy()[None] ** p / n,
        b_ub=[eps**p],
        A_eq=np.kron(np.eye(n), np.ones(r)),
        b_eq=np.ones(n),
        bounds=bounds,
        method="highs",
    )
    assert solved.status == 0
    return -float(solved.fun)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("seed", range(6))
def test_spending_is_optimal_among_all_plans(seed: int, p: float) -> None:
    radii, values = random_curves(seed)
    for eps in (0.0, 0.1, 0.4, 0.9, 1.5, 3.0):
        shares = spend(radii, values, ball(eps, p))
        assert (shares >= 0).all()
        assert torch.allclose(shares.sum(1), torch.ones(len(radii)).double(), rtol=0, atol=1e-15)
        assert (shares[radii.isinf() | values.isinf()] == 0).all()
        cost = (shares * radii**p).where(shares > 0, 0.0).sum(1).mean()
        assert cost <= eps**p
        assert of_plan(shares, values) == pytest.approx(program(radii, values, eps, p), abs=1e-7)
        divided = (shares > 0).sum(1)
        assert (divided <= 2).all()
        assert (divided == 2).sum() <= 1


@pytest.mark.parametrize("seed", range(8))
def test_spending_against_brute_force(seed: int) -> None:
    """Whole samples at one radius each, or one sample divided between two radii: all of them are tried."""
    radii, values = random_curves(seed, n=3, r=5)
    eps, n = 0.7, 3
    best = -math.inf
    cost, value = (radii / eps).numpy(), values.numpy()
    for places in itertools.product(range(5), repeat=3):
        at = list(enumerate(places))
        for i, j in itertools.product(range(3), range(5)):
            others = sum(cost[k, m] for k, m in at if k != i)
            gain = sum(value[k, m] for k, m in at if k != i)
            here, there = (cost[i, places[i]], value[i, places[i]]), (cost[i, j], value[i, j])
            if not others + min(here[0], there[0]) <= n:
                continue
            (c0, v0), (c1, v1) = sorted((here, there))
            share = 1.0 if others + c1 <= n else (n - others - c0) / (c1 - c0)
            for s in (0.0, share):
                mixed = v1 if s == 1 else v0 if s == 0 else (1 - s) * v0 + s * v1
                best = max(best, (gain + mixed) / n)
    assert of_plan(spend(radii, values, ball(eps)), values) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_one_sample_reaches_its_concave_majorant(seed: int, p: float) -> None:
    radii, values = random_curves(seed, n=3, r=9)
    t, v = radii[:1] ** p, values[:1]
    for eps in (0.0, 0.2, 0.5, 1.0, 2.0, 5.0):
        # the majorant at b: the highest chord over b, and the highest point before it
        chords = [float(v[0, j]) for j in range(9) if t[0, j] <= eps**p]
        for i, j in itertools.permutations(range(9), 2):
            if t[0, i] < eps**p < t[0, j]:
                part = (eps**p - t[0, i]) / (t[0, j] - t[0, i])
                chords.append(float((1 - part) * v[0, i] + part * v[0, j]))
        assert of_plan(spend(radii[:1], v, ball(eps, p)), v) == pytest.approx(max(chords), abs=1e-9)


@pytest.mark.parametrize("p", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_value_is_concave_in_the_budget(seed: int, p: float) -> None:
    radii, values = random_curves(seed)
    budget = np.linspace(0, 3**p, 25)
    worth = np.array([of_plan(spend(radii, values, ball(b ** (1 / p), p)), values) for b in budget])
    assert (np.diff(worth) >= -1e-12).all()
    assert (np.diff(worth, 2) <= 1e-9).all()


def test_points_on_one_line_are_bought_in_their_order() -> None:
    """Rounding must not sell a segment before the one that leads to it, nor trip over one of no width."""
    generator = torch.Generator().manual_seed(0)
    radii = torch.cat([torch.zeros(50, 1), torch.rand(50, 9, generator=generator).cumsum(1)], 1).double()
    values = 0.3 * radii
    for eps in (0.2, 0.9, 1.7, 3.0):
        shares = spend(radii, values, ball(eps))
        assert ((shares >= 0) & (shares <= 1)).all()
        assert ((shares > 0).sum(1) == 2).sum() <= 1
        assert of_plan(shares, values) == pytest.approx(min(0.3 * eps, float(values[:, -1].mean())), rel=1e-9)
    nearly_twice = torch.tensor([[0, 1.99, np.nextafter(1.99, 2)]], dtype=torch.float64)
    for radius in torch.linspace(1.5, 2, 30, dtype=torch.float64):
        shares = spend(radius * torch.tensor([[0.0, 1.0, 1.0]]), nearly_twice, ball(1.0))
        assert of_plan(shares, nearly_twice) == pytest.approx(1.99 / float(radius))


@pytest.mark.parametrize("p", [*ORDERS, 40.0, math.inf])
@pytest.mark.parametrize("seed", range(10))
def test_for_the_0_1_loss_spending_is_allocation(seed: int, p: float) -> None:
    d = random_distances(seed)
    radii = torch.stack([torch.zeros_like(d), d], 1)
    values = torch.stack([(d == 0).double(), torch.ones_like(d)], 1)
    for eps in (0.0, 0.1, 0.7, 2.0):
        moved = spend(radii, values, ball(eps, p))[:, 1]
        stays = d == 0  # is an error already
        assert (moved[stays] == 0).all()
        assert torch.allclose(moved[~stays], allocate(d, ball(eps, p))[~stays], rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_order_infinity_takes_the_best_within_reach(seed: int) -> None:
    radii, values = random_curves(seed)
    for eps in (0.0, 0.5, 1.5, 4.0):
        shares = spend(radii, values, ball(eps, math.inf))
        for row, t, v in zip(shares, radii, values, strict=True):
            (place,) = row.nonzero()[:, 0].tolist()
            assert row[place] == 1
            assert t[place] <= eps
            assert v[place] == v[t <= eps].max()


@pytest.mark.parametrize("p", [1.0, 2.0, 9.0, 300.0, math.inf])
@pytest.mark.parametrize("seed", range(12))
def test_spending_passes_the_audit_without_tolerance(seed: int, p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    name, dtype = NORMS[seed % 3], (torch.float32, torch.float64)[seed % 2]
    x = torch.rand(40, 5, generator=generator, dtype=dtype)
    steps = 0.3 * torch.randn(40, 6, 5, generator=generator, dtype=dtype)
    places = torch.cat([x[:, None], (x[:, None] + steps).clamp(0, 1)], 1)
    radii = norm((places.double() - x[:, None].double()).flatten(0, 1), name).view(40, 7)
    values = torch.randn(40, 7, generator=generator)
    for eps in (0.01, 0.1, 0.3):
        threat = Threat(name, eps, p, (0.0, 1.0))
        shares = spend(radii, values, threat)
        source, place = (shares[:, 1:] > 0).nonzero().T
        mass = shares[source, place + 1] / 40
        y = torch.zeros(40, dtype=torch.int64)
        AdversarialDistribution(x, y, threat, places[source, place + 1], mass, source).audit()


def random_net(seed: int, n: int, width: int, classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, classes)).double().requires_grad_(False)
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(layer.bias)
    return net


def radius_curve(net: nn.Sequential, x: Tensor, y: Tensor, radii: Tensor) -> Tensor:
    """The largest margin within each distance of x in the maximum norm, exactly.

    In a network moved so that x is its origin the ball is a box, and the worst-case curve in it ends at its maximum.
    """
    moved = copy.deepcopy(net)
    moved[0].bias.add_(net[0].weight @ x)
    origin = torch.zeros(1, len(x)).double()
    return torch.tensor(
        [worst_case_curve(moved, origin, y[None], "Linf", "margin", (-t, t)).values[-1] for t in radii.tolist()]
    )


@pytest.mark.parametrize("seed", [5, 20])
def test_exact_radius_curves_spent_well_are_the_exact_worst_case_risk(seed: int) -> None:
    net = random_net(seed, 2, 5, 2 + seed % 2)
    x = 4 * torch.rand(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2
    y = net(x).argmax(1)
    exact = worst_case_curve(net, x, y, "Linf")
    assert len(exact.knots) > 7
    corners = torch.tensor(np.abs(exact.points - x.numpy()[exact.source]).max(1))
    budgets = np.linspace(0, exact.knots[-1], 9)

    def lost(radii: Tensor) -> np.ndarray:
        """How far spending over these radii stays below V, at each budget."""
        values = torch.stack([radius_curve(net, *sample, radii) for sample in zip(x, y, strict=True)])
        values = torch.cat([losses.margin(net(x), y)[:, None], values], 1)
        grid = torch.cat([torch.zeros(1).double(), radii]).expand_as(values)
        return np.array([exact(e) - of_plan(spend(grid, values, ball(e, 1, "Linf")), values) for e in budgets])

    # at the radii where the majorants have their corners nothing is lost
    assert np.abs(lost(corners.unique())).max() < 1e-8
    # on a grid a little is, never the other way round; rounding each atom's radius down to the grid loses Lip h
    for steps in (4, 12):
        grid = torch.linspace(0, float(corners.max()), steps + 1, dtype=torch.float64)[1:]
        below = lost(grid)
        assert below.min() > -1e-9
        assert below.max() <= lipschitz(net, "Linf").value * grid[0] + 1e-9


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "error", "message"),
    [
        (torch.tensor([1.0, math.nan]), ValueError, r"distance\[1\]=nan: numbers >= 0, or infinity, are accepted"),
        (torch.tensor([-1e-9, 1.0]), ValueError, r"distance\[0\]=-9.99.*: numbers >= 0"),
        (torch.tensor([-math.inf]), ValueError, r"distance\[0\]=-inf"),
        (torch.zeros(2, 2), ValueError, r"distance of shape \(2, 2\): \(N,\)"),
        (torch.tensor(1.0), ValueError, r"distance of shape \(\)"),
        (torch.zeros(0), ValueError, r"distance of shape \(0,\)"),
        ([1.0, 2.0], TypeError, "distance: a real tensor .* not list"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "distance: a real tensor"),
    ],
)
def test_bad_distances_are_named(distance: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(distance, ball(1.0))
    with pytest.raises(error, match=message):
        robust_accuracy(distance, 1.0)


def test_other_bad_arguments_are_named() -> None:
    d, radii, values = torch.ones(2), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    for call in (lambda: allocate(d, 0.5), lambda: spend(radii, values, 0.5)):
        with pytest.raises(TypeError, match=r"threat=0.5: a wda.Threat is accepted"):
            call()
    for eps in (-1.0, math.nan, math.inf, [0.1, -0.1], "-1/2", torch.tensor([math.inf])):
        with pytest.raises(ValueError, match=r"eps=.* accepted"):
            robust_accuracy(d, eps)
    for eps in (None, ["a"], object()):
        with pytest.raises(TypeError, match=r"eps=.* accepted"):
            robust_accuracy(d, eps)
    with pytest.raises(ValueError, match=r"order=0.5: a number >= 1"):
        robust_accuracy(d, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"radii\[0, 0\]=0.5: 0 is accepted"):
        spend(radii + 0.5, values, ball(1.0))
    with pytest.raises(ValueError, match=r"radii\[0, 1\]=-1.0: numbers >= 0"):
        spend(-radii, values, ball(1.0))
    with pytest.raises(ValueError, match=r"radii of shape \(2,\): \(N, R\)"):
        spend(radii[0], values, ball(1.0))
    with pytest.raises(ValueError, match=r"values of shape \(2, 2\), radii of shape \(1, 2\)"):
        spend(radii, values.expand(2, 2), ball(1.0))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="values: finite numbers are accepted"):
            spend(radii, torch.tensor([[0.0, bad]]), ball(1.0))
    with pytest.raises(ValueError, match="values: finite numbers are accepted"):
        spend(radii, torch.tensor([[-math.inf, 0.0]]), ball(1.0))
