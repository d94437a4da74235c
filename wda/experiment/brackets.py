"""Brackets of named models, recorded: what an attack leaves above, what a certificate proves below."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wda.checks import choice, number, whole
from wda.experiment.inputs import load_inputs
from wda.experiment.records import case, provenance
from wda.files import check_writable
from wda.threat import Threat, radius_text

if TYPE_CHECKING:
    import pandas as pd

    from wda.evaluate import Bracket

__all__ = ["bracket_table", "run_bracket"]


def run_bracket(
    *,
    data: str = "digits",
    model: str = "digits-mlp",
    norm: str = "Linf",
    eps: float | str = 0.05,
    order: float | str = 1,
    method: str = "auto",
    tolerance: float = 0.01,
    time_limit: float = 60.0,
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float64",
    device: str = "cpu",
    output: str | os.PathLike[str] = "results/bracket",
) -> tuple[Bracket, Path]:
    """Bound the robust accuracy of a named model from both sides, and write a record of it.

    Everything but the model's layers is checked, and a file is written to the output folder and removed again, before
    the first pass.

    Parameters
    ----------
    data, model : str
        Names for `wda.data.load` and `wda.models.load`.
    norm, eps, order
        The threat, see `wda.Threat`; the box is [0, 1].
    method, tolerance, time_limit
        Of the certificate, see `wda.evaluate.bracket`.
    n : int, optional
        Only the first n samples; by default all.
    seed, batch_size : int
        Of the attack.
    dtype : {"float32", "float64"}
        Of the attack; the certificate is in float64 always.
    device : str
        Where the model runs, "cpu" or "cuda".
    output : path
        The folder of the record, made if needed. A record of the same case is replaced.

    Returns
    -------
    Bracket
    Path
        Of the record: what `Bracket.save` writes, the parameters, and `provenance`.

    Raises
    ------
    ValueError, TypeError, DataUnavailable, OSError
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> import tempfile
    >>> from wda import Bracket
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found, path = run_bracket(n=4, method="linear", output=folder)
    ...     Bracket.load(path).lower == found.lower <= found.upper
    True
    """
    from wda.certificates.radius import METHODS
    from wda.evaluate import bracket

    threat = Threat(norm, eps, order)
    choice("method", method, METHODS)
    number("tolerance", tolerance, "a number between 0 and 1", 1e-9, 1)
    number("time_limit", time_limit, "a finite number >= 0", 0, sys.float_info.max)
    seed, batch_size = whole("seed", seed, 0, 2**64 - 1), whole("batch_size", batch_size)
    x, y, net, sums = load_inputs(data, model, n, dtype, device)
    about = {"data": data, "model": model, "norm": norm, "method": method, "tolerance": tolerance}
    about |= {"time_limit": time_limit, "seed": seed, "batch_size": batch_size, "dtype": dtype, "device": device}
    about |= sums
    check_writable(Path(output))

    found = bracket(
        net, x, y, threat, method=method, tolerance=tolerance, time_limit=time_limit, seed=seed, batch_size=batch_size
    )
    name = case({**about, "eps": threat.eps, "order": str(threat.order)})
    path = Path(output) / f"{name}_{method}_n{len(x)}_s{seed}_{dtype}.json"
    found.save(path, **about, provenance=provenance(device))
    return found, path


def bracket_table(found: Bracket, eps: Sequence[float], confidence: float = 0.95) -> pd.DataFrame:
    """A bracket in per cent: a row for each radius, in the balls of order 1, 2 and infinity.

    Parameters
    ----------
    found : Bracket
    eps : sequence of float
    confidence : float
        Of the interval for the population, see `wda.evaluate.Bracket.population`.

    Examples
    --------
    >>> import wda
    >>> from wda.evaluate import Bracket
    >>> found = Bracket(wda.Threat("L2", 1.0), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))
    >>> bracket_table(found, [0.125])[["certified", "attacked", "width"]].round(3).values.tolist()[0]
    [25.0, 37.5, 12.5]
    """
    import pandas as pd

    rows = []
    for order in (1, 2, math.inf):
        inner, outer = found.curve(eps, order), found.population(eps, order, confidence)
        for radius, low, high, lowest, highest in zip(eps, *inner, *outer, strict=True):
            rows.append({
                "ball": f"W{order} {found.threat.norm} {radius_text(radius)}",
                "certified": 100 * float(low),
                "attacked": 100 * float(high),
                "width": 100 * float(high - low),
                "population": f"{100 * lowest:.1f} to {100 * highest:.1f}",
            })  # fmt: skip
    return pd.DataFrame(rows).set_index("ball")
