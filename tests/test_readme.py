"""The README says what is true: its table is that of the records, its example runs, its parameters exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

import wda

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_that_of_the_records() -> None:
    assert subprocess.run([sys.executable, ROOT / "workflow" / "readme.py", "--check"], check=False).returncode == 0


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load = wda.data.load
    monkeypatch.setattr(wda.data, "load", lambda name, n=60: load(name, n=n))  # a tenth of the images
    named, budgets, own, both, certificates = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(named, "README.md", "exec"), {})
    exec(compile(budgets, "README.md", "exec"), {})
    assert (tmp_path / "adv.npz").is_file()
    names: dict[str, object] = {}
    exec(compile(own, "README.md", "exec"), names)
    x, y, threat = (names[name] for name in ("x", "y", "threat"))
    plain = wda.AdversarialDistribution.from_points(x, wda.norms.clamp(x + names["step"], threat.box), y, threat)
    with pytest.raises(wda.BudgetExceeded, match="this is rounding"):  # what the example is there to avoid
        plain.audit()
    bracket: dict[str, object] = {}
    exec(compile(both, "README.md", "exec"), bracket)
    assert 0 < bracket["b"].lower < bracket["b"].upper < 1
    exec(compile(certificates, "README.md", "exec"), names)
    curve, worst = names["curve"], names["worst"]
    assert worst.risk(names["net"], "margin") == pytest.approx(curve(0.5), abs=1e-4)


def test_commands_name_existing_targets_and_parameters() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))
    assert {"book", "test"} <= named <= targets
    commands = re.findall(r"wda run (notebooks/\w+\.ipynb)((?:.*\\\n)*.*)", README)
    assert {name for name, _ in commands} == {"notebooks/attack.ipynb", "notebooks/bracket.ipynb"}
    for name, words in commands:
        declared = papermill.inspect_notebook(str(ROOT / name)).keys()
        assert {"model", *re.findall(r"-p (\w+) ", words)} <= set(declared)


def test_links_lead_to_files() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
