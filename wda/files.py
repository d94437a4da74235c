"""Writing files so that nobody ever sees half of one, and reading them so that damage is named.

What the package stores, as JSON, arrays or tensors, carries a stamp: the version of the schema, and a checksum of the
contents. The checksum tells of damage, not of malice: who edits a file can compute it anew. Files from before there
were stamps have none, and are read all the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch

from wda.archives import read_npz

__all__ = [
    "check_regular",
    "check_writable",
    "digest",
    "naming",
    "read_arrays",
    "read_json",
    "stamped",
    "unstamped",
    "workplace",
    "write_arrays",
    "write_atomically",
    "write_json",
]

SCHEMA = 1  # of what is stored; files from before there were schemas state none


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


def check_regular(path: str | os.PathLike[str]) -> None:
    """Nothing, where a path leads to a regular file. It is not opened: to open a pipe is to wait for its other end.

    Raises
    ------
    FileNotFoundError
        There is nothing of that name.
    ValueError
        It is a folder, a pipe, a device, or a link that leads nowhere.

    Examples
    --------
    >>> check_regular("/")
    Traceback (most recent call last):
        ...
    ValueError: '/' is a folder: a file is accepted
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            raise ValueError(f"{str(path)!r} is a link that leads nowhere: {error.strerror}") from error
        raise
    if not stat.S_ISREG(mode):
        raise ValueError(f"{str(path)!r} is a {'folder' if stat.S_ISDIR(mode) else 'special file'}: a file is accepted")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], kind: str, argument: str = "path") -> Iterator[None]:
    """Within it the contents of a file are read and checked: whatever is wrong with them, the error names the file.

    Parameters
    ----------
    path : path
    kind : str
        What the file should be.
    argument : str
        By which the caller was given the path.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        In the place of any other error.

    Examples
    --------
    >>> with naming("/", "record"):
    ...     print("not reached")
    Traceback (most recent call last):
        ...
    ValueError: path='/' is no record, or damaged: '/' is a folder: a file is accepted
    """
    try:
        check_regular(path)
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{argument}={str(path)!r} is no {kind}, or damaged: {why}") from error


def digest(content: object) -> str:
    """The SHA-256 checksum of numbers, text, arrays and tensors, and of lists and mappings of these.

    Examples
    --------
    >>> digest({"a": 1, "b": [2.0, None]}) == digest({"b": (2.0, None), "a": 1}) != digest({"a": 1, "b": [2, None]})
    True
    """
    checksum = hashlib.sha256()
    for part in _parts(content):
        checksum.update(part)
    return checksum.hexdigest()


def _parts(content: object) -> Iterator[bytes]:
    """Bytes that differ wherever contents do: each value with its kind, and its size or quotation marks."""
    if isinstance(content, Mapping):
        yield f"mapping {len(content)} ".encode()
        for key in sorted(content, key=repr):
            yield from _parts(key)
            yield from _parts(content[key])
    elif isinstance(content, list | tuple):
        yield f"list {len(content)} ".encode()
        for value in content:
            yield from _parts(value)
    elif isinstance(content, torch.Tensor):
        yield f"tensor {tuple(content.shape)} {content.dtype} ".encode()
        yield content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(content, np.ndarray):
        yield f"array {content.shape} {content.dtype.str} ".encode()
        yield content.tobytes()
    else:
        yield f"{type(content).__name__} {content!r} ".encode()


def stamped(content: Mapping[str, Any]) -> dict[str, Any]:
    """Contents with the version of the schema and the checksum.

    Examples
    --------
    >>> sorted(stamped({"a": 1}))
    ['a', 'checksum', 'schema']
    """
    whole = {**content, "schema": SCHEMA}
    return {**whole, "checksum": digest(whole)}


def unstamped(content: Mapping[str, Any]) -> dict[str, Any]:
    """What was `stamped`, checked; contents without any stamp as they are.

    Raises
    ------
    ValueError
        The contents have another checksum than they state, a schema that is unknown here, or half a stamp.

    Examples
    --------
    >>> unstamped(stamped({"a": 1})), unstamped({"a": 1})
    ({'a': 1}, {'a': 1})
    >>> unstamped({**stamped({"a": 1}), "a": 2})
    Traceback (most recent call last):
        ...
    ValueError: its checksum is that of other contents
    """
    held = dict(content)
    if held.keys().isdisjoint({"schema", "checksum"}):
        return held
    stated = held.pop("checksum")
    if held["schema"] != SCHEMA:
        raise ValueError(f"schema={held['schema']!r}: {SCHEMA} is accepted, or none")
    if digest(held) != stated:
        raise ValueError("its checksum is that of other contents")
    del held["schema"]
    return held


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, stamped and atomically.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(f"{folder}/a.json", {"a": [1, 0.5]})
    ...     read_json(f"{folder}/a.json")
    {'a': [1, 0.5]}
    """
    plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read
    with write_atomically(path) as file:
        file.write(json.dumps(stamped(plain), indent=1).encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_json` wrote, or a mapping in JSON without a stamp; to be read `naming` the path.

    Raises
    ------
    ValueError, RecursionError
        It is none, or has a key twice, a number that is not finite, or another checksum than it states.

    Examples
    --------
    >>> read_json("results/one.json")  # doctest: +SKIP
    """
    check_regular(path)
    text = Path(path).read_text(encoding="utf-8")
    held = json.loads(text, object_pairs_hook=_once_each, parse_constant=_not_finite, parse_float=_finite)
    if not isinstance(held, dict):
        raise ValueError(f"it is a {type(held).__name__}, a mapping is accepted")
    return unstamped(held)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError(f"a key is there twice, among {', '.join(key for key, _ in pairs[:10])}")
    return held


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, finite numbers are accepted")


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], save: Callable[..., None] = np.savez
) -> None:
    """Write arrays to one ``.npz`` file, stamped and atomically.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_arrays(f"{folder}/a.npz", {"x": np.arange(3)})
    ...     read_arrays(f"{folder}/a.npz", ["x"])
    {'x': array([0, 1, 2])}
    """
    with write_atomically(path) as file:
        save(file, **stamped({name: np.asarray(array) for name, array in arrays.items()}))


def read_arrays(path: str | os.PathLike[str], names: Iterable[str]) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote, or such a file without a stamp; to be read `naming` the path. No code is executed.

    Parameters
    ----------
    path : path
    names : of the arrays, all of which must be there, and no other

    Raises
    ------
    Exception
        It is no such file, or damaged; readers of archives raise many kinds of errors.

    Examples
    --------
    >>> read_arrays("adv.npz", ["x", "labels"])  # doctest: +SKIP
    """
    check_regular(path)
    held: dict[str, Any] = dict(read_npz(path))
    held |= {name: held[name].item() for name in ("schema", "checksum") if name in held}
    arrays = unstamped(held)
    if differ := set(names) ^ arrays.keys():
        raise ValueError(f"the arrays {', '.join(sorted(names))} are accepted, all and no other: {sorted(differ)}")
    return arrays
