"""Tables of records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wda.attacks import available
from wda.experiment.records import method
from wda.threat import radius_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["costs", "label", "table"]


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in per cent: a row for each model and threat, a column for each attack, `clean` first.

    Where the results are of several data sets, sample sizes or seeds, these name the rows too.

    Parameters
    ----------
    results : DataFrame
        From `read` or `frame`.

    Raises
    ------
    ValueError
        Two results would have the same place in the table.

    Examples
    --------
    >>> import tempfile
    >>> from wda.experiment import frame, run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table(frame(run(n=10, attacks=["fgsm"], output=folder))).columns.tolist()
    ['clean', 'fgsm']
    """
    rows, keys = labelled(results)
    wide = rows.pivot(index=keys, columns="label", values="accuracy")[rows.label.unique()]
    wide.insert(0, "clean", rows.groupby(keys).clean_accuracy.first())
    wide.columns.name = None
    return (100 * wide).sort_index()


def costs(results: pd.DataFrame) -> pd.DataFrame:
    """What each attack did: accuracy and its interval in per cent, transport cost, passes per sample.

    The columns before the attack, such as the model and the threat, are only those in which results differ.

    Parameters
    ----------
    results : DataFrame
        From `read` or `frame`.

    Raises
    ------
    ValueError
        Two results would have the same place in the table.

    Examples
    --------
    >>> import tempfile
    >>> from wda.experiment import frame, run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     costs(frame(run(n=10, attacks=["fgsm"], output=folder))).columns.tolist()
    ['attack', 'accuracy', 'interval', 'transport cost', 'forward', 'backward']
    """
    rows, keys = labelled(results)
    rows = rows.sort_values(keys, kind="stable")
    shown = rows[[key for key in keys if rows[key].nunique() > 1]].assign(
        attack=rows.label,
        accuracy=[f"{100 * a:.1f}" for a in rows.accuracy],
        interval=[f"{100 * low:.1f} to {100 * high:.1f}" for low, high in rows.accuracy_interval],
    )
    shown["transport cost"] = rows.transport_cost.round(4)
    return shown.join(rows[["forward", "backward"]].round(1))


def label(attack: str, options: Mapping[str, Any], kappa: float) -> str:
    """An attack as tables name it, with the options that are not the defaults.

    Examples
    --------
    >>> label("wda", {"steps": 5}, 2.0), label("pgd", {}, 1.0)
    ('wda steps=5 κ=2', 'pgd')
    """
    name = method(attack, options)
    return f"{name} κ={repr(float(kappa)).removesuffix('.0')}" if attack == "wda" else name


def labelled(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The results in the order of tables, labelled, and the columns that name a row of a table.

    Raises
    ------
    ValueError
        Two results would have the same place in a table.
    """
    position = {name: place for place, name in enumerate(available())}
    order = results.order.str.removesuffix(".0")
    rows = results.assign(
        place=results.attack.map(position),
        label=[label(a, o, k) for a, o, k in zip(results.attack, results.options, results.kappa, strict=True)],
        threat="W" + order + " " + results.norm + " " + results.eps.map(radius_text),
    )
    keys = [key for key in ("data", "n", "seed", "dtype") if rows[key].nunique() > 1] + ["model", "threat"]
    if (twice := rows.duplicated([*keys, "label"])).any():
        raise ValueError(f"two results are of {rows.loc[twice.idxmax(), [*keys, 'label']].to_dict()}")
    # numbers in a label count as such: 2 comes before 10
    rows["in_turn"] = rows.label.str.replace(r"(?<![.\d])\d+", lambda number: number[0].zfill(9), regex=True)
    return rows.sort_values(["place", "kappa", "in_turn"], kind="stable"), keys
