"""Norms of perturbations: their duals, their steepest directions, and exact projections onto their balls.

A norm is named as RobustBench names it, ``"Linf"``, ``"L2"`` or ``"L1"``; it acts on everything but the first
axis of a tensor of shape ``(N, ...)``. Results keep the dtype and the device of what is given.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from wda.checks import choice

__all__ = [
    "bounds",
    "clamp",
    "dual",
    "dual_maximiser",
    "exponent",
    "least_displacement",
    "norm",
    "operator_norm",
    "project",
    "round_inward",
    "rounded",
    "support",
]

_EXPONENTS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
_DUALS = {"Linf": "L1", "L2": "L2", "L1": "Linf"}

# The largest side over which operator_norm enumerates signs: 2^19 products, about a second.
_MAX_SIGNS = 20

# Divisors are at least this, in float64; where that matters the quotient is not used, or bounded by something else.
_TINY = 1e-300


def exponent(name: str) -> float:
    """The paper's r: the exponent of the norm called `name`.

    Raises
    ------
    ValueError
        `name` is not one of "Linf", "L2", "L1".

    Examples
    --------
    >>> exponent("L2")
    2.0
    """
    return _EXPONENTS[choice("norm", name, _EXPONENTS)]


def dual(name: str) -> str:
    """The name of the dual norm (the paper's s, with 1/r + 1/s = 1).

    Examples
    --------
    >>> dual("Linf")
    'L1'
    """
    exponent(name)
    return _DUALS[name]


def norm(v: Tensor, name: str) -> Tensor:
    """The norm of each sample of `v`.

    Parameters
    ----------
    v : Tensor, shape (N, ...)
    name : {"Linf", "L2", "L1"}

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> norm(torch.tensor([[3.0, -4.0]]), "L2")
    tensor([5.])
    """
    flat, r = v.flatten(1), exponent(name)
    lengths: Tensor = torch.linalg.vector_norm(flat, r, dim=1)
    if r != 2 or not flat.numel():
        return lengths
    # below or above these, squares that vanish or overflow may have counted: in half precision, whose squares torch
    # sums in single precision, none do
    of = torch.finfo(torch.float32 if lengths.dtype == torch.float16 else lengths.dtype)
    doubtful = (lengths < of.tiny**0.5 / of.eps) | (lengths > of.max**0.5)
    if lengths.dtype == torch.float16 or not bool(doubtful.any()):
        return lengths
    unit = flat.detach().abs().amax(1, keepdim=True)
    unit = torch.where(doubtful[:, None] & (unit > 0) & unit.isfinite(), unit, 1)
    scaled: Tensor = torch.linalg.vector_norm(flat / unit, dim=1)
    return scaled * unit[:, 0]


def dual_maximiser(g: Tensor, name: str) -> Tensor:
    r"""The direction of unit norm along which the linear function g grows fastest: :math:`\mathcal M_r`, eq. (1).

    For "Linf" the sign, for "L2" the normalised gradient, for "L1" the signed unit vector of the first largest
    coordinate. Where g = 0 every direction is a maximiser and none is preferred: the result is 0.

    Parameters
    ----------
    g : Tensor, shape (N, ...)
        Finite; gradients too small to be squared in their dtype are handled.
    name : {"Linf", "L2", "L1"}

    Returns
    -------
    Tensor, shape (N, ...)
        h with ``norm(h, name) == 1`` and ``(g * h).sum() == norm(g, dual(name))`` for each sample with g != 0.

    Examples
    --------
    >>> dual_maximiser(torch.tensor([[3.0, -4.0]]), "L1")
    tensor([[ 0., -1.]])
    """
    r = exponent(name)
    if r == math.inf:
        return g.sign()
    flat = g.flatten(1)
    largest, at = flat.abs().max(dim=1, keepdim=True)
    if r == 1:
        return torch.zeros_like(flat).scatter(1, at, flat.gather(1, at).sign()).view_as(g)
    scaled = flat / torch.where(largest > 0, largest, 1)
    # the largest entry of `scaled` is 1 in size, so its norm is at least 1 where g != 0
    length: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return (scaled / length.clamp(min=1)).view_as(g)


def project(
    points: Tensor,
    anchor: Tensor,
    radius: float | Tensor,
    name: str,
    box: tuple[float, float] | None = None,
) -> Tensor:
    r"""The exact Euclidean projection of each point onto the ball around its anchor, within the box.

    Solves :math:`\min_\xi \|\xi - z\|_2` subject to :math:`\|\xi - a\|_r \le R` and, if a box is given, to
    :math:`\text{low} \le \xi \le \text{high}`. (Eq. 2 of the first paper, whose ball stands at the origin as printed;
    it is meant to stand at the anchor.)

    By symmetry each coordinate moves towards the anchor and none past it, so with :math:`\delta = z - a` and the
    room :math:`w_j` that the box leaves on the side of :math:`\delta_j`, the solution has lengths
    :math:`\min(|\delta_j|, R, w_j)` for "Linf", :math:`\min(t|\delta_j|, w_j)` for "L2" and
    :math:`\min([|\delta_j| - t]_+, w_j)` for "L1". The multiplier t solves one monotone, piecewise-smooth equation;
    its breakpoints are sorted and the right piece is solved in closed form, in float64.

    Parameters
    ----------
    points, anchor : Tensor, shape (N, ...)
        The anchor lies in the box.
    radius : float or Tensor, shape (N,)
        At least 0.
    name : {"Linf", "L2", "L1"}
    box : (float, float) or None

    Returns
    -------
    Tensor, shape (N, ...)
        In the dtype of `points`. Use `round_inward` where rounding must not leave the ball.

    Raises
    ------
    ValueError
        The radius is negative or NaN, or an anchor leaves the box.

    Examples
    --------
    >>> project(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 1.0, "L1")
    tensor([[0., 1.]])
    """
    r, box = exponent(name), rounded(box, anchor)
    center = anchor.flatten(1).double()
    limit = torch.as_tensor(radius, dtype=torch.float64, device=points.device).expand(len(points))[:, None]
    if not bool((limit >= 0).all()):
        raise ValueError(f"radius={radius}: numbers >= 0 are accepted")
    if box is not None and center.numel():
        low, high = center.aminmax()
        if bool((low < box[0]) | (high > box[1])):
            raise ValueError(f"the anchor leaves box={box}: anchors within it are accepted")
    if r == math.inf:  # a problem for each coordinate; rounding is monotone, so the sides may be rounded first
        sides = ((center + side).to(points.dtype) for side in (-limit, limit))
        nearest = points.flatten(1).clamp(*sides)
    else:
        nearest = _nearest_in_ball(points.flatten(1).double(), center, limit, r, box).to(points.dtype)
    # the box, for "Linf"; and rounding may have left it by one unit in the last place
    return clamp(nearest.view_as(points), box)


def _nearest_in_ball(
    target: Tensor, center: Tensor, limit: Tensor, r: float, box: tuple[float, float] | None
) -> Tensor:
    """The projection onto balls of the 1- or the 2-norm, of radii (N, 1), within the box; rows of float64 numbers."""
    delta = target - center
    # in units of about the longest coordinate, so that no square overflows or vanishes; a power of two rounds nothing
    longest = delta.abs().amax(1, keepdim=True)
    unit = torch.where(longest > 0, longest / (2 * torch.frexp(longest).mantissa), 1)
    length, limit = delta.abs() / unit, limit / unit
    if box is None:
        room = torch.full_like(length, math.inf)
    else:
        room = torch.where(delta > 0, box[1] - center, center - box[0]) / unit
    capped = length.minimum(room)
    outside = torch.linalg.vector_norm(capped, r, dim=1) > limit[:, 0]
    solve = _shrink_l2 if r == 2 else _shrink_l1
    capped[outside] = solve(length[outside], room[outside], limit[outside])
    return center + capped * unit * delta.sign()


def clamp(points: Tensor, box: tuple[float, float] | None) -> Tensor:
    """The nearest points within the box, as the dtype of `points` holds it, see `rounded`.

    Parameters
    ----------
    points : Tensor, shape (N, ...)
    box : (float, float) or None
        None leaves the points as they are.

    Returns
    -------
    Tensor, shape (N, ...)

    Examples
    --------
    >>> clamp(torch.tensor([2.0, -0.5]), (0.0, 1.0))
    tensor([1., 0.])
    """
    return points if box is None else points.clamp(*bounds(box, points))


def bounds(box: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """The sides of the box in the dtype and on the device of `like`, see `rounded`.

    Examples
    --------
    >>> bounds((0.0, 1.0), torch.zeros(1))
    (tensor(0.), tensor(1.))
    """
    limit = torch.finfo(like.dtype).max
    low, high = (torch.tensor(side, dtype=like.dtype, device=like.device).clamp(-limit, limit) for side in box)
    return low, high


def rounded(box: tuple[float, float] | None, like: Tensor) -> tuple[float, float] | None:
    """The box that a dtype can hold: each side rounded as a coordinate is that lies on it.

    Single precision has no 0.001, and its nearest number is larger. A coordinate of 0.001 is on the side of
    the box (0, 0.001) all the same. So wherever points are compared with a box it is this one, that of their dtype.

    Examples
    --------
    >>> rounded((0.0, 0.001), torch.zeros(1))
    (0.0, 0.0010000000474974513)
    """
    if box is None:
        return None
    low, high = (side.item() for side in bounds(box, like))
    return low, high


def _shrink_l2(length: Tensor, room: Tensor, limit: Tensor) -> Tensor:
    """min(t * length, room) with the t in (0, 1] that gives each row the 2-norm `limit`.

    Coordinates reach their room in the order of room / length; before the k-th breakpoint t_k the first k
    coordinates are full, so ||.||^2 = sum_{j<k} room_j^2 + t^2 sum_{j>=k} length_j^2.
    """
    breakpoint, order = torch.where(length > 0, room / length, math.inf).sort(dim=1)
    full = _exclusive_cumsum(room.gather(1, order).square())
    free = length.gather(1, order).square().flip(1).cumsum(1).flip(1)
    square = full + breakpoint.square() * free
    at = (square < limit.square()).sum(1, keepdim=True).clamp(max=length.shape[1] - 1)
    t = ((limit.square() - full.gather(1, at)).clamp(min=0) / free.gather(1, at).clamp(min=_TINY)).sqrt()
    # where the first k fill all but rounding of the limit, the formula may give nothing: t is at least t_k
    t = torch.where(at > 0, t.maximum(breakpoint.gather(1, (at - 1).clamp(min=0))), t)
    # without a free coordinate t is infinite, or very large
    return torch.where(length > 0, t * length, 0).minimum(room)


def _shrink_l1(length: Tensor, room: Tensor, limit: Tensor) -> Tensor:
    """min([length - t]_+, room) with the t >= 0 that gives each row the sum `limit`.

    The sum falls in t, with slope minus the number of coordinates strictly between 0 and their room: each
    joins at t = length - room and leaves at t = length. The sorted breakpoints cut t >= 0 into affine pieces.
    """
    join = (length - room).clamp(min=0)
    events, order = torch.cat([join, length], dim=1).sort(dim=1)
    slope = torch.cat([torch.ones_like(length), -torch.ones_like(length)], dim=1).gather(1, order).cumsum(1)
    drop = slope[:, :-1] * events.diff(dim=1)
    total = length.minimum(room).sum(1, keepdim=True)
    value = total - torch.nn.functional.pad(drop.cumsum(1), (1, 0))
    at = ((value > limit).sum(1, keepdim=True) - 1).clamp(min=0)
    t = events.gather(1, at) + (value.gather(1, at) - limit) / slope.gather(1, at).clamp(min=1)
    shrunk = (length - t).clamp(min=0).minimum(room)
    # t has the rounding error of the longest length: restore the sum to that of `limit`
    total = shrunk.sum(1, keepdim=True)
    return torch.where(total > limit, shrunk * (limit / total), shrunk)


def _exclusive_cumsum(v: Tensor) -> Tensor:
    """Sums of the entries before each one; an infinite entry may only be the last."""
    return torch.nn.functional.pad(v[:, :-1].cumsum(1), (1, 0))


def round_inward(points: Tensor, anchor: Tensor, radius: float | Tensor, name: str) -> Tensor:
    """Move points that rounding left outside the ball back inside it, by as little as their dtype allows.

    Afterwards ``norm(points.double() - anchor.double(), name) <= radius`` holds exactly as computed in float64.
    Moving towards the anchor never leaves a box that holds both.

    Parameters
    ----------
    points, anchor : Tensor, shape (N, ...), of one dtype
    radius : float or Tensor, shape (N,)
    name : {"Linf", "L2", "L1"}

    Returns
    -------
    Tensor, shape (N, ...)

    Raises
    ------
    ValueError
        A point is further outside than rounding can explain: it was not projected.

    Examples
    --------
    >>> x = torch.tensor([[0.3]])
    >>> moved = round_inward(x + 0.1, x, 0.1, "Linf")
    >>> bool((moved.double() - x.double()).abs() <= 0.1)
    True
    """
    limit = torch.as_tensor(radius, dtype=torch.float64, device=points.device).expand(len(points))
    excess = norm(points.double() - anchor.double(), name) - limit
    size = (points.double().abs() + anchor.double().abs()).clamp(min=torch.finfo(points.dtype).tiny)
    if bool((excess > 4 * torch.finfo(points.dtype).eps * norm(size, name)).any()):
        raise ValueError(
            f"points lie {float(excess.max()):.3g} outside the ball of radius {radius}, which is more than rounding; "
            "project them first"
        )
    result = points.clone()
    for k in range(53):
        outside = norm(result.double() - anchor.double(), name) > limit
        if not outside.any():
            return result
        point, start = result[outside], anchor[outside]
        # one unit in the last place of the point; near 0 that is less than one of the distance, which then decides
        step = torch.nextafter(point, start)
        shrunk = start.double() + (point.double() - start.double()) * (1 - 2.0 ** (k - 52))
        shrunk = shrunk.to(point.dtype)
        nearer = (shrunk.double() - start.double()).abs() < (step.double() - start.double()).abs()
        result[outside] = torch.where(nearer, shrunk, step)
    raise AssertionError("the last step halves every distance")


def support(
    g: Tensor,
    anchor: Tensor,
    radius: float | Tensor,
    name: str,
    box: tuple[float, float] | None = None,
) -> Tensor:
    r"""How far the linear function g can grow from the anchor within the ball around it and the box.

    The maximum of :math:`\langle g, x - a\rangle` subject to :math:`\|x - a\|_r \le R` and, if a box is given, to
    :math:`\text{low} \le x \le \text{high}`. Without a box it is R times the dual norm of g. With one, coordinate j
    has the room :math:`w_j` in the direction of :math:`g_j` and moves by :math:`\min(R, w_j)` for "Linf" and
    :math:`\min(t|g_j|, w_j)` for "L2"; for "L1" the largest entries of g move first, each by all its room.

    Parameters
    ----------
    g, anchor : Tensor, shape (N, ...)
        The anchor lies in the box.
    radius : float or Tensor, shape (N,)
        At least 0.
    name : {"Linf", "L2", "L1"}
    box : (float, float) or None

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> support(torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2), 2.0, "L1")
    tensor([8.])
    >>> support(torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2), 2.0, "L1", box=(-1.0, 1.0))
    tensor([7.])
    """
    slope, start, box = g.flatten(1).double(), anchor.flatten(1).double(), rounded(box, anchor)
    limit = torch.as_tensor(radius, dtype=torch.float64, device=g.device).expand(len(g))[:, None]
    if box is None:
        size, unit = _in_unit(slope.abs())
        return (limit * unit * norm(size, dual(name))[:, None])[:, 0].to(g.dtype)
    # no coordinate moves further than R
    room = torch.where(slope > 0, box[1] - start, start - box[0]).minimum(limit)
    size, steepest = _in_unit(torch.where(room > 0, slope.abs(), 0))
    if name == "Linf":
        move = room
    elif name == "L2":
        move, unit = _in_unit(room)
        outside = torch.linalg.vector_norm(move, dim=1) > (limit / unit)[:, 0]
        # a maximum's gradient is that of its maximiser, held fixed; through the formula it would be 0 times infinity
        move[outside] = _shrink_l2(size.detach()[outside], move[outside], (limit / unit)[outside])
        move = move * unit
    else:
        size, order = size.sort(dim=1, descending=True)
        room = room.gather(1, order)
        move = (limit - _exclusive_cumsum(room)).clamp(min=0).minimum(room)
    return ((size * move).sum(1) * steepest[:, 0]).to(g.dtype)


def least_displacement(
    g: Tensor, anchor: Tensor, level: Tensor, name: str, box: tuple[float, float] | None = None
) -> Tensor:
    r"""The shortest way from the anchor within the box on which the linear function g grows to a level.

    Minimises :math:`\|h\|_r` subject to :math:`\langle g, h\rangle \ge c` and, if a box is given, to
    :math:`\text{low} \le a + h \le \text{high}`: the inverse of `support`. Coordinate j has the room :math:`w_j` in the
    direction of :math:`g_j` and moves by :math:`\min(t, w_j)` for "Linf" and :math:`\min(t|g_j|, w_j)` for "L2"; for
    "L1" the largest entries of g move first, each by all its room. In float64.

    Parameters
    ----------
    g, anchor : Tensor, shape (N, ...)
        The anchor lies in the box.
    level : Tensor, shape (N,)
        The c; where it is at most 0, nothing moves.
    name : {"Linf", "L2", "L1"}
    box : (float, float) or None

    Returns
    -------
    Tensor, shape (N, ...)
        h, in the dtype of `g`. Where the level is out of reach, every coordinate of slope other than 0 goes to its side
        of the box; where g = 0, nothing moves.

    Examples
    --------
    >>> least_displacement(torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2), torch.tensor([7.0]), "Linf")
    tensor([[ 1., -1.]])
    >>> least_displacement(torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2), torch.tensor([7.0]), "L1", box=(-1.0, 1.0))
    tensor([[ 1., -1.]])
    """
    exponent(name)
    slope, start, box = g.flatten(1).double(), anchor.flatten(1).double(), rounded(box, anchor)
    steep, unit = _in_unit(slope.abs())
    level = level.double()[:, None].clamp(min=0) / unit
    # without a box, by no more than the steepest coordinate alone would need
    room = level if box is None else torch.where(slope > 0, box[1] - start, start - box[0])
    room = torch.where(steep > 0, room, 0)
    if name == "L1":
        length = _one_by_one(steep, room, level)
    else:
        length = _together(steep, torch.ones_like(steep) if name == "Linf" else steep, room, level)
    return (length * slope.sign()).view_as(g).to(g.dtype)


def _one_by_one(steep: Tensor, room: Tensor, level: Tensor) -> Tensor:
    """Lengths of moves of which the steepest come first, each of all its room, until the level is reached."""
    steepest, order = steep.sort(dim=1, descending=True)
    room = room.gather(1, order)
    left = (level - _exclusive_cumsum(steepest * room)).clamp(min=0)
    length = (left / steepest.clamp(min=_TINY)).minimum(room)
    return torch.zeros_like(length).scatter(1, order, length)


def _together(steep: Tensor, speed: Tensor, room: Tensor, level: Tensor) -> Tensor:
    """min(t * speed, room) with the least t at which the level is reached, or as near to it as the room allows.

    Coordinates fill their room in the order of room / speed; between two of these times the gain is affine in t.
    """
    full, order = torch.where(steep > 0, room / speed, 0).sort(dim=1)
    before = _exclusive_cumsum((steep * room).gather(1, order))
    rate = (steep * speed).gather(1, order).flip(1).cumsum(1).flip(1)
    at = (before + full * rate < level).sum(1, keepdim=True).clamp(max=full.shape[1] - 1)
    t = torch.where(rate > 0, (level - before) / rate, 0).gather(1, at)
    earlier = torch.nn.functional.pad(full[:, :-1], (1, 0)).gather(1, at)  # which rounding might undercut
    return (t.maximum(earlier) * speed).minimum(room)


def _in_unit(size: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of numbers >= 0 in units of the largest, so that no square overflows or vanishes; and the unit, 1 for 0."""
    largest = size.amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1)
    return size / unit, unit


def operator_norm(matrix: Tensor, r: str, s: str) -> float:
    r"""The induced norm :math:`\|A\|_{r\to s} = \sup_{\|u\|_r = 1} \|Au\|_s`, exactly.

    From "L1" it is the largest s-norm of a column, into "Linf" the largest dual r-norm of a row, from "L2" into
    "L2" the largest singular value. From "Linf" or into "L1" the supremum is at a vector of signs, over the
    columns or the rows; it is found by enumeration, as the problem is NP-hard in general.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
    r, s : {"Linf", "L2", "L1"}
        Norm of the input, norm of the output.

    Returns
    -------
    float
        Computed in float64.

    Raises
    ------
    ValueError
        `matrix` is no finite matrix, or the enumeration would be over more than 20 signs.

    Examples
    --------
    >>> operator_norm(torch.eye(3), "Linf", "L1")
    3.0
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"matrix of shape {tuple(matrix.shape)}: a non-empty matrix (m, n) is accepted")
    exponent(r), exponent(s)
    if not matrix.isfinite().all():
        raise ValueError("matrix: finite entries are accepted, it has NaN or infinite ones")
    a = matrix.detach().double()
    if r == "L1":
        return float(norm(a.T, s).max())
    if s == "Linf":
        return float(norm(a, dual(r)).max())
    if r == s == "L2":
        return float(torch.linalg.matrix_norm(a, 2))
    # ||A||_{r->s} = ||A^T||_{s*->r*}: after this the signs are over the columns of a, and `out` is the other norm
    if r != "Linf" or (s == "L1" and a.shape[0] < a.shape[1]):
        a, out = a.T, dual(r)
    else:
        out = s
    n = a.shape[1]
    if n > _MAX_SIGNS:
        raise ValueError(
            f"operator_norm {r}->{s} of a matrix {tuple(matrix.shape)} needs 2^{n - 1} vectors of signs; "
            f"matrices of at most {_MAX_SIGNS} columns (or rows, by duality) are accepted"
        )
    # u and -u give the same norm: the first sign is fixed; half of the others are enumerated at a time
    tail = torch.tensor(list(itertools.product((1.0, -1.0), repeat=(n - 1) // 2)), dtype=a.dtype, device=a.device)
    tail_part = a[:, n - tail.shape[1] :] @ tail.T
    best = 0.0
    for head in itertools.product((1.0, -1.0), repeat=n - 1 - tail.shape[1]):
        head_part = a[:, : n - tail.shape[1]] @ torch.tensor((1.0, *head), dtype=a.dtype, device=a.device)
        best = max(best, float(norm((tail_part + head_part[:, None]).T, out).max()))
    return best
