"""What is known of a model before and after each epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from wda.attacks import sensitivity
from wda.distribution import AdversarialDistribution
from wda.threat import Threat
from wda.training.adversary import slope_loss, strike

__all__ = ["Epoch", "FineTuned", "Score", "score"]


@dataclass(frozen=True)
class Score:
    r"""How a model does on a sample.

    Attributes
    ----------
    clean : float
        Accuracy, from 0 to 1.
    pointwise : float
        Under W-PGD with 20 steps on the cross-entropy in the ball of order infinity, as the second paper measures.
    distributional : float
        In the ball of the threat, under the attack that is trained against: by default W-PGD-20 on ReDLR, as there.
    upsilon : float or None
        The sensitivity of the attack's loss, see `wda.attacks.sensitivity`; None if the attack does not go by it.

    Examples
    --------
    >>> Score(clean=0.98, pointwise=0.61, distributional=0.47, upsilon=None).clean
    0.98
    """

    clean: float
    pointwise: float
    distributional: float
    upsilon: float | None


@dataclass(frozen=True)
class Epoch:
    r"""What one epoch did.

    Attributes
    ----------
    epoch : int
        From 1; 0 is the model as it was given.
    validation : Score
        After it.
    test : Score or None
    loss, clean_loss : float or None
        Means over the epoch's samples: of the objective, and of the cross-entropy in it. None for epoch 0.
    upsilon, budget : tuple of float
        For each batch the moving average :math:`\Upsilon`, and the radius at which the batch was attacked.

    Examples
    --------
    >>> Epoch(0, Score(0.98, 0.61, 0.47, None)).test is None
    True
    """

    epoch: int
    validation: Score
    test: Score | None = None
    loss: float | None = None
    clean_loss: float | None = None
    upsilon: tuple[float, ...] = ()
    budget: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned model.

    Attributes
    ----------
    model : nn.Module
        With the weights of the best epoch, in the modes of the model given.
    epoch : int
        The one of best distributional accuracy on the validation sample; of equal ones the first. Epoch 0 does not
        stand for election.
    history : tuple of Epoch
        Epoch 0 first.

    Examples
    --------
    >>> FineTuned(nn.Linear(2, 2), 1, (Epoch(0, Score(1, 1, 0.5, None)), Epoch(1, Score(1, 1, 0.6, None)))).epoch
    1
    """

    model: nn.Module
    epoch: int
    history: tuple[Epoch, ...]


def score(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    attack: str = "wpgd",
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
    autocast: bool = False,
) -> Score:
    """What a line of the second paper's tables holds, and the sensitivity.

    Arguments are those of `strike`.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=50)
    >>> score(wda.models.load("digits-mlp"), x, y, Threat("Linf", 0.02, order=2)).clean
    0.96
    """
    still = AdversarialDistribution.from_points(x, x, y, threat)
    pointwise = strike(
        model, x, y, replace(threat, order=math.inf), "wpgd", {"loss": "ce"}, batch_size=batch_size, autocast=autocast
    )
    together = strike(model, x, y, threat, attack, options, seed=seed, batch_size=batch_size, autocast=autocast)
    clean, moved, spread = (adv.accuracy(model, batch_size) for adv in (still, pointwise, together))
    loss = slope_loss(attack, options)
    slope = None
    if loss is not None:
        slope = sensitivity(model, x, y, threat.norm, threat.order, loss, batch_size=batch_size)
    return Score(clean, moved, spread, slope)
