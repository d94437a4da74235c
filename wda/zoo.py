"""RobustBench's models by name, from files: the only module that touches RobustBench.

A model is named ``robustbench:DATA/THREAT/ID``, as in ``robustbench:cifar10/Linf/Carmon2019Unlabeled``, and its weights
are the file ``robustbench/DATA/THREAT/ID.pt`` under ``WDA_DATA``, where RobustBench itself would put it. RobustBench
downloads what is missing; here that happens in `fetch` only, and every file is checked before RobustBench reads it.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from wda import weights
from wda.data import data_folder
from wda.errors import DataUnavailable
from wda.files import workplace

__all__ = ["PREFIX", "fetch", "load", "package", "parts", "published", "tables", "weight_files"]

PREFIX = "robustbench:"


def load(name: str) -> nn.Module:
    """A model of RobustBench in evaluation mode, on the CPU; it takes inputs in [0, 1] and normalises them itself.

    Parameters
    ----------
    name : str
        ``robustbench:DATA/THREAT/ID``, with the names that RobustBench uses.

    Raises
    ------
    DataUnavailable
        The weights or RobustBench are not here; the message names the file and the command that fetches it.
    ValueError
        There is no such model, with those of a like name; or its file is a web page, cut short, damaged, of another
        network, or would run code.

    Examples
    --------
    >>> load("robustbench:cifar10/Linf")
    Traceback (most recent call last):
    ...
    ValueError: model='robustbench:cifar10/Linf': 'robustbench:DATA/THREAT/ID' is accepted, as in \
'robustbench:cifar10/Linf/Carmon2019Unlabeled'
    """
    model = _known(name)
    with _named(name):
        held = [weights.read(path) for path in model.files()]
    with _quiet(), weights.harmless():
        try:
            net: nn.Module = importlib.import_module("robustbench.utils").load_model(
                model.id, model_dir=_root(name), dataset=model.dataset, threat_model=model.threat
            )
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise _misfit(model, str(error)) from error
    if len(held) == 1 and (random := _not_from(held[0], net)):
        raise _misfit(model, f"it has nothing for {', '.join(random[:3])}" + ", ..." * (len(random) > 3))
    return net.eval()


def fetch(name: str) -> list[Path]:
    """Download a model's weights to ``WDA_DATA``, check them, and only then put them in place.

    Beside each file a ``.sha256`` is written, against which `load` checks it from then on. Files that are there already
    are checked and kept.

    Returns
    -------
    list of Path
        The files; several for an ensemble.

    Raises
    ------
    DataUnavailable
        ``WDA_DATA`` is not set, or the download failed.
    ValueError
        See `load`; or the file that came is none of weights.
    OSError
        The folder cannot be written.

    Examples
    --------
    >>> fetch("robustbench:cifar10/Linf/Carmon2019Unlabeled")  # doctest: +SKIP
    [PosixPath('/data/robustbench/cifar10/Linf/Carmon2019Unlabeled.pt')]
    """
    model = _known(name)
    for path, source in zip(model.files(), model.sources, strict=True):
        if path.is_file():
            with _named(name):
                weights.check(path)
        else:
            _download(model, source, path)
    return model.files()


def published() -> list[str]:
    """The names of the models in the two papers' tables, each once: 18 rows of the first, five of the second.

    Examples
    --------
    >>> names = published()
    >>> len(names), names[0]
    (21, 'robustbench:cifar10/Linf/Bartoldson2024Adversarial_WRN-94-16')
    """
    names: dict[str, None] = {}
    for table in ("wda_table1.csv", "wdat_table1_pretrained.csv"):
        with (tables() / table).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                names[f"{PREFIX}{row['dataset']}/{row['norm']}/{row['robustbench_id']}"] = None
    return list(names)


def weight_files(name: str) -> list[Path]:
    """Those files of a model's weights that are under ``WDA_DATA``, without a look at RobustBench or into them.

    Examples
    --------
    >>> weight_files("robustbench:cifar10/Linf/no_such_model")
    []
    """
    folder = data_folder()
    if folder is None:
        return []
    path = folder / "robustbench" / f"{'/'.join(parts(name))}.pt"
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}_m?.pt"))


def package() -> ModuleType:
    """RobustBench, imported.

    It asks for the module ``autoattack``, which its requirement pyautoattack installs as ``pyautoattack``; so this
    answers to both names. Its import warns about packages of its own, which is no news about results.

    Raises
    ------
    DataUnavailable
        RobustBench is not installed, or does not import.

    Examples
    --------
    >>> package().__name__
    'robustbench'
    """
    try:
        if "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None:
            for module in ("autoattack", "autoattack.state"):
                sys.modules[module] = importlib.import_module(f"py{module}")
        with _quiet():
            return importlib.import_module("robustbench")
    except ImportError as error:
        raise DataUnavailable(f"RobustBench's models need its package: pip install 'wda[zoo]' ({error})") from error


@dataclass(frozen=True)
class _Model:
    """A model that RobustBench knows, and where each of its files is from."""

    name: str
    dataset: str
    threat: str
    id: str
    sources: tuple[str, ...]

    def files(self) -> list[Path]:
        path = _root(self.name) / self.dataset / self.threat / f"{self.id}.pt"
        if len(self.sources) == 1:
            return [path]
        return [path.with_name(f"{path.name}_m{part}.pt") for part in range(len(self.sources))]


def parts(name: str) -> list[str]:
    """Data set, threat and id of a model's name.

    Raises
    ------
    ValueError
        It is no name of that form.

    Examples
    --------
    >>> parts("robustbench:cifar10/Linf/Carmon2019Unlabeled")
    ['cifar10', 'Linf', 'Carmon2019Unlabeled']
    """
    found = name.removeprefix(PREFIX).split("/")
    if not name.startswith(PREFIX) or len(found) != 3 or not all(found) or ".." in found:
        raise ValueError(
            f"model={name!r}: '{PREFIX}DATA/THREAT/ID' is accepted, as in '{PREFIX}cifar10/Linf/Carmon2019Unlabeled'"
        )
    return found


def _known(name: str) -> _Model:
    dataset, threat, identifier = parts(name)
    every = _index()
    source = every.get(f"{dataset}/{threat}/{identifier}")
    if source is None:
        near = difflib.get_close_matches(f"{dataset}/{threat}/{identifier}", every, n=4)
        raise ValueError(
            f"model={name!r}: RobustBench has no such model; "
            + (
                f"near are {', '.join(PREFIX + other for other in near)}"
                if near
                else "see its list of models for those it has"
            )
        )
    if not all(source):
        raise ValueError(
            f"model={name!r}: RobustBench takes this model from another package, not from a file of weights; "
            "give it as 'module:function'"
        )
    return _Model(name, dataset, threat, identifier, source)


def _index() -> dict[str, tuple[str, ...]]:
    """The models by DATA/THREAT/ID, with the Google Drive ids of their files."""
    package()
    timm = importlib.import_module("timm")
    models: dict[Any, Any] = importlib.import_module("robustbench.model_zoo").model_dicts
    index = {}
    for dataset, threats in models.items():
        for threat, entries in threats.items():
            for identifier, entry in entries.items():
                source = entry["gdrive_id"]
                if timm.is_model(f"{identifier}_{dataset.value}_{threat.value}".lower().replace("-", "_")):
                    source = None  # load_model takes these from timm, which downloads them
                several = source if isinstance(source, list) else [source]
                index[f"{dataset.value}/{threat.value}/{identifier}"] = tuple(several)
    return index


def _root(name: str) -> Path:
    folder = data_folder()
    if folder is None:
        raise DataUnavailable(
            f"model={name!r}: set the variable WDA_DATA to a folder; its weights are looked for there, as "
            f"robustbench/{'/'.join(parts(name))}.pt, and `wda fetch {name}` fetches them"
        )
    return folder / "robustbench"


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors about a file say which model it is for, and how to get it."""
    try:
        yield
    except DataUnavailable as error:
        raise DataUnavailable(f"model={name!r}: {error}; `wda fetch {name}` fetches them") from error
    except ValueError as error:
        raise ValueError(f"model={name!r}: {error}; remove the file, and `wda fetch {name}` fetches it anew") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _misfit(model: _Model, reason: str) -> ValueError:
    files = ", ".join(map(str, model.files()))
    shortened = reason if len(reason) < 400 else f"{reason[:400]} ..."
    return ValueError(
        f"model={model.name!r}: {files} does not fit its architecture, and is of another network: {shortened}"
    )


def _not_from(held: dict[str, Any], net: nn.Module) -> list[str]:
    """The names of what the network did not get from the file.

    Where a checkpoint lacks the normalisation, RobustBench loads it with ``strict=False``; then whatever else does not
    fit stays at random, and nobody is told. The constants of the normalisation are the constructor's own.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for tensor in _tensors(held):
        by_shape.setdefault(tuple(tensor.shape), []).append(tensor)

    def found(own: Tensor) -> bool:
        return any(torch.equal(own, tensor.to(own.dtype)) for tensor in by_shape.get(tuple(own.shape), ()))

    constants = {"mu", "sigma", "mean", "std"}
    return [
        name
        for name, own in net.state_dict().items()
        if own.is_floating_point() and name.rpartition(".")[2] not in constants and not found(own)
    ]


def _tensors(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)


def _download(model: _Model, source: str, path: Path) -> None:
    with workplace(path.parent) as folder:
        part = folder / path.name
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module("robustbench.utils").download_gdrive_new(source, part)
        except Exception as error:  # of requests, gdown or urllib3: all mean that it did not come
            raise DataUnavailable(
                f"model={model.name!r}: it cannot be fetched from Google Drive, id {source}: "
                f"{type(error).__name__}: {error}; on a machine that can, run `wda fetch {model.name}`, or save the "
                f"file https://drive.google.com/uc?id={source} as {path}"
            ) from error
        try:
            weights.read(part)
        except (DataUnavailable, ValueError) as error:
            raise DataUnavailable(
                f"model={model.name!r}: what came from Google Drive, id {source}, is refused and not kept: {error}"
            ) from error
        weights.write_checksum(path, of=part)
        os.replace(part, path)


def tables() -> Path:
    """The folder of the papers' tables: inside an installed package, or in the checkout.

    Examples
    --------
    >>> (tables() / "wda_table1.csv").is_file()
    True
    """
    inside = Path(__file__).parent / "_published"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "data" / "published"
