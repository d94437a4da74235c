r"""First-order attacks on :math:`W_p` balls, p > 1: one budget, shared out over the whole sample by its gradients."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

from torch import Tensor

from wda import losses, norms
from wda.attacks.search import free
from wda.checks import number, whole
from wda.inspection import examine
from wda.passes import Model, Oracle, check_sample
from wda.threat import Threat

__all__ = ["contract", "direction", "sensitivity", "wfgsm", "wpgd"]


def wfgsm(oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, *, loss: str = "redlr") -> Tensor:
    """One step of length eps along `direction`, the steepest one for the :math:`W_p` ball (Bai et al. 2023).

    With order = inf it is the fast gradient sign method.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        The whole sample.
    y : int64 Tensor, shape (N,)
    threat : Threat
        Of order p > 1.
    loss : {"ce", "margin", "dlr", "redlr"}

    Returns
    -------
    Tensor, shape (N, ...)
        Within the ball if all mass of each sample moves to its point, and within the box.

    Raises
    ------
    ValueError
        The order is 1.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> wfgsm(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order=2)).shape
    torch.Size([4, 2])
    """
    _conjugate(threat.order)
    _, gradient = oracle.gradient(x, y, losses.get(loss))
    return contract(x.double() + threat.eps * direction(gradient, threat), x, threat)


def wpgd(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: str = "redlr",
    steps: int = 50,
    step_size: float | None = None,
) -> Tensor:
    """Steps along `direction`, each brought back into the :math:`W_p` ball by `contract` (Bai et al. 2023).

    All samples share one budget, so the whole sample is attacked at once; the model still sees batches. With the loss
    "redlr" misclassified samples have no gradient: they take no further steps and keep what they have moved, less what
    contractions take from everybody. With order = inf it is projected gradient ascent.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        The whole sample.
    y : int64 Tensor, shape (N,)
    threat : Threat
        Of order p > 1.
    loss : {"ce", "margin", "dlr", "redlr"}
    steps : int
    step_size : float, optional
        The :math:`W_p` length of every step; by default 1.875 eps / steps. The second paper (eq. 5.3) takes
        ``steps=20, step_size=eps/20``.

    Returns
    -------
    Tensor, shape (N, ...)
        The iterate with the most errors, the sample itself among them; of equal ones that of the largest mean loss.
        Within the ball if all mass of each sample moves to its point, and within the box.

    Raises
    ------
    ValueError
        The order is 1.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> wpgd(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order=2)).shape
    torch.Size([4, 2])
    """
    _conjugate(threat.order)
    value = losses.get(loss)
    steps = whole("steps", steps)
    if step_size is None:
        length = 1.875 * threat.eps / steps
    else:
        length = number("step_size", step_size, "a finite number > 0, or None,", 5e-324, sys.float_info.max)

    def iterates() -> Iterator[tuple[Tensor, Tensor]]:
        point = x
        for _ in range(steps):
            logits, gradient = oracle.gradient(point, y, value)
            yield point, logits
            if not gradient.any():
                return
            point = contract(point.double() + length * direction(gradient, threat), x, threat)
        yield point, oracle.logits(point)

    def damage(iterate: tuple[Tensor, Tensor]) -> tuple[int, float]:
        _, logits = iterate
        return int((losses.margin(logits, y) >= 0).sum()), float(value(logits, y).double().nansum())

    return max(iterates(), key=damage)[0]


def direction(gradient: Tensor, threat: Threat) -> Tensor:
    r"""The displacement of the sample, of :math:`W_p` length 1, along which its mean loss grows fastest.

    Sample i moves by :math:`\lVert g_i\rVert_s^{q-1}\,\Upsilon^{1-q}\,\mathcal M_r(g_i)`, with
    :math:`\Upsilon = (\frac1N\sum_i\lVert g_i\rVert_s^q)^{1/q}` and q, s the conjugates of p, r. The mean loss grows at
    the rate :math:`\frac1N\sum_i\langle g_i, d_i\rangle = \Upsilon`, the most that Hölder's inequality allows. For
    :math:`W_2` and "Linf" this is eq. 5.3 of the second paper; for order = inf every sample moves by 1.

    Parameters
    ----------
    gradient : Tensor, shape (N, ...)
        The gradient of each sample's loss, finite.
    threat : Threat
        Its norm and its order p > 1 count.

    Returns
    -------
    float64 Tensor, shape (N, ...)
        0 where the gradient is.

    Raises
    ------
    ValueError
        The order is 1.

    Examples
    --------
    >>> import torch
    >>> direction(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), Threat("Linf", order=2))
    tensor([[ 1.4000, -1.4000],
            [ 0.0000,  0.2000]], dtype=torch.float64)
    """
    q = _conjugate(threat.order)
    gradient = gradient.double()
    # only ratios count: in units of the largest entry no square of a tiny gradient vanishes
    unit = float(gradient.abs().max())
    if unit == 0:
        return gradient
    slopes = norms.norm(gradient / unit, norms.dual(threat.norm))
    lengths = (slopes / _power_mean(slopes, q)) ** (q - 1)
    return lengths.view(-1, *[1] * (gradient.ndim - 1)) * norms.dual_maximiser(gradient, threat.norm)


def contract(points: Tensor, x: Tensor, threat: Threat) -> Tensor:
    r"""Bring a displaced sample back into the :math:`W_p` ball, and then into the box.

    Where :math:`(\frac1N\sum_i\lVert x_i'-x_i\rVert_r^p)^{1/p}` exceeds eps, one factor shrinks all displacements so
    that it is eps (Bai et al. 2023). No displacement of the ball is nearer, measured in that same length. With
    order = inf each sample is projected onto its own ball.

    Parameters
    ----------
    points : Tensor, shape (N, ...)
    x : Tensor, shape (N, ...)
        The sample, within the box.
    threat : Threat

    Returns
    -------
    Tensor, shape (N, ...)
        In the dtype of `x`. Rounding lengthens no displacement, as computed in float64.

    Examples
    --------
    >>> import torch
    >>> contract(torch.tensor([[0.3], [0.4]]), torch.zeros(2, 1), Threat("L2", 0.25, order=2))
    tensor([[0.2121],
            [0.2828]])
    """
    points = points.double()
    if math.isinf(threat.order):
        radius: float | Tensor = threat.eps
        nearer = norms.project(points, x, radius, threat.norm, threat.box)
    else:
        moved = points - x.double()
        lengths = norms.norm(moved, threat.norm)
        cost = _power_mean(lengths, threat.order)
        factor = threat.eps / cost if cost > threat.eps else 1.0
        radius = factor * lengths
        nearer = x.double() + factor * moved
    return norms.round_inward(norms.clamp(nearer.to(x.dtype), threat.box), x, radius, threat.norm)


def sensitivity(
    model: Model,
    x: Tensor,
    y: Tensor,
    norm: str = "Linf",
    order: float = 2,
    loss: str = "redlr",
    box: tuple[float, float] | None = None,
    batch_size: int = 256,
    autocast: bool = False,
) -> float:
    r"""The slope at radius 0 of the worst mean loss over a :math:`W_p` ball: the second paper's :math:`\Upsilon`.

    :math:`\Upsilon = (\frac1N\sum_i\lVert\nabla_x\ell(x_i, y_i)\rVert_s^q)^{1/q}`, with q, s the conjugates of p, r
    (Theorem 4.1 of the second paper: p = 2 and the norm "Linf", so q = 2 and s = 1).

    Parameters
    ----------
    model : nn.Module, or another callable
        Its mode and the gradients of its parameters are left as they were.
    x : Tensor, shape (N, ...)
    y : integer Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}
        Norm of the ground cost.
    order : float
        p > 1, or ``math.inf``.
    loss : {"ce", "margin", "dlr", "redlr"}
    box : (float, float) or None
        By default inputs may move anywhere, as in the paper's formula. In a box the coordinates that it stops do not
        count: a pixel that is black cannot get darker.
    batch_size : int
    autocast : bool
        Take gradients in bfloat16 where torch does so by itself: enough for an estimate.

    Returns
    -------
    float

    Raises
    ------
    ValueError, TypeError
        A bad argument. With order = 1 the slope is another one: `wda.certificates.initial_slope`.

    Warns
    -----
    Untrustworthy
        The model is random, or its logits depend on the other samples of a batch.

    Examples
    --------
    >>> import torch
    >>> model = lambda x: torch.cat([0 * x, 3 * x], dim=1)  # the margin for the label 0 is 3x
    >>> x, y = torch.tensor([[0.2], [1.0]]), torch.tensor([0, 0])
    >>> sensitivity(model, x, y, loss="margin")
    3.0
    >>> round(sensitivity(model, x, y, loss="margin", box=(0.0, 1.0)), 4)
    2.1213
    """
    threat = Threat(norm, 0.0, order, box)
    q = _conjugate(threat.order)
    y = check_sample(x, y, threat.box)
    with Oracle(model, batch_size, autocast) as oracle:
        examine(oracle, x, y)
        x = oracle.to_model(x)
        _, gradient = oracle.gradient(x, y.to(x.device), losses.get(loss))
    slopes = norms.norm(free(gradient, x, threat.box).double(), norms.dual(threat.norm))
    return _power_mean(slopes, q)


def _conjugate(order: float) -> float:
    """q with 1/p + 1/q = 1."""
    if order == 1:
        raise ValueError(
            "order=1: an order > 1 is accepted. In a W_1 ball the first-order direction gives the whole budget to one "
            "sample, the steepest, where splitting mass does better: use 'closest', 'wda++', or 'wda' with kappa > 1"
        )
    return 1.0 if math.isinf(order) else order / (order - 1)


def _power_mean(lengths: Tensor, p: float) -> float:
    """The p-th root of the mean p-th power of numbers >= 0, scaled so that no power overflows or vanishes."""
    largest = float(lengths.max())
    return largest * float((lengths / largest).pow(p).mean()) ** (1 / p) if largest > 0 else 0.0
