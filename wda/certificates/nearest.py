r"""The exact distance of samples to their nearest errors, for ReLU networks, by mixed-integer linear programs (HiGHS).

Minimise t such that :math:`\|x' - x\|_r \le t`, x' lies in the box, and the logit of a rival is at least that of the
label at x' (Tjeng, Xiao & Tedrake 2019, *Evaluating robustness of neural networks with mixed integer programming*).
Everything happens in a ball around x: the nearest error known bounds its radius, and bounds propagated through the
network over it decide most units and rule out most rivals, so that few binaries are left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from wda.certificates.program import ACCURACY, Columns, Program, Terms, graph, largest, scaled
from wda.certificates.propagation import linear, margins, preactivations
from wda.certificates.slope import TOLERANCE, agree
from wda.checks import choice, interval, number
from wda.losses import margin
from wda.nets import Array, Net, from_module
from wda.norms import clamp, rounded
from wda.norms import norm as length
from wda.passes import batches, check_labels, check_sample

__all__ = ["Nearest", "nearest"]

# t enters the objective this many times, which makes the solver's absolute tolerances of the objective that small
_MAGNIFIED = 100.0
# what the solver's tolerances change t by: for each column a reduced cost that is off by 1e-7, times a range of 2
_PER_COLUMN = 2e-7 / _MAGNIFIED
# how near to each other the certified and the uncertified radius come in the search by propagated bounds
_NEAR = 1.05
# relative to the radius that is asked for: the search for a certified one ends here
_LEAST = 1e-9
# while no error is known each ball is this many times as large as the last
_GROWTH = 2.0
# a ball is narrowed where an error is nearer than this share of its radius
_NARROW = 0.99
# without a box no error is looked for beyond this, relative to 1 + the size of the sample
_FAR = 1e6
# by how much a rival should win at a witness, relative to its largest margin
_EXCESS = 1e-9
# magnifies a linear program about its solution: the solver's tolerance of 1e-7 becomes that small
_ZOOM = 1e6
# how far points are pushed along their rays until they are errors, relative to their distance
_PUSHES = (0.0, *(1e-12 * 4.0**k for k in range(12)))
# an error is firm if its margin exceeds so many units in the last place of the logits
_ULPS = 64


@dataclass(frozen=True, eq=False)
class Nearest:
    r"""How far samples are from their nearest errors, between two bounds.

    Attributes
    ----------
    lower : float64 Tensor, shape (N,)
        No error is nearer; infinite where the box holds none.
    upper : float64 Tensor, shape (N,)
        The distance of `x_adv`; infinite where no error was found.
    x_adv : float64 Tensor, shape (N, \*shape)
        An error; the sample itself where the distance is 0 or no error was found.

    Examples
    --------
    >>> sample = torch.zeros(2, 3, dtype=torch.float64)
    >>> Nearest(torch.zeros(2), torch.tensor([0.0, 1.0]), sample).exact
    tensor([ True, False])
    """

    lower: Tensor
    upper: Tensor
    x_adv: Tensor

    @property
    def exact(self) -> Tensor:
        """Where the bounds agree to a relative 1e-5, or both are infinite; bool (N,). As for `Slope`."""
        known: Tensor = agree(self.lower, self.upper)
        return known


def nearest(
    net: Net | nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    box: tuple[float, float] | None = None,
    *,
    time_limit: float = 60.0,
    upper: Tensor | None = None,
    x_adv: Tensor | None = None,
    progress: bool | None = None,
) -> Nearest:
    r"""The distance of each sample to the nearest point at which a rival's logit is at least that of its label.

    One program per rival that propagated bounds do not rule out, those first whose bounds let them win by most. It is
    written in units of the radius R of the ball, about x, and every unit is scaled to [-1, 1]. Its optimum fixes an
    activation cell, where a linear program finds the witness, and the network in float64 confirms that it is an error.
    A witness nearer than the ball's radius narrows the ball for the other rivals.

    The lower bound is the solver's dual bound less :math:`(10^{-6} + 2\cdot10^{-9} m) R`, for m columns. HiGHS
    works in floating point, so that this is no proof. Of its tolerances, rows and binaries that are violated by 1e-6
    only let it find nearer points, and lower its bound. What can raise the bound: reduced costs of the wrong sign, up
    to 1e-7 each, on columns with ranges of at most 2, for an objective of 100 t (the term in m); the absolute gap of
    1e-6 in 100 t at which it stops; coefficients below 1e-9 that it drops, and its proofs that a node has no point
    (the first term, by experience more than enough).

    Parameters
    ----------
    net : Net or nn.Module
        Affine layers and ReLU, computed in float64.
    x : Tensor, shape (N, \*shape)
        Within the box.
    y : integer Tensor, shape (N,)
    norm : {"Linf", "L1"}
    box : (float, float), optional
        Without it, the search ends at 1e6 times (1 + the norm of the sample).
    time_limit : float
        Seconds for each sample, at least 0. When they are over, the lower bound is the solver's so far, or what
        propagated bounds certify (`wda.certificates.propagation.linear`) if that is more.
    upper : Tensor, shape (N,), optional
        Where the search ends for each sample, as where errors are known; infinity, or 0, for no such limit. Where it
        ends without an error, the lower bound is about that, and the upper infinite.
    x_adv : Tensor, shape (N, \*shape), optional
        Points to begin with, as from `wda.distances`; those that are no errors in float64 do not count.
    progress : bool or None
        As for `wda.attack`.

    Returns
    -------
    Nearest
        On the device of `x`.

    Raises
    ------
    NotPiecewiseAffine
        Names a layer other than affine ones and ReLU.
    TooLarge
        The network has more than 8192 inputs and hidden units.
    ValueError, TypeError
        A bad argument, or a weight that is NaN or infinite.

    Examples
    --------
    The rival wins where :math:`x_1 + x_2 \ge 1`:

    >>> model = nn.Linear(2, 2).requires_grad_(False)
    >>> for values, to in zip(model.parameters(), (torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0]))):
    ...     _ = values.copy_(to)
    >>> found = nearest(model, torch.tensor([[0.1, 0.3]]), torch.tensor([0]), "Linf", box=(0.0, 1.0))
    >>> round(float(found.upper), 6), [round(float(v), 6) for v in found.x_adv[0]], bool(found.exact)
    (0.3, [0.4, 0.6], True)
    """
    choice("norm", norm, ("Linf", "L1"))
    number("time_limit", time_limit, "a number of seconds >= 0", 0, math.inf)
    box = interval("box", box)
    labels, box = check_sample(x, y, box), rounded(box, x)
    net = from_module(net, x.shape[1:], x)
    net.require("affine", "sum", "activation", why="a mixed-integer program")
    if math.prod(x.shape[1:]) != net.n or net.classes < 2:
        raise ValueError(
            f"x of shape {tuple(x.shape)}, a network from {net.n} inputs to K={net.classes} logits: inputs "
            f"(N, {', '.join(map(str, net.shape))}) and K >= 2 are accepted"
        )
    check_labels(labels, net.classes)
    limit = torch.full((len(x),), math.inf, dtype=torch.float64) if upper is None else upper.double().cpu()
    if limit.shape != (len(x),) or not bool((limit >= 0).all()):
        raise ValueError(f"upper of shape {tuple(limit.shape)}: {len(x)} numbers >= 0 are accepted")
    if x_adv is not None and x_adv.shape != x.shape:
        raise ValueError(f"x_adv of shape {tuple(x_adv.shape)}: points of shape {tuple(x.shape)} are accepted")
    points = x.detach().to(net.like).reshape(-1, *net.shape)
    starts = points if x_adv is None else x_adv.detach().to(net.like).reshape(-1, *net.shape)
    searches = []
    for rows in batches(len(x), 1, f"nearest error {norm}", progress):
        i = rows.start
        search = _Search(net, points[i : i + 1], labels[i : i + 1].cpu(), norm, box, time.monotonic() + time_limit)
        search.run(starts[i : i + 1], float(limit[i]))
        searches.append(search)
    bounds = torch.tensor([(search.lower, search.best) for search in searches], dtype=torch.float64, device=x.device)
    witnesses = torch.cat([search.witness for search in searches]).reshape(x.shape).to(x.device)
    return Nearest(bounds[:, 0], bounds[:, 1], witnesses)


@dataclass
class _Search:
    """The search for the nearest error of one sample: `x` (1, *shape), `label` (1,)."""

    net: Net
    x: Tensor
    label: Tensor
    norm: str
    box: tuple[float, float] | None
    deadline: float
    witness: Tensor = field(init=False)
    best: float = math.inf
    lower: float = 0.0

    def __post_init__(self) -> None:
        self.witness = self.x
        rivals = [j for j in range(self.net.classes) if j != int(self.label)]
        self.rows = margins(self.net, [(int(self.label), j) for j in rivals])

    def run(self, start: Tensor, limit: float) -> None:
        """Narrow [lower, best] until they agree, nothing is left to search, or time is up."""
        if self.see(self.x, firmly=False):
            return
        self.see(start)
        # a little more than the limit, for an error at that very distance
        end = min(self.reach, limit * (1 + 10 * ACCURACY)) if limit > 0 else self.reach
        radius = min(self.best, end)
        if radius == self.reach:
            self.lower = self.certified(radius)
            radius = min(radius, _GROWTH * self.lower) or radius
        while self.left > 0:
            bound = self.within(radius)
            self.lower = max(self.lower, min(bound, radius, self.best) - self.slack * radius)
            found, proved = self.best < math.inf, bound == math.inf
            if proved and not found and radius == self.reach and self.box is not None:
                self.lower = math.inf
            if self.best >= radius / _GROWTH if found else radius == end or not proved:
                break
            radius = self.best if found else min(_GROWTH * radius, end)
        if self.lower < (1 - TOLERANCE) * min(self.best, end):
            self.lower = max(self.lower, self.certified(min(self.best, end)))
        self.lower = min(self.lower, self.best)

    def see(self, point: Tensor, firmly: bool = True) -> bool:
        """Whether a point is an error, by more than rounding if it should be so firmly; the nearest one is kept."""
        point = clamp(point, self.box)
        logits = self.net(point).cpu()
        rounding = _ULPS * torch.finfo(torch.float64).eps * float(logits.abs().amax())
        excess, distance = float(margin(logits, self.label)), float(length(point - self.x, self.norm))
        wrong = excess > rounding if firmly else excess >= 0
        if wrong and distance < self.best:
            self.witness, self.best = point, distance
        return wrong

    def within(self, radius: float) -> float:
        """What the distance of an error in a ball, nearer than the best one, is at least; infinite if there is none."""
        bound, done = math.inf, np.zeros(len(self.rows), bool)
        ball = _Ball(self, radius)
        while (left := ~done & (ball.most >= 0)).any():
            rival = int(np.where(left, ball.most, -math.inf).argmax())
            bound = min(bound, self.solve(ball, rival, 0.9 * self.left / left.sum()))
            done[rival] = True
            if self.best < _NARROW * ball.radius:
                ball = _Ball(self, self.best)
        return bound

    def solve(self, ball: _Ball, rival: int, seconds: float) -> float:
        """As `within`, for one rival alone."""
        ball.program.upper[ball.t] = min(1.0, self.best / ball.radius)
        program, (gain, level) = ball.program.copy(), ball.margin(rival)
        program.rows(gain, least=level)
        optimum = program.maximise(ball.goal, seconds)
        if optimum.point is not None:
            cell = program.fixed(ball.graph.binaries, ball.graph.mask(optimum.point))
            self.confirm(ball, cell, gain, level, ball.at(optimum.point))
        return max(0.0, -optimum.bound / _MAGNIFIED) * ball.radius

    def confirm(self, ball: _Ball, cell: Program, gain: Terms, level: Array, point: Tensor) -> None:
        """Look for the nearest error of the activation cell that the solver chose, and failing that near its point.

        A linear program around its own solution has a tolerance small enough for the rival to win by very little.
        """
        cell.rows(gain, least=level + _EXCESS)
        first = cell.maximise(ball.goal, self.left, relaxed=True).point
        if first is not None:
            shift = cell.about(first, _ZOOM).maximise(ball.goal, self.left, relaxed=True).point
            point = ball.at(first if shift is None else first + shift / _ZOOM)
        for firmly in (True, False):  # where the logits tie throughout, no margin is positive
            if any(self.see(far, firmly) for far in self.further(point)):
                return

    def further(self, point: Tensor) -> Iterator[Tensor]:
        """A point, and ever further ones on the ray from the sample."""
        for push in _PUSHES:
            yield point + push * (point - self.x)

    def certified(self, radius: float) -> float:
        """Up to `radius`, a radius at which propagated bounds let no rival win."""
        low, high, middle = 0.0, radius, radius
        while high > _NEAR * low and high > _LEAST * radius:
            if bool((self.bounds(middle)[1] < 0).all()):
                low = middle
            else:
                high = middle
            middle = (low + high) / 2
        return low

    def bounds(self, radius: float) -> tuple[Array, Array]:
        """Bounds of each rival's margin over a ball."""
        low, high = linear(self.net, self.rows, self.x, radius, self.norm, self.box)
        return low[0].cpu().numpy(), high[0].cpu().numpy()

    @property
    def reach(self) -> float:
        """The radius of a ball that holds all that is searched."""
        if self.box is None:
            return _FAR * (1 + float(length(self.x, self.norm)))
        low, high = self.box
        return float(length(torch.maximum(self.x - low, high - self.x), self.norm)) * (1 + ACCURACY)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def slack(self) -> float:
        """What the solver's tolerances may change the distance by, relative to the radius."""
        return ACCURACY + _PER_COLUMN * (2 * (self.net.n + sum(self.net.units)) + 1)


class _Ball:
    """The mixed-integer program of a ball around a sample, in units of its radius: the least norm t of u, x' = x + R u.

    Attributes
    ----------
    program : Program
    graph : Graph
        Of the network as a function of u, each unit scaled to [-1, 1].
    t : columns (1,)
    goal : terms
        To be maximised: -100 t.
    most : array (rivals,)
        Upper bounds of the margins.
    """

    def __init__(self, search: _Search, radius: float) -> None:
        net, x = search.net, search.x.flatten().cpu().numpy()
        self.x, self.radius = search.x, radius
        low, self.most = search.bounds(radius)
        self._rows, self._size = search.rows.cpu().numpy(), largest(low, self.most)
        seen = preactivations(net, search.x, radius, search.norm, search.box)
        ranges = [(low[0].cpu().numpy(), high[0].cpu().numpy()) for low, high in seen]
        self.program, one = Program(), np.ones(net.n)
        low, high = (-one, one) if search.box is None else ((side - x) / radius for side in search.box)
        u = self.program.variables(np.maximum(low, -1), np.minimum(high, 1))
        self.t = self._norm(u, search.norm)
        self.goal = [(np.array([-_MAGNIFIED]), self.t)]
        unit = [(low / largest(low, high), high / largest(low, high)) for low, high in ranges]
        self.graph = graph(self.program, scaled(net.dense, x, radius, ranges), u, ranges=unit)

    def _norm(self, u: Columns, norm: str) -> Columns:
        """Add a variable t in [0, 1] that is at least the norm of u."""
        n, t = len(u), self.program.variables(np.zeros(1), np.ones(1))
        size, of = (
            (t, np.ones((n, 1))) if norm == "Linf" else (self.program.variables(np.zeros(n), np.ones(n)), np.eye(n))
        )
        self.program.rows([(of, size), (-np.eye(n), u)], least=0.0)
        self.program.rows([(of, size), (np.eye(n), u)], least=0.0)
        if norm == "L1":
            self.program.rows([(np.ones((1, n)), size), (-np.ones((1, 1)), t)], most=0.0)
        return t

    def margin(self, rival: int) -> tuple[Terms, Array]:
        """A rival's margin, relative to its largest: terms, and what they must be at least for the rival to win."""
        dense, row = self.graph.dense, self._rows[[rival]] / self._size[rival]
        return [
            (row @ W, columns) for W, columns in zip(dense.weights[-1], self.graph.values, strict=True)
        ], -row @ dense.bias[-1]

    def at(self, point: Array) -> Tensor:
        """The input that a point of the program stands for, (1, *shape)."""
        return self.x + self.radius * torch.from_numpy(point[self.graph.values[0]]).to(self.x).view_as(self.x)
