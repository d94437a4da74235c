r"""The worst-case risk as a function of the budget, from what moving each sample to given points would gain.

With :math:`\varphi_i(t)` the largest loss within distance t of sample i and :math:`\varphi_i^{**}` its least concave
majorant, :math:`V(\epsilon)=\max\{\frac1N\sum_i\varphi_i^{**}(t_i):\frac1N\sum_it_i\le\epsilon\}`. Each majorant is a
chain of segments of falling slope; the budget is spent on the steepest segments of all samples first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wda.checks import number
from wda.nets import Array

__all__ = ["Curve", "Tail", "envelopes"]

# a point this near to its sample, relative to the size of all samples, is the sample with rounding
_NEAR = 1e-9


@dataclass(frozen=True, eq=False)
class Tail:
    """How mass gains at infinity: at which slope, from which sample, in which direction (n,) of unit norm.

    Examples
    --------
    >>> Tail(0.5, 0, np.array([1.0])).slope
    0.5
    """

    slope: float
    source: int
    direction: Array


@dataclass(frozen=True, eq=False)
class Curve:
    r"""The worst-case risk :math:`V(\epsilon)` for every budget at once: concave, increasing, piecewise linear.

    Attributes
    ----------
    knots : float64 array (M + 1,)
        Budgets at which the slope changes, in units of the input; the first is 0.
    values : float64 array (M + 1,)
        V there; the first is the risk on the sample.
    source : int array (M,)
        Between the knots m and m + 1 the mass of sample ``source[m]`` moves on,
    points : float64 array (M, n)
        to ``points[m]``.
    ends : Tail or None
        What happens beyond the last knot; None if V is constant there.

    Examples
    --------
    >>> knots, ends = np.array([0.0, 1.0]), Tail(0.5, 0, np.ones(1))
    >>> curve = Curve(knots, knots, np.array([0]), np.ones((1, 1)), ends)
    >>> curve(3.0), curve.initial, curve.tail
    (2.0, 1.0, 0.5)
    """

    knots: Array
    values: Array
    source: NDArray[np.intp]
    points: Array
    ends: Tail | None

    @property
    def tail(self) -> float:
        r"""The slope l beyond the last knot: :math:`V(\epsilon)/\epsilon\to l`."""
        return self.ends.slope if self.ends else 0.0

    @property
    def initial(self) -> float:
        r"""The slope :math:`\Lambda=V'(0+)` before the first knot."""
        if len(self.knots) == 1:
            return self.tail
        return float((self.values[1] - self.values[0]) / self.knots[1])

    @overload
    def __call__(self, eps: float | str) -> float: ...
    @overload
    def __call__(self, eps: ArrayLike) -> float | Array: ...
    def __call__(self, eps: ArrayLike) -> float | Array:
        """V at one budget, which may be a fraction such as "8/255", or at an array of them.

        Raises
        ------
        ValueError
            A budget is negative, NaN or infinite, or no number.
        """
        if isinstance(eps, str):
            eps = number("eps", eps, 'a finite number >= 0, or a fraction such as "8/255",', 0, sys.float_info.max)
        budget = np.asarray(eps, dtype=np.float64)
        if not (np.isfinite(budget) & (budget >= 0)).all():
            raise ValueError(f"eps={eps!r}: finite numbers >= 0 are accepted")
        value: Array = np.interp(budget, self.knots, self.values) + self.tail * np.maximum(budget - self.knots[-1], 0)
        return value if value.ndim else float(value)


def envelopes(
    x: Array,
    chunks: Iterable[Array],
    loss: Callable[[Array], Array],
    size: Callable[[Array], Array],
    ends: Tail | None,
) -> Curve:
    r"""The worst-case risk over distributions that move mass to given points, or to infinity.

    Parameters
    ----------
    x : float64 array (N, n)
        The sample.
    chunks : iterable of arrays (N, C, n)
        Points to which each sample may move.
    loss : callable
        From points (N, C, n) to the loss (N, C) of each with the label of its sample.
    size : callable
        The norm: from displacements (..., n) to lengths (...).
    ends : Tail or None
        The steepest gain at infinity, if there is any.

    Examples
    --------
    >>> points = np.array([[[1.0], [2.0], [3.0]]])
    >>> curve = envelopes(np.zeros((1, 1)), [points], lambda p: np.sqrt(p[..., 0]), lambda v: v[..., 0], None)
    >>> curve.knots.tolist(), curve.values.round(3).tolist()
    ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.414, 1.732])
    """
    start, tail = loss(x[:, None]), ends.slope if ends else 0.0
    hulls = [(np.zeros(1), f, p[None]) for f, p in zip(start, x, strict=True)]
    extent = np.abs(x).max()
    for points in chunks:
        distance, value = size(points - x[:, None]), loss(points)
        # samples at 0 have no size: there the usual distance takes its place
        near = _NEAR * (extent if extent > 0 or not distance.size else np.median(distance))
        useful = (distance > near) & (value - tail * distance > start)
        for i, keep in enumerate(useful):
            d, f, p = (
                np.concatenate([old, new[i, keep]])
                for old, new in zip(hulls[i], (distance, value, points), strict=True)
            )
            corners = _hull(d, f, tail)
            hulls[i] = d[corners], f[corners], p[corners]
    steps = [(np.diff(d), np.diff(f), np.full(len(d) - 1, i), p[1:]) for i, (d, f, p) in enumerate(hulls)]
    width, gain, source, points = (np.concatenate(part) for part in zip(*steps, strict=True))
    # within a sample the slopes fall already, and a stable sort keeps equal ones in order
    order = np.argsort(-gain / width, kind="stable")
    knots = np.append(0, np.cumsum(width[order])) / len(x)
    values = start.mean() + np.append(0, np.cumsum(gain[order])) / len(x)
    return Curve(knots, values, source[order], points[order], ends)


def _hull(d: Array, f: Array, tail: float) -> list[int]:
    """The corners of the least concave majorant of slope at least `tail`; the first point has d = 0."""
    order = np.lexsort((-f, d))
    key = (f - tail * d)[order]
    # only a point that is worth more than all nearer ones can be a corner
    record = np.append(True, key[1:] > np.maximum.accumulate(key)[:-1])
    corners: list[int] = []
    for i in order[record]:
        while len(corners) > 1 and _slope(d, f, corners[-1], i) >= _slope(d, f, corners[-2], corners[-1]):
            corners.pop()
        corners.append(int(i))
    # a segment whose slope exceeds the tail by rounding only belongs to the tail
    while len(corners) > 1 and _slope(d, f, corners[-2], corners[-1]) <= tail * (1 + 1e-12):
        corners.pop()
    return corners


def _slope(d: Array, f: Array, a: int, b: int) -> float:
    return float((f[b] - f[a]) / (d[b] - d[a]))
