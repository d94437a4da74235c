"""Mixed-integer programs: the slopes are those of enumeration, and bounds hold when time runs out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from wda import cells
from wda.certificates import milp
from wda.certificates.recession import recession_slope
from wda.errors import NotPiecewiseAffine
from wda.nets import Dense, Net, from_module

DUAL = {"Linf": 1, "L1": np.inf}
each_norm = pytest.mark.parametrize("norm", ["Linf", "L1"])
each_seed = pytest.mark.parametrize("seed", range(3))
each_shape = pytest.mark.parametrize("sizes", [(2, 7, 2), (3, 6, 3), (2, 5, 4, 3), (3, 4, 4, 2)], ids=str)
each_box = pytest.mark.parametrize("box", [(-1.0, 1.0), (0.0, 1.0), (-20.0, 30.0)], ids=str)


def network(sizes: tuple[int, ...], seed: int, scale: float = 1.0) -> Net:
    """A chain of linear layers and ReLU with random weights, biased enough that cells meet small boxes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after).double(), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=scale / math.sqrt(before))
        nn.init.normal_(layers[-2].bias, std=0.5 * scale)
    return from_module(nn.Sequential(*layers[:-1]))


def one_layer(W: object, c: object, b: object = None) -> Dense:
    """theta = (0, c . relu(W x + b))."""
    W, c = np.array(W, float), np.array(c, float)
    bias = np.zeros(len(W)) if b is None else np.array(b, float)
    return Dense(((W,), (np.zeros((2, W.shape[1])), np.stack([0 * c, c]))), (bias, np.zeros(2)), ("relu",))


def all_pairs(classes: int) -> list[tuple[int, int]]:
    return list(itertools.permutations(range(classes), 2))


def steepest(J: np.ndarray, norm: str, pairs: list[tuple[int, int]]) -> float:
    """The largest dual norm of a row difference of the Jacobians J (M, K, n)."""
    return max(np.linalg.norm(J[:, j] - J[:, k], DUAL[norm], axis=1).max() for k, j in pairs)


# -- the Lipschitz constant over a box -------------------------------------------------------------------------------


@each_norm
@each_seed
@each_shape
@each_box
def test_lipschitz_is_the_steepest_cell_of_the_box(
    norm: str, seed: int, sizes: tuple[int, ...], box: tuple[float, float]
) -> None:
    net = network(sizes, seed)
    pairs = all_pairs(net.classes)
    slope = milp.lipschitz(net.dense, norm, pairs, box)
    J, _ = cells.enumerate(net, box).affine()
    assert slope.exact
    assert slope.lower == pytest.approx(steepest(J, norm, pairs), rel=1e-9)
    assert slope.lower == pytest.approx(steepest(J, norm, [(slope.label, slope.rival)]), rel=1e-9)


@each_norm
@each_seed
def test_no_sampled_gradient_is_steeper(norm: str, seed: int) -> None:
    net = network((6, 12, 3), seed)
    pairs = [(2, 0), (2, 1)]
    slope = milp.lipschitz(net.dense, norm, pairs, (-1.0, 1.0))
    x = torch.rand(2000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    seen = steepest(net.jacobian(x).numpy(), norm, pairs)
    assert slope.exact
    assert seen <= slope.lower * (1 + 1e-12)


@each_norm
@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_small_and_large_weights(norm: str, scale: float) -> None:
    net = network((2, 5, 4, 3), 0, scale)
    pairs = all_pairs(3)
    J, _ = cells.enumerate(net, (-2.0, 1.0)).affine()
    slope = milp.lipschitz(net.dense, norm, pairs, (-2.0, 1.0))
    assert slope.exact
    assert slope.lower == pytest.approx(steepest(J, norm, pairs), rel=1e-9)


@each_norm
def test_a_larger_network(norm: str) -> None:
    """40 units in 10 dimensions have some 1e9 cells."""
    net = network((10, 40, 2), 0)
    slope = milp.lipschitz(net.dense, norm, [(0, 1)], (-1.0, 1.0), time_limit=300)
    x = torch.rand(2000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert slope.exact
    assert slope.lower >= steepest(net.jacobian(x).numpy(), norm, [(0, 1)])


# masks without a cell


@each_norm
@each_box
def test_masks_without_a_cell_do_not_count(norm: str, box: tuple[float, float]) -> None:
    """relu(x) - relu(-x) = x has slope 1; with both units on, as they may be at x = 0, it would be 2."""
    slope = milp.lipschitz(one_layer([[1], [-1]], [1, -1]), norm, [(0, 1)], box)
    assert slope.exact
    assert slope.lower == pytest.approx(1, rel=1e-12)


@each_norm
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_a_unit_switch_together(norm: str, copies: int) -> None:
    """The sum of equal units with weights 1, -1, 1, ... is one unit or none; the steepest mask would have them all."""
    c = np.array([(-1.0) ** i for i in range(copies)])
    scales = np.arange(1, copies + 1)[:, None]
    dense = one_layer(scales * np.array([[1.0, 2.0]]), c / scales[:, 0], 0.1 * scales[:, 0])
    slope = milp.lipschitz(dense, norm, [(1, 0)], (-1.0, 1.0))
    expected = copies % 2 * (3.0 if norm == "Linf" else 2.0)
    # a solver cannot tell 0 from what it does not see
    assert slope.lower == pytest.approx(expected, abs=1e-12)
    assert slope.lower <= slope.upper <= expected * (1 + 2e-6) + 1e-6


@each_norm
def test_a_contradiction_of_three_units(norm: str) -> None:
    """Of 2x + y > 0, 2x - y > 0 and -4x > 0 no three hold in a cell, though all hold at 0 up to equality."""
    W, c = [[2.0, 1.0], [2.0, -1.0], [-4.0, 0.0]], [1.0, 1.0, -1.0]
    net = one_layer(W, c)
    J = net.affine(np.array([m for m in itertools.product((False, True), repeat=3) if 0 < sum(m) < 3]))[0]
    assert steepest(net.affine(np.ones((1, 3), bool))[0], norm, [(0, 1)]) > steepest(J, norm, [(0, 1)])
    slope = milp.lipschitz(net, norm, [(0, 1)], (-1.0, 1.0))
    assert slope.exact
    assert slope.lower == pytest.approx(steepest(J, norm, [(0, 1)]), rel=1e-12)


@each_norm
def test_a_contradiction_in_the_second_layer(norm: str) -> None:
    """relu(h) - relu(-h) with h = relu(x) - relu(-x) = x: any depth."""
    first = np.array([[1.0], [-1.0]])
    second = np.array([[1.0, -1.0], [-1.0, 1.0]])
    weights = (
        (first,),
        (np.zeros((2, 1)), second),
        (np.zeros((2, 1)), np.zeros((2, 2)), np.array([[1.0, -1], [0, 0]])),
    )
    dense = Dense(weights, (np.zeros(2), np.zeros(2), np.zeros(2)), ("relu", "relu"))
    slope = milp.lipschitz(dense, norm, [(0, 1)], (-1.0, 3.0))
    assert slope.exact
    assert slope.lower == pytest.approx(1, rel=1e-12)


def steep_layer(seed: int, most: int) -> nn.Sequential:
    """Four units whose weights are up to 10^most times their biases: their cells are that much smaller than the box."""
    g = np.random.default_rng(seed)
    W, b = g.normal(size=(4, 2)) * 10.0 ** g.integers(2, most), g.normal(size=4)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double().requires_grad_(False)
    for parameter, values in zip(net.parameters(), (W, b, g.normal(size=(2, 4))), strict=True):
        parameter.copy_(torch.from_numpy(values))
    return net


@each_norm
@pytest.mark.parametrize("seed", [11, 48, 53, 55])
def test_cells_much_smaller_than_the_box_count(norm: str, seed: int) -> None:
    net = from_module(steep_layer(seed, 9))
    J, _ = cells.enumerate(net, (-1.0, 1.0)).affine()
    slope = milp.lipschitz(net.dense, norm, [(0, 1)], (-1.0, 1.0))
    assert slope.exact
    assert slope.lower == pytest.approx(steepest(J, norm, [(0, 1)]), rel=1e-9)


@each_norm
@pytest.mark.parametrize("seed", [11, 14, 31, 48])
def test_cells_smaller_than_rounding_count_in_the_upper_bound(norm: str, seed: int) -> None:
    net = from_module(steep_layer(seed, 14))
    J, _ = cells.enumerate(net, (-1.0, 1.0)).affine()
    slope = milp.lipschitz(net.dense, norm, [(0, 1)], (-1.0, 1.0))
    assert slope.lower * (1 - 1e-9) <= steepest(J, norm, [(0, 1)]) <= slope.upper * (1 + 1e-9)


@each_norm
def test_cells_that_only_touch_the_box_do_not_count(norm: str) -> None:
    dense = one_layer([[1.0, 0.0], [1.0, 1.0]], [5.0, 1.0], [-1.0, 0.0])  # the first unit is on beyond x = 1
    slope = milp.lipschitz(dense, norm, [(0, 1)], (0.0, 1.0))
    assert slope.exact
    assert slope.lower == pytest.approx(2 if norm == "Linf" else 1, rel=1e-12)


@each_norm
def test_constant_units_zero_weights_and_affine_networks(norm: str) -> None:
    dual = 1 if norm == "Linf" else np.inf
    constant = one_layer([[0.0, 0.0], [1.0, -2.0]], [7.0, 1.0], [1.0, 5.0])
    assert milp.lipschitz(constant, norm, [(0, 1)], (0.0, 1.0)).value == pytest.approx(np.linalg.norm([1, -2], dual))
    assert milp.lipschitz(one_layer(np.zeros((2, 2)), [1.0, 1.0]), norm, [(0, 1)], (0.0, 1.0)).value == 0
    W = np.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]])
    affine = Dense(((W,),), (np.ones(3),), ())
    assert milp.lipschitz(affine, norm, [(0, 1), (2, 0)], (0.0, 1.0)).value == pytest.approx(5 if dual == 1 else 3)
    assert milp.recession(affine, norm, [(0, 1), (2, 0)]).value == pytest.approx(5 if dual == 1 else 3)


@each_norm
def test_residual_connections(norm: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(x + self.b(torch.relu(self.a(x)))))

    torch.manual_seed(1)
    net = from_module(Residual())
    J, _ = cells.enumerate(net, (-3.0, 3.0)).affine()
    slope = milp.lipschitz(net.dense, norm, all_pairs(3), (-3.0, 3.0))
    assert slope.exact
    assert slope.lower == pytest.approx(steepest(J, norm, all_pairs(3)), rel=1e-9)
    rays = recession_slope(net, norm, method="cones")
    assert milp.recession(net.dense, norm, all_pairs(3)).value == pytest.approx(rays.value, rel=1e-7)


# -- the recession slope ---------------------------------------------------------------------------------------------


def difference(net: Net, u: np.ndarray, label: int, rival: int) -> float:
    theta = net.recession()(torch.from_numpy(u)[None])[0]
    return float(theta[rival] - theta[label])


@each_norm
@each_seed
@each_shape
def test_recession_is_that_of_the_cones(norm: str, seed: int, sizes: tuple[int, ...]) -> None:
    net = network(sizes, seed)
    for labels in ([0], list(range(net.classes))):
        pairs = [(k, j) for k, j in all_pairs(net.classes) if k in labels]
        slope, rays = milp.recession(net.dense, norm, pairs), recession_slope(net, norm, labels, method="cones")
        assert slope.lower == pytest.approx(rays.value, rel=1e-7, abs=1e-9)
        assert slope.exact if rays.value else 0 <= slope.upper < 1e-6
        if slope.direction is not None:
            assert np.linalg.norm(slope.direction, math.inf if norm == "Linf" else 1) <= 1 + 1e-12
            assert difference(net, slope.direction, slope.label, slope.rival) == pytest.approx(slope.lower, rel=1e-12)


@each_norm
def test_recession_of_known_networks(norm: str) -> None:
    minus = one_layer([[1.0, 1.0]], [-1.0])  # the margin of label 0 only falls: best to stay
    slope = milp.recession(minus, norm, [(0, 1)])
    assert (slope.lower, slope.upper, slope.direction) == (0, 0, None)
    assert milp.recession(minus, norm, [(1, 0)]).value == pytest.approx(2 if norm == "Linf" else 1)


@each_norm
def test_recession_of_the_digits_network_beats_every_attacked_direction(norm: str) -> None:
    from wda.certificates.bounds import recession_lower, recession_upper
    from wda.models import load

    net = from_module(load("digits-mlp"), (1, 8, 8))
    pairs = [(3, 8)]
    slope = milp.recession(net.dense, norm, pairs, time_limit=300)
    attacked, _ = recession_lower(net, norm, pairs, starts=20)
    assert slope.exact
    assert float(attacked.max()) <= slope.lower * (1 + 1e-6)
    assert slope.upper <= float(recession_upper(net, norm, pairs).max())


# -- time limits and bad input ---------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("time_limit", [0.0, 0.3])
def test_bounds_hold_when_time_runs_out(norm: str, time_limit: float) -> None:
    net = network((8, 12, 12, 3), 0)
    x = torch.rand(5000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    J = net.jacobian(x).numpy()
    for pairs in ([(0, 1)], all_pairs(3)):
        slope = milp.lipschitz(net.dense, norm, pairs, (-1.0, 1.0), time_limit)
        assert slope.upper >= steepest(J, norm, pairs)
        assert slope.lower <= slope.upper < math.inf
        if time_limit == 0:
            assert slope.lower < slope.upper
        limit = milp.recession(net.dense, norm, pairs, time_limit)
        u = torch.cat([x, x.sign(), torch.eye(8, dtype=torch.float64)])
        u = u / torch.linalg.vector_norm(u, math.inf if norm == "Linf" else 1, dim=1, keepdim=True)
        theta = net.recession()(u)
        assert limit.upper >= max(float((theta[:, j] - theta[:, k]).max()) for k, j in pairs)
        assert 0 <= limit.lower <= limit.upper < math.inf


def test_bad_input() -> None:
    dense = network((2, 3, 2), 0).dense
    with pytest.raises(ValueError, match="norm='L2': one of 'Linf', 'L1' is accepted"):
        milp.lipschitz(dense, "L2", [(0, 1)], (0.0, 1.0))
    with pytest.raises(ValueError, match="norm='L2': one of 'Linf', 'L1' is accepted"):
        milp.recession(dense, "L2", [(0, 1)])
    for pairs in ([], [(0, 0)], [(0, 2)], [(-1, 0)]):
        with pytest.raises(ValueError, match=r"pairs=.*of the 2 classes"):
            milp.recession(dense, "L1", pairs)
    for box in ((1.0, 1.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="box="):
            milp.lipschitz(dense, "L1", [(0, 1)], box)
    for limit in (-1, math.nan):
        with pytest.raises(ValueError, match="time_limit="):
            milp.recession(dense, "L1", [(0, 1)], limit)
    smooth = from_module(nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))).dense
    with pytest.raises(NotPiecewiseAffine, match="gelu"):
        milp.lipschitz(smooth, "L1", [(0, 1)], (0.0, 1.0))
