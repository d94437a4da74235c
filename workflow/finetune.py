"""Fine-tune the bundled networks in every configuration of the second paper, and the network for MNIST in one.

    python workflow/finetune.py                    # what has no record yet
    python workflow/finetune.py digits-cnn         # one network only

One record for each run, in data/results/finetune; the weights beside it are not kept in the repository. Runs that were
killed go on where they were. The network for MNIST needs the files under WDA_DATA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wda.data import data_folder
from wda.experiment import run_finetune

FOLDER = Path(__file__).parents[1] / "data" / "results" / "finetune"
SEEDS = (0, 1, 2)
PUBLISHED = {"attack": "wpgd", "attack_options": {}}
DIGITS = {"data": "digits", "eps": 0.1, "epochs": 6, "batch_size": 64}
MNIST = {"data": "mnist", "eps": 0.3, "epochs": 3, "batch_size": 128, "n": 1000, "dtype": "float32", "tau": 0.01}
# few steps, but towards the nearest errors: what the budget pays for is moved, and nothing else
NEAREST = {"attack": "closest", "attack_options": {"steps": 6, "restarts": 1}}


def runs() -> Iterator[dict[str, Any]]:
    """The settings of all runs."""
    for seed, model in itertools.product(SEEDS, ("digits-cnn", "digits-cnn-adv")):
        about = {**DIGITS, "model": model, "seed": seed}
        yield {**about, "variant": "whole", "tau": 0.01, "eta": 1.0, **NEAREST}
        for variant, tau, eta in itertools.product(("whole", "last"), (0.01, 0.1), (1.0, 0.1)):
            yield {**about, **PUBLISHED, "variant": variant, "tau": tau, "eta": eta}
    if data_folder() is not None:
        for attack in (PUBLISHED, NEAREST):
            yield {**MNIST, **attack, "model": "mnist_trades_smallcnn", "seed": 0}


def recorded() -> list[dict[str, Any]]:
    """The settings of the runs that have a record."""
    return [json.loads(path.read_text(encoding="utf-8"))["parameters"] for path in FOLDER.glob("*.json")]


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


if __name__ == "__main__":
    main()
