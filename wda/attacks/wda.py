"""The Wasserstein distributional attack's search for points: Algorithm 1 of the first paper."""

from __future__ import annotations

import torch
from torch import Tensor

from wda.attacks.search import Best, check_count, step_lengths, top_rivals
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

    Two things differ from the printed algorithm. Line 11 chooses the largest raw logit :math:`z_j(\varphi_j)`,
    which changes when one function is added to all logits although the classifier does not; here the default is
    the margin :math:`z_j(\varphi_j) - z_y(\varphi_j)`. And line 14 returns the last iterate; here it is the point of
    largest margin among all that were evaluated, at no further pass.

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
    """
    lengths = step_lengths(check_count("steps", steps), ball.eps, step_size)
    if check_count("probe_steps", probe_steps) > steps:
        raise ValueError(f"probe_steps={probe_steps!r}: a whole number from 1 to steps={steps} is accepted")
    if rule not in ("margin", "logit"):
        raise ValueError(f"rule={rule!r}: 'margin' or 'logit' is accepted")
    logits = oracle.logits(x)
    best = Best(x, logits, y)
    pursued = top_rivals(logits, y, rivals)
    point = x
    for t, length in enumerate(lengths):
        logits, gradients = oracle.margin_gradients(point, y, pursued)
        best.update(point, logits)
        proposals = _proposals(point, gradients, length, x, ball)
        if t < probe_steps:
            chosen = _choose(oracle, proposals, y, pursued, rule, best)
            point = proposals[torch.arange(len(x), device=x.device), chosen]
            if t == probe_steps - 1:
                pursued = pursued.gather(1, chosen[:, None])
        else:
            point = proposals[:, 0]
    best.update(point, oracle.logits(point))
    return best.points


def _proposals(point: Tensor, gradients: Tensor, length: float, x: Tensor, ball: Threat) -> Tensor:
    """Line 10 of Algorithm 1: one projected step for each rival, (N, m, ...)."""
    direction = dual_maximiser(gradients.flatten(0, 1), ball.norm).view_as(gradients)
    ahead = point[:, None] + length * direction
    anchors = x[:, None].expand_as(ahead)
    return project(ahead.flatten(0, 1), anchors.flatten(0, 1), ball.eps, ball.norm, ball.box).view_as(ahead)


def _choose(oracle: Oracle, proposals: Tensor, y: Tensor, rivals: Tensor, rule: str, best: Best) -> Tensor:
    """Line 11: which proposal to follow, (N,). Every proposal evaluated is a candidate for the best point."""
    logits = oracle.logits(proposals.flatten(0, 1)).unflatten(0, rivals.shape)
    for j in range(rivals.shape[1]):
        best.update(proposals[:, j], logits[:, j])
    own = logits.gather(2, rivals[:, :, None])[:, :, 0]
    if rule == "margin":
        own = own - logits.gather(2, y[:, None, None].expand(-1, rivals.shape[1], 1))[:, :, 0]
    chosen: Tensor = own.argmax(1)
    return chosen
