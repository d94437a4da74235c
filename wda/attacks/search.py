"""What iterative attacks share: step lengths, the best point so far, numbers drawn per sample."""

from __future__ import annotations

import hashlib
import math
import sys

import torch
from torch import Tensor

from wda.checks import number, whole
from wda.losses import margin, rival_logits
from wda.norms import bounds, exponent, project
from wda.threat import Threat

__all__ = ["Best", "free", "step_lengths", "top_rivals", "uniform_start"]


class Best:
    """The points of largest margin seen so far, one for each sample.

    Examples
    --------
    >>> x, y = torch.zeros(2, 1), torch.tensor([0, 0])
    >>> best = Best(x, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), y)
    >>> best.update(x + 1, torch.tensor([[0.0, 1.0], [2.0, 0.0]]), rows=torch.tensor([0, 1]))
    >>> best.points.flatten()
    tensor([1., 0.])
    """

    def __init__(self, x: Tensor, logits: Tensor, y: Tensor) -> None:
        self.points = x.clone()
        self.y = y
        self.margin = margin(logits, y)

    def update(self, points: Tensor, logits: Tensor, rows: Tensor) -> None:
        """Keep those of `points`, one for each of the samples `rows`, that have a larger margin than what is kept."""
        new = margin(logits, self.y[rows])
        better = new > self.margin[rows]
        kept = rows[better]
        self.points[kept], self.margin[kept] = points[better], new[better]


def step_lengths(steps: int, radius: float, step_size: float | None) -> list[float]:
    """`steps` steps of `step_size`; by default falling along a quarter cosine from the radius to near zero.

    The first step reaches the sphere, so an attack on an affine model is exact after one; the last ones refine.

    Examples
    --------
    >>> [round(length, 3) for length in step_lengths(3, 1.0, None)]
    [1.0, 0.866, 0.5]
    """
    if step_size is not None:
        return [number("step_size", step_size, "a finite number > 0, or None,", 5e-324, sys.float_info.max)] * steps
    return [radius * math.cos(math.pi / 2 * t / steps) for t in range(steps)]


def top_rivals(logits: Tensor, y: Tensor, rivals: int | None) -> Tensor:
    """The `rivals` classes of largest logit other than the label, (N, m); all K-1 of them by default.

    Examples
    --------
    >>> top_rivals(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.tensor([1]), 2)
    tensor([[2, 0]])
    """
    others = logits.shape[1] - 1
    kept = others if rivals is None else whole("rivals", rivals, 1, others)
    return rival_logits(logits, y).topk(kept, dim=1).indices


def free(gradient: Tensor, point: Tensor, box: tuple[float, float] | None) -> Tensor:
    """The gradient with the coordinates set to 0 that the box stops from growing with it.

    Without this the steepest direction in the 1-norm, a single coordinate, may be one that cannot move, and an
    ascent along it stands still. What is within a millionth of the box's width from a side counts as at it, so that
    rounding does not decide.

    Examples
    --------
    >>> free(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0]]), (0.0, 1.0))
    tensor([[ 0., -2.]])
    """
    if box is None:
        return gradient
    low, high = bounds(box, point)
    slack = 1e-6 * (box[1] - box[0])
    least = torch.where(point <= low + slack, 0, -torch.inf).to(gradient.dtype)
    most = torch.where(point >= high - slack, 0, torch.inf).to(gradient.dtype)
    return gradient.clamp(least, most)


def uniform_start(x: Tensor, ball: Threat, seed: int) -> Tensor:
    """A point drawn uniformly from the ball around each sample, projected onto the box.

    The numbers depend on the seed and on the sample's own values, so that neither the batch size nor the order
    of the samples changes them.

    Examples
    --------
    >>> x = torch.full((2, 3), 0.5)
    >>> start = uniform_start(x, Threat("Linf", 0.1, order="inf"), seed=0)
    >>> bool(((start - x).abs() <= 0.1 + 1e-6).all())
    True
    """
    noise = torch.stack([_uniform_in_ball(row, ball.norm, seed) for row in x.detach().cpu()]).to(x)
    return project(x + ball.eps * noise, x, ball.eps, ball.norm, ball.box)


def _uniform_in_ball(row: Tensor, norm: str, seed: int) -> Tensor:
    """A float32 point drawn uniformly from the unit ball."""
    digest = hashlib.sha256(row.float().numpy().tobytes() + seed.to_bytes(8, "little", signed=False)).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if norm == "Linf":
        return torch.rand(row.shape, generator=generator) * 2 - 1
    if norm == "L2":
        direction = torch.randn(row.shape, generator=generator)
    else:  # signed exponentials, normalised, are uniform on the sphere of the 1-norm
        direction = torch.empty(row.shape).exponential_(generator=generator)
        direction *= torch.randint(0, 2, row.shape, generator=generator) * 2 - 1
    radius = torch.rand(1, generator=generator) ** (1 / row.numel())
    point: Tensor = radius * direction / torch.linalg.vector_norm(direction, exponent(norm))
    return point
