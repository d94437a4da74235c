"""Fine-tuning of named models, recorded: each epoch, and how strong attacks find the model before and after."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wda.budget import robust_accuracy
from wda.checks import choice, number, stored_number, stored_numbers, whole
from wda.data import load as load_data
from wda.experiment.contents import check_provenance, check_sums, check_threat
from wda.experiment.inputs import checksum, load_inputs
from wda.experiment.records import Record, case, provenance, save
from wda.files import check_writable, naming, read_json, write_atomically
from wda.passes import Oracle
from wda.threat import Threat

if TYPE_CHECKING:
    import pandas as pd

    from wda.training import FineTuned

__all__ = ["read_finetune", "run_finetune", "tuning_table"]


def run_finetune(
    *,
    data: str = "digits",
    model: str = "digits-cnn",
    norm: str = "Linf",
    eps: float | str = 0.1,
    order: float | str = 2,
    variant: str = "whole",
    tau: float = 0.01,
    eta: float = 1.0,
    beta: float = 6.0,
    noise: float = 0.01,
    epochs: int = 20,
    batch_size: int = 512,
    penalty: str = "ce",
    attack: str = "wpgd",
    attack_options: Mapping[str, Any] | None = None,
    train: str | None = None,
    validation: float = 0.2,
    n_train: int | None = None,
    n: int | None = None,
    seed: int = 0,
    dtype: str = "float64",
    device: str = "cpu",
    autocast: bool = False,
    output: str | os.PathLike[str] = "results/finetune",
) -> tuple[FineTuned, Record]:
    """Fine-tune a named model, measure it before and after, and write a record and the weights.

    While it runs its state is in the folder, in a file ``.pt`` of its own; a run that was killed goes on from there.
    Once the record is written that file is removed.

    Parameters
    ----------
    data, model : str
        Names for `wda.data.load` and for `wda.models.load`. The test split of the data judges, the other one trains.
    norm, eps, order
        The threat, see `wda.Threat`; the box is [0, 1]. The second paper's delta is `eps`.
    variant, tau, eta, beta, noise, epochs, batch_size, penalty, attack, attack_options, autocast
        See `wda.training.finetune`.
    train : str, optional
        A name or a path for `wda.data.load`, to train on in place of the training split of `data`. Needed where `data`
        is a path, which has no splits.
    validation : float
        The share of the training split that is not trained on, but selects the epoch; drawn by `seed`.
    n_train, n : int, optional
        Only the first of the training split, and of the test split; by default all.
    seed : int
    dtype : {"float32", "float64"}
    device : str
        "cpu" or "cuda".
    output : path
        The folder of the record and the weights, made if needed. Those of the same run, but for the number of epochs,
        are replaced. `wda.models.load` takes the weights as ``"MODEL@FILE.weights.pt"``.

    Returns
    -------
    FineTuned
    dict
        The record: parameters; the history, epoch by epoch; for "before" and "after" the score on the test split under
        W-PGD-20, as published, and the distances of the nearest errors that "closest" finds, None where there is none;
        `provenance`.

    Raises
    ------
    ValueError, TypeError, DataUnavailable, OSError, FloatingPointError
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     small = {"model": "digits-mlp", "n_train": 60, "n": 20, "epochs": 1, "batch_size": 24}
    ...     tuned, record = run_finetune(**small, eps=0.05, output=folder)
    ...     len(record["history"]), len(record["after"]["distance"]), len(list(Path(folder).iterdir()))
    (2, 20, 2)
    """
    from wda.training import finetune
    from wda.training.run import Settings

    threat = Threat(norm, eps, order)
    if threat.order == 1:
        raise ValueError(f"order={order!r}: a number > 1, or inf, is accepted: W-PGD judges the result")
    how: dict[str, Any] = {"variant": variant, "tau": tau, "eta": eta, "beta": beta, "noise": noise, "penalty": penalty}
    how |= {"batch_size": batch_size, "attack": attack, "seed": seed, "autocast": autocast}
    how = asdict(Settings(**how, attack_options={} if attack_options is None else attack_options))
    epochs = whole("epochs", epochs)
    held_out = number("validation", validation, "a number between 0 and 1", 1e-9, 1 - 1e-9)
    x, y, net, sums = load_inputs(data, model, n, dtype, device)
    if train is None and data.endswith(".npz"):
        raise ValueError(f"train=None: {data!r} is one file, to test on; the path of another, to train on, is accepted")
    sample = load_data(train or data, "train", n_train)
    sums["train_sha256"] = checksum(sample)
    if sums["train_sha256"] == sums["data_sha256"]:
        raise ValueError(f"train={train!r}: these are the samples of {data!r}, to test on; others are accepted")
    training, selecting = _parts(sample, held_out, how["seed"], x.dtype)
    about = {"data": data, "model": model, "norm": norm, "eps": threat.eps, "order": str(threat.order), **how, **sums}
    about |= {"epochs": epochs, "train": train or data, "validation": held_out, "n_train": len(sample[0])}
    about |= {"n_validation": len(selecting[0]), "n": len(x), "dtype": dtype, "device": device}
    check_writable(Path(output))

    path = Path(output) / _file_name(about)
    run: dict[str, Any] = {"epochs": epochs, "checkpoint": path.with_suffix(".pt"), "test": (x, y)}
    tuned = finetune(net, training, selecting, threat, **how, **run)
    history = [asdict(epoch) for epoch in tuned.history]
    before, after = (_judged(one, x, y, threat, how["seed"], how["batch_size"]) for one in (net, tuned.model))
    record = {"parameters": about, "epoch": tuned.epoch, "before": before, "after": after, "history": history}
    record["provenance"] = provenance(device)
    with write_atomically(path.with_suffix(".weights.pt")) as file:
        torch.save(tuned.model.state_dict(), file)
    save(record, path)
    path.with_suffix(".pt").unlink()
    return tuned, record


def _parts(
    sample: tuple[Tensor, Tensor], held_out: float, seed: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What is trained on, and what selects the epoch."""
    from wda.training import permutation

    x, y = sample[0].to(dtype), sample[1]
    rows = permutation(len(x), seed, 0)
    count = round(held_out * len(x))
    if not 0 < count < len(x):
        raise ValueError(f"validation={held_out!r} of {len(x)} training samples: both parts need at least one")
    first, second = rows[count:], rows[:count]
    return (x[first], y[first]), (x[second], y[second])


def _judged(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, batch_size: int) -> Record:
    """The published measures, and distances to the nearest errors, which serve every budget."""
    from wda.attacks import distances
    from wda.training import score

    x, y = (part.to(next(net.parameters()).device) for part in (x, y))
    with Oracle(net) as oracle:
        loss = "redlr" if oracle.classes(x[:1]) > 2 else "margin"
    published = score(net, x, y, threat, options={"loss": loss}, seed=seed, batch_size=batch_size)
    found = distances(net, x, y, threat.norm, threat.box, seed=seed, batch_size=batch_size)
    far = [round(d, 8) if d < math.inf else None for d in found.distance.tolist()]
    return {**asdict(published), "distance": far}


def _file_name(about: Mapping[str, Any]) -> str:
    """A name that differs wherever what decides the run does, but for how long it is and where it runs."""
    decides = {key: value for key, value in about.items() if key not in ("epochs", "device")}
    mark = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    tuned = f"{about['variant']}_tau{about['tau']:g}_eta{about['eta']:g}_{about['attack']}_s{about['seed']}"
    return f"{case(about)}_{tuned}_{about['dtype']}_{mark}.json"


def read_finetune(path: str | os.PathLike[str]) -> Record:
    """Read a record of `run_finetune`, and check it whole: by its checksum, entry by entry, and against itself.

    The name of the file follows from the parameters, the epoch from the history, the accuracy from the distances. The
    checksum tells of damage, not of malice; records from before there were checksums are read too.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is no such record, or damaged; the message names it.

    Examples
    --------
    >>> read_finetune("results/finetune/one.json")  # doctest: +SKIP
    """
    with naming(path, "record of a fine-tuning"):
        record = read_json(path)
        _check(record)
        if Path(path).name != (accepted := _file_name(record["parameters"])):
            raise ValueError(f"its parameters are those of {accepted}")
    return record


def _check(record: Record) -> None:
    from wda.training.run import Settings

    p, history = record["parameters"], record["history"]
    for name in ("data", "model", "train", "device"):
        if not isinstance(p[name], str):
            raise ValueError(f"{name}={p[name]!r}: text is accepted")
    check_threat(p)
    check_sums(p, "data", "model", "train")
    check_provenance(record)
    choice("dtype", p["dtype"], ("float32", "float64"))
    stored_number("validation", p["validation"], 0, 1)
    for name in ("n", "n_train", "n_validation", "epochs"):
        whole(name, p[name])
    settings = {field.name: p[field.name] for field in fields(Settings)}
    if asdict(Settings(**settings)) != settings:
        raise ValueError(f"its settings are {settings}")

    if not isinstance(history, list) or len(history) != p["epochs"] + 1:
        raise ValueError(f"history: {p['epochs'] + 1} epochs are accepted")
    for place, epoch in enumerate(history):
        stored_numbers("history: epoch", [epoch["epoch"]], 1, place, place, int)
        for name in ("validation", "test"):
            _check_score(f"history[{place}]: {name}", epoch[name])
        stored_numbers(f"history[{place}]", [epoch["loss"], epoch["clean_loss"]], 2, -_MOST, missing=not place)
        for name in ("upsilon", "budget"):
            stored_numbers(f"history[{place}]: {name}", epoch[name], len(epoch["upsilon"]))
    best = [epoch["validation"]["distributional"] for epoch in history[1:]]
    if record["epoch"] != best.index(max(best)) + 1:
        raise ValueError(f"epoch={record['epoch']!r}, and {best.index(max(best)) + 1} follows from its history")
    for when, epoch in (("before", history[0]), ("after", history[record["epoch"]])):
        found = record[when]
        _check_score(when, found)
        for name in {"distance", "radius", "longer"} & found.keys():
            few = name != "distance" and isinstance(found[name], list)  # some are of the first images only
            stored_numbers(f"{when}: {name}", found[name], len(found[name]) if few else p["n"], missing=True)
        right = sum(distance != 0 for distance in found["distance"]) / p["n"]
        if not math.isclose(found["clean"], right, abs_tol=1e-9):
            raise ValueError(f"{when}: clean={found['clean']!r}, and {right!r} follows from its distances")
        if any(found[name] != epoch["test"][name] for name in ("clean", "pointwise")):
            raise ValueError(f"{when}: the score is not that of epoch {epoch['epoch']}")


def _check_score(name: str, score: Mapping[str, Any]) -> None:
    for measure in ("clean", "pointwise", "distributional"):
        stored_number(f"{name}: {measure}", score[measure], 0, 1)
    stored_numbers(f"{name}: upsilon", [score["upsilon"]], 1, missing=True)


_MOST = sys.float_info.max


def tuning_table(record: Record, orders: Sequence[float] = (math.inf, 2, 1)) -> pd.DataFrame:
    """Accuracies of a model before and after fine-tuning, in per cent: a column for each attack.

    The columns "W-PGD-20" are the second paper's measures. Those that say "strongest" are what the optimal budget makes
    of the nearest errors found, in balls of the record's radius.

    Parameters
    ----------
    record : dict
        From `run_finetune`.
    orders : sequence of float
        Of the balls for the strongest attack.

    Examples
    --------
    >>> one = {"clean": 1.0, "pointwise": 0.5, "distributional": 0.5, "distance": [0.1, 0.3, None, 0.0]}
    >>> table = tuning_table({"parameters": {"order": "2", "eps": 0.2}, "before": one, "after": one}, orders=(1,))
    >>> table.loc["after"].tolist()
    [100.0, 50.0, 50.0, 25.0]
    """
    import pandas as pd

    order, eps = (record["parameters"][key] for key in ("order", "eps"))
    names = {"clean": "clean", "pointwise": "W_inf W-PGD-20", "distributional": f"W_{float(order):g} W-PGD-20"}
    rows = {}
    for when in ("before", "after"):
        found = record[when]
        far = torch.tensor([math.inf if d is None else d for d in found["distance"]], dtype=torch.float64)
        rows[when] = {name: 100 * found[key] for key, name in names.items()}
        rows[when] |= {f"W_{p:g} strongest": 100 * float(robust_accuracy(far, eps, p)) for p in orders}
    return pd.DataFrame.from_dict(rows, orient="index")
