"""What a record may hold: every entry with its kind and range, checked once, when the record is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from wda.attacks import check_kappa, kind
from wda.checks import choice, stored_number, stored_numbers, whole
from wda.threat import Threat

__all__ = ["check_cell", "check_provenance", "check_sums", "check_threat"]

_MOST = sys.float_info.max


def check_cell(record: Mapping[str, Any]) -> None:
    """Nothing, where parameters, samples, passes and provenance are those of a cell; the aggregates are not looked at.

    Raises
    ------
    ValueError, TypeError, KeyError
        The message names the entry, its value and what is accepted.

    Examples
    --------
    >>> check_cell({"parameters": {"data": 3}})
    Traceback (most recent call last):
        ...
    ValueError: data=3: text is accepted
    """
    parameters = _mapping("parameters", record["parameters"])
    _check_parameters(parameters)
    n, shard, shards = parameters["n"], parameters.get("shard", 0), parameters.get("shards", 1)
    _check_samples(_mapping("samples", record["samples"]), *(n * k // shards for k in (shard, shard + 1)))
    passes = _mapping("passes", record["passes"])
    for name in {"forward", "backward", "vanished", "seconds"} | passes.keys():
        stored_number(f"passes: {name}", passes[name], 0, 1 if name == "vanished" else _MOST)
    check_provenance(record)


def _check_parameters(p: Mapping[str, Any]) -> None:
    for name in ("data", "model", "device"):
        _text(name, p[name])
    of = kind(p["attack"])
    serves_all = p["eps"] is None and p["order"] is None and of == "nearest"
    threat = Threat(p["norm"]) if serves_all else check_threat(p)
    stored_number("kappa", p["kappa"], 1, _MOST)
    check_kappa(p["kappa"], threat.order)
    _mapping("options", p["options"])
    whole("n", p["n"])
    whole("shards", p.get("shards", 1), 1, p["n"])
    whole("shard", p.get("shard", 0), 0, p.get("shards", 1) - 1)
    whole("seed", p["seed"], 0, 2**64 - 1)
    whole("batch_size", p["batch_size"])
    choice("dtype", p["dtype"], ("float32", "float64"))
    check_sums(p, "data", "model")


def _check_samples(rows: Mapping[str, Any], first: int, last: int) -> None:
    n = last - first
    if rows["index"] != list(range(first, last)):
        raise ValueError(f"samples: index is not {first} to {last - 1}")
    for name, least in (("label", 0), ("clean_prediction", 0), ("rival", -1)):
        stored_numbers(f"samples: {name}", rows[name], n, least, sys.maxsize, int)
    losses = [name for name in ("clean_loss", "loss") if "loss" in rows or "clean_loss" in rows]  # not kept at first
    for name in (*losses, "distance"):
        stored_numbers(f"samples: {name}", rows[name], n, 0, _MOST, missing=True)
    stored_numbers("samples: flipped", rows["flipped"], n, 0, 1, int)
    columns = (rows[name] for name in ("label", "clean_prediction", "rival", "flipped"))
    for place, (label, guess, rival, flipped) in enumerate(zip(*columns, strict=True)):
        if rival == label or flipped != (guess == label and rival != -1):
            raise ValueError(f"samples: label, clean_prediction, rival and flipped contradict each other at {place}")


def check_threat(p: Mapping[str, Any]) -> Threat:
    """The ball of a record, whose radius is a number and whose order is text.

    Examples
    --------
    >>> check_threat({"norm": "L2", "eps": 0.5, "order": "2.0"}).order
    2.0
    """
    stored_number("eps", p["eps"], 0, _MOST)
    threat = Threat(p["norm"], p["eps"], _text("order", p["order"]))
    if p["order"] != str(threat.order):
        raise ValueError(f"order={p['order']!r}: {str(threat.order)!r} is accepted")
    return threat


def check_sums(p: Mapping[str, Any], *names: str) -> None:
    """Nothing, where the parameters have a SHA-256 checksum of each of these.

    Examples
    --------
    >>> check_sums({"model_sha256": "0" * 64}, "model")
    """
    for name in names:
        if not re.fullmatch("[0-9a-f]{64}", _text(f"{name}_sha256", p[f"{name}_sha256"])):
            raise ValueError(f"{name}_sha256={p[f'{name}_sha256']!r}: 64 hexadecimal digits are accepted")


def check_provenance(record: Mapping[str, Any]) -> None:
    """Nothing, where a record says what made it.

    Examples
    --------
    >>> from wda.experiment import provenance
    >>> check_provenance({"provenance": provenance()})
    """
    about = _mapping("provenance", record["provenance"])
    for name in ("wda", "python", "torch", "cpu"):
        _text(f"provenance: {name}", about[name])
    for name in ("commit", "gpu"):
        if about[name] is not None:
            _text(f"provenance: {name}", about[name])
    whole("provenance: threads", about["threads"])


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r}: a mapping is accepted")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: text is accepted")
    return value
