"""How fast the risk of each network at hand can grow: the asymptotic slope l from both sides, recorded.

    python workflow/recession.py                    # the bundled models, and those under WDA_DATA
    python workflow/recession.py digits-cnn         # these only

For each model and norm, over all labels: a certified upper bound of l and what it is the least of, the product of layer
norms, what an attack along rays finds, and the ratio of the bound to that. Small networks are also enumerated or given
to a mixed-integer program, whose bounds are exact unless it runs out of time. One record for each model is written to
data/results/recession.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wda import models, nets
from wda.certificates import Slope, bounds, gains, propagation, recession_slope
from wda.certificates.recession import pairs_of
from wda.errors import NotPiecewiseAffine
from wda.experiment import provenance
from wda.files import write_atomically
from wda.nets import Net

FOLDER = Path(__file__).parents[1] / "data" / "results" / "recession"
NORMS = ("Linf", "L2", "L1")
STARTS = 50
SEARCHED_UNITS, SEARCH_SECONDS = 512, 30.0  # a program searches networks of up to so many units, for so long


def measure(net: Net, name: str) -> dict[str, Any]:
    """The slope of one network in one norm, from both sides."""
    pairs, limit = pairs_of(net.classes, None), net.recession()
    start = time.monotonic()
    product = gains.product(limit, name, pairs)
    seconds = {"product": time.monotonic() - start}
    parts = {
        "halved": lambda: gains.halved(limit, name, pairs),
        "homogeneous": lambda: gains.homogeneous(limit, name, pairs),
        "gradient": lambda: propagation.gradient(limit, name, pairs, propagation.slopes(limit)),
    }
    found: dict[str, Any] = {"product": float(product.max())}
    found["parts"] = {key: _largest(bound) for key, bound in parts.items()}

    start = time.monotonic()
    found["parts"]["all"] = float(bounds.recession_upper(net, name, pairs).max())
    seconds["upper"] = time.monotonic() - start

    start = time.monotonic()
    steepest = bounds.steepest_pairs(net, name, pairs)
    values, _ = bounds.recession_lower(net, name, steepest, starts=STARTS)
    found["lower"] = float(values.max())
    seconds["lower"] = time.monotonic() - start
    found["attacked"] = steepest
    found["pair"] = steepest[int(values.argmax())]

    start = time.monotonic()
    slope = searched(net, name)
    seconds["search"] = time.monotonic() - start
    found["search"] = slope and {"method": slope.method, "lower": slope.lower, "upper": slope.upper}
    found["exact"] = slope.value if slope and slope.exact else None

    found["upper"] = min(found["parts"]["all"], slope.upper if slope else math.inf)
    found["ratio"] = found["upper"] / found["lower"] if found["lower"] else None
    return {**found, "seconds": {key: round(value, 2) for key, value in seconds.items()}}


def _largest(bound: Callable[[], torch.Tensor]) -> float | None:
    """Over all pairs; None where the network cannot be treated so."""
    try:
        return float(bound().max())
    except (NotPiecewiseAffine, ValueError):
        return None


def searched(net: Net, name: str) -> Slope | None:
    """l from the cones of a network that can be enumerated, or from a program for a small one."""
    if net.n <= 3:
        return recession_slope(net, name, method="cones")
    if name != "L2" and 0 < sum(net.recession().units) <= SEARCHED_UNITS:
        return recession_slope(net, name, method="milp", time_limit=SEARCH_SECONDS)
    return None


def study(name: str) -> None:
    """Measure one model and write its record."""
    card = models.card(name)
    net = nets.from_module(models.load(name), card["input"]["shape"] if card.get("input") else None)
    found = {}
    for norm_name in NORMS:
        found[norm_name] = measure(net, norm_name)
        print(name, norm_name, json.dumps(found[norm_name]), flush=True)
    record = {
        "study": "recession", "model": name, "weights_sha256": card["weights_sha256"], "starts": STARTS,
        "norms": found, "provenance": provenance(),
    }  # fmt: skip
    with write_atomically(FOLDER / f"{name}.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def main() -> int:
    """Study the models named, by default all at hand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which; by default all")
    for name in parser.parse_args().names or models.available():
        study(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
