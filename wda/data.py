"""Data sets by name: scikit-learn's digits offline, files under ``WDA_DATA``, or any ``.npz`` of one's own.

Under ``WDA_DATA`` the folder ``data`` has files of arrays, and ``torchvision`` what torchvision's readers read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wda import vision
from wda.archives import read_npz
from wda.checks import choice, whole
from wda.errors import DataUnavailable

__all__ = ["count", "data_folder", "fetch", "find", "load"]

_TEST_EVERY = 3
_CHANNELS = (1, 3, 4)
_WHOLE = 2**24  # beyond it single precision leaves whole numbers out


def load(name: str | os.PathLike[str] = "digits", split: str = "test", n: int | None = None) -> tuple[Tensor, Tensor]:
    """A labelled sample, on the CPU.

    Parameters
    ----------
    name : str or path
        "digits": the 1,797 images of scikit-learn, 8 by 8 (needs scikit-learn; no network). Every third one is a
        test image, 599 in all.
        Otherwise a path that ends in ``.npz``, or the name of a data set in the folder ``data`` of ``WDA_DATA``:
        "mnist" finds ``mnist_test.npz``, or ``mnist_test_firstN.npz``, which holds the first N images of the split.
        Such a file has arrays `x` and `y`. Bytes are images (N, H, W), (N, H, W, C) or (N, C, H, W), with 1, 3 or 4
        channels C, and are divided by 255; bytes where either axis could be that of channels are refused. Other numbers
        are taken as they are. Where there is no file of the whole split, "cifar10", "cifar100",
        "mnist" and "imagenet" are also found in the folder ``torchvision``, see `wda.vision.load`.
    split : {"test", "train"}
        Ignored for a path.
    n : int, optional
        Only the first n samples; by default all.

    Returns
    -------
    x : float32 Tensor, shape (N, ...)
        Images are (N, C, H, W), in [0, 1].
    y : int64 Tensor, shape (N,)

    Raises
    ------
    DataUnavailable
        The file is not there; the message says where it is looked for.
    ValueError
        A bad argument; a file that is damaged or without x and y; an x or y of other values, or whose shape leaves the
        meaning open; files that torchvision refuses; or fewer than n samples.

    Examples
    --------
    >>> x, y = load("digits", n=10)
    >>> x.shape, y[:3]
    (torch.Size([10, 1, 8, 8]), tensor([0, 3, 6]))
    """
    name = _named(name)
    choice("split", split, ("test", "train"))
    if n is not None:
        n = whole("n", n)
    if name == "digits":
        x, y = _digits(split)
    elif (place := find(name, split)).is_dir():
        x, y = vision.load(name, split, n, place)
    else:
        x, y = _from_file(place)
    if n is not None and n > len(x):
        raise ValueError(f"n={n!r}: {name!r} holds {len(x)} {split} samples here")
    return x[:n], y[:n]


def count(name: str | os.PathLike[str] = "digits", split: str = "test") -> int:
    """How many samples `load` would give; images are not read for that.

    Examples
    --------
    >>> count("digits")
    599
    """
    name = _named(name)
    choice("split", split, ("test", "train"))
    if name == "digits":
        return len(_digits(split)[1])
    place = find(name, split)
    return vision.count(name, split, place) if place.is_dir() else len(_arrays(place, ("y",))["y"])


def find(name: str | os.PathLike[str], split: str = "test") -> Path:
    """Where a data set other than the digits is: a file of arrays, or the folder of torchvision's files.

    The whole split comes before its beginning, and of several beginnings the longest counts.

    Raises
    ------
    DataUnavailable
        It is not there; the message says where it is looked for.

    Examples
    --------
    >>> find("nowhere.npz")
    Traceback (most recent call last):
    ...
    wda.errors.DataUnavailable: data='nowhere.npz': there is no such file
    """
    name = _named(name)
    if name.endswith(".npz"):
        if not Path(name).is_file():
            raise DataUnavailable(f"data={name!r}: there is no such file")
        return Path(name)
    if Path(name).suffix and Path(name).is_file():
        raise ValueError(
            f"data={name!r}: a path that ends in .npz is accepted, with arrays x and y, as numpy.savez(path, x=x, y=y) "
            "writes it"
        )
    fetched = f", or `wda fetch {name}`" if name in vision.NAMES else ""
    folder = data_folder()
    if folder is None:
        raise DataUnavailable(
            f"data={name!r}: 'digits' and paths that end in .npz need nothing else; for others set the variable "
            f"WDA_DATA to a folder that holds data/{name}_{split}.npz (arrays x and y){fetched}"
        )
    exact = folder / "data" / f"{name}_{split}.npz"
    if exact.is_file():
        return exact
    if name in vision.NAMES and (fetched_to := vision.folder_of(name, folder / "torchvision")).is_dir():
        return fetched_to
    first = re.compile(rf"{re.escape(name)}_{split}_first(\d+)\.npz")
    prefixes = {int(m[1]): file for file in folder.glob("data/*.npz") if (m := first.fullmatch(file.name))}
    if not prefixes:
        raise DataUnavailable(
            f"data={name!r}: neither {exact} nor {exact.stem}_firstN.npz beside it is there; "
            f"put one there (arrays x and y){fetched}"
        )
    return prefixes[max(prefixes)]


def fetch(name: str) -> Path:
    """Download a data set to the folder ``torchvision`` of ``WDA_DATA``, where `load` finds it.

    Raises
    ------
    DataUnavailable
        ``WDA_DATA`` is not set, or the download failed.
    ValueError
        There is no such data set to fetch, or torchvision refuses the files that are there.
    OSError
        The folder cannot be written.

    Examples
    --------
    >>> fetch("mnist")  # doctest: +SKIP
    PosixPath('/data/torchvision/MNIST')
    """
    if name not in vision.NAMES:
        raise ValueError(
            f"data={name!r}: {', '.join(vision.NAMES)} can be fetched, and models as 'robustbench:DATA/THREAT/ID'"
        )
    folder = data_folder()
    if folder is None:
        raise DataUnavailable(f"data={name!r}: set the variable WDA_DATA to the folder that it is to be fetched to")
    return vision.fetch(name, folder / "torchvision")


def data_folder() -> Path | None:
    """The folder that ``WDA_DATA`` names, or None where the variable is not set.

    Examples
    --------
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, WDA_DATA="/mnt/data"):
    ...     data_folder().name
    'data'
    """
    value = os.environ.get("WDA_DATA")
    return Path(value) if value else None


def _digits(split: str) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataUnavailable("the digits come with scikit-learn: pip install 'wda[data]'") from error
    images, labels = load_digits(return_X_y=True)
    test = np.arange(len(labels)) % _TEST_EVERY == 0
    rows = test if split == "test" else ~test
    x = torch.tensor(images[rows] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x, torch.tensor(labels[rows], dtype=torch.int64)


def _named(name: object) -> str:
    if not isinstance(name, str | os.PathLike) or not isinstance(os.fspath(name), str):
        raise TypeError(f"data={name!r}: a name, or a path that ends in .npz, is accepted")
    return os.fspath(name)


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    try:
        found = read_npz(path, names)
    except ValueError as error:
        raise ValueError(f"data={str(path)!r} is no .npz file with arrays x and y of numbers: {error}") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"data={str(path)!r} has no array {' and no array '.join(missing)}: x and y are needed")
    return found


def _from_file(path: Path) -> tuple[Tensor, Tensor]:
    x, y = _arrays(path, ("x", "y")).values()
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"data={str(path)!r}: x is of shape {x.shape}; at least one sample, (N, ...), is needed")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.max() > np.iinfo(np.int64).max:
        about = f" up to {y.max()}" if y.dtype.kind in "iu" and y.size else ""
        raise ValueError(
            f"data={str(path)!r}: y is {y.shape} {y.dtype}{about} for x of shape {x.shape}; one integer for each, "
            "of 64 bits with its sign, is needed"
        )
    try:
        x = _pixels(x) if x.dtype == np.uint8 else _numbers(x)
    except ValueError as error:
        raise ValueError(f"data={str(path)!r}: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))


def _numbers(x: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers as they are, in single precision, which holds floating-point numbers to 1e38 and whole ones to 2^24."""
    if x.dtype.kind not in "fbiu":
        raise ValueError(f"x is of type {x.dtype}; numbers are needed, floating-point or whole")
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    beyond = np.isinf(single) & np.isfinite(x) if x.dtype.kind == "f" else (x < -_WHOLE) | (x > _WHOLE)
    if beyond.any():
        raise ValueError(f"x has the value {x[beyond][0]!s}, which single precision cannot hold")
    return single


def _pixels(x: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images of bytes, channels first, in [0, 1]."""
    first, last = (x.ndim == 4 and x.shape[axis] in _CHANNELS for axis in (1, 3))
    if first and last:
        raise ValueError(
            f"x of bytes is of shape {x.shape}, and may be (N, C, H, W) or (N, H, W, C); store it as x / 255 in "
            "floating point, channels first"
        )
    if x.ndim != 3 and not first and not last:
        raise ValueError(
            f"x of bytes is {x.shape}; images (N, H, W), (N, H, W, C) or (N, C, H, W) are needed, with 1, 3 or 4 "
            "channels C"
        )
    x = x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1) if last else x
    return x.astype(np.float32) / np.float32(255)
