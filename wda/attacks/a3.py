"""Adaptive Auto Attack: many restarts that learn where to start, most of them for the samples nearest to a flip."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wda.attacks.search import Best, free, top_rivals
from wda.checks import whole
from wda.losses import margin
from wda.norms import dual_maximiser, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["Directions", "a3", "a3_plus_plus", "promising"]

# Steps of each restart, its first apart, that go along a drawn direction.
_TURNS = 2
# Lengths in radii: of the first step towards the boundary, from the sample and from elsewhere, and of the last one.
_FROM_SAMPLE, _FROM_BEST, _LAST = 1.0, 0.5, 0.02
# At most so many rivals take turns in the drawn directions, and so many are probed in a restart of A3++.
_TAKE_TURNS, _PROBED = 9, 3


def a3(
    oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, *, steps: int = 25, levels: int = 6, seed: int = 0
) -> Tensor:
    r"""Adaptive Auto Attack (Liu et al. 2022): restarts of an ascent of the margin, spent where they pay.

    Samples misclassified at the start, or by random noise on the sphere of the ball, are left alone, and a sample is
    done once it flips.

    - *Adaptive direction initialisation.* The first restart begins at the sample. Each later one turns away first,
      along :math:`\nabla (w\cdot z)` for weights w of the logits whose distribution is learnt from the flips so far
      (`Directions`). The ascent of the margin follows, in steps along the dual-norm maximiser of its gradient whose
      lengths fall along a cosine.
    - *Online statistics-based discarding.* At level k only the share :math:`2^{-k}` of the samples that still stand is
      attacked, those of largest margin so far (`promising`), in :math:`2^{k+1}` restarts. So all levels cost about the
      same.

    Three things differ from the published attack. Restarts turn away from the best point so far, not from the sample,
    for 2 steps instead of 7. Discarding goes further, and the restarts, of a fixed length, become more numerous
    instead of longer. And the schedule is one for all models, not tuned to the data set.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        The whole sample: what is learnt from one of its members is used on the others.
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise; its `eps` is the radius around each sample.
    steps : int
        Backward passes of a restart, at least 3.
    levels : int
        How often the share is halved, plus one. A sample that always stays in takes part in
        :math:`2^{\mathrm{levels}+1}-2` restarts.
    seed : int

    Returns
    -------
    Tensor, shape (N, ...)
        For each sample the point of largest margin among those evaluated, the sample itself among them.

    Raises
    ------
    ValueError
        `steps` or `levels` is out of range.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> a3(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf"), levels=2).shape
    torch.Size([4, 2])
    """
    return _restarts(_Search(oracle, x, y, ball), _climb, steps, levels, seed)


def a3_plus_plus(
    oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, *, steps: int = 25, levels: int = 6, seed: int = 0
) -> Tensor:
    """A3 with the search of `wda` inside (section 6.1 of the first paper): rivals are probed, then one is pursued.

    The schedule and the starts are those of `a3`. From each start one step is tried towards each of the three rivals
    of largest logit there; the step whose rival comes out with the largest margin is made, and that rival is pursued
    for the rest of the restart. The paper has no more than a sentence about this attack: how many rivals are probed,
    and how often, is our choice.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        The whole sample.
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise; its `eps` is the radius around each sample.
    steps, levels : int
        As for `a3`; probing costs further passes.
    seed : int

    Returns
    -------
    Tensor, shape (N, ...)
        As for `a3`, and so are the errors.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> a3_plus_plus(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf"), levels=2).shape
    torch.Size([4, 2])
    """
    return _restarts(_Search(oracle, x, y, ball), _pursue, steps, levels, seed)


class Directions:
    """Adaptive direction initialisation: weights of the logits, drawn like those that led to flips.

    The signs that the weights of flipped samples had at the label and at the class flipped to are added up. Until a sum
    is positive or negative, the weights it decides on are uniform in [-1, 1], as all others always are. Then the
    label's weight is uniform in [-0.1, 0.5] times the favoured sign, and the rival's is 0.8 times it, both multiplied
    by K / 10 where there are more than ten classes.

    Examples
    --------
    >>> directions = Directions(torch.Generator().manual_seed(0))
    >>> directions.learn(torch.tensor([[-0.2, 0.9, -0.4]]), y=torch.tensor([0]), reached=torch.tensor([1]))
    >>> directions.draw(torch.tensor([0, 2]), torch.tensor([2, 0]), classes=3)[[0, 1], [2, 0]]
    tensor([0.8000, 0.8000], dtype=torch.float64)
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.label = 0
        self.rival = 0

    def draw(self, y: Tensor, rivals: Tensor, classes: int) -> Tensor:
        """Weights, float64 (M, K), for M samples with labels `y` and one rival each."""
        uniform = torch.rand(len(y), classes + 1, generator=self.generator, dtype=torch.float64).to(y.device)
        weights, short = 2 * uniform[:, 1:] - 1, 0.6 * uniform[:, :1] - 0.1
        scale = max(1.0, classes / 10)
        if self.label:
            weights.scatter_(1, y[:, None], math.copysign(scale, self.label) * short)
        if self.rival:
            weights.scatter_(1, rivals[:, None], math.copysign(0.8 * scale, self.rival))
        return weights

    def learn(self, weights: Tensor, y: Tensor, reached: Tensor) -> None:
        """Count the signs of the weights (M, K) that led M samples from their labels to the classes `reached`."""
        self.label += int(weights.gather(1, y[:, None]).sign().sum())
        self.rival += int(weights.gather(1, reached[:, None]).sign().sum())


def promising(margins: Tensor, share: float) -> Tensor:
    """Online statistics-based discarding: of the samples that stand, the share of largest margin, at least one.

    A margin of zero or more is a flip, and one that is not a number no concern of the attack.

    Parameters
    ----------
    margins : Tensor, shape (N,)
    share : float
        From 0 to 1.

    Returns
    -------
    int64 Tensor
        Indices into `margins`, in falling order of margin.

    Examples
    --------
    >>> promising(torch.tensor([-3.0, 0.5, -1.0, -2.0, torch.nan]), share=0.5)
    tensor([2, 3])
    """
    standing = (margins < 0).nonzero()[:, 0]
    order = margins[standing].argsort(descending=True, stable=True)
    return standing[order[: math.ceil(share * len(standing))]]


class _Search:
    """A sample under attack: the best points so far, and steps within the balls around its members."""

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, ball: Threat) -> None:
        self.oracle, self.x, self.y, self.ball = oracle, x, y, ball
        logits = oracle.logits(x)
        self.best = Best(x, logits, y)
        self.classes = logits.shape[1]
        self._rivals = top_rivals(logits, y, min(_TAKE_TURNS, self.classes - 1))

    def rival(self, rows: Tensor, turn: int) -> Tensor:
        """Whose turn it is, (M,): the class of largest logit at the sample, the next one, and so on round."""
        return self._rivals[rows, turn % self._rivals.shape[1]]

    def step(self, rows: Tensor, point: Tensor, gradient: Tensor, length: float) -> Tensor:
        """A step up the gradient, from points of the balls around the samples `rows` to others."""
        ball = self.ball
        direction = dual_maximiser(free(gradient, point, ball.box), ball.norm)
        return project(point + length * ball.eps * direction, self.x[rows], ball.eps, ball.norm, ball.box)

    def ascend(
        self, rows: Tensor, point: Tensor, lengths: list[float], loss: Callable[..., Tensor], *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of each length up the loss; what is left are the samples that still stand, and points ahead."""
        for length in lengths:
            standing = self.best.margin[rows] < 0
            rows, point, *given = (tensor[standing] for tensor in (rows, point, *given))  # type: ignore[assignment]
            if not len(rows):
                break
            logits, gradient = self.oracle.gradient(point, self.y[rows], loss, *given)
            self.best.update(point, logits, rows)
            point = self.step(rows, point, gradient, length)
        return rows, point

    def evaluate(self, rows: Tensor, point: Tensor) -> Tensor:
        """Logits, at no backward pass."""
        logits = self.oracle.logits(point)
        self.best.update(point, logits, rows)
        return logits

    def finish(self, rows: Tensor, point: Tensor) -> None:
        """Evaluate the last points of the samples that still stand, if any do."""
        if len(rows):
            self.evaluate(rows, point)


_Attempt = Callable[[_Search, Tensor, Tensor, list[float]], None]


def _restarts(search: _Search, attempt: _Attempt, steps: int, levels: int, seed: int) -> Tensor:
    """The schedule: `attempt` from one start after the other, for ever fewer samples."""
    whole("steps", steps, _TURNS + 1), whole("levels", levels)
    generator = torch.Generator().manual_seed(seed)
    directions = Directions(generator)
    rows = promising(search.best.margin, 1.0)
    search.finish(rows, _noisy(search, rows, generator))
    for restart, share in enumerate(2.0**-level for level in range(levels) for _ in range(2 ** (level + 1))):
        rows = promising(search.best.margin, share)
        if not len(rows):
            break
        if restart == 0:
            attempt(search, rows, search.x[rows], _falling(steps, _FROM_SAMPLE))
        else:
            weights = directions.draw(search.y[rows], search.rival(rows, restart - 1), search.classes)
            turned = search.ascend(rows, search.best.points[rows], [1.0] * _TURNS, _weighted, weights.to(search.x))
            attempt(search, *turned, _falling(steps - _TURNS, _FROM_BEST))
            _learn(search, rows, directions, weights)
    return search.best.points


def _learn(search: _Search, rows: Tensor, directions: Directions, weights: Tensor) -> None:
    """Tell `directions` which of the samples `rows` have flipped, and to which classes."""
    flipped = search.best.margin[rows] >= 0
    if flipped.any():
        won = rows[flipped]
        reached = top_rivals(search.oracle.logits(search.best.points[won]), search.y[won], 1)[:, 0]
        directions.learn(weights[flipped], search.y[won], reached)


def _noisy(search: _Search, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Random points on the spheres around samples: every pixel up or down by the radius, in the maximum norm."""
    x = search.x[rows]
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    return search.step(rows, x, noise, 1.0)


def _falling(steps: int, first: float) -> list[float]:
    """Lengths that fall along half a cosine."""
    return [_LAST + (first - _LAST) * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]


def _climb(search: _Search, rows: Tensor, point: Tensor, lengths: list[float]) -> None:
    """What A3 does from a start: ascend the margin, whichever rival is nearest."""
    search.finish(*search.ascend(rows, point, lengths, margin))


def _pursue(search: _Search, rows: Tensor, point: Tensor, lengths: list[float]) -> None:
    """What A3++ does from a start: probe some rivals, then pursue the one whose margin came out largest."""
    standing = search.best.margin[rows] < 0
    rows, point = rows[standing], point[standing]
    if not len(rows):
        return
    y = search.y[rows]
    rivals = top_rivals(search.evaluate(rows, point), y, min(_PROBED, search.classes - 1))
    _, gradients = search.oracle.margin_gradients(point, y, rivals)
    ahead = [search.step(rows, point, gradients[:, j], lengths[0]) for j in range(rivals.shape[1])]
    gaps = [_gap(search.evaluate(rows, point), y, rivals[:, j]) for j, point in enumerate(ahead)]
    chosen = torch.stack(gaps).nan_to_num(nan=-torch.inf).argmax(0)
    point = torch.stack(ahead)[chosen, torch.arange(len(rows), device=rows.device)]
    pursued = rivals.gather(1, chosen[:, None])[:, 0]
    search.finish(*search.ascend(rows, point, lengths[1:], _gap, pursued))


def _gap(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    """The margin over the label of one rival per sample (N,)."""
    gap: Tensor = (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    return gap


def _weighted(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """What a drawn direction ascends; the label does not matter."""
    return (weights * logits).sum(1)
