"""Experiments: attacks run on a named model and data set, recorded one file per attack, and tabled.

Needs the extra ``wda[notebooks]``. A record is a JSON file with the parameters, the versions and the hardware, the
passes and seconds, the aggregates, and a table with one row per sample.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wda import __version__
from wda.attacks import attack, available, check_kappa, options
from wda.certificates.radius import METHODS
from wda.checks import choice, number, whole
from wda.data import load as load_data
from wda.distribution import AdversarialDistribution
from wda.evaluate import Bracket, bracket
from wda.files import write_atomically
from wda.losses import ce, margin, rival_logits
from wda.models import load as load_model
from wda.passes import check_sample
from wda.threat import Threat, radius_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "bracket_table",
    "check_parameters",
    "costs",
    "frame",
    "interval",
    "partial",
    "provenance",
    "read",
    "run",
    "run_bracket",
    "run_notebook",
    "table",
]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def run(
    *,
    data: str = "digits",
    model: str = "digits-mlp",
    norm: str = "Linf",
    eps: float | str = 0.1,
    order: float | str = 1,
    attacks: Sequence[str] = ("fgsm", "pgd", "deepfool", "wda", "wda++", "closest"),
    kappas: Sequence[float] = (1, 1.5, 2, 3, 4),
    settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "float64",
    device: str = "cpu",
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
    settings : mapping
        Options of attacks, by their names, where they are not to have their defaults: ``{"pgd": {"steps": 100}}``.
    n : int, optional
        Only the first n samples; by default all.
    seed, batch_size : int
    dtype : {"float32", "float64"}
        Double precision makes results agree between machines; large models want single.
    device : str
        Where the model runs, "cpu" or "cuda".
    output : path
        The folder of the records, made if needed. A record of the same cell is replaced.

        One file is kept for each data set, model, threat, attack, kappa, n, seed and dtype. The names of files and
        functions of one's own are followed by a checksum of what they hold.

    Returns
    -------
    list of dict
        The records.

    Raises
    ------
    ValueError, TypeError, DataUnavailable, OSError
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records = run(n=10, attacks=["fgsm"], output=folder)
    >>> records[0]["parameters"]["attack"], len(records[0]["samples"]["flipped"])
    ('fgsm', 10)
    """
    threat = Threat(norm, eps, order)
    cells = _cells(attacks, kappas, threat.order)
    chosen = _settings(attacks, settings)
    seed, batch_size = whole("seed", seed, 0, 2**64 - 1), whole("batch_size", batch_size)
    precision = _DTYPES[choice("dtype", dtype, _DTYPES)]
    x, y = load_data(data, n=n)
    y = check_sample(x, y, threat.box)
    net = load_model(model)
    about = {"data": data, "model": model, "norm": norm, "eps": threat.eps, "order": str(threat.order), "n": len(x)}
    about |= {"seed": seed, "batch_size": batch_size, "dtype": dtype, "device": device}
    about |= {"data_sha256": _digest([x, y]), "model_sha256": _digest(net.state_dict().values())}
    x, net = x.to(precision), _on_device(net.to(precision), device)
    _check_writable(Path(output))

    clean = AdversarialDistribution.from_points(x, x, y, threat).logits(net, batch_size)
    records = []
    for name, kappa in cells:
        adv = attack(name, net, x, y, threat, kappa=kappa, seed=seed, batch_size=batch_size, **chosen[name])
        parameters = {**about, "attack": name, "kappa": kappa, "options": {**options(name), **chosen[name]}}
        record = {"parameters": parameters, **_measure(adv, net, clean, batch_size), "provenance": provenance(device)}
        with write_atomically(Path(output) / _file_name(parameters)) as file:
            file.write(json.dumps(record, indent=1).encode())
        records.append(record)
    return records


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
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found, path = run_bracket(n=4, method="linear", output=folder)
    ...     Bracket.load(path).lower == found.lower <= found.upper
    True
    """
    threat = Threat(norm, eps, order)
    choice("method", method, METHODS)
    number("tolerance", tolerance, "a number between 0 and 1", 1e-9, 1)
    number("time_limit", time_limit, "a finite number >= 0", 0, sys.float_info.max)
    seed, batch_size = whole("seed", seed, 0, 2**64 - 1), whole("batch_size", batch_size)
    precision = _DTYPES[choice("dtype", dtype, _DTYPES)]
    x, y = load_data(data, n=n)
    y = check_sample(x, y, threat.box)
    net = load_model(model)
    about = {"data": data, "model": model, "norm": norm, "method": method, "tolerance": tolerance}
    about |= {"time_limit": time_limit, "seed": seed, "batch_size": batch_size, "dtype": dtype, "device": device}
    about |= {"data_sha256": _digest([x, y]), "model_sha256": _digest(net.state_dict().values())}
    x, net = x.to(precision), _on_device(net.to(precision), device)
    _check_writable(Path(output))

    found = bracket(
        net, x, y, threat, method=method, tolerance=tolerance, time_limit=time_limit, seed=seed, batch_size=batch_size
    )
    case = _case({**about, "eps": threat.eps, "order": str(threat.order)})
    path = Path(output) / f"{case}_{method}_n{len(x)}_s{seed}_{dtype}.json"
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


def _cells(names: Sequence[str], kappas: Sequence[float], order: float) -> list[tuple[str, float]]:
    """The (attack, kappa) pairs to run, each checked."""
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"attacks={names!r}: a list of names is accepted, in a shell -p attacks \"['fgsm']\"")
    if not isinstance(kappas, list | tuple) or not kappas:
        raise ValueError(f'kappas={kappas!r}: a list of numbers >= 1 is accepted, in a shell -p kappas "[1]"')
    for name in names:
        options(name)
    checked = [check_kappa(kappa, 1.0) for kappa in kappas]
    if "wda" in names and math.isinf(order) and checked != [1.0]:
        raise ValueError(f'kappas={kappas!r} with order=inf: [1] is accepted, in a shell -p kappas "[1]"')
    if order == 1 and (joint := [name for name in names if name in ("wfgsm", "wpgd")]):
        raise ValueError(f"attacks={names!r} with order=1: {joint[0]!r} needs an order above 1")
    for name, values in (("attacks", names), ("kappas", checked)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={values!r}: each once is accepted")
    return [(name, kappa) for name in names for kappa in (checked if name == "wda" else [1.0])]


def _settings(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options given for each attack; an error where there is no such attack or option among them."""
    accepted = "in a shell -p settings \"{'pgd': {'steps': 100}}\""
    if not isinstance(settings, Mapping) or not all(isinstance(given, Mapping) for given in settings.values()):
        raise TypeError(f"settings={settings!r}: options by the names of attacks are accepted, {accepted}")
    for name, given in settings.items():
        choice("settings", name, names)
        for option in given:
            choice(f"settings[{name!r}]", option, options(name))
    return {name: dict(settings.get(name, {})) for name in names}


def _digest(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 checksum of the values of some tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _on_device(net: nn.Module, device: str) -> nn.Module:
    try:
        return net.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: {error}") from error


def _check_writable(folder: Path) -> None:
    probe = folder / ".writable"
    with write_atomically(probe) as file:
        file.write(b"")
    probe.unlink()


def _file_name(p: Mapping[str, Any]) -> str:
    """A name that differs wherever a result could, but for the device and the versions: of those the last is kept.

    What a file or a function of one's own holds may change under its name, so a checksum follows that.
    """
    kappa = repr(p["kappa"]).removesuffix(".0")
    method = re.sub(r"[^\w.+=-]+", "-", _method(p["attack"], p["options"]))
    return f"{_case(p)}_{method}_k{kappa}_n{p['n']}_s{p['seed']}_{p['dtype']}.json"


def _case(p: Mapping[str, Any]) -> str:
    """Data, model and ball."""
    data, model = (_file_name_part(p[key], p[f"{key}_sha256"]) for key in ("data", "model"))
    return f"{data}_{model}_{p['norm']}_{p['eps']!r}_W{p['order'].removesuffix('.0')}"


def _method(name: str, chosen: Mapping[str, Any]) -> str:
    """An attack and those of its options that are not the defaults."""
    usual = options(name)
    return " ".join([name, *(f"{key}={value}" for key, value in chosen.items() if value != usual.get(key))])


def _file_name_part(name: str, sha256: str) -> str:
    plain = re.sub(r"[^\w.-]+", "-", name.removesuffix(".npz")).strip(".-")
    return f"{plain}-{sha256[:8]}" if name.endswith(".npz") or ":" in name else plain


def _measure(adv: AdversarialDistribution, net: nn.Module, clean: Tensor, batch_size: int) -> dict[str, Any]:
    """What a distribution does, audited and evaluated afresh; `clean` are the logits at the sample."""
    n, y, source = len(adv.x), adv.labels, adv.moved_source
    logits = adv.logits(net, batch_size)
    correct, loss = margin(logits, adv.y) < 0, ce(logits, adv.y).double()
    accuracy, risk = adv.mean(correct), adv.mean(loss)
    per_sample = torch.zeros(n, dtype=torch.float64).index_add(0, adv.source, n * adv.mass * loss)
    error = _Z * float(per_sample.std(correction=0)) / math.sqrt(n)
    # where a logit is NaN the loss has no mean, and JSON no word for it
    risks = (
        {"risk_ce": risk, "risk_ce_interval": [risk - error, risk + error]}
        if math.isfinite(risk)
        else {"risk_ce": None, "risk_ce_interval": None}
    )
    was_correct = margin(clean, y) < 0
    clean_accuracy = was_correct.double().mean().item()

    # the moved atoms come first among the atoms
    distance = torch.zeros(n, dtype=torch.float64).index_copy(0, source, adv.distances())
    wrong = (~was_correct).index_copy(0, source, ~correct[: len(source)])
    rival = rival_logits(clean, y).argmax(1)
    rival = rival.index_copy(0, source, rival_logits(logits[: len(source)], y[source]).argmax(1))
    return {
        "accuracy": accuracy,
        "accuracy_interval": list(interval(accuracy, n)),
        "clean_accuracy": clean_accuracy,
        "clean_accuracy_interval": list(interval(clean_accuracy, n)),
        **risks,
        "transport_cost": adv.audit(),
        "passes": asdict(adv.counts),
        "samples": {
            "index": list(range(n)),
            "label": y.tolist(),
            "clean_prediction": clean.argmax(1).tolist(),
            "distance": [round(d, 8) for d in distance.tolist()],
            "rival": torch.where(wrong, rival, -1).tolist(),
            "flipped": (was_correct & wrong).int().tolist(),
        },
    }


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
    ValueError
        A .json file in the folder is no record.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = run(n=10, attacks=["fgsm"], output=folder)
    ...     read(folder).attack.tolist()
    ['fgsm']
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"folder={str(folder)!r} holds no record")
    try:
        return frame(json.loads(file.read_text(encoding="utf-8")) for file in files)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"folder={str(folder)!r} holds a .json file that is no record: {error!r}") from error


def frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Records as a data frame, one row each, as `read` gives it.

    Where one name stands for several models, or for several files of data, the checksums tell them apart.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     frame(run(n=10, attacks=["fgsm", "pgd"], output=folder)).attack.tolist()
    ['fgsm', 'pgd']
    """
    import pandas as pd

    flat = [{**r["parameters"], **r["passes"], **{k: r[k] for k in _AGGREGATES}, **r["provenance"]} for r in records]
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
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table(frame(run(n=10, attacks=["fgsm"], output=folder))).columns.tolist()
    ['clean', 'fgsm']
    """
    rows, keys = _labelled(results)
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
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     costs(frame(run(n=10, attacks=["fgsm"], output=folder))).columns.tolist()
    ['attack', 'accuracy', 'interval', 'transport cost', 'forward', 'backward']
    """
    rows, keys = _labelled(results)
    rows = rows.sort_values(keys, kind="stable")
    shown = rows[[key for key in keys if rows[key].nunique() > 1]].assign(
        attack=rows.label,
        accuracy=[f"{100 * a:.1f}" for a in rows.accuracy],
        interval=[f"{100 * low:.1f} to {100 * high:.1f}" for low, high in rows.accuracy_interval],
    )
    shown["transport cost"] = rows.transport_cost.round(4)
    return shown.join(rows[["forward", "backward"]].round(1))


def _labelled(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The results in the order of tables, labelled, and the columns that name a row of a table.

    Raises
    ------
    ValueError
        Two results would have the same place in a table.
    """
    position = {name: place for place, name in enumerate(available())}
    kappas = [repr(kappa).removesuffix(".0") for kappa in results.kappa.tolist()]
    order = results.order.str.removesuffix(".0")
    rows = results.assign(
        place=results.attack.map(position),
        label=[
            f"{_method(name, chosen)} κ={k}" if name == "wda" else _method(name, chosen)
            for name, chosen, k in zip(results.attack, results.options, kappas, strict=True)
        ],
        threat="W" + order + " " + results.norm + " " + results.eps.map(radius_text),
    )
    keys = [key for key in ("data", "n", "seed", "dtype") if rows[key].nunique() > 1] + ["model", "threat"]
    if (twice := rows.duplicated([*keys, "label"])).any():
        raise ValueError(f"two results are of {rows.loc[twice.idxmax(), [*keys, 'label']].to_dict()}")
    return rows.sort_values(["place", "kappa", "label"], kind="stable"), keys


def run_notebook(path: str | os.PathLike[str], out: str | os.PathLike[str], **parameters: Any) -> None:
    """Run a notebook with papermill, refusing a parameter that it does not declare.

    Papermill itself goes on with the defaults where a name is misspelt. What the notebook prints goes to the standard
    error too, so that a long run is seen to move.

    Parameters
    ----------
    path, out : path
        The notebook, and where it goes with its outputs once it has run. While it runs, and for good where it fails, it
        is the file that `partial` names, with the error in it; what `out` held before stays.
    **parameters
        Values for the cell tagged ``parameters``.

    Raises
    ------
    TypeError
        A parameter is not declared.
    FileNotFoundError, ValueError
        There is no such notebook, or it is none.
    OSError
        `out` cannot be written.

    Examples
    --------
    >>> run_notebook("notebooks/attack.ipynb", "results/attack.ipynb", n=100)  # doctest: +SKIP
    """
    import papermill

    check_parameters(path, parameters)
    out, unfinished = Path(out), partial(out)
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "this is a folder")
        _check_writable(out.parent)
    except OSError as error:
        raise type(error)(error.errno, f"output={str(out)!r}: {error.strerror}") from error
    # at its usual level the kernel warns of its own socket, and tells of its end when it is interrupted
    quiet = ["--log-level=CRITICAL"]
    papermill.execute_notebook(
        str(path), str(unfinished), parameters, log_output=True, stdout_file=sys.stderr, extra_arguments=quiet
    )
    unfinished.replace(out)


def partial(out: str | os.PathLike[str]) -> Path:
    """Where `run_notebook` keeps a notebook that has not run to its end.

    Examples
    --------
    >>> partial("results/mine.ipynb").name
    'mine.partial.ipynb'
    """
    out = Path(out)
    return out.with_name(f"{out.stem}.partial{out.suffix}")


def check_parameters(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise the errors of `run_notebook` that are about the notebook and the names of its parameters.

    Examples
    --------
    >>> check_parameters("notebooks/attack.ipynb", ["n", "eps"])  # doctest: +SKIP
    """
    import papermill
    from nbformat.reader import NotJSONError

    if not Path(path).is_file():
        raise FileNotFoundError(f"notebook={str(path)!r}: there is no such file")
    try:
        declared = papermill.inspect_notebook(str(path))
    except (NotJSONError, ValueError) as error:
        raise ValueError(f"notebook={str(path)!r} is no notebook: {error}") from error
    for name in names:
        if name not in declared:
            raise TypeError(f"parameter {name!r}: {path} declares {', '.join(declared)}")
