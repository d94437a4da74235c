"""Robust accuracy over W_p balls from both sides, on networks at hand and under WDA_DATA, recorded.

    python workflow/bracket.py                       # all cases that are not yet recorded
    python workflow/bracket.py cifar10_cnn_a_adv     # those of this network

One record for each case is written to data/results/bracket: what `wda.Bracket.save` writes, and where it is from.
Samples are done in pieces, kept in _build/bracket: a run that was killed goes on where it stopped.
Remove both to start afresh.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import wda
from wda.certificates.radius import verified
from wda.evaluate import Bracket, bracket
from wda.experiment import provenance

FOLDER = Path(__file__).parents[1] / "data" / "results" / "bracket"
PIECES = FOLDER.parents[2] / "_build" / "bracket"
PIECE = 10


@dataclass(frozen=True)
class Case:
    """A network, its first n images, the balls around them, and how their radii are certified."""

    model: str
    data: str
    n: int
    norm: str
    eps: tuple[str, ...]
    method: str = "optimised"
    refine: float = math.inf
    verify: int = 0  # so many images at the first radius
    only: str = ""  # this radius alone is tried for each image, where a search would take minutes

    @property
    def stem(self) -> str:
        """The name of the record."""
        return f"{self.model}_{self.norm}_{self.method}_n{self.n}"


CASES = [
    Case("digits-mlp", "digits", 120, "Linf", ("0.05", "0.1", "0.02"), "milp"),
    Case("digits-mlp", "digits", 120, "L2", ("0.1", "0.2", "0.4")),
    Case("digits-mlp", "digits", 599, "Linf", ("0.05", "0.1", "0.02")),
    Case("digits-cnn", "digits", 200, "Linf", ("0.01", "0.02", "0.05")),
    Case("digits-cnn-adv", "digits", 200, "Linf", ("0.02", "0.05", "0.1")),
    Case("mnist_kw_small_eps0.1", "mnist", 500, "Linf", ("0.1", "0.05", "0.02"), verify=1000),
    Case("cifar10_oval_base_kw_eps2", "cifar10", 200, "Linf", ("2/255", "1/255", "1/510"), verify=500),
    Case("cifar10_cnn_a_adv", "cifar10", 200, "Linf", ("2/255", "1/255", "1/510"), verify=500),
    Case("cifar10_resnet2b_adv_eps2", "cifar10", 100, "Linf", ("2/255", "1/255", "1/510"), verify=300),
    Case("mnist_tiny_mlp_20", "mnist", 30, "Linf", ("0.03", "0.02", "0.01"), "milp", verify=500),
    Case("mnist_lipsdp_50", "mnist", 100, "Linf", ("0.03", "0.02", "0.01"), verify=500),
    Case("mnist_lirpa_fc_128_64", "mnist", 100, "Linf", ("0.03", "0.02", "0.01"), verify=500),
    Case("mnist_rsl18a_2layer", "mnist", 100, "Linf", ("0.1", "0.05", "0.02"), verify=500),
    Case("mnist_cnn_a_adv", "mnist", 50, "Linf", ("0.3", "0.1", "0.05"), verify=200),
    Case("cifar10_conv_small_sigmoid_adv", "cifar10", 50, "Linf", ("2/255", "1/255", "1/510"), verify=200),
    Case("mnist_trades_smallcnn", "mnist", 20, "Linf", ("0.1", "0.05", "0.02"), "linear", only="0.1"),
]


def run(case: Case) -> Bracket:
    """The bracket of a case, in pieces that are kept beside the record until it is whole."""
    model = wda.models.load(case.model)
    x, y = wda.data.load(case.data, n=case.n)
    x = x.to(next(model.parameters()).dtype)
    threat = wda.Threat(case.norm, case.eps[0], "inf")
    parts = []
    size = 1 if case.only else PIECE
    for first in range(0, case.n, size):
        path = PIECES / f"{case.stem}_{first}.json"
        if not path.exists():
            rows = slice(first, first + size)
            part = (
                at_one(model, x[rows], y[rows], case)
                if case.only
                else bracket(model, x[rows], y[rows], threat, method=case.method, refine=case.refine, progress=False)
            )
            part.save(path)
            seconds = sum(part.seconds)
            print(f"{case.stem}: {first + len(part.radius)}/{case.n}, {seconds / size:.1f} s an image", flush=True)
        parts.append(Bracket.load(path))
    seconds = tuple(sum(side) for side in zip(*(part.seconds for part in parts), strict=True))
    radius, distance = (torch.cat([getattr(part, name) for part in parts]) for name in ("radius", "distance"))
    return Bracket(threat, radius, distance, None, parts[0].why, (seconds[0], seconds[1]))


def at_one(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, case: Case) -> Bracket:
    """A bracket whose certificate was tried at one radius only."""
    threat = wda.Threat(case.norm, case.only, "inf")
    start = time.monotonic()
    found = wda.distances(model, x, y, case.norm, progress=False)
    middle = time.monotonic()
    holds = verified(model, x, y, case.norm, case.only, method=case.method, batch_size=1, progress=False)
    least = (found.distance > 0).double() * torch.finfo(torch.float64).tiny
    certified = torch.where(holds, threat.eps, least)
    return Bracket(threat, certified, found.distance, found, None, (middle - start, time.monotonic() - middle))


def at_radius(case: Case) -> dict[str, Any]:
    """The point-wise accuracy verified at the first radius, on more images: one certificate each."""
    model = wda.models.load(case.model)
    x, y = wda.data.load(case.data, n=case.verify)
    x = x.to(next(model.parameters()).dtype)
    result: dict[str, Any] = {"n": case.verify, "eps": case.eps[0]}
    for method in ("interval", "linear", "optimised"):
        start = time.monotonic()
        holds = verified(model, x, y, case.norm, case.eps[0], method=method, refine=case.refine)
        result[method] = float(holds.double().mean())
        result[f"{method}_seconds"] = time.monotonic() - start
        print(f"{case.stem}: {method} verifies {100 * result[method]:.1f} % of {case.verify}", flush=True)
    return result


def main() -> None:
    """Record what is not yet recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks; by default all")
    given = parser.parse_args()
    for case in CASES:
        path = FOLDER / f"{case.stem}.json"
        if path.exists() or (given.names and case.model not in given.names):
            continue
        about = {"model": case.model, "data": case.data, "method": case.method, "budgets": case.eps}
        found = run(case)
        found.save(path, **about, verified=at_radius(case) if case.verify else None, provenance=provenance())
        for order in (1, 2, math.inf):
            lower, upper = found.curve([wda.Threat(eps=eps).eps for eps in case.eps], order)
            print(f"{case.stem}: W_{order} {lower.tolist()} to {upper.tolist()}", flush=True)


if __name__ == "__main__":
    main()
