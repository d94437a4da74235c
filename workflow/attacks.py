"""Every attack on networks under WDA_DATA, within the same balls: accuracies, passes and seconds, recorded.

    python workflow/attacks.py                              # all networks
    python workflow/attacks.py mnist_trades_smallcnn        # this one only
    python workflow/attacks.py --attacks pgd closest        # these attacks only

One record for each network and norm is written to data/results/attacks. Attacks that search the nearest errors run
once, for all budgets; the others once for each ball. Every distribution is audited and evaluated afresh. A row that is
in the record is not run again: remove the file to start afresh.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wda
from wda.experiment import interval, provenance
from wda.files import write_atomically

FOLDER = Path(__file__).parents[1] / "data" / "results" / "attacks"
GRID = 12  # radii of the plain attack that everything else is to beat


# An attack, its options, the orders of the balls it runs in; no orders for attacks that look for the nearest errors,
# as one run of these serves every ball.
Run = tuple[str, dict[str, Any], tuple[float, ...]]


@dataclass(frozen=True)
class Case:
    """A network, its images and the balls around them: for each order p of W_p the radii."""

    model: str
    data: str
    n: int
    norm: str
    radii: dict[float, list[str]]
    runs: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        """The stem of the record's file."""
        return f"{self.model}_{self.norm}_n{self.n}"

    def threats(self, *orders: float) -> list[wda.Threat]:
        """The balls of these orders, or all."""
        return [wda.Threat(self.norm, r, p) for p in orders or self.radii for r in self.radii.get(p, [])]


def _everywhere(*radii: str) -> dict[float, list[str]]:
    return {1.0: list(radii), 2.0: list(radii), math.inf: list(radii)}


RUNS: list[Run] = [
    ("fgsm", {}, (math.inf,)),
    ("pgd", {"steps": 40}, (math.inf,)),
    ("deepfool", {}, (math.inf,)),
    ("apgd-ce", {}, (math.inf,)),
    ("apgd-dlr", {}, (math.inf,)),
    ("wda", {}, (math.inf,)),
    ("wda", {"kappa": 2}, (1.0,)),
    ("wfgsm", {}, (2.0,)),
    ("wpgd", {}, (2.0,)),
    ("a3", {}, (math.inf,)),
    ("a3++", {}, (math.inf,)),
    ("wda++", {"step_size": 0.02}, ()),
    ("wda++", {"step_size": 0.05}, ()),
    ("wda++", {}, ()),
    ("grid", {}, ()),
    ("closest", {"steps": 46, "restarts": 1}, ()),
    ("closest", {}, ()),
]


ENSEMBLE: list[Run] = [(name, {}, (math.inf,)) for name in ("apgd-ce", "a3", "a3++", "autoattack")]

CASES = [
    Case("mnist_trades_smallcnn", "mnist", 1000, "Linf", {**_everywhere("0.3", "0.1"), math.inf: ["0.3"]}),
    Case("mnist_kw_small_eps0.1", "mnist", 1000, "Linf", _everywhere("0.1")),
    Case("cifar10_cnn_a_adv", "cifar10", 500, "Linf", _everywhere("2/255")),
    Case("cifar10_cnn_a_adv", "cifar10", 500, "L2", {1.0: ["0.25"], math.inf: ["0.25"]}),
    Case("cifar10_resnet2b_adv_eps2", "cifar10", 500, "Linf", _everywhere("2/255")),
    Case("cifar10_resnet2b_adv_eps2", "cifar10", 500, "L2", {1.0: ["0.25"], math.inf: ["0.25"]}),
    # AutoAttack's ensemble takes five core-seconds an image
    Case("mnist_trades_smallcnn", "mnist", 100, "Linf", {math.inf: ["0.3"]}, tuple(ENSEMBLE)),
]


def rows(
    case: Case, model: torch.nn.Module, x: Tensor, y: Tensor, done: list[dict[str, Any]], only: list[str] | None
) -> Iterator[list[Any]]:
    """The rows of each run in turn, but for runs that are done, or not among those asked for."""
    known = {(row["attack"], json.dumps(row["options"])) for row in done}
    for name, options, orders in case.runs or RUNS:
        if (name, json.dumps(options)) in known or (name == "wda++" and options and case.norm != "Linf"):
            continue  # the papers' steps of WDA++ are for Linf
        threats = case.threats(*orders)
        if not threats or (only and name not in only):
            continue
        print(f"{case.name}: {name} {options or ''}", flush=True)
        if name == "grid":
            found = _grid(model, x, y, case.norm, 2 * max(threat.eps for threat in threats))
        elif not orders:
            found = wda.distances(model, x, y, case.norm, method=name, **options)
        pairs = [
            (threat, wda.attack(name, model, x, y, threat, **options) if orders else found.distribution(threat))
            for threat in threats
        ]
        new = [_row(name, options, threat, adv, model) for threat, adv in pairs]
        if not orders:
            new[0]["distances"] = [round(d, 6) if d < math.inf else None for d in found.distance.tolist()]
        yield new


def _grid(model: torch.nn.Module, x: Tensor, y: Tensor, norm: str, reach: float) -> wda.Distances:
    """What a plain attack makes of the optimal budget: PGD in growing balls, on the samples that still stand."""
    start = time.monotonic()
    found = wda.attack("fgsm", model, x, y, wda.Threat(norm, 0, "inf"))
    standing = wda.losses.margin(found.logits(model), y) < 0
    distance, x_adv = torch.where(standing, math.inf, 0.0).double(), x.clone()
    forward = backward = 0.0
    for k in range(1, GRID + 1):
        rows = distance.isinf().nonzero()[:, 0]
        if not len(rows):
            break
        threat = wda.Threat(norm, reach * k / GRID, "inf")
        adv = wda.attack("pgd", model, x[rows], y[rows], threat, steps=40)
        flips = wda.losses.margin(adv.logits(model), adv.y)[: len(adv.moved)] >= 0
        at = rows[adv.moved_source[flips]]
        distance[at], x_adv[at] = adv.distances()[flips], adv.moved[flips]
        forward += adv.counts.forward * len(rows) / len(x)
        backward += adv.counts.backward * len(rows) / len(x)
    counts = wda.passes.Counts(forward, backward, 0.0, time.monotonic() - start)
    rival = torch.full_like(y, -1)
    return wda.Distances(x, y, norm, (0.0, 1.0), distance, x_adv, rival, counts)


def _row(
    name: str, options: dict[str, Any], threat: wda.Threat, adv: wda.AdversarialDistribution, model: torch.nn.Module
) -> dict[str, Any]:
    accuracy = adv.accuracy(model)
    row = {
        "attack": name,
        "options": options,
        "order": str(threat.order),
        "eps": threat.eps,
        "accuracy": accuracy,
        "interval": interval(accuracy, len(adv.x)),
        "transport_cost": adv.audit(),
        **asdict(adv.counts),
        "commit": provenance()["commit"],
    }
    print(
        f"    {threat}: {100 * accuracy:.2f} %, {adv.counts.backward:.1f} backward, {adv.counts.seconds:.0f} s",
        flush=True,
    )
    return row


def _done(path: Path) -> list[dict[str, Any]]:
    """The rows of a record, if there is one."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main() -> None:
    """Run what is not yet in the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks; by default all")
    parser.add_argument("--attacks", nargs="+", help="these only; by default all")
    given = parser.parse_args()
    for case in CASES:
        if given.names and case.model not in given.names:
            continue
        model = wda.models.load(case.model)
        x, y = wda.data.load(case.data, n=case.n)
        path = FOLDER / f"{case.name}.json"
        for new in rows(case, model, x, y, _done(path), given.attacks):
            done = _done(path) + new  # another process may have added to it
            record = {"model": case.model, "data": case.data, "n": case.n, "norm": case.norm, "rows": done}
            with write_atomically(path) as file:
                file.write(json.dumps({**record, "provenance": provenance()}, indent=1).encode())


if __name__ == "__main__":
    main()
