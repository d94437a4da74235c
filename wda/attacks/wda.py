"""The Wasserstein distributional attack's search for points: Algorithm 1 of the first paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from wda.attacks.search import Best, free, step_lengths, top_rivals
from wda.checks import choice, flag, whole
from wda.inspection import tell_cost
from wda.norms import dual_maximiser, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["wda"]


def wda(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    ball: Threat,
    *,
    steps: int = 20,
    probe_steps: int = 10,
    step_size: float | None = None,
    rivals: int | None = None,
    rule: str = "margin",
    halving: bool = False,
    stop_at_flip: bool = False,
) -> Tensor:
    r"""Probe every rival, then pursue one (Algorithm 1 of the first paper, lines 5 to 14).

    In a probing step each rival j proposes :math:`\varphi_j`, the projection of a step along
    :math:`\mathcal M_r(\nabla(z_j - z_y))`, and the best proposal becomes the next point. After the last
    probing step its rival stays fixed.

    Three things differ from the printed algorithm. Coordinates that the box stops do not count in a direction.
    Line 11 chooses the largest raw logit :math:`z_j(\varphi_j)`, which changes when one function is added to all
    logits although the classifier does not; here the default is the margin
    :math:`z_j(\varphi_j) - z_y(\varphi_j)`. And line 14 returns the last iterate; here it is the point of largest
    margin among all that were evaluated, at no further pass.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise; its `eps` is the paper's :math:`\kappa\varepsilon`.
    steps, probe_steps : int
        Steps in all, and how many of them probe.
    step_size : float, optional
        The paper's constant alpha; by default lengths fall from the radius along a cosine.
    rivals : int, optional
        Probe only the classes with the largest logits at the sample; by default all K-1.
    rule : {"margin", "logit"}
        How line 11 compares proposals; "logit" is the paper's.
    halving : bool
        Drop the half of the rivals with the worse proposals after each probing step, until one is left. Probing then
        costs about 2K gradients, in place of K-1 in each of its steps.
    stop_at_flip : bool
        Leave a sample alone as soon as its label has flipped. The accuracy is the same, the margin smaller.

    Returns
    -------
    Tensor, shape (N, ...)

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> wda(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf")).shape
    torch.Size([4, 2])
    """
    lengths = step_lengths(whole("steps", steps), ball.eps, step_size)
    whole("probe_steps", probe_steps, 1, steps)
    choice("rule", rule, ("margin", "logit"))
    flag("halving", halving), flag("stop_at_flip", stop_at_flip)
    logits = oracle.logits(x)
    best = Best(x, logits, y)
    rows = torch.arange(len(x), device=x.device)
    point, pursued = x, top_rivals(logits, y, rivals)
    if not halving:
        tell_cost("wda", pursued.shape[1], probe_steps, "rivals or halving")
    for t, length in enumerate(lengths):
        if stop_at_flip:
            onward = best.margin[rows] < 0
            rows, point, pursued = rows[onward], point[onward], pursued[onward]
            if not len(rows):
                return best.points
        # as many rivals at once as make a batch: fewer calls for few samples, and no more memory for many
        logits, parts = oracle.rival_gradients(point, y[rows], pursued, max(1, oracle.batch_size // len(rows)))
        best.update(point, logits, rows)
        propose = partial(_proposals, point, length=length, x=x[rows], ball=ball)
        if pursued.shape[1] == 1:
            point = propose(next(parts)[1])[:, 0]
        else:
            point, pursued = _probe(oracle, propose, parts, pursued, rule, best, rows)
        if t == probe_steps - 1:
            pursued = pursued[:, :1]
        elif halving:
            pursued = pursued[:, : (pursued.shape[1] + 1) // 2]
    best.update(point, oracle.logits(point), rows)
    return best.points


def _proposals(point: Tensor, gradients: Tensor, length: float, x: Tensor, ball: Threat) -> Tensor:
    """Line 10 of Algorithm 1: a projected step along each of the gradients (N, m, ...)."""
    gradients = free(gradients, point[:, None], ball.box)
    directions = dual_maximiser(gradients.flatten(0, 1), ball.norm).view_as(gradients)
    ahead = point[:, None] + length * directions
    anchor = x[:, None].expand_as(ahead)
    return project(ahead.flatten(0, 1), anchor.flatten(0, 1), ball.eps, ball.norm, ball.box).view_as(ahead)


def _probe(
    oracle: Oracle,
    propose: Callable[[Tensor], Tensor],
    parts: Iterator[tuple[slice, Tensor]],
    rivals: Tensor,
    rule: str,
    best: Best,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Line 11: the proposal to follow, and the rivals in the order of theirs. All proposals may be the best point."""
    own = best.y[rows, None, None]
    values, point, highest = [], best.points[rows], torch.full_like(best.margin[rows], -torch.inf)
    for some, gradients in parts:
        proposals = propose(gradients)
        logits = oracle.logits(proposals.flatten(0, 1)).unflatten(0, proposals.shape[:2])
        value = logits.gather(2, rivals[:, some, None])
        if rule == "margin":
            value = value - logits.gather(2, own.expand_as(value))
        values.append(value[:, :, 0].nan_to_num(nan=-torch.inf))
        for j in range(proposals.shape[1]):
            best.update(proposals[:, j], logits[:, j], rows)
            higher = values[-1][:, j] > highest
            point[higher], highest[higher] = proposals[higher, j], values[-1][higher, j]
    return point, rivals.gather(1, torch.cat(values, dim=1).argsort(dim=1, descending=True, stable=True))
