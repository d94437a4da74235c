"""How long the worst-case risk takes, for every budget at once, against trying the vertices one by one.

    python benchmarks/worst_case.py [ROUNDS]

One hidden layer, generic weights, K = 2, N = 5; margin. The yardstick finds the same candidates in a Python loop over
the subsets of hyperplanes and maximises loss - price * distance over them, for one price.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from wda.certificates import worst_case_curve, worst_case_risk
from wda.certificates.vertices import gauge
from wda.nets import Net, from_module
from wda.threat import Threat

SIZES = [(2, 8), (2, 16), (2, 32), (3, 8), (3, 16), (3, 32)]


def network(n: int, units: int) -> Net:
    """A network of generic weights."""
    torch.manual_seed(0)
    return from_module(nn.Sequential(nn.Linear(n, units), nn.ReLU(), nn.Linear(units, 2)))


def one_by_one(net: Net, x: np.ndarray, y: np.ndarray, norm: str, price: float) -> float:
    """The mean over the samples of the largest margin less `price` times the distance, vertex by vertex."""
    dense, around = net.dense, gauge(norm, net.n)
    best = np.zeros(len(x))
    for i, (start, label) in enumerate(zip(x, y, strict=True)):
        normals = np.concatenate([dense.weights[0][0], around.kinks])
        levels = np.append(-dense.bias[0], around.kinks @ start)
        best[i] = -np.inf
        for chosen in itertools.combinations(range(len(normals)), net.n):
            try:
                vertex = np.linalg.solve(normals[list(chosen)], levels[list(chosen)])
            except np.linalg.LinAlgError:
                continue
            logits = dense.logits(vertex[None])[0]
            best[i] = max(best[i], logits[1 - label] - logits[label] - price * around.size(vertex - start))
    return float(best.mean())


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of some work."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(net: Net, x: torch.Tensor, y: torch.Tensor, norm: str, rounds: int) -> tuple[float, float]:
    """Seconds for the whole curve, and for the yardstick, which has to agree with it."""
    curve = worst_case_curve(net, x, y, norm)
    # by duality, at each price from the tail on, the yardstick's value is the largest V(eps) - price * eps
    price = (curve.initial + curve.tail) / 2
    loop = partial(one_by_one, net, x.numpy(), y.numpy(), norm, price)
    assert abs(loop() - (curve.values - price * curve.knots).max()) < 1e-9
    return seconds(partial(worst_case_curve, net, x, y, norm), rounds), seconds(loop, rounds)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    y = torch.tensor([0, 1, 0, 1, 0])
    print("n   m  norm  V(eps) for every eps   vertices one by one   ratio")
    for n, units in SIZES:
        net = network(n, units)
        x = 4 * torch.rand(5, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
        for norm in ("L1", "Linf"):
            ours, loop = compare(net, x, y, norm, rounds)
            print(f"{n}  {units:2d}  {norm:4}  {ours:18.4f} s  {loop:18.4f} s  {loop / ours:6.0f}")
    print("the cone program, L2, for one budget:")
    for n, units in SIZES[:2]:
        x = 4 * torch.rand(5, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
        cone = seconds(partial(worst_case_risk, network(n, units), x, y, Threat("L2", 0.3, box=None)), rounds)
        print(f"{n}  {units:2d}  L2    {cone:18.4f} s")


if __name__ == "__main__":
    main()
