"""Run a sweep on this machine and once more through Slurm, and compare tables and seconds.

    python workflow/slurm.py                       # after workflow/slurm-node.sh, or on a cluster
    python workflow/slurm.py local --jobs 2

Recorded in data/results/sweep/slurm.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kills import compare

from wda.experiment import load_sweep, provenance
from wda.experiment.records import save

RECORD = Path(__file__).parents[1] / "data" / "results" / "sweep" / "slurm.json"


def seconds(words: list[str]) -> float:
    """How long the sweep takes; an error where a cell fails."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "wda.cli", "sweep", *words], check=True)
    return round(time.monotonic() - start, 1)


def main() -> None:
    """Run both, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", default="small")
    parser.add_argument("--jobs", default="1")
    given = parser.parse_args()
    # the folder of a job must be one that all nodes see
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as made:
        here, there = Path(made) / "here", Path(made) / "slurm"
        words = [given.name, "--jobs", given.jobs, "-o"]
        record = {
            "sweep": given.name,
            "cells": len(load_sweep(given.name).tasks),
            "jobs": int(given.jobs),
            "slurm": subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip(),
            "seconds": {
                "here": seconds([*words, str(here)]),
                "slurm": seconds([*words, str(there), "--profile", "slurm"]),
            },
            "same_bytes": compare(here, there),
            "provenance": provenance(),
        }
    print(json.dumps(record, indent=1))
    save(record, RECORD)
    sys.exit(not all(record["same_bytes"].values()))


if __name__ == "__main__":
    main()
