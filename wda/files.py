"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["check_writable", "workplace", "write_atomically"]


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing, and move it there once it is whole; on any failure leave nothing.

    Folders are made as needed.

    Raises
    ------
    OSError
        The folder cannot be made or written, or the disk is full; the message names it.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_atomically(Path(folder) / "new" / "file.txt") as file:
    ...         _ = file.write(b"whole")
    ...     (Path(folder) / "new" / "file.txt").read_bytes()
    b'whole'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise type(error)(error.errno, f"the folder {path.parent} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
        raise


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise the `OSError` of `write_atomically` where a file in that folder would.

    Examples
    --------
    >>> check_writable(tempfile.gettempdir())
    """
    probe = Path(folder) / ".writable"
    with write_atomically(probe) as file:
        file.write(b"")
    probe.unlink(missing_ok=True)


@contextlib.contextmanager
def workplace(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder inside `folder` for work in progress, gone afterwards; so is what was made for it and is still empty.

    Raises
    ------
    OSError
        The folder cannot be made or written; the message names it.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with workplace(Path(folder) / "new") as part:
    ...         _ = (part / "file.txt").write_text("half")
    ...     (Path(folder) / "new").exists()
    False
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-")
        except OSError as error:
            raise type(error)(error.errno, f"the folder {folder} cannot be written: {error.strerror}") from error
        with part as name:
            yield Path(name)
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
