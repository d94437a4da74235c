"""Sweeps: many cells, defined in one small file, and the tables and figures of their records."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wda.attacks import kind, options
from wda.checks import choice
from wda.experiment.cells import Cell, finished
from wda.experiment.inputs import Inputs
from wda.experiment.records import Record, frame, merge, method, within
from wda.experiment.tables import table
from wda.files import write_atomically
from wda.threat import Threat

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Sweep", "Task", "load_sweep", "results", "shipped", "sweeps", "whole_record", "write_tables"]


@dataclass(frozen=True)
class Task:
    """A cell, and the balls that tables read it in: its own, or all those that a record of nearest errors is to serve.

    Examples
    --------
    >>> Task(Cell(attack="closest"), (Threat("Linf", 0.1), Threat("Linf", 0.1, 2))).cell.attack
    'closest'
    """

    cell: Cell
    balls: tuple[Threat, ...] = ()

    def within(self, record: Record) -> list[Record]:
        """The cell's record, or of nearest errors one for each ball.

        Examples
        --------
        >>> Task(Cell(attack="pgd", eps=0.1, order=1)).within({"parameters": {"eps": 0.1}})
        [{'parameters': {'eps': 0.1}}]
        """
        return [record] if record["parameters"]["eps"] is not None else [within(record, ball) for ball in self.balls]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file defines it.

    Examples
    --------
    >>> sweep = load_sweep("local")
    >>> len(sweep.tasks) >= 40
    True
    """

    name: str
    about: str
    figures: tuple[str, ...]
    tasks: tuple[Task, ...]


def shipped() -> Path:
    """The folder of the workflow's files: inside an installed package, or in the checkout.

    Examples
    --------
    >>> (shipped() / "sweep.smk").is_file()
    True
    """
    inside = Path(__file__).parents[1] / "_workflow"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "workflow"


def sweeps() -> list[str]:
    """The names of the sweeps that come with the package.

    Examples
    --------
    >>> "table1" in sweeps()
    True
    """
    return sorted(path.stem for path in (shipped() / "sweeps").glob("*.toml"))


def load_sweep(name: str) -> Sweep:
    """The sweep of that name, or of a file of one's own that ends in ``.toml``.

    Such a file has the key ``about``, perhaps ``figures``, a list of "kappa", "steps", "passes" and "seconds", and any
    number of tables ``[[grid]]``. The keys of a grid are those of `Cell`, and every list of values stands for each of
    them in turn: a grid is a product. ``attack`` is a list of names, or of tables that have, beside ``name``, the
    attack's options, or other values for keys of the grid. What all grids share is in the table ``[common]``.

    An attack that looks for nearest errors is one cell, whatever the number of radii and orders.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        There is no such file, or it defines no sweep; the message says where.

    Examples
    --------
    >>> load_sweep("kappa").figures
    ('kappa',)
    """
    path = Path(name) if name.endswith(".toml") else shipped() / "sweeps" / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, sweeps(), n=1)
        raise FileNotFoundError(
            f"sweep={name!r}: {f'is {near[0]!r} meant? ' if near else ''}{', '.join(sweeps())}, or a file that ends in "
            ".toml, is accepted"
        )
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        _check_keys(given)
        for figure in given.get("figures", []):
            choice("figures", figure, ("kappa", "steps", "passes", "seconds"))
        pairs = [pair for grid in given["grid"] for pair in _expand({**given.get("common", {}), **grid})]
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from error
    if not pairs:
        raise ValueError(f"{path}: no cell is defined: there is no [[grid]], or a list in each is empty")
    cells = {cell.name: cell for cell, _ in pairs}
    balls: dict[str, dict[Threat, None]] = {name: {} for name in cells}
    for cell, ball in pairs:
        balls[cell.name][ball] = None
    tasks = tuple(Task(cells[name], tuple(balls[name])) for name in cells)
    return Sweep(path.stem, given.get("about", ""), tuple(given.get("figures", [])), tasks)


def _check_keys(given: Mapping[str, Any]) -> None:
    """Raise an error where a key of a sweep's file is unknown, or its value of another kind than it has to be."""
    kinds: dict[str, tuple[type, str]] = {
        "about": (str, "text"),
        "figures": (list, "a list of names"),
        "common": (dict, "one table [common]"),
        "grid": (list, "tables [[grid]]"),
    }
    for key, value in given.items():
        kind_of, accepted = kinds[choice("key", key, kinds)]
        inside = value if key == "grid" and isinstance(value, list) else []
        if not isinstance(value, kind_of) or not all(isinstance(grid, dict) for grid in inside):
            raise TypeError(f"{key}={value!r}: {accepted} is accepted")


def _expand(grid: Mapping[str, Any]) -> Iterator[tuple[Cell, Threat]]:
    """Every cell of a grid with its ball; one that serves several balls comes once for each."""
    keys = [item.name for item in fields(Cell) if item.name not in ("attack", "options", "shard", "shards")]
    for entry in _listed(grid["attack"]):
        if not isinstance(entry, str | Mapping):
            raise TypeError(f"attack={entry!r}: a name, or a table with a name and options, is accepted")
        given = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = given.pop("name")
        values = {key: _listed(value) for key, value in {**grid, **given}.items() if key != "attack"}
        for key in values:
            choice("key", key, [*keys, "attack", *options(name)])
        for chosen in itertools.product(*values.values()):
            of = dict(zip(values, chosen, strict=True))
            own = {key: of.pop(key) for key in options(name) if key in of}
            ball = Threat(of["norm"], of["eps"], of["order"])
            if kind(name) == "nearest":
                del of["eps"], of["order"]
            yield Cell(attack=name, options=own, **of), ball


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def whole_record(cell: Cell, folder: str | os.PathLike[str], at_hand: Inputs | None = None) -> Record | None:
    """The record of a cell on the whole sample, put together where it was run in shards; None where it is not there.

    Parameters
    ----------
    cell, folder, at_hand
        See `finished`.

    Raises
    ------
    ValueError
        A file is none that `finished` takes, or shards do not fit together; the message names it.

    Examples
    --------
    >>> whole_record(Cell(attack="closest"), "results") is None
    True
    """
    at_hand = Inputs(folder) if at_hand is None else at_hand
    return finished(cell, folder, at_hand) or _merged(cell, Path(folder), at_hand)


def _merged(cell: Cell, folder: Path, at_hand: Inputs) -> Record | None:
    """The record of all shards, in the first number of them that is complete."""
    called = re.compile(rf"{re.escape(cell.name)}_[1-9]\d*of([1-9]\d*)", re.ASCII)
    there = Counter(int(found[1]) for path in folder.glob("*of*.json") if (found := called.fullmatch(path.stem)))
    for count in sorted(count for count, files in there.items() if files >= count):
        parts = [finished(shard, folder, at_hand) for shard in cell.split(count)]
        whole = [part for part in parts if part is not None]
        if len(whole) == count:
            try:
                return merge(whole)
            except ValueError as error:
                raise ValueError(f"{folder}/{cell.name}_*of{count}.json: {error}") from error
    return None


def results(
    sweep: Sweep, folder: str | os.PathLike[str], say: Callable[[str], None] | None = None
) -> tuple[list[Record], list[Cell]]:
    """A record for each cell and ball, in the order of the sweep's file, and the cells that have none yet.

    Parameters
    ----------
    sweep : Sweep
    folder : path
        Of the records.
    say : callable, optional
        Is told of each file that is no record, or one of other inputs or another version; its cell counts among those
        without a record, and the others go on. By default the first such file is an error.

    Raises
    ------
    ValueError
        See `say`; the message names the file.

    Examples
    --------
    >>> found, missing = results(load_sweep("kappa"), "/nowhere")
    >>> len(found), len(missing) > 0
    (0, True)
    """
    return _results(sweep, Inputs(folder), folder, say)


def _results(
    sweep: Sweep, at_hand: Inputs, folder: str | os.PathLike[str], say: Callable[[str], None] | None
) -> tuple[list[Record], list[Cell]]:
    found, missing = [], []
    for task in sweep.tasks:
        try:
            record = whole_record(task.cell, folder, at_hand)
        except ValueError as error:
            if say is None:
                raise
            say(str(error))
            record = None
        if record is None:
            missing.append(task.cell)
        else:
            found += task.within(record)
    return found, missing


def write_tables(
    sweep: Sweep,
    records: str | os.PathLike[str],
    out: str | os.PathLike[str],
    say: Callable[[str], None] | None = None,
) -> tuple[list[Path], list[Cell]]:
    """Rebuild the tables and figures of a sweep from its records.

    The same records give the same bytes, and but for ``costs.csv`` and figures of seconds so do those of another run,
    in other shards. There the seconds differ, and the passes of some attacks: whether a point on a boundary needs one
    more, rounding decides.

    Parameters
    ----------
    sweep : Sweep
    records, out : path
        The folders of the records and of the tables.
    say : callable, optional
        See `results`: is told of records that cannot be used.

    Returns
    -------
    paths : list
        What was written: ``table.csv``, accuracies in per cent; ``cells.csv``, a line for each attack and ball;
        ``costs.csv``, passes per sample, seconds and hardware; and figures, ``NAME-DATA.svg``, those that the sweep
        names.
    missing : list of Cell
        Those without a record.

    Raises
    ------
    ValueError
        There is no record, or one cannot be used and `say` is not there to be told.

    Examples
    --------
    >>> write_tables(load_sweep("kappa"), "results/kappa/records", "results/kappa/tables")  # doctest: +SKIP
    """
    at_hand = Inputs(records)
    found, missing = _results(sweep, at_hand, records, say)
    at_hand.keep()
    if not found:
        raise ValueError(f"folder={str(records)!r} holds no record of the sweep {sweep.name!r}")
    rows = frame(found)
    rows = rows.assign(label=[method(a, chosen) for a, chosen in zip(rows.attack, rows.options, strict=True)])
    wide = table(rows).round(2)
    files = {
        "table.csv": wide.to_csv(lineterminator="\n"),
        "cells.csv": _lines(rows, _FOUND),
        "costs.csv": _lines(rows, _COST),
    }
    paths = []
    for name, text in files.items():
        paths.append(Path(out) / name)
        with write_atomically(paths[-1]) as file:
            file.write(text.encode())
    return paths + _figures(sweep, rows, Path(out)), missing


_KEYS = ["data", "model", "n", "norm", "eps", "order", "label", "kappa", "seed", "dtype"]
_FOUND = ["clean_accuracy", "clean_low", "clean_high", "accuracy", "low", "high", "risk_ce", "risk_low", "risk_high"]
_FOUND += ["transport_cost", "data_sha256", "model_sha256"]
_COST = ["forward", "backward", "vanished", "seconds", "cpu", "gpu", "threads", "commit", "python", "torch"]


def _lines(rows: pd.DataFrame, columns: list[str]) -> str:
    """Some columns, with the two sides of each interval in one of their own."""
    for name, whole in (("", "accuracy"), ("clean_", "clean_accuracy"), ("risk_", "risk_ce")):
        sides = rows[f"{whole}_interval"].str
        rows = rows.assign(**{f"{name}low": sides[0], f"{name}high": sides[1]})
    shown = rows[_KEYS + columns].rename(columns={"label": "attack"})
    return str(shown.to_csv(index=False, float_format="%.7g", lineterminator="\n"))


def _figures(sweep: Sweep, rows: pd.DataFrame, out: Path) -> list[Path]:
    """A figure of each kind for each data set, as SVG without a date."""
    import matplotlib.pyplot as plt

    from wda import figures

    draw = {
        "kappa": figures.accuracy_over_kappa,
        "steps": figures.accuracy_over_steps,
        "passes": figures.accuracy_over_passes,
        "seconds": figures.seconds_over_samples,
    }
    paths = []
    for name, (data, of_data) in itertools.product(sweep.figures, rows.groupby("data", sort=False)):
        if name in ("kappa", "steps") and not (of_data.attack == "wda").any():
            continue
        paths.append(out / f"{name}-{Path(str(data)).stem}.svg")
        with plt.rc_context({"svg.hashsalt": sweep.name}), write_atomically(paths[-1]) as file:
            figure = draw[name](of_data)
            figure.savefig(file, format="svg", metadata={"Date": None})
            plt.close(figure)
    return paths
