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

__all__ = ["Gauge", "gauge", "polygon", "rays", "vertices"]

_MAX_POINTS = 100_000_000
_CHUNK = 1 << 18  # points at once
_SINGULAR = 1e-13  # determinants of unit normals below this are rounding


@dataclass(frozen=True)
class Gauge:
    """A polyhedral norm: its size, and the normals (h, n) of the hyperplanes through 0 along which it bends."""

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
        There are more than 10^8.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    >>> [points.shape for points in vertices(net, np.zeros((4, 2)), np.eye(2))]
    [(4, 9, 2)]
    """
    arrangements = list(_arrangements(net, box))
    n = net.n
    faces, level = (np.repeat(np.eye(n), 2, 0), np.tile(box, n)) if box else (np.zeros((0, n)), np.zeros(0))
    free = [len(A) + len(faces) for A, _ in arrangements]
    total = sum(math.comb(f + len(kinks), n) - math.comb(len(kinks), n) for f in free) * len(x)
    if total > _MAX_POINTS:
        raise ValueError(
            f"the vertices are among {total:.3g} points for {len(x)} samples; up to {_MAX_POINTS:.0g} are tried: take "
            "fewer samples at a time, or a smaller network"
        )
    for A, b in arrangements:
        normals = np.concatenate([A, faces, kinks])
        # column i holds the levels for sample i
        common = np.repeat(np.append(-b, level)[:, None], len(x), 1)
        levels = np.concatenate([common, kinks @ x.T])
        size = np.linalg.norm(normals, axis=1, keepdims=True)
        normals, levels = normals / size, levels / size
        for chosen in _subsets(len(normals), n, max(1, _CHUNK // len(x))):
            # kinks alone meet in the sample
            chosen = chosen[chosen[:, 0] < len(common)]
            chosen = chosen[np.abs(np.linalg.det(normals[chosen])) > _SINGULAR]
            points = np.linalg.solve(normals[chosen], levels[chosen]).transpose(2, 0, 1)
            yield np.clip(points, *box) if box else points


def rays(net: Net, kinks: Array) -> Array:
    """Directions (R, n) among which the recession network grows fastest for a gauge with these kinks.

    Parameters
    ----------
    net : Net
        A recession network: every hyperplane of it passes through 0.
    kinks : float64 array (h, n)

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 2)))
    >>> rays(net.recession(), np.eye(1)).tolist()
    [[1.0], [-1.0]]
    """
    n = net.n
    directions = [np.empty((0, n))]
    for A, _ in _arrangements(net, None):
        normals = np.concatenate([A / np.linalg.norm(A, axis=1, keepdims=True), kinks])
        for chosen in _subsets(len(normals), n - 1, _CHUNK):
            # the last right singular vector is orthogonal to the n - 1 normals; any direction is admissible
            directions.append(np.linalg.svd(normals[chosen].reshape(len(chosen), n - 1, n))[2][:, -1])
    found = np.concatenate(directions)
    return np.concatenate([found, -found])


def _arrangements(net: Net, box: tuple[float, float] | None) -> Iterator[tuple[Array, Array]]:
    """The hyperplanes A x + b = 0 of all units: one arrangement for each mask of the layers before the last."""
    dense = net.dense
    before: Mask = np.zeros((1, 0), bool)
    if len(dense.units) > 1:
        before = np.unique(cells.enumerate(net, box).masks[:, : -dense.units[-1]], axis=0)
    forms = dense.forms(dense.split(before), len(dense.units) - 1)
    for g in range(len(before)):
        A = np.concatenate([A[g] for A, _ in forms] or [np.zeros((0, net.n))])
        b = np.concatenate([b[g] for _, b in forms] or [np.zeros(0)])
        depends = A.any(1)
        yield A[depends], b[depends]


def _subsets(count: int, size: int, chunk: int) -> Iterator[NDArray[np.intp]]:
    """All subsets of range(count) with `size` members, as arrays of at most `chunk` rows."""
    combinations = itertools.combinations(range(count), size)
    while rows := list(itertools.islice(combinations, chunk)):
        yield np.array(rows, dtype=np.intp).reshape(len(rows), size)
