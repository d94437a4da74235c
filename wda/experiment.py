"""Experiments: attacks run on a named model and data set, recorded one file per attack, and tabled.

Needs the extra ``wda[notebooks]``. A record is a JSON file with the parameters, the versions and the hardware, the
passes and seconds, the aggregates, and a table with one row per sample.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wda.attacks import attack, available, check_kappa, options
from wda.data import load as load_data
from wda.distribution import AdversarialDistribution
from wda.files import write_atomically
from wda.losses import margin
from wda.models import load as load_model
from wda.norms import norm as lengths
from wda.passes import Oracle, batches
from wda.threat import Threat

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["costs", "frame", "interval", "read", "run", "run_notebook", "table"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def run(
    *,
    data: str = "digits",
    model: str = "digits-mlp",
    norm: str = "Linf",
    eps: float | str = 0.1,
    order: float = 1,
    attacks: Sequence[str] = ("fgsm", "pgd", "deepfool", "wda"),
    kappas: Sequence[float] = (1, 1.5, 2, 3, 4),
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float64",
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
    n : int, optional
        Only the first n samples; by default all.
    seed, batch_size : int
    dtype : {"float32", "float64"}
        Double precision makes results agree between machines; large models want single.
    output : path
        The folder of the records, made if needed. A record of the same cell is replaced.

    Returns
    -------
    list of dict
        The records.

    Raises
    ------
    ValueError, TypeError, DataUnavailable, OSError
        The message names the argument, its value and what is accepted.
    """
    threat = Threat(norm, eps, order)  # type: ignore[arg-type]
    cells = _cells(attacks, kappas, threat.order)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: one of {', '.join(map(repr, _DTYPES))} is accepted")
    _check_writable(Path(output))
    x, y = load_data(data, n=n)
    x = x.to(_DTYPES[dtype])
    net = load_model(model).to(_DTYPES[dtype])
    clean = _predict(net, x, y, batch_size)

    records = []
    for name, kappa in cells:
        adv = attack(name, net, x, y, threat, kappa=kappa, seed=seed, batch_size=batch_size)
        about = {"data": data, "model": model, "norm": norm, "eps": threat.eps, "order": str(threat.order)}
        about |= {"attack": name, "kappa": kappa, "n": len(x), "seed": seed, "batch_size": batch_size, "dtype": dtype}
        record = {"parameters": about, **_measure(adv, net, clean, batch_size), "provenance": _provenance()}
        file_name = f"{data}_{model}_{norm}_{threat.eps:.4g}_W{threat.order:g}_{name}_k{kappa:g}.json"
        with write_atomically(Path(output) / file_name.replace(os.sep, "-").replace(":", "-")) as file:
            file.write(json.dumps(record, indent=1, separators=(",", ": ")).encode())
        records.append(record)
    return records


def _cells(names: Sequence[str], kappas: Sequence[float], order: float) -> list[tuple[str, float]]:
    """The (attack, kappa) pairs to run, each checked."""
    if isinstance(names, str) or not names:
        raise ValueError(f"attacks={names!r}: a non-empty list of names is accepted")
    if isinstance(kappas, str) or not kappas:
        raise ValueError(f"kappas={kappas!r}: a non-empty list of numbers >= 1 is accepted")
    for name in names:
        options(name)
    checked = [check_kappa(kappa, order) for kappa in kappas]
    return [(name, kappa) for name in names for kappa in (checked if name == "wda" else [1.0])]


def _check_writable(folder: Path) -> None:
    probe = folder / ".writable"
    with write_atomically(probe) as file:
        file.write(b"")
    probe.unlink()


def _predict(net: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The predicted class of each point, and whether it is its label; ties are errors."""
    with Oracle(net) as oracle:
        rows = batches(len(x), batch_size, "evaluation", progress=False)
        logits = torch.cat([oracle.logits(oracle.to_model(x[batch])).cpu() for batch in rows])
    return logits.argmax(1), margin(logits, y) < 0


def _measure(
    adv: AdversarialDistribution, net: nn.Module, clean: tuple[Tensor, Tensor], batch_size: int
) -> dict[str, Any]:
    """What a distribution does, audited and evaluated afresh."""
    cost = adv.audit()
    points = adv.x_adv
    predicted, correct = _predict(net, points, adv.labels, batch_size)
    accuracy = adv.accuracy(net, batch_size)
    low, high = interval(accuracy, len(adv.x))
    clean_accuracy = clean[1].double().mean().item()
    return {
        "accuracy": accuracy,
        "accuracy_interval": [low, high],
        "clean_accuracy": clean_accuracy,
        "clean_accuracy_interval": list(interval(clean_accuracy, len(adv.x))),
        "risk_ce": adv.risk(net, "ce", batch_size),
        "transport_cost": cost,
        "passes": asdict(adv.counts),
        "samples": {
            "index": list(range(len(points))),
            "label": adv.labels.tolist(),
            "clean_prediction": clean[0].tolist(),
            "distance": [round(d, 8) for d in lengths(points.double() - adv.x.double(), adv.threat.norm).tolist()],
            "rival": torch.where(correct, -1, predicted).tolist(),
            "flipped": (clean[1] & ~correct).int().tolist(),
        },
    }


def interval(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the mean of n independent numbers in [0, 1].

    Exact variance is that of 0-1 numbers, which is the largest possible for a given mean: for a mixture of
    atoms the interval is wider than need be, never narrower.

    Examples
    --------
    >>> [round(side, 3) for side in interval(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.959963984540054
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _provenance() -> dict[str, Any]:
    """Where a number is from: versions, the commit (with a + where files differ from it), the hardware."""
    return {
        "wda": _version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version() -> str:
    import wda

    return wda.__version__


def _commit() -> str | None:
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "wda", "data/models")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    """The processor's name; Linux tells it in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The records of a folder, one row each: parameters, aggregates and passes, without the samples.

    Raises
    ------
    FileNotFoundError
        There is no record.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"folder={str(folder)!r} holds no record")
    return frame(json.loads(file.read_text(encoding="utf-8")) for file in files)


def frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Records as a data frame, one row each, as `read` gives it."""
    import pandas as pd

    flat = [{**r["parameters"], **r["passes"], **{k: r[k] for k in _AGGREGATES}, **r["provenance"]} for r in records]
    return pd.DataFrame(flat)


_AGGREGATES = (
    "accuracy",
    "accuracy_interval",
    "clean_accuracy",
    "clean_accuracy_interval",
    "risk_ce",
    "transport_cost",
)


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in per cent: a row for each model and threat, a column for each attack, `clean` first.

    Parameters
    ----------
    results : DataFrame
        From `read` or `frame`.
    """
    rows = _labelled(results)
    wide = rows.pivot_table(index=["model", "threat"], columns="label", values="accuracy", sort=False)
    wide.insert(0, "clean", rows.groupby(["model", "threat"]).clean_accuracy.first())
    wide.columns.name = None
    return (100 * wide).sort_index()


def costs(results: pd.DataFrame) -> pd.DataFrame:
    """What each attack did: accuracy and its interval in per cent, transport cost, passes per sample."""
    rows = _labelled(results)
    shown = rows[["model", "threat", "label", "accuracy", "transport_cost", "forward", "backward"]].copy()
    shown["accuracy"] = [f"{100 * a:.1f}" for a in rows.accuracy]
    shown.insert(4, "interval", [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in rows.accuracy_interval])
    return shown.rename(columns={"label": "attack"}).round({"transport_cost": 4, "forward": 1, "backward": 1})


def _labelled(results: pd.DataFrame) -> pd.DataFrame:
    """The results in the order of tables, with a `label` for the attack and one for the `threat`."""
    position = {name: place for place, name in enumerate(available())}
    order = results.order.str.removesuffix(".0")
    return results.assign(
        place=results.attack.map(position),
        label=results.attack.where(results.attack != "wda", "wda κ=" + results.kappa.map("{:g}".format)),
        threat="W" + order + " " + results.norm + " " + results.eps.map("{:g}".format),
    ).sort_values(["model", "threat", "place", "kappa"])


def run_notebook(path: str | os.PathLike[str], out: str | os.PathLike[str], **parameters: Any) -> None:
    """Run a notebook with papermill, refusing a parameter that it does not declare.

    Papermill itself goes on with the defaults where a name is misspelt.

    Parameters
    ----------
    path, out : path
        The notebook, and where it goes with its outputs; kept on failure, with the error in it.
    **parameters
        Values for the cell tagged ``parameters``.

    Raises
    ------
    TypeError
        A parameter is not declared.
    FileNotFoundError
        There is no such notebook.
    """
    import papermill

    if not Path(path).is_file():
        raise FileNotFoundError(f"notebook={str(path)!r}: there is no such file")
    declared = papermill.inspect_notebook(str(path))
    for name in parameters.keys() - declared.keys():
        raise TypeError(f"{name}={parameters[name]!r}: {path} declares the parameters {', '.join(declared)}")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(path), str(out), parameters, log_output=True)
