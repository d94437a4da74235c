"""Is a model what an attack takes it for: a function of one sample, not of chance and not of the sample's company?

Both are seen by passing a few samples again and again: alone, where a function gives the same each time, and among
others, where it gives the same up to rounding. That costs a few rows a time and is done twice, before an attack and at
the points that it found. The passes are counted apart from those of the attack (`wda.passes.Counts.checks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wda.losses import margin
from wda.norms import exponent
from wda.passes import Oracle, awake, check_labels, distrust, named, normalisers, warn
from wda.threat import Threat

__all__ = ["examine", "inspected", "tell_cost", "tell_reach"]

# So many samples are passed alone, so often in all, and then among themselves and behind so many others.
_SAMPLES, _ALONE, _STRANGERS = 4, 32, 2
# Logits that differ by more than this share of their spread, and so many units of rounding, differ.
_SHARE, _UNITS = 1e-3, 16
_VANISHED = 0.1
# An attack that takes more gradients than this in a step says so.
_MANY = 50


@contextmanager
def inspected(oracle: Oracle, x: Tensor, y: Tensor, found: Tensor | None = None) -> Iterator[None]:
    """Check labels and model before an attack, and warn after it where what was found cannot be trusted.

    A model that is random in one call of r is noticed unless none of at least 64 calls is such a call: for r = 5 with
    probability 1 - 6e-7, for r = 20 with probability 0.96. Those calls pass 64 rows; about 30 more see whether logits
    depend on the company.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    found : Tensor, shape (N, ...), optional
        Where the attack writes the points that it finds. They are looked at when it has ended.

    Raises
    ------
    ValueError
        A label is not below the number of classes, the logits are NaN or infinite at every sample, or the model takes
        no sample alone.

    Warns
    -----
    Untrustworthy
        Passes of the same samples differ; logits depend on the other samples of the batch; the model puts itself into
        training mode; some logits or gradients were NaN or infinite; a sample is an error only by a tie of its largest
        logits; or more than one gradient in ten was zero at a point still classified correctly.

    Examples
    --------
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> with Oracle(torch.nn.Linear(2, 3)) as oracle, inspected(oracle, x, y):
    ...     _ = oracle.logits(x)
    >>> oracle.forward, oracle.checks > 32
    (4, True)
    """
    trusted = examine(oracle, x, y)
    yield
    if trusted:
        _told(_doubts(oracle, *_moved(x, y, x if found is None else found), x))
    if oracle.invalid:
        bad = oracle.check(x).isnan().any(1).nonzero()[:, 0].tolist()
        stay = f"at {len(bad)} of {len(x)} samples{named(bad, 10)}, which stay where they are"
        where = stay if bad else "at no sample"
        distrust(
            f"the model has NaN or infinite logits or gradients at {oracle.invalid} of the points tried, and logits "
            f"{where}; a search takes no such point for a flip"
        )
    if oracle.tied:
        _tell_of_ties(oracle, x, y)
    if oracle.vanished > _VANISHED * oracle.backward:
        share = 100 * oracle.vanished / oracle.backward
        distrust(
            f"{share:.0f} % of the gradients were zero at points still classified correctly: there the attack is "
            "blind, and the model need not be robust. A loss of logits (margin) may help, or a gradient-free attack"
        )


def _tell_of_ties(oracle: Oracle, x: Tensor, y: Tensor) -> None:
    """Warn where a sample is an error by a tie alone."""
    logits = oracle.check(x)
    tied = int((margin(logits, y.to(logits.device)) == 0).sum())
    if tied:
        distrust(
            f"at {tied} of {len(x)} samples the label's logit ties exactly with the largest other one: the logits are "
            "saturated or coarsely rounded. A tie counts as an error, at distance 0"
        )


def examine(oracle: Oracle, x: Tensor, y: Tensor) -> bool:
    """Check labels and model: the first half of `inspected`. True where nothing speaks against the model.

    Examples
    --------
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> with Oracle(torch.nn.Linear(2, 3)) as oracle:
    ...     examine(oracle, x, y)
    True
    """
    once = oracle.check(x[:1])
    check_labels(y, once.shape[1])
    if once.isnan().any() and oracle.check(x).isnan().any(1).all():
        raise ValueError("model(x) has NaN or infinite logits at every sample")
    return not _told(_doubts(oracle, x, y, x))


def _told(doubts: list[str]) -> list[str]:
    for doubt in doubts:
        distrust(doubt)
    return doubts


def _moved(x: Tensor, y: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The points that are not where they began, and their labels; all of them where none has moved."""
    moved = (found != x).flatten(1).any(1)
    return (found[moved], y[moved]) if bool(moved.any()) else (x, y)


def _doubts(oracle: Oracle, points: Tensor, y: Tensor, others: Tensor) -> list[str]:
    """In what the logits of some of the points are no function of the point, each in a sentence."""
    some = torch.linspace(0, len(points) - 1, min(_SAMPLES, len(points))).round().long().to(points.device)
    points, y = points[some], y[some]
    first = torch.cat([oracle.check(point) for point in points.split(1)])
    doubts = []
    if up := awake(oracle.model):
        doubts.append(
            f"the model puts itself into training mode as it runs{named(up)}: there dropout is random, and batch "
            "normalisation takes the statistics of the batch. Leave train() out of its forward"
        )
    company = _differs_in_company(oracle, points, others, first)
    if company == "by chance" or _differs_alone(oracle, points, y, first):
        doubts.append(
            "the model is random: passes of the same samples differ. Gradients of one draw say little about the next; "
            "average over draws inside the model"
        )
    elif company:
        doubts.append(
            "the logits of a sample depend on the others in its batch: batch normalisation with the statistics of the "
            f"batch, perhaps{named(normalisers(oracle.model))}. Results then depend on the batch size; use running "
            "statistics"
        )
    return doubts


def _rounding(oracle: Oracle, logits: Tensor) -> Tensor:
    """By how much rounding may change logits, (N,)."""
    return _UNITS * oracle.precision(logits) * logits.nan_to_num().abs().amax(1)


def _tolerance(oracle: Oracle, logits: Tensor) -> Tensor:
    """By how much they may differ, (N,), and still be called the same."""
    return _rounding(oracle, logits) + _SHARE * (logits.amax(1) - logits.amin(1)).nan_to_num()


def _differs_alone(oracle: Oracle, points: Tensor, y: Tensor, first: Tensor) -> bool:
    """Whether passes of the same point give other logits than the first; a bit is enough where its class changes."""
    at = torch.arange(_ALONE, device=first.device) % len(points)
    again = torch.cat([oracle.check(points[k][None]) for k in at.tolist()])
    own, first = y.to(first.device)[at], first[at]
    apart, flips = _apart(again, first), (margin(again, own) < 0) != (margin(first, own) < 0)
    return bool(((apart > _tolerance(oracle, first)) | (flips & (apart > _rounding(oracle, first)))).any())


def _differs_in_company(oracle: Oracle, points: Tensor, others: Tensor, alone: Tensor) -> str | None:
    """Whether logits differ from those alone in company: "always", or "by chance", not in the same company again."""
    tolerance, once = _tolerance(oracle, alone), _in_company(oracle, points, others)
    if not any(bool((_apart(logits, alone) > tolerance).any()) for logits in once):
        return None
    pairs = zip(once, _in_company(oracle, points, others), strict=True)
    return "by chance" if any(bool((_apart(*pair) > tolerance).any()) for pair in pairs) else "always"


def _in_company(oracle: Oracle, points: Tensor, others: Tensor) -> list[Tensor]:
    """The logits of the points among themselves, and in another order behind others; nothing for one point alone."""
    n, strangers = len(points), others[-_STRANGERS:]
    together = [oracle.check(points)] if n > 1 else []
    if len(others) > 1:
        together.append(oracle.check(torch.cat([strangers, points.flip(0)]))[len(strangers) :].flip(0))
    return together


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """How far logits are apart, (N,): infinitely far where one is NaN and the other not."""
    both = one.isnan() & other.isnan()
    return (one - other).abs().masked_fill(both, 0).nan_to_num(nan=torch.inf, posinf=torch.inf).amax(1)


def tell_reach(threat: Threat, x: Tensor) -> None:
    """Warn where the radius reaches across the whole box; for "Linf" `Threat` itself does.

    Examples
    --------
    >>> tell_reach(Threat("L2", 2.0), torch.zeros(1, 4))
    """
    if threat.box is None or threat.norm == "Linf":
        return
    across = (threat.box[1] - threat.box[0]) * x[0].numel() ** (1 / exponent(threat.norm))
    if threat.eps > across * (1 + 1e-6):  # a radius may have been chosen to reach just so far
        warn(
            f"eps={threat.eps!r} is more than {across:.6g}, which in {threat.norm} is how far the corners of "
            f"box={threat.box} are apart, so all of it is within reach: did you mean '8/255' or the like?"
        )


def tell_cost(attack: str, gradients: int, steps: int, fewer: str) -> None:
    """Warn before an attack starts that takes many gradients for each sample and step.

    Examples
    --------
    >>> tell_cost("wda", 9, 10, "rivals=9")
    """
    if gradients > _MANY:
        warn(
            f"{attack} takes {gradients} gradients of each sample, one for each rival class, in each of up to {steps} "
            f"steps: {gradients * steps} backward passes a sample. With {fewer} they are fewer"
        )
