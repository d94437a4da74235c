"""Projected gradient ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from wda import losses
from wda.attacks.search import Best, free, step_lengths, uniform_start
from wda.checks import flag, whole
from wda.norms import dual_maximiser, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["pgd"]


def pgd(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    ball: Threat,
    *,
    loss: str = "ce",
    steps: int = 20,
    step_size: float | None = None,
    random_start: bool = True,
    stop_at_flip: bool = False,
    seed: int = 0,
) -> Tensor:
    """Steps along the dual-norm maximiser of the gradient, each projected onto the ball (Madry et al. 2018).

    Coordinates that the box stops do not count in the direction.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise; its `eps` is the radius around each sample.
    loss : {"ce", "margin", "dlr", "redlr"}
    steps : int
    step_size : float, optional
        Length of every step in the ball's norm; by default lengths fall from the radius along a cosine.
    random_start : bool
        Start at a random point of the ball, or at the sample.
    stop_at_flip : bool
        Leave a sample alone as soon as its label has flipped. The accuracy is the same, the loss smaller.
    seed : int

    Returns
    -------
    Tensor, shape (N, ...)
        The iterate of largest margin, the sample itself among them.

    Examples
    --------
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> pgd(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf")).shape
    torch.Size([4, 2])
    """
    lengths = step_lengths(whole("steps", steps), ball.eps, step_size)
    value = losses.get(loss)
    best = Best(x, oracle.logits(x), y)
    point = uniform_start(x, ball, seed) if flag("random_start", random_start) else x
    flag("stop_at_flip", stop_at_flip)
    rows = torch.arange(len(x), device=x.device)
    for length in lengths:
        if stop_at_flip:
            onward = best.margin[rows] < 0
            rows, point = rows[onward], point[onward]
            if not len(rows):
                return best.points
        logits, gradient = oracle.gradient(point, y[rows], value)
        best.update(point, logits, rows)
        direction = dual_maximiser(free(gradient, point, ball.box), ball.norm)
        point = project(point + length * direction, x[rows], ball.eps, ball.norm, ball.box)
    best.update(point, oracle.logits(point), rows)
    return best.points
