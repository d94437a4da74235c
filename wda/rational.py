r"""Linear inequalities decided in exact rational arithmetic: what floating point leaves open.

Every float64 number is a rational one, so that what holds of a network's weights holds exactly or not at all. Numbers
are Python integers in arrays of dtype object; a row of integers stands for all its positive multiples.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Integers", "Unbounded", "canonical", "inside", "integers", "maximise", "projection", "solve"]

Integers = NDArray[Any]  # of dtype object


class Unbounded(ArithmeticError):
    """A linear program has points of any value."""


def integers(*arrays: NDArray[np.float64]) -> tuple[int, list[Integers]]:
    """Arrays of floats as integers in units of :math:`2^{-k}`, and k.

    Examples
    --------
    >>> integers(np.array([0.5, 3.0]), np.array([0.25]))
    (2, [array([2, 12], dtype=object), array([1], dtype=object)])
    """
    pairs = [[float(value).as_integer_ratio() for value in array.ravel()] for array in arrays]
    shift = max((below.bit_length() - 1 for array in pairs for _, below in array), default=0)
    scaled = []
    for array, ratios in zip(arrays, pairs, strict=True):
        whole = np.empty(len(ratios), object)
        whole[:] = [above << (shift - below.bit_length() + 1) for above, below in ratios]
        scaled.append(whole.reshape(array.shape))
    return shift, scaled


def canonical(row: Integers) -> tuple[tuple[int, ...], bool]:
    """A key of the hyperplane of a row [a, b], :math:`a \\cdot x + b = 0`, and whether the key has its sides exchanged.

    Examples
    --------
    >>> canonical(np.array([-2, 0, 4], object)), canonical(np.array([1, 0, -2], object))
    (((1, 0, -2), True), ((1, 0, -2), False))
    """
    divisor = int(np.gcd.reduce(row))
    flipped = bool(next(value for value in row if value) < 0)
    return tuple(int(value) // (-divisor if flipped else divisor) for value in row), flipped


def maximise(cost: Integers, A: Integers, b: Integers) -> tuple[Fraction, list[Fraction]]:
    """The maximum of ``cost @ x`` over ``A @ x <= b``, which holds at 0, and a point that has it.

    The simplex method with Bland's rule; all entries of the tableau have one denominator.

    Raises
    ------
    Unbounded
        There is none.

    Examples
    --------
    >>> A, b = np.array([[1, 1], [3, 0], [0, -1]], object), np.array([2, 4, 0], object)
    >>> maximise(np.array([2, 1], object), A, b)
    (Fraction(10, 3), [Fraction(4, 3), Fraction(2, 3)])
    """
    m, n = A.shape
    table = np.empty((m + 1, n + 1), object)
    table[:m, :n], table[:m, n], table[m, :n], table[m, n] = A, b, -cost, 0
    basic, free, below = list(range(n, n + m)), list(range(n)), 1  # variables 0 to n - 1 have no sign
    sign = [1] * n
    while True:
        # variables without a sign first: once in the basis they stay there
        enter = min(
            (j for j in range(n) if table[m, j] < 0 or (free[j] < n and table[m, j] > 0)),
            key=free.__getitem__,
            default=None,
        )
        if enter is None:
            break
        if table[m, enter] > 0:
            table[:, enter] = -table[:, enter]
            sign[free[enter]] *= -1
        rows = [i for i in range(m) if basic[i] >= n and table[i, enter] > 0]
        if not rows:
            raise Unbounded
        leave = rows[0]
        for i in rows[1:]:
            mine, least = table[i, n] * table[leave, enter], table[leave, n] * table[i, enter]
            if mine < least or (mine == least and basic[i] < basic[leave]):
                leave = i
        pivot, column, row = table[leave, enter], table[:, enter].copy(), table[leave].copy()
        table = (table * pivot - np.outer(column, row)) // below
        table[:, enter], table[leave] = -column, row
        table[leave, enter], below = below, pivot
        basic[leave], free[enter] = free[enter], basic[leave]
    x = [Fraction(0)] * n
    for i, variable in enumerate(basic):
        if variable < n:
            x[variable] = sign[variable] * Fraction(int(table[i, n]), below)
    return Fraction(int(table[m, n]), below), x


def inside(rows: Integers) -> Integers | None:
    """A point with ``rows @ [x, 1] > 0`` in every row: integers [x z, z] with z > 0; None if there is none.

    Examples
    --------
    >>> inside(np.array([[1, 0], [-1, 3]], object)) is None, inside(np.array([[1, 0], [-1, 0]], object)) is None
    (False, True)
    """
    m, n = len(rows), rows.shape[1] - 1
    # x and its denominator z, and how far they are inside all half-spaces, which can be scaled up to 1 or is 0
    A = np.zeros((m + 2, n + 2), object)
    A[:m, : n + 1], A[m, n] = -rows, -1
    A[:, n + 1] = 1
    bounds, cost = np.zeros(m + 2, object), np.zeros(n + 2, object)
    bounds[-1] = cost[-1] = 1
    value, point = maximise(cost, A, bounds)
    if not value:
        return None
    below = int(np.lcm.reduce(np.array([number.denominator for number in point], object)))
    return np.array([int(number * below) for number in point[:-1]], object)


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """The solution of a square system of linear equations; None if it is singular.

    Examples
    --------
    >>> solve([[Fraction(2), Fraction(1)], [Fraction(1), Fraction(1)]], [Fraction(3), Fraction(2)])
    [Fraction(1, 1), Fraction(1, 1)]
    """
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    n = len(rows)
    for k in range(n):
        lead = next((i for i in range(k, n) if rows[i][k]), None)
        if lead is None:
            return None
        rows[k], rows[lead] = rows[lead], rows[k]
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for i in range(n):
            if i != k and rows[i][k]:
                factor = rows[i][k]
                rows[i] = [value - factor * other for value, other in zip(rows[i], rows[k], strict=True)]
    return [row[-1] for row in rows]


def projection(g: Integers, cone: Integers) -> list[Fraction]:
    r"""The Euclidean projection of g onto :math:`\{u : Au \le 0\}`, by the active sets of Lawson and Hanson.

    Examples
    --------
    >>> projection(np.array([3, 4], object), np.array([[0, 1]], object))
    [Fraction(3, 1), Fraction(0, 1)]
    """
    rows = [[Fraction(value) for value in row] for row in cone]
    target = [Fraction(value) for value in g]
    active: list[int] = []
    weight: dict[int, Fraction] = {}

    def rest() -> list[Fraction]:
        return [t - sum((weight[i] * rows[i][k] for i in active), Fraction(0)) for k, t in enumerate(target)]

    while True:
        u = rest()
        gains = {i: _dot(row, u) for i, row in enumerate(rows) if i not in active}
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] <= 0:
            return u
        active.append(best)
        weight[best] = Fraction(0)
        while True:
            found = solve(
                [[_dot(rows[i], rows[j]) for j in active] for i in active], [_dot(rows[i], target) for i in active]
            )
            assert found is not None  # a row with a positive gain does not depend on the others
            wanted = dict(zip(active, found, strict=True))
            if min(found) > 0:
                weight = wanted
                break
            step = min(weight[i] / (weight[i] - wanted[i]) for i in active if wanted[i] <= 0)
            weight = {i: weight[i] + step * (wanted[i] - weight[i]) for i in active}
            active = [i for i in active if weight[i] > 0]


def _dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))
