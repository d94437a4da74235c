"""Rewrite the README's table and picture from the records in data/results/digits.

python workflow/readme.py            # write
python workflow/readme.py --check    # exit with 1 if the table is not that of the records
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from wda import experiment, figures

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results:[^\n]*-->\n).*?(<!-- end of results -->)", re.DOTALL)


def with_table(readme: str) -> str:
    """The text of the README with the table of the records between its two marks."""
    results = experiment.read(ROOT / "data" / "results" / "digits")
    shown = experiment.table(results).reset_index()
    rows = [shown.columns, ["---"] * 2 + ["---:"] * (shown.shape[1] - 2)]
    rows += [[f"{cell:.1f}" if isinstance(cell, float) else cell for cell in row] for row in shown.to_numpy()]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return BLOCK.sub(lambda marks: f"{marks[1]}\n{lines}\n{marks[2]}", readme)


def main() -> int:
    """Write, or check."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    path.write_text(new, encoding="utf-8")
    figure = figures.accuracy_over_kappa(experiment.read(ROOT / "data" / "results" / "digits"))
    figure.savefig(ROOT / "book" / "_static" / "accuracy-over-kappa.png", dpi=110, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
