"""Files of weights and of arrays: recognised, checked, bounded, and read without executing code."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wda.archives import check_archive, read_npz
from wda.errors import DataUnavailable
from wda.files import write_atomically

__all__ = ["check", "harmless", "read", "state_dict", "write_checksum"]

_scalar: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]

# What published checkpoints hold beside tensors: settings and single numbers. None of it can do anything.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


def check(path: str | os.PathLike[str]) -> None:
    """Nothing, where a file can be one of weights and is whole; its contents are not read yet.

    Where a file ``NAME.sha256`` lies beside ``NAME``, as sha256sum writes it, the checksum must be the one it states.

    Raises
    ------
    DataUnavailable
        There is no such file.
    ValueError
        The file is empty, a web page, cut short or damaged.

    Examples
    --------
    >>> from wda import models
    >>> check(models.bundled() / "digits-mlp.safetensors")
    """
    path = Path(path)
    if not path.is_file():
        raise DataUnavailable(f"the weights {path} are not there")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty")
    if start.lstrip().lower().startswith(_PAGE):
        raise ValueError(
            f"{path} is a web page of {path.stat().st_size} bytes, saved in the place of weights: a download was "
            "refused, or asked for a confirmation"
        )
    stated = _checksum_file(path)
    if stated.is_file():
        known = stated.read_text(encoding="utf-8", errors="replace").lower()
        if not known.startswith(digest := _sha256(path)):
            raise ValueError(
                f"{path} has the SHA-256 checksum {digest}, and {stated.name} beside it states another one: "
                "the file is damaged, or not the one that was fetched"
            )
    if start.startswith(b"PK"):
        check_archive(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of weights holds, on the CPU; no code in it is executed.

    Parameters
    ----------
    path : path
        ``.npz`` and ``.safetensors`` hold tensors by name. Any other file is taken to be `torch.save`'s: tensors,
        numbers, text, and lists and dictionaries of these.

    Raises
    ------
    DataUnavailable
        There is no such file, or the package to read it is missing.
    ValueError
        What `check` refuses; a file that would run code; or one that is none of these formats.

    Examples
    --------
    >>> from wda import models
    >>> sorted(read(models.bundled() / "digits-mlp.safetensors"))[:2]
    ['1.bias', '1.weight']
    """
    path = Path(path)
    check(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    held = readers.get(path.suffix, _read_torch)(path)
    if not isinstance(held, Mapping) or not held:
        about = type(held).__name__ if held else "nothing"
        raise ValueError(f"{path} holds {about}: tensors by name are needed")
    _check_names(path, held)
    return dict(held)


def state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by their names in a module, out of a training checkpoint too.

    The entry ``state_dict`` is taken where there is one, and the prefix ``module.`` of parallel training is removed.

    Raises
    ------
    DataUnavailable, ValueError
        See `read`; or something other than tensors by name.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "net.pt")
    ...     torch.save({"epoch": 3, "state_dict": {"module.weight": torch.ones(2)}}, path)
    ...     state_dict(path)
    {'weight': tensor([1., 1.])}
    """
    held = read(path)
    inside = held.get("state_dict", held)
    if not isinstance(inside, Mapping) or not all(isinstance(value, Tensor) for value in inside.values()):
        raise ValueError(f"{path} holds more than tensors by name, and no such entry 'state_dict'")
    _check_names(path, inside)
    shared = "module." if all(name.startswith("module.") for name in inside) else ""
    return {name.removeprefix(shared): value for name, value in inside.items()}


def write_checksum(path: str | os.PathLike[str], of: str | os.PathLike[str] | None = None) -> Path:
    """The file ``NAME.sha256`` beside `path`, against which `check` holds it from then on.

    Parameters
    ----------
    path : path
    of : path, optional
        Where the contents are as yet; by default `path` itself.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "net.pt")
    ...     _ = path.write_bytes(b"weights")
    ...     write_checksum(path).read_text()[:8]
    '9a129038'
    """
    stated = _checksum_file(Path(path))
    with write_atomically(stated) as file:
        file.write(f"{_sha256(Path(of or path))}  {Path(path).name}\n".encode())
    return stated


def harmless() -> torch.serialization.safe_globals:
    """Within it, `torch.load` without code takes what published checkpoints hold beside tensors.

    Examples
    --------
    >>> with harmless():
    ...     len(torch.serialization.get_safe_globals()) > 0
    True
    """
    return torch.serialization.safe_globals(_HARMLESS)


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_names(path: str | os.PathLike[str], held: Mapping[Any, Any]) -> None:
    for name in held:
        if not isinstance(name, str):
            raise ValueError(f"{path} holds the key {name!r}: tensors by name are needed, and a name is text")


def _read_npz(path: Path) -> dict[str, Tensor]:
    arrays = read_npz(path)
    try:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no .npz file of numbers: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise DataUnavailable(f"{path.name} needs the package safetensors: pip install 'wda[data]'") from error
    try:
        return dict(load_file(path))
    except Exception as error:  # whatever its reader stumbles over
        raise ValueError(f"{path} is no .safetensors file, or cut short: {error}") from error


def _read_torch(path: Path) -> object:
    try:
        with harmless(), warnings.catch_warnings(action="ignore"):
            # a memory map reads what is used; the format before torch 1.6 has none
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever its reader stumbles over
        why = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = (why[1] if why else str(error)) or "torch cannot read it"
        if code := re.search(r"(?:GLOBAL|function|class) ([\w.]+\.\w+)", reason):
            raise ValueError(
                f"{path} holds more than tensors: {code[1]}; loading that would run code, and is refused. "
                "Where its source is trusted, load it elsewhere and save its state_dict()"
            ) from error
        raise ValueError(f"{path} is no file of weights, or cut short: {reason}") from error
