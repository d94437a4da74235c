"""`wda run`: which parameters a notebook has, which interpreter runs it, and what it may write to."""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wda import cli, data
from wda.experiment import notebooks

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PYTHON = {"name": "python3", "language": "python", "display_name": "Python 3"}


def notebook(path: Path, parameters: str | None, body: str = "pass", kernel: object = PYTHON) -> Path:
    cells = [nbformat.v4.new_code_cell(body)]
    if parameters is not None:
        cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel} if kernel else {}), path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(
        output.text for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    )


# -- parameters ------------------------------------------------------------------------------------------------------

DECLARATIONS = {
    's = "a=b"': "s",
    "u: 'None | str' = None": "u",
    "n = 3  # type: int": "n",
    "eps: float": "eps",
    "norms = [\n    'L1',\n    'L2',\n]": "norms",
    "share = (7\n % 3)": "share",
    "a, (b, *c) = 1, (2, 3)": "a b c",
    "x = y = -1": "x y",
    "%matplotlib inline\nn = 3": "n",
    "files = !ls": "files",
    "text = '''\nfake = 1\n'''": "text",
    "if True:\n    inner = 1\nouter = 2": "outer",
    "d['k'] = 1; o.a = 2; i = [j for j in 'ab']": "i",
    "größe = 1": "größe",
    "": "",
    "# n = 3": "",
}


@pytest.mark.parametrize("source", DECLARATIONS)
def test_a_cell_declares_what_it_assigns(source: str, tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", source)
    names = DECLARATIONS[source].split()
    notebooks.check_parameters(path, names)
    with pytest.raises(TypeError, match=f"declares {', '.join(names) or 'none'}"):
        notebooks.check_parameters(path, [*names, "other"])


def test_without_a_cell_of_parameters_none_is_declared(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"parameter 'n': .* declares none, in a cell tagged parameters"):
        notebooks.check_parameters(notebook(tmp_path / "a.ipynb", None), ["n"])
    with pytest.raises(ValueError, match=r"a.ipynb': its cell of parameters is no Python: .*, line 2"):
        notebooks.check_parameters(notebook(tmp_path / "a.ipynb", "n = 1\nm = ("), [])


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.booleans() | st.integers() | st.text()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner)  # type: ignore[arg-type]
    ),
    max_leaves=8,
)


@given(values)
def test_a_value_reaches_the_notebook_as_it_is(value: object) -> None:
    there = eval(notebooks._literal(value), {"__builtins__": {"float": float}})
    assert there == value
    assert repr(there) == repr(value)


@given(st.text())
def test_any_text_is_a_value(text: str) -> None:
    value = cli._value(text)
    assert value == text or value == ast.literal_eval(text)


@pytest.mark.parametrize("text", ["{[]: 1}", "(" * 5000, "1is", "'\\d"])
def test_what_python_stumbles_over_is_text(text: str) -> None:
    assert cli._value(text) == text


@pytest.mark.parametrize("value", [{1, 2}, b"a", 1j, ..., {(1, 2): 3}, [[object]]])
def test_a_value_that_a_notebook_cannot_keep_is_named(value: object, tmp_path: Path) -> None:
    path = notebook(tmp_path / "a.ipynb", "n = 1")
    with pytest.raises(TypeError, match=r"parameter 'n': .* is of type \w+; None, True"):
        notebooks.run_notebook(path, tmp_path / "out.ipynb", n=value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ipynb"]


# -- the interpreter -------------------------------------------------------------------------------------------------


def kernel(folder: Path, name: str, **spec: Any) -> None:
    """A kernel on Jupyter's path that does not start."""
    (folder / "kernels" / name).mkdir(parents=True)
    argv = [str(folder / "no-such-python"), "{connection_file}"]
    (folder / "kernels" / name / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, **spec}))


@pytest.mark.parametrize("asked", [PYTHON, None, {**PYTHON, "name": "somebody's"}])
def test_a_notebook_runs_by_the_interpreter_that_runs_the_command(
    asked: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel(tmp_path, "python3", language="python")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    shows = "import sys; print([sys.executable, s, u, t])"
    path = notebook(tmp_path / "{a}.ipynb", "s = 'a=b'\nu: 'None | str' = None\nt = 0", shows, asked)
    out = tmp_path / "{o}.ipynb"
    words = ["run", str(path), "-o", str(out), "-p", "s", "c=d", "-p", "u", '"', "-p", "t", "(-1e999,)"]
    assert cli.main(words) == 0, capsys.readouterr().err
    told = eval(printed(out), {"inf": float("inf")})
    assert told == [sys.executable, "c=d", '"', (-float("inf"),)]
    assert "unknown parameter" not in capsys.readouterr().err


def test_a_kernel_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = notebook(tmp_path / "a.ipynb", None, kernel={"name": "ir", "language": "R", "display_name": "R"})
    assert cli.main(["run", str(path), "-o", str(tmp_path / "out.ipynb")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"wda run: notebook='{path}': its language is 'R', its kernel 'ir' is not here; Python")
    assert said.count("\n") == 1


def test_a_kernel_of_another_language_may_have_no_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(tmp_path, "of-lines", language="lines")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    asked = {"name": "of-lines", "language": "lines", "display_name": "Lines"}
    path = notebook(tmp_path / "a.ipynb", "n = 1", kernel=asked)
    notebooks.check_parameters(path, [])
    with pytest.raises(TypeError, match=r"parameter 'n': .* declares none"):
        notebooks.check_parameters(path, ["n"])


def test_a_kernel_that_dies_is_told_of_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = notebook(tmp_path / "a.ipynb", None, "import os; os._exit(1)")
    assert cli.main(["run", str(path), "-o", str(tmp_path / "out.ipynb")]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"wda run: Kernel died\nThe notebook as far as it ran: {tmp_path / 'out.partial.ipynb'}\n")


ODD = ["[]", "{}", "3", "hello", '{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', "\udcff",
       '{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
       '{"cells": [], "metadata": {"kernelspec": 3}, "nbformat": 4, "nbformat_minor": 5}',
       '{"cells": [], "metadata": {}, "nbformat": 99, "nbformat_minor": 5}', "[" * 10000]  # fmt: skip


@pytest.mark.parametrize("content", ODD)
def test_what_is_no_notebook_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"notebook='{path}' is no notebook: ."):
        notebooks.run_notebook(path, tmp_path / "out.ipynb")


# -- the output ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["same", "relative", "symlink", "hard link", "default", "partial"])
def test_a_notebook_is_never_replaced_by_its_own_output(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    path = notebook(tmp_path / "results" / ("a.partial.ipynb" if way == "partial" else "a.ipynb"), None)
    before, link = path.read_bytes(), tmp_path / "link.ipynb"
    monkeypatch.chdir(tmp_path)
    if way == "symlink":
        link.symlink_to(path)
    elif way == "hard link":
        os.link(path, link)
    outputs = {"same": str(path), "relative": "results/../results/a.ipynb", "partial": "results/a.ipynb"}
    words = [] if way == "default" else ["-o", outputs.get(way, "link.ipynb")]
    assert cli.main(["run", str(path), *words]) == 2
    assert "is the notebook itself; another file is accepted" in capsys.readouterr().err
    assert path.read_bytes() == before


# -- what is not installed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "lacking", "said"),
    [
        (["run", "a.ipynb"], "papermill", "pip install 'wda[notebooks]'"),
        (["run", "a.ipynb"], "fcntl", "Linux and macOS have"),
        (["table", "table1"], "fcntl", "Linux and macOS have"),
        (["sweep", "table1"], "fcntl", "Linux and macOS have"),
    ],
)
def test_what_is_lacking_is_told_with_what_helps(
    words: list[str],
    lacking: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    imported = builtins.__import__

    def fails(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == lacking:
            raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)
        return imported(name, *rest, **options)

    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.startswith(("wda.experiment", "papermill"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("wda.experiment", raising=False)
    monkeypatch.setattr(builtins, "__import__", fails)
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"wda {words[0]}: ")
    assert said in told
    assert ("pip" in told) == (lacking != "fcntl")


# -- data of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("own_model", ["-p", "attacks", "['fgsm']", "-p", "radii", "['1/50']", "-p", "certify", "none"]),
        ("bracket", ["-p", "method", "linear"]),
    ],
)
def test_a_file_of_few_samples_is_taken_whole_by_default(
    name: str, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = data.load("digits", n=6)
    np.savez(tmp_path / "mine.npz", x=x.numpy(), y=y.numpy())
    monkeypatch.chdir(tmp_path)
    words = [
        "run",
        str(NOTEBOOKS / f"{name}.ipynb"),
        "-o",
        "out.ipynb",
        "-p",
        "data",
        "mine.npz",
        "-p",
        "output",
        "kept",
    ]
    assert cli.main([*words, "-p", "output", "kept", *quick]) == 0, capsys.readouterr().err
    assert "6 samples" in printed(tmp_path / "out.ipynb")
