"""Exact discrete optimal transport, through POT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wda.norms import exponent

__all__ = ["exact_cost"]

Block = tuple[Tensor, Tensor, NDArray[np.float64]]


def exact_cost(blocks: Sequence[Block], n: int, norm: str, order: float) -> float:
    """W_p between a sample of n atoms of mass 1/n and a distribution, given label by label.

    Parameters
    ----------
    blocks : sequence of (start (a, d), end (b, d), mass (b,))
        Per label: the sample's points, the atoms and their masses, which sum to a/n.
    n : int
    norm : {"Linf", "L2", "L1"}
    order : float
    """
    distances = [_distances(start, end, norm).numpy() for start, end, _ in blocks]
    masses = [mass / mass.sum() for _, _, mass in blocks]
    if math.isinf(order):
        return max(_bottleneck(d, mass) for d, mass in zip(distances, masses, strict=True))
    # High powers of distances spread over more digits than the solver has. So the power is doubled until it is the
    # order, each time in units of the longest distance that the plan before used. Where a plan exists whose distances
    # are at most 1, an optimal one uses none of power above min(a, b): along a cycle that exchanges such an edge
    # for edges of that plan, at most min(a, b) of them, the cost would fall. What is above is cut there.
    scale, power = max(float(d.max()) for d in distances), 1.0
    while scale > 0:
        with np.errstate(over="ignore"):
            costs = [np.minimum((d / scale) ** power, min(d.shape) + 1) for d in distances]
        plans = [_plan(mass, cost) for mass, cost in zip(masses, costs, strict=True)]
        if power == order:
            parts = zip(plans, costs, strict=True)
            total = sum(float((plan * cost).sum()) * len(cost) / n for plan, cost in parts)
            return float(scale * total ** (1 / order))
        scale = max(float(d[plan > 0].max()) for d, plan in zip(distances, plans, strict=True))
        power = min(2 * power, order)
    return 0.0


def _distances(start: Tensor, end: Tensor, norm: str) -> Tensor:
    """All distances, (a, b); by differences, as torch's matrix product for many points loses half the digits."""
    return torch.cdist(start, end, p=exponent(norm), compute_mode="donot_use_mm_for_euclid_dist")


def _plan(mass: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cheapest way to move equal masses on the rows to `mass` on the columns, each of sum one."""
    try:
        import ot
    except ImportError as error:
        raise ImportError("the exact distance needs the package POT: pip install 'wda[transport]'") from error
    plan, log = ot.emd(ot.unif(len(cost)), mass, cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"optimal transport did not finish: {log['warning']}")
    return np.asarray(plan)


def _bottleneck(distance: NDArray[np.float64], mass: NDArray[np.float64]) -> float:
    """The smallest t such that a plan moves nothing further than t, by bisection over the distances that occur."""
    levels = np.unique(distance)
    # masses carry rounding errors of 1e-16 each; a plan that leaves less than this outside counts as one with none
    negligible = min(1e-12, mass[mass > 0].min() / 2)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        beyond = distance > levels[middle]
        if _plan(mass, beyond.astype(float))[beyond].sum() <= negligible:
            high = middle
        else:
            low = middle + 1
    return float(levels[low])
