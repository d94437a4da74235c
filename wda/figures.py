"""Figures of the book and the notebooks. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from wda.threat import radius_text

if TYPE_CHECKING:
    import pandas as pd

    from wda.evaluate import Bracket

__all__ = [
    "COLOURS",
    "MARKERS",
    "accuracy_over_kappa",
    "accuracy_over_passes",
    "accuracy_over_steps",
    "bracket_curves",
    "seconds_over_samples",
    "tuning_curves",
]

# Told apart by their lightness, so also in greyscale, and by readers who do not see red and green apart.
COLOURS = ("#0b2a4a", "#c1432e", "#4c9a8e", "#e3a93c", "#9db4c8")
MARKERS = ("o", "s", "^", "D", "v")


def accuracy_over_kappa(results: pd.DataFrame) -> Figure:
    """Accuracy under "wda" as kappa grows, with Wilson's intervals: a panel for each threat, a line for each model.

    Parameters
    ----------
    results : DataFrame
        From `wda.experiment.read` or `wda.experiment.frame`.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        No record is of the attack "wda", or they differ in data set, sample size or seed.

    Examples
    --------
    >>> import pandas as pd
    >>> what = {"data": "d", "n": 9, "seed": 0, "model": "m", "attack": "wda", "kappa": 1.0}
    >>> what |= {"norm": "L2", "eps": 0.5, "order": "1.0"}
    >>> found = {"accuracy": 0.5, "accuracy_interval": (0.4, 0.6), "clean_accuracy": 1.0}
    >>> figure = accuracy_over_kappa(pd.DataFrame([what | found]))
    >>> len(figure.axes)
    1
    """
    runs = results[results.attack == "wda"]
    if runs.empty:
        raise ValueError("results has no record of the attack 'wda'")
    for key in ("data", "n", "seed"):
        if runs[key].nunique() > 1:
            raise ValueError(f"results has {key} {', '.join(map(str, runs[key].unique()))}: one is accepted")
    threats = list(runs.groupby(["order", "norm", "eps"]))
    looks = dict(zip(sorted(runs.model.unique()), itertools.cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    figure, panels = plt.subplots(
        1, len(threats), figsize=(1 + 3.6 * len(threats), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, ((order, norm, eps), of_threat) in zip(panels[0], threats, strict=True):
        for model, line in of_threat.groupby("model"):
            colour, marker = looks[model]
            line = line.sort_values("kappa")
            low, high = (100 * line.accuracy_interval.str[side] for side in (0, 1))
            accuracy = 100 * line.accuracy
            bars = (accuracy - low, high - accuracy)
            panel.errorbar(line.kappa, accuracy, bars, color=colour, marker=marker, capsize=3, label=model)
            panel.axhline(100 * line.clean_accuracy.iloc[0], color=colour, linestyle=":", linewidth=1)
        panel.set_title(f"$W_{{{order.removesuffix('.0')}}}$, {norm}, radius {radius_text(eps)}", fontsize="medium")
        panel.set_xlabel("κ (search radius / ε)")
        panel.legend(fontsize="small", loc="lower right")
    panels[0][0].set_ylabel("accuracy (%)")
    panels[0][0].set_ylim(0, 101)
    return figure


def bracket_curves(
    brackets: Mapping[str, Bracket],
    reach: float,
    orders: Sequence[float] = (1, 2, math.inf),
    confidence: float | None = None,
) -> Figure:
    """The robust accuracy between its two sides as the radius grows: a panel for each order, a band for each name.

    Parameters
    ----------
    brackets : mapping
        From names, such as those of models, to their brackets; of one norm.
    reach : float
        The largest radius.
    orders : sequence of float
    confidence : float, optional
        Adds the interval for the population (`Bracket.population`), as thin lines.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        The brackets differ in norm.

    Examples
    --------
    >>> import wda
    >>> b = wda.Bracket(wda.Threat("L2", 1.0), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))
    >>> len(bracket_curves({"a model": b}, reach=2.0).axes)
    3
    """
    norms = sorted({b.threat.norm for b in brackets.values()})
    if len(norms) != 1:
        raise ValueError(f"brackets have norms {', '.join(norms) or 'none'}: one is accepted")
    eps = torch.linspace(0, reach, 201, dtype=torch.float64)
    figure, panels = plt.subplots(
        1, len(orders), figsize=(1 + 2.9 * len(orders), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, order in zip(panels[0], orders, strict=True):
        looks = itertools.cycle(zip(COLOURS, ("-", "--", ":", "-.", "-"), strict=True))
        for (name, b), (colour, style) in zip(brackets.items(), looks, strict=False):
            lower, upper = (100 * side for side in b.curve(eps, order))
            panel.fill_between(eps, lower, upper, color=colour, alpha=0.35, linewidth=0, label=name)
            for side in (lower, upper):
                panel.plot(eps, side, style, color=colour, linewidth=1.5)
            if confidence is not None:
                for side in b.population(eps, order, confidence):
                    panel.plot(eps, 100 * side, style, color=colour, linewidth=0.7)
        p = r"\infty" if math.isinf(order) else f"{order:g}"
        panel.set_title(f"$W_{{{p}}}$", fontsize="medium")
        panel.set_xlabel(f"radius ε ({norms[0]})")
    panels[0][0].set_ylabel("accuracy (%)")
    panels[0][0].set_ylim(0, 101)
    panels[0][-1].legend(fontsize="small", loc="upper right")
    return figure


def accuracy_over_steps(results: pd.DataFrame) -> Figure:
    """Accuracy under "wda" as steps are added: a panel for each model, norm and radius, a line for each step size.

    The dotted line is the accuracy on the sample. Each panel has its own scale, which need not begin at 0.

    Parameters
    ----------
    results : DataFrame
        From `wda.experiment.read` or `wda.experiment.frame`.

    Raises
    ------
    ValueError
        No record is of the attack "wda".

    Examples
    --------
    >>> import pandas as pd
    >>> what = {"model": "m", "attack": "wda", "kappa": 1.0, "options": {"steps": 5, "step_size": None}}
    >>> what |= {"norm": "L2", "eps": 0.5, "order": "1.0", "accuracy": 0.5, "clean_accuracy": 1.0}
    >>> len(accuracy_over_steps(pd.DataFrame([what])).axes)
    1
    """
    runs = results[results.attack == "wda"]
    if runs.empty:
        raise ValueError("results has no record of the attack 'wda'")
    runs = runs.assign(steps=runs.options.str["steps"], size=[_size(chosen) for chosen in runs.options])
    groups = list(runs.groupby(["model", "norm", "eps"], sort=False))
    figure, panels = _panels(len(groups), sharey=False)
    for panel, ((model, norm, eps), of_model) in zip(panels, groups, strict=True):
        looks = itertools.cycle(zip(COLOURS, MARKERS, strict=True))
        for (size, line), (colour, marker) in zip(of_model.groupby("size", sort=False), looks, strict=False):
            line = line.sort_values("steps")
            panel.plot(line.steps, 100 * line.accuracy, color=colour, marker=marker, label=size)
        panel.axhline(100 * of_model.clean_accuracy.iloc[0], color="black", linestyle=":", linewidth=1)
        panel.set_title(f"{model}\n{norm} {radius_text(eps)}", fontsize="medium")
        panel.set_xscale("log")
        counts = sorted(of_model.steps.unique())
        panel.set_xticks(counts, labels=map(str, counts))
        panel.minorticks_off()
        panel.set_xlabel("steps")
        panel.legend(fontsize="small", title="step size", loc="upper left", bbox_to_anchor=(1, 1))
    panels[0].set_ylabel("accuracy (%)")
    return figure


def _size(chosen: dict[str, float | None]) -> str:
    """The step size as a legend has it."""
    return "cosine" if chosen["step_size"] is None else repr(chosen["step_size"])


def accuracy_over_passes(results: pd.DataFrame) -> Figure:
    """What each attack finds over what it costs: a panel for each model, norm and radius, a point for each attack.

    Each panel has its own scale, which need not begin at 0.

    Parameters
    ----------
    results : DataFrame
        From `wda.experiment.frame`, with a column `label` that names the attacks.

    Examples
    --------
    >>> import pandas as pd
    >>> what = {"model": "m", "label": "pgd", "kappa": 1.0, "norm": "L2", "eps": 0.5, "order": "1.0"}
    >>> figure = accuracy_over_passes(pd.DataFrame([what | {"accuracy": 0.5, "forward": 21.0, "backward": 20.0}]))
    >>> figure.axes[0].get_xlabel()
    'passes per sample'
    """
    groups = list(results.groupby(["model", "norm", "eps"], sort=False))
    names = [
        f"{label} κ={kappa:g}" if kappa > 1 else label
        for label, kappa in zip(results.label, results.kappa, strict=True)
    ]
    results = results.assign(name=names, threat="W" + results.order.str.removesuffix(".0"))
    looks = dict(zip(results.threat.unique(), itertools.cycle(zip(COLOURS, MARKERS, strict=True)), strict=False))
    figure, panels = _panels(len(groups), sharey=False)
    panels[0].set_ylabel("accuracy (%)")
    for panel, ((model, norm, eps), of_model) in zip(panels, groups, strict=True):
        for threat, points in results.loc[of_model.index].groupby("threat", sort=False):
            colour, marker = looks[threat]
            passes = points.forward + points.backward
            panel.plot(passes, 100 * points.accuracy, color=colour, marker=marker, linestyle="", label=threat)
        _name_points(panel, results.loc[of_model.index])
        only = f"{results.threat.iloc[0]} " if len(looks) == 1 else ""
        panel.set_title(f"{model}\n{only}{norm} {radius_text(eps)}", fontsize="medium")
        panel.set_xscale("log")
        fewest, most = panel.get_xlim()
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3) if most / fewest < 100 else (1,)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.set_xlabel("passes per sample")
        if not only:
            panel.legend(fontsize="small")
    return figure


def _name_points(panel: Axes, points: pd.DataFrame) -> None:
    """The names of points of accuracy over passes, in a column beside the panel, in the order of their heights."""
    points = points.assign(passes=points.forward + points.backward, percent=100 * points.accuracy)
    points = points.sort_values(["percent", "passes"], ascending=[True, False])
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)
    for row, height in zip(points.itertuples(), _apart((points.percent - low) / (high - low), 0.05), strict=True):
        panel.annotate(
            row.name,
            (row.passes, row.percent),
            xytext=(1.06, height),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "#9a9a9a", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
            fontsize="x-small",
            va="center",
        )


def _apart(heights: Iterable[float], gap: float) -> list[float]:
    """Sorted heights from 0 to 1 moved as little as need be, in least squares, until they are a gap apart.

    Without the gaps that is isotonic regression, of which this is the max-min formula.
    """
    free = [height - gap * i for i, height in enumerate(heights)]
    n, top = len(free), 1 - gap * (len(free) - 1)
    kept = [max(min(fmean(free[j : k + 1]) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    return [min(max(height, 0.0), top) + gap * i for i, height in enumerate(kept)]


def seconds_over_samples(results: pd.DataFrame) -> Figure:
    """What each attack takes as the sample grows: a panel for each model, a line for each attack.

    The legend has the slope of a least-squares line, the seconds per sample without what a call costs at any size;
    but only where a line fits, with a correlation above 0.8. Other programs on the machine may be in its way, or an
    attack whose calls cost the same for few samples as for more.

    Parameters
    ----------
    results : DataFrame
        From `wda.experiment.frame`, with a column `label` that names the attacks.

    Examples
    --------
    >>> import pandas as pd
    >>> what = {"model": "m", "label": "pgd"}
    >>> figure = seconds_over_samples(pd.DataFrame([what | {"n": n, "seconds": 1 + 0.02 * n} for n in (50, 100)]))
    >>> figure.axes[0].get_legend_handles_labels()[1]
    ['pgd: 20 ms per sample']
    """
    figure, panels = _panels(results.model.nunique())
    for panel, (model, of_model) in zip(panels, results.groupby("model", sort=False), strict=True):
        looks = itertools.cycle(zip(COLOURS, MARKERS, strict=True))
        for (label, line), (colour, marker) in zip(of_model.groupby("label", sort=False), looks, strict=False):
            line = line.sort_values("n")
            if len(line) > 1 and np.corrcoef(line.n, line.seconds)[0, 1] > 0.8:
                label += f": {1000 * np.polyfit(line.n, line.seconds, 1)[0]:.2g} ms per sample"
            panel.plot(line.n, line.seconds, color=colour, marker=marker, label=label)
        panel.set_title(model, fontsize="medium")
        panel.set_xlim(left=0)
        panel.set_xlabel("samples")
        panel.legend(fontsize="small")
    panels[0].set_ylabel("seconds")
    panels[0].set_ylim(0, 1.05 * results.seconds.max())
    return figure


def tuning_curves(record: Mapping[str, Any]) -> Figure:
    """Accuracies and the sensitivity over the epochs of a fine-tuning; on the validation sample dashed.

    Parameters
    ----------
    record : dict
        From `wda.experiment.run_finetune`.

    Returns
    -------
    Figure

    Examples
    --------
    >>> score = {"clean": 1.0, "pointwise": 0.5, "distributional": 0.4, "upsilon": 3.0}
    >>> history = [{"epoch": epoch, "validation": score, "test": score} for epoch in (0, 1)]
    >>> parameters = {"order": "2", "eps": 0.1, "norm": "Linf"}
    >>> len(tuning_curves({"parameters": parameters, "epoch": 1, "history": history}).axes)
    2
    """
    epochs = [entry["epoch"] for entry in record["history"]]
    ball = f"$W_{{{float(record['parameters']['order']):g}}}$".replace("inf", r"\infty")
    names = {"clean": "clean", "pointwise": r"$W_\infty$ W-PGD-20", "distributional": f"{ball}, attack of the training"}
    figure, (accuracies, slopes) = _panels(2, sharey=False)
    for sample, style in (("test", "-"), ("validation", "--")):
        for (key, name), colour, marker in zip(names.items(), COLOURS, MARKERS, strict=False):
            line = [100 * entry[sample][key] for entry in record["history"]]
            label = name if sample == "test" else None
            accuracies.plot(epochs, line, style, color=colour, marker=marker, ms=4, label=label)
        line = [entry[sample]["upsilon"] for entry in record["history"]]
        if None not in line:
            slopes.plot(epochs, line, style, color=COLOURS[0], marker=MARKERS[0], ms=4, label=sample)
    accuracies.axvline(record["epoch"], color="0.6", lw=1, ls=":")
    accuracies.set(xlabel="epoch (0: as given)", ylabel="accuracy (%)", ylim=(0, 101))
    slopes.set(xlabel="epoch (0: as given)", ylabel="Υ (loss per input unit)", ylim=(0, None))
    for panel in (accuracies, slopes):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.get_lines():
            panel.legend(frameon=False, fontsize="small")
    return figure


def _panels(count: int, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels side by side."""
    figure, panels = plt.subplots(
        1, count, figsize=(1 + 3.6 * count, 3.6), sharey=sharey, squeeze=False, layout="constrained"
    )
    return figure, list(panels[0])
