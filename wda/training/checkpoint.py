"""The state of a run in a file: whole or not there, of one run only, and read without executing code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wda import files
from wda.files import naming, stamped, unstamped, write_atomically
from wda.weights import read

__all__ = ["digest", "restore", "store"]

_FORMAT = "wda.training 1"
_OTHERWISE = "remove it, or name another file"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 checksum of tensors, with their names, shapes and dtypes.

    Examples
    --------
    >>> digest({"x": torch.zeros(2)}) == digest({"x": torch.zeros(2)}) != digest({"x": torch.zeros(3)})
    True
    """
    checksum = hashlib.sha256()
    for name, tensor in tensors.items():
        checksum.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        checksum.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def store(path: str | os.PathLike[str], run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a run, together with what tells it from others.

    Raises
    ------
    OSError
        The folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store(folder + "/a.pt", {"seed": 0}, {"epoch": 3})
    ...     restore(folder + "/a.pt", {"seed": 0})
    {'epoch': 3}
    """
    with write_atomically(path) as file:
        torch.save(stamped({"format": _FORMAT, "run": dict(run), "state": dict(state)}), file)


def restore(path: str | os.PathLike[str], run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that `store` wrote, None where there is no such file.

    The checksum in the file tells of damage, not of malice; files from before there were checksums are read too.

    Raises
    ------
    ValueError
        The file is no checkpoint, damaged, or one of another run; the message says what differs.

    Examples
    --------
    >>> restore("nowhere.pt", {"seed": 0}) is None
    True
    """
    if not os.path.lexists(path):
        return None
    with naming(path, f"checkpoint of wda.training.finetune ({_OTHERWISE})", "checkpoint"):
        held = unstamped(read(path))
        if held.keys() != {"format", "run", "state"} or held["format"] != _FORMAT:
            raise ValueError(f"it holds {', '.join(map(repr, held))}: format, run and state are accepted")
        for name in ("run", "state"):
            if not isinstance(held[name], dict):
                raise ValueError(f"{name} is a {type(held[name]).__name__}: a mapping is accepted")
    for what in {**run, **held["run"]}:
        before, value = held["run"].get(what), run.get(what)
        same = files.digest(before) == files.digest(value)
        if not same and what in ("model", "train", "validation", "test"):
            raise ValueError(f"checkpoint={str(path)!r} is of a run with another {what}: {_OTHERWISE}")
        if not same:
            raise ValueError(
                f"checkpoint={str(path)!r} is of a run with {what}={before!r}, this one has {value!r}: "
                f"go on with the former, {_OTHERWISE}"
            )
    return dict(held["state"])
