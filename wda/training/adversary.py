"""The attack inside the training, and how much of the budget of the whole sample a batch gets."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wda.attacks import attack as run_attack
from wda.attacks import kind, sensitivity
from wda.checks import number, whole
from wda.distribution import AdversarialDistribution
from wda.passes import Model
from wda.threat import Threat

__all__ = ["batch_budget", "estimate", "strike"]

_STEPS = 20


def batch_budget(own: float, whole: float, threat: Threat) -> float:
    r"""The radius at which a batch is attacked by itself, so that the batches together spend the budget.

    :math:`\epsilon_B=\epsilon\,(\Upsilon_B/\Upsilon)^{q-1}`, with q the conjugate of the order p. The steepest
    displacement of the whole sample spends that much on the batch. For :math:`W_2` it is eq. 5.5 of the second paper.
    Over batches of equal size the mean of :math:`\epsilon_B^p` is :math:`\epsilon^p` if :math:`\Upsilon` is that of the
    whole sample; from an estimate it is larger, in expectation.

    Parameters
    ----------
    own, whole : float
        The sensitivities of the batch and of the sample; see `wda.attacks.sensitivity`.
    threat : Threat
        Of order p > 1.

    Returns
    -------
    float
        The radius of the threat where the order is infinite, and where the sensitivity of the sample is 0.

    Examples
    --------
    >>> batch_budget(3.0, 2.0, Threat("Linf", 0.1, order=2)), batch_budget(3.0, 2.0, Threat("Linf", 0.1, order="inf"))
    (0.15000000000000002, 0.1)
    """
    if whole == 0 or math.isinf(threat.order):
        return threat.eps
    try:
        return threat.eps * math.pow(own / whole, 1 / (threat.order - 1))
    except OverflowError:  # the order is close to 1
        return sys.float_info.max


def estimate(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    share: float = 0.1,
    *,
    generator: torch.Generator,
    loss: str = "redlr",
    batch_size: int = 256,
    autocast: bool = False,
) -> float:
    r"""The sensitivity :math:`\Upsilon` from a share of the sample, drawn without replacement.

    Parameters
    ----------
    model : nn.Module, or another callable
    x, y : Tensor
        The whole sample.
    threat : Threat
        Its norm and its order p > 1 count.
    share : float
        In (0, 1]; 0.1 in the second paper. At least one sample is drawn. With 1 nothing is random.
    generator : torch.Generator
        On the CPU.
    loss, batch_size, autocast
        As for `wda.attacks.sensitivity`.

    Examples
    --------
    >>> x, y, draw = torch.rand(50, 2), torch.zeros(50, dtype=torch.int64), torch.Generator().manual_seed(0)
    >>> estimate(torch.nn.Linear(2, 3), x, y, Threat(order=2), generator=draw, loss="ce") > 0
    True
    """
    number("share", share, "a number > 0, up to 1,", 5e-324, 1)
    count = max(1, round(share * len(x)))
    if count < len(x):
        rows = torch.randperm(len(x), generator=generator)[:count]
        x, y = x[rows], y[rows]
    return sensitivity(model, x, y, threat.norm, threat.order, loss, batch_size=batch_size, autocast=autocast)


def strike(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    attack: str = "wpgd",
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
    autocast: bool = False,
) -> AdversarialDistribution:
    """Any attack of `wda.attack`, as training and its validation use it.

    "wpgd" takes 20 steps of eps/20 unless `options` say otherwise, as in eq. 5.3 of the second paper. With eps = 0
    nothing moves.

    Examples
    --------
    >>> x, y = torch.rand(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> strike(torch.nn.Linear(2, 3), x, y, Threat("L2", 0.1, order=2)).audit() <= 0.1
    True
    """
    if threat.eps == 0:
        return AdversarialDistribution.from_points(x, x.clone(), y, threat)
    given = dict(options or {})
    if attack == "wpgd":
        steps = whole("steps", given.setdefault("steps", _STEPS))
        given.setdefault("step_size", threat.eps / steps)
    return run_attack(
        attack, model, x, y, threat, seed=seed, batch_size=batch_size, autocast=autocast, progress=False, **given
    )


def slope_loss(attack: str, options: Mapping[str, Any] | None) -> str | None:
    """The loss by whose slopes an attack shares out one budget; None where it does not."""
    return dict(options or {}).get("loss", "redlr") if kind(attack) == "budgeted" else None


def within(threat: Threat, eps: float) -> Threat:
    """The threat with another radius; that a batch's share may reach across the whole box is nobody's mistake."""
    with warnings.catch_warnings(action="ignore"):
        return replace(threat, eps=eps)
