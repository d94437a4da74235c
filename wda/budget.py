r"""How to spend the budget of a W_p ball, once it is known what each sample can be moved to and how far that is.

A sample's mass may be divided, so the best distribution is a linear program with one budget for all samples. Its
solution is greedy: a fractional knapsack for the 0-1 loss, and for any other loss the segments of each sample's concave
majorant, the steepest first (Theorem "Radius curves" of the book).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from wda.checks import number
from wda.threat import Threat

__all__ = ["allocate", "robust_accuracy", "spend"]


def allocate(distance: Tensor, threat: Threat) -> Tensor:
    r"""The share of each sample's mass to move, if all that counts is how many are misclassified.

    Solves the fractional knapsack

    .. math:: \max_{w\in[0,1]^N}\ \tfrac1N\sum_i w_i\quad\text{subject to}\quad
              \tfrac1N\sum_i w_i d_i^p\le\epsilon^p :

    the nearest samples move whole while the budget lasts, the next one in part. With :math:`d_i` the distance from
    sample i to the nearest error of its label this is the optimum over the whole ball. For order infinity
    :math:`w_i=1` where :math:`d_i\le\epsilon`.

    Parameters
    ----------
    distance : Tensor, shape (N,)
        How far each sample has to move to be misclassified, in the threat's norm and in units of the input: 0 where it
        is already, ``math.inf`` where it never is. Measured in float64 between the points themselves, as
        `AdversarialDistribution.distances` does.
    threat : Threat

    Returns
    -------
    float64 Tensor, shape (N,)
        In [0, 1] and on the device of `distance`; at most one share lies strictly between. Samples at distance 0 have
        share 1, as they count as misclassified and cost nothing; those at infinity have 0. The distribution that
        moves these shares passes `AdversarialDistribution.audit`: for a finite order the budget is spent up to
        :math:`2^{-40}+2^{-52}N` of eps, which is more than float64 sums can be off by.

    Raises
    ------
    ValueError, TypeError
        A distance is negative or NaN, `distance` is no vector, or `threat` no `Threat`.

    Examples
    --------
    >>> distance = torch.tensor([3.0, 0.0, 0.5, torch.inf])
    >>> allocate(distance, Threat("L2", eps=0.5)).round(decimals=6)
    tensor([0.5000, 1.0000, 1.0000, 0.0000], dtype=torch.float64)
    >>> allocate(distance, Threat("L2", eps=0.5, order="inf"))
    tensor([0., 1., 1., 0.], dtype=torch.float64)
    """
    d = _lengths("distance", distance, "(N,)")
    _check_threat(threat)
    nearest, order = d.sort(stable=True)
    share = _knapsack(nearest, _inward(threat, len(d)), threat.order)
    return torch.empty_like(share).index_copy(0, order, share)


def robust_accuracy(distance: Tensor, eps: float | str | Sequence[float] | Tensor, order: float | str = 1.0) -> Tensor:
    r"""The accuracy that is left when the budget is spent as `allocate` does, for one budget or for many.

    It never falls when a distance grows. So distances at which an attack succeeded give an upper bound on the robust
    accuracy over the W_p ball, certified radii a lower bound, and exact distances its value.

    Parameters
    ----------
    distance : Tensor, shape (N,)
        As for `allocate`.
    eps : float, str, sequence or Tensor
        The budgets, finite and at least 0. A string may be a fraction, ``"8/255"``.
    order : float
        p, from 1 to ``math.inf``.

    Returns
    -------
    float64 Tensor, of the shape of `eps`
        On the device of `distance`. Nothing is spared for rounding, so it is up to about :math:`2^{-40}p` below what
        the shares of `allocate` leave.

    Raises
    ------
    ValueError, TypeError
        A bad argument: the message names it, its value and what is accepted.

    Examples
    --------
    >>> robust_accuracy(torch.tensor([3.0, 0.0, 0.5, torch.inf]), [0.0, 0.5, 0.875], order=1)
    tensor([0.7500, 0.3750, 0.2500], dtype=torch.float64)
    """
    nearest = _lengths("distance", distance, "(N,)").sort().values
    p = Threat(order=order).order
    if isinstance(eps, str):
        eps = number("eps", eps, 'a finite number >= 0, or a fraction such as "8/255",', 0, sys.float_info.max)
    try:
        budgets = torch.as_tensor(eps, dtype=torch.float64, device=nearest.device)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"eps={eps!r}: finite numbers >= 0 are accepted") from error
    if not bool((budgets.isfinite() & (budgets >= 0)).all()):
        raise ValueError(f"eps={eps!r}: finite numbers >= 0 are accepted")
    left = [float((1 - _knapsack(nearest, budget, p)).mean()) for budget in budgets.flatten().tolist()]
    return budgets.new_tensor(left).view_as(budgets)


def spend(radii: Tensor, values: Tensor, threat: Threat) -> Tensor:
    r"""The best distribution of each sample's mass over radii, for any loss.

    Solves the linear program over the shares :math:`q_{ij}\ge0` with :math:`\sum_jq_{ij}=1`

    .. math:: \max_q\ \tfrac1N\sum_{i,j}q_{ij}v_{ij}\quad\text{subject to}\quad
              \tfrac1N\sum_{i,j}q_{ij}\,t_{ij}^p\le\epsilon^p,

    where :math:`v_{ij}` is the loss that sample i reaches at distance :math:`t_{ij}`. Only the corners of the least
    concave majorant of the points :math:`(t_{ij}^p,v_{ij})` of a sample are worth mass. From corner to corner the gain
    per unit of cost falls, so the segments of all samples are bought in the order of their slopes. For order infinity
    all mass of a sample goes to the largest value with :math:`t_{ij}\le\epsilon`.

    Parameters
    ----------
    radii : Tensor, shape (N, R)
        The distances :math:`t_{ij}`, in any order from the second on; the first of each sample is 0, staying where it
        is. Infinity is never reached.
    values : Tensor, shape (N, R)
        The losses :math:`v_{ij}`, in any order; minus infinity marks what is of no use, except in the first column.
    threat : Threat

    Returns
    -------
    float64 Tensor, shape (N, R)
        The shares :math:`q_{ij}`, on the device of `radii`. At most one sample is divided, and between two radii. The
        budget holds as for `allocate`, with N R in place of N.

    Raises
    ------
    ValueError, TypeError
        A bad argument: the message names it, its value and what is accepted.

    Examples
    --------
    The second sample rises steeply to 2, and by less to 3; the first is as good a place for the rest of the budget.

    >>> radii = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 3.0]])
    >>> values = torch.tensor([[0.0, 0.0, 2.0], [0.0, 2.0, 3.0]])
    >>> spend(radii, values, Threat("L2", eps=1.0, box=None)).round(decimals=6)
    tensor([[0.5000, 0.0000, 0.5000],
            [0.0000, 1.0000, 0.0000]], dtype=torch.float64)
    """
    t = _lengths("radii", radii, "(N, R)")
    if not bool((t[:, 0] == 0).all()):
        bad = int((t[:, 0] != 0).nonzero()[0])
        raise ValueError(f"radii[{bad}, 0]={float(t[bad, 0])!r}: 0 is accepted, the first radius is staying")
    v = _real("values", values, "(N, R)").to(t.device)
    if v.shape != t.shape:
        raise ValueError(f"values of shape {tuple(v.shape)}, radii of shape {tuple(t.shape)}: equal ones are accepted")
    if bool((v.isnan() | (v == math.inf)).any()) or not bool(v[:, 0].isfinite().all()):
        raise ValueError("values: finite numbers are accepted, and minus infinity from the second column on")
    _check_threat(threat)
    if math.isinf(threat.order):
        best = v.where(t <= threat.eps, -math.inf).argmax(1)
        return torch.nn.functional.one_hot(best, t.shape[1]).double()
    cost = _cost(t, _inward(threat, t.numel()), threat.order)
    begin, end, width, slope = _segments(cost, v)
    steepest = slope.flatten().sort(descending=True, stable=True).indices
    bought = torch.empty_like(slope).flatten()
    bought[steepest] = _buy(width.flatten()[steepest], len(t))
    bought = bought.view_as(slope)
    shares = torch.zeros_like(t).scatter(1, begin[:, :1], 1.0)
    return shares.scatter_add(1, end, bought).scatter_add(1, begin, -bought)


def _segments(cost: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The least concave majorants of the points of each row: where segments begin and end, their width and slope.

    A walk along the majorant: from each corner the next one is where the slope is steepest. Rows with fewer corners
    than others are filled up with segments of infinite width.
    """
    begin, end, width, slope = [], [], [], []
    at = value.where(cost == 0, -math.inf).argmax(1, keepdim=True)
    for _ in range(value.shape[1]):
        gain, step = value - value.gather(1, at), cost - cost.gather(1, at)
        rise, best = (gain / step).where((gain > 0) & (step > 0) & step.isfinite(), -math.inf).max(1, keepdim=True)
        ended = rise == -math.inf
        begin.append(at)
        at = at.where(ended, best)
        end.append(at)
        width.append(step.gather(1, best).where(~ended, math.inf))
        slope.append(rise)
    # rounding must not make a later segment of a sample look steeper than the one that leads to it
    return torch.cat(begin, 1), torch.cat(end, 1), torch.cat(width, 1), torch.cat(slope, 1).cummin(1).values


def _knapsack(nearest: Tensor, eps: float, p: float) -> Tensor:
    """The best shares of sorted distances."""
    return (nearest <= eps).double() if math.isinf(p) else _buy(_cost(nearest, eps, p), len(nearest))


def _cost(distance: Tensor, eps: float, p: float) -> Tensor:
    """(d / eps)^p: in this unit N samples have the budget N, and powers that overflow or vanish are beyond counting."""
    return ((distance / eps) ** p).where(distance > 0, 0.0)


def _buy(cost: Tensor, budget: float) -> Tensor:
    """The share of each item that the budget pays for: whole items in the given order, then a part of one."""
    before = torch.nn.functional.pad(cost[:-1].cumsum(0), (1, 0))
    return ((budget - before).clamp(min=0) / cost).clamp(max=1)


def _inward(threat: Threat, terms: int) -> float:
    """The radius less what a sum of so many float64 numbers, and a later audit of it, may be off by."""
    if math.isinf(threat.order):
        return threat.eps
    return min(threat.eps * (1 - 2.0**-40 - 2.0**-52 * terms), math.nextafter(threat.eps, 0))


def _lengths(name: str, value: Tensor, axes: str) -> Tensor:
    """Distances in float64."""
    length = _real(name, value, axes)
    good = length >= 0
    if not bool(good.all()):
        place = (~good).nonzero()[0].tolist()
        raise ValueError(f"{name}{place}={float(length[tuple(place)])!r}: numbers >= 0, or infinity, are accepted")
    return length


def _real(name: str, value: Tensor, axes: str) -> Tensor:
    """A tensor of real numbers in float64, with the axes that a string such as "(N, R)" names, none of them empty."""
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(f"{name}: a real tensor {axes} is accepted, not {type(value).__name__}")
    if value.ndim != len(axes.split()) or value.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(value.shape)}: {axes} with at least one entry is accepted")
    return value.detach().double()


def _check_threat(threat: Threat) -> None:
    if not isinstance(threat, Threat):
        raise TypeError(f"threat={threat!r}: a wda.Threat is accepted")
