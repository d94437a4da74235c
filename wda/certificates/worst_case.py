r"""The exact worst-case risk in a W_1 ball, for every budget at once, and a distribution that has it.

:math:`V(\epsilon)=\sup\{E_P[\ell]:W_1(P,P_N)\le\epsilon\}`, the value between the two lines of Theorem 3.1, for ReLU
networks whose cells can be enumerated. For r = 1 and infinity, margin and cross-entropy, it is read off the vertices
of an arrangement (`wda.certificates.vertices`); for r = 2 and the margin it is a cone program
(`wda.certificates.perspective`); the cross-entropy for r = 2 is bracketed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wda import cells
from wda.certificates.curve import Curve, Tail, envelopes
from wda.certificates.lipschitz import lipschitz
from wda.certificates.perspective import Pieces, Program, hinge_pieces, margin_pieces, program, softplus_pieces
from wda.certificates.recession import recession_slope
from wda.certificates.slope import Slope
from wda.certificates.vertices import Gauge, gauge, meetings, polygon, rays, vertices
from wda.checks import choice, number
from wda.distribution import AdversarialDistribution
from wda.losses import get
from wda.nets import Array, Net, from_module
from wda.norms import exponent, rounded
from wda.passes import check_labels, check_sample
from wda.threat import Threat

__all__ = [
    "initial_slope",
    "worst_case_bracket",
    "worst_case_curve",
    "worst_case_distribution",
    "worst_case_risk",
]

# The budget is spent up to this share, so that sums of float64 numbers can be audited with no tolerance.
_INWARD = 1 - 2.0**-40
# half the number of sides of the polygon that stands for the disc
_SIDES = 64
# what the cone program's solver may be off by, relative to the unit of the loss, |V| and 1
_SOLVER = 1e-7
# the same of the initial slope, relative to the largest gradient
_PROGRAM = 1e-8
_ULP = 2.0**-52


def worst_case_curve(
    net: Net | nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    loss: str = "margin",
    box: tuple[float, float] | None = None,
) -> Curve:
    r"""The exact worst-case risk :math:`V(\epsilon)` for every budget of a W_1 ball, for r = 1 or infinity.

    Both losses are convex on each activation cell, so :math:`\sup_x\ell(x,y_i)-\lambda\|x-x_i\|_r`, which decides V by
    duality, is attained at a vertex of the cells cut along the kinks of the norm, for each
    :math:`\lambda\ge l=\lim V(\epsilon)/\epsilon`. So V is made of the concave majorants of finitely many points
    (distance, loss) for each sample, with the tail slope l, merged in the order of their slopes.

    Parameters
    ----------
    net : Net or nn.Module
        Affine layers and ReLU, of any depth; computed in float64.
    x : Tensor, shape (N, ...)
    y : integer Tensor, shape (N,)
    norm : {"Linf", "L1"}
        "L2" too if the input has one dimension.
    loss : {"margin", "ce"}
    box : (float, float), optional
        Points stay in :math:`[low, high]^n`; by default anywhere.

    Returns
    -------
    Curve
        ``curve(eps)`` is V, ``curve.initial`` is :math:`\Lambda`, ``curve.tail`` is l (0 in a box). A vertex nearer to
        its sample than 1e-9 of the largest coordinate of x is taken for the sample.

    Raises
    ------
    NotPiecewiseAffine
        The layer named is neither affine nor ReLU.
    ValueError, TypeError
        A bad argument; or too many cells or vertices, with their number.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    >>> for layer, weight in ((net[0], [[1.0]]), (net[2], [[-1.0], [1.0]])):
    ...     _ = layer.weight.data.copy_(torch.tensor(weight)), layer.bias.data.zero_()
    >>> curve = worst_case_curve(net, torch.zeros(1, 1), torch.tensor([0]), "L1")
    >>> curve(1.5), curve.initial, curve.tail
    (3.0, 2.0, 2.0)
    """
    problem = _Problem.read(net, x, y, loss, Threat(norm, eps=0, box=box))
    return problem.curve(gauge(norm, problem.net.n))


def worst_case_risk(net: Net | nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str = "margin") -> float:
    r"""The exact worst-case risk :math:`\sup\{E_P[\ell]:W_1(P,P_N)\le\epsilon\}`.

    For "L1" and "Linf" by `worst_case_curve`; for "L2" and the margin by the cone program of
    `wda.certificates.perspective` (needs ``wda[certificates]``), to the solver's accuracy: about 1e-9 of the larger of
    V(eps) - V(0) and the largest gradient times :math:`N\epsilon` or the usual size of a cell.

    Parameters
    ----------
    net, x, y
        As for `worst_case_curve`.
    threat : Threat
        Of order 1.
    loss : {"margin", "ce"}
        "ce" with "L1" and "Linf".

    Raises
    ------
    NotPiecewiseAffine
        The layer named is neither affine nor ReLU.
    ValueError, TypeError
        No exact route exists: the order is not 1, or cross-entropy with "L2"; a bad argument; too many cells.
    RuntimeError
        The solver of the cone program does not vouch for its solution.

    Examples
    --------
    >>> net, x, y = nn.Linear(2, 3), torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    >>> threat = Threat("Linf", eps=0.5, box=None)
    >>> abs(worst_case_risk(net, x, y, threat) - worst_case_curve(net, x, y, "Linf")(0.5)) < 1e-12
    True
    """
    _order_one(threat)
    problem = _Problem.read(net, x, y, loss, threat)
    if problem.polyhedral:
        return problem.curve(gauge(threat.norm, problem.net.n))(threat.eps)
    problem.require_margin("worst_case_bracket gives bounds")
    return problem.program().risk(threat.norm, problem.reach(threat.eps))[0]


def worst_case_bracket(
    net: Net | nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str = "ce"
) -> tuple[float, float]:
    r"""A lower and an upper bound of the worst-case risk; twice the same number where `worst_case_risk` is exact.

    For the cross-entropy with "L2":

    - in the plane, `worst_case_curve` for the polygon of 128 sides around the disc in place of the disc. Its norm is
      at most the 2-norm, so its ball is the larger one: the upper bound. The lower bound is what its vertices give
      when their distances are measured in the 2-norm; it is at least the upper bound at the budget
      :math:`\epsilon\cos(\pi/128)`;
    - else by the cone program for a larger, piecewise affine loss: for K = 2 chords of the softplus
      :math:`\log(1+e^m)` of the margin m, off by at most 0.005, else :math:`[m]_++\log K`. The lower bound is the
      cross-entropy on the distribution that solves it. It is at least the upper bound less 0.005 or log K.

    Parameters, return value in the exact cases, and errors are those of `worst_case_risk`.

    Returns
    -------
    (float, float)
        The upper bound includes a relative 1e-7 for the accuracy of the cone program's solver.

    Examples
    --------
    >>> net, x, y = nn.Linear(2, 3), torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    >>> lower, upper = worst_case_bracket(net, x, y, Threat("L2", eps=0.5, box=None))
    >>> lower <= upper <= lower + 1e-3
    True
    """
    _order_one(threat)
    problem = _Problem.read(net, x, y, loss, threat)
    if problem.polyhedral or loss == "margin":
        value = worst_case_risk(problem.net, x, y, threat, loss)
        return value, value
    if problem.net.n == 2:
        around = polygon(_SIDES)
        inside = Gauge(problem.length, around.kinks)
        return problem.curve(inside)(threat.eps), problem.curve(around)(threat.eps)
    classes = problem.net.classes
    pieces = softplus_pieces if classes == 2 else hinge_pieces
    cone, eps = problem.program(pieces), problem.reach(threat.eps)
    upper, points = cone.risk(threat.norm, eps)
    error = _SOLVER * max(1, abs(upper), math.prod(cone.units(eps)))
    upper += 0 if classes == 2 else math.log(classes)
    return problem.moves_to(points)(threat.eps), upper + error


def worst_case_distribution(
    net: Net | nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str = "margin", slack: float = 1e-6
) -> AdversarialDistribution:
    r"""A distribution in the ball whose risk is the worst-case risk, up to a share `slack` of the gain.

    It has at most N + 1 atoms: each sample's mass is in one place, but for one sample whose mass is in two, neither of
    which need be the sample. Where V is had only in the limit, by ever less mass ever further away (the case of
    eq. 16 of the first paper), a small mass goes far along the recession direction, far enough for the slack.

    Parameters
    ----------
    net, x, y, threat, loss
        As for `worst_case_risk`. The budget is spent up to the share :math:`1-2^{-40}`, which lets the audit pass.
    slack : float
        From 1e-7 to 1; relative to what the budget gains, :math:`V(\epsilon)-V(0)`. (For "L2" the error of the cone
        program's solver comes on top, see `worst_case_risk`.)

    Returns
    -------
    AdversarialDistribution
        In float64 whatever the dtype of x; it passes its own audit.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    >>> x, y, threat = torch.rand(5, 2).double(), torch.tensor([0, 1, 0, 1, 1]), Threat("Linf", eps=0.1)
    >>> adv = worst_case_distribution(net, x, y, threat)
    >>> adv.audit() <= 0.1, len(adv.mass) <= 6, adv.risk(net, "margin") > worst_case_risk(net, x, y, threat) - 1e-6
    (True, True, True)
    """
    _order_one(threat)
    problem = _Problem.read(net, x, y, loss, threat)
    slack = number("slack", slack, "a number from 1e-7 to 1", 1e-7, 1)
    if problem.polyhedral:
        curve = problem.curve(gauge(threat.norm, problem.net.n))
    else:
        problem.require_margin("worst_case_bracket gives bounds")
        curve = problem.moves_to(problem.program().risk(threat.norm, problem.reach(threat.eps))[1])
    slack *= curve(threat.eps) - curve(0.0)
    atoms = _spend(problem, curve, threat.eps * _INWARD, slack)
    anchor = x.detach().double()
    moved = np.stack([point for _, point, _ in atoms]) if atoms else np.empty((0, problem.net.n))
    return AdversarialDistribution(
        anchor,
        y.long().to(x.device),
        threat,
        torch.from_numpy(moved).to(x.device).reshape(-1, *x.shape[1:]),
        torch.tensor([mass for _, _, mass in atoms], dtype=torch.float64, device=x.device),
        torch.tensor([source for source, _, _ in atoms], dtype=torch.int64, device=x.device),
    )


def initial_slope(
    net: Net | nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    loss: str = "margin",
    box: tuple[float, float] | None = None,
) -> Slope:
    r"""The slope at which the worst-case risk starts, :math:`\Lambda=V'(0+)`.

    :math:`\Lambda=\max_i\sup_{x}\,(\ell(x,y_i)-\ell(x_i,y_i))/\|x-x_i\|_r`, or 0 if that is negative: the slope of the
    steepest line from a sample to the graph of its loss, however far away. As V is concave,
    :math:`V(\epsilon)\le V(0)+\Lambda\epsilon` for every budget, and no smaller slope will do.

    Parameters
    ----------
    net, x, y, loss, box
        As for `worst_case_curve`.
    norm : {"Linf", "L2", "L1"}
        "L2" with the margin only.

    Returns
    -------
    Slope
        With the direction in which the line goes up, and the label of its sample. Exact unless rounding may have moved
        or hidden a vertex by more than a relative 1e-5: then the upper bound says by how much, and is at most the
        Lipschitz constant of the margin.

    Examples
    --------
    >>> net = nn.Linear(2, 2).double()
    >>> slope = initial_slope(net, torch.zeros(1, 2), torch.tensor([0]), "Linf")
    >>> bool(torch.isclose(torch.tensor(slope.value), (net.weight[1] - net.weight[0]).abs().sum().float()))
    True
    """
    problem = _Problem.read(net, x, y, loss, Threat(norm, eps=0, box=box))
    if not problem.polyhedral:
        problem.require_margin("there is no exact route")
        value, direction, source = problem.program().slope(norm, problem.losses(problem.x[:, None])[:, 0])
        steepest = problem.steepest()
        # relative to the largest gradient, as for the risk
        lower, upper = value - _PROGRAM * steepest, min(value + _PROGRAM * steepest, max(value, steepest))
        return _slope(value, lower, upper, 1e-6, "perspective", direction, int(problem.y[source]))
    around = gauge(norm, problem.net.n)
    curve = problem.curve(around)
    if len(curve.points):
        source, direction = int(curve.source[0]), curve.points[0] - problem.x[curve.source[0]]
    elif curve.ends:
        source, direction = curve.ends.source, curve.ends.direction
    else:
        source, direction = 0, np.zeros(problem.net.n)
    direction = direction / (problem.length(direction) or 1)
    lower, upper = problem.steepest_line(around)
    return _slope(curve.initial, lower, upper, 1e-9, "vertices", direction, int(problem.y[source]))


def _slope(
    value: float, lower: float, upper: float, rounding: float, method: str, direction: Array, label: int
) -> Slope:
    """A slope that is one number unless its bounds are apart from it by more than rounding."""
    if max(abs(value - lower), abs(upper - value)) <= rounding * value:
        lower = upper = value
    return Slope(max(0.0, lower), upper, method, *((direction, label) if value > 0 else ()))


def _order_one(threat: Threat) -> None:
    if not isinstance(threat, Threat):
        raise TypeError(f"threat={threat!r}: a wda.Threat is accepted")
    if threat.order != 1:
        raise ValueError(f"threat={threat} of order {threat.order:g}: the worst-case risk is exact for order=1")


@dataclass(frozen=True, eq=False)
class _Problem:
    """A network, a sample and a loss, checked and in float64."""

    net: Net
    x: Array  # (N, n)
    y: NDArray[np.int64]
    loss: str
    norm: str
    box: tuple[float, float] | None

    @classmethod
    def read(cls, net: Net | nn.Module, x: Tensor, y: Tensor, loss: str, threat: Threat) -> _Problem:
        choice("loss", loss, ("margin", "ce"))
        labels = check_sample(x, y, threat.box)
        net = from_module(net, x.shape[1:], x)
        net.require("affine", "sum", "activation", why="the exact worst-case risk")
        if math.prod(x.shape[1:]) != net.n or net.classes < 2:
            raise ValueError(
                f"x of shape {tuple(x.shape)}, a network from {net.n} inputs to K={net.classes} logits: inputs "
                f"(N, {', '.join(map(str, net.shape))}) and K >= 2 are accepted"
            )
        check_labels(labels, net.classes)
        points = x.detach().double().flatten(1).cpu().numpy()
        return cls(net, points, labels.cpu().numpy(), loss, threat.norm, rounded(threat.box, x))

    def length(self, v: Array) -> Array:
        """The norm of vectors (..., n)."""
        lengths: Array = np.linalg.norm(v, exponent(self.norm), axis=-1)
        return lengths

    @property
    def polyhedral(self) -> bool:
        """Whether the ball of the norm has vertices."""
        return self.norm != "L2" or self.net.n == 1

    def require_margin(self, instead: str) -> None:
        if self.loss != "margin":
            raise ValueError(
                f"loss={self.loss!r} with norm={self.norm!r}: exact are 'margin' with 'L1', 'L2', 'Linf' and 'ce' with "
                f"'L1', 'Linf'; {instead}"
            )

    def reach(self, eps: float) -> float:
        """The budget that can be spent: in a box no more than its diameter."""
        return eps if self.box is None else min(eps, float(self.length(np.full(self.net.n, self.box[1] - self.box[0]))))

    def losses(self, points: Array) -> Array:
        """The loss at points (N, C, n), with the label of the sample in the same row: (N, C)."""
        return _losses(self.net, points, self.y, self.loss)

    def curve(self, around: Gauge) -> Curve:
        """The worst-case risk for a polyhedral norm; or, if the gauge measures by another norm, a lower bound."""
        ends = None
        if self.box is None:
            recession = self.net.recession()
            directions = rays(recession, around.kinks)
            directions /= around.size(directions)[:, None]
            gain = _losses(recession, np.repeat(directions[None], len(self.y), 0), self.y, "margin")
            ends = _steepest(gain, directions)
        return envelopes(self.x, vertices(self.net, self.x, around.kinks, self.box), self.losses, around.size, ends)

    def steepest(self) -> float:
        """The Lipschitz constant of the margin for the labels of the sample, which no slope exceeds."""
        return lipschitz(self.net, self.norm, labels=self.y.tolist(), method="cells", box=self.box).upper

    def steepest_line(self, around: Gauge) -> tuple[float, float]:
        """Bounds of the initial slope: rounding moves the vertices, and the loss there, and may hide one."""
        steepest = self.steepest()
        start, extent = self.losses(self.x[:, None]), np.abs(self.x).max()
        doubt = self.doubt(self.x[:, None])
        lower = upper = (
            recession_slope(self.net, self.norm, self.y.tolist(), "cones").upper if self.box is None else 0.0
        )
        for points, off in meetings(self.net, self.x, around.kinks, self.box):
            if off is None:
                return min(lower, steepest), steepest
            distance = around.size(points - self.x[:, None])
            error = steepest * off + self.doubt(points) + doubt
            rise = self.losses(points) - start
            away = distance > off
            with np.errstate(divide="ignore", invalid="ignore"):
                lower = max(lower, ((rise - error) / (distance + off))[away].max(initial=0))
                upper = max(upper, ((rise + error) / (distance - off))[away].max(initial=0))
            # so near to the sample that it may be any slope, unless it is the sample
            if (~away & (distance > 4 * _ULP * max(extent, 1e-300))).any():
                upper = steepest
        upper = min(upper, steepest)
        return min(lower, upper), upper

    def doubt(self, points: Array) -> Array:
        """What rounding may do to the loss at points (N, C, n): (N, C)."""
        logits = cells.absolute(self.net.dense).logits(np.abs(points).reshape(-1, self.net.n))
        share = _ULP * (8 + self.net.n + sum(self.net.units))
        size: Array = 2 * share * logits.max(1).reshape(points.shape[:2])
        return size

    def program(self, pieces: Callable[[int, int], Pieces] = margin_pieces) -> Program:
        """The cone program, for a loss in pieces."""
        return program(cells.enumerate(self.net, self.box), self.x, [pieces(k, self.net.classes) for k in self.y])

    def moves_to(self, points: Array) -> Curve:
        """The best distribution on some points (N, C, n), and far along the recession direction."""
        ends = None
        if self.box is None:
            slope = recession_slope(self.net, self.norm, self.y.tolist(), method="cones")
            if slope.direction is not None:
                ends = Tail(slope.value, int((self.y == slope.label).argmax()), slope.direction)
        else:
            points = np.clip(points, *self.box)
        return envelopes(self.x, [points], self.losses, self.length, ends)


def _losses(net: Net, points: Array, y: NDArray[np.int64], loss: str) -> Array:
    logits = torch.from_numpy(net.dense.logits(points.reshape(-1, net.n)))
    labels = torch.from_numpy(y).repeat_interleave(points.shape[1])
    values: Array = get(loss)(logits, labels).numpy().reshape(points.shape[:2])
    return values


def _steepest(gain: Array, directions: Array) -> Tail | None:
    """The largest gain (N, R) along directions (R, n), if it is positive."""
    source, best = np.unravel_index(gain.argmax(), gain.shape)
    if gain[source, best] <= 0:
        return None
    return Tail(float(gain[source, best]), int(source), directions[best])


_Atom = tuple[int, Array, float]  # source, point, mass


def _spend(problem: _Problem, curve: Curve, eps: float, slack: float) -> list[_Atom]:
    """The moved atoms of a distribution of cost `eps` that is optimal for the curve."""
    count = len(problem.x)
    full = int(np.searchsorted(curve.knots, eps, side="right")) - 1
    left = eps - curve.knots[full]
    place = {int(i): point for i, point in zip(curve.source[:full], curve.points[:full], strict=True)}
    atoms = []
    if full < len(curve.source):
        source, target = int(curve.source[full]), curve.points[full]
        share = left / (curve.knots[full + 1] - curve.knots[full])
        atoms = _divide(source, place.pop(source, None), target, share / count, 1 / count)
    elif curve.ends and left > 0:
        source = curve.ends.source
        target, mass = _far(problem, curve.ends, place.get(source, problem.x[source]), left, slack / 2)
        atoms = _divide(source, place.pop(source, None), target, mass, 1 / count)
    return [*((source, point, 1 / count) for source, point in place.items()), *atoms]


def _divide(source: int, near: Array | None, far: Array, mass: float, whole: float) -> list[_Atom]:
    """The mass of one sample, of which at most `mass` goes far and the rest to the near point (None: it stays)."""
    if near is None:
        return [(source, far, mass)] if mass > 0 else []
    # rounded in favour of the near atom, and so that the two add up to the whole exactly
    rest = min(whole, math.nextafter(whole - mass, 1))
    moved = whole - rest
    rest = whole - moved
    return [(source, point, part) for point, part in ((near, rest), (far, moved)) if part > 0]


def _far(problem: _Problem, ends: Tail, point: Array, eps: float, slack: float) -> tuple[Array, float]:
    """Where on a ray from `point` a budget `eps` gains its slope up to `slack`, and the mass that goes there."""
    count, origin, label = len(problem.x), problem.x[ends.source], problem.y[[ends.source]]
    # from the distance at which the whole sample would have to go, ever further and with ever less mass
    with np.errstate(over="ignore", invalid="ignore"):
        targets = point + count * eps * 2.0 ** np.arange(50)[:, None] * ends.direction
        targets = targets[np.isfinite(problem.length(targets))]
        further = problem.length(targets - origin) - problem.length(point - origin)
        mass = np.minimum(1, count * eps / np.maximum(further, eps)) / count
        value = _losses(problem.net, np.vstack([point, targets])[None], label, problem.loss)[0]
        gain = mass * (value[1:] - value[0])
    known = np.isfinite(gain)
    if not known.any():
        raise ValueError(
            f"eps={eps:.3g} to spend at infinity: the distances or losses of mass that goes so far exceed float64"
        )
    enough = known & (gain >= ends.slope * eps - slack)
    best = int(enough.argmax()) if enough.any() else int(np.where(known, gain, -np.inf).argmax())
    return targets[best], float(mass[best])
