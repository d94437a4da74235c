r"""How fast the worst-case risk grows at last: the slope l, and what it is on the cells of the sample, :math:`l_N`.

For every x, :math:`\theta(x+\alpha u)/\alpha \to \theta^0(u)`, the recession network. So along a ray the loss of label
k, margin or cross-entropy, rises with slope :math:`[\max_j \theta^0_j(u) - \theta^0_k(u)]_+` at last, and l is the
largest such slope over the labels present and the directions of unit norm. Eq. (7) of the first paper has all labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import linprog, nnls
from torch import Tensor, nn

from wda.cells import Cells, at, enumerate, few
from wda.certificates import bounds, milp
from wda.certificates.slope import Slope, agree
from wda.checks import choice, whole
from wda.nets import Array, Net, from_module
from wda.norms import dual, dual_maximiser, exponent
from wda.passes import check_labels, check_sample
from wda.rational import Integers, maximise, projection

# relative error of a sum, for each of its terms; and of a gradient
_ROUNDING = 2.0**-51
_GRADIENT = 1e-10
# inputs times rows of a cone from which on it is not treated in exact arithmetic
_LARGE = 600

__all__ = ["cone_maximum", "pairs_of", "recession_slope", "sample_slope"]


def pairs_of(classes: int, labels: Sequence[int] | Tensor | None) -> list[tuple[int, int]]:
    """The pairs (label, rival) of a network; `labels` are those present in the data, None for all.

    Examples
    --------
    >>> pairs_of(3, [1])
    [(1, 0), (1, 2)]
    """
    if classes < 2:
        raise ValueError(f"the network has {classes} logit: at least 2 classes are needed")
    if isinstance(labels, int) or (labels is not None and len(labels) == 0):
        raise ValueError(f"labels={labels!r}: a sequence of at least one label is accepted")
    present = range(classes) if labels is None else sorted({whole("labels", int(k), 0, classes - 1) for k in labels})
    return [(k, j) for k in present for j in range(classes) if j != k]


def cone_maximum(g: Array, cone: Array, norm: str) -> tuple[float, Array]:
    r"""The largest value of :math:`\langle g, u\rangle` over :math:`\{u : Au \le 0, \|u\|_r \le 1\}`.

    For "L2" it is the length of the projection of g onto the cone, :math:`g - A^\top\lambda` with the
    :math:`\lambda \ge 0` of non-negative least squares (Moreau); for "Linf" and "L1" a linear program.

    Parameters
    ----------
    g : array (n,)
    cone : array (m, n)
        The matrix A.
    norm : {"Linf", "L2", "L1"}

    Returns
    -------
    value : float
        At least 0, the value at u = 0.
    direction : array (n,)
        Of unit norm, or 0 where the value is 0.

    Examples
    --------
    >>> cone_maximum(np.array([3.0, 4.0]), np.array([[0.0, 1.0]]), "L2")
    (3.0, array([1., 0.]))
    """
    size = float(np.linalg.norm(g))
    if not g.any():
        return 0.0, np.zeros(len(g))
    u = _steepest(g / size, _unit(cone), norm)[0]
    length = float(np.linalg.norm(u, exponent(norm)))
    # what is left of a direction that rounding alone keeps from 0
    if length < 1e-9 or g @ u <= 0:
        return 0.0, np.zeros(len(g))
    return float(g @ u) / length, u / length


def _unit(cone: Array) -> Array:
    """The rows that are not 0, of unit length."""
    rows = cone[cone.any(1)]
    unit: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _steepest(g: Array, rows: Array, norm: str) -> tuple[Array, Array]:
    """A point of the cone and the ball in which <g, u> is largest, and the multipliers of the rows, as computed."""
    n = len(g)
    if not len(rows):
        return dual_maximiser(torch.from_numpy(g)[None], norm)[0].numpy(), np.zeros(0)
    if exponent(norm) == 2:
        weights = nnls(rows.T, g)[0]
        return g - rows.T @ weights, weights
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    if norm == "Linf":
        solved = linprog(-g, rows, np.zeros(len(rows)), bounds=(-1, 1), method="highs", options=options)
        u = solved.x
    else:
        split = np.concatenate([np.hstack([rows, -rows]), np.ones((1, 2 * n))])
        most = np.append(np.zeros(len(rows)), 1.0)
        solved = linprog(np.append(-g, g), split, most, method="highs", options=options)
        u = solved.x[:n] - solved.x[n:]
    return u, np.maximum(-solved.ineqlin.marginals[: len(rows)], 0)


def _between(g: Array, rows: Array, norm: str, rounding: float) -> tuple[float, float, Array]:
    r"""Bounds of `cone_maximum` that hold whatever rounding and the solvers' tolerances did, and the direction.

    Above, :math:`\langle g, u\rangle \le \|g - A^\top\lambda\|_s` for every :math:`\lambda \ge 0`. Below, the direction
    is turned towards the inside of the cone until it lies in it beyond rounding. Unit `rows` are off by `rounding`.
    """
    size, n = float(np.linalg.norm(g)), len(g)
    if size == 0:
        return 0.0, 0.0, np.zeros(n)
    g = g / size
    off = math.sqrt(n) * (rounding + _ROUNDING * (8 + n + len(rows)))
    u, weights = _steepest(g, rows, norm)
    most = float(np.linalg.norm(g - rows.T @ weights, exponent(dual(norm)))) + off * (1 + weights.sum()) + n * _GRADIENT
    inward = _inward(rows) if len(rows) else np.zeros(n)
    if inward is None:
        return 0.0, size * most, np.zeros(n)
    u = u + (float((rows @ u).max(initial=0.0)) + 2 * off * (1 + float(np.linalg.norm(u)))) * inward
    length = float(np.linalg.norm(u, exponent(norm)))
    if length == 0 or (rows @ u >= -off * np.linalg.norm(u)).any():
        return 0.0, size * most, np.zeros(n)
    u = u / length
    return size * max(0.0, float(g @ u) - n * _GRADIENT), size * most, u


def _inward(rows: Array) -> Array | None:
    """The shortest u with ``rows @ u <= -1``, by non-negative least squares; None if that finds none."""
    target = np.append(np.zeros(rows.shape[1]), 1.0)
    rest = np.vstack([-rows.T, np.ones(len(rows))]) @ nnls(np.vstack([-rows.T, np.ones(len(rows))]), target)[0] - target
    return -rest[:-1] / rest[-1] if len(rows) and rest[-1] < -1e-12 else None


def _exactly(g: Integers, rows: Integers, norm: str) -> tuple[Fraction, list[Fraction]]:
    """As `cone_maximum`, in rational arithmetic; the square of the value for "L2"."""
    n = len(g)
    if exponent(norm) == 2:
        u = projection(g, rows)
        return sum((value * value for value in u), Fraction(0)), u
    one = np.eye(n, dtype=int).astype(object)
    if norm == "Linf":
        return maximise(g, np.concatenate([rows, one, -one]), np.array([0] * len(rows) + [1] * 2 * n, object))
    # u is at most t in absolute value, and the t add up to 1 or less
    blocks = [[rows, 0 * rows], [one, -one], [-one, -one]]
    A = np.concatenate([*(np.hstack(block) for block in blocks), [[0] * n + [1] * n]])
    value, point = maximise(np.append(g, 0 * g), A, np.array([0] * (len(A) - 1) + [1], object))
    return value, point[:n]


def recession_slope(
    net: Net | nn.Module,
    norm: str,
    labels: Sequence[int] | Tensor | None = None,
    method: str = "auto",
    starts: int = 50,
    seed: int = 0,
    time_limit: float = 60.0,
) -> Slope:
    r"""l: the slope of the worst-case risk for large budgets, :math:`\lim_{\epsilon\to\infty} V(\epsilon)/\epsilon`.

    :math:`l = \max_{k}\max_{\|u\|_r\le1} [\max_{j\ne k} \theta^0_j(u) - \theta^0_k(u)]_+` over the labels k present,
    where :math:`\theta^0` is the recession network (`wda.nets.Net.recession`); the same for margin and cross-entropy.
    The order of the ball is 1 and inputs are unbounded.

    Parameters
    ----------
    net : Net or nn.Module
        Smooth activations count as what they are far away: GELU, SiLU and softplus as ReLU, the sigmoid as 0.
    norm : {"Linf", "L2", "L1"}
    labels : sequence of int or Tensor, optional
        Those present in the data; by default all classes.
    method : {"auto", "cones", "cells", "milp", "bounds"}
        "cones" enumerates the cells of the recession network, "cells" those of the network itself and their recession
        cones (eq. 7); "milp" solves a mixed-integer program ("Linf" and "L1"); all three are exact. "bounds" has an
        attack from below, on the ten pairs that look steepest, and certified bounds from above. "auto" is "cones" for
        up to 20,000 of them, else "bounds".
    starts, seed : int
        Of the attack of "bounds".
    time_limit : float
        Seconds for "milp"; where they run out, the bounds found so far are returned.

    Returns
    -------
    Slope
        With the direction, the label and the rival that have the lower bound.

    Raises
    ------
    NotPiecewiseAffine
        Names the layer that the method cannot treat.
    ValueError
        A label that is no class, or a network too large for the method.

    Examples
    --------
    >>> head = nn.Linear(1, 2)
    >>> _, _ = nn.init.constant_(head.weight[0], 0), nn.init.constant_(head.weight[1], 2)
    >>> recession_slope(nn.Sequential(nn.Flatten(), nn.ReLU(), head), "L2", labels=[0]).value
    2.0
    """
    exponent(norm)
    net = from_module(net)
    choice("method", method, ("auto", "cones", "cells", "milp", "bounds"))
    pairs = pairs_of(net.classes, labels)
    limit = net.recession()
    cells = enumerate(limit) if method == "cones" else enumerate(net) if method == "cells" else None
    if method == "auto":
        cells = few(limit)
    if cells is not None:
        return _over_cones([cells], [pairs], norm, "cells" if method == "cells" else "cones")
    if method == "milp":
        if norm == "L2":
            raise ValueError("norm='L2': method='milp' treats 'Linf' and 'L1'")
        return milp.recession(limit.dense, norm, pairs, time_limit)
    upper = float(bounds.recession_upper(net, norm, pairs).max())
    attacked = bounds.steepest_pairs(net, norm, pairs, seed=seed)
    values, directions = bounds.recession_lower(net, norm, attacked, starts=starts, seed=seed)
    best = int(values.argmax())
    label, rival = attacked[best]
    return Slope(float(values[best]), upper, "bounds", directions[best].flatten().cpu().numpy(), label, rival)


def sample_slope(net: Net | nn.Module, x: Tensor, y: Tensor, norm: str) -> Slope:
    r""":math:`l_N`: the slope l as seen from the cells of the sample alone (Corollary 3.2, eq. 9).

    The largest :math:`[(e_j - e_{y_i})^\top J_D u]_+` over the samples i, the masks D at :math:`x_i`, the rivals j, and
    the directions u of unit norm in the recession cone of D's cell. It is at most l, and
    :math:`E + l_N\epsilon \le V(\epsilon)`.

    Parameters
    ----------
    net : Net or nn.Module
        Affine layers and ReLU.
    x : Tensor, shape (N, \*shape)
    y : int64 Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}

    Returns
    -------
    Slope
        Exact.

    Raises
    ------
    NotPiecewiseAffine
        The layer named is neither affine nor ReLU.
    ValueError
        The sample is no sample.

    Examples
    --------
    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> slope = sample_slope(net, torch.zeros(1, 2), torch.tensor([0]), "L2")
    >>> 0 <= slope.value <= recession_slope(net, "L2", [0]).value + 1e-9
    True
    """
    exponent(norm)
    y = check_sample(x, y, None)
    net = from_module(net, x.shape[1:], x)
    check_labels(y, net.classes)
    points = x.detach().flatten(1).double().cpu().numpy()
    return _over_cones(
        (at(net, point, tolerance=0.0) for point in points),
        (pairs_of(net.classes, [k]) for k in y.tolist()),
        norm,
        "cells",
    )


def _over_cones(groups: Iterable[Cells], pairs: Iterable[list[tuple[int, int]]], norm: str, method: str) -> Slope:
    """The steepest growth over the recession cones of some cells, each for its pairs (label, rival).

    In each group the pairs are tried in the order of the dual norm of their gradients, which no cone can exceed.
    """
    best, upper = Slope(0.0, 0.0, method), 0.0
    for cells, of in zip(groups, pairs, strict=True):
        gradients = cells.gradients(of)
        steep = np.linalg.norm(gradients, exponent(dual(norm)), axis=2)
        for index in np.argsort(-steep, axis=None):
            cell, pair = (int(i) for i in np.unravel_index(index, steep.shape))
            if steep[cell, pair] <= (upper if agree(best.lower, upper) else best.lower):
                break
            least, most, direction = _growth(cells, cell, of[pair], gradients[cell, pair], norm)
            upper = max(upper, most)
            if least > best.lower:
                best = Slope(least, least, method, direction, *of[pair])
    return replace(best, upper=upper)


def _growth(cells: Cells, cell: int, pair: tuple[int, int], g: Array, norm: str) -> tuple[float, float, Array]:
    """Bounds of the growth of one pair in the recession cone of one cell, and a direction of unit norm that has it."""
    label, rival = pair
    if cells.dense.n * (sum(cells.dense.units) + cells.dense.n) > _LARGE:
        return _between(g, _unit(cells.constraints(cell)[0]), norm, cells.rounding(cell))
    *hidden, logits = cells.forms(cell)
    side = np.where(cells.masks[cell], -1, 1).astype(object)
    rows = np.concatenate([np.zeros((0, cells.dense.n + 1), object), *hidden])[:, :-1] * side[:, None]
    rows, row = rows[(rows != 0).any(1)], logits[rival, :-1] - logits[label, :-1]
    below = cells.scale
    found, point = _exactly(row, rows, norm)
    if not found:
        return 0.0, 0.0, np.zeros(len(g))
    largest = max(abs(value) for value in point)
    u = np.array([float(value / largest) for value in point])
    length = float(np.linalg.norm(u, exponent(norm)))
    # |u| is the value for the 2-norm, and 1 for the others
    value = float(largest / below) * length if exponent(norm) == 2 else float(found / below)
    return value, value, u / length
