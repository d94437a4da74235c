"""Thin cells, twins of hyperplanes, far offsets: bounds hold in exact arithmetic, and exact means exact."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import thin
import torch
from torch import nn

import wda.certificates as C
from wda import cells, rational
from wda.certificates import milp
from wda.certificates.slope import TOLERANCE, agree
from wda.nets import from_module


def linear(W: list, b: list) -> nn.Linear:
    return thin._linear(W, b)


# -- the two networks of the report ------------------------------------------------------------------------------------


def slab(far: float, apart: float) -> nn.Sequential:
    """x to (x, x - far), to (h - 1, h - 1 - apart), margin their difference over `apart`, less 1/2."""
    return nn.Sequential(
        linear([[1.0], [1.0]], [0.0, -far]), nn.ReLU(), linear([[1.0, 0], [1.0, 0]], [-1.0, -1 - apart]), nn.ReLU(),
        linear([[0.0, 0], [1 / apart, -1 / apart]], [0.0, -0.5]),
    )  # fmt: skip


@pytest.mark.parametrize("apart", [1e-2, 1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("far", [1.0, 1e3, 1e6])
def test_a_thin_slab_is_seen_wherever_the_other_units_bend(far: float, apart: float) -> None:
    net, zero = slab(far + 2, apart), torch.zeros(1, 1, dtype=torch.float64)
    slope, start = C.lipschitz(net, "L2", method="cells"), C.initial_slope(net, zero, torch.tensor([0]), "Linf")
    assert slope.exact
    assert slope.value == pytest.approx(1 / apart, rel=1e-12)
    assert start.lower <= slope.value  # the chain
    assert C.lipschitz(net, "Linf", box=(-far, 2 * far), method="milp").upper >= slope.value


def hat(w: float) -> nn.Sequential:
    return nn.Sequential(
        linear([[0.0, 1.0], [-w, 1.0], [-2 * w, 1.0]], [0.0] * 3), nn.ReLU(),
        linear([[0.0] * 3, [1 / w, -2 / w, 1 / w]], [0.0, 0.0]),
    )  # fmt: skip


@pytest.mark.parametrize("norm", thin.NORMS)
@pytest.mark.parametrize("k", [0, 3, 10, 20, 30, 45])
def test_a_thin_cone_is_seen(norm: str, k: int) -> None:
    """In units of w the hat is 1 at t = x, and falls to both sides: l = 1 / |(1, w)|; weights are powers of two."""
    w = 2.0**-k
    expected = {"Linf": 1.0, "L1": 1 / (1 + w), "L2": 1 / math.hypot(1, w)}[norm]
    for method in ("cones", "cells", *(["milp"] if norm != "L2" else [])):
        slope = C.recession_slope(hat(w), norm, [0], method=method)
        assert slope.lower <= expected * (1 + 1e-12)
        assert slope.upper >= expected * (1 - 1e-12)
        if method != "milp":
            assert slope.value == pytest.approx(expected, rel=1e-12)
        elif slope.exact:
            assert slope.value == pytest.approx(expected, rel=TOLERANCE)


# -- the fuzz ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_bounds_hold_and_exact_means_exact(part: int) -> None:
    found = [one for seed in range(1000 + 9 * part, 1009 + 9 * part) for one in thin.run(seed)]
    assert [one for one in found if one["verdict"] not in ("right", "open")] == []
    sure = [one["verdict"] for one in found if "cells" in one["what"] or "cones" in one["what"]]
    assert sure.count("right") == len(sure) > 18


def test_the_oracle_is_right_where_everything_is_known() -> None:
    """A regular arrangement of the line, and the two networks above."""
    net = nn.Sequential(linear([[1.0], [1.0]], [0.0, -2.0]), nn.ReLU(), linear([[0.0, 0], [1.0, 3.0]], [0.0, 0.0]))
    for norm in thin.NORMS:
        assert thin.lipschitz(net, norm, None) == thin.recession(net, norm) == 4
        assert thin.lipschitz(net, norm, (-1.0, 1.0)) == 1
    assert len(thin._with_inside(net, None)) == 3
    assert thin.recession(hat(2.0**-20), "L1") == pytest.approx(1 / (1 + 2.0**-20), rel=1e-15)
    assert thin.judge(C.Slope(1.0, 1.0, "x"), 1.1) == "upper bound too low"
    assert thin.judge(C.Slope(1.2, 1.3, "x"), 1.1) == "lower bound too high"
    assert thin.judge(C.Slope(1.0, 1.3, "x"), 1.1) == "open"
    assert thin.judge(C.Slope(1.1, 1.1, "x"), 1.1) == "right"


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_the_chain_of_slopes(seed: int) -> None:
    """l_N <= l <= Lambda <= L on networks with thin cells, for what is known of each."""
    _, net = thin.network(seed)
    n = int(net[0].in_features)
    bend = -float(net[0].bias[0]) / float(net[0].weight[0].sum())
    x, y = torch.full((1, n), bend - 0.3, dtype=torch.float64), torch.tensor([0])
    for norm in ("Linf", "L1"):
        chain = [
            C.sample_slope(net, x, y, norm), C.recession_slope(net, norm, [0], method="cones"),
            C.initial_slope(net, x, y, norm), C.lipschitz(net, norm, labels=[0], method="cells"),
        ]  # fmt: skip
        assert all(one.lower <= one.upper for one in chain)
        assert all(a.lower <= b.upper * (1 + 1e-9) for a, b in itertools.combinations(chain, 2))


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-200, 1e-60, 1e60, 1e150])
def test_weights_whose_products_are_no_float64(scale: float) -> None:
    """A unit that is on or off by a number that underflows or overflows is so all the same."""
    g = np.random.default_rng(0)
    first, second = g.normal(size=(3, 2)), g.normal(size=(3, 3))
    bias = g.normal(size=3)
    plain = nn.Sequential(
        linear(first, bias), nn.ReLU(), linear(second, 0 * bias), nn.ReLU(), linear(second[:2], [0, 0])
    )
    other = nn.Sequential(
        linear(first * scale, bias * scale), nn.ReLU(), linear(second * scale, 0 * bias), nn.ReLU(),
        linear(second[:2], [0, 0]),
    )  # fmt: skip
    with np.errstate(all="ignore"):
        found = cells.enumerate(other).masks
    assert {tuple(m) for m in found.tolist()} == {tuple(m) for m in cells.enumerate(plain).masks.tolist()}


@pytest.mark.parametrize("apart", [1e-3, 1e-8, 1e-13, 2.0**-52])
def test_units_that_differ_are_not_merged(apart: float) -> None:
    """One slab, or one wedge, between two hyperplanes; none between two that are the same."""
    for W, b in (([[1.0, 2.0], [1.0, 2.0]], [0.0, apart]), ([[1.0, 2.0], [1.0, 2.0 + 2 * apart]], [0.0, 0.0])):
        listed = cells.enumerate(nn.Sequential(linear(W, b), nn.ReLU(), thin._head([[1.0, -1.0]])))
        assert len(listed) == (3 if b[1] else 4)
        assert all(cells.has_inside(listed.dense, mask) for mask in listed.masks)
    same = nn.Sequential(linear([[1.0, 2.0], [-3.0, -6.0]], [0.5, -1.5]), nn.ReLU(), thin._head([[1.0, -1.0]]))
    assert len(cells.enumerate(same)) == 2


@pytest.mark.parametrize("norm", ["Linf", "L1"])
def test_what_a_mixed_integer_program_cannot_see_widens_its_bound(norm: str) -> None:
    """The margin is 1e-9 relu(x1) less relu(x2): its growth is below what the solver takes for 0."""
    for small in (1e-6, 1e-9, 1e-12):
        net = nn.Sequential(linear(np.eye(2), [0.0, 0.0]), nn.ReLU(), thin._head([[small, -1.0]]))
        slope = milp.recession(from_module(net).dense, norm, [(0, 1)])
        assert slope.lower <= small * (1 + 1e-12)
        assert slope.upper >= small


# -- exactness has one meaning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.0, 0.5 * TOLERANCE, 2 * TOLERANCE, -2 * TOLERANCE, math.nan])
def test_everything_that_is_exact_means_the_same(gap: float) -> None:
    import wda

    low, high = torch.tensor([1.0, 1e-12, 1e12]).double(), torch.tensor([1.0, 1e-12, 1e12]).double() * (1 + gap)
    expected = abs(gap) < TOLERANCE
    assert agree(low, high).tolist() == [expected] * 3
    assert C.Nearest(low, high, torch.zeros(3, 1)).exact.tolist() == [expected] * 3
    assert wda.Bracket(wda.Threat(), low, high).exact.tolist() == [expected] * 3
    assert [C.Slope(float(a), float(b), "x").exact for a, b in zip(low, high, strict=True)] == [expected] * 3
    assert agree(0.0, 0.0)
    assert agree(math.inf, math.inf)
    assert not agree(0.0, 1e-300)


# -- rational arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_linear_programs_in_integers(seed: int) -> None:
    """Against elimination, and against a solver in floating point where nothing is close."""
    from scipy.optimize import linprog

    g = np.random.default_rng(seed)
    n, m = int(g.integers(1, 4)), int(g.integers(1, 7))
    rows = g.integers(-3, 4, (m, n + 1)).astype(object)
    point = rational.inside(rows)
    assert (point is not None) == thin.has_inside([[Fraction(v) for v in row] for row in rows])
    assert point is None or (rows @ point > 0).all()
    A, b, c = g.integers(-4, 5, (m, n)), g.integers(0, 5, m), g.integers(-4, 5, n)
    one = np.eye(n, dtype=int)
    A, b = np.concatenate([A, one, -one]), np.concatenate([b, [2] * 2 * n])
    value, x = rational.maximise(*(array.astype(object) for array in (c, A, b)))
    solved = linprog(-c, A, b, bounds=(None, None))
    assert float(value) == pytest.approx(-solved.fun, abs=1e-9)
    assert value == sum(int(a) * v for a, v in zip(c, x, strict=True))
    assert all(sum(int(a) * v for a, v in zip(row, x, strict=True)) <= most for row, most in zip(A, b, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_projections_in_integers(seed: int) -> None:
    """What is left is orthogonal to the projection, and in the polar cone."""
    g = np.random.default_rng(seed)
    n, m = int(g.integers(1, 4)), int(g.integers(0, 7))
    cone, target = g.integers(-3, 4, (m, n)).astype(object), g.integers(-5, 6, n).astype(object)
    u = rational.projection(target, cone)
    assert all(sum(int(a) * v for a, v in zip(row, u, strict=True)) <= 0 for row in cone)
    rest = [int(t) - v for t, v in zip(target, u, strict=True)]
    assert sum(a * b for a, b in zip(rest, u, strict=True)) == 0
    # Farkas: no direction of the cone has a positive product with the rest
    one = np.eye(n, dtype=int).astype(object)
    below = math.lcm(*(v.denominator for v in rest))
    best, _ = rational.maximise(
        np.array([int(v * below) for v in rest], object), np.concatenate([cone, one, -one]),
        np.array([0] * m + [1] * 2 * n, object),
    )  # fmt: skip
    assert best == 0


def test_an_unbounded_program_says_so() -> None:
    with pytest.raises(rational.Unbounded):
        rational.maximise(np.array([1], object), np.array([[-1]], object), np.array([0], object))
