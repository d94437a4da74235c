r"""The graph of a ReLU network as rows of a mixed-integer linear program (HiGHS).

A unit :math:`a = [z]_+` with :math:`l \le z \le u` becomes a binary d, which says whether it is on, and

.. math:: a \ge 0, \qquad a \ge z, \qquad a \le u d, \qquad a \le z - l (1 - d)

(Tjeng, Xiao & Tedrake 2019, eq. 4). Inputs and hidden units are first scaled to [-1, 1], so that the solver's absolute
tolerances, about 1e-6, mean the same in every network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from wda.nets import Array, Dense, Mask

__all__ = [
    "ACCURACY",
    "Columns",
    "Graph",
    "Optimum",
    "Program",
    "Ranges",
    "Terms",
    "graph",
    "largest",
    "negative",
    "scaled",
    "signs",
    "unit_ball",
]

Columns = NDArray[np.intp]
Terms = Sequence[tuple[Array, Columns]]
# what the pre-activations of each layer lie between
Ranges = Sequence[tuple[Array, Array]]

# the solver's relative accuracy
ACCURACY = 1e-6


@dataclass(frozen=True)
class Optimum:
    """What the solver found.

    Attributes
    ----------
    bound : float
        At least the maximum; -inf if no point is feasible.
    point : array, or None
        The best feasible point, if one was found.

    Examples
    --------
    >>> program = Program()
    >>> v = program.variables(np.zeros(1), np.ones(1))
    >>> program.maximise([(np.ones(1), v)], seconds=10)
    Optimum(bound=1.0, point=array([1.]))
    """

    bound: float
    point: Array | None


@dataclass
class Program:
    r"""A mixed-integer linear program that grows by blocks of variables and of rows.

    A sum of terms ``[(matrix, columns), ...]`` stands for :math:`\sum_t M_t v_{C_t}`, with v the variables.

    Examples
    --------
    >>> program = Program()
    >>> v = program.variables(np.zeros(2), np.ones(2), integer=True)
    >>> program.rows([(np.array([[2.0, 2.0]]), v)], most=3.0)
    >>> program.maximise([(np.ones(2), v)], seconds=10).bound
    1.0
    >>> program.fixed(v[:1], np.zeros(1)).maximise([(np.ones(2), v)], seconds=10).point
    array([0., 1.])

    Bounds of a sum, from those of the variables and from the rows:

    >>> terms = [(np.array([[1.0, 1.0]]), v)]
    >>> program.range(terms, np.zeros(1))
    (array([0.]), array([2.]))
    >>> [round(float(side[0]), 3) for side in program.tightened(terms, np.array([-1.0]))]
    [-1.0, 0.5]

    The same program around a point:

    >>> program.fixed(v, np.ones(2)).about(np.ones(2), zoom=1e6).upper
    array([0., 0.])

    A copy grows on its own:

    >>> other = program.copy()
    >>> _ = other.variables(np.zeros(1), np.ones(1))
    >>> len(other.lower), len(program.lower)
    (3, 2)
    """

    lower: Array = field(default_factory=lambda: np.empty(0))
    upper: Array = field(default_factory=lambda: np.empty(0))
    integer: Mask = field(default_factory=lambda: np.empty(0, bool))
    blocks: tuple[tuple[Terms, Array, Array], ...] = ()

    def copy(self) -> Program:
        """A program that grows on its own from here."""
        return replace(self, integer=self.integer.copy())

    def fixed(self, columns: Columns, values: Array | Mask) -> Program:
        """A copy in which some variables have given values."""
        other = self.copy()
        other.lower, other.upper = self.lower.copy(), self.upper.copy()
        other.lower[columns] = other.upper[columns] = values
        return other

    def about(self, point: Array, zoom: float) -> Program:
        """The program of ``zoom * (v - point)``: the solver's tolerances are that much smaller for v."""
        other, blocks = self.copy(), []
        other.lower, other.upper = zoom * (self.lower - point), zoom * (self.upper - point)
        for terms, least, most in self.blocks:
            here = sum(matrix @ point[columns] for matrix, columns in terms)
            blocks.append((terms, zoom * (least - here), zoom * (most - here)))
        other.blocks = tuple(blocks)
        return other

    def variables(self, lower: Array, upper: Array, integer: bool = False) -> Columns:
        """Add variables between `lower` and `upper` (m,); returns their columns."""
        first = len(self.lower)
        self.lower = np.append(self.lower, lower)
        self.upper = np.append(self.upper, upper)
        self.integer = np.append(self.integer, np.full(len(lower), integer))
        return np.arange(first, len(self.lower))

    def rows(self, terms: Terms, least: Array | float = -math.inf, most: Array | float = math.inf) -> None:
        """Require ``least <= sum of the terms <= most``, for m rows at once."""
        m = len(terms[0][0])
        self.blocks += ((terms, np.broadcast_to(least, m), np.broadcast_to(most, m)),)

    def range(self, terms: Terms, constant: Array) -> tuple[Array, Array]:
        """What `constant` (m,) plus the terms lies between, from the bounds of the variables alone."""
        low, high = constant.copy(), constant.copy()
        for matrix, columns in terms:
            positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
            low += positive @ self.lower[columns] + negative @ self.upper[columns]
            high += positive @ self.upper[columns] + negative @ self.lower[columns]
        return low, high

    def tightened(self, terms: Terms, constant: Array, deadline: float = math.inf) -> tuple[Array, Array]:
        """As `range`, tightened where the sign is open by the linear program without integrality."""
        low, high = self.range(terms, constant)
        for i in np.flatnonzero((low < 0) & (high > 0)) if self.blocks else ():
            row = [(matrix[i], columns) for matrix, columns in terms]
            turned = [(-matrix[i], columns) for matrix, columns in terms]
            slack = ACCURACY * (high[i] - low[i])
            top = self.maximise(row, deadline - time.monotonic(), relaxed=True).bound
            bottom = -self.maximise(turned, deadline - time.monotonic(), relaxed=True).bound
            low[i], high[i] = max(low[i], constant[i] + bottom - slack), min(high[i], constant[i] + top + slack)
        return low, high

    def maximise(self, terms: Terms, seconds: float, relaxed: bool = False) -> Optimum:
        """Maximise a sum of terms with one row each (vectors), within some seconds.

        Parameters
        ----------
        terms : sequence of (array (c,), columns (c,))
        seconds : float
            Where time runs out the bound is the solver's dual bound.
        relaxed : bool
            Let integer variables take every value between their bounds.
        """
        if seconds <= 0:
            return Optimum(math.inf, None)
        cost = np.zeros(len(self.lower))
        for row, columns in terms:
            cost[columns] -= row
        mixed = bool(self.integer.any()) and not relaxed
        deadline = time.monotonic() + seconds
        for presolve in (True, False):  # in degenerate programs HiGHS may fail on what its presolve leaves
            solved = milp(
                cost,
                integrality=self.integer.astype(int) if mixed else None,
                bounds=Bounds(self.lower, self.upper),
                constraints=self._constraints(),
                options={"time_limit": seconds, "mip_rel_gap": 0.0, "presolve": presolve},
            )
            if solved.status != 4 or (seconds := deadline - time.monotonic()) <= 0:
                break
        if solved.status == 2:
            return Optimum(-math.inf, None)
        trusted = (0, 1) if mixed else (0,)  # solved; or out of time, where the dual bound of branch and bound holds
        bound = (solved.mip_dual_bound if mixed else solved.fun) if solved.status in trusted else None
        return Optimum(-bound if bound is not None and math.isfinite(bound) else math.inf, solved.x)

    def _constraints(self) -> list[LinearConstraint]:
        if not self.blocks:
            return []
        data, at, of, first = [], [], [], 0
        for terms, least, _ in self.blocks:
            for matrix, columns in terms:
                row, column = np.nonzero(matrix)
                data.append(matrix[row, column])
                at.append(row + first)
                of.append(columns[column])
            first += len(least)
        entries = np.concatenate(data), (np.concatenate(at), np.concatenate(of))
        matrix = coo_array(entries, shape=(first, len(self.lower))).tocsr()
        least, most = (np.concatenate([block[side] for block in self.blocks]) for side in (1, 2))
        return [LinearConstraint(matrix, least, most)]


@dataclass(frozen=True)
class Graph:
    """The graph of a network over a set of inputs, inside a program.

    Attributes
    ----------
    program : Program
    dense : Dense
        The network.
    values : list of columns
        The input, then the units of each hidden layer.
    masks : list of columns
        The binaries of each hidden layer; those of units of known sign are fixed.

    Examples
    --------
    A margin of the network is a sum of terms in the values; its largest value over the unit ball, and the mask there:

    >>> one, program = np.ones((1, 1)), Program()
    >>> net = Dense(((one,), (0 * one, one)), (np.zeros(1), np.zeros(1)), ("relu",))
    >>> g = graph(program, net, unit_ball(program, 1, "Linf"))
    >>> best = program.maximise([(np.ones(1), g.values[1])], seconds=10)
    >>> best.bound, g.mask(best.point)
    (1.0, array([ True]))

    With that mask excluded:

    >>> g.exclude(program, g.mask(best.point), np.array([True]))
    >>> abs(program.maximise([(np.ones(1), g.values[1])], seconds=10).bound)
    0.0
    """

    program: Program
    dense: Dense
    values: list[Columns]
    masks: list[Columns]

    @property
    def binaries(self) -> Columns:
        """The columns of all binaries, (units in all,)."""
        return np.concatenate([np.empty(0, np.intp), *self.masks])

    def mask(self, point: Array) -> Mask:
        """The mask (units in all,) that a point of the program has chosen."""
        return np.asarray(point[self.binaries] > 0.5)

    def exclude(self, program: Program, mask: Mask, units: Mask) -> None:
        """Forbid that these `units` be as they are in `mask`."""
        sign = np.where(mask, -1.0, 1.0)[units]
        program.rows([(sign[None], self.binaries[units])], least=1.0 - mask[units].sum())


def unit_ball(program: Program, n: int, norm: str) -> Columns:
    r"""Add variables u in :math:`\mathbb R^n` with :math:`\|u\|_r \le 1`, for the norms "Linf" and "L1".

    Examples
    --------
    >>> program = Program()
    >>> u = unit_ball(program, 3, "L1")
    >>> round(program.maximise([(np.array([1.0, -2.0, 1.0]), u)], seconds=10).bound, 9)
    2.0
    """
    u = program.variables(-np.ones(n), np.ones(n))
    if norm == "L1":
        up, down = (program.variables(np.zeros(n), np.ones(n)) for _ in range(2))
        program.rows([(np.eye(n), u), (-np.eye(n), up), (np.eye(n), down)], least=0.0, most=0.0)
        program.rows([(np.ones((1, n)), up), (np.ones((1, n)), down)], most=1.0)
    return u


def scaled(dense: Dense, centre: Array, radius: float, ranges: Ranges | None = None) -> Dense:
    r"""The network as a function of t, with :math:`x = c + \rho t`, and each hidden unit divided by its largest size.

    The masks at t are those at x, and so are the logits; for :math:`t \in [-1, 1]^n` every pre-activation lies in
    [-1, 1], by interval arithmetic or by the `ranges` given for each layer.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> net = scaled(Dense(((one,), (0 * one, one)), (np.zeros(1), np.zeros(1)), ("relu",)), np.zeros(1), 5.0)
    >>> net.weights[0][0], net.logits(np.ones((1, 1)))
    (array([[1.]]), array([[5.]]))
    """
    weights = [[row[0] * radius, *row[1:]] for row in dense.weights]
    bias = [b + row[0] @ centre for b, row in zip(dense.bias, dense.weights, strict=True)]
    program = Program()
    values = [program.variables(-np.ones(dense.n), np.ones(dense.n))]
    for h in range(len(dense.units)):
        low, high = program.range(list(zip(weights[h], values, strict=True)), bias[h]) if ranges is None else ranges[h]
        size = largest(low, high)
        weights[h] = [W / size[:, None] for W in weights[h]]
        bias[h] = bias[h] / size
        for later in weights[h + 1 :]:
            later[h + 1] = later[h + 1] * size
        values.append(program.variables(np.maximum(low / size, 0), np.maximum(high / size, 0)))
    return Dense(tuple(tuple(row) for row in weights), tuple(bias), dense.activations)


def largest(low: Array, high: Array) -> Array:
    """The largest absolute value between `low` and `high`; 1 where it is 0.

    Examples
    --------
    >>> largest(np.array([-3.0, 0.0]), np.array([1.0, 0.0]))
    array([3., 1.])
    """
    size = np.maximum(-low, high)
    return np.where(size > 0, size, 1.0)


def graph(
    program: Program, dense: Dense, x: Columns, deadline: float = math.inf, ranges: Ranges | None = None
) -> Graph:
    """Add the hidden units of a ReLU network at the input `x`, layer by layer.

    Pre-activations lie in the `ranges` given for each layer. Without these they are bounded by interval arithmetic and,
    where the program so far has rows, by its linear relaxation; after the `deadline` (of `time.monotonic`) by interval
    arithmetic alone.

    Examples
    --------
    >>> one, program = np.ones((1, 1)), Program()
    >>> net = Dense(((one,), (0 * one, one)), (np.zeros(1), np.zeros(1)), ("relu",))
    >>> g = graph(program, net, unit_ball(program, 1, "Linf"))
    >>> program.maximise([(np.ones(1), g.values[1])], seconds=10).bound
    1.0
    """
    result = Graph(program, dense, [x], [])
    for h, (weights, bias) in enumerate(zip(dense.weights[:-1], dense.bias[:-1], strict=True)):
        before = list(zip(weights, result.values, strict=True))
        low, high = program.tightened(before, bias, deadline) if ranges is None else ranges[h]
        d = program.variables(*signs(low, high), integer=True)
        a = program.variables(np.maximum(low, 0), np.maximum(high, 0))
        program.rows(above := [(np.eye(len(bias)), a), *negative(before)], least=bias)
        program.rows([*above, (-np.diag(low), d)], most=bias - low)
        program.rows([(np.eye(len(bias)), a), (-np.diag(high), d)], most=0.0)
        result.values.append(a)
        result.masks.append(d)
    return result


def signs(low: Array, high: Array) -> tuple[Array, Array]:
    """The bounds of the binaries "is positive" of quantities between `low` and `high`.

    Examples
    --------
    >>> signs(np.array([-1.0, 0.0, -2.0]), np.array([1.0, 3.0, 0.0]))
    (array([0., 1., 0.]), array([1., 1., 0.]))
    """
    return ((low >= 0) & (high > 0)).astype(float), (high > 0).astype(float)


def negative(terms: Terms) -> Terms:
    """The terms of the opposite number.

    Examples
    --------
    >>> negative([(np.ones(1), np.array([0]))])
    [(array([-1.]), array([0]))]
    """
    return [(-matrix, columns) for matrix, columns in terms]
