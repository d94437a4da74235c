"""Norms, their steepest directions, projections and operator norms, against solvers and enumeration."""

from __future__ import annotations

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, linprog
from torch import Tensor

from wda import norms

NORMS = ("Linf", "L2", "L1")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BOX = (0.0, 1.0)
each_norm = pytest.mark.parametrize("name", NORMS)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- norms and their duals -------------------------------------------------------------------------------------------


@each_norm
@each_float
def test_norm_is_that_of_numpy_over_all_but_the_first_axis(name: str, dtype: torch.dtype) -> None:
    v = normal(0, 4, 2, 3).to(dtype)
    order = {"Linf": np.inf, "L2": 2, "L1": 1}[name]
    expected = [np.linalg.norm(row.double().numpy().ravel(), order) for row in v]
    result = norms.norm(v, name)
    assert result.dtype == dtype
    assert result.double().numpy() == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)


@each_norm
def test_the_exponents_of_dual_norms_are_conjugate(name: str) -> None:
    assert 1 / norms.exponent(name) + 1 / norms.exponent(norms.dual(name)) == 1


@pytest.mark.parametrize("function", [norms.exponent, norms.dual])
@pytest.mark.parametrize("name", ["l2", None, 2, ["L2"]])
def test_an_unknown_norm_is_named(function: object, name: object) -> None:
    with pytest.raises(ValueError, match=r"norm=.*'Linf', 'L2', 'L1' is accepted"):
        function(name)


@each_norm
@each_float
@pytest.mark.parametrize("extreme", [None, "tiny", "max"])
def test_dual_maximiser_has_norm_one_and_attains_the_dual_norm(
    name: str, dtype: torch.dtype, extreme: str | None
) -> None:
    scale = 1.0 if extreme is None else getattr(torch.finfo(dtype), extreme) ** 0.75  # whose square is out of range
    g = (normal(1, 20, 3, 4) * scale).to(dtype)
    h = norms.dual_maximiser(g, name)
    tolerance = 20 * torch.finfo(dtype).eps
    assert h.dtype == dtype
    assert h.shape == g.shape
    assert norms.norm(h.double(), name) == pytest.approx(1, abs=tolerance)
    unit = g.double() / scale
    assert (unit * h.double()).sum((1, 2)) == pytest.approx(norms.norm(unit, norms.dual(name)), rel=tolerance)


@each_norm
@each_float
def test_dual_maximiser_of_zero_is_zero(name: str, dtype: torch.dtype) -> None:
    g = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=dtype)
    assert norms.dual_maximiser(g, name).tolist() == [[0, 0], [0, 1]]


def test_dual_maximiser_for_l1_takes_the_first_of_equal_coordinates() -> None:
    assert norms.dual_maximiser(torch.tensor([[1.0, -2.0, 2.0]]), "L1").tolist() == [[0, -1, 0]]


# -- projections -----------------------------------------------------------------------------------------------------


def solve_qp(z: np.ndarray, a: np.ndarray, radius: float, name: str, box: tuple[float, float] | None) -> np.ndarray:
    """The projection, by a conic solver."""
    xi = cp.Variable(len(z))
    ball = cp.norm(xi - a, {"Linf": "inf", "L2": 2, "L1": 1}[name]) <= radius
    within = [] if box is None else [xi >= box[0], xi <= box[1]]
    cp.Problem(cp.Minimize(cp.sum_squares(xi - z)), [ball, *within]).solve(solver=cp.CLARABEL)
    return xi.value


def hard_points(seed: int) -> tuple[Tensor, Tensor]:
    """Points and anchors in 5 dimensions: anchors on and near the box's edge, points in it, far out, and tied."""
    a = uniform(seed, 6, 5)
    a[0, :3], a[1, 2:], a[2] = 0.0, 1.0, 0.999
    z = a + normal(seed + 100, 6, 5) * torch.tensor([0.5, 3.0, 1.0, 0.01, 1.0, 0.3])[:, None]
    z[4] = a[4] + torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0])  # ties, and a coordinate that need not move
    z[5, :2] = a[5, :2]
    return z, a


@each_norm
@pytest.mark.parametrize("radius", [0.03, 0.4, 1.5])
@pytest.mark.parametrize("box", [None, BOX, (-0.5, 1.25)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_project_agrees_with_a_qp_solver(name: str, radius: float, box: tuple[float, float] | None, seed: int) -> None:
    z, a = hard_points(seed)
    expected = [solve_qp(*pair, radius, name, box) for pair in zip(z.numpy(), a.numpy(), strict=True)]
    assert norms.project(z, a, radius, name, box).numpy() == pytest.approx(np.array(expected), abs=1e-4)


@pytest.mark.parametrize(("name", "expected"), [("Linf", 1.0), ("L2", math.sqrt(0.5)), ("L1", 0.5)])
def test_project_onto_the_unit_ball(name: str, expected: float) -> None:
    """The points that eq. 2 of the paper names, for a ball at the origin (row 9 of the audit)."""
    point = norms.project(torch.tensor([[5.0, 5.0]]), torch.zeros(1, 2), 1.0, name)
    assert point.numpy() == pytest.approx(expected)


def test_project_keeps_the_whole_budget_where_clipping_wastes_it() -> None:
    """Row 9 of the audit: from (0.9, 0.5) with R = 0.3, clipping the projection onto the ball uses 0.2345 of it."""
    a = torch.tensor([[0.9, 0.5]], dtype=torch.float64)
    z = a + 1
    clipped = norms.project(z, a, 0.3, "L2").clamp(*BOX)
    exact = norms.project(z, a, 0.3, "L2", BOX)
    assert norms.norm(clipped - a, "L2").item() == pytest.approx(0.2345, abs=1e-4)
    assert exact.numpy() == pytest.approx(np.array([[1.0, 0.5 + math.sqrt(0.08)]]))


@pytest.mark.parametrize("name", ["L2", "L1"])
@pytest.mark.parametrize("box", [None, BOX], ids=str)
@pytest.mark.parametrize("radius", [0.05, 3.0])
def test_project_solves_for_its_multiplier_in_high_dimension(
    name: str, box: tuple[float, float] | None, radius: float
) -> None:
    """The minimiser of the Lagrangian is clip(prox); the multiplier is found by Brent's method."""
    z, a = normal(2, 3072).numpy(), uniform(3, 3072).numpy()
    low, high = (-np.inf, np.inf) if box is None else box

    def minimiser(multiplier: float) -> np.ndarray:
        if name == "L2":
            return ((z + multiplier * a) / (1 + multiplier)).clip(low, high)
        return (a + np.sign(z - a) * np.maximum(abs(z - a) - multiplier, 0)).clip(low, high)

    def excess(multiplier: float) -> float:
        return np.linalg.norm(minimiser(multiplier) - a, {"L2": 2, "L1": 1}[name]) - radius

    expected = minimiser(brentq(excess, 0, 1e5, xtol=1e-15))
    found = norms.project(torch.tensor(z)[None], torch.tensor(a)[None], radius, name, box)[0]
    assert found.numpy() == pytest.approx(expected, abs=1e-10)


coordinates = st.floats(-3, 3, width=32)
sides = st.floats(0, 1, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two points and one anchor in the box, (2, n) each."""
    n = draw(st.integers(1, 6))
    z = torch.from_numpy(draw(arrays(np.float64, (2, n), elements=coordinates)))
    a = torch.from_numpy(draw(arrays(np.float64, (1, n), elements=sides))).expand(2, n)
    return z, a


@given(pairs(), st.floats(0, 4), st.sampled_from(NORMS), st.sampled_from([None, BOX]))
@settings(max_examples=150, deadline=None)
def test_project_is_feasible_idempotent_and_nonexpansive(
    pair: tuple[Tensor, Tensor], radius: float, name: str, box: tuple[float, float] | None
) -> None:
    z, a = pair
    xi = norms.project(z, a, radius, name, box)
    assert norms.norm(xi - a, name).max() <= radius * (1 + 1e-12) + 1e-14
    if box is not None:
        assert xi.min() >= box[0]
        assert xi.max() <= box[1]
    torch.testing.assert_close(norms.project(xi, a, radius, name, box), xi, rtol=0, atol=1e-12)
    assert (xi[0] - xi[1]).norm() <= (z[0] - z[1]).norm() + 1e-12


@given(pairs(), st.floats(0, 4), st.sampled_from(NORMS))
@settings(max_examples=150, deadline=None)
def test_no_feasible_point_lies_further_towards_the_projected_one(
    pair: tuple[Tensor, Tensor], radius: float, name: str
) -> None:
    """The variational inequality <z - xi, q - xi> <= 0 of a projection, at feasible q made by scaling and clipping."""
    z, a = pair
    xi = norms.project(z, a, radius, name, BOX)
    axes = torch.eye(z.shape[1], dtype=z.dtype)
    push = torch.cat([z - a, z.flip(0) - a, axes, -axes])
    q = (a[:1] + radius * push / norms.norm(push, name).clamp(min=1e-300)[:, None]).clamp(*BOX)
    q = torch.cat([q, a[:1]])
    assert ((z - xi)[:, None] * (q - xi[:, None])).sum(2).max() <= 1e-10


@each_norm
@each_float
@pytest.mark.parametrize("box", [None, BOX], ids=str)
def test_project_leaves_what_is_inside_and_zero_radius_leaves_the_anchor(
    name: str, dtype: torch.dtype, box: tuple[float, float] | None
) -> None:
    a = uniform(4, 8, 2, 3).to(dtype)
    inside = (0.999 * a + 0.001 * uniform(5, 8, 2, 3)).to(dtype)
    assert torch.equal(norms.project(inside, a, 1.0, name, box), inside)
    assert torch.equal(norms.project(a + normal(6, 8, 2, 3).to(dtype), a, 0.0, name, box), a)


@each_norm
def test_project_of_points_within_rounding_of_the_sphere(name: str) -> None:
    """Sums in different orders disagree on whether such points are inside; either way they hardly move."""
    a, push = uniform(13, 500, 64), normal(14, 500, 64)
    z = a + 2.5 * push / norms.norm(push, name)[:, None]
    distance = norms.norm(z - a, name)
    radius = torch.nextafter(distance, torch.zeros_like(distance))
    torch.testing.assert_close(norms.project(z, a, radius, name), z, rtol=0, atol=1e-14)


@each_norm
def test_project_takes_a_radius_for_each_sample(name: str) -> None:
    z, a = hard_points(3)
    radii = torch.linspace(0, 1, len(z), dtype=torch.float64)
    alone = [norms.project(z[i : i + 1], a[i : i + 1], float(r), name, BOX) for i, r in enumerate(radii)]
    torch.testing.assert_close(norms.project(z, a, radii, name, BOX), torch.cat(alone))


@each_norm
@each_float
@pytest.mark.parametrize("box", [(0.1, 0.3), (0.2, 0.7)], ids=str)
def test_project_stays_in_a_box_that_its_dtype_cannot_represent(
    name: str, dtype: torch.dtype, box: tuple[float, float]
) -> None:
    a = torch.full((2, 4), 0.25, dtype=dtype)
    z = a + torch.tensor([[5.0], [-5.0]], dtype=dtype)
    xi = norms.project(z, a, 9.0, name, box)
    low, high = torch.tensor(box, dtype=dtype)  # as anybody's data would be rounded
    assert xi.min() == low
    assert xi.max() == high


# -- rounding --------------------------------------------------------------------------------------------------------


@each_norm
@each_float
@pytest.mark.parametrize("radius", [8 / 255, 0.3])
def test_round_inward_ends_inside_exactly_and_a_few_units_away(name: str, dtype: torch.dtype, radius: float) -> None:
    anchor = (0.97 * uniform(7, 200, 9)).to(dtype)  # off the grid on which torch draws: sums round both ways
    points = norms.project(anchor + normal(8, 200, 9).to(dtype), anchor, radius, name, BOX)

    def distance(p: Tensor) -> Tensor:
        return norms.norm(p.double() - anchor.double(), name)

    assert (distance(points) > radius).any(), "nothing to round"
    rounded = norms.round_inward(points, anchor, radius, name)
    assert (distance(rounded) <= radius).all()
    assert rounded.dtype == dtype
    unit = torch.finfo(dtype).eps  # of numbers in [1, 2); the points are in the box
    assert (rounded.double() - points.double()).abs().max() <= 4 * unit
    already = distance(points) <= radius
    assert torch.equal(rounded[already], points[already])
    assert rounded.min() >= 0
    assert rounded.max() <= 1


@each_norm
@each_float
def test_round_inward_refuses_what_was_not_projected(name: str, dtype: torch.dtype) -> None:
    anchor = torch.zeros(1, 3, dtype=dtype)
    with pytest.raises(ValueError, match=r"outside the ball of radius 0.5.*project them first"):
        norms.round_inward(anchor + 2, anchor, 0.5, name)


@each_norm
@each_float
@pytest.mark.parametrize("far", [1e2, 1e4])
def test_project_from_far_away_is_within_rounding_of_the_ball(name: str, dtype: torch.dtype, far: float) -> None:
    """A long step of an attack ends far outside: what is projected must not be refused by round_inward."""
    anchor = uniform(9, 50, 30).to(dtype)
    points = anchor + far * norms.dual_maximiser(normal(10, 50, 30).to(dtype), name)
    back = norms.project(points, anchor, 1e-2, name)
    rounded = norms.round_inward(back, anchor, 1e-2, name)
    assert norms.norm(rounded.double() - anchor.double(), name).max() <= 1e-2


# -- operator norms --------------------------------------------------------------------------------------------------


def vertices(n: int, name: str) -> np.ndarray:
    """The extreme points of the unit ball of Linf or L1, one a row."""
    if name == "Linf":
        return np.array(list(itertools.product((-1, 1), repeat=n)))
    return np.vstack([np.eye(n), -np.eye(n)])


def brute_operator_norm(a: np.ndarray, r: str, s: str) -> float:
    """max v.Au over u in the r-ball and v in the dual s-ball: enumerated over a polytope, else a singular value."""
    if r != "L2":
        return max(np.linalg.norm(a @ u, norms.exponent(s)) for u in vertices(a.shape[1], r))
    if s != "L2":
        return max(np.linalg.norm(a.T @ v) for v in vertices(a.shape[0], {"Linf": "L1", "L1": "Linf"}[s]))
    return math.sqrt(np.linalg.eigvalsh(a.T @ a)[-1])


every_pair = pytest.mark.parametrize(("r", "s"), list(itertools.product(NORMS, NORMS)))
some_shapes = pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 2), (6, 7)], ids=str)


@every_pair
@some_shapes
def test_operator_norm_agrees_with_enumeration(r: str, s: str, shape: tuple[int, int]) -> None:
    a = normal(11, *shape)
    assert norms.operator_norm(a, r, s) == pytest.approx(brute_operator_norm(a.numpy(), r, s))


@every_pair
@some_shapes
def test_operator_norm_of_the_transpose_between_the_duals_is_the_same(r: str, s: str, shape: tuple[int, int]) -> None:
    a = normal(12, *shape).float()
    assert norms.operator_norm(a, r, s) == pytest.approx(norms.operator_norm(a.T, norms.dual(s), norms.dual(r)))


def test_operator_norm_of_known_matrices() -> None:
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert norms.operator_norm(hadamard, "Linf", "L1") == 2
    assert norms.operator_norm(hadamard, "L2", "L2") == pytest.approx(math.sqrt(2))
    assert norms.operator_norm(torch.ones(3, 20), "Linf", "L2") == pytest.approx(20 * math.sqrt(3))


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(1, 2, 3)], ids=lambda m: str(m.shape)
)
def test_operator_norm_wants_a_matrix(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="matrix of shape"):
        norms.operator_norm(matrix, "L2", "L2")


def test_operator_norm_refuses_what_it_cannot_enumerate() -> None:
    wide = torch.ones(21, 21)
    with pytest.raises(ValueError, match=r"Linf->L1 .*at most 20"):
        norms.operator_norm(wide, "Linf", "L1")
    assert norms.operator_norm(wide[:2], "Linf", "L1") == 42  # the short side is enumerated
    assert norms.operator_norm(wide, "L1", "Linf") == 1  # no signs needed


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_inward_works_where_the_point_comes_near_zero(name: str, dtype: torch.dtype) -> None:
    """There a unit in the last place of the point is far less than one of the distance."""
    grid = torch.cartesian_prod(torch.arange(1, 17), torch.arange(1, 17)).to(torch.float64) / 16
    anchor = grid.to(dtype)
    radius = norms.norm(anchor.double(), name) * (1 - 2.0**-53)
    inside = norms.round_inward(torch.zeros_like(anchor), anchor, radius, name)
    assert (norms.norm(inside.double() - anchor.double(), name) <= radius).all()
    assert ((inside >= 0) & (inside <= anchor)).all()


@pytest.mark.parametrize("scale", [1e200, 1e-200])
@pytest.mark.parametrize("name", NORMS)
def test_projection_neither_overflows_nor_vanishes(name: str, scale: float) -> None:
    point = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    expected = norms.project(point, torch.zeros_like(point), 1.0, name) * scale
    projected = norms.project(point * scale, torch.zeros_like(point), scale, name)
    torch.testing.assert_close(projected / scale, expected / scale, rtol=1e-12, atol=1e-12)


def test_a_projection_without_an_answer_is_an_error() -> None:
    point = torch.zeros(1, 2)
    for radius in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="radius"):
            norms.project(point, point, radius, "L1")
    with pytest.raises(ValueError, match="anchor leaves box"):
        norms.project(point + 1, point - 1, 1.0, "L2", (0.0, 1.0))


@pytest.mark.parametrize("name", NORMS)
def test_projection_leaves_inner_points_as_they_are(name: str) -> None:
    point = 0.1 * torch.randn(500, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(norms.project(point, torch.zeros_like(point), 10.0, name), point)


@pytest.mark.parametrize("factor", [1.01, 1.5, 3.0])
@pytest.mark.parametrize("name", NORMS)
def test_round_inward_hides_no_missing_projection(name: str, factor: float) -> None:
    anchor = torch.zeros(1, 4)
    point = factor * norms.dual_maximiser(torch.ones(1, 4), name)
    with pytest.raises(ValueError, match="more than rounding"):
        norms.round_inward(point, anchor, 1.0, name)


def test_a_box_that_a_dtype_cannot_resolve_is_one_number_in_it() -> None:
    clamped = norms.clamp(torch.zeros(1, 1, dtype=torch.float16), (0.1, 0.10001))
    assert torch.equal(clamped, torch.full((1, 1), 0.1, dtype=torch.float16))


# -- support ---------------------------------------------------------------------------------------------------------


def supported(g: np.ndarray, anchor: np.ndarray, radius: float, box: tuple[float, float] | None) -> float:
    """The value for "L2", by bisection on t in min(t |g|, w)."""
    room = np.full(len(g), np.inf) if box is None else np.where(g > 0, box[1] - anchor, anchor - box[0])
    size, low, high = np.abs(g), 0.0, radius / np.abs(g[g != 0]).min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(np.minimum(middle * size, room)) <= radius else (low, middle)
    return float(size @ np.minimum(low * size, room))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("box", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("radius", [0.1, 1.0, 1.5, 100.0])
def test_support_of_the_ball_in_a_box(seed: int, box: tuple[float, float] | None, radius: float) -> None:
    rng = np.random.default_rng(seed)
    g, anchor = rng.normal(size=(3, 6)) * 10.0 ** rng.integers(-3, 3, size=(3, 6)), rng.uniform(-1, 1, (3, 6))
    value = norms.support(torch.from_numpy(g), torch.from_numpy(anchor), radius, "L2", box)
    expected = [supported(*pair, radius, box) for pair in zip(g, anchor, strict=True)]
    assert value.numpy() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [3.0, 1e5])
def test_the_support_of_nothing_is_nothing(side: float, dtype: torch.dtype, name: str) -> None:
    zero = torch.zeros(1, 2, dtype=dtype)
    for radius in (0.0, 1.0, 2e4, 1e9):
        for box in (None, (-side, side)):
            assert norms.support(zero, zero, radius, name, box).tolist() == [0.0]


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("box", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e300])
def test_support_grows_with_the_gradient(scale: float, box: tuple[float, float] | None, name: str) -> None:
    g, start = torch.tensor([[3.0, -4.0, 0.0]]).double(), torch.tensor([[0.0, 0.5, 0.0]]).double()
    one = norms.support(g, start, 1.2, name, box)
    assert float(norms.support(scale * g, start, 1.2, name, box) / one / scale) == pytest.approx(1, rel=1e-12)
    if box is not None:  # and with the lengths
        wide = (scale * box[0], scale * box[1])
        assert float(norms.support(g, scale * start, 1.2 * scale, name, wide) / one / scale) == pytest.approx(
            1, rel=1e-12
        )


def test_the_steepest_coordinate_may_have_no_room() -> None:
    g, start = (torch.tensor([row], dtype=torch.float64) for row in ([1.0, 1e-200], [1.0, 0.0]))
    assert norms.support(g, start, 0.5, "L2", (-1, 1)).item() == pytest.approx(0.5e-200, rel=1e-12, abs=0)


@pytest.mark.parametrize("n", [3, 8, 30])
def test_support_where_the_rooms_fill_the_ball_but_for_rounding(n: int) -> None:
    g, start, count = 0.5 + uniform(0, 5000, n) / 2, uniform(1, 5000, n), 5000
    start[:, 0] = 1 - 10 ** (1.2 * uniform(2, count) - 8.6)  # its square is about the rounding of the sum of squares
    g[:, -1] = 0
    room = (1 - start)[:, :-1]
    radius = room.norm(dim=1) * (1 - 1.2e-16 * (4 * uniform(3, count)).floor())
    whole = (g[:, :-1] * room).sum(1)
    torch.testing.assert_close(norms.support(g, start, radius, "L2", BOX), whole, rtol=1e-12, atol=0)
    moved = norms.project(start + 100 * g, start, radius, "L2", BOX)
    assert (norms.norm(moved - start, "L2") >= radius * (1 - 1e-6)).all()


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("radius", [0.3, 1.0, 3.0])
def test_the_gradient_of_the_support_is_its_maximiser(radius: float, name: str) -> None:
    g, start = (uniform(3, 3, 20) - 0.5).requires_grad_(), uniform(4, 3, 20)
    start[:, :5] = 1  # no room where g is positive
    assert torch.autograd.gradcheck(lambda g: norms.support(g, start, radius, name, BOX), g)


# -- least displacement ----------------------------------------------------------------------------------------------


def least_length(g: np.ndarray, anchor: np.ndarray, level: float, name: str, box: tuple[float, float] | None) -> float:
    """The length of the least displacement: a linear program, or a conic one for "L2"."""
    bounds = [(None, None) if box is None else (box[0] - a, box[1] - a) for a in anchor]
    if name == "L2":
        h = cp.Variable(len(g))
        sides = [] if box is None else [h >= box[0] - anchor, h <= box[1] - anchor]
        return float(cp.Problem(cp.Minimize(cp.norm(h)), [g @ h >= level, *sides]).solve(solver=cp.CLARABEL))
    # variables: the displacement, and bounds on its entries, one for all or one for each
    eye = np.eye(len(g))
    spread = eye if name == "L1" else np.ones((len(g), 1))
    solved = linprog(
        np.r_[0 * g, np.ones(spread.shape[1])],
        A_ub=np.r_[np.c_[eye, -spread], np.c_[-eye, -spread], np.r_[-g, np.zeros(spread.shape[1])][None]],
        b_ub=np.r_[np.zeros(2 * len(g)), -level],
        bounds=bounds + [(0, None)] * spread.shape[1],
    )
    return float(solved.fun)


@each_norm
@pytest.mark.parametrize("box", [None, BOX, (-0.5, 1.25)], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1.0])
def test_least_displacement_agrees_with_a_solver(name: str, box: tuple[float, float] | None, share: float) -> None:
    g, anchor = normal(5, 8, 6), uniform(6, 8, 6)
    g[0, 1:4] = 0
    g[1, 2:] = g[1, 2]  # ties
    anchor[2, :3] = (g[2, :3] > 0).double()  # no room within the unit box
    level = share * norms.support(g, anchor, 100.0, "Linf", BOX if box is None else box)
    h = norms.least_displacement(g, anchor, level, name, box)
    expected = [least_length(*each, name, box) for each in zip(g.numpy(), anchor.numpy(), level.tolist(), strict=True)]
    assert norms.norm(h, name).numpy() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close((g * h).sum(1), level, rtol=1e-12, atol=0)
    if box is not None:
        assert ((anchor + h >= box[0] - 1e-15) & (anchor + h <= box[1] + 1e-15)).all()


@each_norm
@pytest.mark.parametrize("box", [None, BOX], ids=str)
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_least_displacement_is_the_inverse_of_the_support(
    name: str, box: tuple[float, float] | None, scale: float
) -> None:
    g, anchor = scale * normal(7, 10, 2, 8), uniform(8, 10, 2, 8)
    level = norms.support(g, anchor, 0.2, name, box)
    h = norms.least_displacement(g, anchor, level, name, box)
    assert norms.norm(h, name).tolist() == pytest.approx([0.2] * 10, rel=1e-12)


@each_norm
@each_float
def test_least_displacement_where_there_is_nothing_to_reach_or_no_way_there(name: str, dtype: torch.dtype) -> None:
    anchor = torch.tensor([[0.25, 0.5, 0.75]], dtype=dtype).expand(4, 3)
    g = torch.tensor([[2.0, 0.0, -1.0], [2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [2.0, 0.0, -1.0]], dtype=dtype)
    level = torch.tensor([0.0, -1.0, 1.0, 9.0], dtype=dtype)
    h = norms.least_displacement(g, anchor, level, name, BOX)
    assert h.dtype == dtype
    assert h[:3].tolist() == [[0.0] * 3] * 3
    assert h[3].tolist() == [0.75, 0.0, -0.75]


def test_least_displacement_where_the_last_slopes_are_within_rounding() -> None:
    g = torch.tensor([[-2.9998377448648036e-11, 2.113974458716393e-11, -0.08663412868630539]], dtype=torch.float64)
    anchor = torch.tensor([[0.6166775713340978, 0.9070428961181717, 0.48557512957986226]], dtype=torch.float64)
    level = torch.tensor([0.04206737827942276], dtype=torch.float64)
    h = norms.least_displacement(g, anchor, level, "Linf", BOX)
    torch.testing.assert_close((g * h).sum(1), level, rtol=1e-14, atol=0)
    # what one unit in the last place of the level is worth, over slopes of 1e-11
    assert norms.norm(h, "Linf").item() == pytest.approx(anchor[0, 2].item(), rel=1e-6)
