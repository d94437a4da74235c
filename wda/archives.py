"""Zip archives, as NumPy and torch write them: whole, of a usual kind, and no larger unpacked than they say."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_archive", "read_npz"]

# An archive may unpack to this many bytes, or to so many times its own size: what is measured or trained does not
# shrink further, what is made to fill the memory does.
_UNPACKED = 2**28
_SHRINKS = 100


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


def read_npz(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
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
    ...     read_npz(f"{folder}/a.npz", ["y", "z"])
    {'y': array([0, 1, 2])}
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file of numbers, or cut short")
    check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            held = {part.filename.removesuffix(".npy"): part for part in archive.infolist()}
            if len(held) < len(archive.infolist()):
                raise ValueError("a part of the archive is there twice")
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
