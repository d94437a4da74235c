r"""Exact slopes of ReLU networks too large to enumerate, by mixed-integer linear programs (HiGHS).

A unit :math:`a = [z]_+` with :math:`l \le z \le u` becomes a binary d, which says whether it is on, and

.. math:: a \ge 0, \qquad a \ge z, \qquad a \le u d, \qquad a \le z - l (1 - d)

(Tjeng, Xiao & Tedrake 2019, eq. 4). The gradient of a logit runs backwards through the same binaries: behind a unit it
is :math:`q = d y`, the product of a binary and a bounded variable, which four inequalities of the same kind describe
(Jordan & Dimakis 2020, LipMIP). Inputs and hidden units are first scaled to [-1, 1], so that the solver's absolute
tolerances, about 1e-6, mean the same in every network.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array

from wda.certificates.slope import Slope
from wda.checks import choice, number
from wda.errors import NotPiecewiseAffine
from wda.nets import Array, Dense, Mask

__all__ = ["Graph", "Optimum", "Program", "graph", "lipschitz", "recession", "scaled", "unit_ball"]

Columns = NDArray[np.intp]
Terms = Sequence[tuple[Array, Columns]]
Pair = tuple[int, int]

# the solver's relative accuracy: bounds this close count as equal, and a bound that stays open is widened by it
_ACCURACY = 1e-6
# a unit that is on or off by less than this, in scaled units, may be so by rounding
_ROUNDING = 1e-11
# how many points are tried before the first program
_SAMPLES = 512
# the first try of a program may use up this part of the time left
_SHARES = 16


@dataclass(frozen=True)
class Optimum:
    """What the solver found: an upper bound of the maximum, -inf if no point is feasible, and the best point if any."""

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

    def tightened(self, terms: Terms, constant: Array, deadline: float) -> tuple[Array, Array]:
        """As `range`, tightened where the sign is open by the linear program without integrality."""
        low, high = self.range(terms, constant)
        for i in np.flatnonzero((low < 0) & (high > 0)) if self.blocks else ():
            row = [(matrix[i], columns) for matrix, columns in terms]
            turned = [(-matrix[i], columns) for matrix, columns in terms]
            slack = _ACCURACY * (high[i] - low[i])
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
        bound = solved.mip_dual_bound if mixed else solved.fun if solved.status == 0 else None
        return Optimum(math.inf if bound is None else -bound, solved.x)

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


def scaled(dense: Dense, centre: Array, radius: float) -> Dense:
    r"""The network as a function of t, with :math:`x = c + \rho t`, and each hidden unit divided by its largest size.

    The masks at t are those at x, and so are the logits; for :math:`t \in [-1, 1]^n` every pre-activation lies in
    [-1, 1], by interval arithmetic.

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
        low, high = program.range(list(zip(weights[h], values, strict=True)), bias[h])
        size = np.maximum(-low, high)
        size[size <= 0] = 1.0
        weights[h] = [W / size[:, None] for W in weights[h]]
        bias[h] = bias[h] / size
        for later in weights[h + 1 :]:
            later[h + 1] = later[h + 1] * size
        values.append(program.variables(np.maximum(low / size, 0), np.maximum(high / size, 0)))
    return Dense(tuple(tuple(row) for row in weights), tuple(bias), dense.activations)


def graph(program: Program, dense: Dense, x: Columns, deadline: float = math.inf) -> Graph:
    """Add the hidden units of a ReLU network at the input `x`, layer by layer.

    Pre-activations are bounded by interval arithmetic and, where the program so far has rows, by its linear
    relaxation; after the `deadline` (of `time.monotonic`) by interval arithmetic alone.

    Examples
    --------
    >>> one, program = np.ones((1, 1)), Program()
    >>> net = Dense(((one,), (0 * one, one)), (np.zeros(1), np.zeros(1)), ("relu",))
    >>> g = graph(program, net, unit_ball(program, 1, "Linf"))
    >>> program.maximise([(np.ones(1), g.values[1])], seconds=10).bound
    1.0
    """
    result = Graph(program, dense, [x], [])
    for weights, bias in zip(dense.weights[:-1], dense.bias[:-1], strict=True):
        before = list(zip(weights, result.values, strict=True))
        low, high = program.tightened(before, bias, deadline)
        d = program.variables(*_open(low, high), integer=True)
        a = program.variables(np.maximum(low, 0), np.maximum(high, 0))
        program.rows(above := [(np.eye(len(bias)), a), *_negative(before)], least=bias)
        program.rows([*above, (-np.diag(low), d)], most=bias - low)
        program.rows([(np.eye(len(bias)), a), (-np.diag(high), d)], most=0.0)
        result.values.append(a)
        result.masks.append(d)
    return result


def _open(low: Array, high: Array) -> tuple[Array, Array]:
    """The bounds of the binaries "is positive" of quantities between `low` and `high`."""
    return ((low >= 0) & (high > 0)).astype(float), (high > 0).astype(float)


def _negative(terms: Terms) -> Terms:
    return [(-matrix, columns) for matrix, columns in terms]


@dataclass(frozen=True)
class _Task:
    """One program of a search: maximise ``constant`` plus the terms, which is at most ``bound``."""

    bound: float
    pair: Pair
    program: Program
    terms: Terms
    constant: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Tasks that are made when their turn comes, which may take until a deadline; no optimum exceeds ``bound``."""

    bound: float
    tasks: Callable[[float], Iterable[_Task]]


@dataclass
class _Best:
    """The largest value seen so far."""

    value: float
    pair: Pair
    direction: Array | None = None

    def see(self, value: float, pair: Pair, direction: Array | None = None) -> None:
        if value > self.value:
            self.value, self.pair, self.direction = value, pair, direction


def lipschitz(
    dense: Dense, norm: str, pairs: Sequence[Pair], box: tuple[float, float], time_limit: float = 60.0
) -> Slope:
    r"""The Lipschitz constant of the margins over a box: the largest :math:`\|J_D^T(e_j - e_k)\|_s` of its cells.

    One program per pair for "Linf" (s = 1), with a binary for the sign of each coordinate of the gradient; one per
    pair, coordinate and sign for "L1" (s = infinity). They run in the order of their a-priori bounds, each has to beat
    the best value so far, and those that cannot are left out. A program allows a mask wherever the *closure* of its
    cell would be; where several pre-activations vanish at once that may be a mask without a cell (for
    relu(x) - relu(-x) both units on at x = 0, with slope 2 instead of 1). So each mask found is looked for by a
    linear program; if its cell has no interior point in the box, the units that contradict each other, by its dual
    solution, are excluded as they are, and the search goes on.

    Parameters
    ----------
    dense : Dense
        A ReLU network.
    norm : {"Linf", "L1"}
        Of the input.
    pairs : sequence of (label, rival)
    box : (float, float)
        low < high: the inputs are :math:`[low, high]^n`.
    time_limit : float
        Seconds, at least 0.

    Returns
    -------
    Slope
        ``lower`` is the value on a cell that was found, in float64. ``upper`` is the same number where the solver
        proved that no other is larger, to a relative 1e-6; else its dual bound, widened by as much.

    Raises
    ------
    NotPiecewiseAffine
        An activation is not ReLU.
    ValueError
        The norm is "L2", the box is empty, or a pair is not one of two classes.

    Examples
    --------
    >>> from torch import nn
    >>> from wda.nets import from_module
    >>> net = from_module(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> slope = lipschitz(net.dense, "Linf", [(0, 1), (0, 2)], box=(0.0, 1.0))
    >>> slope.lower == slope.upper
    True
    """
    pairs, deadline = _checked(dense, norm, pairs, time_limit)
    low, high = box
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"box={box!r}: a pair of numbers (low, high) with low < high is accepted")
    radius = (high - low) / 2
    here, size = _unit_logits(scaled(dense, np.full(dense.n, low + radius), radius))
    program = Program()
    whole = graph(program, here, unit_ball(program, dense.n, "Linf"), deadline)
    distinct = {tuple(sorted(pair)): pair for pair in reversed(pairs)}.values()
    best = _sampled(here, norm, list(distinct))

    def examine(task: _Task, program: Program, point: Array) -> bool:
        mask = whole.mask(point)
        units = _conflict(here, mask)
        if units.any():
            for each in (program, task.program, whole.program):
                whole.exclude(each, mask, units)
        else:
            best.see(float(_sizes(here, norm, mask[None], task.pair)[0]), task.pair)
            whole.exclude(program, mask, np.ones_like(mask))
        return True

    groups = []
    for pair in distinct:
        make = partial(_gradients, whole, norm, pair)
        groups.append(_Group(max(task.bound for task in make(-math.inf)), make))
    upper = _Search(best, examine, deadline).run(groups)
    label, rival = best.pair
    return Slope(best.value * size / radius, upper * size / radius, "milp", label=label, rival=rival)


def recession(dense: Dense, norm: str, pairs: Sequence[Pair], time_limit: float = 60.0) -> Slope:
    r"""The asymptotic slope: the largest :math:`\theta^0_j(u) - \theta^0_k(u)` over :math:`\|u\|_r \le 1`.

    :math:`\theta^0` is the network with every bias zero. One program per pair, in the order of their linear
    relaxations; a unit that only lowers the difference is pushed down by the maximisation and needs no binary.

    Parameters
    ----------
    dense : Dense
        A ReLU network; its biases are ignored.
    norm : {"Linf", "L1"}
        Of the input.
    pairs : sequence of (label, rival)
    time_limit : float
        Seconds, at least 0.

    Returns
    -------
    Slope
        ``lower`` is the difference that the recession network has in ``direction`` (None if it is 0, as at u = 0);
        ``upper`` as for `lipschitz`.

    Raises
    ------
    NotPiecewiseAffine, ValueError
        As for `lipschitz`.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> relu = Dense(((one,), (np.zeros((2, 1)), np.array([[1.0], [-1.0]]))), (np.zeros(1), np.zeros(2)), ("relu",))
    >>> slope = recession(relu, "L1", [(1, 0)])
    >>> slope.lower, slope.upper, slope.direction
    (2.0, 2.0, array([1.]))
    """
    pairs, deadline = _checked(dense, norm, pairs, time_limit)
    homogeneous = replace(dense, bias=tuple(np.zeros_like(b) for b in dense.bias))
    here, size = _unit_logits(scaled(homogeneous, np.zeros(dense.n), 1.0))
    program = Program()
    whole = graph(program, here, unit_ball(program, dense.n, norm), deadline)
    best = _Best(0.0, pairs[0])

    def examine(task: _Task, program: Program, point: Array) -> bool:
        # a binary that is 0 or 1 up to the solver's tolerance is fixed, so that the best point of its cell is exact
        mask, chosen = whole.mask(point), program.integer[whole.binaries]
        settled = program.fixed(whole.binaries[chosen], mask[chosen])
        exact = settled.maximise(task.terms, deadline - time.monotonic(), relaxed=True).point
        u = (point if exact is None else exact)[whole.values[0]]
        u = u / (float(np.linalg.norm(u, 1 if norm == "L1" else np.inf)) or 1.0)
        label, rival = task.pair
        logits = here.logits(u[None])[0]
        best.see(float(logits[rival] - logits[label]), task.pair, u)
        if chosen.any():
            whole.exclude(program, mask, chosen)
        return bool(chosen.any())

    upper = _Search(best, examine, deadline).run(_growth(whole, pair, deadline) for pair in pairs)
    label, rival = best.pair
    return Slope(best.value * size, upper * size, "milp", direction=best.direction, label=label, rival=rival)


def _checked(dense: Dense, norm: str, pairs: Sequence[Pair], time_limit: float) -> tuple[list[Pair], float]:
    """The pairs and the deadline, once everything is accepted."""
    choice("norm", norm, ("Linf", "L1"))
    for activation in dense.activations:
        if activation != "relu":
            raise NotPiecewiseAffine(f"{activation}: mixed-integer programs need ReLU activations")
    K = dense.classes
    if not pairs or any(k == j or not (0 <= k < K and 0 <= j < K) for k, j in pairs):
        raise ValueError(f"pairs={pairs!r}: pairs (label, rival) of two of the {K} classes are accepted")
    return list(pairs), time.monotonic() + number("time_limit", time_limit, "a number of seconds >= 0", 0, math.inf)


def _unit_logits(dense: Dense) -> tuple[Dense, float]:
    """The network with its logits divided by the largest weight they have, and that weight."""
    size = max(float(np.abs(W).max(initial=0)) for W in dense.weights[-1]) or 1.0
    weights = (*dense.weights[:-1], tuple(W / size for W in dense.weights[-1]))
    return replace(dense, weights=weights, bias=(*dense.bias[:-1], dense.bias[-1] / size)), size


def _sizes(dense: Dense, norm: str, masks: Mask, pair: Pair) -> Array:
    """The dual norm of the gradient of theta_j - theta_k on each cell, (M,)."""
    J, _ = dense.affine(masks)
    label, rival = pair
    sizes: Array = np.linalg.norm(J[:, rival] - J[:, label], 1 if norm == "Linf" else np.inf, axis=1)
    return sizes


def _sampled(dense: Dense, norm: str, pairs: Sequence[Pair]) -> _Best:
    """The largest gradient at random points of [-1, 1]^n."""
    width = max(dense.n, *dense.units, dense.classes) if dense.units else dense.n
    points = max(1, min(_SAMPLES, 20_000_000 // (dense.n * width)))
    masks = dense.mask(np.random.default_rng(0).uniform(-1, 1, (points, dense.n)))
    values = [float(_sizes(dense, norm, masks, pair).max()) for pair in pairs]
    return _Best(max(values), pairs[int(np.argmax(values))])


def _gradients(whole: Graph, norm: str, pair: Pair, deadline: float) -> Iterator[_Task]:
    """The programs whose largest optimum is the largest dual norm of the gradient of theta_j - theta_k."""
    program = whole.program.copy()
    terms, constant = _backward(whole, program, pair, deadline)
    low, high = program.tightened(terms, constant, deadline)
    n = len(constant)
    if norm == "L1":
        for i in range(n):
            row = [(matrix[i], columns) for matrix, columns in terms]
            yield _Task(float(high[i]), pair, program, row, float(constant[i]))
            yield _Task(float(-low[i]), pair, program, _negative(row), float(-constant[i]))
        return
    # each coordinate is up - down, of which its sign lets one be positive
    rise, fall = np.maximum(high, 0), np.maximum(-low, 0)
    up, down = program.variables(np.zeros(n), rise), program.variables(np.zeros(n), fall)
    sign = program.variables(*_open(low, high), integer=True)
    program.rows([(np.eye(n), up), (-np.eye(n), down), *_negative(terms)], least=constant, most=constant)
    program.rows([(np.eye(n), up), (-np.diag(rise), sign)], most=0.0)
    program.rows([(np.eye(n), down), (np.diag(fall), sign)], most=fall)
    yield _Task(float(np.maximum(rise, fall).sum()), pair, program, [(np.ones(n), up), (np.ones(n), down)])


def _backward(whole: Graph, program: Program, pair: Pair, deadline: float) -> tuple[Terms, Array]:
    """The gradient of theta_j - theta_k with respect to the input: terms and a constant (n,)."""
    label, rival = pair
    weights = whole.dense.weights
    behind: list[tuple[int, Columns]] = []  # the layers above, and the gradient behind their units
    for h in reversed(range(len(weights))):
        terms = [(weights[k][h].T, q) for k, q in behind]
        constant = weights[-1][h][rival] - weights[-1][h][label]
        if h == 0:
            break
        low, high = program.tightened(terms, constant, deadline)
        q = program.variables(np.minimum(low, 0), np.maximum(high, 0))
        d, one = whole.masks[h - 1], np.eye(len(q))
        program.rows([(one, q), (-np.diag(low), d)], least=0.0)
        program.rows([(one, q), (-np.diag(high), d)], most=0.0)
        program.rows([(one, q), *_negative(terms), (-np.diag(low), d)], most=constant - low)
        program.rows([(one, q), *_negative(terms), (-np.diag(high), d)], least=constant - high)
        behind.append((h - 1, q))
    return terms, constant


def _growth(whole: Graph, pair: Pair, deadline: float) -> _Task:
    """The program that maximises theta_j - theta_k."""
    label, rival = pair
    program, weights = whole.program.copy(), whole.dense.weights
    rows = [W[rival] - W[label] for W in weights[-1]]
    for h, d in enumerate(whole.masks):
        hidden = np.array([weights[k][h + 1].any(0) for k in range(h + 1, len(whole.masks))], bool).any(0)
        program.integer[d[(rows[h + 1] <= 0) & ~hidden]] = False
    terms = list(zip(rows, whole.values, strict=True))
    _, bound = program.tightened([(row[None], columns) for row, columns in terms], np.zeros(1), deadline)
    return _Task(float(bound[0]), pair, program, terms)


def _conflict(dense: Dense, mask: Mask) -> Mask:
    """Units that cannot all be strictly as in `mask` (units in all,) inside [-1, 1]^n; none if the cell has an inside.

    The inside is a point where float64 arithmetic finds every unit on its side beyond rounding: a centre of a largest
    ball. Without one, the dual solution of that linear program weighs half-spaces that contradict each other; what
    they are depends on the layers before.
    """
    forms = dense.forms(dense.split(mask[None]))[:-1]
    side = np.where(mask, 1.0, -1.0)
    A = side[:, None] * np.concatenate([form[0][0] for form in forms])
    b = side * np.concatenate([form[1][0] for form in forms])
    length, n = np.linalg.norm(A, axis=1), dense.n
    flat = length <= _ROUNDING
    units: Mask = flat & (b < -_ROUNDING)
    if not units.any():
        solved = linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=np.block(
                [[-A[~flat], length[~flat, None]], [np.eye(n), np.ones((n, 1))], [-np.eye(n), np.ones((n, 1))]]
            ),
            b_ub=np.concatenate([b[~flat], np.ones(2 * n)]),
            bounds=(None, None),
            method="highs",
        )
        t = solved.x[:-1]
        if (A[~flat] @ t + b[~flat] > _ROUNDING).all() and (np.abs(t) < 1).all():
            return units
        units[~flat] = np.abs(solved.ineqlin.marginals[: int((~flat).sum())]) > 1e-9
    starts = np.concatenate([[0], np.cumsum(dense.units)])
    last = int(np.flatnonzero(units)[-1])
    units[: starts[starts <= last][-1]] = True
    return units


@dataclass
class _Search:
    """Solves tasks until the best value seen is known to be the largest of all, or time is up.

    The task with the largest bound comes first, since it decides what is proved. It gets a share of the time left; if
    it stays open it goes back, and the next time its share is twice as large. `examine` looks at a feasible point,
    tells `best`, and returns whether it excluded the point, so that it is worth solving again. What differs by less
    than `rounding` is the same.
    """

    best: _Best
    examine: Callable[[_Task, Program, Array], bool]
    deadline: float
    rounding: float = 0.0

    def run(self, tasks: Iterable[_Task | _Group]) -> float:
        """An upper bound of all optima: the best value itself where that is proved."""
        order = count()
        waiting = [(-task.bound, next(order), 0, task) for task in tasks]
        heapq.heapify(waiting)
        self.rounding = -0.1 * _ACCURACY * waiting[0][0]
        failed = self.best.value
        while waiting and -waiting[0][0] > self.close and time.monotonic() < self.deadline:
            bound, _, tries, task = heapq.heappop(waiting)
            now = time.monotonic()
            until = now + (self.deadline - now) * min(1.0, 2.0**tries / _SHARES)
            if isinstance(task, _Group):
                for part in task.tasks(until):
                    heapq.heappush(waiting, (max(bound, -part.bound), next(order), 0, part))
                continue
            bound = max(bound, -self.solve(task, until))
            if time.monotonic() >= until:
                heapq.heappush(waiting, (bound, next(order), tries + 1, task))
            else:  # solved, or given up by the solver
                failed = max(failed, -bound)
        upper = max(failed, *(-bound for bound, *_ in waiting), self.best.value)
        return self.best.value if upper <= self.close else upper * (1 + _ACCURACY)

    def solve(self, task: _Task, deadline: float) -> float:
        """An upper bound of one program's optimum, no better than needed."""
        bound, program = task.bound, task.program.copy()
        if bound > self.close:
            least = (self.best.value + self.close) / 2 - task.constant
            program.rows([(row[None], columns) for row, columns in task.terms], least=least)
        while bound > self.close:
            optimum = program.maximise(task.terms, deadline - time.monotonic())
            bound = min(bound, max(self.best.value, task.constant + optimum.bound))
            if optimum.point is None or not self.examine(task, program, optimum.point):
                break
        return bound

    @property
    def close(self) -> float:
        """The largest bound that is as good as the best value."""
        return self.best.value * (1 + _ACCURACY) + self.rounding
