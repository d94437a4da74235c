"""What speaks against a model and its data being set up as they have to be."""

from __future__ import annotations

import warnings

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from wda.errors import Untrustworthy
from wda.experiment.records import interval
from wda.inspection import inspected
from wda.losses import margin
from wda.passes import Model, Oracle, check_sample

__all__ = ["doubts"]


def doubts(model: Model, x: Tensor, y: Tensor, batch_size: int = 256) -> list[str]:
    """The usual mistakes in setting up a model, each in a sentence; an empty list where none is seen.

    An attack runs all the same on a model that is set up wrongly, and its numbers look like any others. This takes one
    gradient and four passes per sample, and some hundred rows, to look for what would make them worthless:

    - all that attacks warn of: a model that is random, logits that depend on the other samples of a batch, logits or
      gradients that are NaN, gradients that are zero;
    - probabilities in the place of logits;
    - an accuracy that is much higher on inputs of another scale: the normalisation is not in the model;
    - an accuracy that is much higher with the labels numbered otherwise, or no better than that of a constant answer.

    Parameters
    ----------
    model : nn.Module or callable
        Runs in evaluation mode.
    x : Tensor, shape (N, ...)
        Within [0, 1], in the model's dtype. A hundred samples are enough; for labels in another order, ten per class.
    y : integer Tensor, shape (N,)
    batch_size : int

    Raises
    ------
    ValueError, TypeError
        x or y are not what an attack takes, see `wda.attack`: x outside [0, 1], a label without a logit, NaN logits
        at every sample.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=100)
    >>> doubts(wda.models.load("digits-mlp"), x, y)
    []
    >>> doubts(lambda x: wda.models.load("digits-mlp")(x).softmax(1), x, y)[0][:33]
    'model(x) is probabilities, no log'
    """
    y = check_sample(x, y, (0.0, 1.0))
    with Oracle(model, batch_size) as oracle:
        told, logits = _inspected(oracle, x, y)
        told += _of_probabilities(logits) + _of_scale(oracle, x, y, logits)
        told += _of_chance(logits, y) + _of_numbering(logits, y)
    return told


def _inspected(oracle: Oracle, x: Tensor, y: Tensor) -> tuple[list[str], Tensor]:
    """What attacks warn of, after one gradient at each sample, and the logits there, on the CPU."""

    def work(rows: slice) -> Tensor:
        points = oracle.to_model(x[rows])
        return oracle.gradient(points, y[rows].to(points.device), margin)[0].cpu()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Untrustworthy)
        with inspected(oracle, x, y):
            logits = torch.cat(oracle.in_batches(work, slice(0, len(x))))
    return [str(w.message) for w in caught if issubclass(w.category, Untrustworthy)], logits


def _logits(oracle: Oracle, x: Tensor) -> Tensor:
    return torch.cat(oracle.in_batches(lambda rows: oracle.logits(oracle.to_model(x[rows])).cpu(), slice(0, len(x))))


def _of_probabilities(logits: Tensor) -> list[str]:
    sums = logits.sum(1)
    if not (logits >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return []
    return [
        "model(x) is probabilities, no logits: every row is in [0, 1] and sums to 1. Where the model is sure, "
        "probabilities round to 0 and 1, and gradients to 0; leave the softmax out"
    ]


def _of_scale(oracle: Oracle, x: Tensor, y: Tensor, logits: Tensor) -> list[str]:
    """Whether the model is much better on inputs of a scale that it was perhaps trained on."""
    over = [axis for axis in range(x.ndim) if axis != 1] if x.ndim == 4 else list(range(x.ndim))
    std, mean = torch.std_mean(x, over, keepdim=True)
    scales = {
        f"less their mean, over their standard deviation ({_told(mean)}; {_told(std)})": (x - mean) / std.clamp(1e-6),
        "in [-1, 1]": 2 * x - 1,
        "in [0, 255]": 255 * x,
    }
    found = {name: _accuracy(_logits(oracle, scaled), y) for name, scaled in scales.items()}
    name, here = max(found, key=lambda name: found[name]), _accuracy(logits, y)
    if interval(found[name], len(y))[0] <= interval(here, len(y))[1]:
        return []
    return [
        f"the accuracy is {100 * here:.1f} %, and {100 * found[name]:.1f} % on inputs {name}: it seems that the model "
        "was trained on such inputs. Let it take inputs in [0, 1] and scale them itself"
    ]


def _told(values: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in values.flatten().tolist())


def _of_chance(logits: Tensor, y: Tensor) -> list[str]:
    """Whether a constant answer would be as good."""
    here, counts = _accuracy(logits, y), y.bincount()
    constant = float(counts.max()) / len(y)
    if here == 1 or interval(here, len(y))[0] > constant:
        return []
    return [
        f"the accuracy is {100 * here:.1f} %; to answer {int(counts.argmax())} always has {100 * constant:.1f} %. Are "
        "the weights loaded, the labels in the order of the logits, the inputs scaled as in training?"
    ]


def _of_numbering(logits: Tensor, y: Tensor) -> list[str]:
    """Whether another numbering of the labels would be much better; few samples of a class could fit any."""
    K = logits.shape[1]
    answers = torch.zeros(K, K, dtype=torch.int64)
    answers.index_put_((y, logits.argmax(1)), torch.ones_like(y), accumulate=True)
    labels, meant = linear_sum_assignment(answers.numpy(), maximize=True)
    renumbered, here = int(answers[labels, meant].sum()) / len(y), _accuracy(logits, y)
    if len(y) < 10 * K or renumbered <= 0.5 or interval(renumbered, len(y))[0] <= interval(here, len(y))[1]:
        return []
    pairs = ", ".join(f"{label} as {other}" for label, other in zip(labels, meant, strict=True) if label != other)
    return [
        f"the accuracy is {100 * here:.1f} %, but the labels seem to be numbered otherwise than the logits: with "
        f"{pairs} the accuracy is {100 * renumbered:.1f} %"
    ]


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((margin(logits, y) < 0).double().mean())
