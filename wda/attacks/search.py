"""What iterative attacks share: step lengths, the best point so far, numbers drawn per sample."""

from __future__ import annotations

import hashlib
import math
import sys

import torch
from torch import Tensor

from wda.checks import number, whole
from wda.losses import Loss, margin, rival_logits
from wda.norms import bounds, clamp, exponent, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["Best", "Widened", "along", "free", "step_lengths", "top_rivals", "uniform_start"]


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


class Widened:
    """An oracle for a search in single precision at least, of a model that may be in half precision.

    What the model gets is rounded to its own dtype, so that every answer is the deployed model's at a point that it
    can be given; answers come back widened. Sums, norms and steps then neither overflow nor stand still.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 3).half()
    >>> wide = Widened(Oracle(model), torch.rand(4, 2).half(), (0.0, 1.0))
    >>> wide.x.dtype, wide.logits(wide.x + 1e-6).dtype
    (torch.float32, torch.float32)
    >>> wide.narrow(wide.x).dtype, wide.rounded(wide.x + 1e-6).equal(wide.x)
    (torch.float16, True)
    >>> y = torch.zeros(4, dtype=torch.int64)
    >>> wide.gradient(wide.x, y, margin)[1].dtype, wide.margin_gradients(wide.x, y, y[:, None] + 1)[1].shape
    (torch.float32, torch.Size([4, 1, 2]))
    """

    def __init__(self, oracle: Oracle, x: Tensor, box: tuple[float, float] | None) -> None:
        self._oracle, self._narrow, self._box = oracle, x.dtype, box
        self._wide = torch.promote_types(x.dtype, torch.float32)
        self.x = x.to(self._wide)

    def narrow(self, points: Tensor) -> Tensor:
        """The points that the model gets, in its dtype."""
        return points if self._wide == self._narrow else clamp(points.to(self._narrow), self._box)

    def rounded(self, points: Tensor) -> Tensor:
        """The same points, in the dtype of the search."""
        return self.narrow(points).to(self._wide)

    def logits(self, x: Tensor) -> Tensor:
        """The model's logits at the rounded points, widened."""
        return self._widened(self._oracle.logits(self.narrow(x)))

    def gradient(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Logits, and the gradient of a loss, as `Oracle.gradient`."""
        logits, gradient = self._oracle.gradient(self.narrow(x), y, loss)
        return self._widened(logits), gradient.to(self._wide)

    def margin_gradients(self, x: Tensor, y: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and gradients of the gaps to the rivals, as `Oracle.margin_gradients`."""
        logits, gradients = self._oracle.margin_gradients(self.narrow(x), y, rivals)
        return self._widened(logits), gradients.to(self._wide)

    def _widened(self, logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, self._wide))


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


def along(direction: Tensor, length: Tensor) -> Tensor:
    """Each sample's direction (N, ...) times its length (N,).

    Examples
    --------
    >>> along(torch.ones(2, 1), torch.tensor([2.0, 3.0])).flatten()
    tensor([2., 3.])
    """
    return length.view(-1, *[1] * (direction.ndim - 1)) * direction


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
