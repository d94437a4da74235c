"""Activation cells against counting formulas, sampling, linear programs, and hand-made degenerate arrangements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import one_hidden, random_net
from scipy.optimize import linprog
from torch import nn

from wda import NotPiecewiseAffine, cells, nets


def masks(listed: cells.Cells) -> set[tuple[bool, ...]]:
    found = {tuple(row) for row in listed.masks.tolist()}
    assert len(found) == len(listed)  # none twice
    return found


def sampled(net: nets.Net, box: tuple[float, float], count: int = 40_000, seed: int = 0) -> set[tuple[bool, ...]]:
    """The masks at random points: a subset of those of the cells, almost surely."""
    x = np.random.default_rng(seed).uniform(*box, (count, net.n))
    return {tuple(row) for row in np.unique(net.dense.mask(x), axis=0).tolist()}


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 7), (2, 1), (2, 8), (2, 32), (3, 2), (3, 16), (4, 3), (4, 12), (5, 9)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_generic_layer_has_the_cells_of_the_formula(n: int, m: int, seed: int) -> None:
    listed = cells.enumerate(random_net(n, m, 2, seed=seed))
    assert len(listed) == len(masks(listed)) == sum(math.comb(m, i) for i in range(n + 1))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 7), (3, 6), (4, 5)])
def test_a_generic_central_arrangement_has_twice_the_cells_below(n: int, m: int) -> None:
    limit = nets.from_module(random_net(n, m, 2)).recession()
    assert len(cells.enumerate(limit)) == 2 * sum(math.comb(m - 1, i) for i in range(n))


@pytest.mark.parametrize("widths", [(2, 6, 2), (2, 5, 5, 3), (3, 4, 4, 2), (2, 4, 3, 4, 2), (1, 5, 5, 2)])
@pytest.mark.parametrize("box", [None, (-1.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("seed", range(2))
def test_every_cell_has_an_inside_and_none_is_missed(widths: tuple, box: tuple | None, seed: int) -> None:
    net = nets.from_module(random_net(*widths, seed=seed))
    listed = cells.enumerate(net, box)
    assert (net.dense.mask(listed.interior) == listed.masks).all()
    if box is not None:
        assert ((listed.interior > box[0]) & (listed.interior < box[1])).all()
    assert sampled(net, box or (-20, 20)) <= masks(listed)


@pytest.mark.parametrize("recession", [False, True])
@pytest.mark.parametrize("widths", [(2, 5, 2), (3, 5, 2), (2, 4, 4, 2)])
@pytest.mark.parametrize("box", [None, (-1.0, 1.0)])
def test_linear_programs_find_the_same_cells(
    widths: tuple, box: tuple | None, recession: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The route of degenerate arrangements, forced on generic ones."""
    net = nets.from_module(random_net(*widths, seed=3))
    net = net.recession() if recession else net
    by_vertices = masks(cells.enumerate(net, box))
    monkeypatch.setattr(cells, "_by_vertices", lambda *_: None)
    assert masks(cells.enumerate(net, box)) == by_vertices


@pytest.mark.parametrize("seed", range(4))
def test_affine_pieces_halfspaces_and_cones(seed: int) -> None:
    module = random_net(2, 5, 4, 3, seed=seed)
    net = nets.from_module(module)
    for cell in cells.enumerate(net):
        A, b = cell.halfspaces
        point = cell.interior_point
        assert (A @ point < b).all()
        x = torch.from_numpy(point)[None]
        np.testing.assert_allclose(cell.jacobian @ point + cell.offset, module(x)[0].numpy(), atol=1e-9)
        np.testing.assert_allclose(cell.jacobian, net.jacobian(x)[0].numpy(), atol=1e-9)
        # a direction of the recession cone never leaves the cell; any other one does
        for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
            u = np.array([np.cos(angle), np.sin(angle)])
            stays = (cell.recession_cone @ u <= 0).all()
            assert stays == (A @ (point + 1e9 * u) <= b + 1).all()


def test_cells_of_a_box_are_those_that_meet_it() -> None:
    """Against a linear program for each of the 2^m sign vectors."""
    net, box = nets.from_module(random_net(2, 6, 2, seed=5)), (-0.5, 1.0)
    W, b = net.dense.weights[0][0], net.dense.bias[0]
    expected = set()
    for bits in np.ndindex(*[2] * 6):
        side = np.where(np.array(bits), -1.0, 1.0)
        length = np.linalg.norm(W, axis=1)
        A = np.column_stack([side[:, None] * W, length])
        inside = np.column_stack([np.eye(2), np.ones(2)]), np.column_stack([-np.eye(2), np.ones(2)])
        solved = linprog(
            [0, 0, -1], A_ub=np.concatenate([A, *inside]), b_ub=[*(-side * b), *[box[1]] * 2, *[-box[0]] * 2],
            bounds=[(None, None)] * 2 + [(None, 1)],
        )  # fmt: skip
        if solved.x[-1] > 1e-9:
            expected.add(tuple(bool(bit) for bit in bits))
    assert masks(cells.enumerate(net, box)) == expected


DEGENERATE = {
    "duplicate units": ([[1, 0], [2, 0], [-1, 0], [0, 1]], [1, 2, -1, 0]),
    "three lines through a point": ([[1, 0], [0, 1], [1, 1], [1, -1]], [0, 0, 0, 1]),
    "parallel lines": ([[1, 0], [1, 0], [1, 0], [-1, 0]], [0, 1, 2, 3]),
    "no direction at all": ([[0, 0], [0, 0]], [1, -1]),
    "zero rows beside others": ([[0, 0], [1, 2], [0, 0], [2, -1]], [0, 0.5, 1, 0.1]),
    "a zero row of zero bias": ([[0, 0], [1, 0]], [0, 0]),
}


@pytest.mark.parametrize("box", [None, (-5.0, 5.0)])
@pytest.mark.parametrize(("W", "b"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_arrangements(W: list, b: list, box: tuple | None) -> None:
    net = nets.from_module(one_hidden(W, b, np.ones((2, len(b))).tolist()))
    listed = cells.enumerate(net, box)
    assert masks(listed) == sampled(net, box or (-8, 8))
    assert (net.dense.mask(listed.interior) == listed.masks).all()


def test_masks_that_no_open_set_has_are_left_out() -> None:
    """theta = relu(x) - relu(-x) = x: at 0 both units could be taken as on, with |J| = 2; no cell has that mask."""
    listed = cells.enumerate(one_hidden([[1.0], [-1.0]], [0, 0], [[1, -1], [0, 0]]))
    assert masks(listed) == {(True, False), (False, True)}
    assert (listed.affine()[0][:, 0] == 1).all()


def test_zero_weights_in_a_deep_layer() -> None:
    module = random_net(2, 4, 4, 2, seed=1)
    module[2].weight.zero_()
    assert len(cells.enumerate(module)) == 11


def test_lines_in_the_cells() -> None:
    """Fewer units than dimensions: no cell has a vertex."""
    net = nets.from_module(random_net(5, 2, 4, 2, seed=0))
    listed = cells.enumerate(net)
    assert sampled(net, (-30, 30)) <= masks(listed)
    assert (net.dense.mask(listed.interior) == listed.masks).all()


def test_skip_connections() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x))) + x)) - x

    torch.manual_seed(2)
    net = nets.from_module(Skip())
    listed = cells.enumerate(net)
    assert sampled(net, (-30, 30)) <= masks(listed)
    assert (net.dense.mask(listed.interior) == listed.masks).all()


@pytest.mark.parametrize("widths", [(2, 6, 2), (3, 4, 4, 2)])
def test_cells_around_a_point(widths: tuple) -> None:
    net = nets.from_module(random_net(*widths, seed=1))
    everywhere = cells.enumerate(net)
    for cell in everywhere[:5]:
        assert masks(cells.at(net, cell.interior_point)) == {tuple(cell.mask.tolist())}
    # where n hyperplanes of the first layer meet, all 2^n sides occur
    n = net.n
    vertex = np.linalg.solve(net.dense.weights[0][0][:n], -net.dense.bias[0][:n])
    around = cells.at(net, vertex)
    assert len(around) == 2**n
    near = vertex + 1e-7 * np.random.default_rng(0).normal(size=(2000, n))
    assert masks(around) == {tuple(row) for row in net.dense.mask(near).tolist()}


def test_a_network_without_hidden_units() -> None:
    listed = cells.enumerate(nn.Linear(3, 2))
    assert len(listed) == 1
    assert listed[0].halfspaces[0].shape == (0, 3)
    assert not listed[0].interior_point.any()


def test_a_float32_network_is_treated_in_float64() -> None:
    module = random_net(2, 5, 2, seed=0).float()
    listed = cells.enumerate(module)
    assert listed.affine()[0].dtype == np.float64
    assert masks(listed) == masks(cells.enumerate(module.double()))


def test_what_cannot_be_enumerated_is_said() -> None:
    with pytest.raises(cells.TooManyCells, match=r"48 units in 64 dimensions.*2.81e\+14.*method='milp'"):
        cells.enumerate(random_net(64, 48, 10))
    with pytest.raises(cells.TooManyCells, match="limit=50"):
        cells.enumerate(random_net(2, 8, 8, 2), limit=50)
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(NotPiecewiseAffine, match=r"MaxPool2d.*enumeration"):
        cells.enumerate(nets.from_module(pooled, shape=(1, 4, 4)))
    with pytest.raises(NotPiecewiseAffine, match=r"GELU.*ReLU"):
        cells.enumerate(random_net(2, 3, 2, activation=nn.GELU))
    with pytest.raises(ValueError, match=r"box=\(1.0, 0.0\)"):
        cells.enumerate(random_net(2, 3, 2), box=(1.0, 0.0))
    with pytest.raises(ValueError, match="limit=0"):
        cells.enumerate(random_net(2, 3, 2), limit=0)


def scaled(W: np.ndarray, b: np.ndarray) -> nn.Sequential:
    return one_hidden(W.tolist(), b.tolist(), np.ones((2, len(b))).tolist())


@pytest.mark.parametrize("n", [3, 4])
def test_nearly_parallel_units_keep_their_cells(n: int) -> None:
    """Their determinant is 1e-12 or less; the hyperplanes meet all the same."""
    W = np.concatenate([np.zeros((1, n)), np.eye(n)[1:] * 1e-6])
    W[:, 0] = 1
    assert len(cells.enumerate(scaled(W, np.arange(1, n + 1) / 10))) == 2**n


@pytest.mark.parametrize("scale", [1, 1e-8, 1e-12, 1e-100, 1e12, 1e150])
def test_cells_do_not_depend_on_the_size_of_the_weights(scale: float) -> None:
    g = np.random.default_rng(0)
    W, b = g.normal(size=(4, 2)), g.normal(size=4)
    for box in (None, (-5.0, 5.0)):
        assert masks(cells.enumerate(scaled(W * scale, b * scale), box)) == masks(cells.enumerate(scaled(W, b), box))
    # one unit far smaller than the others
    assert len(cells.enumerate(scaled(np.array([[1.0, 0], [0, 1e-11]]), np.zeros(2)))) == 4


@pytest.mark.parametrize("unit", [1, 1e-7, 2.0**-26, 2.0**30, 2.0**-34])
def test_cells_do_not_depend_on_the_unit_of_the_inputs(unit: float) -> None:
    """Degenerate, so that linear programs with an absolute tolerance decide."""
    W, b = np.array([[-2.0, -2], [-2, 2], [-2, -1], [-2, 1]]), np.array([-2.0, 0, -1, 1])
    assert len(cells.enumerate(scaled(W, b * unit))) == 10
    assert len(cells.enumerate(scaled(W / unit, b), (-2 * unit, 2 * unit))) == 10


def test_few_gives_up_in_time() -> None:
    assert cells.few(random_net(10, 14, 14, 3)) is None
    wide = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 144, 2))
    assert cells.few(nets.from_module(wide, shape=(1, 12, 12))) is None  # too large for explicit matrices


@pytest.mark.parametrize("x", [np.zeros(3), np.array([np.nan, 0])])
def test_a_point_that_is_none(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="x="):
        cells.at(random_net(2, 3, 2), x)
