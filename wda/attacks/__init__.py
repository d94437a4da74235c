"""Attacks: each finds, in a W_p ball around a sample, a distribution on which a model does badly.

`attack` runs one by name. Each attack proper is a function of its own, in a file of its own: it takes an `Oracle`,
a batch and a point-wise threat (a ball of radius ``threat.eps`` around each sample), and returns points. What all
of them share happens here: checks, batches, the budget, counting.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from wda.attacks.deepfool import deepfool
from wda.attacks.fgsm import fgsm
from wda.attacks.pgd import pgd
from wda.attacks.wda import wda
from wda.checks import choice, number, whole
from wda.distribution import AdversarialDistribution
from wda.norms import project, round_inward
from wda.passes import Model, Oracle, batches, check_labels, check_sample
from wda.threat import Threat

__all__ = ["attack", "available", "check_kappa", "options"]

_ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": pgd, "deepfool": deepfool, "wda": wda}

# Attacks stay this much inside the ball, relatively, so that sums of float64 numbers can be audited with no tolerance.
_INWARD = 1 - 2.0**-40


def available() -> tuple[str, ...]:
    """The names that `attack` accepts.

    Examples
    --------
    >>> available()
    ('fgsm', 'pgd', 'deepfool', 'wda')
    """
    return tuple(_ATTACKS)


def options(name: str) -> dict[str, object]:
    """The options of an attack and their defaults; `kappa`, `batch_size` and `progress` are common to all.

    Raises
    ------
    ValueError
        `name` is no attack.

    Examples
    --------
    >>> options("fgsm")
    {'loss': 'ce'}
    """
    parameters = inspect.signature(_ATTACKS[choice("attack", name, _ATTACKS)]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "seed"}


def attack(
    name: str,
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    kappa: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool | None = None,
    **parameters: object,
) -> AdversarialDistribution:
    r"""Attack a model within a Wasserstein ball around a sample.

    The attack called `name` finds one point within :math:`\kappa\varepsilon` of each sample, and a share
    :math:`\kappa^{-p}` of the sample's mass moves there (eq. 10 of the first paper, whose share :math:`1/\kappa` is
    the case p = 1). The distribution lies in the ball:
    :math:`\frac1N\sum_i \kappa^{-p} d_i^p \le \kappa^{-p}(\kappa\varepsilon)^p = \varepsilon^p`.
    With ``kappa=1`` the attack is point-wise.

    Parameters
    ----------
    name : str
        One of `available`.
    model : nn.Module, or another callable
        Maps (N, ...) to logits (N, K). Normalisation belongs inside it. Its mode and the gradients of its
        parameters are left as they were.
    x : Tensor, shape (N, ...)
        The sample, within the threat's box; its dtype must be the model's. Batches go to the model's device; the
        result is on the device of `x`.
    y : integer Tensor, shape (N,)
        Labels from 0 to K-1.
    threat : Threat
    kappa : float
        At least 1; greater than 1 only for a finite order.
    seed : int
        For attacks that draw random numbers. Each sample's numbers depend on the seed and on the sample itself:
        not on the batch size, nor on the order of the samples.
    batch_size : int
    progress : bool or None
        Show a bar; by default on a terminal only, and elsewhere lines in the log "wda".
    **parameters
        Options of the attack, see `options`.

    Returns
    -------
    AdversarialDistribution
        It passes its own audit.

    Raises
    ------
    ValueError, TypeError
        A bad argument: the message names it, its value and what is accepted.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 2)
    >>> x, y = torch.rand(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> adv = attack("wda", model, x, y, Threat("L2", eps=0.1), kappa=2)
    >>> adv.audit() <= 0.1
    True
    """
    known = options(name)
    for parameter in sorted(parameters.keys() - known.keys()):
        accepted = ", ".join(["kappa", "seed", "batch_size", "progress", *known])
        raise TypeError(f"{parameter}={parameters[parameter]!r}: attack {name!r} accepts {accepted}")
    if not isinstance(threat, Threat):
        raise TypeError(f"threat={threat!r}: a wda.Threat is accepted")
    kappa = check_kappa(kappa, threat.order)
    seed, batch_size = whole("seed", seed, 0, 2**64 - 1), whole("batch_size", batch_size)
    y = check_sample(x, y, threat.box)
    weight = 1.0 if math.isinf(threat.order) else kappa**-threat.order
    if weight < sys.float_info.min * len(x):
        raise ValueError(f"kappa={kappa!r} with order={threat.order:g}: the share kappa^-order is too small a number")
    if "seed" in inspect.signature(_ATTACKS[name]).parameters:
        parameters["seed"] = seed

    start = time.monotonic()
    with warnings.catch_warnings():  # kappa may well bring the whole box within reach
        warnings.simplefilter("ignore")
        ball = replace(threat, eps=kappa * threat.eps * _INWARD, order=math.inf)
    label = f"{name} κ={kappa:g} {threat}" if kappa > 1 else f"{name} {threat}"
    x_adv = x.detach().clone()
    with Oracle(model) as oracle:
        check_labels(y, oracle.classes(oracle.to_model(x[:1])))
        for rows in batches(len(x), batch_size, label, progress):
            clean = oracle.to_model(x[rows]).detach()
            points = _ATTACKS[name](oracle, clean, y[rows].to(clean.device), ball, **parameters)
            points = project(points, clean, ball.eps, ball.norm, ball.box)
            x_adv[rows] = round_inward(points, clean, ball.eps, ball.norm)
    counts = oracle.counts(len(x), time.monotonic() - start)
    return AdversarialDistribution.from_points(x.detach(), x_adv, y, threat, weight, counts)


def check_kappa(kappa: float, order: float) -> float:
    """Return `kappa`; raise a `ValueError` if it is below 1, or above 1 in a ball of infinite order.

    Examples
    --------
    >>> check_kappa("3/2", 1.0)
    1.5
    """
    value = number("kappa", kappa, "a finite number >= 1", 1, sys.float_info.max)
    if value > 1 and math.isinf(order):
        raise ValueError(
            f"kappa={kappa!r} with order=inf: in a W_inf ball no atom may move further than eps; 1 is accepted"
        )
    return value
