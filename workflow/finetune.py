"""Fine-tune the bundled networks in every configuration of the second paper, and the network for MNIST in one.

    python workflow/finetune.py                    # what has no record yet
    python workflow/finetune.py digits-cnn         # one network only

One record for each run, in data/results/finetune; the weights beside it are not kept in the repository. Runs that were
killed go on where they were. The network for MNIST needs the files under WDA_DATA. Records of one configuration also
get certified radii of test images, before and after: the other side of the bracket. Those for MNIST, where that says
little, also get the nearest errors of a longer search.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wda.attacks import distances
from wda.certificates import radius
from wda.certificates.radius import verified
from wda.data import data_folder
from wda.evaluate import Bracket
from wda.experiment import load_inputs, read_finetune, run_finetune
from wda.experiment.records import Record, save
from wda.weights import state_dict

FOLDER = Path(__file__).parents[1] / "data" / "results" / "finetune"
SEEDS = (0, 1, 2)
PUBLISHED = {"attack": "wpgd", "attack_options": {}}
W2 = {"order": "2.0", "penalty": "ce"}
DIGITS = {"data": "digits", "eps": 0.1, "epochs": 6, "batch_size": 64}
MNIST = {"data": "mnist", "eps": 0.3, "epochs": 3, "batch_size": 128, "n": 1000, "dtype": "float32"}
MAIN = {"variant": "whole", "tau": 0.01, "eta": 1.0}
CERTIFIED = {**MAIN, **W2}  # five minutes each on the digits, half an hour for MNIST
LONGER, SOME = {"steps": 200, "restarts": 10}, 100  # a longer search for MNIST, on so many images
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
        for seed, attack in ((0, PUBLISHED), (0, NEAREST), (1, PUBLISHED), (2, PUBLISHED)):
            yield {**MNIST, **MAIN, **W2, **attack, "model": "mnist_trades_smallcnn", "seed": seed}


def recorded(model: str | None) -> dict[Path, Record]:
    """The records there are, of one network or of all."""
    records = {path: read_finetune(path) for path in sorted(FOLDER.glob("*.json"))}
    return {path: record for path, record in records.items() if model in (None, record["parameters"]["model"])}


def network(about: dict[str, Any], weights: Path | None) -> tuple[Tensor, Tensor, nn.Module]:
    """The test sample, and the network as given or with other weights."""
    x, y, net, _ = load_inputs(about["data"], about["model"], about["n"], about["dtype"], about["device"])
    if weights is not None:
        net.load_state_dict(state_dict(weights))
    return x, y, net


def certified(about: dict[str, Any], weights: Path | None) -> list[float]:
    """The radius within which each test image provably has no error."""
    if about["data"] == "mnist" and weights is None:
        return Bracket.load(GIVEN).radius.tolist()
    x, y, net = network(about, weights)
    if about["data"] == "digits":
        return radius(net, x, y, about["norm"]).tolist()
    # a certificate takes a minute there: no search
    holds = verified(net, x[:FEW], y[:FEW], about["norm"], ONLY, method="linear", batch_size=1)
    return [float(ONLY) if held else 0.0 for held in holds.tolist()]


def searched(about: dict[str, Any], weights: Path | None) -> list[float]:
    """The distance of the nearest error to each of the first test images, by a longer search."""
    x, y, net = network(about, weights)
    return distances(net, x[:SOME], y[:SOME], about["norm"], seed=about["seed"], **LONGER).distance.tolist()


def check(key: str, measure: Callable[[dict[str, Any], Path | None], list[float]], model: str) -> None:
    """Add what is measured before and after to the records of a network; before only once."""
    records = recorded(model)
    given = next((record["before"][key] for record in records.values() if key in record["before"]), None)
    for path, record in records.items():
        about = record["parameters"]
        if not CERTIFIED.items() <= about.items() or key in record["after"]:
            continue
        weights = path.with_suffix(".weights.pt")
        if not weights.is_file():
            print(f"{key}: {weights.name} is not there; remove the record to make the run again", flush=True)
            continue
        print(f"{key}: {path.name}", flush=True)
        given = record["before"][key] = given or measure(about, None)
        record["after"][key] = measure(about, weights)
        save(record, path)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="only this one")
    only = parser.parse_args().model
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    done = [record["parameters"] for record in recorded(only).values()]
    for settings in runs():
        if only not in (None, settings["model"]) or any(settings.items() <= about.items() for about in done):
            continue
        print(", ".join(f"{key} {value}" for key, value in settings.items()), flush=True)
        run_finetune(**settings, output=FOLDER)
    for model in sorted({record["parameters"]["model"] for record in recorded(only).values()}):
        check("radius", certified, model)
        if model.startswith("mnist"):
            check("longer", searched, model)


if __name__ == "__main__":
    main()
