"""Fine-tune the bundled networks in every configuration of the second paper, and the network for MNIST in one.

    python workflow/finetune.py                    # what has no record yet
    python workflow/finetune.py digits-cnn         # one network only

One record for each run, in data/results/finetune; the weights beside it are not kept in the repository. Runs that were
killed go on where they were. The network for MNIST needs the files under WDA_DATA. Records on
the digits of one configuration also get the certified radius of each test image, before and after: the other side of
the bracket.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wda.certificates import radius
from wda.certificates.radius import verified
from wda.data import data_folder
from wda.evaluate import Bracket
from wda.experiment import load_inputs, run_finetune
from wda.experiment.records import load, save
from wda.weights import state_dict

FOLDER = Path(__file__).parents[1] / "data" / "results" / "finetune"
SEEDS = (0, 1, 2)
PUBLISHED = {"attack": "wpgd", "attack_options": {}}
W2 = {"order": "2.0", "penalty": "ce"}
DIGITS = {"data": "digits", "eps": 0.1, "epochs": 6, "batch_size": 64}
MNIST = {"data": "mnist", "eps": 0.3, "epochs": 3, "batch_size": 128, "n": 1000, "dtype": "float32"}
MAIN = {"variant": "whole", "tau": 0.01, "eta": 1.0}
CERTIFIED = {**MAIN, **W2}  # five minutes each on the digits, half an hour for MNIST
ONLY, FEW = "0.1", 20  # the radius tried for MNIST, on so many images
GIVEN = FOLDER.parent / "bracket" / "mnist_trades_smallcnn_Linf_linear_n20.json"  # the same for the network as given
# few steps, but towards the nearest errors: what the budget pays for is moved, and nothing else
NEAREST = {"attack": "closest", "attack_options": {"steps": 6, "restarts": 1}}


def runs() -> Iterator[dict[str, Any]]:
    """The settings of all runs."""
    for seed, model in itertools.product(SEEDS, ("digits-cnn", "digits-cnn-adv")):
        about = {**DIGITS, "model": model, "seed": seed}
        yield {**about, **MAIN, **W2, **NEAREST}
        for variant, tau, eta in itertools.product(("whole", "last"), (0.01, 0.1), (1.0, 0.1)):
            yield {**about, **W2, **PUBLISHED, "variant": variant, "tau": tau, "eta": eta}
        # one thing changed: the ball, or the penalty
        for changed in ({"order": "inf"}, {"penalty": "kl"}):
            yield {**about, **MAIN, **W2, **PUBLISHED, **changed}
    if data_folder() is not None:
        for attack in (PUBLISHED, NEAREST):
            yield {**MNIST, **MAIN, **W2, **attack, "model": "mnist_trades_smallcnn", "seed": 0}


def recorded() -> list[dict[str, Any]]:
    """The settings of the runs that have a record."""
    return [load(path)["parameters"] for path in FOLDER.glob("*.json")]


def certified(about: dict[str, Any], weights: Path | None) -> list[float]:
    """The radius within which each test image provably has no error, as given or with other weights."""
    if about["data"] == "mnist" and weights is None:
        return Bracket.load(GIVEN).radius.tolist()
    x, y, net, _ = load_inputs(about["data"], about["model"], about["n"], about["dtype"], about["device"])
    if weights is not None:
        net.load_state_dict(state_dict(weights))
    if about["data"] == "digits":
        return radius(net, x, y, about["norm"]).tolist()
    # a certificate takes a minute there: no search
    holds = verified(net, x[:FEW], y[:FEW], about["norm"], ONLY, method="linear", batch_size=1)
    return [float(ONLY) if held else 0.0 for held in holds.tolist()]


def certify(paths: list[Path]) -> None:
    """Add certified radii, before and after, to the records of a network."""
    given = next((load(path)["before"]["radius"] for path in paths if "radius" in load(path)["before"]), None)
    for path in paths:
        record = load(path)
        about = record["parameters"]
        if not CERTIFIED.items() <= about.items() or "radius" in record["after"]:
            continue
        print(f"certify {path.name}", flush=True)
        given = record["before"]["radius"] = given or certified(about, None)
        record["after"]["radius"] = certified(about, path.with_suffix(".weights.pt"))
        save(record, path)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="only this one")
    only = parser.parse_args().model
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    for settings in runs():
        if only not in (None, settings["model"]) or any(settings.items() <= about.items() for about in recorded()):
            continue
        print(", ".join(f"{key} {value}" for key, value in settings.items()), flush=True)
        run_finetune(**settings, output=FOLDER)
    for model in sorted({about["model"] for about in recorded()}):
        if only in (None, model):
            certify([path for path in sorted(FOLDER.glob("*.json")) if load(path)["parameters"]["model"] == model])


if __name__ == "__main__":
    main()
