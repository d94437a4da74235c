r"""Where a convex function of a cell, less a multiple of the distance to a sample, can be largest.

For a polyhedral norm the distance :math:`d_i(x)=\|x-x_i\|` bends along hyperplanes through :math:`x_i`, its *kinks*.
They cut each activation cell into polyhedra without a line, on which :math:`d_i` is affine and the loss convex. A
convex function that is bounded above on a polyhedron without a line is largest at a vertex, and one that is positively
homogeneous grows fastest along an extreme ray. So :math:`\sup_x \ell(x)-\lambda d_i(x)` is the largest of finitely
many numbers. No vertex is tested for belonging to a cell: where any hyperplanes meet is an admissible point anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wda import cells
from wda.nets import Array, Mask, Net
from wda.norms import exponent

__all__ = ["Gauge", "gauge", "meetings", "polygon", "rays", "vertices"]

_MAX_POINTS = 100_000_000
_CHUNK = 1 << 18  # points at once
_SAME = 1e-15  # what rounding does to a unit normal
_SINGULAR = 1e-13  # unit normals whose least singular value is below this are taken for dependent


@dataclass(frozen=True)
class Gauge:
    """A polyhedral norm: its size, and the normals (h, n) of the hyperplanes through 0 along which it bends.

    Examples
    --------
    >>> Gauge(lambda v: np.abs(v).sum(-1), np.eye(2)).size(np.array([3.0, -4.0]))
    np.float64(7.0)
    """

    size: Callable[[Array], Array]
    kinks: Array


def gauge(norm: str, n: int) -> Gauge:
    r"""The gauge of "L1" or "Linf" in n dimensions; on the line all norms agree.

    :math:`\|\delta\|_1` bends where a coordinate is 0, :math:`\|\delta\|_\infty` where two have equal size.

    Raises
    ------
    ValueError
        The L2 norm is not polyhedral.

    Examples
    --------
    >>> gauge("Linf", 2).kinks.tolist()
    [[1.0, -1.0], [1.0, 1.0]]
    """
    r = exponent(norm)
    if r == 2 and n > 1:
        raise ValueError(f"norm={norm!r} in {n} dimensions: 'L1' and 'Linf' are accepted, whose balls have vertices")
    if r == 1 or n == 1:
        kinks = np.eye(n)
    else:
        e = np.eye(n)
        kinks = np.array([e[a] + s * e[b] for a, b in itertools.combinations(range(n), 2) for s in (-1, 1)])
    return Gauge(lambda v: np.linalg.norm(v, r, axis=-1), kinks)


def polygon(half: int) -> Gauge:
    r"""The gauge of the plane whose unit ball is the regular polygon of 2 `half` sides around the unit disc.

    It is at most the 2-norm, and at least :math:`\cos(\pi/2q)` times the 2-norm, q being `half`.

    Examples
    --------
    >>> bool(np.isclose(polygon(2).size(np.array([3.0, 4.0])), 4))  # a square around the disc: the maximum norm
    True
    """
    angle = np.pi * np.arange(half) / half
    normals = np.column_stack([np.cos(angle), np.sin(angle)])
    # it bends along the lines through its corners, halfway between two normals
    corner = angle + np.pi / (2 * half)
    kinks = np.column_stack([-np.sin(corner), np.cos(corner)])
    return Gauge(lambda v: np.abs(v @ normals.T).max(-1), kinks)


def vertices(net: Net, x: Array, kinks: Array, box: tuple[float, float] | None = None) -> Iterator[Array]:
    """Every point where n of the hyperplanes meet: units of the network, kinks through a sample, faces of the box.

    Parameters
    ----------
    net : Net
    x : float64 array (N, n)
    kinks : float64 array (h, n)
    box : (float, float), optional
        Points outside are moved to the nearest one inside.

    Yields
    ------
    float64 array (N, C, n)
        Candidates for each sample, in pieces of a few million numbers.

    Raises
    ------
    ValueError
        There would be more than 10^8.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    >>> [points.shape for points in vertices(net, np.zeros((4, 2)), np.eye(2))]
    [(4, 9, 2)]
    """
    for points, _ in meetings(net, x, kinks, box):
        yield points


def meetings(
    net: Net, x: Array, kinks: Array, box: tuple[float, float] | None = None
) -> Iterator[tuple[Array, Array | None]]:
    """`vertices`, and how far each may be from where the hyperplanes meet in real arithmetic, (N, C).

    Instead of the last, None where hyperplanes were left out that may or may not meet in one point.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    >>> [bool((off < 1e-6).all()) for _, off in meetings(net, np.zeros((4, 2)), np.eye(2))]
    [True]
    """
    A, b, noise = _arrangements(net, box)
    (count, units, n), h = A.shape, len(kinks)
    faces, level = (np.repeat(np.eye(n), 2, 0), np.tile(box, n)) if box else (np.zeros((0, n)), np.zeros(0))
    free = units + len(faces)
    _require_few(count * (math.comb(free + h, n) - math.comb(h, n)) * len(x), net, len(x))
    normals = np.concatenate([A, _repeat(faces, count), _repeat(kinks, count)], axis=1)
    # the last axis is over the samples
    common = np.concatenate([-b, _repeat(level, count)], axis=1)[:, :, None]
    levels = np.concatenate([np.broadcast_to(common, (count, free, len(x))), _repeat(kinks @ x.T, count)], axis=1)
    noise = np.concatenate([noise, np.zeros((count, len(faces) + h, 2))], axis=1)
    noise /= np.where(normals.any(2), np.linalg.norm(normals, axis=2), 1)[:, :, None]
    normals, levels = _normalised(normals, levels)
    for chosen in _subsets(free + h, n, max(1, _CHUNK // (count * len(x)))):
        chosen = chosen[chosen[:, 0] < free]  # kinks alone meet in the sample
        planes, at = normals[:, chosen].reshape(-1, n, n), levels[:, chosen].reshape(-1, n, len(x))
        rounded = noise[:, chosen].max(2).reshape(-1, 2)
        regular = _regular(planes)
        inverse = np.linalg.inv(planes[regular])
        points = np.asarray(np.linalg.solve(planes[regular], at[regular]), np.float64).transpose(2, 0, 1)
        condition, size = np.abs(inverse).sum((1, 2)), np.abs(points).sum(2)
        off = condition * ((_SINGULAR + rounded[regular, 0]) * size + rounded[regular, 1])
        lost = ~regular & (planes != 0).any(2).all(1)
        yield np.clip(points, *box) if box else points, None if _meet(planes[lost], rounded[lost, 0]) else off


def _meet(planes: Array, noise: Array) -> bool:
    """Whether any of some nearly dependent sets of unit normals (M, n, n) is independent beyond what rounding does."""
    least = np.linalg.svd(planes, compute_uv=False)[:, -1] if len(planes) else np.zeros(0)
    return bool((least > planes.shape[1] * (_SAME + noise)).any())


def rays(net: Net, kinks: Array) -> Array:
    """Directions (R, n) among which the recession network grows fastest for a gauge with these kinks.

    Parameters
    ----------
    net : Net
        A recession network: every hyperplane of it passes through 0.
    kinks : float64 array (h, n)

    Raises
    ------
    ValueError
        There would be more than 10^8.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 2)))
    >>> rays(net.recession(), np.eye(1)).tolist()
    [[1.0], [-1.0]]
    """
    A, *_ = _arrangements(net, None)
    count, units, n = A.shape
    _require_few(count * math.comb(units + len(kinks), n - 1), net, 1)
    normals, _ = _normalised(np.concatenate([A, _repeat(kinks, count)], axis=1), np.zeros(1))
    directions = [
        # the last right singular vector is orthogonal to the n - 1 normals; any direction is admissible
        np.linalg.svd(normals[:, chosen].reshape(count * len(chosen), n - 1, n))[2][:, -1]
        for chosen in _subsets(units + len(kinks), n - 1, max(1, _CHUNK // count))
    ]
    found = np.concatenate(directions)
    return np.concatenate([found, -found])


def _arrangements(net: Net, box: tuple[float, float] | None) -> tuple[Array, Array, Array]:
    """The hyperplanes A x + b = 0 of all units, (G, U, n) and (G, U): for each mask of the layers before the last.

    A unit that does not depend on x has a row of zeros. The third, (G, U, 2), is what rounding may have done to both.
    """
    dense = net.dense
    before: Mask = np.zeros((1, 0), bool)
    if len(dense.units) > 1:
        before = np.unique(cells.enumerate(net, box).masks[:, : -dense.units[-1]], axis=0)
    last, masks = len(dense.units) - 1, dense.split(before)
    forms, terms = (each.forms(masks, last) if dense.units else [] for each in (dense, cells.absolute(dense)))
    A = np.concatenate([A for A, _ in forms] or [np.zeros((1, 0, net.n))], axis=1)
    b = np.concatenate([b for _, b in forms] or [np.zeros((1, 0))], axis=1)
    noise = [np.stack([A.max(2, initial=0), b], axis=2) for A, b in terms] or [np.zeros((1, 0, 2))]
    return A, b, 2.0**-52 * (8 + net.n + sum(dense.units)) * np.concatenate(noise, axis=1)


def _regular(planes: Array) -> Mask:
    """Which matrices (M, n, n) of unit rows are invertible, up to rounding."""
    size = np.abs(np.linalg.det(planes))
    # the squares of the singular values add up to n, so the product of all but one is at most the root of e
    regular: Mask = size > 2 * _SINGULAR
    doubtful = ~regular & (size > 0)
    regular[doubtful] = np.linalg.svd(planes[doubtful], compute_uv=False)[:, -1] > _SINGULAR
    return regular


def _repeat(values: Array, count: int) -> Array:
    return np.broadcast_to(values, (count, *values.shape))


def _normalised(normals: Array, levels: Array) -> tuple[Array, Array]:
    """Unit normals; zeros stay, and no vertex comes from them."""
    size = np.linalg.norm(normals, axis=-1, keepdims=True)
    size = np.where(size > 0, size, 1)
    return normals / size, levels / size


def _require_few(points: int, net: Net, samples: int) -> None:
    if points > _MAX_POINTS:
        raise ValueError(
            f"a network of {sum(net.units)} units in {net.n} dimensions, with {samples} samples: its vertices are "
            f"among {points:.3g} points, and up to {_MAX_POINTS:.0g} are tried"
        )


def _subsets(count: int, size: int, chunk: int) -> Iterator[NDArray[np.intp]]:
    """All subsets of range(count) with `size` members, as arrays of at most `chunk` rows."""
    combinations = itertools.combinations(range(count), size)
    while rows := list(itertools.islice(combinations, chunk)):
        yield np.array(rows, dtype=np.intp).reshape(len(rows), size)
