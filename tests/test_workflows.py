"""The workflow files: what they run is there, and what they publish is what `make book` writes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(path.read_text())
    return content


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def events(workflow: dict[Any, Any]) -> dict[str, Any]:
    of: dict[str, Any] = workflow[True]  # YAML 1.1 takes the key `on` for a truth value
    return of


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_runs_only_what_is_here(path: Path) -> None:
    workflow = read(path)
    own = 0
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1")), "an official action, by version"
        command = step.get("run", "")
        if command.startswith("make "):
            words = ["make", "--dry-run", "--question", *command.split()[1:]]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
            assert "No rule to make target" not in done.stderr, done.stderr
            own += 1
        if command.startswith("."):
            assert shutil.which(str(ROOT / command)), f"{command} cannot be run"
            own += 1
    assert own == 1


def test_the_book_is_published_from_where_make_writes_it() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "book.yml")
    assert events(workflow) == {"release": {"types": ["published"]}, "workflow_dispatch": None}
    [upload] = [step for step in steps(workflow) if step.get("uses", "").startswith("actions/upload-pages-artifact@")]
    recipe = re.search(r"^book:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe
    build = [line.split() for line in recipe[1].splitlines() if "jupyter-book build" in line]
    [words] = build
    assert words[-1] == "."
    assert not any(word.startswith("--path-output") for word in words)
    assert upload["with"] == {"path": "_build/html"}  # Jupyter Book's own place, in the folder that it builds
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    assert publish["needs"] == "build"
    assert "permissions" not in workflow, "only the job that publishes may write"


def test_every_push_is_checked() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    assert "push" in events(workflow)
    assert steps(workflow)[-1] == {"run": ".ci/run"}
