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
    scale = max(float(d.max()) for d in distances)
    if scale == 0:
        return 0.0
    if math.isinf(order):
        return max(_bottleneck(d, mass) for d, (_, _, mass) in zip(distances, blocks, strict=True))
    total = 0.0
    for d, (_, _, mass) in zip(distances, blocks, strict=True):
        total += _cost(mass, (d / scale) ** order) * len(d) / n
    return float(scale * max(total, 0.0) ** (1 / order))


def _distances(start: Tensor, end: Tensor, norm: str) -> Tensor:
    """All distances, (a, b); by differences, as torch's matrix product for many points loses half the digits."""
    return torch.cdist(start, end, p=exponent(norm), compute_mode="donot_use_mm_for_euclid_dist")


def _cost(mass: NDArray[np.float64], cost: NDArray[np.float64]) -> float:
    """The least mean cost of moving equal masses on the rows to `mass` on the columns, both scaled to one."""
    import ot

    # POT holds both marginals to the same sum exactly; its own warning (a failed solve) is an error here
    plan, log = ot.emd(ot.unif(len(cost)), mass / mass.sum(), cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"optimal transport did not finish: {log['warning']}")
    return float((plan * cost).sum())


def _bottleneck(distance: NDArray[np.float64], mass: NDArray[np.float64]) -> float:
    """The smallest t such that a plan moves nothing further than t, by bisection over the distances that occur."""
    levels = np.unique(distance)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        # masses carry rounding errors of 1e-16 each: a plan with less than 1e-12 outside counts as one with none
        if _cost(mass, (distance > levels[middle]).astype(float)) <= 1e-12:
            high = middle
        else:
            low = middle + 1
    return float(levels[low])
