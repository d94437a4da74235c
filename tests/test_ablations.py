"""The ablations of a model: which cells they are, what is refused, the notebook."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nbformat
import pytest

import wda
from wda import cli, experiment

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "ablations.ipynb"


def test_each_value_has_its_cell() -> None:
    sizes: list[float | None] = [None, 0.1]
    sweeps = experiment.ablations(
        eps="1/8", kappas=[1, 2.5], steps=[3, 7], step_sizes=sizes, attacks=["a3", "closest"], ns=[20, 10], n=5
    )
    cells = {name: [task.cell for task in sweep.tasks] for name, sweep in sweeps.items()}
    kappa, steps, cost = cells["kappa"], cells["steps"], cells["cost"]
    assert [(cell.attack, cell.kappa, cell.n) for cell in kappa] == [("wda", 1, 5), ("wda", 2.5, 5), ("closest", 1, 5)]
    walks = [(cell.options["step_size"], cell.options["steps"]) for cell in steps]
    assert walks == [(None, 3), (None, 7), (0.1, 3), (0.1, 7)]
    assert [(cell.attack, cell.n) for cell in cost] == [("a3", 20), ("a3", 10), ("closest", 20), ("closest", 10)]
    assert {cell.eps for cell in kappa + steps + cost} == {0.125, None}
    balls = {name: {ball for task in sweep.tasks for ball in task.balls} for name, sweep in sweeps.items()}
    one, infinite = (wda.Threat("Linf", 0.125, order) for order in (1, math.inf))
    assert balls == {"kappa": {one}, "steps": {one}, "cost": {infinite}}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"kappas": [1, 0.5]}, "kappas=0.5"),
        ({"kappas": ["two"]}, "kappas='two'"),
        ({"kappas": [math.nan]}, "kappas=nan"),
        ({"kappas": []}, r"kappas=\[\]"),
        ({"kappas": 2}, "kappas=2"),
        ({"kappas": "1, 2"}, "kappas='1, 2'"),
        ({"kappas": [2, "2"]}, "each value once"),
        ({"steps": []}, r"steps=\[\]"),
        ({"steps": [0]}, "steps=0"),
        ({"steps": [2.5]}, "steps=2.5"),
        ({"step_sizes": []}, r"step_sizes=\[\]"),
        ({"step_sizes": [None, 0]}, "step_sizes=0"),
        ({"step_sizes": [True]}, "step_sizes=True"),
        ({"step_sizes": None}, "step_sizes=None"),
        ({"attacks": []}, r"attacks=\[\]"),
        ({"attacks": ["pdg"]}, "'pdg'"),
        ({"attacks": [["pgd"]]}, "'pgd'"),
        ({"ns": []}, r"ns=\[\]"),
        ({"ns": [10, 0]}, "ns=0"),
        ({"ns": [10, 600]}, r"ns=\[10, 600\]"),
        ({"n": 600}, "n=600"),
        ({"eps": -1}, "eps=-1"),
        ({"norm": "L7"}, "norm='L7'"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"device": "cdua"}, "device='cdua'"),
        ({"model": "no-such"}, "no-such"),
        ({"data": "no-such"}, "no-such"),
    ],
)
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError, wda.DataUnavailable), match=said):
        experiment.ablations(**bad)


def test_the_notebook_goes_on_where_it_was_and_refuses_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(NOTEBOOK), "-p", "output", str(tmp_path / "records"), "-p", "n", "4", "-p", "ns", "[3, 4]"]
    words += ["-p", "kappas", "[1, 2]", "-p", "steps", "[2]", "-p", "attacks", "['pgd', 'closest']"]
    assert cli.main([*words, "-o", str(tmp_path / "bad.ipynb"), "-p", "step_sizes", "[0]"]) == 1
    assert "step_sizes=0" in capsys.readouterr().err
    assert not (tmp_path / "records").exists()
    assert cli.main([*words, "-o", str(tmp_path / "out.ipynb"), "-p", "step_sizes", "[None, 0.05]"]) == 0
    ends = [line for line in (tmp_path / "records" / "journal.txt").read_text().splitlines() if " end " in line]
    # "closest" is there for kappa already when its cost on as many samples is asked for
    assert len(ends) == len(list((tmp_path / "records").glob("*.json"))) == 3 + 2 + 3
    said = [o.text for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", []) if "text" in o]
    assert any("cosine" in text for text in said)
