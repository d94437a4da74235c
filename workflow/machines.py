"""Run the README's two commands as on other machines, each time in a fresh clone, and record how they ended.

    python workflow/machines.py                   # all of them, one after the other: hours
    python workflow/machines.py "1 thread" avx2   # some

The record, data/results/machines.json, says for each what was in force, what `make book` and `make test` ended with,
and which tests failed. The last configuration is none of a processor: there all sums end in other bits
(workflow/other_machine).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from wda.experiment import provenance
from wda.experiment.records import save

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "data" / "results" / "machines.json"
OTHER = {"PYTHONPATH": str(ROOT / "workflow" / "other_machine")}
BUSY = "busy"
CONFIGURATIONS: dict[str, dict[str, str]] = {
    "as it is": {},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "oneDNN off": {**OTHER, "WDA_ONEDNN": "off"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "4 threads": {"OMP_NUM_THREADS": "4"},
    BUSY: {},  # beside four processes that never rest
    "last bits": {**OTHER, "WDA_LAST_BITS": "1"},
}
ASK = """import json, torch
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
    "mkldnn": torch.backends.mkldnn.enabled, "config": torch.__config__.show()}))"""


def run(name: str, folder: Path) -> dict[str, Any]:
    """Both commands in a clone, under one configuration."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    subprocess.run(["make", "-s", "env"], cwd=folder, check=True)
    environment = {**os.environ, **CONFIGURATIONS[name]}
    about: dict[str, Any] = {"environment": {k: v.replace(f"{ROOT}/", "") for k, v in CONFIGURATIONS[name].items()}}
    shown = subprocess.run(
        [".venv/bin/python", "-c", ASK], cwd=folder, env=environment, capture_output=True, check=True
    )
    about["torch"] = json.loads(shown.stdout)
    with ExitStack() as beside:
        for _ in range(4 if name == BUSY else 0):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            beside.callback(process.wait)
            beside.callback(process.kill)
        for target in ("book", "test"):
            start = time.monotonic()
            done = subprocess.run(["make", target], cwd=folder, env=environment, capture_output=True, text=True)
            lines = done.stdout.splitlines()
            ends = [line for line in lines if re.match(r"=* ?\d+ (passed|failed).* in ", line)]
            about[target] = {
                "status": done.returncode,
                "minutes": round((time.monotonic() - start) / 60, 1),
                "last": ends[-1].strip("= ") if ends else (lines or [""])[-1],
                "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
            }
            if done.returncode:
                about[target]["said"] = done.stderr[-2000:]
            print(f"{name}: make {target}: {about[target]}", flush=True)
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)} (default: all)")
    names = parser.parse_args().names or list(CONFIGURATIONS)
    if unknown := set(names) - set(CONFIGURATIONS):
        parser.error(f"{', '.join(unknown)}: {', '.join(CONFIGURATIONS)} are accepted")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            about = {**run(name, Path(folder) / "clone"), "provenance": provenance()}
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        save({**known, name: about}, RECORD)


if __name__ == "__main__":
    main()
