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
    try:
        import ot  # noqa: F401
    except ImportError as error:
        raise ImportError("the exact distance needs the package POT: pip install 'wda[transport]'") from error
    distances = [_distances(start, end, norm).numpy() for start, end, _ in blocks]
    masses = [mass / mass.sum() for _, _, mass in blocks]
    if math.isinf(order):
        return max(_bottleneck(d, mass) for d, mass in zip(distances, masses, strict=True))
    # high powers of distances spread over more digits than the solver has: relative to the bottleneck, what an optimal
    # plan uses stays in sight; what exceeds 1/flow no plan can afford, and is cut there
    if order > _HIGH:
        scale = max(_bottleneck(d, mass) for d, mass in zip(distances, masses, strict=True))
    else:
        scale = max(float(d.max()) for d in distances)
    if scale == 0:
        return 0.0
    total = 0.0
    for d, mass in zip(distances, masses, strict=True):
        with np.errstate(over="ignore"):
            power = (d / scale) ** order
        limit = 2 / min(1 / len(d), mass[mass > 0].min()) + 1
        total += _cost(mass, np.minimum(power, limit)) * len(d) / n
    return float(scale * max(total, 0.0) ** (1 / order))


_HIGH = 4.0


def _distances(start: Tensor, end: Tensor, norm: str) -> Tensor:
    """All distances, (a, b); by differences, as torch's matrix product for many points loses half the digits."""
    return torch.cdist(start, end, p=exponent(norm), compute_mode="donot_use_mm_for_euclid_dist")


def _cost(mass: NDArray[np.float64], cost: NDArray[np.float64]) -> float:
    """The least mean cost of moving equal masses on the rows to `mass` on the columns, each of sum one."""
    import ot

    plan, log = ot.emd(ot.unif(len(cost)), mass, cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"optimal transport did not finish: {log['warning']}")
    return float((plan * cost).sum())


def _bottleneck(distance: NDArray[np.float64], mass: NDArray[np.float64]) -> float:
    """The smallest t such that a plan moves nothing further than t, by bisection over the distances that occur."""
    levels = np.unique(distance)
    # masses carry rounding errors of 1e-16 each; a plan that leaves less than this outside counts as one with none
    negligible = min(1e-12, mass[mass > 0].min() / 2)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if _cost(mass, (distance > levels[middle]).astype(float)) <= negligible:
            high = middle
        else:
            low = middle + 1
    return float(levels[low])
