"""How long `import wda` takes, against `import torch` in the same run.

    python benchmarks/import_time.py [ROUNDS]

Each round starts a fresh interpreter for each of the two, in turn; the first round only warms the file cache.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    """Wall-clock seconds of an interpreter that imports a module and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    times = [(seconds("torch"), seconds("wda")) for _ in range(rounds + 1)][1:]
    torch, wda = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(w / t for t, w in times)
    print(f"import torch {torch:.2f} s, import wda {wda:.2f} s, ratio {ratio:.2f} (medians of {rounds} rounds)")


if __name__ == "__main__":
    main()
