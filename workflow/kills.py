"""Kill a sweep at random moments, go on with it, and compare what it comes to with an undisturbed run.

    python workflow/kills.py local --kills 20 --jobs 1

Each kill is SIGKILL to the whole process group, as when a machine dies. Recorded in data/results/sweep/kills.json: the
kills, the starts and ends of cells, and whether the final tables have the same bytes, what they cost aside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from wda.experiment import load_sweep, provenance
from wda.experiment.records import load, save

RECORD = Path(__file__).parents[1] / "data" / "results" / "sweep" / "kills.json"


def start(name: str, folder: Path, jobs: int) -> subprocess.Popen[bytes]:
    """The command that the user types, in a process group of its own."""
    words = [sys.executable, "-m", "wda.cli", "sweep", name, "-o", str(folder), "--jobs", str(jobs)]
    return subprocess.Popen(words, start_new_session=True)


def disturbed(name: str, folder: Path, jobs: int, kills: int, draw: random.Random, longest: float) -> list[float]:
    """Run the sweep to its end in spite of so many kills; the seconds after which each came."""
    after: list[float] = []
    while True:
        run, moment = start(name, folder, jobs), draw.uniform(1, longest)
        try:
            run.wait(moment if len(after) < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            after.append(round(moment, 1))
            print(f"killed after {moment:.1f} s: {len(after)} of {kills}", flush=True)
            continue
        assert run.returncode == 0, run.returncode
        return after


def journal(folder: Path) -> dict[str, int]:
    """How often cells were started and ended, and how many were started after their end."""
    starts: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    twice = 0
    for line in (folder / "records" / "journal.txt").read_text().splitlines():
        _, what, cell = line.split(maxsplit=2)
        twice += what == "start" and ends[cell] > 0
        (starts if what == "start" else ends)[cell] += 1
    return {"starts": starts.total(), "ends": ends.total(), "started_after_their_end": twice}


def compare(one: Path, other: Path) -> dict[str, bool]:
    """Which of the files of the tables have the same bytes, those with seconds aside."""
    names = sorted({path.name for folder in (one, other) for path in (folder / "tables").iterdir()})
    read = {name: [(folder / "tables" / name).read_bytes() for folder in (one, other)] for name in names}
    return {name: a == b for name, (a, b) in read.items() if not name.startswith(("costs", "seconds"))}


def content(path: Path) -> dict[str, Any]:
    """A record but for its timing and its provenance."""
    record = load(path)
    del record["passes"]["seconds"], record["provenance"]
    return dict(record)


def main() -> None:
    """Run, kill, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--longest", type=float, help="seconds until a kill (default: about what two cells take)")
    parser.add_argument("--folder", help="where the sweeps run (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(given.folder or made)
        calm, troubled = folder / "calm", folder / "troubled"
        begun = time.monotonic()
        assert start(given.name, calm, given.jobs).wait() == 0
        seconds = time.monotonic() - begun
        cells = len(load_sweep(given.name).tasks)
        longest = given.longest or 10 + 2.5 * given.jobs * seconds / cells
        after = disturbed(given.name, troubled, given.jobs, given.kills, random.Random(0), longest)
        before = journal(troubled)
        assert start(given.name, troubled, given.jobs).wait() == 0
        names = sorted(path.name for path in (calm / "records").glob("*.json"))
        record = {
            "sweep": given.name,
            "cells": cells,
            "jobs": given.jobs,
            "kills": len(after),
            "killed_after_seconds": after,
            "undisturbed_seconds": round(seconds, 1),
            "undisturbed": journal(calm),
            "disturbed": before,
            "once_more": {key: value - before[key] for key, value in journal(troubled).items()},
            "same_bytes": compare(calm, troubled),
            "same_records": sum(content(calm / "records" / n) == content(troubled / "records" / n) for n in names),
            "provenance": provenance(),
        }
    print(json.dumps(record, indent=1))
    save(record, RECORD)
    whole = record["same_records"] == record["cells"] == len(names) and all(record["same_bytes"].values())
    sys.exit(not (whole and not before["started_after_their_end"] and not record["once_more"]["starts"]))


if __name__ == "__main__":
    main()
