"""DeepFool: walk to the nearest linearised decision boundary until the label changes."""

from __future__ import annotations

import torch
from torch import Tensor

from wda.attacks.search import free, top_rivals
from wda.checks import number, whole
from wda.inspection import tell_cost
from wda.losses import margin
from wda.norms import clamp, dual, dual_maximiser, norm
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["deepfool"]


def deepfool(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    ball: Threat,
    *,
    steps: int = 50,
    overshoot: float = 0.005,
    rivals: int | None = None,
) -> Tensor:
    r"""Steps to the nearest boundary of the linearised model (Moosavi-Dezfooli et al. 2016).

    At each point the rival j with the smallest :math:`|f_j| / \|\nabla f_j\|_s` is chosen, where
    :math:`f_j = z_j - z_y`, and the step goes just as far along the dual-norm maximiser of its gradient. A sample
    is done once the displacement, lengthened by `overshoot`, changes its label.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise. The walk itself is not bounded by the ball, only by the box; the caller projects its end.
    steps : int
        At most so many.
    overshoot : float
        From 0 to 1. On an affine model the result is this much further away than the nearest boundary.
    rivals : int, optional
        Consider only the classes with the largest logits at the sample; by default all.

    Returns
    -------
    Tensor, shape (N, ...)
        Within the box; where the label changed, just behind a boundary.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> deepfool(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf")).shape
    torch.Size([4, 2])
    """
    whole("steps", steps)
    lengthened = 1 + number("overshoot", overshoot, "a number from 0 to 1", 0, 1)
    logits = oracle.logits(x)
    candidates = top_rivals(logits, y, rivals)
    tell_cost("deepfool", candidates.shape[1], steps, "rivals")
    walk, result = x.clone(), x.clone()
    active = (margin(logits, y) < 0).nonzero()[:, 0]
    for _ in range(steps):
        if not len(active):
            break
        before = walk[active]
        walk[active] = clamp(
            before + _step(oracle, before, y[active], candidates[active], ball.norm, ball.box), ball.box
        )
        ahead = clamp(x[active] + lengthened * (walk[active] - x[active]), ball.box)
        result[active] = ahead
        # where no rival has a gradient nothing moves, nor ever will
        moved = (walk[active] != before).flatten(1).any(1)
        active = active[moved & (margin(oracle.logits(ahead), y[active]) < 0)]
    return result


def _step(oracle: Oracle, x: Tensor, y: Tensor, rivals: Tensor, name: str, box: tuple[float, float] | None) -> Tensor:
    """The shortest step onto the boundary of one of the rivals, for the model linearised at x."""
    logits, parts = oracle.rival_gradients(x, y, rivals, max(1, oracle.batch_size // len(x)))
    gaps = (logits.gather(1, rivals) - logits.gather(1, y[:, None])).abs().to(x)
    length, chosen = torch.full_like(gaps[:, 0], torch.inf), torch.zeros_like(x)
    for some, gradients in parts:
        gradients = free(gradients, x[:, None], box)
        slopes = norm(gradients.flatten(0, 1), dual(name)).view(gradients.shape[:2])
        # a rival whose gradient vanishes is infinitely far away
        lengths = torch.where(slopes > 0, gaps[:, some] / slopes.clamp(min=torch.finfo(x.dtype).tiny), torch.inf)
        least, nearest = lengths.min(dim=1)
        nearer = least < length
        length = torch.where(nearer, least, length)
        chosen[nearer] = gradients[nearer, nearest[nearer]]
    length = torch.where(length.isfinite(), length, 0)
    return length.view(-1, *[1] * (x.ndim - 1)) * dual_maximiser(chosen, name)
