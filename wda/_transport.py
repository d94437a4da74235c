"""Exact discrete optimal transport, through POT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wda.norms import exponent

__all__ = ["exact_cost", "least_cost", "memory"]

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
    if math.isinf(order):
        return max(_bottleneck(_distances(start, end, norm).numpy(), mass / mass.sum()) for start, end, mass in blocks)
    # High powers of distances spread over more digits than the solver has. So the power is doubled until it is the
    # order, each time in units of the longest distance that the plan before used. Where a plan exists whose distances
    # are at most 1, an optimal one uses none of power above min(a, b): along a cycle that exchanges such an edge
    # for edges of that plan, at most min(a, b) of them, the cost would fall. What is above is cut there.
    scale, power = max(_longest(start, end, norm) for start, end, _ in blocks), 1.0
    while scale > 0:
        total, longest = 0.0, 0.0
        for start, end, mass in blocks:  # one after the other, as each takes a matrix of all its pairs
            distance = _distances(start, end, norm).numpy()
            with np.errstate(over="ignore"):
                cost = np.minimum((distance / scale) ** power, min(distance.shape) + 1)
            plan = _plan(mass / mass.sum(), cost)
            total += float((plan * cost).sum()) * len(cost) / n
            longest = max(longest, float(distance[plan > 0].max()))
        if power == order:
            return float(scale * total ** (1 / order))
        scale = longest
        power = min(2 * power, order)
    return 0.0


def least_cost(blocks: Sequence[Block], n: int, norm: str, order: float) -> float:
    """A lower bound of W_p: every mass goes to the nearest point of the other side, whatever else goes there.

    Where moves are short beside the distances in the sample, the nearest is where it came from, and the bound is the
    distance itself. Pairs are looked at in slices, so that memory grows with the number of points only.
    """
    labels = []
    for start, end, mass in blocks:
        held = torch.from_numpy(mass > 0)
        to_start, to_end = torch.full((len(end),), math.inf, dtype=torch.float64), []
        for distance in _slices(start, end, norm):
            torch.minimum(to_start, distance.amin(0), out=to_start)
            to_end.append(distance[:, held].amin(1))
        each = torch.full((len(start),), 1 / n, dtype=torch.float64)
        labels.append([(torch.from_numpy(mass)[held], to_start[held]), (each, torch.cat(to_end))])
    longest = max(float(nearest.max()) for sides in labels for _, nearest in sides)
    if math.isinf(order) or longest == 0:
        return longest
    total = sum(
        max(math.fsum((mass * (nearest / longest) ** order).tolist()) for mass, nearest in sides) for sides in labels
    )
    return float(longest * total ** (1 / order))


def memory(blocks: Sequence[Block]) -> int:
    """About how many bytes `exact_cost` takes: 70 to 120 for each pair were measured, most of them POT's."""
    return max(len(start) * len(end) for start, end, _ in blocks) * 100


def _slices(start: Tensor, end: Tensor, norm: str) -> Iterator[Tensor]:
    """The distances from a few of the sample's points at a time to all atoms, (few, b), in some 32 MB."""
    for part in start.split(max(1, 2**22 // len(end))):
        yield _distances(part, end, norm)


def _longest(start: Tensor, end: Tensor, norm: str) -> float:
    return max(float(distance.max()) for distance in _slices(start, end, norm))


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
