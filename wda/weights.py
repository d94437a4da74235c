"""Files of weights and of arrays: recognised, checked, bounded, and read without executing code."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wda.errors import DataUnavailable
from wda.files import write_atomically

__all__ = ["check", "check_archive", "harmless", "read", "read_arrays", "state_dict", "write_checksum"]

_scalar: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]

# What published checkpoints hold beside tensors: settings and single numbers. None of it can do anything.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")

# An archive may unpack to this many bytes, or to so many times its own size: what is measured or trained does not
# shrink further, what is made to fill the memory does.
_UNPACKED = 2**28
_SHRINKS = 100


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


def check_archive(path: str | os.PathLike[str]) -> None:
    """Nothing, where a zip archive is whole, of a usual kind, and unpacks to a size in proportion to its own.

    The archive that `torch.save` and `numpy.savez` write ends in a directory, with a size and a checksum for each part.

    Raises
    ------
    ValueError
        It is not; the message names the file and the part.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/a.npz", x=np.zeros(3))
    ...     check_archive(f"{folder}/a.npz")
    """
    size = Path(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            refused = _refused(archive, size)
            damaged = refused or archive.testzip()
    except Exception as error:  # whatever the reader of a damaged archive stumbles over
        raise ValueError(f"{path} is cut short or damaged, at {size} bytes: {error}") from error
    if refused:
        raise ValueError(f"{path} {refused}")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged!r} is wrong")


def _refused(archive: zipfile.ZipFile, size: int) -> str | None:
    """Why an archive of so many bytes is not unpacked."""
    parts = archive.infolist()
    for part in parts:
        if part.flag_bits & 1 or part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return f"is encrypted or packed in another way, at its part {part.filename!r}"
        if b"PK\1\2" in part.extra + part.comment:  # a wrong length there hides the parts that follow
            return f"is damaged: the entry of its part {part.filename!r} swallows others"
    unpacked = sum(part.file_size for part in parts)
    if unpacked > max(_UNPACKED, _SHRINKS * size):
        return (
            f"is an archive of {size} bytes that unpacks to {unpacked}: at most {_UNPACKED}, or {_SHRINKS} times its "
            "own size, are accepted"
        )
    return None


def read_arrays(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.npz`` file, or those of `names` that it has.

    An array's stated shape must be the size that the archive states, and every checksum must be right: NumPy by itself
    reserves whatever a header asks for, and stops before the checksum.

    Raises
    ------
    ValueError
        The file is none, is damaged, unpacks out of proportion, or holds something other than arrays of plain values.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/a.npz", x=np.zeros(3), y=np.arange(3))
    ...     read_arrays(f"{folder}/a.npz", ["y", "z"])
    {'y': array([0, 1, 2])}
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file of numbers, or cut short")
    check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            held = {part.filename.removesuffix(".npy"): part for part in archive.infolist()}
            wanted = held if names is None else [name for name in names if name in held]
            return {name: _array(archive, held[name]) for name in wanted}
    except Exception as error:  # whatever NumPy's reader of headers stumbles over
        raise ValueError(f"{path} is no .npz file of numbers: {error}") from error


def _array(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(part) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"{part.filename} is of the version {version} of the format: 1.0 and 2.0 are accepted")
        shape, _, dtype = header(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != part.file_size - file.tell():
            raise ValueError(
                f"{part.filename} is {dtype} of shape {shape} in {part.file_size - file.tell()} bytes: plain values, "
                "as many as fit, are needed"
            )
    with archive.open(part) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # at its end the part's checksum is compared
    return array.astype(array.dtype.newbyteorder("="), copy=False)


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
    arrays = read_arrays(path)
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
