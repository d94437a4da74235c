"""The bracket: it holds what is between, is as wide as what is not known, and says why where it is open."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_closest import affine, nearest_boundary
from test_radius import exact_distances, small
from torch import Tensor, nn

import wda
from wda import Threat, nets
from wda.budget import robust_accuracy
from wda.evaluate import Bracket, bracket, risk_bracket
from wda.losses import margin
from wda.norms import norm, support

NORMS = ("Linf", "L2", "L1")
ORDERS = (1.0, 1.5, 2.0, math.inf)
LEAST = torch.finfo(torch.float64).tiny
QUIET = {"progress": False}
each_order = pytest.mark.parametrize("order", ORDERS)
each_norm = pytest.mark.parametrize("name", NORMS)


def made(seed: int = 0, n: int = 40, gap: float = 1.5, order: float = 1.0, eps: float = 0.3) -> Bracket:
    """Some radii and distances up to `gap` times as large, among them 0, the least positive number and infinity."""
    rng = np.random.default_rng(seed)
    radius = torch.tensor(rng.exponential(1, n))
    distance = radius * torch.tensor(rng.uniform(1, gap, n))
    radius[:3], distance[:3] = 0, 0
    radius[3], distance[4:6] = LEAST, math.inf
    radius[5] = math.inf
    return Bracket(Threat("L2", eps, order, box=None), radius, distance)


def program(distance: Tensor, eps: float, order: float) -> float:
    """The optimal budget by a linear program."""
    reached = distance.isfinite()
    d = distance[reached].numpy()
    if math.isinf(order):
        return 1 - float((d <= eps).sum()) / len(distance)
    n = len(distance)
    spent = linprog(-np.ones(len(d)) / n, A_ub=(d**order / n)[None], b_ub=[eps**order], bounds=(0, 1))
    return 1 + spent.fun


# -- from both sides' distances to accuracies ------------------------------------------------------------------------


@each_order
@pytest.mark.parametrize("seed", range(3))
def test_both_sides_are_those_of_a_linear_program(seed: int, order: float) -> None:
    b = made(seed)
    for eps in (0.01, 0.2, 1.0, 3.0):
        lower, upper = b.curve(eps, order)
        beyond = b.radius.where(b.radius == 0, b.radius * (1 + 1e-9))  # errors are further than the radius
        assert float(upper) == pytest.approx(program(b.distance, eps, order), abs=1e-7)
        assert float(lower) == pytest.approx(program(beyond, eps, order), abs=1e-7)


@each_order
def test_the_curve_is_monotone_in_the_radius_and_in_the_order_and_lower_is_below_upper(order: float) -> None:
    b, eps = made(), torch.linspace(0, 4, 60)
    lower, upper = b.curve(eps, order)
    assert lower.dtype == upper.dtype == torch.float64
    assert lower.shape == upper.shape == eps.shape
    assert (lower <= upper).all()
    assert (lower < upper).any()
    for side in (lower, upper):
        assert (side.diff() <= 1e-15).all()
        assert ((side >= -1e-12) & (side <= 1)).all()
    # a ball of higher order lies in the one of lower order
    for less, more in zip(b.curve(eps, 1.0), (lower, upper), strict=True):
        assert (less <= more + 1e-9).all()
    assert torch.equal(upper, robust_accuracy(b.distance, eps, order))


def test_at_the_threats_own_ball_and_fractions() -> None:
    b = made(eps=0.25, order=2.0)
    assert (b.lower, b.upper) == tuple(float(side) for side in b.curve("1/4"))
    assert (b.lower, b.upper) == tuple(float(side) for side in b.curve(0.25, "2"))
    assert b.curve([0.25, 1.0])[0].shape == (2,)
    assert float(b.curve(0.0)[1]) == pytest.approx(37 / 40)
    assert float(b.curve(0.0)[0]) == pytest.approx(37 / 40), "what is right stays right where nothing moves"


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, "far", [0.1, -0.1]])
def test_radii_of_balls_are_finite(bad: object) -> None:
    with pytest.raises((ValueError, TypeError), match="eps="):
        made().curve(bad)
    with pytest.raises(ValueError, match=r"order=0\.5"):
        made().curve(0.1, 0.5)


def test_a_certified_ball_is_closed_and_errors_are_beyond_it() -> None:
    radius = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    b = Bracket(Threat("Linf", 0.2, math.inf), radius, radius)
    assert b.lower == pytest.approx(2 / 3), "no error at 0.2 itself"
    assert b.upper == pytest.approx(1 / 3), "an error at 0.2"
    assert b.exact.all()


@each_order
def test_where_radius_and_distance_agree_the_bracket_is_a_number(order: float) -> None:
    b = made(gap=1.0)
    b = Bracket(b.threat, b.distance, b.distance)
    assert b.exact.all()
    lower, upper = b.curve(torch.tensor([0.011, 0.31, 1.7]), order)
    torch.testing.assert_close(lower, upper, rtol=0, atol=1e-9)


def test_exact_are_those_whose_sides_meet() -> None:
    radius = torch.tensor([0.0, 1.0, 1.0, math.inf, 1.0, LEAST], dtype=torch.float64)
    distance = torch.tensor([0.0, 1.0 + 5e-6, 1.1, math.inf, math.inf, 0.1], dtype=torch.float64)
    assert Bracket(Threat(), radius, distance).exact.tolist() == [True, True, False, True, False, False]


# -- the distribution that the sample is drawn from ------------------------------------------------------------------


def draw(rng: np.random.Generator, n: int) -> Tensor:
    """Distances of a population: one in ten is an error itself, one in twenty has none, the others are exponential."""
    kind, d = rng.uniform(size=n), rng.exponential(0.2, n)
    return torch.tensor(np.where(kind < 0.1, 0, np.where(kind > 0.95, np.inf, d)))


def test_the_population_is_covered_as_often_as_promised() -> None:
    rng, eps = np.random.default_rng(0), torch.linspace(0.0, 0.6, 9)
    everyone = draw(rng, 100_000)
    truth = {order: robust_accuracy(everyone, eps, order) for order in (1.0, 2.0, math.inf)}
    covered, points, runs = 0, 0, 150
    for _ in range(runs):
        d = draw(rng, 100)
        b = Bracket(Threat(order=1.0), d, d)
        inside, at_points = True, True
        for order, value in truth.items():
            lower, upper = b.population(eps, order)
            plain = b.curve(eps, order)
            assert (lower <= plain[0] + 1e-12).all()
            assert (upper >= plain[1] - 1e-12).all()
            inside &= bool(((lower <= value) & (value <= upper)).all())
            at_points &= bool((plain[0] - 1e-9 <= value).all() and (value <= plain[1] + 1e-9).all())
        covered += inside
        points += at_points
    assert covered >= 0.95 * runs
    assert points < 0.1 * runs, "the sample's own value is another one"


def test_the_interval_shrinks_with_the_sample_and_grows_with_the_confidence() -> None:
    rng = np.random.default_rng(1)
    widths = {}
    for n in (50, 500, 5000):
        d = draw(rng, n)
        b = Bracket(Threat("Linf", 0.05), d, d)
        for confidence in (0.5, 0.95, 0.999):
            lower, upper = b.population(confidence=confidence)
            widths[n, confidence] = float(upper - lower)
    assert widths[50, 0.95] > widths[500, 0.95] > widths[5000, 0.95] > 0
    assert widths[500, 0.5] < widths[500, 0.95] < widths[500, 0.999]
    # the share that is moved falls as the square root of the number
    assert widths[50, 0.95] / widths[5000, 0.95] == pytest.approx(10, rel=0.35)
    assert widths[5000, 0.95] > 2 * math.sqrt(math.log(40) / 10_000)


def test_a_sample_of_one_says_nothing() -> None:
    d = torch.tensor([0.4], dtype=torch.float64)
    lower, upper = Bracket(Threat("Linf", 0.1), d, d).population()
    assert (float(lower), float(upper)) == (0, 1)


@pytest.mark.parametrize("bad", [0, 1, -1, 2, math.nan, None])
def test_a_confidence_is_between_0_and_1(bad: object) -> None:
    with pytest.raises((ValueError, TypeError), match="confidence="):
        made().population(confidence=bad)


# -- files -----------------------------------------------------------------------------------------------------------


@each_order
def test_what_is_saved_is_loaded(order: float, tmp_path: Path) -> None:
    b = made(order=order)
    b = Bracket(b.threat, b.radius, b.distance, None, "GELU '2': no", (1.5, 2.5))
    b.save(tmp_path / "new" / "b.json", model="a model", provenance={"wda": wda.__version__})
    again = Bracket.load(tmp_path / "new" / "b.json")
    assert again.threat == b.threat
    assert torch.equal(again.radius, b.radius)
    assert torch.equal(again.distance, b.distance)
    assert (again.why, again.seconds, again.distances) == (b.why, b.seconds, None)
    assert (again.lower, again.upper) == (b.lower, b.upper)
    record = json.loads((tmp_path / "new" / "b.json").read_text(), parse_constant=pytest.fail)
    assert record["model"] == "a model"
    assert (record["n"], record["exact"]) == (40, int(b.exact.sum()))
    boxed = Bracket(Threat("Linf", 0.1, box=(0.0, 1.0)), b.radius, b.distance)
    boxed.save(tmp_path / "b.json")
    assert Bracket.load(tmp_path / "b.json").threat == boxed.threat


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: text.replace('"radius"', '"rad"'),
    lambda text: text.replace('"L2"', '"L3"'),
    lambda text: text.replace('"threat": {', '"threat": {"what": 1, '),
    lambda text: text.replace('"radius": [', '"radius": ["x", '),
    lambda text: text.replace('"radius": [', '"radius": [1.0, '),
    lambda text: text.replace('"radius": [', '"radius": [[1.0], '),
    lambda text: text.replace('"distance": [', '"distance": [NaN, '),
])  # fmt: skip
def test_a_damaged_file_is_refused(damage: object, tmp_path: Path) -> None:
    made().save(tmp_path / "b.json")
    text = (tmp_path / "b.json").read_text()
    assert damage(text) != text
    (tmp_path / "b.json").write_text(damage(text))
    with pytest.raises(ValueError, match=r"b\.json'? is no saved Bracket"):
        Bracket.load(tmp_path / "b.json")


def test_a_file_that_is_not_there_is_said_not_to_be() -> None:
    with pytest.raises(FileNotFoundError):
        Bracket.load("nowhere.json")


# -- models ----------------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("box", [(0.0, 1.0), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_affine_models_have_their_robust_accuracy_found(
    name: str, box: tuple[float, float] | None, dtype: torch.dtype
) -> None:
    model, x, y = affine(4, 2, dtype)
    y[3] = (y[3] + 1) % 4
    exact = nearest_boundary(model, x, y, name, box)
    exact[3] = 0
    model.to(dtype)
    threat = Threat(name, {"Linf": 0.1, "L2": 0.3, "L1": 0.5}[name], 1, box)
    b = bracket(model, x, y, threat, method="linear", tolerance=1e-4, **QUIET)
    assert b.why is None
    assert b.seconds[0] > 0
    assert b.radius[3] == b.distance[3] == 0
    assert (b.radius <= exact * (1 + 1e-12)).all()
    assert (b.distance >= exact * (1 - 1e-9)).all()
    for order in ORDERS:
        truth = float(robust_accuracy(exact, threat.eps, order))
        lower, upper = (float(side) for side in b.curve(threat.eps, order))
        assert lower - 1e-9 <= truth <= upper + 1e-9
        # a search ends a relative 1e-4 short, and a point is pushed until its margin exceeds rounding
        assert upper - lower <= (1e-3 if order < math.inf else 0.051)
    net = nets.from_module(model)
    points = b.distances.x_adv
    assert points.dtype == torch.float64
    assert (margin(net(points), y)[b.distance.isfinite()] >= 0).all()
    torch.testing.assert_close(norm(points - b.distances.x, name), b.distance.where(b.distance.isfinite(), 0.0))


@pytest.mark.parametrize("name", ["Linf", "L1"])
def test_small_networks_have_it_between_and_a_program_finds_it(name: str) -> None:
    model, x, y = small(0)
    exact, threat = exact_distances(model, x, y, name), Threat(name, 0.1)
    width = []
    for method in ("interval", "linear", "optimised", "milp"):
        b = bracket(model, x, y, threat, method=method, **QUIET)
        assert (b.radius <= exact + 1e-6).all()
        assert (b.distance >= exact - 1e-6).all()
        for order in ORDERS:
            for eps in (0.02, 0.1, 0.2):
                lower, upper = (float(side) for side in b.curve(eps, order))
                assert lower <= float(robust_accuracy((exact + 1e-6).where(exact > 0, 0), eps, order)) + 1e-9
                assert upper >= float(robust_accuracy((exact - 1e-6).clamp(min=0), eps, order)) - 1e-9
        width.append(b.upper - b.lower)
        # the lower side is below what the attack's own distribution leaves
        accuracy = b.distances.distribution(threat).accuracy(nets.from_module(model))
        assert b.lower <= accuracy <= b.upper + 1e-9
    assert width[0] + 1e-3 >= width[1]
    assert width[1] + 1e-3 >= width[2]
    assert width[2] + 1e-3 >= width[3]
    assert b.exact.all()
    assert width[3] < 1e-4


def test_the_threats_radius_is_tried_where_the_search_ended_just_below() -> None:
    model, x, y = affine(2, 0, torch.float64)
    exact = nearest_boundary(model, x, y, "Linf", None)
    eps = float(exact.sort().values[8] * (1 - 1e-9))
    b = bracket(model, x, y, Threat("Linf", eps, math.inf, None), method="linear", tolerance=0.1, **QUIET)
    assert b.lower == float((exact > eps).double().mean())
    assert b.lower == b.upper
    assert (b.radius <= exact).all()


def test_all_layers_of_the_attack_alone_where_there_is_no_certificate() -> None:
    x, y = wda.data.load("digits", n=6)
    model = wda.models.load("digits-vit")
    threat = Threat("Linf", 0.05, 2)
    b = bracket(model, x, y, threat, steps=10, **QUIET)
    found = wda.distances(model, x, y, "Linf", steps=10, **QUIET)
    assert b.why.startswith("LayerNorm '3.branch.0'")
    # an error of the model in single precision may be none in double, where it is sought anew
    torch.testing.assert_close(b.distance, found.distance, rtol=0.01, atol=0)
    assert b.upper == pytest.approx(float(found.robust_accuracy(0.05, 2)), rel=0.01)
    assert b.lower == 0
    assert float(b.curve(0.0)[0]) == float((found.distance > 0).double().mean())
    assert not b.exact[found.distance > 0].any()


class Wide(nn.Module):
    """Logits so large that single precision knows them to 64 only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.offset = nn.Linear(6, 3)
        self.offset.weight.data.zero_()
        self.offset.bias.data.fill_(1e9)

    def forward(self, x: Tensor) -> Tensor:
        return 4000 * self.layer(x) + self.offset(x)


def test_errors_of_single_precision_are_none_until_they_hold_in_double() -> None:
    torch.manual_seed(0)
    model, x = Wide(), torch.rand(12, 6)
    net = nets.from_module(model, (6,))
    y = net(x).argmax(1)
    single = wda.distances(model, x, y, **QUIET)
    held = margin(net(single.x_adv.double()), y) >= 0
    assert (single.distance.isfinite() & ~held).any(), "this is what the bracket has to see"
    b = bracket(model, x, y, Threat("Linf", 0.1), method="linear", **QUIET)
    reached = b.distance.isfinite()
    assert reached.any()
    assert (margin(net(b.distances.x_adv), y)[reached] >= 0).all()
    assert (b.radius <= b.distance).all()
    assert (b.distances.rival[reached] != y[reached]).all()


@pytest.mark.parametrize(("what", "options"), [
    ("method='crown'", {"method": "crown"}),
    ("tolerance=0", {"tolerance": 0}),
    ("batch_size=0", {"batch_size": 0}),
    ("stepps=3", {"stepps": 3}),
    ("seed=-1", {"seed": -1}),
])  # fmt: skip
def test_an_option_that_does_not_exist_or_fit_is_named(what: str, options: dict[str, object]) -> None:
    model, x, y = small(0)
    with pytest.raises((ValueError, TypeError), match=what):
        bracket(model, x, y, Threat(), **options)


def test_neither_batch_size_nor_training_mode_matters_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight *= 4
        model[0].bias -= model[0].weight.sum(1) / 2
    x = torch.rand(10, 4)
    y = model.eval()(x).argmax(1)
    reference = bracket(model, x, y, Threat("L2", 0.1), method="linear")
    model.train()
    again = bracket(model, x, y, Threat("L2", 0.1), method="linear", batch_size=3)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(again.radius, reference.radius, rtol=1e-3, atol=0)
    torch.testing.assert_close(again.distance, reference.distance, rtol=1e-4, atol=0)
    shown = capfd.readouterr()
    assert not shown.out
    assert not shown.err


# -- the margin risk -------------------------------------------------------------------------------------------------


def affine_risk(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> float:
    """The worst-case margin risk of an affine model of two classes, by duality in the price of transport."""
    layer = model[1].double()
    g = (layer.weight[1 - y] - layer.weight[y]).detach().view_as(x)
    clean = margin(model(x).detach(), y)
    assert threat.box is not None
    if math.isinf(threat.order):
        reach = torch.full((len(x),), threat.eps, dtype=torch.float64)
        return float((clean + support(g, x, reach, threat.norm, threat.box)).mean())
    far = float(norm(torch.ones_like(x[:1]), threat.norm))
    t = torch.linspace(0, 1, 1500, dtype=torch.float64) ** 2 * far
    curves = torch.stack(
        [clean + support(g, x, torch.full((len(x),), float(r)).double(), threat.norm, threat.box) for r in t], 1
    )

    def dual(price: float) -> float:
        return price * threat.eps**threat.order + float((curves - price * t**threat.order).amax(1).mean())

    low, high = 0.0, 1e3
    for _ in range(60):  # it is convex in the price
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if dual(left) < dual(right) else (left, high)
    return dual(low)


@each_norm
@each_order
def test_the_risk_of_affine_models_is_bracketed_and_closely_on_fine_grids(name: str, order: float) -> None:
    model, x, y = affine(2, 1, torch.float64)
    x, y = x[:8], y[:8]
    threat = Threat(name, {"Linf": 0.05, "L2": 0.15, "L1": 0.3}[name], order)
    exact = affine_risk(model, x, y, threat)
    widths = []
    for count in (4, 30):
        b = risk_bracket(model, x, y, threat, count=count, steps=5, method="linear", **QUIET)
        assert b.clean == pytest.approx(float(margin(model(x), y).detach().mean()))
        assert b.radii[0] == 0
        assert b.attacked.shape == b.certified.shape == (8, len(b.radii))
        assert (b.attacked <= b.certified + 1e-12).all()
        # the yardstick's grid is off by a millionth
        assert b.clean <= b.lower <= exact + 1e-5
        assert b.upper >= exact - 1e-5
        widths.append(b.upper - b.lower)
    gain = exact - b.clean
    assert gain > 0
    assert b.lower >= exact - 0.05 * gain
    # what is certified at a radius counts at the last one's cost: a factor, and at the first, eps / 16, nothing at all
    step = 1 / 16 + float(b.radii[2] / b.radii[1]) - 1
    assert b.upper <= exact + (1.1 * step * gain if order < math.inf else 1e-6)
    assert widths[1] <= widths[0] + 1e-9


@each_norm
def test_risks_of_networks_and_of_other_balls(name: str) -> None:
    model, x, y = small(1)
    y[0] = (y[0] + 1) % 3
    b = risk_bracket(model, x, y, Threat(name, 0.05, 2), count=8, steps=10, **QUIET)
    assert b.clean <= b.lower <= b.upper
    eps = [0.0, 0.01, 0.05, 0.2]
    for order in ORDERS:
        lower, upper = b.curve(eps, order)
        assert (lower.diff() >= -1e-12).all()
        assert (upper.diff() >= -1e-12).all()
        assert (lower <= upper).all()
        assert float(lower[0]) == pytest.approx(b.clean, abs=1e-12)
        # adversaries of other orders have less
        assert (lower <= b.curve(eps, 1)[0] + 1e-9).all()
    lower, upper = b.curve("1/20")
    assert lower.shape == upper.shape == ()
    assert (float(lower), float(upper)) == pytest.approx((b.lower, b.upper))
    assert b.curve([[0.1, 2.0]])[0].shape == (1, 2)
    # an attack of another kind stays below
    for order in (2.0, math.inf):
        adv = wda.attack("wda", model, x, y, Threat(name, 0.05, order), kappa=1, **QUIET)
        assert adv.risk(model, "margin") <= float(b.curve([0.05], order)[1]) + 1e-9


def test_no_budget_is_no_harm() -> None:
    model, x, y = small(1)
    b = risk_bracket(model, x, y, Threat("Linf", 0.0), count=3, steps=3, method="linear", **QUIET)
    assert b.lower == pytest.approx(b.clean, abs=1e-12)
    assert b.upper == pytest.approx(b.clean, abs=1e-12)


def test_risks_need_a_box_a_grid_and_layers_that_can_be_bounded() -> None:
    model, x, y = small(1)
    with pytest.raises(ValueError, match=r"box=None: a box \(low, high\) is accepted"):
        risk_bracket(model, x, y, Threat("Linf", 0.1, box=None))
    with pytest.raises(ValueError, match="count=1"):
        risk_bracket(model, x, y, Threat("Linf", 0.1), count=1)
    with pytest.raises(ValueError, match="method='milp'"):
        risk_bracket(model, x, y, Threat("Linf", 0.1), count=2, steps=2, method="milp", **QUIET)
    images, labels = wda.data.load("digits", n=2)
    with pytest.raises(wda.errors.NotPiecewiseAffine, match="LayerNorm"):
        risk_bracket(wda.models.load("digits-vit"), images, labels, Threat(), count=2, steps=2, **QUIET)


def test_programs_need_relu_and_a_polyhedral_norm() -> None:
    x, y = wda.data.load("digits", n=2)
    model = wda.models.load("digits-gelu")
    b = wda.bracket(model, x, y, Threat("Linf", 0.02), method="milp", steps=5)
    assert b.upper > 0
    assert b.why is not None
    assert "mixed-integer program" in b.why
    with pytest.raises(ValueError, match="norm='L2': one of 'Linf', 'L1'"):
        wda.bracket(model, x, y, Threat("L2", 0.02), method="milp")


def test_programs_that_run_out_of_time_leave_what_linear_bounds_certify() -> None:
    x, y = wda.data.load("digits", n=1)
    model, threat = wda.models.load("digits-cnn-adv"), Threat("Linf", 0.05)
    late = wda.bracket(model, x, y, threat, method="milp", time_limit=0, steps=10)
    linear = wda.bracket(model, x, y, threat, steps=10)
    assert not late.exact.any()
    assert (late.radius >= linear.radius).all()
    by_hand = wda.certificates.radius(model, x, y, "Linf", method="milp", time_limit=0, upper=late.distance)
    assert (by_hand >= linear.radius).all()


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


class KeptMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(1, True), x[:, :1]], 1)


AFFINE = nn.Linear(4, 2)
UNREAD = [
    (lambda x: AFFINE(x), "only the layers of a torch.nn.Module"),
    (AFFINE.forward, "only the layers of a torch.nn.Module"),
    (torch.jit.trace(nn.Sequential(AFFINE), torch.zeros(1, 4)), "ScriptModule"),
    (quantised(), "Linear '0'"),
    (nn.Sequential(AFFINE, nn.Softmax(1)), "Softmax '1'"),
    (nn.Sequential(AFFINE, nn.LeakyReLU()), "LeakyReLU '1': this is not read"),
]


@pytest.mark.filterwarnings("ignore::wda.errors.Untrustworthy")
@pytest.mark.parametrize(("model", "why"), UNREAD, ids=range(len(UNREAD)))
def test_what_cannot_be_read_has_the_side_of_the_attack(model: Callable[[Tensor], Tensor], why: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    b = bracket(model, x, model(x).argmax(1), Threat("Linf", 0.1), steps=5, **QUIET)
    assert b.why is not None
    assert why in b.why
    assert (b.radius < 1e-300).all()


def test_means_that_keep_their_axis_are_read() -> None:
    x = torch.rand(3, 4)
    b = bracket(KeptMean(), x, KeptMean()(x).argmax(1), Threat("Linf", 0.1), steps=5, **QUIET)
    assert b.why is None
    assert (b.radius <= b.distance).all()


def test_what_is_wrong_with_a_model_is_said_before_the_search() -> None:
    class Counting(nn.Linear):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.passes += 1
            return super().forward(x)

    model = Counting(4, 2)
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight has NaN"):
        bracket(model, torch.rand(2, 4), torch.tensor([0, 1]), Threat("Linf", 0.1), **QUIET)
    assert Counting.passes == 0
