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

# So many rivals are looked at, those of largest logit, and so many of these pursued, the nearest, in turn.
_LOOKED_AT, _PURSUED = 9, 3


def closest(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    norm: str,
    box: tuple[float, float] | None,
    *,
    steps: int = 30,
    restarts: int = 4,
    seed: int = 0,
) -> Tensor:
    r"""Per sample the nearest misclassified point that several ascents find, each in a ball of changing radius.

    An ascent pursues one rival j: it steps along the dual-norm maximiser of :math:`\nabla(z_j - z_y)`, with momentum,
    and is projected onto the ball around the sample. The ball shrinks whenever the label has flipped and grows whenever
    it has not, at a rate that falls along a cosine, and so do the steps. It is never larger than the nearest flip so
    far, whichever class that was for. The first ascent starts at the sample, the others at random within the nearest
    flip so far. The rivals are taken in the order of how near they seem at the sample: small gaps, steep gradients.

    The idea of a ball that follows the flips is that of the fast minimum-norm attack (Pintor et al. 2021).

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        Within the box.
    y : int64 Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}
    box : (float, float) or None
    steps, restarts : int
        Backward passes in each ascent, and ascents. Up to nine more rank the rivals.
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
    right = (margin(oracle.logits(x), y) < 0).nonzero()[:, 0]
    if not len(right):
        return x
    nearest = _Nearest(x[right], y[right], norm)
    rivals = _rivals(oracle, nearest, box)
    for restart in range(restarts):
        start = nearest.x if restart == 0 else _around(nearest, box, seed + restart)
        _ascend(oracle, nearest, start, rivals[:, restart % rivals.shape[1], None], box, steps)
    return x.index_copy(0, right, nearest.points)


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


def _rivals(oracle: Oracle, nearest: _Nearest, box: tuple[float, float] | None) -> Tensor:
    """The rivals to pursue, (N, m), by the gap times the distance to the boundary of the model linearised at x.

    On the models at hand that ranks rivals better than either of the two alone.
    """
    x, y = nearest.x, nearest.y
    logits = oracle.logits(x)
    likely = top_rivals(logits, y, min(_LOOKED_AT, logits.shape[1] - 1))
    if likely.shape[1] == 1:
        return likely
    logits, gradients = oracle.margin_gradients(x, y, likely)
    gaps = logits.gather(1, y[:, None]) - logits.gather(1, likely)
    slopes = norm(free(gradients, x[:, None], box).flatten(0, 1), dual(nearest.norm)).view_as(gaps)
    order = (gaps * gaps / slopes).argsort(dim=1, stable=True)
    return likely.gather(1, order[:, :_PURSUED])


def _around(nearest: _Nearest, box: tuple[float, float] | None, seed: int) -> Tensor:
    """A random point no further from each sample than the nearest flip so far."""
    noise = uniform_start(nearest.x, Threat(nearest.norm, 1.0, order=math.inf, box=None), seed) - nearest.x
    radius = nearest.distance.where(nearest.distance.isfinite(), 0)
    return project(nearest.x + _along(noise, radius), nearest.x, radius, nearest.norm, box)


def _ascend(
    oracle: Oracle, nearest: _Nearest, point: Tensor, rival: Tensor, box: tuple[float, float] | None, steps: int
) -> None:
    """Steps up the margin of one rival (N, 1), in a ball that shrinks and grows."""
    x, y, name = nearest.x, nearest.y, nearest.norm
    radius, before = nearest.distance.clone(), point
    for t in range(steps):
        cooling = (1 + math.cos(math.pi * t / steps)) / 2
        logits, gradients = oracle.margin_gradients(point, y, rival)
        flipped = nearest.update(point, logits)
        gradient = free(gradients[:, 0], point, box)
        gap = (logits.gather(1, y[:, None]) - logits.gather(1, rival))[:, 0].clamp(min=0)
        linear = norm(point - x, name) + gap / norm(gradient, dual(name))
        radius = _radius(radius, linear, flipped, nearest.distance, 0.1 * cooling + 0.001)
        step = _along(_direction(gradient, name, cooling), (0.01 + 0.49 * cooling) * radius)
        ahead = project(point + step + 0.5 * (point - before), x, radius, name, box)
        point, before = ahead, point
    nearest.update(point, oracle.logits(point))


def _radius(radius: Tensor, linear: Tensor, flipped: Tensor, nearest: Tensor, rate: float) -> Tensor:
    """The next radius: less where the label is flipped, more where it is not, and always within the nearest flip.

    Where nothing has flipped yet it makes for the distance at which the linearised model would, by no more than half
    again at a time; to begin with, all the way.
    """
    grown = radius * (1 + rate)
    bold = torch.maximum(grown, linear.minimum(1.5 * radius)).where(radius.isfinite(), linear)
    grown = grown.where(nearest.isfinite() & radius.isfinite(), bold)
    shrunk = radius.minimum(nearest) * (1 - rate)
    result = shrunk.where(flipped, grown).minimum((1 - 5e-4) * nearest)
    # without a gradient there is no linear distance, and nothing moves either
    return result.where(result.isfinite(), 0)


def _direction(gradient: Tensor, name: str, cooling: float) -> Tensor:
    """Where to step: the dual-norm maximiser; for "L1", where that is one coordinate, a share of the steepest ones."""
    if name != "L1":
        return dual_maximiser(gradient, name)
    flat = gradient.flatten(1)
    count = max(1, int((0.002 + 0.098 * cooling) * flat.shape[1]))
    least = flat.abs().topk(count, dim=1).values[:, -1:]
    steepest = flat.where(flat.abs() >= least, 0)
    total = steepest.abs().sum(1, keepdim=True)
    return (steepest / total.where(total > 0, 1)).view_as(gradient)


def _along(direction: Tensor, length: Tensor) -> Tensor:
    """Each sample's direction (N, ...) times its length (N,)."""
    return length.view(-1, *[1] * (direction.ndim - 1)) * direction
