"""The exact worst-case risk: vertices against linear and cone programs, closed forms, and brute force."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from wda import Threat, cells, losses
from wda.certificates import (
    initial_slope,
    lipschitz,
    recession_slope,
    worst_case_bracket,
    worst_case_curve,
    worst_case_distribution,
    worst_case_risk,
)
from wda.certificates.curve import Curve, Tail, envelopes
from wda.certificates.perspective import Program, margin_pieces, program
from wda.certificates.vertices import polygon, rays, vertices
from wda.errors import NotPiecewiseAffine
from wda.nets import from_module
from wda.norms import dual, exponent

BOX = (-2.0, 2.0)
POLYHEDRAL = ["L1", "Linf"]
NORMS = ["L1", "L2", "Linf"]
LOSSES = ["margin", "ce"]


def random_net(seed: int, n: int, widths: Sequence[int], classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(n, width), nn.ReLU()]
        n = width
    net = nn.Sequential(*layers, nn.Linear(n, classes)).double()
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.normal_(layer.bias)
    return net.requires_grad_(False)


def random_sample(seed: int, n: int, classes: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(count, n, generator=generator, dtype=torch.float64) - 2
    return x, torch.randint(classes, (count,), generator=generator)


def one_hidden(w1: object, b1: object, w2: object) -> nn.Sequential:
    """W2 relu(W1 x + b1), in float64."""
    first, bias, last = (torch.tensor(v, dtype=torch.float64) for v in (w1, b1, w2))
    net = nn.Sequential(nn.Linear(*first.T.shape), nn.ReLU(), nn.Linear(*last.T.shape)).double().requires_grad_(False)
    net[0].weight.copy_(first), net[0].bias.copy_(bias), net[2].weight.copy_(last), net[2].bias.zero_()
    return net


def point(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def perspective(net: nn.Module, x: Tensor, y: Tensor, box: tuple[float, float] | None) -> Program:
    found = cells.enumerate(net, box)
    return program(found, x.numpy(), [margin_pieces(k, found.dense.classes) for k in y.tolist()])


def margins(net: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    return losses.margin(net(x), y).numpy()


NETS = [(1, (5,), 2), (2, (8,), 2), (2, (6,), 3), (2, (4, 4), 2), (2, (4, 3), 3), (3, (5,), 3)]


# -- V at L1 and Linf: two exact methods that share nothing ----------------------------------------------------------


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("norm", POLYHEDRAL)
@pytest.mark.parametrize(("n", "widths", "classes"), NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_vertices_agree_with_the_linear_program(
    seed: int, n: int, widths: tuple[int, ...], classes: int, norm: str, box: tuple[float, float] | None
) -> None:
    net, (x, y) = random_net(seed, n, widths, classes), random_sample(seed, n, classes)
    curve, exact = worst_case_curve(net, x, y, norm, "margin", box), perspective(net, x, y, box)
    for eps in (0.0, 0.05, 0.4, 3.0, 20.0):
        assert curve(eps) == pytest.approx(exact.risk(norm, eps)[0], rel=1e-8, abs=1e-8)
    assert curve.initial == pytest.approx(exact.slope(norm, margins(net, x, y))[0], rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", POLYHEDRAL)
@pytest.mark.parametrize(("n", "widths", "classes"), NETS)
def test_no_point_lies_above_the_majorant(n: int, widths: tuple[int, ...], classes: int, norm: str, loss: str) -> None:
    """For one sample V is the least concave majorant of the largest loss within a distance, so of any loss there."""
    net, (x, y) = random_net(7, n, widths, classes), random_sample(7, n, classes, count=1)
    curve = worst_case_curve(net, x, y, norm, loss)
    generator = torch.Generator().manual_seed(0)
    away = torch.randn(20_000, n, generator=generator, dtype=torch.float64)
    away *= 10 ** (6 * torch.rand(len(away), 1, generator=generator, dtype=torch.float64) - 3)
    values = losses.get(loss)(net(x + away), y.expand(len(away))).numpy()
    distance = np.linalg.norm(away.numpy(), exponent(norm), axis=1)
    majorant = curve(distance)
    assert (values <= majorant + 1e-9 * (1 + np.abs(majorant))).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", POLYHEDRAL)
@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_curve_is_concave_and_increasing_between_its_slopes(
    classes: int, box: tuple[float, float] | None, norm: str, loss: str
) -> None:
    net, (x, y) = random_net(3, 2, (5, 4), classes), random_sample(3, 2, classes)
    curve = worst_case_curve(net, x, y, norm, loss, box)
    start = float(losses.get(loss)(net(x), y).mean())
    assert curve(0.0) == pytest.approx(start, abs=1e-12)
    slopes = np.append(np.diff(curve.values) / np.diff(curve.knots), curve.tail)
    assert (slopes >= 0).all()
    assert (np.diff(slopes) <= 1e-9).all()
    assert curve.initial == slopes[0]
    assert curve.tail == (0 if box else pytest.approx(recession_slope(net, norm, y.tolist(), "cones").value, rel=1e-9))
    eps = np.linspace(0, 50, 101)
    assert (start + curve.tail * eps <= curve(eps) + 1e-9).all()
    assert (curve(eps) <= start + curve.initial * eps + 1e-9).all()
    assert isinstance(curve(0.5), float)
    assert curve(eps)[1] == curve(0.5)


@pytest.mark.parametrize("norm", POLYHEDRAL)
def test_the_linear_start_is_as_long_as_the_way_to_the_best_point(norm: str) -> None:
    """V = E + Lambda eps up to the distance to the point that attains Lambda, over N."""
    net, (x, y) = random_net(1, 2, (8,), 2), random_sample(1, 2, 2)
    curve = worst_case_curve(net, x, y, norm, box=BOX)
    slope = initial_slope(net, x, y, norm, box=BOX)
    step = curve.points[0] - x[curve.source[0]].numpy()
    distance = np.linalg.norm(step, exponent(norm))
    assert curve.knots[1] == pytest.approx(distance / len(x), rel=1e-12)
    assert slope.direction == pytest.approx(step / distance)
    assert slope.label == y[curve.source[0]]
    gain = losses.margin(net(torch.from_numpy(curve.points[:1])), y[curve.source[:1]]) - losses.margin(net(x), y)
    assert slope.value == pytest.approx(float(gain[curve.source[0]]) / distance, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_a_transport_program_on_a_grid_stays_below_and_comes_near(norm: str) -> None:
    net, (x, y) = random_net(2, 2, (6,), 3), random_sample(2, 2, 3, count=3)
    side = torch.linspace(*BOX, 81, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    eps = 0.7
    value = torch.stack([losses.margin(net(grid), k.expand(len(grid))) for k in y])
    value = torch.cat([value, losses.margin(net(x), y)[:, None]], 1).numpy()
    distance = torch.cdist(x, grid, p=exponent(norm))
    distance = torch.cat([distance, torch.zeros(3, 1, dtype=torch.float64)], 1).numpy()
    solved = linprog(
        -value.ravel(),
        A_ub=distance.reshape(1, -1),
        b_ub=[eps],
        A_eq=np.kron(np.eye(3), np.ones((1, value.shape[1]))),
        b_eq=[1 / 3] * 3,
    )
    exact = worst_case_risk(net, x, y, Threat(norm, eps, box=BOX))
    # an optimal point is near one of the grid: both the cost and the loss change little
    near = float(torch.linalg.vector_norm(torch.tensor([0.025, 0.025]), exponent(norm)))
    assert -solved.fun <= exact + 1e-7
    assert exact + solved.fun <= 2 * near * lipschitz(net, norm, kind="margin").value


# -- closed forms ----------------------------------------------------------------------------------------------------

# min(|x|, |x|/2 + 1/2), the loss of the Remark in section 3, as the margin of label 0
REMARK = one_hidden([[1], [-1], [1], [-1]], [0, 0, -1, -1], [[0, 0, 0, 0], [1, 1, -0.5, -0.5]])
NET_A = one_hidden([[1]], [0], [[-1], [1]])
NET_B = one_hidden([[1, 0.5]], [0], [[-1], [1], [0.3]])
EPS = np.array([0.0, 0.3, 1.0, 2.5, 40.0])


@pytest.mark.parametrize("norm", NORMS)
def test_the_remark(norm: str) -> None:
    label = torch.tensor([0])
    assert worst_case_curve(REMARK, point(2), label, norm)(EPS) == pytest.approx(1.5 + EPS / 2)
    assert worst_case_curve(REMARK, point(0), label, norm)(EPS) == pytest.approx(np.minimum(EPS, (1 + EPS) / 2))
    assert initial_slope(REMARK, point(2), label, norm).value == pytest.approx(0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_nets_of_the_audit(loss: str) -> None:
    label = torch.tensor([0])
    start = {"margin": 0.0, "ce": math.log(2)}[loss]
    for norm in NORMS:
        assert worst_case_curve(NET_A, point(0), label, norm, loss)(EPS) == pytest.approx(start + 2 * EPS)
    start = {"margin": 0.0, "ce": math.log(3)}[loss]
    for norm, steep in (("L1", 2), ("Linf", 3)):
        assert worst_case_curve(NET_B, point(0, 0), label, norm, loss)(EPS) == pytest.approx(start + steep * EPS)
    threat = Threat("L2", 2.0, box=None)
    lower, upper = worst_case_bracket(NET_B, point(0, 0), label, threat, loss)
    assert start + 2 * math.sqrt(5) == pytest.approx(upper, rel=4e-4)
    assert lower - 1e-9 <= start + 2 * math.sqrt(5) <= upper + 1e-9


def test_a_rival_that_is_nowhere_the_best_counts_for_the_cross_entropy() -> None:
    """theta = (0, relu x, -10 relu x), x0 = ln(10)/11: the cross-entropy is steepest towards 0."""
    net = one_hidden([[1]], [0], [[0], [1], [-10]])
    start = math.log(10) / 11

    def ce(x: np.ndarray) -> np.ndarray:
        return np.log(1 + np.exp(np.maximum(x, 0)) + np.exp(-10 * np.maximum(x, 0)))

    # only x = 0 and infinity are vertices: V is the larger of the two chords from x0
    left = (math.log(3) - float(ce(np.array(start)))) / start
    curve = worst_case_curve(net, point(start), torch.tensor([0]), "L1", "ce")
    assert curve.initial == pytest.approx(left, rel=1e-12)
    assert curve.initial == pytest.approx(1.1541, abs=5e-5)
    assert curve(0.1) == pytest.approx(0.97244, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", [(4,), (3, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_monotone_networks_are_worst_along_one_line(seed: int, widths: tuple[int, ...], norm: str, loss: str) -> None:
    """K = 2, no negative weight before the head, rival minus label increasing: V = E + ||W_1' ... W_H' c||_s eps.

    For the margin; the cross-entropy has the same slope at infinity.
    """
    net, (x, _) = random_net(seed, 2, widths, 2), random_sample(seed, 2, 2)
    for layer in net[:-1:2]:
        layer.weight.abs_()
    net[-1].weight[1] = net[-1].weight[0] + torch.rand(widths[-1], dtype=torch.float64)
    y = torch.zeros(len(x), dtype=torch.int64)
    c = net[-1].weight[1] - net[-1].weight[0]
    for layer in net[-3::-2]:
        c = layer.weight.T @ c
    steep = float(torch.linalg.vector_norm(c, exponent(dual(norm))))
    if loss == "ce":
        if norm != "L2":
            assert worst_case_curve(net, x, y, norm, loss).tail == pytest.approx(steep, rel=1e-9)
        return
    for eps in (0.2, 5.0):
        value = worst_case_risk(net, x, y, Threat(norm, eps, box=None))
        assert value == pytest.approx(margins(net, x, y).mean() + steep * eps, rel=1e-8)
    assert initial_slope(net, x, y, norm).value == pytest.approx(steep, rel=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_labels_that_are_absent_do_not_count(norm: str) -> None:
    """theta = (relu x, 0) with label 0 alone: no distribution does worse than the sample, whatever the budget."""
    net, x, y = one_hidden([[1]], [0], [[1], [0]]), point(0), torch.tensor([0])
    assert worst_case_curve(net, x, y, norm)(EPS) == pytest.approx(0 * EPS)
    slope = initial_slope(net, x, y, norm)
    assert (slope.value, slope.direction, slope.label) == (0, None, None)
    assert worst_case_curve(net, x, y + 1, norm)(EPS) == pytest.approx(EPS)
    adv = worst_case_distribution(net, x, y, Threat(norm, 3.0, box=None))
    assert len(adv.moved) == 0


def test_a_box_ends_the_growth() -> None:
    """theta = (0, relu x) on [0, 1] from 0.5: V = 0.5 + min(eps, 0.5), so no line of positive slope stays below V."""
    net, x, y = one_hidden([[1]], [0], [[0], [1]]), point(0.5), torch.tensor([0])
    curve = worst_case_curve(net, x, y, "Linf", box=(0, 1))
    assert curve(EPS) == pytest.approx(0.5 + np.minimum(EPS, 0.5))
    assert curve.tail == 0


@pytest.mark.parametrize("norm", NORMS)
def test_in_a_box_the_risk_ends_at_the_mean_of_the_largest_losses(norm: str) -> None:
    net, (x, y) = random_net(4, 2, (4, 4), 3), random_sample(4, 2, 3)
    found = cells.enumerate(net, BOX)
    J, c = found.affine()
    largest = []
    for k in y.tolist():
        best = -math.inf
        for m in range(len(found)):
            A, b = found.constraints(m)
            for j in {0, 1, 2} - {k}:
                g = J[m, j] - J[m, k]
                best = max(best, -linprog(-g, A, b, bounds=(None, None)).fun + c[m, j] - c[m, k])
        largest.append(best)
    end = np.mean(largest)
    start, widest = margins(net, x, y).mean(), 4.0 if norm == "Linf" else 8.0
    assert worst_case_risk(net, x, y, Threat(norm, widest, box=BOX)) == pytest.approx(end, rel=1e-8)
    # so V lies above the chord to where it ends, and below the line of its first slope
    for eps in (0.1, 1.0):
        value = worst_case_risk(net, x, y, Threat(norm, eps, box=BOX))
        assert start + eps / widest * (end - start) - 1e-7 <= value
        assert value <= min(end, start + eps * initial_slope(net, x, y, norm, box=BOX).value) + 1e-7


# -- degenerate networks ---------------------------------------------------------------------------------------------


def degenerate(kind: str) -> nn.Sequential:
    net = random_net(5, 2, (5,), 2)
    first, last = net[0], net[2]
    if kind == "duplicates":
        first.weight[1], first.bias[1] = 2 * first.weight[0], 2 * first.bias[0]
        first.weight[2], first.bias[2] = -first.weight[0], -first.bias[0]
    elif kind == "parallel":
        first.weight[:] = first.weight[0]
    elif kind == "zero rows":
        first.weight[1:4] = 0
    elif kind == "zero":
        first.weight.zero_()
    elif kind == "one point":  # all hyperplanes, and later the sample, meet in one point
        first.bias.zero_()
    elif kind == "no bias, flat head":
        first.bias.zero_(), last.weight.zero_()
    return net


@pytest.mark.parametrize("angle", [1e-6, 1e-7, 1e-10])
@pytest.mark.parametrize("n", [3, 4])
def test_nearly_parallel_hyperplanes_meet(n: int, angle: float) -> None:
    """The determinant of their normals is the (n - 1)-th power of the angle."""
    normals, meet = np.eye(n) * np.append(1.0, np.full(n - 1, angle)), np.array([0.0, 0.75, 0.5, 0.25])[:n]
    normals[:, 0] = 1.0
    net = one_hidden(normals.tolist(), (-normals @ meet).tolist(), np.ones((2, n)).tolist())
    points = np.concatenate(list(vertices(from_module(net), np.zeros((1, n)), np.eye(n))), axis=1)
    assert np.abs(points - meet).max(2).min() < 1e-15 / angle


@pytest.mark.parametrize("norm", POLYHEDRAL)
@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("kind", ["duplicates", "parallel", "zero rows", "zero", "one point", "no bias, flat head"])
def test_degenerate_networks(kind: str, box: tuple[float, float] | None, norm: str) -> None:
    net = degenerate(kind)
    x, y = torch.cat([torch.zeros(1, 2), torch.tensor([[0.5, 2.0]])]).double(), torch.tensor([0, 1])
    curve, exact = worst_case_curve(net, x, y, norm, "margin", box), perspective(net, x, y, box)
    for eps in (0.0, 0.4, 4.0):
        assert curve(eps) == pytest.approx(exact.risk(norm, eps)[0], rel=1e-8, abs=1e-8)
        adv = worst_case_distribution(net, x, y, Threat(norm, eps, box=box))
        assert adv.audit() <= eps
        assert adv.risk(net, "margin") == pytest.approx(curve(eps), rel=1e-6, abs=1e-6)
    assert curve.initial == pytest.approx(exact.slope(norm, margins(net, x, y))[0], abs=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_without_hidden_layers_and_on_a_line(norm: str) -> None:
    head = nn.Linear(3, 2).double().requires_grad_(False)
    x, y = random_sample(0, 3, 2)
    steep = float(torch.linalg.vector_norm(head.weight[1] - head.weight[0], exponent(dual(norm))))
    value = worst_case_risk(head, x, y, Threat(norm, 0.5, box=None))
    assert value == pytest.approx(margins(head, x, y).mean() + 0.5 * steep, rel=1e-8)
    net, (x, y) = random_net(0, 1, (6,), 3), random_sample(0, 1, 3)
    for loss in LOSSES:  # on the line all norms agree, and the cross-entropy is exact for "L2" too
        threat = Threat(norm, 0.5, box=None)
        assert worst_case_risk(net, x, y, threat, loss) == worst_case_curve(net, x, y, "L1", loss)(0.5)


# -- L2 --------------------------------------------------------------------------------------------------------------


def polygon_curve(net: nn.Module, x: Tensor, y: Tensor, half: int, box: tuple[float, float] | None) -> Curve:
    """V for the polygon in place of the disc, with the package's own pieces but another norm."""
    view, around = from_module(net), polygon(half)
    ends = None
    if box is None:
        directions = rays(view.recession(), around.kinks)
        directions /= around.size(directions)[:, None]
        gain = torch.stack(
            [losses.margin(view.recession()(torch.from_numpy(directions)), k.expand(len(directions))) for k in y]
        ).numpy()
        source, best = np.unravel_index(gain.argmax(), gain.shape)
        ends = Tail(gain[source, best], int(source), directions[best]) if gain[source, best] > 0 else None

    def margin(points: np.ndarray) -> np.ndarray:
        return torch.stack(
            [losses.margin(net(torch.from_numpy(p)), k.expand(len(p))) for p, k in zip(points, y, strict=True)]
        ).numpy()

    return envelopes(x.numpy(), vertices(view, x.numpy(), around.kinks, box), margin, around.size, ends)


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize(("widths", "classes"), [((8,), 2), ((5,), 3), ((3, 3), 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cone_program_lies_inside_the_polygon_bracket(
    seed: int, widths: tuple[int, ...], classes: int, box: tuple[float, float] | None
) -> None:
    net, (x, y) = random_net(seed, 2, widths, classes), random_sample(seed, 2, classes)
    half = 16
    curve, shrink = polygon_curve(net, x, y, half, box), math.cos(math.pi / (2 * half))
    for eps in (0.1, 1.0, 5.0):
        value = worst_case_risk(net, x, y, Threat("L2", eps, box=box))
        assert curve(shrink * eps) - 1e-7 <= value <= curve(eps) + 1e-7
    slope = initial_slope(net, x, y, "L2", box=box).value
    assert shrink * curve.initial - 1e-7 <= slope <= curve.initial + 1e-7


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize(("seed", "n", "widths", "classes"), [(0, 2, (8,), 2), (1, 2, (4, 3), 3)])
def test_the_cone_program_knows_no_units(
    seed: int, n: int, widths: tuple[int, ...], classes: int, box: tuple[float, float] | None
) -> None:
    """Inputs and eps times s, W_1 divided by s, the last layer times c: V times c, and its slope times c / s."""
    net, (x, y) = random_net(seed, n, widths, classes), random_sample(seed, n, classes)
    value = worst_case_risk(net, x, y, Threat("L2", 0.5, box=box))
    steep = initial_slope(net, x, y, "L2", box=box).value
    for s, c in [(8192, 1), (2.0**20, 1), (2.0**-20, 1), (1e-9, 1e6), (1, 1e-6), (1, 1e10)]:
        other, sides = random_net(seed, n, widths, classes), None if box is None else (s * box[0], s * box[1])
        other[0].weight /= s
        other[-1].weight *= c
        other[-1].bias *= c
        threat = Threat("L2", 0.5 * s, box=sides)
        assert worst_case_risk(other, s * x, y, threat) == pytest.approx(c * value, rel=1e-8, abs=1e-8 * c)
        assert initial_slope(other, s * x, y, "L2", box=sides).value == pytest.approx(c / s * steep, rel=1e-8)
        bracket = worst_case_bracket(other, s * x, y, threat, "margin")
        assert bracket == pytest.approx((c * value, c * value), rel=1e-8, abs=1e-8 * c)


@pytest.mark.parametrize("eps", [1e10, 1e300])
def test_the_cone_program_with_a_budget_beyond_the_sample(eps: float) -> None:
    """V / eps tends to the recession slope; in a box V is the mean of the largest losses in it."""
    net, (x, y) = random_net(0, 2, (8,), 2), random_sample(0, 2, 2)
    slope = recession_slope(net, "L2", y.tolist(), method="cones").value
    assert worst_case_risk(net, x, y, Threat("L2", eps, box=None)) == pytest.approx(slope * eps, rel=1e-8)
    largest = worst_case_risk(net, x, y, Threat("L2", 6.0, box=BOX))
    assert worst_case_risk(net, x, y, Threat("L2", eps, box=BOX)) == pytest.approx(largest, rel=1e-8)


def test_a_cone_program_that_is_not_solved_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    net, (x, y) = random_net(0, 2, (4,), 2), random_sample(0, 2, 2)
    monkeypatch.setattr(cvxpy.Problem, "status", "optimal_inaccurate")
    with pytest.raises(RuntimeError, match="optimal_inaccurate"):
        worst_case_risk(net, x, y, Threat("L2", 0.1, box=None))


def test_the_polygon_is_a_norm_below_the_euclidean_one() -> None:
    v = np.random.default_rng(0).normal(size=(1000, 2))
    for half in (2, 3, 16):
        size, length = polygon(half).size(v), np.linalg.norm(v, axis=1)
        assert (size <= length * (1 + 1e-12)).all()
        assert (size >= length * math.cos(math.pi / (2 * half)) * (1 - 1e-12)).all()
        # it bends on its kinks: half the sum of the values on both sides exceeds the value there
        for normal in polygon(half).kinks:
            along = np.array([-normal[1], normal[0]])
            at = [polygon(half).size(along + step * normal) for step in (-1e-3, 0, 1e-3)]
            assert at[0] + at[2] - 2 * at[1] > 1e-4


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("classes", [2, 3])
def test_brackets_of_the_cross_entropy_agree(classes: int, box: tuple[float, float] | None) -> None:
    """A third input that changes nothing leads from the polygon to the cone program; both brackets hold V."""
    plane, (x, y) = random_net(6, 2, (4,), classes), random_sample(6, 2, classes)
    space = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), plane[2]).double().requires_grad_(False)
    space[0].weight[:, :2], space[0].weight[:, 2], space[0].bias[:] = plane[0].weight, 0, plane[0].bias
    for eps in (0.0, 0.5, 4.0):
        threat = Threat("L2", eps, box=box)
        low, high = worst_case_bracket(plane, x, y, threat)
        low3, high3 = worst_case_bracket(space, torch.cat([x, torch.zeros(len(x), 1)], 1), y, threat)
        assert low - 1e-9 <= high <= low + 1e-3 * max(1, high)
        assert low3 - 1e-9 <= high3 <= low3 + (0.006 if classes == 2 else math.log(3) + 1e-6)
        assert low3 <= high + 1e-7
        assert low <= high3 + 1e-7
        # V lies between its values for the two polyhedral norms that enclose the 2-norm
        assert worst_case_curve(plane, x, y, "L1", "ce", box)(eps) <= high + 1e-9
        assert low <= worst_case_curve(plane, x, y, "Linf", "ce", box)(eps) + 1e-9


def test_brackets_are_exact_where_the_value_is() -> None:
    net, (x, y) = random_net(0, 2, (5,), 3), random_sample(0, 2, 3)
    for norm, loss in [("L1", "ce"), ("Linf", "ce"), ("L1", "margin"), ("L2", "margin")]:
        threat = Threat(norm, 0.4, box=None)
        value = worst_case_risk(net, x, y, threat, loss)
        assert worst_case_bracket(net, x, y, threat, loss) == (value, value)


# -- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize(
    ("norm", "loss"), [("L1", "margin"), ("L2", "margin"), ("Linf", "margin"), ("L1", "ce"), ("Linf", "ce")]
)
@pytest.mark.parametrize(("n", "widths", "classes"), [(1, (5,), 2), (2, (6,), 3), (2, (4, 3), 2), (3, (5,), 2)])
def test_the_worst_case_distribution_has_the_worst_case_risk(
    n: int, widths: tuple[int, ...], classes: int, norm: str, loss: str, box: tuple[float, float] | None
) -> None:
    net, (x, y) = random_net(n, n, widths, classes), random_sample(n, n, classes)
    for eps in (0.0, 1e-6, 0.3, 1.0, 3.0):
        threat = Threat(norm, eps, box=box)
        value, adv = worst_case_risk(net, x, y, threat, loss), worst_case_distribution(net, x, y, threat, loss)
        assert adv.audit(threat) <= eps
        assert len(adv.mass) <= len(x) + 1
        assert value - 1e-6 * max(1, abs(value)) <= adv.risk(net, loss) <= value + 1e-8 * max(1, abs(value))


def test_one_sample_may_need_two_places_neither_of_which_it_is() -> None:
    """The majorant of min(x, (x + 1)/2) on [0, 3] from 0 has corners at 1 and 3; at eps = 2 both have half the mass."""
    net = one_hidden([[1], [1]], [0, -1], [[0, 0], [1, -0.5]])
    adv = worst_case_distribution(net, point(0), torch.tensor([0]), Threat("L1", 2.0, box=(0, 3)))
    assert adv.points[:, 0].tolist() == [1.0, 3.0]
    assert adv.mass.tolist() == pytest.approx([0.5, 0.5])
    assert adv.audit() <= 2.0
    assert adv.risk(net, "margin") == pytest.approx(1.5)


def test_mass_escapes_far_enough_for_the_slack() -> None:
    """V = eps for the loss relu(x - 1) from 0, and no distribution has it: a mass m at eps/m has eps - m."""
    net = one_hidden([[1]], [-1], [[0], [1]])
    threat, previous = Threat("L2", 1.0, box=None), 0.0
    for slack in (1e-2, 1e-4, 1e-6):
        adv = worst_case_distribution(net, point(0), torch.tensor([0]), threat, slack=slack)
        assert adv.audit() <= 1
        assert 1 - slack <= adv.risk(net, "margin") < 1
        assert len(adv.mass) == 2
        assert adv.distances().item() > previous
        previous = adv.distances().item()


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", POLYHEDRAL)
def test_the_curve_and_its_distributions_know_no_units(norm: str, loss: str, box: tuple[float, float] | None) -> None:
    """Inputs and eps times s, W_1 divided by s: the same V; for the margin, the last layer times c: V times c."""
    x, y = random_sample(2, 2, 3)
    curve = worst_case_curve(random_net(2, 2, (5,), 3), x, y, norm, loss, box)
    for s, c in [(1, 1), (1e-9, 1), (1e-30, 1), (1e9, 1), *([(1, 1e-6), (1, 1e8)] if loss == "margin" else [])]:
        net, sides = random_net(2, 2, (5,), 3), None if box is None else (s * box[0], s * box[1])
        net[0].weight /= s
        net[-1].weight *= c
        net[-1].bias *= c
        other = worst_case_curve(net, s * x, y, norm, loss, sides)
        assert other.initial == pytest.approx(c / s * curve.initial, rel=1e-9)
        start = curve(0.0)
        for eps in (0.0, 1e-3, 0.3, 3.9):
            value, threat = curve(eps), Threat(norm, s * eps, box=sides)
            assert other(s * eps) == pytest.approx(c * value, rel=1e-12, abs=1e-12 * c)
            risk = worst_case_distribution(net, s * x, y, threat, loss).risk(net, loss)
            rounding = 1e-12 * max(1, abs(value))
            assert -1e-6 * (value - start) - rounding <= risk / c - value <= rounding


@pytest.mark.parametrize("s", [1.0, 1e-9])
def test_a_sample_at_the_origin_has_the_units_of_the_cells(s: float) -> None:
    """The margin is relu(x / s) - 2 relu(x / s - 1), from 0: the majorant goes to 1 at s."""
    net = one_hidden([[1 / s], [1 / s]], [0, -1], [[0, 0], [1, -2]])
    curve = worst_case_curve(net, point(0), torch.tensor([0]), "L1")
    assert curve([0.25 * s, s, 3 * s]).tolist() == pytest.approx([0.25, 1, 1])
    assert curve.initial == pytest.approx(1 / s)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1e100, 1e200, 1e300])
def test_mass_that_goes_as_far_as_numbers_reach(eps: float, norm: str) -> None:
    net, (x, y) = random_net(0, 2, (5,), 2), random_sample(0, 2, 2)
    threat = Threat(norm, eps, box=None)
    if norm == "L2" and eps > 1e150:  # whose square is no float64
        with pytest.raises(ValueError, match="float64"):
            worst_case_distribution(net, x, y, threat)
        return
    adv = worst_case_distribution(net, x, y, threat)
    assert adv.audit() <= eps
    assert adv.risk(net, "margin") == pytest.approx(worst_case_risk(net, x, y, threat), rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_slope_of_nothing_has_no_direction_and_no_label(norm: str) -> None:
    net, (x, y) = random_net(0, 2, (5,), 2), random_sample(0, 2, 2)
    net[-1].weight.zero_()
    slope = initial_slope(net, x, y, norm)
    assert (slope.lower, slope.upper, slope.direction, slope.label) == (0.0, 0.0, None, None)


@pytest.mark.parametrize("norm", NORMS)
def test_images_and_float32(norm: str) -> None:
    """A convolutional network in float32 is computed in float64, and atoms have the shape of the inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)).requires_grad_(False)
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0], dtype=torch.int32)
    threat = Threat(norm, 0.2)
    value = worst_case_risk(net, x, y, threat)
    assert value == worst_case_risk(from_module(net, (1, 2, 2)), x.double(), y.long(), threat)
    adv = worst_case_distribution(net, x, y, threat)
    assert adv.moved.shape[1:] == (1, 2, 2)
    assert adv.points.dtype == torch.float64
    assert adv.audit() <= 0.2
    assert adv.risk(net.double(), "margin") == pytest.approx(value, rel=1e-6)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_where_there_is_no_exact_route() -> None:
    net, (x, y) = random_net(0, 2, (4,), 2), random_sample(0, 2, 2)
    for order in (2, math.inf):
        with pytest.raises(ValueError, match="order=1"):
            worst_case_risk(net, x, y, Threat("L1", 0.1, order, box=None))
    for function in (worst_case_risk, worst_case_distribution):
        with pytest.raises(ValueError, match=r"loss='ce' with norm='L2'.*worst_case_bracket"):
            function(net, x, y, Threat("L2", 0.1, box=None), "ce")
    with pytest.raises(ValueError, match="loss='ce' with norm='L2'"):
        initial_slope(net, x, y, "L2", "ce")
    with pytest.raises(ValueError, match="'L1' and 'Linf'"):
        worst_case_curve(net, x, y, "L2")
    pool = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(NotPiecewiseAffine, match="MaxPool2d"):
        worst_case_risk(pool, torch.rand(2, 1, 3, 3), y[:2], Threat("L1", 0.1))
    with pytest.raises(NotPiecewiseAffine, match="GELU"):
        worst_case_risk(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2)), x, y, Threat("L1", 0.1, box=None))


def test_networks_that_are_too_large_say_how_large() -> None:
    x, y = random_sample(0, 10, 2)
    for norm, what in (("Linf", "vertices"), ("L2", "cells")):
        with pytest.raises(ValueError, match=rf"(?s){what}.*(1e\+08|limit)"):
            worst_case_risk(random_net(0, 10, (60,), 2), x, y, Threat(norm, 0.1, box=None))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"y": torch.tensor([0, 1, 2, 0])}, ValueError, "y has the label 2"),
        ({"x": torch.full((4, 2), 1.5)}, ValueError, "outside box"),
        ({"x": torch.zeros(4, 3)}, ValueError, "shape"),
        ({"x": torch.full((4, 2), torch.nan)}, ValueError, "NaN"),
        ({"threat": "L1"}, TypeError, "threat='L1'"),
        ({"loss": "dlr"}, ValueError, "'margin', 'ce'"),
        ({"net": nn.Linear(2, 1)}, ValueError, "K >= 2"),
        ({"net": "mlp"}, TypeError, "model"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], match: str) -> None:
    arguments = {
        "net": random_net(0, 2, (4,), 2), "x": torch.zeros(4, 2), "y": torch.tensor([0, 1, 0, 1]),
        "threat": Threat("L1", 0.1), "loss": "margin",
    }  # fmt: skip
    for function in (worst_case_risk, worst_case_bracket, worst_case_distribution):
        with pytest.raises(error, match=match):
            function(**{**arguments, **change})


def test_budgets_slack_norms_and_boxes_are_checked() -> None:
    net, (x, y) = random_net(0, 2, (4,), 2), random_sample(0, 2, 2)
    curve = worst_case_curve(net, x, y, "L1")
    assert curve("8/255") == curve(8 / 255)
    for eps in (-1.0, math.nan, math.inf, [0.1, -0.1], "-1/2", "inf", "eight"):
        with pytest.raises(ValueError, match="eps="):
            curve(eps)
    for slack in (0, 2, 1e-12):
        with pytest.raises(ValueError, match="slack="):
            worst_case_distribution(net, x, y, Threat("L1", 0.1, box=None), slack=slack)
    with pytest.raises(ValueError, match="norm='L3'"):
        worst_case_curve(net, x, y, "L3")
    with pytest.raises(ValueError, match="box="):
        worst_case_curve(net, x, y, "L1", box=(2, -2))


def test_the_cone_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    net, (x, y) = random_net(0, 2, (4,), 2), random_sample(0, 2, 2)
    with pytest.raises(ImportError, match=r"pip install 'wda\[certificates\]'"):
        worst_case_risk(net, x, y, Threat("L2", 0.1, box=None))
    assert math.isfinite(worst_case_risk(net, x, y, Threat("L1", 0.1, box=None)))  # the others do without
