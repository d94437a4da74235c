"""Attacks: each finds, in a W_p ball around a sample, a distribution on which a model does badly.

`attack` runs one by name. Each attack proper is a function of its own, in a file of its own: it takes an `Oracle`,
samples and a threat, and returns points. What all of them share happens here and in `wda.distances`: checks, batches,
the budget, counting. There are four kinds. Most search a ball around each sample, one batch after the other; some do
so with the whole sample before them, because what they learn from one image they use on the next; some move the whole
sample at once within the W_p ball; and some look for the nearest error of each sample, whatever the budget, which is
then spent where it pays.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from wda.attacks.a3 import a3, a3_plus_plus
from wda.attacks.autoattack import apgd_ce, apgd_dlr, autoattack
from wda.attacks.deepfool import deepfool
from wda.attacks.distances import METHODS, Distances, distances
from wda.attacks.fgsm import fgsm
from wda.attacks.pgd import pgd
from wda.attacks.wda import wda
from wda.attacks.wpgd import sensitivity, wfgsm, wpgd
from wda.checks import choice, number, whole
from wda.distribution import AdversarialDistribution
from wda.inspection import inspected, tell_reach
from wda.norms import project, round_inward
from wda.passes import Model, Oracle, batches, check_sample
from wda.threat import Threat

__all__ = ["Distances", "attack", "available", "check_kappa", "distances", "kind", "options", "sensitivity"]

# In a ball around each sample: one batch after the other, or with the whole sample at once.
_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "deepfool": deepfool,
    "apgd-ce": apgd_ce,
    "apgd-dlr": apgd_dlr,
    "wda": wda,
}
_TOGETHER: dict[str, Callable[..., Tensor]] = {"autoattack": autoattack, "a3": a3, "a3++": a3_plus_plus}
# The whole sample at once, in the W_p ball.
_BUDGETED: dict[str, Callable[..., Tensor]] = {"wfgsm": wfgsm, "wpgd": wpgd}
_ATTACKS = {**_POINTWISE, **_TOGETHER, **_BUDGETED, **METHODS}

# Attacks stay this much inside the ball, relatively, so that sums of float64 numbers can be audited with no tolerance.
_INWARD = 1 - 2.0**-40


def available() -> tuple[str, ...]:
    """The names that `attack` accepts.

    Examples
    --------
    >>> available()[:6], len(available())
    (('fgsm', 'pgd', 'deepfool', 'apgd-ce', 'apgd-dlr', 'wda'), 14)
    """
    return tuple(_ATTACKS)


def options(name: str) -> dict[str, object]:
    """The options of an attack and their defaults, beside those of `attack` itself.

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


def kind(name: str) -> str:
    """Which of the four kinds an attack is of.

    "pointwise" and "nearest" treat samples one by one: a sample's result is the same whatever else is attacked with
    it. "together" and "budgeted" do not.

    Raises
    ------
    ValueError
        `name` is no attack.

    Examples
    --------
    >>> kind("pgd"), kind("a3"), kind("wpgd"), kind("closest")
    ('pointwise', 'together', 'budgeted', 'nearest')
    """
    kinds = {"pointwise": _POINTWISE, "together": _TOGETHER, "budgeted": _BUDGETED, "nearest": METHODS}
    return next(of for of, names in kinds.items() if choice("attack", name, _ATTACKS) in names)


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
    autocast: bool = False,
    progress: bool | None = None,
    **parameters: object,
) -> AdversarialDistribution:
    r"""Attack a model within a Wasserstein ball around a sample.

    Most attacks find one point within :math:`\kappa\varepsilon` of each sample, and a share
    :math:`\kappa^{-p}` of the sample's mass moves there (eq. 10 of the first paper, whose share :math:`1/\kappa` is
    the case p = 1). The distribution lies in the ball:
    :math:`\frac1N\sum_i \kappa^{-p} d_i^p \le \kappa^{-p}(\kappa\varepsilon)^p = \varepsilon^p`.
    With ``kappa=1`` the attack is point-wise.

    "wfgsm" and "wpgd" move the whole sample at once, within the ball. "closest", "wda++" and "fab" search the nearest
    error of each sample (`distances`), and the budget is spent where it flips the most mass (`wda.allocate`); where
    many budgets are wanted, call `distances` once.

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
        At least 1; greater than 1 only for a finite order, and for attacks that search a ball.
    seed : int
        For attacks that draw random numbers. Each sample's numbers depend on the seed and on the sample itself:
        not on the batch size, nor on the order of the samples.
    batch_size : int
        To begin with; halved where memory runs out.
    autocast : bool
        Take gradients in bfloat16 where torch's autocast does so, for models in single precision: faster on many GPUs
        and on some CPUs. The nearest errors are verified in the precision of the model, and so is `accuracy`.
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

    Warns
    -----
    Untrustworthy
        The model is random, or its logits depend on the other samples of a batch; it has NaN logits; or many of its
        gradients are zero.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 2)
    >>> x, y = torch.rand(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> adv = attack("wda", model, x, y, Threat("L2", eps=0.1), kappa=2)
    >>> adv.audit() <= 0.1
    True
    """
    known = options(name)
    takes_kappa = name in _POINTWISE or name in _TOGETHER
    for parameter in sorted(parameters.keys() - known.keys()):
        accepted = ", ".join([*["kappa"] * takes_kappa, "seed", "batch_size", "autocast", "progress", *known])
        raise TypeError(f"{parameter}={parameters[parameter]!r}: attack {name!r} accepts {accepted}")
    if not isinstance(threat, Threat):
        raise TypeError(f"threat={threat!r}: a wda.Threat is accepted")
    kappa = check_kappa(kappa, threat.order)
    if kappa > 1 and not takes_kappa:
        raise ValueError(f"kappa={kappa!r}: attack {name!r} spends the budget in its own way, only 1 is accepted")
    seed, batch_size = whole("seed", seed, 0, 2**64 - 1), whole("batch_size", batch_size)
    y = check_sample(x, y, threat.box)
    tell_reach(threat, x)
    label = f"{name} κ={kappa:g} {threat}" if kappa > 1 else f"{name} {threat}"
    if name in METHODS:
        found = distances(
            model,
            x,
            y,
            threat.norm,
            threat.box,
            method=name,
            seed=seed,
            batch_size=batch_size,
            autocast=autocast,
            progress=progress,
            **parameters,
        )
        return found.distribution(threat)
    weight = 1.0 if math.isinf(threat.order) else kappa**-threat.order
    if weight < sys.float_info.min * len(x):
        raise ValueError(f"kappa={kappa!r} with order={threat.order:g}: the share kappa^-order is too small a number")
    if "seed" in inspect.signature(_ATTACKS[name]).parameters:
        parameters["seed"] = seed

    with warnings.catch_warnings():  # kappa may well bring the whole box within reach
        warnings.simplefilter("ignore")
        order = threat.order if name in _BUDGETED else math.inf
        ball = replace(threat, eps=_radius(kappa, threat, x), order=order)
    start = time.monotonic()
    x_adv = x.detach().clone()
    with Oracle(model, batch_size, autocast) as oracle, inspected(oracle, x, y, x_adv):

        def move(rows: slice) -> None:
            clean = oracle.to_model(x[rows]).detach()
            points = _ATTACKS[name](oracle, clean, y[rows].to(clean.device), ball, **parameters)
            x_adv[rows] = (points if name in _BUDGETED else _into_ball(points, clean, ball)).to(x.device)

        if name in _POINTWISE:
            for rows in batches(len(x), batch_size, label, progress):
                oracle.in_batches(move, rows)
        else:
            for rows in batches(len(x), len(x), label, progress):
                move(rows)
    counts = oracle.counts(len(x), time.monotonic() - start)
    return AdversarialDistribution.from_points(x.detach(), x_adv, y, threat, weight, counts)


def _radius(kappa: float, threat: Threat, x: Tensor) -> float:
    """How far points may go: just less than kappa times eps, and no further than the dtype can square.

    Such a radius holds all of any box, so one that reaches across the box does as well.
    """
    radius, limit = kappa * threat.eps * _INWARD, math.sqrt(torch.finfo(x.dtype).max)
    if radius <= limit:
        return radius
    reach = math.inf if threat.box is None else x[0].numel() * (threat.box[1] - threat.box[0])
    if reach > limit:
        raise ValueError(
            f"eps={threat.eps!r} with kappa={kappa!r} and box={threat.box}: a radius up to {limit:.3g} is accepted "
            f"for x of {x.dtype}"
        )
    return reach


def _into_ball(points: Tensor, x: Tensor, ball: Threat) -> Tensor:
    """The nearest points that lie in the ball around each sample, as rounded; the sample where a search got lost."""
    points = torch.where(points.isfinite().flatten(1).all(1).view(-1, *[1] * (x.ndim - 1)), points, x)
    return round_inward(project(points, x, ball.eps, ball.norm, ball.box), x, ball.eps, ball.norm)


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
