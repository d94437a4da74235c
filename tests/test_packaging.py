"""The wheel, away from the checkout; and the lock against pyproject.toml."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()

USE = """
import pathlib, socket, sys
def refuse(*args, **kwargs): raise AssertionError("the package asks for the network")
socket.create_connection = socket.socket.connect = refuse
import wda
assert pathlib.Path(wda.__file__).is_relative_to(sys.prefix), wda.__file__
x, y = wda.data.load("digits", n=16)
model = wda.models.load("digits-mlp")
threat = wda.Threat(norm="Linf", eps=0.1)
adv = wda.attack("wda", model, x, y, threat, kappa=2, steps=3, probe_steps=2)
adv.audit(threat)
clean = wda.AdversarialDistribution.from_points(x, x, y, threat).accuracy(model)
assert adv.accuracy(model) <= clean, (adv.accuracy(model), clean)
"""


def run(*command: object, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    [built] = folder.glob("*.whl")
    return built


def test_wheel_carries_the_package_the_bundled_models_and_the_published_tables(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "wda").rglob("*.py")}
    models = {path.name for path in (ROOT / "data" / "models").iterdir() if path.is_file()}
    assert modules | {"wda/py.typed"} <= names
    assert any(name.endswith(".safetensors") for name in models)
    assert {f"wda/_bundled/{name}" for name in models} <= names
    assert {f"wda/_published/{path.name}" for path in (ROOT / "data" / "published").glob("*.csv")} <= names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"wda", f"wda-{PROJECT['version']}.dist-info"}
    assert not {name for name in names if "__pycache__" in name}


def test_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are this environment's, through a .pth file: Python does not read the .pth files of a
    # folder added that way, so the editable install of the checkout stays out of reach.
    [site] = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(python, "-c", USE, cwd=tmp_path)
    run(tmp_path / "venv" / "bin" / "wda", "--help", cwd=tmp_path)


def test_lock_satisfies_every_requirement() -> None:
    pinned: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK, flags=re.MULTILINE):
        pinned.setdefault(canonicalize_name(name), []).append(version)
    asked = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name == PROJECT["name"]:  # an extra that includes another
            continue
        assert name in pinned, f"{requirement} is not in requirements.lock: run 'make lock'"
        outside = [version for version in pinned[name] if not requirement.specifier.contains(version)]
        assert not outside, f"{requirement}, but requirements.lock has {outside}"


def test_lock_names_no_index() -> None:
    """It must install from whatever index the reader uses."""
    address = re.compile(r"://|^\s*-(i\b|-[\w-]*(index|links|host))")
    assert not [line for line in LOCK.splitlines() if address.search(line)]
