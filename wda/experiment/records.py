"""Records: what one run found, as a JSON file, and what follows from it.

A record holds the parameters, the versions and the hardware, the passes and seconds, a table with one row per sample,
and aggregates that follow from that table alone. So the records of shards merge into that of the whole sample, and one
record of distances serves every budget.

A file of one is checked whole when it is read: its name and its parameters, its table and its aggregates have to agree.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wda import __version__
from wda.attacks import kind, options
from wda.budget import allocate
from wda.checks import stored_number
from wda.experiment.contents import check_cell
from wda.files import naming, read_json, write_json
from wda.losses import ce, margin, rival_logits
from wda.threat import Threat

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "aggregates",
    "case",
    "file_name",
    "frame",
    "interval",
    "load",
    "merge",
    "method",
    "provenance",
    "read",
    "samples",
    "save",
    "within",
]

Record = dict[str, Any]

_DECIMALS = 8  # of what is kept of distances and losses: beyond them the size of a batch has its say


def samples(clean: Tensor, moved: Tensor, y: Tensor, distance: Tensor, first: int = 0) -> dict[str, list[Any]]:
    """The table of a record: a row for each sample.

    Parameters
    ----------
    clean, moved : Tensor, shape (N, K)
        Logits at the samples, and at the points they were moved to.
    y : int64 Tensor, shape (N,)
        Labels.
    distance : float64 Tensor, shape (N,)
        From sample to point; infinite where none was found.
    first : int
        The index of the first of these samples.

    Returns
    -------
    dict of lists
        index; label; clean_prediction, which is the label only where that logit is strictly the largest; clean_loss
        and loss, the cross-entropy at sample and point; distance; rival, the class that wins at the point, or -1 where
        the label does; flipped, whether the sample is right and the point wrong. What is infinite or NaN is None.

    Examples
    --------
    >>> clean, moved = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    >>> rows = samples(clean, moved, torch.tensor([0]), torch.tensor([0.5]))
    >>> rows["distance"], rows["rival"], rows["flipped"]
    ([0.5], [1], [1])
    """
    right, wrong = margin(clean, y) < 0, ~(margin(moved, y) < 0)
    return {
        "index": list(range(first, first + len(y))),
        "label": y.tolist(),
        "clean_prediction": torch.where(right, y, rival_logits(clean, y).argmax(1)).tolist(),
        "clean_loss": _rounded(ce(clean, y)),
        "loss": _rounded(ce(moved, y)),
        "distance": _rounded(distance),
        "rival": torch.where(wrong, rival_logits(moved, y).argmax(1), -1).tolist(),
        "flipped": (right & wrong).int().tolist(),
    }


def _rounded(values: Tensor) -> list[float | None]:
    """Numbers as they are kept; JSON has no word for those that are not finite."""
    return [round(value, _DECIMALS) if math.isfinite(value) else None for value in values.tolist()]


def aggregates(rows: Mapping[str, Sequence[Any]], weight: Sequence[float], threat: Threat | None = None) -> Record:
    """What follows from the table of a record, where the share `weight` of each sample's mass moves.

    Parameters
    ----------
    rows : mapping
        As `samples` gives it.
    weight : sequence of N floats
    threat : Threat, optional
        Whose order the transport cost has. Distances have been rounded; as every distribution was audited before that,
        its cost is at most the radius, and so is the one here.

    Returns
    -------
    dict
        Accuracies, the cross-entropy risk and their 95 % intervals over the sample, and the transport cost. A risk is
        None where the loss of a sample is.

    Examples
    --------
    >>> clean, moved = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    >>> rows = samples(clean, moved, torch.tensor([0]), torch.tensor([0.5]))
    >>> found = aggregates(rows, [0.5], Threat("L2", 0.25))
    >>> found["clean_accuracy"], found["accuracy"], found["transport_cost"]
    (1.0, 0.5, 0.25)
    """
    n = len(weight)
    was_right = [label == guess for label, guess in zip(rows["label"], rows["clean_prediction"], strict=True)]
    clean_accuracy = sum(was_right) / n
    moved = zip(weight, was_right, rows["rival"], strict=True)
    accuracy = math.fsum((1 - w) * before + w * (rival == -1) for w, before, rival in moved) / n
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(interval(accuracy, n)),
        "clean_accuracy": clean_accuracy,
        "clean_accuracy_interval": list(interval(clean_accuracy, n)),
        **_risk(rows, weight),
        "transport_cost": 0.0 if threat is None else min(_cost(rows["distance"], weight, threat.order), threat.eps),
    }


def _risk(rows: Mapping[str, Sequence[Any]], weight: Sequence[float]) -> Record:
    if None in rows["loss"] or None in rows["clean_loss"]:
        return {"risk_ce": None, "risk_ce_interval": None}
    n, terms = len(weight), zip(weight, rows["clean_loss"], rows["loss"], strict=True)
    losses = [(1 - w) * before + w * after for w, before, after in terms]
    risk = math.fsum(losses) / n
    error = _Z * math.sqrt(math.fsum((loss - risk) ** 2 for loss in losses) / n / n)
    return {"risk_ce": risk, "risk_ce_interval": [risk - error, risk + error]}


def _cost(distance: Sequence[float | None], weight: Sequence[float], order: float) -> float:
    paid = [(w, d) for w, d in zip(weight, distance, strict=True) if w and d]
    if not paid:
        return 0.0
    longest = max(d for _, d in paid)
    if math.isinf(order):
        return longest
    total = math.fsum(w * (d / longest) ** order for w, d in paid) / len(weight)
    return float(longest * total ** (1 / order))


def within(record: Record, threat: Threat) -> Record:
    """The record that a record of nearest errors makes for one ball: the budget goes where it flips the most.

    Distances are taken half a unit of their last decimal longer than they are kept, so that what is spent is in the
    ball whichever way they were rounded.

    Raises
    ------
    ValueError
        The record is one of a ball already, or of another norm.

    Examples
    --------
    >>> clean, moved = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    >>> rows = samples(clean, moved, torch.tensor([0]), torch.tensor([0.5]))
    >>> record = {"parameters": {"attack": "closest", "norm": "L2", "eps": None}, "samples": rows}
    >>> round(within(record, Threat("L2", 0.25))["accuracy"], 6)
    0.5
    """
    parameters = record["parameters"]
    if parameters["eps"] is not None or parameters["norm"] != threat.norm:
        raise ValueError(f"threat={threat}: a record of distances in its norm is accepted, not one of {parameters}")
    rows = record["samples"]
    kept = torch.tensor([math.inf if d is None else d for d in rows["distance"]], dtype=torch.float64)
    weight = allocate(kept.where(kept == 0, kept + 0.5 * 10.0**-_DECIMALS), threat).tolist()
    ball = {"eps": threat.eps, "order": str(threat.order)}
    return {**record, "parameters": {**parameters, **ball}, **aggregates(rows, weight, threat)}


def merge(records: Sequence[Record]) -> Record:
    """The record of a whole sample from those of its shards: the same as if it had been run at once.

    Passes are means over all samples, seconds a sum, and `provenance` the first one's. Each shard inspects the model
    with two passes of its own; those of one are counted. Passes may still differ a little for attacks that end on a
    boundary, where rounding decides whether one more is needed.

    Raises
    ------
    ValueError
        They are not all the shards of one cell, on one model and one data set.

    Examples
    --------
    >>> from wda.experiment import Cell, run_cell
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shards = [run_cell(Cell(n=10, shard=k, shards=2), folder) for k in range(2)]
    >>> merge(shards)["samples"]["index"] == list(range(10))
    True
    """
    records = sorted(records, key=lambda record: int(record["parameters"]["shard"]))
    whole = [{**record["parameters"], "shard": 0, "shards": 1} for record in records]
    first, count = records[0], records[0]["parameters"]["shards"]
    if [record["parameters"]["shard"] for record in records] != list(range(count)):
        raise ValueError(f"shards {[r['parameters']['shard'] for r in records]}: 0 to {count - 1} are accepted")
    for other in whole[1:]:
        if differ := [key for key in other if other[key] != whole[0][key]]:
            raise ValueError(
                f"shards of {first['parameters']['model']!r} differ in {', '.join(differ)}: run them again"
            )
    rows = {key: [row for record in records for row in record["samples"][key]] for key in first["samples"]}
    merged = {"parameters": whole[0], "samples": rows, "provenance": first["provenance"]}
    return {**merged, "passes": _passes(records), **outcome(whole[0], rows)}


def _passes(records: Sequence[Record]) -> dict[str, float]:
    sizes = [len(record["samples"]["index"]) for record in records]
    n, parts = sum(sizes), [record["passes"] for record in records]
    backward = math.fsum(size * part["backward"] for size, part in zip(sizes, parts, strict=True))
    vanished = math.fsum(s * p["backward"] * p["vanished"] for s, p in zip(sizes, parts, strict=True))
    forward = math.fsum(size * part["forward"] for size, part in zip(sizes, parts, strict=True))
    checks = math.fsum(size * part.get("checks", 0.0) for size, part in zip(sizes, parts, strict=True))
    older = sum("checks" not in part for part in parts)
    return {
        "forward": round((forward - _INSPECTION * max(0, older - 1)) / n, _DECIMALS),
        "backward": round(backward / n, _DECIMALS),
        "vanished": round(vanished / backward if backward else 0.0, _DECIMALS),
        **({"checks": round(checks / n, _DECIMALS)} if older < len(parts) else {}),
        "seconds": math.fsum(part["seconds"] for part in parts),
    }


# So many forward passes before an attack count as its own in records that do not say what checks of the model took.
_INSPECTION = 2


def outcome(parameters: Mapping[str, Any], rows: Mapping[str, Sequence[Any]]) -> Record:
    """The aggregates of a record: within its ball, or of the distances alone."""
    n = len(rows["index"])
    if parameters["eps"] is not None:
        threat = Threat(parameters["norm"], parameters["eps"], parameters["order"])
        return aggregates(rows, [_share(parameters["kappa"], threat.order)] * n, threat)
    found = sum(d is not None for d in rows["distance"]) / n
    clean = aggregates(rows, [0.0] * n)
    kept = {key: clean[key] for key in ("clean_accuracy", "clean_accuracy_interval")}
    return {**kept, "found": found, "found_interval": list(interval(found, n))}


def _share(kappa: float, order: float) -> float:
    """Of each sample's mass that moves (eq. 10 of the first paper)."""
    return 1.0 if math.isinf(order) else float(kappa**-order)


# The 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054


def interval(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the mean of n independent numbers in [0, 1].

    It takes the variance of 0-1 numbers, the largest possible for a given mean: for a mixture of atoms the interval
    is wider than need be, never narrower.

    Examples
    --------
    >>> [round(side, 3) for side in interval(0.5, 100)]
    [0.404, 0.596]
    """
    z = _Z
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Where a number is from: versions, the commit (with a + where files differ from it), the hardware used.

    Examples
    --------
    >>> sorted(provenance())
    ['commit', 'cpu', 'gpu', 'python', 'threads', 'torch', 'wda']
    """
    return {
        "wda": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _commit() -> str | None:
    folder = Path(__file__).parents[2]
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


def save(record: Record, path: str | os.PathLike[str]) -> None:
    """Write a record, stamped and atomically.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"study": "mine", "seconds": 0.5}, f"{folder}/mine.json")
    ...     read_json(f"{folder}/mine.json")
    {'study': 'mine', 'seconds': 0.5}
    """
    write_json(path, record)


def load(path: str | os.PathLike[str]) -> Record:
    """Read the record of a cell, and check it whole: by its checksum, entry by entry, and against itself.

    The aggregates are computed anew from the table, and the name of the file from the parameters. Neither this nor the
    checksum is proof against somebody who edits all of them; the checksum tells of damage. Records from before there
    were checksums are read too.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is no record, or damaged; the message names it.

    Examples
    --------
    >>> from wda.experiment import Cell, run_cell
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record = run_cell(Cell(n=5), folder)
    ...     load(f"{folder}/{Cell(n=5).name}.json") == record
    True
    """
    with naming(path, "record"):
        record = read_json(path)
        check_cell(record)
        accepted = _file_names(record["parameters"])
        if Path(path).name not in accepted:
            raise ValueError(f"its parameters are those of {accepted[-1]}")
        _check_aggregates(record)
    return record


def _file_names(p: Mapping[str, Any]) -> list[str]:
    """What the file of a record may be called: after the sample as a whole or its size, by `run` and by `run_cell`."""
    by_name = {f"{key}_sha256": name_mark(p[key]) for key in ("data", "model")}
    return [file_name({**p, "n": n, **marks}) for n in (None, p["n"]) for marks in ({}, by_name)]


def name_mark(name: str) -> str:
    """What stands for a name of data or a model that no file can bear: of a record, before its inputs are loaded."""
    return hashlib.sha256(name.encode()).hexdigest()


def _check_aggregates(record: Record) -> None:
    """Raise an error where the aggregates do not follow from the table, or more is spent than the ball has."""
    p, rows = record["parameters"], record["samples"]
    if p["eps"] is None:
        follow = outcome(p, rows)
    else:
        threat = Threat(p["norm"], p["eps"], p["order"])
        if "loss" not in rows:  # at first losses were not kept, and the risk is as it was stored
            rows = {**rows, "loss": [None] * p["n"], "clean_loss": [None] * p["n"]}
        if kind(p["attack"]) == "nearest":
            follow = within({"parameters": {**p, "eps": None, "order": None}, "samples": rows}, threat)
        else:
            share = _share(p["kappa"], threat.order)
            cost = _cost(rows["distance"], [share] * len(rows["index"]), threat.order)
            if cost > threat.eps + _SLACK:
                raise ValueError(f"its table has the transport cost {cost!r}, more than eps={threat.eps!r}")
            follow = outcome(p, rows)
    if "loss" not in record["samples"] and p["eps"] is not None and record["risk_ce"] is not None:
        stored_number("risk_ce", record["risk_ce"], *record["risk_ce_interval"])
    for name in _AGGREGATES if p["eps"] is not None else ("clean_accuracy", "found", "found_interval"):
        if name.startswith("risk") and "loss" not in record["samples"]:
            continue
        if not _close(record[name], follow[name]):
            raise ValueError(f"{name}={record[name]!r}, and {follow[name]!r} follows from its table")


_SLACK = 1e-7  # what the rounding of distances and losses, and of a machine, can do to an aggregate


def _close(stored: Any, follows: Any) -> bool:
    if isinstance(follows, list):
        return isinstance(stored, list) and len(stored) == len(follows) and all(map(_close, stored, follows))
    if follows is None:
        return stored is None
    return type(stored) in (int, float) and abs(stored - follows) <= _SLACK * max(1.0, abs(follows))


def file_name(p: Mapping[str, Any]) -> str:
    """A name that differs wherever a result could, but for the device and the versions: of those the last is kept.

    What a file or a function of one's own holds may change under its name, so a checksum follows that.

    Examples
    --------
    >>> about = {"data": "digits", "model": "digits-mlp", "norm": "L2", "eps": 0.5, "order": "1.0", "attack": "pgd"}
    >>> about |= {"options": {"steps": 9}, "kappa": 1, "n": 20, "seed": 0, "dtype": "float64"}
    >>> file_name(about)
    'digits_digits-mlp_L2_0.5_W1_pgd-steps=9_k1_n20_s0_float64.json'
    """
    kappa = repr(p["kappa"]).removesuffix(".0")
    attack = re.sub(r"[^\w.+=-]+", "-", method(p["attack"], p["options"]))
    n = "all" if p["n"] is None else p["n"]
    shard = f"_{p['shard'] + 1}of{p['shards']}" if p.get("shards", 1) > 1 else ""
    return f"{case(p)}_{attack}_k{kappa}_n{n}_s{p['seed']}_{p['dtype']}{shard}.json"


def case(p: Mapping[str, Any]) -> str:
    """Data, model and ball, or norm, as part of the name of a file.

    Examples
    --------
    >>> case({"data": "digits", "model": "digits-mlp", "norm": "L2", "eps": None})
    'digits_digits-mlp_L2'
    """
    data, model = (_file_name_part(p[key], p.get(f"{key}_sha256", "")) for key in ("data", "model"))
    ball = p["norm"] if p["eps"] is None else f"{p['norm']}_{p['eps']!r}_W{p['order'].removesuffix('.0')}"
    return f"{data}_{model}_{ball}"


def _file_name_part(name: str, sha256: str) -> str:
    # the checksum stands for the weights too, whose own name may be as long as a record's
    plain = re.sub(r"[^\w.-]+", "-", name.partition("@")[0].removesuffix(".npz")).strip(".-")
    return f"{plain}-{sha256[:8]}" if name.endswith(".npz") or {*name} & {*":@"} else plain


def method(name: str, chosen: Mapping[str, Any]) -> str:
    """An attack and those of its options that are not the defaults.

    Examples
    --------
    >>> method("pgd", {"steps": 9, "loss": "ce"})
    'pgd steps=9'
    """
    given = {key: chosen[key] for key, usual in options(name).items() if chosen.get(key, usual) != usual}
    return " ".join([name, *(f"{key}={value}" for key, value in given.items())])


def read(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The records of a folder, one row each: parameters, aggregates and passes, without the samples.

    Raises
    ------
    FileNotFoundError
        There is no record.
    ValueError
        A .json file in the folder is no record, or damaged, or one of nearest errors, see `within`.

    Examples
    --------
    >>> import tempfile
    >>> from wda.experiment import run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = run(n=10, attacks=["fgsm"], output=folder)
    ...     read(folder).attack.tolist()
    ['fgsm']
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"folder={str(folder)!r} holds no record")
    try:
        return frame(map(load, files))
    except ValueError as error:
        raise ValueError(f"folder={str(folder)!r} holds a .json file that makes no row: {error}") from error


def frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Records as a data frame, one row each, as `read` gives it.

    Where one name stands for several models, or for several files of data, the checksums tell them apart.

    Raises
    ------
    ValueError
        A record is of nearest errors, which serve every ball, and so of none yet: see `within`.

    Examples
    --------
    >>> import tempfile
    >>> from wda.experiment import run
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     frame(run(n=10, attacks=["fgsm", "pgd"], output=folder)).attack.tolist()
    ['fgsm', 'pgd']
    """
    import pandas as pd

    records = list(records)
    if of_distances := [r["parameters"]["attack"] for r in records if r["parameters"]["eps"] is None]:
        raise ValueError(f"a record of {of_distances[0]!r} serves every ball: name one, by wda.experiment.within")
    # what a record says beside its parameters and results cannot take their place
    flat = [{**r["provenance"], **r["passes"], **r["parameters"], **{k: r[k] for k in _AGGREGATES}} for r in records]
    rows = pd.DataFrame(flat)
    for name, whole_of in (("model", ["model"]), ("data", ["data", "n"])):
        several = rows.groupby(whole_of)[f"{name}_sha256"].transform("nunique") > 1
        rows.loc[several, name] += " " + rows[f"{name}_sha256"].str[:8]
    return rows


_AGGREGATES = (
    "accuracy",
    "accuracy_interval",
    "clean_accuracy",
    "clean_accuracy_interval",
    "risk_ce",
    "risk_ce_interval",
    "transport_cost",
)
