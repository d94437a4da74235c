"""`wda doctor`: what it sees, what it holds to be wrong, and that it would see the numerics fail."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wda import DataUnavailable, cli, doctor, models, weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """WDA_DATA, empty."""
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    return tmp_path


def state(findings: list[doctor.Finding], name: str) -> str:
    [finding] = [finding for finding in findings if finding.name == name]
    return finding.state


def test_all_is_well_without_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WDA_DATA", raising=False)
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    sections = [line for line in told.splitlines()[:-1] if not line.startswith(" ")]
    assert sections == ["versions", "devices", "data", "models", "notebooks", "numerics"]
    for name in ("torch", "digits", "cpu", "WDA_DATA", "imagenet", *models.available()):
        assert f" {name} " in told
    assert told.count("missing robustbench:") == 21
    assert told.splitlines()[-1].startswith("nothing wrong, ")


def test_what_is_there_is_looked_into(folder: Path) -> None:
    (folder / "data").mkdir()
    np.savez(folder / "data" / "mine_test_first2.npz", x=np.zeros((2, 3)), y=[0, 1])
    np.savez(folder / "data" / "odd_test.npz", z=np.zeros(3))
    (folder / "data" / "cifar10_test.npz").write_text("<html>")
    place = folder / "robustbench" / "cifar10" / "Linf"
    place.mkdir(parents=True)
    (place / "Wang2023Better_WRN-28-10.pt").write_text("<!DOCTYPE html>")
    torch.save({"w": torch.ones(3)}, place / "Mine2024.pt")
    weights.write_checksum(place / "Mine2024.pt")
    findings = [*doctor._data(), *doctor._models()]
    assert state(findings, "WDA_DATA") == "ok"
    assert state(findings, "mine") == "ok"
    assert state(findings, "odd") == "WRONG"
    assert state(findings, "cifar10") == "WRONG"
    assert state(findings, "mnist") == "missing"
    assert state(findings, "robustbench:cifar10/Linf/Wang2023Better_WRN-28-10") == "WRONG"
    assert state(findings, "robustbench:cifar10/L2/Wang2023Better_WRN-28-10") == "missing"
    assert state(findings, "robustbench:cifar10/Linf/Mine2024") == "ok"
    torch.save({"w": torch.zeros(3)}, place / "Mine2024.pt")
    assert state(list(doctor._models()), "robustbench:cifar10/Linf/Mine2024") == "WRONG"


def test_something_wrong_is_the_exit_status(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_versions", lambda: iter(()))  # not again
    monkeypatch.setenv("WDA_DATA", str(folder / "nowhere"))
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert f"WRONG   WDA_DATA               {folder}/nowhere is no folder" in told
    assert told.splitlines()[-1].startswith("1 wrong, ")


def test_packages_are_held_to_the_versions_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch<2.13,>=2.10",
        "scipy<1",
        'no-such-package>=3; extra == "zoo"',
        'wda[zoo]; extra == "book"',
        "nor-this",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: asked)
    findings = {finding.name: finding for finding in doctor._versions()}
    assert findings["torch"].state == "ok"
    assert findings["scipy"].state == "WRONG"
    assert findings["scipy"].detail.endswith("; <1 is needed")
    assert findings["no-such-package"] == doctor.Finding(
        "versions", "no-such-package", "missing", "pip install 'wda[zoo]'"
    )
    assert findings["nor-this"] == doctor.Finding("versions", "nor-this", "WRONG", "pip install 'nor-this'")


def notebook(path: Path, *sources: str) -> Path:
    cells = [{"cell_type": "code", "metadata": {}, "source": source.splitlines(keepends=True)} for source in sources]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": "import x"}, *cells]}))
    return path


def test_a_notebook_needs_what_it_imports_and_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDA_DATA", raising=False)
    parameters = 'data = "digits"\nmodels = ["digits-mlp", "digits-cnn"]\nn = 3\nnorms = tuple()'
    path = notebook(tmp_path / "a.ipynb", parameters, "%matplotlib inline\nimport wda\nfrom matplotlib import pyplot")
    assert doctor._notebook_told(path) == "can run; its defaults need digits, digits-mlp, digits-cnn"
    with pytest.raises(DataUnavailable, match=r"needs nosuchpackage: pip install 'wda\[notebooks\]'"):
        doctor._notebook_told(notebook(path, parameters, "import nosuchpackage.part"))
    with pytest.raises(DataUnavailable, match="model='resnet'"):
        doctor._notebook_told(notebook(path, 'model = "resnet"'))
    for declared in ('data = "mnist"', 'data: "str | None" = "mnist"', 'data = other = "mnist"'):
        with pytest.raises(DataUnavailable, match="data='mnist'"):
            doctor._notebook_told(notebook(path, declared))


@pytest.mark.parametrize("cell", ["%%bash\nls -l | head", "%matplotlib inline\n!ls", "n = (7\n % 3)", "%%html\n<b>"])
def test_a_cell_that_is_not_all_python_is_no_fault(cell: str, tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", 'data = "digits"', cell)
    assert doctor._notebook_told(path) == "can run; its defaults need digits"


@pytest.mark.parametrize("seed", range(2))
def test_the_numerics_agree_with_the_closed_form(seed: int) -> None:
    apart = doctor.numerics(seed=seed)
    assert apart.keys() == {"attack", "certificate", "budget"}
    assert max(apart.values()) < 1e-5


def test_numerics_that_are_off_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("wda.certificates.radius")
    right = module.radius
    monkeypatch.setattr(module, "radius", lambda *a, **k: right(*a, **k) * (1 + 1e-3))
    assert doctor.numerics()["certificate"] == pytest.approx(1e-3, rel=0.1)
    assert doctor._found("numerics", "cpu", lambda: doctor._numerics_told("cpu")).state == "WRONG"
    monkeypatch.setattr(doctor, "robust_accuracy", lambda *_: torch.tensor(0.5))
    assert doctor.numerics()["budget"] > 1e-3
