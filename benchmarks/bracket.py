"""What certificates cost and what they are worth: images per second, shares verified, and how narrow a bracket gets.

    python benchmarks/bracket.py [--output data/results/benchmarks/bracket.json]

The yardstick is plain interval propagation through the layers of the module, in float64, without an allowance for
rounding; what it verifies, "interval" has to verify too, up to rounding. Then the width of the bracket of the robust
accuracy over a W_1 ball, for each method, and the seconds that attack and certificate took.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wda import data, models
from wda.certificates.radius import verified
from wda.evaluate import bracket
from wda.experiment import provenance
from wda.files import write_atomically
from wda.threat import Threat

METHODS = ("interval", "linear", "optimised")
MODELS = ("digits-mlp", "digits-cnn", "digits-cnn-adv")
IMAGES, EPS = 24, 0.04
BRACKETED = ("digits-mlp", "digits-cnn-adv")
BRACKET_IMAGES = 12
# seconds for each image of a program on the network with 1600 units, where it ends without an answer
TIME_LIMIT = 3.0


def intervals(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Whether intervals put the label's logit above all others over the ball; layer by layer, centre and radius."""
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    for layer in model:
        centre, radius = (low + high) / 2, (high - low) / 2
        if isinstance(layer, nn.Linear):
            centre, radius = layer(centre), nn.functional.linear(radius, layer.weight.abs())
        elif isinstance(layer, nn.Conv2d):
            shape = (None, layer.stride, layer.padding)
            centre, radius = layer(centre), nn.functional.conv2d(radius, layer.weight.abs(), *shape)
        else:
            low, high = layer(low), layer(high)
            continue
        low, high = centre - radius, centre + radius
    rivals = high.scatter(1, y[:, None], -math.inf).amax(1)
    return rivals < low.gather(1, y[:, None])[:, 0]


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What some work gives, and its seconds: the least of at least three rounds, and of half a second of them."""
    times: list[float] = []
    result = work()  # the first call loads what it needs
    while len(times) < 3 or sum(times) < 0.5:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return result, min(times)


@torch.no_grad()
def verify(name: str) -> list[dict[str, Any]]:
    """A row for each method on one model."""
    x, y = data.load("digits", n=IMAGES)
    model = models.load(name)
    double = copy.deepcopy(model).double()
    plain, base = timed(lambda: intervals(double, x.double(), y, EPS))
    rows: list[dict[str, Any]] = [
        {"model": name, "method": "plain intervals", "seconds": base, "verified": _share(plain)}
    ]
    for method in METHODS:
        holds, took = timed(lambda method=method: verified(model, x, y, "Linf", EPS, method=method, progress=False))
        if method == "interval":
            assert torch.equal(holds, plain)
        rows.append({"model": name, "method": method, "seconds": took, "verified": _share(holds)})
    for row in rows:
        row["images_per_second"], row["ratio"] = IMAGES / row["seconds"], row["seconds"] / base
        print(
            "{model:15} {method:16} {images_per_second:10.1f} {ratio:10.1f} {verified:9.3f}".format(**row), flush=True
        )
    return rows


def _share(holds: Tensor) -> float:
    return float(holds.double().mean())


def widths(name: str) -> list[dict[str, Any]]:
    """A row for each method: the bracket over the W_1 ball, and what it took."""
    x, y = data.load("digits", n=BRACKET_IMAGES)
    model, rows = models.load(name), []
    for method in ("interval", "linear", "optimised", "milp"):
        b = bracket(model, x, y, Threat("Linf", EPS), method=method, time_limit=TIME_LIMIT, progress=False)
        row = {
            "model": name, "method": method, "lower": b.lower, "upper": b.upper, "width": b.upper - b.lower,
            "exact": int(b.exact.sum()), "attack_seconds": b.seconds[0], "certificate_seconds": b.seconds[1],
        }  # fmt: skip
        rows.append(row)
        print("{model:15} {method:10} {lower:8.4f} {upper:8.4f} {width:8.4f} {exact:6d} {attack_seconds:8.2f} s "
              "{certificate_seconds:8.2f} s".format(**row), flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, the versions and the hardware")
    args = parser.parse_args()
    print(f"{IMAGES} images, Linf {EPS}: images per second, times the yardstick's seconds, share verified")
    rows = [row for name in MODELS for row in verify(name)]
    print(f"{BRACKET_IMAGES} images, W_1 Linf {EPS}: lower, upper, width, exact distances, attack, certificate")
    brackets = [row for name in BRACKETED for row in widths(name)]
    if args.output:
        record = {
            "study": "benchmark", "images": IMAGES, "eps": EPS, "rows": rows, "bracket_images": BRACKET_IMAGES,
            "time_limit": TIME_LIMIT, "brackets": brackets, "provenance": provenance(),
        }  # fmt: skip
        with write_atomically(args.output) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
