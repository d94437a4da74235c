"""Table 1 of the first paper: its attacks on named models, and its numbers beside what is found.

The table has columns of two threat models. APGD, AutoAttack, A3 and A3++ move each image by at most the radius, in the
ball of order infinity; those of WDA are of the ball of order 1. So every result here names its ball.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wda import zoo
from wda.attacks import check_kappa, kind
from wda.errors import DataUnavailable
from wda.experiment.cells import Cell, check_settings, run_cell
from wda.experiment.records import Record
from wda.experiment.sweeps import Task, whole_record
from wda.experiment.tables import label, labelled
from wda.files import check_writable
from wda.models import card
from wda.threat import Threat, radius_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Failed", "beside_published", "run_table1", "table1"]

# The columns of the published table: attack, kappa, order of the ball.
_COLUMNS = {
    "clean": ("clean", 1.0, ""),
    "apgd_ce": ("apgd-ce", 1.0, "inf"),
    "apgd_dlr": ("apgd-dlr", 1.0, "inf"),
    "wda_k1": ("wda", 1.0, "1.0"),
    "wda_k2": ("wda", 2.0, "1.0"),
    "aa": ("autoattack", 1.0, "inf"),
    "a3": ("a3", 1.0, "inf"),
    "a3pp": ("a3++", 1.0, "inf"),
}
_ATTACKS = ("apgd-ce", "apgd-dlr", "wda", "autoattack", "a3", "a3++", "closest")

# The radius where neither the caller nor the published table gives one.
_RADII = {("digits", "Linf"): 0.1, ("digits", "L2"): 0.5, ("mnist", "Linf"): 0.3}

_BALLS = {"": "sample", "inf": "W∞: each image by at most ε", "1.0": "W1: ε on average", "2.0": "W2"}


@dataclass(frozen=True)
class Failed:
    """A model without some of its results, and why.

    Examples
    --------
    >>> Failed("my-model", ("pgd",), "ValueError: ...").model
    'my-model'
    """

    model: str
    attacks: tuple[str, ...]
    error: str


def run_table1(
    models: Sequence[str],
    *,
    data: str | None = None,
    norm: str | None = None,
    eps: float | str | None = None,
    attacks: Sequence[str] = _ATTACKS,
    kappas: Sequence[float] = (1, 2),
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float32",
    device: str = "cpu",
    output: str | os.PathLike[str] = "results/table1",
    say: Callable[[str], None] = print,
) -> tuple[list[Record], list[Failed]]:
    """Run the attacks of Table 1 on models, one cell after the other; what has a record is only read.

    A model that cannot be loaded, or an attack that fails on it, does not stop the others. A bad argument is an error
    before the first pass.

    Parameters
    ----------
    models : sequence of str
        Names for `wda.models.load`.
    data : str, optional
        A name for `wda.data.load`; by default what the model's own name or card says.
    norm : {"Linf", "L2", "L1"}, optional
        By default that of a RobustBench name, and otherwise "Linf".
    eps : float or str, optional
        By default the radius of Table 1 for that data set and norm; for the digits 0.1 in Linf and 0.5 in L2, for
        MNIST 0.3 in Linf.
    attacks : sequence of str
        "wda" is run in the ball of order 1, "wfgsm" and "wpgd" in that of order 2. Nearest errors serve the orders
        1 and infinity. All others move each image by at most the radius.
    kappas : sequence of float
        "wda" runs once for each of them.
    settings : mapping
        Options of attacks, by their names, where they are not to have their defaults.
    n, seed, batch_size, dtype, device
        See `Cell`.
    output : path
        The folder of the records.
    say : callable
        Is told of each cell, in a line.

    Returns
    -------
    records : list of dict
        One for each cell and ball.
    failed : list of Failed

    Raises
    ------
    ValueError, TypeError, OSError
        A bad argument, a folder that cannot be written.
    RuntimeError
        There is no record at all; the message has each model's error.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records, failed = run_table1(["digits-mlp", "nobody"], attacks=["wda"], n=5, output=folder, say=len)
    >>> len(records), [failure.model for failure in failed]
    (2, ['nobody'])
    """
    for name, values, such in (("models", models, "digits-mlp"), ("attacks", attacks, "wda"), ("kappas", kappas, 1)):
        if not isinstance(values, list | tuple) or not values or len(set(values)) < len(values):
            raise ValueError(f'{name}={values!r}: a list is accepted, each once, in a shell -p {name} "[{such!r}]"')
    chosen = check_settings(attacks, settings)
    common = {"n": n, "seed": seed, "batch_size": batch_size, "dtype": dtype, "device": device}
    tasks, errors = [], {}
    for model in models:
        try:
            ball = _ball(model, data, norm, eps)
        except DataUnavailable as error:
            errors[model, _told(error)] = list(attacks)
            continue
        tasks += [task for attack in attacks for task in _tasks(attack, kappas, chosen[attack], **ball, **common)]
    check_writable(Path(output))

    records, clock = [], _Clock(len(tasks))
    for task in tasks:
        cell = task.cell
        name = label(cell.attack, cell.options, cell.kappa)
        try:
            record, has_run = _finished_or_run(cell, output)
        except Exception as error:  # whatever a model of one's own may raise
            errors.setdefault((cell.model, _told(error)), []).append(name)
            say(clock.line(f"{cell.model} {name}: failed, {type(error).__name__}", has_run=False))
            continue
        found = task.within(record)
        accuracy = ", ".join(f"{100 * one['accuracy']:.1f} %" for one in found)
        say(clock.line(f"{cell.model} {name}: {accuracy}" + ", on record" * (not has_run), has_run))
        records += found
    failed = [Failed(model, tuple(labels), error) for (model, error), labels in errors.items()]
    if not records:
        raise RuntimeError("nothing ran\n" + "\n".join(f"{each.model}: {each.error}" for each in failed))
    return records, failed


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Clock:
    """Counts cells, and tells how long the others may take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.run, self.start = total, 0, 0, time.monotonic()

    def line(self, text: str, has_run: bool) -> str:
        self.done, self.run = self.done + 1, self.run + has_run
        spent = time.monotonic() - self.start
        left = f", about {spent / self.run * (self.total - self.done):.0f} s left" if self.run else ""
        return f"{self.done}/{self.total} {text}; {spent:.0f} s{left}"


def _finished_or_run(cell: Cell, output: str | os.PathLike[str]) -> tuple[Record, bool]:
    if record := whole_record(cell, output):
        return record, False
    return run_cell(cell, output), True


def _ball(model: str, data: str | None, norm: str | None, eps: float | str | None) -> dict[str, Any]:
    """The keys of a cell that say on what a model is attacked, where the caller leaves them to us."""
    if not isinstance(model, str):
        raise TypeError(f"models=[..., {model!r}]: names are accepted")
    if model.startswith(zoo.PREFIX):
        dataset, threat, _ = zoo.parts(model)
        data, norm = data or dataset, norm or threat
    elif data is None and ":" not in model:
        about = card(model)
        data = about.get("data") or about.get("dataset")
    norm = norm or "Linf"
    if data is None:
        raise ValueError(f"data=None: nothing says which data {model!r} is for; a name or an .npz file is accepted")
    if eps is None:
        radii = {(row.data, row.norm): row.eps for row in _published().itertuples()}
        eps = {**radii, **_RADII}.get((data, norm))
    if eps is None:
        raise ValueError(f"eps=None: no radius is usual for {data!r} in {norm}; a number or a fraction is accepted")
    return {"model": model, "data": data, "norm": norm, "eps": eps}


def _tasks(attack: str, kappas: Sequence[float], chosen: Mapping[str, Any], **given: Any) -> Iterator[Task]:
    """The cells of an attack, with options, on one model."""
    cell = {**given, "attack": attack, "options": chosen}
    of = kind(attack)
    if of == "nearest":
        eps = cell.pop("eps")
        yield Task(Cell(**cell), tuple(Threat(cell["norm"], eps, order) for order in ("inf", 1)))
    elif attack == "wda":
        for kappa in kappas:
            yield Task(Cell(**cell, order=1, kappa=check_kappa(kappa, 1.0)))
    else:
        yield Task(Cell(**cell, order=2 if of == "budgeted" else "inf"))


def table1(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in per cent: a row for each model and radius, and columns that name the ball above the attack.

    Parameters
    ----------
    results : DataFrame
        From `wda.experiment.frame`.

    Raises
    ------
    ValueError
        Two results would have the same place in the table.

    Examples
    --------
    >>> import tempfile
    >>> from wda.experiment import frame
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records, _ = run_table1(["digits-mlp"], attacks=["apgd-ce", "wda"], n=5, output=folder, say=len)
    >>> for column in table1(frame(records)).columns:
    ...     print(*column, sep=" | ")
    sample | clean
    W∞: each image by at most ε | apgd-ce
    W1: ε on average | wda κ=1
    W1: ε on average | wda κ=2
    """
    rows, keys = labelled(results)
    rows["radius"] = rows.norm + " " + rows.eps.map(radius_text)
    rows["ball"] = rows.order.map(_ball_name)
    keys[-1] = "radius"  # the ball is in the header
    rows = rows.sort_values("order", key=lambda order: -order.astype(float), kind="stable")
    columns = list(dict.fromkeys(zip(rows.ball, rows.label, strict=True)))
    wide = rows.pivot(index=keys, columns=["ball", "label"], values="accuracy")[columns]
    wide.insert(0, (_BALLS[""], "clean"), rows.groupby(keys).clean_accuracy.first())
    wide.columns.names = [None, None]
    return 100 * wide


def _ball_name(order: str) -> str:
    return _BALLS.get(order, f"W{order.removesuffix('.0')}")


def beside_published(results: pd.DataFrame | None = None) -> pd.DataFrame:
    """The numbers of Table 1 of the first paper, one in each line, beside those that were found.

    A result counts where model, data set, norm and radius are those of a row; what the paper has no column for, such as
    "closest", comes with the others of its model. Options that are not the defaults are in the name of the attack.

    Parameters
    ----------
    results : DataFrame, optional
        From `wda.experiment.frame`.

    Returns
    -------
    DataFrame
        `model`, by its name for `wda.models.load`; `paper` and `architecture` as printed; `data`, `norm`, `eps`;
        `ball`, whose lines stand together; `attack`; `published` and `reproduced`, in per cent, and `difference`, in
        points; `low` and `high`, Wilson's interval at 95 % for the reproduced number, and `n`, of how many images it
        is; `note`, ours, on the row.

    Examples
    --------
    >>> rows = beside_published()
    >>> len(rows), int(rows.reproduced.notna().sum())
    (144, 0)
    """
    import pandas as pd

    keys = ["model", "data", "norm", "eps"]
    columns = ["attack", "kappa", "order"]
    printed = rows = _published()
    if results is None or results.empty:
        rows = rows.assign(label=None, reproduced=float("nan"), low=float("nan"), high=float("nan"), n=float("nan"))
    else:
        ours = _reproduced(results, keys + columns)
        rows = rows.merge(ours, how="outer", on=keys + columns)
        about = printed.drop_duplicates(keys)[[*keys, "row", "paper", "architecture", "note"]]
        rows = rows.drop(columns=["row", "paper", "architecture", "note"]).merge(about, on=keys)
    places = {column: place for place, column in enumerate([*_COLUMNS.values()])}
    where = pd.Series([places.get(column, len(places)) for column in rows[columns].itertuples(index=False, name=None)])
    rows = rows.assign(
        place=where.to_numpy(),
        ball=rows.order.map(_ball_name),
        attack=rows.label.fillna(rows.usual),
        difference=rows.reproduced - rows.published,
        ball_place=rows.order.map({order: place for place, order in enumerate(_BALLS)}).fillna(len(_BALLS)),
    ).sort_values(["row", "ball_place", "place", "attack"], kind="stable", ignore_index=True)
    shown = [*keys, "paper", "architecture", "ball", "attack", "published", "reproduced", "difference"]
    return rows[[*shown, "low", "high", "n", "note"]]


def _published() -> pd.DataFrame:
    """Table 1 as printed, a number in each line, with our names for models and attacks."""
    import pandas as pd

    printed = pd.read_csv(zoo.tables() / "wda_table1.csv", dtype={"eps": str}, keep_default_na=False)
    about = pd.DataFrame({
        "row": range(len(printed)),
        "model": zoo.PREFIX + printed.dataset + "/" + printed.norm + "/" + printed.robustbench_id,
        "data": printed.dataset,
        "norm": printed.norm,
        "eps": [Threat(norm, eps).eps for norm, eps in zip(printed.norm, printed.eps, strict=True)],
        **printed[["paper", "architecture", "note"]],
    })  # fmt: skip
    parts = []
    for name, (attack, kappa, order) in _COLUMNS.items():
        usual = attack if attack == "clean" else label(attack, {}, kappa)
        column = {"attack": attack, "kappa": kappa, "order": order, "usual": usual}
        parts.append(about.assign(**column, published=printed[name].astype(float)))
    return pd.concat(parts, ignore_index=True)


def _reproduced(results: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Results, and the accuracy on each sample, in the form of the published numbers."""
    import pandas as pd

    labels = [label(a, o, k) for a, o, k in zip(results.attack, results.options, results.kappa, strict=True)]
    sample = {"attack": "clean", "kappa": 1.0, "order": "", "label": "clean"}
    clean = results.assign(**sample, accuracy=results.clean_accuracy, accuracy_interval=results.clean_accuracy_interval)
    rows = pd.concat([clean.drop_duplicates(["model", "data", "norm", "eps", "n"]), results.assign(label=labels)])
    low, high = (100 * rows.accuracy_interval.str[side] for side in (0, 1))
    return rows.assign(reproduced=100 * rows.accuracy, low=low, high=high)[
        [*keys, "label", "reproduced", "low", "high", "n"]
    ]
