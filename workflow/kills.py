"""End a sweep at random moments, go on with it, and compare what it comes to with an undisturbed run.

    python workflow/kills.py local --kills 20 --jobs 1            # all three parts
    python workflow/kills.py local --only signals alone           # the short ones

In data/results/sweep/kills.json is recorded what became of a sweep

- whose processes were all killed at once by SIGKILL, as when a machine dies, again and again: the kills, the starts and
  ends of cells, and whether the final tables have the same bytes, what they cost aside;
- whose process group had SIGTERM, SIGINT or SIGHUP, again and again: how soon all its processes were gone, and whether
  it went on from there to the same records and tables;
- of which one process was killed alone: each in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from wda.experiment import load_sweep, provenance
from wda.experiment.records import load, save

RECORD = Path(__file__).parents[1] / "data" / "results" / "sweep" / "kills.json"
HANG = 600.0  # seconds after which what has not ended hangs; no other time is required of anything
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

SHORT = """
[common]
n = 10
data = "digits"
norm = "Linf"
order = 1
[[grid]]
model = "digits-mlp"
eps = [0.05, 0.1]
attack = "fgsm"
"""


def start(name: str, folder: Path, jobs: int = 1, **how: Any) -> subprocess.Popen[bytes]:
    """The command that the user types, in a process group of its own."""
    words = [sys.executable, "-m", "wda.cli", "sweep", name, "-o", str(folder), "--jobs", str(jobs)]
    return subprocess.Popen(words, start_new_session=True, env={**os.environ, "WDA_KILLS": str(folder)}, **how)


def processes(folder: Path) -> Iterator[psutil.Process]:
    """All that run for the sweep of that folder: each has inherited the variable of the first."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("WDA_KILLS") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def gone(run: subprocess.Popen[bytes], folder: Path) -> float:
    """Wait until a sweep has ended, and all that it started; the seconds."""
    begun = time.monotonic()
    run.wait(HANG)
    while left := list(processes(folder)):
        if time.monotonic() - begun > HANG:
            raise TimeoutError(f"orphans: {left}")
        time.sleep(0.1)
    return round(time.monotonic() - begun, 1)


def disturbed(name: str, folder: Path, jobs: int, kills: int, draw: random.Random, longest: float) -> list[float]:
    """Run the sweep to its end in spite of so many kills; the seconds after which each came."""
    after: list[float] = []
    while True:
        run, moment = start(name, folder, jobs), draw.uniform(1, longest)
        try:
            run.wait(moment if len(after) < kills else None)
        except subprocess.TimeoutExpired:
            for process in processes(folder):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            gone(run, folder)
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


def same(calm: Path, troubled: Path) -> bool:
    """Whether two runs of a sweep came to the same records and tables, seconds aside."""
    names = [sorted(path.name for path in (folder / "records").glob("[!.]*.json")) for folder in (calm, troubled)]
    records = (content(calm / "records" / name) == content(troubled / "records" / name) for name in names[0])
    return names[0] == names[1] and all(records) and all(compare(calm, troubled).values())


def signalled(
    name: str, calm: Path, folder: Path, count: int, draw: random.Random, longest: float
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Run a sweep again and again, each time to its end in spite of signals, until there have been so many."""
    sent: list[dict[str, Any]] = []
    ends: Counter[str] = Counter()
    while len(sent) < count:
        troubled = folder / str(ends["sweeps"])
        while True:
            run, moment = start(name, troubled), draw.uniform(0, longest)
            number = draw.choice(SIGNALS)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(moment if len(sent) < count else HANG)
            if run.poll() is not None:
                break
            os.killpg(run.pid, number)
            seconds = gone(run, troubled)
            about = {"after_seconds": round(moment, 1), "status": run.returncode, "gone_after_seconds": seconds}
            sent.append({"signal": number.name, **about})
            print(f"{number.name} after {moment:.1f} s, gone after {seconds:.1f} s: {len(sent)} of {count}", flush=True)
        ends["sweeps"] += 1
        ends["same_records_and_tables"] += run.returncode == 0 and same(calm, troubled)
    return sent, ends


ROLES = {
    "wda sweep": "wda.cli",
    "Snakemake": "engine.py",
    "a cell's papermill": "papermill",
    "a cell's kernel": "ipykernel_launcher",
}


def find(folder: Path, role: str) -> psutil.Process | None:
    """The process of that role in the sweep of that folder."""
    for process in processes(folder):
        with contextlib.suppress(psutil.Error):
            if any(word.endswith(ROLES[role]) for word in process.cmdline()[:4]):
                return process
    return None


def killed_alone(name: str, calm: Path, folder: Path, role: str) -> dict[str, Any]:
    """Kill one process of a sweep, when a kernel is at work; whether the rest ends, and the sweep goes on."""
    run = start(name, folder)
    while find(folder, "a cell's kernel") is None or (process := find(folder, role)) is None:
        assert run.poll() is None, "the sweep ended before its first kernel was seen"
        time.sleep(0.05)
    process.kill()
    seconds = gone(run, folder)
    print(f"{role} killed, status {run.returncode}, gone after {seconds:.1f} s", flush=True)
    further = start(name, folder).wait(HANG)
    return {
        "status": run.returncode,
        "gone_after_seconds": seconds,
        "status_of_the_same_command": further,
        "same_records_and_tables": same(calm, folder),
    }


def killed_at_once(name: str, folder: Path, kills: int, jobs: int, longest: float | None) -> dict[str, Any]:
    """Run a sweep undisturbed, and once more in spite of so many kills of all its processes; compare."""
    calm, troubled = folder / "calm", folder / "troubled"
    begun = time.monotonic()
    assert start(name, calm, jobs).wait() == 0
    seconds = time.monotonic() - begun
    cells = len(load_sweep(name).tasks)
    after = disturbed(name, troubled, jobs, kills, random.Random(0), longest or 10 + 2.5 * jobs * seconds / cells)
    before = journal(troubled)
    assert start(name, troubled, jobs).wait() == 0
    names = sorted(path.name for path in (calm / "records").glob("[!.]*.json"))
    assert len(names) == cells
    return {
        "sweep": name,
        "cells": cells,
        "jobs": jobs,
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


def main() -> None:
    """Run, end, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="so many cells at once, or so many sweeps with signals")
    parser.add_argument("--longest", type=float, help="seconds until a kill (default: about what two cells take)")
    parser.add_argument("--folder", help="where the sweeps run (default: a temporary folder)")
    parts = ["kills", "signals", "alone"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="the others stay as they are recorded")
    given = parser.parse_args()
    for number in SIGNALS:  # which nohup and & let commands ignore
        signal.signal(number, signal.SIG_DFL)
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(given.folder or made)
        if "kills" in given.only:
            record |= killed_at_once(given.name, folder / "kills", given.kills, given.jobs, given.longest)
        name, calm = str(folder / "short.toml"), folder / "calm"
        Path(name).write_text(SHORT)
        begun = time.monotonic()
        assert start(name, calm).wait() == 0
        longest = given.longest or time.monotonic() - begun
        about = {"cells": len(load_sweep(name).tasks), "provenance": provenance()}
        if "signals" in given.only:
            counts = [len(range(k, given.signals, given.jobs)) for k in range(given.jobs)]
            with ThreadPoolExecutor(given.jobs) as pool:
                runs = [
                    pool.submit(signalled, name, calm, folder / f"signals-{k}", count, random.Random(k), longest)
                    for k, count in enumerate(counts)
                ]
            found: Counter[str] = Counter()
            sent: list[dict[str, Any]] = []
            for run in runs:
                sent += run.result()[0]
                found += run.result()[1]
            record["signals"] = {"signals": len(sent), **found, "sent": sent, "jobs": given.jobs, **about}
        if "alone" in given.only:
            killed = {role: killed_alone(name, calm, folder / f"alone-{k}", role) for k, role in enumerate(ROLES)}
            record["alone"] = {"killed": killed, **about}
    print(json.dumps(record, indent=1))
    save(record, RECORD)
    right = True
    if "kills" in given.only:
        right &= record["same_records"] == record["cells"] and all(record["same_bytes"].values())
        right &= not record["disturbed"]["started_after_their_end"] and not record["once_more"]["starts"]
    if "signals" in given.only:
        right &= record["signals"]["same_records_and_tables"] == record["signals"]["sweeps"]
    if "alone" in given.only:
        ends = record["alone"]["killed"].values()
        right &= all(end["status_of_the_same_command"] == 0 and end["same_records_and_tables"] for end in ends)
    sys.exit(not right)


if __name__ == "__main__":
    main()
