"""Figures of tables of results: what is drawn is what the table says, and can be read."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from wda import figures


def test_seconds_are_drawn_over_the_sample_and_their_slope_is_told() -> None:
    rng = np.random.default_rng(0)
    rows, slopes = [], {"pgd": 0.002, "a3": 0.5}
    for model in ("one", "other"):
        for label, slope in slopes.items():
            for n in rng.permutation([50, 100, 200, 400]).tolist():
                rows.append({"model": model, "label": label, "n": n, "seconds": 3 + slope * n})
    figure = figures.seconds_over_samples(pd.DataFrame(rows))
    assert [panel.get_title() for panel in figure.axes] == ["one", "other"]
    for panel in figure.axes:
        for line, (label, slope) in zip(panel.lines, slopes.items(), strict=True):
            assert line.get_xdata().tolist() == [50, 100, 200, 400]
            assert line.get_ydata() == pytest.approx(3 + slope * line.get_xdata())
            told, unit = line.get_label().split(": ")[1].split(" ", 1)
            assert (line.get_label().split(":")[0], unit) == (label, "ms per sample")
            assert float(told) == pytest.approx(1000 * slope)


@pytest.mark.parametrize("seconds", [[1.0], [7.0, 6.5, 7.0], [3.0, 2.0, 1.0]])
def test_what_is_no_line_has_no_slope(seconds: list[float]) -> None:
    rows = [{"model": "m", "label": "a3", "n": 50 * (i + 1), "seconds": value} for i, value in enumerate(seconds)]
    figure = figures.seconds_over_samples(pd.DataFrame(rows))
    assert figure.axes[0].lines[0].get_label() == "a3"


def test_walks_in_other_balls_have_panels_of_their_own() -> None:
    def row(norm: str, eps: float, steps: int, size: float | None, accuracy: float) -> dict[str, Any]:
        walk = {"steps": steps, "step_size": size}
        what = {"model": "m", "attack": "wda", "norm": norm, "eps": eps, "options": walk, "accuracy": accuracy}
        return what | {"clean_accuracy": 0.9}

    rows = [row("Linf", 0.1, 5, None, 0.5), row("Linf", 0.1, 2, None, 0.6), row("Linf", 0.1, 5, 0.2, 0.7)]
    rows += [row("L2", 0.5, 2, None, 0.8)]
    first, second = figures.accuracy_over_steps(pd.DataFrame(rows)).axes
    drawn = [{str(line.get_label()): list(line.get_ydata()) for line in panel.lines[:-1]} for panel in (first, second)]
    assert drawn[0] == {"cosine": pytest.approx([60, 50]), "0.2": pytest.approx([70])}
    assert drawn[1] == {"cosine": pytest.approx([80])}
    assert [panel.lines[-1].get_ydata()[0] for panel in (first, second)] == [90, 90]  # dotted: the sample's accuracy


@pytest.mark.parametrize("span", [8, 100])
@pytest.mark.parametrize("least", [1.0, 30.0, 3000.0])
def test_numbers_of_passes_do_not_overlap(least: float, span: int) -> None:
    what = {"model": "m", "label": "pgd", "kappa": 1.0, "norm": "L2", "eps": 0.5, "order": "inf", "accuracy": 0.5}
    rows = [what | {"forward": least * times, "backward": least * times} for times in (1, span)]
    figure = figures.accuracy_over_passes(pd.DataFrame(rows))
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    numbers = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len(numbers) >= 2
    assert not axis.get_minorticklabels()
    for one, other in itertools.pairwise(numbers):
        assert not one.get_window_extent().overlaps(other.get_window_extent())
        assert float(one.get_text()) < float(other.get_text())


@pytest.mark.parametrize("seed", range(3))
def test_names_of_attacks_do_not_overlap(seed: int) -> None:
    """Where many attacks leave nearly the same accuracy, each can still be read, and lies in the order of its point."""
    rng = np.random.default_rng(seed)
    what = {"model": "m", "kappa": 1.0, "norm": "L2", "eps": 0.5, "order": "inf"}
    found = rng.choice([0.0, 0.02, 0.5, 0.97, 1.0], 14) + rng.uniform(-0.01, 0.01, 14)
    rows = [
        what | {"label": f"attack-{i}", "accuracy": a, "forward": f, "backward": f}
        for i, (a, f) in enumerate(zip(found.clip(0, 1), rng.uniform(1, 9000, 14), strict=True))
    ]
    figure = figures.accuracy_over_passes(pd.DataFrame(rows))
    [panel] = figure.axes
    figure.draw_without_rendering()
    # the extent of an annotation holds its line too
    words = {text.get_text(): Text.get_window_extent(text) for text in panel.texts}
    assert words.keys() == {row["label"] for row in rows}
    for one, other in itertools.combinations(words.values(), 2):
        assert not one.overlaps(other)
    by_accuracy = sorted(rows, key=lambda row: (row["accuracy"], -row["forward"]))
    heights = [words[row["label"]].y0 for row in by_accuracy]
    assert heights == sorted(heights)
