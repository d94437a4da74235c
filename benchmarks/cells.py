"""How many activation cells per second are enumerated, against testing sign vectors and vertices one by one.

    python benchmarks/cells.py [--seconds S] [--output data/results/benchmarks/cells.json]

One hidden layer of m units with generic weights on R^n. One yardstick asks of each of the 2^m sign vectors, by a linear
program, whether it has a cell; the other finds in a Python loop where each n hyperplanes meet, and the cells around.
Both have to find as many cells. A yardstick is left out (-) where by its rate on the last size it would need more than
S seconds (60); nothing that is printed is extrapolated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linprog
from torch import nn

from wda import cells
from wda.experiment import provenance
from wda.files import write_atomically
from wda.nets import Net, from_module

DIMENSIONS = (2, 3, 4)
UNITS = (8, 12, 16, 24, 32, 48, 64)


def network(n: int, units: int) -> Net:
    """A network of generic weights."""
    torch.manual_seed(0)
    return from_module(nn.Sequential(nn.Linear(n, units), nn.ReLU(), nn.Linear(units, 2)))


def by_signs(W: np.ndarray, b: np.ndarray) -> int:
    """The number of sign vectors that have a cell: a ball fits in, by a linear program for each."""
    length = np.linalg.norm(W, axis=1)
    radius = np.append(np.zeros(W.shape[1]), -1.0)
    count = 0
    for signs in itertools.product((-1.0, 1.0), repeat=len(b)):
        side = np.array(signs)
        rows = np.column_stack([-side[:, None] * W, length])
        solved = linprog(radius, A_ub=rows, b_ub=side * b, bounds=[*[(None, None)] * W.shape[1], (None, 1.0)])
        count += solved.x[-1] > 1e-10
    return count


def by_vertices(W: np.ndarray, b: np.ndarray) -> int:
    """The number of sign vectors around the points where n hyperplanes meet."""
    n = W.shape[1]
    found = set()
    for chosen in itertools.combinations(range(len(b)), n):
        through = list(chosen)
        signs = W @ np.linalg.solve(W[through], -b[through]) + b > 0
        for sides in itertools.product((False, True), repeat=n):
            signs[through] = sides
            found.add(signs.tobytes())
    return len(found)


def timed(work: Callable[[], int]) -> tuple[int, float]:
    """What some work gives, and its seconds: the median of as many rounds as fit into half a second."""
    times: list[float] = []
    while sum(times) < 0.5:
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def measure(n: int, seconds: float) -> list[dict[str, float | int | None]]:
    """A row for each number of units: cells, and seconds of the enumeration and of the yardsticks."""
    yardsticks = {
        "signs": (by_signs, lambda m: 2**m),
        "vertices": (by_vertices, lambda m: math.comb(m, n) * 2**n),
    }
    rate = dict.fromkeys(yardsticks, 0.0)  # seconds per candidate at the size before
    rows: list[dict[str, float | int | None]] = []
    cells.enumerate(network(n, UNITS[0]))  # the first call loads what it needs
    for m in UNITS:
        net = network(n, m)
        W, b = net.dense.weights[0][0], net.dense.bias[0]
        found, took = timed(lambda net=net: len(cells.enumerate(net)))
        assert found == sum(math.comb(m, i) for i in range(n + 1))
        row: dict[str, float | int | None] = {"n": n, "m": m, "cells": found, "seconds": took}
        for name, (work, candidates) in yardsticks.items():
            row[f"{name}_seconds"] = None
            if rate[name] * candidates(m) <= seconds:
                count, row[f"{name}_seconds"] = timed(lambda work=work, W=W, b=b: work(W, b))
                assert count == found, f"{name}: {count} cells, not {found}"
                rate[name] = row[f"{name}_seconds"] / candidates(m)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, float | int | None]) -> str:
    """A row of the table: cells per second, and how many times slower each yardstick is."""
    cells_, ours = row["cells"], row["seconds"]
    text = f"{row['n']}  {row['m']:2d}  {cells_:6d}  {cells_ / ours:13,.0f}"
    for name in ("signs", "vertices"):
        took = row[f"{name}_seconds"]
        text += f"  {'-':>11}  {'-':>6}" if took is None else f"  {cells_ / took:11,.0f}  {took / ours:6.0f}"
    return text


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="what a yardstick may need, by its rate before")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, the versions and the hardware")
    args = parser.parse_args()
    print("cells per second, and how many times slower")
    print("n   m   cells    enumeration  sign vectors  ratio  vertices   ratio")
    rows = [row for n in DIMENSIONS for row in measure(n, args.seconds)]
    if args.output:
        record = {"study": "benchmark", "seconds": args.seconds, "rows": rows, "provenance": provenance()}
        with write_atomically(args.output) as file:
            file.write(json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
