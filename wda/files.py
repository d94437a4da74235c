"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["check_writable", "write_atomically"]


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing, and move it there once it is whole; on any failure leave nothing.

    Folders are made as needed. Where a process dies while it writes, its file beside `path` stays until the next one
    that writes `path` removes it.

    Raises
    ------
    OSError
        The folder cannot be made or written, or the disk is full; the message names it, and says whether what `path`
        held before is still there.

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
        _remove_abandoned(path)
        handle, name = _part(path)
    except OSError as error:
        raise type(error)(error.errno, f"the folder {path.parent} cannot be written: {error.strerror}") from error
    part = _Part(handle, "wb")
    try:
        with io.BufferedWriter(part) as file:
            yield file
            file.flush()
            os.fsync(handle)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else part.failure
        if cause is None:
            raise
        kept = "; what it held before is kept" if path.exists() else ""
        raise OSError(cause.errno, f"{path} cannot be written: {cause.strerror}{kept}") from error


class _Part(io.FileIO):
    """A file that remembers why a write failed: libraries that write to it raise errors of their own instead.

    It does not give away its descriptor, so that they do not write past it.
    """

    failure: OSError | None = None

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


_SUFFIX = ".part"


def _beginning(path: Path) -> str:
    """Of the names of files in which `path` is written; cut, as names must not be too long."""
    return f".{path.name[:50]}."


def _part(path: Path) -> tuple[int, str]:
    """A new file beside `path`, locked as long as it is open, so that others see that it is not abandoned."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_beginning(path), suffix=_SUFFIX)
        _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # taken for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the files in which `path` was being written by processes that have died: nobody holds their locks."""
    beginning = _beginning(path)
    with os.scandir(path.parent) as entries:
        ours = [entry for entry in entries if entry.name.startswith(beginning) and entry.name.endswith(_SUFFIX)]
    for name in [entry.path for entry in ours if entry.is_file(follow_symlinks=False)]:
        with contextlib.suppress(OSError), open(name, "rb") as file:
            if _lock(file.fileno(), wait=False):
                os.unlink(name)


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file; False where another process has, or the system or the disk knows no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


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


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
