"""The nearest misclassified points: an ascent of the margin in a ball that shrinks onto the decision boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wda.attacks.search import Widened, along, free, top_rivals, uniform_start
from wda.checks import whole
from wda.losses import margin
from wda.norms import clamp, dual, dual_maximiser, least_displacement, norm, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["closest"]

# So many rivals are looked at, those of largest logit, and so many of these pursued, the nearest, in turn.
_LOOKED_AT, _PURSUED = 9, 3
# So often the nearest flips are polished, each time by so many forward passes.
_POLISHES, _TRIALS = 5, 8
# By so much of its room the steepest coordinate moves in the first step for "L1".
_L1_SHARE = 0.25


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
    flip so far, or anywhere in the box where nothing has flipped. The rivals are taken in the order of how near they
    seem at the sample: small gaps, steep gradients.

    In the end the nearest flips are polished: drawn towards the nearest point within the box that the model, linearised
    at the flip, would misclassify. On an affine model that point is the answer.

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
        Backward passes in each ascent, and ascents. Up to nine more rank the rivals, and five polish.
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
    model = Widened(oracle, x[right], box)
    nearest = _Nearest(model.x, y[right], norm)
    rivals = _rivals(model, nearest, box)
    for restart in range(restarts):
        start = nearest.x if restart == 0 else _around(nearest, box, (seed + restart) % 2**64)
        _ascend(model, nearest, start, rivals[:, restart % rivals.shape[1], None], box, steps)
    for _ in range(_POLISHES):
        _polish(model, nearest, box)
    return x.index_copy(0, right, model.narrow(nearest.points))


class _Nearest:
    """The nearest misclassified point of each sample so far, and its distance; the sample itself, and inf, at first."""

    def __init__(self, x: Tensor, y: Tensor, norm: str) -> None:
        self.x, self.y, self.norm = x, y, norm
        self.points = x.clone()
        self.distance = torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)

    def update(self, points: Tensor, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Keep those of `points`, of all samples or of `rows`, that are wrong and nearer; True where one is wrong."""
        rows = torch.arange(len(self.y), device=self.y.device) if rows is None else rows
        wrong = margin(logits, self.y[rows]) >= 0
        distance = norm(points - self.x[rows], self.norm)
        nearer = wrong & (distance < self.distance[rows])
        self.points[rows[nearer]], self.distance[rows[nearer]] = points[nearer], distance[nearer]
        return wrong


def _rivals(model: Widened, nearest: _Nearest, box: tuple[float, float] | None) -> Tensor:
    """The rivals to pursue, (N, m), by the gap times the distance to the boundary of the model linearised at x.

    On the models at hand that ranks rivals better than either of the two alone.
    """
    x, y = nearest.x, nearest.y
    logits = model.logits(x)
    likely = top_rivals(logits, y, min(_LOOKED_AT, logits.shape[1] - 1))
    if likely.shape[1] == 1:
        return likely
    logits, gradients = model.margin_gradients(x, y, likely)
    gaps = logits.gather(1, y[:, None]) - logits.gather(1, likely)
    slopes = norm(free(gradients, x[:, None], box).flatten(0, 1), dual(nearest.norm)).view_as(gaps)
    order = (gaps * gaps / slopes).argsort(dim=1, stable=True)
    return likely.gather(1, order[:, :_PURSUED])


def _around(nearest: _Nearest, box: tuple[float, float] | None, seed: int) -> Tensor:
    """A random point no further from each sample than the nearest flip so far; anywhere in the box without one."""
    x, found = nearest.x, nearest.distance.isfinite()
    noise = uniform_start(x, Threat(nearest.norm, 1.0, order=math.inf, box=None), seed) - x
    radius = nearest.distance.where(found, 0)
    start = project(x + along(noise, radius), x, radius, nearest.norm, box)
    if box is None or bool(found.all()):
        return start
    largest = norm(noise, "Linf")
    place = (1 + along(noise, 1 / largest.where(largest > 0, 1))) / 2
    anywhere = clamp(box[0] + (box[1] - box[0]) * place, box)
    return anywhere.index_copy(0, found.nonzero()[:, 0], start[found])


def _ascend(
    model: Widened, nearest: _Nearest, point: Tensor, rival: Tensor, box: tuple[float, float] | None, steps: int
) -> None:
    """Steps up the margin of one rival (N, 1), in a ball that shrinks and grows."""
    x, y, name = nearest.x, nearest.y, nearest.norm
    away = norm(point - x, name)
    # a start elsewhere in the box has its distance for a radius; one at the sample has none yet
    radius = nearest.distance.where(nearest.distance.isfinite() | (away == 0), away)
    before = point
    for t in range(steps):
        cooling = (1 + math.cos(math.pi * t / steps)) / 2
        seen = model.rounded(point)
        logits, gradients = model.margin_gradients(seen, y, rival)
        flipped = nearest.update(seen, logits)
        gradient = free(gradients[:, 0], seen, box)
        gap = (logits.gather(1, y[:, None]) - logits.gather(1, rival))[:, 0].clamp(min=0).to(x)
        linear = norm(seen - x, name) + gap / norm(gradient, dual(name))
        radius = _radius(radius, linear, flipped, nearest.distance, 0.1 * cooling + 0.001)
        step = (0.01 + 0.99 * cooling) * _step(gradient, radius, name, box)
        ahead = project(point + step + 0.5 * (point - before), x, radius, name, box)
        point, before = ahead, point
    seen = model.rounded(point)
    nearest.update(seen, model.logits(seen))


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


def _step(gradient: Tensor, radius: Tensor, name: str, box: tuple[float, float] | None) -> Tensor:
    """A step of the radius along the dual-norm maximiser; for "L1", where that is one coordinate, along the gradient.

    Then the projection onto the ball thins the step out, and its length is that of the steepest coordinate's move.
    """
    if name != "L1":
        return along(dual_maximiser(gradient, name), radius)
    steepest = norm(gradient, "Linf")
    room = radius if box is None else radius.clamp(max=min(box[1] - box[0], torch.finfo(radius.dtype).max))
    return along(gradient, _L1_SHARE * room / steepest.where(steepest > 0, 1))


def _polish(model: Widened, nearest: _Nearest, box: tuple[float, float] | None) -> None:
    """Bisect between each nearest flip and the nearest flip of the model linearised there."""
    rows = nearest.distance.isfinite().nonzero()[:, 0]
    if not len(rows):
        return
    x, y, flip = nearest.x[rows], nearest.y[rows], nearest.points[rows]
    logits, gradient = model.gradient(flip, y, margin)
    level = (gradient * (flip - x)).flatten(1).sum(1) - margin(logits, y).to(x)
    ideal = clamp(x + least_displacement(gradient, x, level, nearest.norm, box), box)
    right, wrong = torch.zeros_like(level), torch.ones_like(level)  # shares of the way from the ideal to the flip
    share = right
    for _ in range(_TRIALS):
        seen = model.rounded(ideal + along(flip - ideal, share))
        flipped = nearest.update(seen, model.logits(seen), rows)
        right, wrong = right.where(flipped, share), share.where(flipped, wrong)
        share = (right + wrong) / 2
