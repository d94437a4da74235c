"""Lipschitz constants and recession slopes: closed forms, independent solvers, exact routes against each other."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from networks import one_hidden, random_net, random_sample
from torch import nn

import wda.certificates as C
from wda import NotPiecewiseAffine, cells, models, nets
from wda.certificates.recession import cone_maximum
from wda.norms import dual, exponent, operator_norm

NORMS = ["Linf", "L2", "L1"]
SHAPES = [(1, 5, 2), (2, 6, 2), (2, 4, 4, 3), (3, 5, 3), (3, 4, 3, 2)]


# -- the steepest direction of a cone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(12))
def test_cone_maximum_against_cvxpy(seed: int, norm: str) -> None:
    g_ = np.random.default_rng(seed)
    n, rows = int(g_.integers(1, 6)), int(g_.integers(0, 7))
    g, A = g_.normal(size=n), g_.normal(size=(rows, n))
    u = cp.Variable(n)
    limits = [cp.norm(u, exponent(norm) if norm != "Linf" else "inf") <= 1] + ([A @ u <= 0] if rows else [])
    solved = cp.Problem(cp.Maximize(g @ u), limits)
    solved.solve(solver="CLARABEL")
    value, direction = cone_maximum(g, A, norm)
    assert value == pytest.approx(solved.value, abs=1e-6)
    assert value == pytest.approx(g @ direction, abs=1e-9)
    assert (A @ direction <= 1e-9).all()
    assert np.linalg.norm(direction, exponent(norm)) == pytest.approx(float(value > 0))


@pytest.mark.parametrize("norm", NORMS)
def test_cone_maximum_scales_and_vanishes(norm: str) -> None:
    A = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert cone_maximum(np.array([1.0, 2.0]), A, norm)[0] == 0  # the cone is {0}
    assert cone_maximum(np.array([-1.0, 0.0]), np.array([[-1.0, 0.0]]), norm)[0] == 0  # downhill only
    g, cone = np.array([3.0, -1.0]), np.array([[0.3, 1.0], [0.0, 0.0]])
    for scale in (1e-12, 1e12):
        assert cone_maximum(scale * g, cone / scale, norm)[0] == pytest.approx(scale * cone_maximum(g, cone, norm)[0])


# -- l -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_three_routes_to_the_recession_slope(widths: tuple, norm: str, seed: int) -> None:
    module, labels = random_net(*widths, seed=seed), ([0], None, None)[seed]
    slope = C.recession_slope(module, norm, labels, method="cones")
    assert slope.exact
    assert C.recession_slope(module, norm, labels, method="cells").value == pytest.approx(slope.value, abs=1e-7)
    assert C.recession_slope(module, norm, labels).value == slope.value  # auto
    bounded = C.recession_slope(module, norm, labels, method="bounds")
    assert bounded.lower <= slope.value + 1e-7 <= bounded.upper + 2e-7
    if norm != "L2":
        assert C.recession_slope(module, norm, labels, method="milp").value == pytest.approx(slope.value, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", [(2, 12, 3), (3, 12, 3)])
def test_the_attack_comes_close(widths: tuple, norm: str) -> None:
    """On the whole: a rise in one narrow cone may escape it."""
    found = [C.recession_slope(random_net(*widths, seed=s), norm, method="bounds").lower for s in range(3)]
    exact = [C.recession_slope(random_net(*widths, seed=s), norm, method="cones").value for s in range(3)]
    assert np.mean(np.divide(found, exact)) > 0.98


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", [(2, 6, 3), (2, 4, 4, 2)])
def test_the_slope_is_that_of_the_margin_along_its_ray(widths: tuple, norm: str) -> None:
    module = random_net(*widths, seed=4)
    slope = C.recession_slope(module, norm)
    far = 1e8 * torch.from_numpy(slope.direction)[None]
    logits = module(far)[0]
    assert float(logits[slope.rival] - logits[slope.label]) / 1e8 == pytest.approx(slope.value, abs=1e-6)
    assert np.linalg.norm(slope.direction, exponent(norm)) == pytest.approx(1)
    # a fan of directions never does better
    angles = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)[:-1]
    u = torch.stack([angles.cos(), angles.sin()], 1)
    u = u / torch.linalg.vector_norm(u, exponent(norm), dim=1, keepdim=True)
    limit = nets.from_module(module).recession()(u)
    best = float((limit.amax(1) - limit.amin(1)).max())
    assert best <= slope.value + 1e-9
    assert best == pytest.approx(slope.value, rel=2e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_linear_network(norm: str, seed: int) -> None:
    """l = L_margin = the largest dual norm of a difference of rows; the corrected form is the operator norm's."""
    torch.manual_seed(seed)
    linear = nn.Linear(4, 3).double()
    W = linear.weight.detach()
    expected = max(
        float(torch.linalg.vector_norm(W[j] - W[k], exponent(dual(norm)))) for j in range(3) for k in range(3)
    )
    assert C.recession_slope(linear, norm).value == pytest.approx(expected)
    assert C.lipschitz(linear, norm).value == pytest.approx(expected)
    assert C.lipschitz(linear, norm, "product").upper == pytest.approx(expected)
    r, s = exponent(norm), exponent(dual(norm))
    largest = operator_norm(W, norm, dual(norm))
    assert C.lipschitz(linear, norm, "corrected").value == pytest.approx(2 ** (1 / r) * largest)
    assert C.lipschitz(linear, norm, "paper").value == pytest.approx(2 ** (1 / s) * largest)


@pytest.mark.parametrize("norm", NORMS)
def test_only_labels_that_are_present_count(norm: str) -> None:
    """theta = (relu x, 0): with label 1 alone nothing can be gained; with label 2 the slope is 1."""
    module = one_hidden([[1.0]], [0.0], [[1.0], [0.0]])
    assert C.recession_slope(module, norm, labels=[0]).value == 0
    assert C.recession_slope(module, norm, labels=[1]).value == pytest.approx(1)
    assert C.recession_slope(module, norm).value == pytest.approx(1)
    assert C.recession_slope(module, norm, labels=[0]).direction is None


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid])
@pytest.mark.parametrize("norm", NORMS)
def test_smooth_activations_have_the_slope_of_relu(activation: type[nn.Module], norm: str) -> None:
    smooth, rectified = random_net(2, 5, 3, activation=activation), random_net(2, 5, 3)
    expected = 0 if activation is nn.Sigmoid else C.recession_slope(rectified, norm).value
    assert C.recession_slope(smooth, norm).value == pytest.approx(expected)


@pytest.mark.parametrize("norm", NORMS)
def test_transformers(norm: str) -> None:
    """With a layer normalisation before the head logits are bounded; without, head, pooling and embedding remain."""
    assert C.recession_slope(nets.from_module(models.load("digits-vit"), (1, 8, 8)), norm).value == 0
    net = nets.from_module(models.load("digits-vit-nonorm"), (1, 8, 8))
    A = net.recession().jacobian(torch.zeros(1, 64))[0]
    expected = max(
        float(torch.linalg.vector_norm(A[j] - A[k], exponent(dual(norm)))) for j in range(10) for k in range(10)
    )
    assert C.recession_slope(net, norm).value == pytest.approx(expected)


# -- l_N ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", SHAPES)
def test_the_sample_slope_by_the_cells_that_hold_the_sample(widths: tuple, norm: str) -> None:
    """Every cell whose closure holds a sample, found among all cells instead of around the sample."""
    module = random_net(*widths, seed=6)
    x, y = random_sample(module, 3, seed=6)
    expected = 0.0
    for cell in cells.enumerate(module):
        A, b = cell.halfspaces
        for point, k in zip(x.numpy(), y.tolist(), strict=True):
            if (A @ point <= b + 1e-9).all():
                values = [cone_maximum(row - cell.jacobian[k], cell.recession_cone, norm)[0] for row in cell.jacobian]
                expected = max(expected, *values)
    assert C.sample_slope(module, x, y, norm).value == pytest.approx(expected, abs=1e-9)


def test_a_sample_on_the_border_has_all_its_cells() -> None:
    """theta = (0, relu x) at x = 0: the mask with slope 1 counts too."""
    module = one_hidden([[1.0]], [0.0], [[0.0], [1.0]])
    x, y = torch.zeros(1, 1), torch.tensor([0])
    assert C.sample_slope(module, x, y, "L2").value == pytest.approx(1)
    assert C.sample_slope(module, x - 1, y, "L2").value == 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_sample_slope_of_the_digits(norm: str) -> None:
    """64 dimensions, where no enumeration is possible."""
    model = models.load("digits-mlp")
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 5, 9])
    slope = C.sample_slope(model, x, y, norm)
    assert 0 <= slope.value <= C.recession_slope(model, norm, [0, 5, 9]).upper + 1e-9


# -- L -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("widths", SHAPES)
@pytest.mark.parametrize("box", [None, (-1.0, 1.0)])
def test_lipschitz_constants_in_order(widths: tuple, norm: str, box: tuple | None) -> None:
    module = random_net(*widths, seed=7)
    labels = [0]
    margin = C.lipschitz(module, norm, "margin", labels, box=box)
    assert margin.exact
    assert margin.value <= C.lipschitz(module, norm, "margin", box=box).value + 1e-12
    assert (
        C.lipschitz(module, norm, "margin", box=box).value
        <= C.lipschitz(module, norm, "corrected", box=box).value + 1e-9
    )
    bounded = C.lipschitz(module, norm, "margin", labels, "bounds", box)
    assert bounded.lower - 1e-9 <= margin.value <= bounded.upper
    assert bounded.upper <= C.lipschitz(module, norm, "product", labels).upper * (1 + 1e-9)
    assert C.lipschitz(module, norm, labels=labels, box=(-0.1, 0.1)).value <= margin.value + 1e-12
    if box is not None and norm != "L2":
        assert C.lipschitz(module, norm, labels=labels, method="milp", box=box).value == pytest.approx(
            margin.value, abs=1e-6
        )
    # difference quotients of the margin of one pair never exceed the constant
    x = torch.rand(2, 5000, module[0].in_features, dtype=torch.float64) * 2 - 1
    z = module(x)
    gap = (z[..., 1:] - z[..., :1]).diff(dim=0)[0].abs().amax(1)
    assert (gap <= margin.value * torch.linalg.vector_norm(x[1] - x[0], exponent(norm), dim=1) + 1e-9).all()


def test_the_published_reference_of_lipsdp(wda_data: object) -> None:
    """LipSDP's authors print 36.48 for it and 43.31 for the product of spectral norms. Cells: 36.48 is exact."""
    net = nets.from_module(models.load("reference_lipsdp_random_2_10_30_20_2"), (2,))
    exact = C.lipschitz(net, "L2", "corrected", method="cells").value / math.sqrt(2)  # of the logits
    product = math.prod(np.linalg.norm(net.dense.weights[h][h], 2) for h in range(4))
    assert product == pytest.approx(43.31, abs=0.005)
    assert exact == pytest.approx(36.48, abs=0.005)
    x = 20 * torch.randn(2, 20000, 2, dtype=torch.float64)
    x[1] = x[0] + 1e-4 * torch.randn(20000, 2, dtype=torch.float64)
    quotient = (net(x[0]) - net(x[1])).norm(dim=1) / (x[0] - x[1]).norm(dim=1)
    assert 0.5 * exact < float(quotient.max()) <= exact + 1e-6


BAD = [
    (lambda net: C.lipschitz(net, "L3"), "norm='L3'"),
    (lambda net: C.lipschitz(net, "L2", "tight"), "kind='tight'"),
    (lambda net: C.lipschitz(net, "L2", method="magic"), "method='magic'"),
    (lambda net: C.lipschitz(net, "Linf", method="milp"), "box=None"),
    (lambda net: C.lipschitz(net, "L2", method="milp", box=(0, 1)), "L2"),
    (lambda net: C.lipschitz(net, "L2", "paper", method="bounds"), "kind='paper'"),
    (lambda net: C.lipschitz(net, "L2", labels=[2]), "labels=2"),
    (lambda net: C.lipschitz(net, "L2", labels=[]), r"labels=\[\]"),
    (lambda net: C.lipschitz(net, "L2", box=(1, 0)), "box="),
    (lambda net: C.lipschitz(net, "L2", box=(0, math.inf)), "box=inf"),
    (lambda net: C.lipschitz(net, "L2", "product", box=(1, 0)), "box="),
    (lambda net: C.lipschitz(net, "L2", "corrected", method="bounds"), "method='cells'"),
    (lambda net: C.lipschitz(net, "L2", labels=1), "labels=1"),
    (lambda net: C.lipschitz(nn.Linear(2, 1), "L2"), "1 logit"),
    (lambda net: C.recession_slope(net, "L2", method="milp"), "L2"),
    (lambda net: C.recession_slope(net, "L2", [-1]), "labels=-1"),
    (lambda net: C.sample_slope(net, torch.zeros(1, 2), torch.tensor([2]), "L2"), "2"),
    (lambda net: C.sample_slope(net, torch.zeros(1, 3), torch.tensor([0]), "L2"), "shape"),
    (lambda net: C.sample_slope(net, torch.full((1, 2), math.nan), torch.tensor([0]), "L2"), "NaN"),
]


@pytest.mark.parametrize(("call", "named"), BAD, ids=[named for _, named in BAD])
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(random_net(2, 4, 2))


def test_layers_that_a_method_cannot_treat_are_named() -> None:
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    net = nets.from_module(pooled, shape=(1, 4, 4))
    for method in ("cells", "cones", "milp"):
        with pytest.raises(NotPiecewiseAffine, match="MaxPool2d"):
            C.recession_slope(net, "Linf", method=method)
    slope = C.recession_slope(net, "Linf")
    assert slope.method == "bounds"
    assert 0 <= slope.lower <= slope.upper
    assert not C.Slope(0.0, 1e-9, "bounds").exact
    assert C.Slope(0.0, 0.0, "bounds").exact
    with pytest.raises(ValueError, match="only known to lie in"):
        float(C.Slope(1.0, 2.0, "bounds"))
