"""Cells of an experiment: one attack on one model within one ball, on all samples or a shard of them."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from wda import __version__
from wda.attacks import attack, check_kappa, distances, kind, options
from wda.checks import choice, whole
from wda.experiment.inputs import Inputs, agree, load_inputs
from wda.experiment.records import (
    Record,
    file_name,
    load,
    name_mark,
    outcome,
    provenance,
    samples,
    save,
    within,
)
from wda.files import check_writable
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["Cell", "finished", "run", "run_cell"]


@dataclass(frozen=True)
class Cell:
    """What one record is a record of. Everything but names of data and models is checked when a cell is made.

    Parameters
    ----------
    data, model : str
        Names for `wda.data.load` and `wda.models.load`.
    norm, eps, order
        The ball, see `wda.Threat`; the box is [0, 1]. An attack that looks for nearest errors has neither `eps` nor
        `order`: its distances serve every ball, see `wda.experiment.within`.
    attack : str
        From `wda.attacks.available`.
    kappa : float
    options : mapping
        Those of the attack that are not to have their defaults.
    n : int, optional
        Only the first n samples; by default all.
    shard, shards : int
        Run the `shard`-th of so many consecutive parts of the sample, counted from 0. Samples that an attack treats
        one by one have the same result in any part; an attack that couples them has one shard.
    seed, batch_size : int
    dtype : {"float32", "float64"}
    device : str

    Raises
    ------
    ValueError, TypeError
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> Cell(attack="pgd", eps="1/8", order=2, options={"steps": 40}, shard=2, shards=3).name
    'digits_digits-mlp_Linf_0.125_W2_pgd-steps=40_k1_nall_s0_float64_3of3'
    >>> Cell(attack="wpgd", eps="1/8", order=2, shards=3)
    Traceback (most recent call last):
        ...
    ValueError: shards=3: attack 'wpgd' moves samples together, so 1 is accepted; pgd, say, takes more
    """

    data: str = "digits"
    model: str = "digits-mlp"
    norm: str = "Linf"
    eps: float | str | None = None
    order: float | str | None = None
    attack: str = "closest"
    kappa: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    n: int | None = None
    shard: int = 0
    shards: int = 1
    seed: int = 0
    batch_size: int = 256
    dtype: str = "float64"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("data", "model", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r}: a name is accepted")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options={self.options!r}: options of {self.attack!r} by their names are accepted")
        of = kind(self.attack)
        for name in self.options:
            choice(f"options of {self.attack!r}", name, options(self.attack))
        self._set("kappa", check_kappa(self.kappa, 1.0))
        if of == "nearest":
            if self.eps is not None or self.order is not None:
                raise ValueError(f"eps={self.eps!r}, order={self.order!r}: {self.attack!r} takes None, it serves all")
            Threat(self.norm)
        else:
            self._set_ball()
        if self.kappa > 1 and of in ("nearest", "budgeted"):
            raise ValueError(f"kappa={self.kappa!r}: attack {self.attack!r} spends the budget in its own way, only 1")
        if self.n is not None:
            self._set("n", whole("n", self.n))
        self._set("shards", whole("shards", self.shards, 1, self.n))
        self._set("shard", whole("shard", self.shard, 0, self.shards - 1))
        if self.shards > 1 and self.couples:
            raise ValueError(
                f"shards={self.shards}: attack {self.attack!r} moves samples together, so 1 is accepted; pgd, say, "
                "takes more"
            )
        self._set("seed", whole("seed", self.seed, 0, 2**64 - 1))
        self._set("batch_size", whole("batch_size", self.batch_size))
        choice("dtype", self.dtype, ("float32", "float64"))

    def _set_ball(self) -> None:
        if self.eps is None or self.order is None:
            raise ValueError(f"eps={self.eps!r}, order={self.order!r}: attack {self.attack!r} needs both")
        threat = Threat(self.norm, self.eps, self.order)
        if threat.order == 1 and kind(self.attack) == "budgeted":
            raise ValueError(f"order={self.order!r}: attack {self.attack!r} needs an order above 1")
        check_kappa(self.kappa, threat.order)
        self._set("eps", threat.eps)
        self._set("order", str(threat.order))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def couples(self) -> bool:
        """Whether the result of a sample depends on the others."""
        return kind(self.attack) in ("together", "budgeted")

    @property
    def name(self) -> str:
        """The stem of the record's file: it differs wherever a result could."""
        own = {f"{key}_sha256": name_mark(getattr(self, key)) for key in ("data", "model")}
        return file_name({**asdict(self), **own})[: -len(".json")]

    def split(self, shards: int) -> list[Cell]:
        """The cells of so many shards.

        Examples
        --------
        >>> [cell.shard for cell in Cell(attack="closest").split(3)]
        [0, 1, 2]
        """
        return [replace(self, shard=shard, shards=shards) for shard in range(whole("shards", shards))]


@dataclass(frozen=True, eq=False)
class _Setting:
    """What cells of one data set and one model share: loaded once, on the device, with the logits at the samples."""

    x: Tensor
    y: Tensor
    net: nn.Module
    clean: Tensor
    first: int
    about: Mapping[str, Any]  # parameters of the record

    @classmethod
    def of(cls, cell: Cell) -> _Setting:
        x, y, net, sums = load_inputs(cell.data, cell.model, cell.n, cell.dtype, cell.device)
        whole("shards", cell.shards, 1, len(x))
        about = {key: getattr(cell, key) for key in ("data", "model", "norm", "seed", "batch_size", "dtype", "device")}
        about |= {"n": len(x), "shard": cell.shard, "shards": cell.shards, **sums}
        first, last = (len(x) * k // cell.shards for k in (cell.shard, cell.shard + 1))
        x, y = x[first:last], y[first:last]
        return cls(x, y, net, _logits(net, x, cell.batch_size), first, about)


def _logits(net: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """The logits at x, on the CPU."""
    with Oracle(net, batch_size) as oracle:
        parts = oracle.in_batches(lambda rows: oracle.logits(oracle.to_model(x[rows])).cpu(), slice(0, len(x)))
    return torch.cat(parts)


def _measure(cell: Cell, at: _Setting) -> Record:
    """Run the attack, audit what it found, and evaluate it afresh."""
    common: dict[str, Any] = {"seed": cell.seed, "batch_size": cell.batch_size, **cell.options}
    if kind(cell.attack) == "nearest":
        found = distances(at.net, at.x, at.y, cell.norm, method=cell.attack, **common)
        points, distance, counts = found.x_adv, found.distance, found.counts
    else:
        threat = Threat(cell.norm, cell.eps, cell.order)  # type: ignore[arg-type]  # both are there, see Cell
        adv = attack(cell.attack, at.net, at.x, at.y, threat, kappa=cell.kappa, **common)
        adv.audit()
        points, counts = adv.x_adv, adv.counts
        distance = torch.zeros(len(at.x), dtype=torch.float64).index_copy(0, adv.moved_source, adv.distances())
    rows = samples(at.clean, _logits(at.net, points, cell.batch_size), at.y, distance, at.first)
    parameters = {**at.about, "eps": cell.eps, "order": cell.order, "attack": cell.attack, "kappa": cell.kappa}
    parameters |= {"options": {**options(cell.attack), **cell.options}}
    passes = {key: round(getattr(counts, key), 8) for key in ("forward", "backward", "vanished", "checks")}
    passes["seconds"] = counts.seconds
    record = {"parameters": parameters, **outcome(parameters, rows), "passes": passes, "samples": rows}
    # the batch that fitted, where memory was short a smaller one than the parameter
    return {**record, "provenance": {**provenance(cell.device), "batch": counts.batch}}


def run_cell(cell: Cell, folder: str | os.PathLike[str], *, again: bool = False) -> Record:
    """Run a cell and write its record, whole or not at all; one that is finished is only read.

    Names can come to stand for other weights or other data: a record of what they stood for before is an error. Where
    these are not at hand any more, the record is what there is.

    A second process that is given the same cell waits for the first. Every start and every end is a line in the file
    ``journal.txt`` of the folder.

    Parameters
    ----------
    cell : Cell
    folder : path
        Of the records, made if needed.
    again : bool
        Run it even so, and replace the record.

    Raises
    ------
    ValueError, TypeError, DataUnavailable, OSError
        The message names the argument, its value and what is accepted, or the record that is of another model.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record = run_cell(Cell(attack="closest", n=10), folder)
    ...     again = run_cell(Cell(attack="closest", n=10), folder)
    >>> again == record, len(record["samples"]["distance"])
    (True, 10)
    """
    folder = Path(folder)
    check_writable(folder / ".locks")
    with _alone(folder / ".locks" / cell.name):
        if not again and (done := finished(cell, folder)):
            return done
        _note(folder, "start", cell)
        record = _measure(cell, _Setting.of(cell))
        save(record, folder / f"{cell.name}.json")
        _note(folder, "end", cell)
    return record


def finished(cell: Cell, folder: str | os.PathLike[str], at_hand: Inputs | None = None) -> Record | None:
    """The record of a cell, if there is one: whole, of this cell and this version, and of the inputs that are at hand.

    Everything that takes a cell for done asks here.

    Parameters
    ----------
    cell : Cell
    folder : path
    at_hand : Inputs, optional
        For many cells one and the same, so that each model and data set is loaded once.

    Raises
    ------
    ValueError
        There is a file of that name that is none of these; the message names it.

    Examples
    --------
    >>> finished(Cell(attack="closest"), "results") is None
    True
    """
    path = Path(folder) / f"{cell.name}.json"
    if not os.path.lexists(path):
        return None
    record = load(path)
    again = "run it again (again=True, or `wda sweep` with --again), or choose another folder"
    mine = {key: getattr(cell, key) for key in ("data", "model", "shard", "shards")}
    if differ := [key for key, value in mine.items() if record["parameters"].get(key, value) != value]:
        raise ValueError(f"the record {str(path)!r} is of another cell: {', '.join(differ)} differ; {again}")
    if (made := record["provenance"]["wda"]) != __version__:
        raise ValueError(f"{str(path)!r} is a record of version {made} of wda, this is {__version__}: {again}")
    at_hand = Inputs(folder) if at_hand is None else at_hand
    try:
        now = {"data": at_hand.data(cell.data, cell.n), "model": at_hand.model(cell.model)}
        losses = at_hand.losses(cell.data, cell.model, cell.n)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the record {str(path)!r} has inputs that cannot be loaded now: {error}; {again}") from error
    called = {"data": "another data set", "model": "another model"}
    other = [called[key] for key, sha in now.items() if sha not in (None, record["parameters"][f"{key}_sha256"])]
    if losses and not other:
        before = dict(zip(record["samples"]["index"], record["samples"]["clean_loss"], strict=True))
        if not agree([before.get(place) for place in range(len(losses))], losses, record["parameters"]["device"]):
            other = ["another network with the same weights"]
    if other:
        raise ValueError(f"the record {str(path)!r} is of {' and '.join(other)} of these names: {again}")
    return record


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file's lock, which ends with the process however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _note(folder: Path, what: str, cell: Cell) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with (folder / "journal.txt").open("a", encoding="utf-8") as journal:
        journal.write(f"{moment} {what} {cell.name}\n")


def run(
    *,
    data: str = "digits",
    model: str = "digits-mlp",
    norm: str = "Linf",
    eps: float | str = 0.1,
    order: float | str = 1,
    attacks: Sequence[str] = ("fgsm", "pgd", "deepfool", "wda", "wda++", "closest"),
    kappas: Sequence[float] = (1, 1.5, 2, 3, 4),
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float64",
    device: str = "cpu",
    output: str | os.PathLike[str] = "results",
) -> list[dict[str, Any]]:
    """Run attacks on one model and one threat, and write a record of each as soon as it is done.

    Everything is checked, and a file is written to the output folder and removed again, before the first pass.

    Parameters
    ----------
    data, model : str
        Names for `wda.data.load` and `wda.models.load`.
    norm, eps, order
        The threat, see `wda.Threat`; the box is [0, 1].
    attacks : sequence of str
        From `wda.attacks.available`.
    kappas : sequence of float
        Each at least 1; "wda" runs once for each of them, other attacks with kappa 1.
    settings : mapping
        Options of attacks, by their names, where they are not to have their defaults: ``{"pgd": {"steps": 100}}``.
    n : int, optional
        Only the first n samples; by default all.
    seed, batch_size : int
    dtype : {"float32", "float64"}
        Double precision makes results agree between machines; large models want single.
    device : str
        Where the model runs, "cpu" or "cuda".
    output : path
        The folder of the records, made if needed. A record of the same cell is replaced.

        One file is kept for each data set, model, threat, attack, kappa, n, seed and dtype. The names of files and
        functions of one's own are followed by a checksum of what they hold.

    Returns
    -------
    list of dict
        The records.

    Raises
    ------
    ValueError, TypeError, DataUnavailable, OSError
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records = run(n=10, attacks=["fgsm"], output=folder)
    >>> records[0]["parameters"]["attack"], len(records[0]["samples"]["flipped"])
    ('fgsm', 10)
    """
    threat = Threat(norm, eps, order)
    pairs = _cells(attacks, kappas, threat.order)
    chosen = check_settings(attacks, settings)
    shared: dict[str, Any] = {"data": data, "model": model, "norm": norm, "n": n, "seed": seed}
    shared |= {"batch_size": batch_size, "dtype": dtype, "device": device}
    ball: dict[str, Any] = {"eps": threat.eps, "order": threat.order}
    cells = [
        Cell(attack=name, kappa=kappa, options=chosen[name], **shared, **({} if kind(name) == "nearest" else ball))
        for name, kappa in pairs
    ]
    at = _Setting.of(cells[0])
    check_writable(Path(output))
    records = []
    for cell in cells:
        record = _measure(cell, at)
        if cell.eps is None:
            record = within(record, threat)
        save(record, Path(output) / file_name(record["parameters"]))
        records.append(record)
    return records


def _cells(names: Sequence[str], kappas: Sequence[float], order: float) -> list[tuple[str, float]]:
    """The (attack, kappa) pairs to run, each checked."""
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"attacks={names!r}: a list of names is accepted, in a shell -p attacks \"['fgsm']\"")
    if not isinstance(kappas, list | tuple) or not kappas:
        raise ValueError(f'kappas={kappas!r}: a list of numbers >= 1 is accepted, in a shell -p kappas "[1]"')
    for name in names:
        options(name)
    checked = [check_kappa(kappa, 1.0) for kappa in kappas]
    if "wda" in names and math.isinf(order) and checked != [1.0]:
        raise ValueError(f'kappas={kappas!r} with order=inf: [1] is accepted, in a shell -p kappas "[1]"')
    if order == 1 and (joint := [name for name in names if name in ("wfgsm", "wpgd")]):
        raise ValueError(f"attacks={names!r} with order=1: {joint[0]!r} needs an order above 1")
    for name, values in (("attacks", names), ("kappas", checked)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={values!r}: each once is accepted")
    return [(name, kappa) for name in names for kappa in (checked if name == "wda" else [1.0])]


def check_settings(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options given for each attack; an error where there is no such attack or option among them."""
    accepted = "in a shell -p settings \"{'pgd': {'steps': 100}}\""
    if not isinstance(settings, Mapping) or not all(isinstance(given, Mapping) for given in settings.values()):
        raise TypeError(f"settings={settings!r}: options by the names of attacks are accepted, {accepted}")
    for name, given in settings.items():
        choice("settings", name, names)
        for option in given:
            choice(f"settings[{name!r}]", option, options(name))
    return {name: dict(settings.get(name, {})) for name in names}
