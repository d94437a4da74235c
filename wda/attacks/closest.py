"""The nearest misclassified points: an ascent of the margin in a ball that shrinks onto the decision boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wda.attacks.search import free, top_rivals, uniform_start
from wda.checks import whole
from wda.losses import margin
from wda.norms import dual, dual_maximiser, norm, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["closest"]


class _Nearest:
    """The nearest misclassified point of each sample so far, and its distance; the sample itself, and inf, at first."""

    def __init__(self, x: Tensor, y: Tensor, norm: str) -> None:
        self.x, self.y, self.norm = x, y, norm
        self.points = x.clone()
        self.distance = torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)

    def update(self, points: Tensor, logits: Tensor) -> Tensor:
        """Keep those of `points` that are misclassified and nearer; True where one is misclassified."""
        wrong = margin(logits, self.y) >= 0
        distance = norm(points - self.x, self.norm)
        nearer = wrong & (distance < self.distance)
        self.points[nearer], self.distance[nearer] = points[nearer], distance[nearer]
        return wrong


def closest(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    norm: str,
    box: tuple[float, float] | None,
    *,
    steps: int = 40,
    restarts: int = 3,
    seed: int = 0,
) -> Tensor:
    r"""Per sample the nearest misclassified point that several ascents find, each in a ball of changing radius.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        Within the box.
    y : int64 Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}
    box : (float, float) or None
    steps : int
        Backward passes in each ascent.
    restarts : int
        Ascents.
    seed : int

    Returns
    -------
    Tensor, shape (N, ...)
        Misclassified and within the box; the sample itself where it is misclassified or where nothing was found.

    Examples
    --------
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> closest(Oracle(torch.nn.Linear(2, 3)), x, y, "L2", (0.0, 1.0)).shape
    torch.Size([4, 2])
    """
    whole("steps", steps), whole("restarts", restarts)
    nearest = _Nearest(x, y, norm)
    logits = oracle.logits(x)
    nearest.update(x, logits)
    rivals = top_rivals(logits, y, None)
    for restart in range(restarts):
        pursued = None if restart == 0 else rivals[:, (restart - 1) % rivals.shape[1], None]
        start = x if restart < 3 else _around(nearest, box, seed + restart)
        _ascend(oracle, nearest, start, pursued, box, steps)
    return nearest.points


def _around(nearest: _Nearest, box: tuple[float, float] | None, seed: int) -> Tensor:
    """A random point no further from each sample than the nearest flip so far."""
    ball = Threat(nearest.norm, 1.0, order=math.inf, box=None)
    noise = uniform_start(nearest.x, ball, seed) - nearest.x
    radius = torch.where(nearest.distance.isfinite(), nearest.distance, 0)
    return _project(nearest.x + _along(nearest.x, radius) * noise, nearest.x, radius, nearest.norm, box)


def _ascend(
    oracle: Oracle,
    nearest: _Nearest,
    point: Tensor,
    pursued: Tensor | None,
    box: tuple[float, float] | None,
    steps: int,
) -> None:
    """Steps up the margin, within a radius that shrinks where the label is flipped and grows where it is not."""
    x, y, name = nearest.x, nearest.y, nearest.norm
    radius = nearest.distance.clone()
    for t in range(steps):
        if pursued is None:
            logits, gradient = oracle.gradient(point, y, margin)
            value = margin(logits, y)
        else:
            logits, gradients = oracle.margin_gradients(point, y, pursued)
            gradient = gradients[:, 0]
            value = (logits.gather(1, pursued) - logits.gather(1, y[:, None]))[:, 0]
        flipped = nearest.update(point, logits)
        gradient = free(gradient, point, box)
        cooling = (1 + math.cos(math.pi * t / steps)) / 2
        rate = 0.1 * cooling + 0.001
        slope = norm(gradient, dual(name))
        reach = norm(point - x, name) + torch.where(slope > 0, -value.clamp(max=0) / slope, 0)
        grown = torch.where(radius.isfinite(), torch.maximum(radius * (1 + rate), reach.minimum(1.5 * radius)), reach)
        grown = torch.where(nearest.distance.isfinite() & radius.isfinite(), radius * (1 + rate), grown)
        shrunk = torch.minimum(radius, nearest.distance) * (1 - rate)
        radius = torch.where(flipped, shrunk, grown).minimum(0.9995 * nearest.distance)
        radius = torch.where(radius.isfinite() & (radius > 0), radius, 1e-4)
        length = (0.01 + 0.49 * cooling) * radius
        point = _project(point + _along(x, length) * dual_maximiser(gradient, name), x, radius, name, box)
    nearest.update(point, oracle.logits(point))


def _along(x: Tensor, v: Tensor) -> Tensor:
    """One number per sample, in a shape that multiplies (N, ...)."""
    return v.view(-1, *[1] * (x.ndim - 1))


def _project(points: Tensor, x: Tensor, radius: Tensor, name: str, box: tuple[float, float] | None) -> Tensor:
    return project(points, x, radius, name, box)
