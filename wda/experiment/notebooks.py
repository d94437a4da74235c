"""Notebooks run with parameters, by papermill."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wda.files import check_writable

__all__ = ["check_parameters", "partial", "run_notebook"]


def run_notebook(path: str | os.PathLike[str], out: str | os.PathLike[str], **parameters: Any) -> None:
    """Run a notebook with papermill, refusing a parameter that it does not declare.

    Papermill itself goes on with the defaults where a name is misspelt. What the notebook prints goes to the standard
    error too, so that a long run is seen to move. The notebook runs in the current folder, and imports modules from
    there and from its own.

    Parameters
    ----------
    path, out : path
        The notebook, and where it goes with its outputs once it has run. While it runs, and for good where it fails, it
        is the file that `partial` names, with the error in it; what `out` held before stays.
    **parameters
        Values for the cell tagged ``parameters``.

    Raises
    ------
    TypeError
        A parameter is not declared.
    FileNotFoundError, ValueError
        There is no such notebook, or it is none.
    OSError
        `out` cannot be written.

    Examples
    --------
    >>> run_notebook("notebooks/attack.ipynb", "results/attack.ipynb", n=100)  # doctest: +SKIP
    """
    import papermill

    check_parameters(path, parameters)
    out, unfinished = Path(out), partial(out)
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "this is a folder")
        check_writable(out.parent)
    except OSError as error:
        raise type(error)(error.errno, f"output={str(out)!r}: {error.strerror}") from error
    # at its usual level the kernel warns of its own socket, and tells of its end when it is interrupted
    quiet = ["--log-level=CRITICAL"]
    with _modules_of(Path(path).resolve().parent):
        papermill.execute_notebook(
            str(path), str(unfinished), parameters, log_output=True, stdout_file=sys.stderr, extra_arguments=quiet
        )
    unfinished.replace(out)


@contextlib.contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Let kernels import modules from a folder too, after those from the current one and PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([before, str(folder)] if before else [str(folder)])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def partial(out: str | os.PathLike[str]) -> Path:
    """Where `run_notebook` keeps a notebook that has not run to its end.

    Examples
    --------
    >>> partial("results/mine.ipynb").name
    'mine.partial.ipynb'
    """
    out = Path(out)
    return out.with_name(f"{out.stem}.partial{out.suffix}")


def check_parameters(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise the errors of `run_notebook` that are about the notebook and the names of its parameters.

    Examples
    --------
    >>> check_parameters("notebooks/attack.ipynb", ["n", "eps"])  # doctest: +SKIP
    """
    import papermill
    from nbformat.reader import NotJSONError

    if not Path(path).is_file():
        raise FileNotFoundError(f"notebook={str(path)!r}: there is no such file")
    try:
        declared = papermill.inspect_notebook(str(path))
    except (NotJSONError, ValueError) as error:
        raise ValueError(f"notebook={str(path)!r} is no notebook: {error}") from error
    for name in names:
        if name not in declared:
            raise TypeError(f"parameter {name!r}: {path} declares {', '.join(declared)}")
