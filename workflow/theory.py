"""Check the chain of certificates on random networks, and record what was found: `make theory`.

    l_N <= l <= Lambda <= L_margin <= L_corrected    and    E + l eps <= V(eps) <= E + Lambda eps

on 100 networks for each norm, over depths 1 and 2 and 2, 3 and 5 classes. One record for each norm is written to
data/results/theory.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from networks import random_net, random_sample

import wda.certificates as C
from wda import Threat, nets
from wda.cells import enumerate as enumerate_cells
from wda.certificates.perspective import margin_pieces, program
from wda.experiment import provenance
from wda.files import write_atomically

FOLDER = Path(__file__).parents[1] / "data" / "results" / "theory"
NORMS = ("Linf", "L2", "L1")
SHAPES = list(itertools.product([(8,), (5, 4)], [2, 3, 5]))  # hidden widths, classes
NETS = 100
SAMPLES = 5
BUDGETS = (0.01, 0.3, 1.0, 10.0)
TOLERANCE = 1e-7


def measure(seed: int, norm: str) -> dict[str, Any]:
    """Every constant of one network on the plane; the seed also chooses depth and number of classes."""
    hidden, classes = SHAPES[seed % len(SHAPES)]
    module = random_net(2, *hidden, classes, seed=seed)
    x, y = random_sample(module, SAMPLES, seed)
    net, labels = nets.from_module(module), sorted(set(y.tolist()))
    found: dict[str, Any] = {"seed": seed, "hidden": list(hidden), "classes": classes, "labels": labels}
    found["cells"] = len(enumerate_cells(net))
    found["l_N"] = C.sample_slope(net, x, y, norm).value
    found["l"] = C.recession_slope(net, norm, labels, method="cones").value
    found["l_cells"] = C.recession_slope(net, norm, labels, method="cells").value
    found["L_margin"] = C.lipschitz(net, norm, "margin", labels, method="cells").value
    for kind in ("corrected", "paper"):
        found[f"L_{kind}"] = C.lipschitz(net, norm, kind, method="cells").value
    found["L_product"] = C.lipschitz(net, norm, "product", labels).upper
    found["margin"] = _worst_case(net, x, y, norm, "margin")
    if norm != "L2":
        found["ce"] = _worst_case(net, x, y, norm, "ce")
        # the linear program, which knows nothing of vertices
        pieces = [margin_pieces(k, classes) for k in y.tolist()]
        found["V_program"] = program(enumerate_cells(net), x.numpy(), pieces).risk(norm, BUDGETS[1])[0]
    return found


def _worst_case(net: nets.Net, x: Any, y: Any, norm: str, loss: str) -> dict[str, Any]:
    if norm == "L2":
        values = [C.worst_case_risk(net, x, y, Threat(norm, eps, 1, None), loss) for eps in (0, *BUDGETS)]
        initial = C.initial_slope(net, x, y, norm, loss).value
    else:
        curve = C.worst_case_curve(net, x, y, norm, loss)
        values, initial = np.asarray(curve((0, *BUDGETS))).tolist(), curve.initial
    return {"E": values[0], "V": values[1:], "Lambda": initial}


def broken(found: dict[str, Any]) -> list[str]:
    """The inequalities that a network violates beyond the tolerance; none is expected."""
    chain = [found["l_N"], found["l"], found["margin"]["Lambda"], found["L_margin"], found["L_corrected"]]
    names = ["l_N", "l", "Lambda", "L_margin", "L_corrected"]
    wrong = [
        f"{a} <= {b}" for (a, u), (b, v) in itertools.pairwise(zip(names, chain, strict=True)) if u > v + TOLERANCE
    ]
    for loss in ("margin", "ce"):
        if loss not in found:
            continue
        E, upper = found[loss]["E"], found[loss]["Lambda"]
        for eps, V in zip(BUDGETS, found[loss]["V"], strict=True):
            if not E + found["l"] * eps - TOLERANCE <= V <= E + upper * eps + TOLERANCE:
                wrong.append(f"{loss}: E + l eps <= V <= E + Lambda eps at eps = {eps}")
        if not found["l"] <= upper + TOLERANCE or not upper <= found["L_margin"] + TOLERANCE:
            wrong.append(f"{loss}: l <= Lambda <= L_margin")
    if abs(found["l"] - found["l_cells"]) > TOLERANCE:
        wrong.append("l from cones = l from cells")
    if "V_program" in found and abs(found["V_program"] - found["margin"]["V"][1]) > 1e-8:
        wrong.append("V from the program = V from the vertices")
    return wrong


def main() -> int:
    """Measure, print, and write the records."""
    failed = 0
    for norm in NORMS:
        start, rows = time.monotonic(), []
        for seed in range(NETS):
            rows.append({**measure(seed, norm), "norm": norm})
            rows[-1]["broken"] = broken(rows[-1])
            failed += bool(rows[-1]["broken"])
            if seed % 10 == 9:
                print(f"{norm}: {seed + 1} of {NETS} networks, {failed} with a broken inequality", flush=True)
        record = {
            "study": "theory", "norm": norm, "budgets": BUDGETS, "samples": SAMPLES, "tolerance": TOLERANCE,
            "seconds": round(time.monotonic() - start, 1), "provenance": provenance(), "networks": rows,
        }  # fmt: skip
        with write_atomically(FOLDER / f"{norm}.json") as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
