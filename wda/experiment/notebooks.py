"""Notebooks run with parameters, by papermill."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wda.files import check_writable

__all__ = ["check_parameters", "partial", "run_notebook"]

_PYTHON = "wda"  # under this name papermill finds how values are written and declarations are read here


def run_notebook(path: str | os.PathLike[str], out: str | os.PathLike[str], **parameters: Any) -> None:
    """Run a notebook with papermill, refusing a parameter that it does not declare.

    Papermill itself goes on with the defaults where a name is misspelt. What the notebook prints goes to the standard
    error too, so that a long run is seen to move. The notebook runs in the current folder, and imports modules from
    there and from its own. One in Python is run by the interpreter that runs this, whichever kernel it names; one in
    another language by the kernel it names.

    Parameters
    ----------
    path, out : path
        The notebook, and where it goes with its outputs once it has run. While it runs, and for good where it fails, it
        is the file that `partial` names, with the error in it; what `out` held before stays.
    **parameters
        Values for the cell tagged ``parameters``: None, True, False, numbers, text, and lists, tuples and dictionaries
        of these.

    Raises
    ------
    TypeError
        A parameter is not declared, or its value is of another kind.
    FileNotFoundError, ValueError
        There is no such notebook, or it is none; there is no kernel for its language; or `out` is the notebook itself.
    OSError
        `out` cannot be written.

    Examples
    --------
    >>> run_notebook("notebooks/attack.ipynb", "results/attack.ipynb", n=100)  # doctest: +SKIP
    """
    import papermill

    language, kernel = _checked(path, parameters)
    out, unfinished = Path(out), partial(out)
    for file in (out, unfinished):
        if file.exists() and file.samefile(path):
            raise ValueError(f"output={str(out)!r}: {file} is the notebook itself; another file is accepted")
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "this is a folder")
        check_writable(out.parent)
    except OSError as error:
        raise type(error)(error.errno, f"output={str(out)!r}: {error.strerror}") from error
    _teach_papermill()
    own = {"kernel_manager_class": _here()} if language == _PYTHON else {}
    # at its usual level the kernel warns of its own socket, and tells of its end when it is interrupted
    quiet = ["--log-level=CRITICAL"] if own else []
    with _modules_of(Path(path).resolve().parent):
        papermill.execute_notebook(
            _verbatim(path),
            _verbatim(unfinished),
            parameters,
            kernel_name=kernel,
            language=language,
            log_output=True,
            stdout_file=sys.stderr,
            extra_arguments=quiet,
            **own,
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


def check_parameters(path: str | os.PathLike[str], parameters: Mapping[str, Any] | Iterable[str]) -> None:
    """Raise the errors of `run_notebook` that are about the notebook and its parameters, or the names of these.

    Examples
    --------
    >>> check_parameters("notebooks/attack.ipynb", ["n", "eps"])  # doctest: +SKIP
    """
    _checked(path, parameters)


def _checked(path: str | os.PathLike[str], parameters: Mapping[str, Any] | Iterable[str]) -> tuple[str, str]:
    """The language for papermill and the kernel, for a notebook that takes these parameters."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"notebook={str(path)!r}: there is no such file")
    notebook = _read(path)
    language, kernel = _language(path, notebook)
    declared = _declared(path, notebook, language)
    for name in parameters:
        if name not in declared:
            raise TypeError(
                f"parameter {name!r}: {path} declares {', '.join(declared) or 'none, in a cell tagged parameters'}"
            )
    if isinstance(parameters, Mapping):
        for name, value in parameters.items():
            _literal(value, name)
    return language, kernel


def _read(path: str | os.PathLike[str]) -> Any:
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            _ = cell.cell_type, cell.source, cell.metadata.get("tags", ())
        _ = notebook.metadata.get("kernelspec", {}).get("name"), notebook.metadata.get("language_info", {}).get("name")
    except OSError:
        raise
    except Exception as error:  # whatever its reader stumbles over
        reason = str(error).partition("\n")[0]
        raise ValueError(f"notebook={str(path)!r} is no notebook: {reason}") from error
    return notebook


def _language(path: str | os.PathLike[str], notebook: Any) -> tuple[str, str]:
    """A notebook that names no language is in Python; the kernel of another must be one that Jupyter knows."""
    from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager

    spec, info = notebook.metadata.get("kernelspec", {}), notebook.metadata.get("language_info", {})
    language = spec.get("language") or info.get("name") or "python"
    if language.lower() in ("python", "ipython"):
        return _PYTHON, NATIVE_KERNEL_NAME
    kernels = KernelSpecManager().find_kernel_specs()
    if spec.get("name") not in kernels:
        raise ValueError(
            f"notebook={str(path)!r}: its language is {language!r}, its kernel {spec.get('name')!r} is not here; "
            f"Python is accepted, and the kernels {', '.join(sorted(kernels))}"
        )
    return language, spec["name"]


def _here() -> type:
    """Kernels of the interpreter that runs this, whatever else is called "python3" on Jupyter's path."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class Here(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)

    return Here


def _declared(path: str | os.PathLike[str], notebook: Any, language: str) -> list[str]:
    """The names that the first cell tagged ``parameters`` gives a value to."""
    import papermill
    from papermill.exceptions import PapermillException

    if language != _PYTHON:
        try:
            return list(papermill.inspect_notebook(_verbatim(path)))
        except PapermillException:  # it knows no parameters in that language
            return []
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    try:
        return _assigned(tagged[0].source) if tagged else []
    except SyntaxError as error:
        raise ValueError(
            f"notebook={str(path)!r}: its cell of parameters is no Python: {error.msg}, line {error.lineno}"
        ) from error


def _teach_papermill() -> None:
    """Papermill writes a tuple, or a key that is a number, as text, and reads declarations line by line."""
    from papermill.models import Parameter
    from papermill.translators import PythonTranslator, papermill_translators

    class Literals(PythonTranslator):  # type: ignore[misc]
        @classmethod
        def translate(cls, val: Any) -> str:
            return _literal(val)

        @classmethod
        def inspect(cls, parameters_cell: Any) -> list[Any]:
            return [Parameter(name, "None", "", "") for name in _assigned(parameters_cell.source)]

    papermill_translators.register(_PYTHON, Literals)


def _assigned(source: str) -> list[str]:
    """The variables that a cell assigns to, or annotates, at its top level."""
    from IPython.core.inputtransformer2 import TransformerManager

    names: dict[str, None] = {}
    for statement in ast.parse(TransformerManager().transform_cell(source)).body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        parts = [node for target in targets for node in ast.walk(target)]
        names |= {node.id: None for node in parts if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return list(names)


def _literal(value: object, name: str = "") -> str:
    """The expression that gives `value` again."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            expression = repr(kind(value))
            return f"float({expression!r})" if expression in ("inf", "-inf", "nan") else expression
    if value is None:
        return "None"
    if isinstance(value, list):
        return f"[{', '.join(_literal(item, name) for item in value)}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_literal(item, name)}, ' for item in value)})"
    if isinstance(value, dict) and not any(isinstance(key, tuple) for key in value):
        return f"{{{', '.join(f'{_literal(key, name)}: {_literal(item, name)}' for key, item in value.items())}}}"
    raise TypeError(
        f"parameter {name!r}: {value!r} is of type {type(value).__name__}; None, True, False, numbers, text, and "
        "lists, tuples and dictionaries of these are accepted"
    )


def _verbatim(path: str | os.PathLike[str]) -> str:
    """A path that papermill, which fills in what stands in braces, takes as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")
