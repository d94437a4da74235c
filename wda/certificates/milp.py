r"""Exact slopes of ReLU networks too large to enumerate, by mixed-integer linear programs (HiGHS).

The gradient of a logit runs backwards through the binaries of the network's graph (`wda.certificates.program`): behind
a unit it is :math:`q = d y`, the product of a binary and of :math:`y \in [l, u]`, which is

.. math:: l d \le q \le u d, \qquad y - u (1 - d) \le q \le y - l (1 - d)

(Jordan & Dimakis 2020, "Exactly computing the local Lipschitz constant of ReLU networks").
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
from scipy.optimize import linprog

from wda.cells import Cells, absolute, has_inside
from wda.certificates.program import ACCURACY, Columns, Graph, Program, Terms, graph, negative, scaled, signs, unit_ball
from wda.certificates.slope import Slope
from wda.checks import choice, number
from wda.errors import NotPiecewiseAffine
from wda.nets import Array, Dense, Mask

__all__ = ["lipschitz", "recession"]

Pair = tuple[int, int]

# a unit that is on or off by less than this, in scaled units, may be so by rounding
_ROUNDING = 1e-11
# the same for a unit that depends on x by no more than that
_CLEAR = 1e-10
# units contradict each other for certain by more than this
_EMPTY = 1e-13
# inputs times units up to which exact arithmetic decides what rounding leaves open
_LARGE = 600
# magnifies a cell that is not found: the solver's tolerance of 1e-7 becomes that small
_ZOOM = 1e6
# how many points are tried before the first program
_SAMPLES = 512
# objectives are multiplied by this, which makes the solver's absolute tolerances of them that small
_MAGNIFIED = 100.0
# the first try of a program may use up this part of the time left
_SHARES = 16


@dataclass(frozen=True)
class _Task:
    """One program of a search: maximise ``constant`` plus the terms, which is at most ``bound``.

    ``reach`` is what interval arithmetic says of it: the size of the numbers that the solver works with.
    """

    bound: float
    reach: float
    pair: Pair
    program: Program
    terms: Terms
    constant: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Tasks that are made when their turn comes, which may take until a deadline; no optimum exceeds ``bound``."""

    bound: float
    reach: float
    tasks: Callable[[float], Iterable[_Task]]


@dataclass
class _Best:
    """The largest value seen so far, and the largest of which it is not known whether it is one."""

    value: float
    pair: Pair
    direction: Array | None = None
    doubtful: float = 0.0

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
    solution, are excluded as they are, and the search goes on. Where rounding leaves that open, exact arithmetic
    decides (`wda.cells.has_inside`), or, for more than 600 inputs times units, the mask counts in the upper bound.

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
        ``lower`` is the value on a cell that was found. ``upper`` is the solver's dual bound, widened by its accuracy,
        a relative 1e-6, and by 1e-8 of the largest number that it works with.

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
    >>> slope.exact
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
    best = _sampled(here, dense, norm, list(distinct))
    best.value *= radius / size

    def examine(task: _Task, program: Program, point: Array) -> bool:
        mask = whole.mask(point)
        units = _conflict(here, mask)
        if units is None and sum(dense.units) * dense.n <= _LARGE:
            units = np.full_like(mask, not has_inside(dense, mask, box))
        if units is not None and units.any():
            for each in (program, task.program, whole.program):
                whole.exclude(each, mask, units)
            return True
        value = float(_sizes(dense, norm, mask[None], task.pair)[0]) * radius / size
        if units is None:
            best.doubtful = max(best.doubtful, value)
        else:
            best.see(value, task.pair)
        whole.exclude(program, mask, np.ones_like(mask))
        return True

    groups = []
    for pair in distinct:
        make = partial(_gradients, whole, norm, pair)
        tasks = list(make(-math.inf))
        groups.append(_Group(max(task.bound for task in tasks), max(task.reach for task in tasks), make))
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
    >>> slope.value, slope.exact, slope.direction
    (2.0, True, array([1.]))
    """
    pairs, deadline = _checked(dense, norm, pairs, time_limit)
    homogeneous = replace(dense, bias=tuple(np.zeros_like(b) for b in dense.bias))
    here, size = _unit_logits(scaled(homogeneous, np.zeros(dense.n), 1.0))
    terms = absolute(here)
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
        logits, doubt = here.logits(u[None])[0], 2.0**-48 * terms.logits(np.abs(u)[None])[0]
        gain, doubt = float(logits[rival] - logits[label]), float(doubt[rival] + doubt[label])
        best.see(gain if doubt <= 1e-9 * gain else gain - doubt, task.pair, u)
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
    sizes: Array = np.linalg.norm(Cells(dense, masks).gradients([pair])[:, 0], 1 if norm == "Linf" else np.inf, axis=1)
    return sizes


def _sampled(here: Dense, dense: Dense, norm: str, pairs: Sequence[Pair]) -> _Best:
    """The largest gradient at random points of [-1, 1]^n, at which no unit is nearly 0."""
    width = max(dense.n, *dense.units, dense.classes) if dense.units else dense.n
    points = max(1, min(_SAMPLES, 20_000_000 // (dense.n * width)))
    x = np.random.default_rng(0).uniform(-1, 1, (points, dense.n))
    clear = np.all([(np.abs(z) > _ROUNDING).all(1) for z in here.preactivations(x)[:-1]] or [np.ones(points, bool)], 0)
    masks = here.mask(x[clear])
    values = [float(_sizes(dense, norm, masks, pair).max(initial=0)) for pair in pairs]
    return _Best(max(values), pairs[int(np.argmax(values))])


def _gradients(whole: Graph, norm: str, pair: Pair, deadline: float) -> Iterator[_Task]:
    """The programs whose largest optimum is the largest dual norm of the gradient of theta_j - theta_k."""
    program = whole.program.copy()
    terms, constant = _backward(whole, program, pair, deadline)
    reach = np.maximum(*np.abs(program.range(terms, constant)))
    low, high = program.tightened(terms, constant, deadline)
    n = len(constant)
    if norm == "L1":
        for i in range(n):
            row = [(matrix[i], columns) for matrix, columns in terms]
            yield _Task(float(high[i]), float(reach[i]), pair, program, row, float(constant[i]))
            yield _Task(float(-low[i]), float(reach[i]), pair, program, negative(row), float(-constant[i]))
        return
    # each coordinate is up - down, of which its sign lets one be positive
    rise, fall = np.maximum(high, 0), np.maximum(-low, 0)
    up, down = program.variables(np.zeros(n), rise), program.variables(np.zeros(n), fall)
    sign = program.variables(*signs(low, high), integer=True)
    program.rows([(np.eye(n), up), (-np.eye(n), down), *negative(terms)], least=constant, most=constant)
    program.rows([(np.eye(n), up), (-np.diag(rise), sign)], most=0.0)
    program.rows([(np.eye(n), down), (np.diag(fall), sign)], most=fall)
    bound = float(np.maximum(rise, fall).sum())
    yield _Task(bound, float(reach.sum()), pair, program, [(np.ones(n), up), (np.ones(n), down)])


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
        program.rows([(one, q), *negative(terms), (-np.diag(low), d)], most=constant - low)
        program.rows([(one, q), *negative(terms), (-np.diag(high), d)], least=constant - high)
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
    objective = [(row[None], columns) for row, columns in terms]
    least, most = program.range(objective, np.zeros(1))
    reach = float(max(-least[0], most[0])) if most[0] > 0 else 0.0
    _, bound = program.tightened(objective, np.zeros(1), deadline)
    return _Task(float(bound[0]), reach, pair, program, terms)


def _conflict(dense: Dense, mask: Mask) -> Mask | None:
    """Units that cannot all be strictly as in `mask` (units in all,) inside [-1, 1]^n; none if the cell has an inside.

    The inside is a point where float64 arithmetic finds every unit on its side beyond rounding: a centre of a largest
    ball. Without one, the dual solution of that linear program weighs half-spaces that contradict each other: nowhere
    in the box is the weighted sum of what the units are on their sides by positive, nor 0 up to rounding. What the
    half-spaces are depends on the layers before. As a small cell may be lost in the tolerance of the solver, the
    program is solved again under a magnifying glass on its first solution. None if even that decides nothing.
    """
    forms = dense.forms(dense.split(mask[None]))[:-1]
    side = np.where(mask, 1.0, -1.0)
    A = side[:, None] * np.concatenate([form[0][0] for form in forms])
    b = side * np.concatenate([form[1][0] for form in forms])
    length, centre = np.linalg.norm(A, axis=1), np.zeros(dense.n)
    flat = length <= _ROUNDING
    units: Mask = flat & (b < -_CLEAR)
    if units.any():
        return _with_layers_before(dense, units)
    if (flat & (b < _CLEAR)).any():
        return None
    A, b, length = A[~flat], b[~flat], length[~flat]
    for zoom in (1.0, _ZOOM):
        solved = _largest_ball(A / length[:, None], (A @ centre + b) / length, centre, zoom)
        if solved is None:
            return None
        centre, weights = centre + solved[0], solved[1] / length
        if (A @ centre + b > _ROUNDING).all() and (np.abs(centre) < 1).all():
            return units
        # the largest value of the weighted sum in the box
        if weights.any() and weights @ b + np.abs(weights @ A).sum() <= -_EMPTY * (weights @ length):
            units[~flat] = weights > 0
            return _with_layers_before(dense, units)
    return None


def _largest_ball(A: Array, b: Array, centre: Array, zoom: float) -> tuple[Array, Array] | None:
    """The centre of a largest ball in {A s + b >= 0} and [-1, 1]^n - centre, and the dual solution; None if it fails.

    A has unit rows; lengths are in units of 1 / `zoom`.
    """
    one, n = np.ones((len(A) + 2 * len(centre), 1)), len(centre)
    solved = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([np.concatenate([-A, np.eye(n), -np.eye(n)]), one]),
        b_ub=zoom * np.concatenate([b, 1 - centre, 1 + centre]),
        bounds=(None, None),
        method="highs-ds",
    )
    if solved.x is None:
        return None
    weights = -solved.ineqlin.marginals[: len(A)]
    return solved.x[:-1] / zoom, np.where(weights > 1e-9, weights, 0.0)


def _with_layers_before(dense: Dense, units: Mask) -> Mask:
    """With all units of the layers before the last one that has any."""
    starts = np.concatenate([[0], np.cumsum(dense.units)])
    units[: starts[starts <= np.flatnonzero(units)[-1]][-1]] = True
    return units


@dataclass
class _Search:
    """Solves tasks until the best value seen is known to be the largest of all, or time is up.

    The task with the largest bound comes first, since it decides what is proved. It gets a share of the time left; if
    it stays open it goes back, and the next time its share is twice as large. `examine` looks at a feasible point,
    tells `best`, and returns whether it excluded the point, so that it is worth solving again. What differs by less
    than `rounding` is not searched for. The solver drops coefficients below 1e-9 and takes reduced costs of 1e-7 for 0:
    so what is below 1e-8 of the numbers it works with it may not see, and the upper bound is that much larger.
    """

    best: _Best
    examine: Callable[[_Task, Program, Array], bool]
    deadline: float
    rounding: float = 0.0

    def run(self, tasks: Iterable[_Task | _Group]) -> float:
        """An upper bound of all optima, by the solver's accuracy above the best value where that is the largest."""
        order = count()
        waiting = [(-task.bound, next(order), 0, task) for task in tasks]
        unseen = ACCURACY / _MAGNIFIED * max(task.reach for *_, task in waiting)
        heapq.heapify(waiting)
        self.rounding = -0.1 * ACCURACY * waiting[0][0]
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
        upper = max(failed, *(-bound for bound, *_ in waiting), self.best.value, self.best.doubtful)
        # what the solver cannot see counts
        return upper * (1 + ACCURACY) + max(unseen, self.rounding)

    def solve(self, task: _Task, deadline: float) -> float:
        """An upper bound of one program's optimum, no better than needed."""
        bound, program = task.bound, task.program.copy()
        if bound > self.close:
            least = (self.best.value + self.close) / 2 - task.constant
            program.rows([(row[None], columns) for row, columns in task.terms], least=least)
        while bound > self.close:
            terms = [(_MAGNIFIED * row, columns) for row, columns in task.terms]
            optimum = program.maximise(terms, deadline - time.monotonic())
            bound = min(bound, max(self.best.value, task.constant + optimum.bound / _MAGNIFIED))
            if optimum.point is None or not self.examine(task, program, optimum.point):
                break
        return bound

    @property
    def close(self) -> float:
        """The largest bound that is as good as the best value."""
        return self.best.value * (1 + ACCURACY) + self.rounding
