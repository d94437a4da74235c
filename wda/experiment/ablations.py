"""The ablations of the first paper, as sweeps over one model: kappa, step size, run time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from wda.attacks import kind
from wda.checks import number, whole
from wda.data import load as load_data
from wda.experiment.cells import Cell
from wda.experiment.inputs import load_inputs
from wda.experiment.sweeps import Sweep, Task
from wda.threat import Threat

__all__ = ["ablations"]


def ablations(
    *,
    data: str = "digits",
    model: str = "digits-cnn-adv",
    norm: str = "Linf",
    eps: float | str = 0.1,
    kappas: Sequence[float] = (1, 1.25, 1.5, 2, 2.5, 3, 4),
    steps: Sequence[int] = (2, 5, 10, 20, 50),
    step_sizes: Sequence[float | None] = (None, 0.005, 0.02, 0.1, 0.5),
    attacks: Sequence[str] = ("fgsm", "pgd", "wda", "a3", "closest"),
    ns: Sequence[int] = (25, 50, 100),
    n: int | None = 100,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float64",
    device: str = "cpu",
) -> dict[str, Sweep]:
    """Three sweeps over one model, after Figures 3, 5 and 6 of the first paper; all is checked before anything runs.

    Data and model are loaded to that end, so what is wrong with them is found here too.

    Parameters
    ----------
    data, model : str
        Names for `wda.data.load` and `wda.models.load`.
    norm, eps
        Of the balls, see `wda.Threat`; the box is [0, 1].
    kappas : sequence of float
        "wda" runs once for each, in the ball of order 1, and "closest" beside it.
    steps, step_sizes : sequence
        "wda" runs once for each pair, in the ball of order 1 with kappa 1 and one probing step. Step sizes are
        absolute, as in the paper; None is the default, a length that falls from the radius along a cosine.
    attacks : sequence of str
        From `wda.attacks.available`; they run in the ball of order infinity, where each of them is at home.
    ns : sequence of int
        `attacks` run on so many samples each, to see how the seconds grow.
    n : int, optional
        Samples of the first two sweeps; None for all.
    seed, batch_size, dtype, device
        As for `Cell`.

    Returns
    -------
    dict of Sweep
        "kappa", "steps" and "cost".

    Raises
    ------
    ValueError, TypeError, DataUnavailable
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> found = ablations(kappas=[1, 2], steps=[5], step_sizes=[None, 0.1], attacks=["pgd"], ns=[10, 20])
    >>> {name: len(sweep.tasks) for name, sweep in found.items()}
    {'kappa': 3, 'steps': 2, 'cost': 2}
    """
    on_average, everywhere = Threat(norm, eps, 1), Threat(norm, eps, "inf")
    shared: dict[str, Any] = {"data": data, "model": model, "norm": norm, "seed": seed, "batch_size": batch_size}
    shared |= {"dtype": dtype, "device": device}

    def task(attack: str, ball: Threat, size: int | None, **chosen: Any) -> Task:
        if kind(attack) != "nearest":
            chosen |= {"eps": ball.eps, "order": ball.order}
        return Task(Cell(attack=attack, n=size, **shared, **chosen), (ball,))

    kappas = _each("kappas", kappas, lambda name, k: number(name, k, "finite numbers >= 1", 1, sys.float_info.max))
    steps, step_sizes = _each("steps", steps, whole), _each("step_sizes", step_sizes, _step_size)
    attacks, ns = _each("attacks", attacks, _name), _each("ns", ns, whole)
    walks = [{"steps": count, "probe_steps": 1, "step_size": size} for size in step_sizes for count in steps]
    tasks = {
        "kappa": [*(task("wda", on_average, n, kappa=kappa) for kappa in kappas), task("closest", on_average, n)],
        "steps": [task("wda", on_average, n, options=walk) for walk in walks],
        "cost": [task(attack, everywhere, size) for attack in attacks for size in ns],
    }
    load_inputs(data, model, n, dtype, device)
    try:
        load_data(data, n=max(ns))
    except ValueError as error:
        raise ValueError(f"ns={ns}: {error}") from error
    return {name: Sweep(name, "", (), tuple(of)) for name, of in tasks.items()}


def _each(name: str, values: Sequence[Any], check: Callable[[str, Any], Any]) -> list[Any]:
    """The values of a list, each checked; an error where it is no list, is empty, or has a value twice."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f'{name}={values!r}: a list of at least one value is accepted, in a shell -p {name} "[...]"')
    checked = [check(name, value) for value in values]
    if len(set(checked)) < len(checked):
        raise ValueError(f"{name}={values!r}: each value once is accepted")
    return checked


def _step_size(name: str, size: float | None) -> float | None:
    return None if size is None else number(name, size, "finite numbers > 0, or None,", 5e-324, sys.float_info.max)


def _name(name: str, attack: str) -> str:
    kind(attack)
    return attack
