"""The Wasserstein distributional attack's search for points: Algorithm 1 of the first paper."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wda.attacks.search import Best, free, step_lengths, top_rivals
from wda.checks import choice, whole
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
    logits = oracle.logits(x)
    best = Best(x, logits, y)
    pursued = top_rivals(logits, y, rivals)
    point = x
    for t, length in enumerate(lengths):
        logits, gradients = oracle.margin_gradients(point, y, pursued)
        best.update(point, logits)
        proposals = (_proposal(point, gradients[:, j], length, x, ball) for j in range(pursued.shape[1]))
        if t < probe_steps:
            point, rival = _probe(oracle, proposals, y, pursued, rule, best)
        else:
            point = next(proposals)
        if t == probe_steps - 1:
            pursued = rival[:, None]
    best.update(point, oracle.logits(point))
    return best.points


def _proposal(point: Tensor, gradient: Tensor, length: float, x: Tensor, ball: Threat) -> Tensor:
    """Line 10 of Algorithm 1: one rival's projected step."""
    direction = dual_maximiser(free(gradient, point, ball.box), ball.norm)
    return project(point + length * direction, x, ball.eps, ball.norm, ball.box)


def _probe(
    oracle: Oracle, proposals: Iterator[Tensor], y: Tensor, rivals: Tensor, rule: str, best: Best
) -> tuple[Tensor, Tensor]:
    """Line 11: the proposal to follow, and its rival (N,). All that are evaluated are candidates for the best."""
    value = torch.full(y.shape, -torch.inf, dtype=best.margin.dtype, device=y.device)
    point, rival = best.points.clone(), rivals[:, 0].clone()
    for j, proposal in enumerate(proposals):
        logits = oracle.logits(proposal)
        best.update(proposal, logits)
        own = logits.gather(1, rivals[:, j : j + 1])[:, 0]
        if rule == "margin":
            own = own - logits.gather(1, y[:, None])[:, 0]
        better = own > value
        value[better], point[better], rival[better] = own[better], proposal[better], rivals[better, j]
    return point, rival
