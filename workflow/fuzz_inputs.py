"""Damaged weights, model cards and data files: each is refused by its name, or read as what it was.

    python workflow/fuzz_inputs.py 2000

`KINDS` has how to make, to read and to compare a file of each kind; `damage` changes bytes, and `EDITS` changes what a
file says while its form stays right. safetensors, torch's format before 1.6 and cards carry no checksum of their own:
there a changed number is another number, and what is looked for is only that nothing but a named error comes of it.
Beside weights with a checksum (``NAME.sha256``, or the one in the card) nothing is excused.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from wda import archives, data, models, weights
from wda.experiment import provenance, records

RECORD = Path(__file__).parents[1] / "data" / "results" / "fuzz" / "inputs.json"

# -- files -----------------------------------------------------------------------------------------------------------

LAYERS: list[dict[str, Any]] = [
    {"op": "conv2d", "weight": "c", "bias": "cb", "stride": 1, "padding": 1},
    {"op": "batchnorm2d", "weight": "cb", "bias": "cb", "mean": "cb", "variance": "v", "eps": 0.001},
    {"op": "relu"},
    {"op": "maxpool2d", "size": 2},
    {"op": "residual", "branch": [{"op": "conv2d", "weight": "r", "bias": None, "padding": 1}], "shortcut": []},
    {"op": "flatten"},
    {"op": "linear", "weight": "l", "bias": "lb"},
]
SHAPES = {"c": (3, 1, 3, 3), "cb": (3,), "v": (3,), "r": (3, 3, 3, 3), "l": (4, 12), "lb": (4,)}
INPUT = {"shape": [1, 4, 4], "range": [0, 1], "mean": [0.25], "std": [0.5]}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def save(path: Path, held: Any) -> Path:
    """Weights in the format that a name asks for."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in held.items()})
    elif path.suffix == ".safetensors":
        save_file(held, path)
    else:
        torch.save(held, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    return path


def make_weights(suffix: str, stated: bool) -> Callable[[Path, random.Random], Path]:
    def make(folder: Path, _: random.Random) -> Path:
        path = save(folder / f"net{suffix}", tensors())
        if stated:
            weights.write_checksum(path)
        return path

    return make


def make_card(folder: Path, _: random.Random) -> Path:
    (folder / "models").mkdir(exist_ok=True)
    path = save(folder / "models" / "mine.npz", tensors())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"layers": LAYERS, "input": INPUT, "weights_file": path.name, "weights_sha256": digest, "parameters": 169}
    card = path.with_suffix(".json")
    card.write_text(json.dumps({**about, "notes": "made to be damaged"}, indent=1))
    return card


def read_card(path: Path) -> tuple[object, list[torch.Tensor]]:
    """What the card says, and the model's tensors and logits."""
    with mock.patch.dict(os.environ, WDA_DATA=str(path.parents[1])):
        net = models.load(path.stem)
    x = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    said = {key: value for key, value in json.loads(path.read_bytes()).items() if key in ("layers", "input")}
    return said, [*net.state_dict().values(), net.double()(x.double())]


def make_data(folder: Path, _: random.Random) -> Path:
    generator = np.random.default_rng(0)
    path = folder / "mine.npz"
    np.savez_compressed(path, x=generator.random((5, 1, 6, 6), dtype=np.float32), y=np.arange(5))
    return path


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.items(), other.items(), strict=False)
    return len(one) == len(other) and all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def same_card(one: Any, other: Any) -> bool:
    return one[0] != other[0] or all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def same_sample(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# name: (make(folder, rng) -> path, read(path) -> value, equal(value, value) -> bool)
KINDS: dict[str, tuple[Callable[..., Path], Callable[[Path], Any], Callable[[Any, Any], bool]]] = {
    "weights .npz": (make_weights(".npz", stated=False), weights.state_dict, same),
    "weights .pt": (make_weights(".pt", stated=False), weights.state_dict, same),
    "weights .safetensors": (make_weights(".safetensors", stated=True), weights.state_dict, same),
    "weights before 1.6": (make_weights(".pth", stated=True), weights.state_dict, same),
    "weights .safetensors, bare": (make_weights(".safetensors", stated=False), weights.state_dict, lambda *_: True),
    "weights before 1.6, bare": (make_weights(".pth", stated=False), weights.state_dict, lambda *_: True),
    "model card": (make_card, read_card, same_card),
    "data .npz": (make_data, data.load, same_sample),
}

# -- damages ---------------------------------------------------------------------------------------------------------


def damage(content: bytes, rng: random.Random) -> bytes:
    """Some bytes other than they were, in one of the ways in which files are damaged."""
    at, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    way = rng.choice(["bit", "bit", "bit", "cut", "cut", "hole", "gap", "twice", "tail", "byte", "start", "other"])
    if way == "bit":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if way == "byte":
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(1) + content[at + 1 :]
    if way == "start":  # headers are short, and most is said there
        at = rng.randrange(min(200, len(content)))
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at + 8 :]
    made = {"cut": content[:at], "hole": content[:at] + bytes(other - at) + content[other:]}
    made |= {"gap": content[:at] + content[other:], "twice": content[:other] + content[at:]}
    made |= {"tail": content + rng.randbytes(rng.randrange(1, 50))}
    made |= {"other": rng.choice([b"", b"hello", b"<html>", b"PK\x03\x04", b"\x80\x02", rng.randbytes(100), bytes(64)])}
    return made[way]


Edit = Callable[[Path, random.Random], None]


def said(**changed: Any) -> Edit:
    """A card that says something else under these keys; a key such as input__mean is within another."""

    def edit(path: Path, _: random.Random) -> None:
        about = json.loads(path.read_text())
        for key, value in changed.items():
            *outer, last = key.split("__")
            place = about
            for step in outer:
                place = place[int(step) if isinstance(place, list) else step]
            if value is ...:
                del place[int(last) if isinstance(place, list) else last]
            else:
                place[int(last) if isinstance(place, list) else last] = value
        path.write_text(json.dumps(about))

    return edit


def holding(**arrays: Any) -> Edit:
    """A file of arrays with others, or without those that are None."""

    def edit(path: Path, _: random.Random) -> None:
        with np.load(path) as held:
            kept = {**held, **arrays}
        np.savez(path, **{name: array for name, array in kept.items() if array is not None})

    return edit


def saving(held: Any, suffix: str = ".pt") -> Edit:
    return lambda path, _: torch.save(held, path, _use_new_zipfile_serialization=suffix == ".pt")


def written(content: bytes) -> Edit:
    def edit(path: Path, _: random.Random) -> None:
        path.write_bytes(content)

    return edit


def encrypted(path: Path, _: random.Random) -> None:
    content = path.read_bytes()
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(mark) + flags
        content = content[:at] + bytes([content[at] | 1]) + content[at + 1 :]
    path.write_bytes(content)


def packed(method: int) -> Edit:
    def edit(path: Path, _: random.Random) -> None:
        with zipfile.ZipFile(path) as archive:
            parts = {part.filename: archive.read(part) for part in archive.infolist()}
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)

    return edit


def headed(header: str, version: int = 1) -> Edit:
    """A file of arrays whose first has another header, with a right checksum."""

    def edit(path: Path, _: random.Random) -> None:
        with zipfile.ZipFile(path) as archive:
            parts = {part.filename: archive.read(part) for part in archive.infolist()}
        first = next(iter(parts))
        length = struct.pack("<H" if version == 1 else "<I", len(header) + 1)
        parts[first] = b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + b"\n" + parts[first][128:]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)

    return edit


def inflated(path: Path, _: random.Random) -> None:
    """An archive that unpacks to more than is allowed, of nothing but zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        for _ in range(archives._UNPACKED // 2**20 + 1):
            file.write(bytes(2**20))


_HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<q9', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f4', 'shape': (3,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (27,), }",
    "(" * 3000,
    "{",
    "",
    " " * 20000,
]
_ARCHIVE: list[Edit] = [encrypted, packed(zipfile.ZIP_BZIP2), packed(zipfile.ZIP_LZMA), inflated]
_ARCHIVE += [headed(header) for header in _HEADERS if "27" not in header] + [
    headed(_HEADERS[0], 2),
    headed(_HEADERS[2], 3),
]
_ANY = [written(content) for content in (b"", b"hello", b"<!DOCTYPE html>", b"\x80\x04.", b"PK\x05\x06" + bytes(18))]
_IMAGES = np.zeros((5, 3, 6, 3), np.uint8)


def _half(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


# What is wrong in meaning: each of these must be refused.
EDITS: dict[str, list[Edit]] = {
    "weights .npz": [
        *_ARCHIVE, *_ANY, _half, holding(c=np.array(["a"])), holding(c=np.zeros(3, "datetime64[s]")),
        holding(c=np.zeros(3, [("a", "f4")])), headed(_HEADERS[6]),
    ],
    "weights .pt": [
        *_ARCHIVE[:3], *_ANY, _half, saving({1: torch.zeros(2)}), saving({"state_dict": {1: torch.zeros(2)}}),
        saving({"a": 1}), saving([torch.zeros(2)]), saving({("a",): torch.zeros(1), "b": torch.zeros(1)}),
    ],
    "weights .safetensors, bare": [
        *_ANY, _half, written(struct.pack("<Q", 2**62) + b"{}"), written(struct.pack("<Q", 2) + b"[]"),
        written(struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999999999999999]}}'),
    ],
    "weights before 1.6, bare": [*_ANY, _half, saving({1: torch.zeros(2)}, ".pth"), saving(3, ".pth")],
    "model card": [
        *_ANY, _half,
        *(written(text.encode()) for text in ("[]", "3", "null", '{"layers": NaN}', "[" * 9999, '{"a": 1} 2')),
        *(said(**{key: value}) for key in ("layers", "weights_file", "weights_sha256")
          for value in (..., None, 3, True, [], {}, "", ["a"], [3], " ")),
        *(said(weights_file=name) for name in ("../mine.npz", "/etc/hostname", "..", "a/b.npz", "a\\b.npz", "mine\0")),
        *(said(weights_sha256=value) for value in ("0" * 63, "0" * 64, "g" * 64, "0" * 65)),
        *(said(input=value) for value in (None, 3, [], "a")),
        *(said(**{f"input__{key}": value}) for key in ("mean", "std")
          for value in (None, 0.5, [], ["a"], [None], [True], [float("nan")], [float("inf")], [1e300], [0.1, 0.2])),
        *(said(input__std=value) for value in ([0], [0.0], [-1], [-0.5])),
        *(said(input__shape=value)
          for value in (None, [], [0], [-1, 4, 4], [1.5, 4, 4], "a", [1, 6, 4], [2, 4, 4], [16])),
        *(said(input__range=value) for value in ([0, 255], None, [0], "a")),
        *(said(parameters=value) for value in (None, -1, 1.5, "a", 170, True)),
        *(said(layers__3__size=value) for value in (0, -1, None, "2", 1.5, True, [2], [2, 0], 2**40, 7)),
        *(said(**{f"layers__0__{key}": value}) for key in ("stride", "padding")
          for value in (-1, None, "same", 0.5, True, [1, 1, 1], 2**40, {})),
        said(layers__0__stride=0),
        *(said(layers__1__eps=value) for value in (0, -1, None, "a", float("nan"), float("inf"), True)),
        *(said(layers__1__mean=value) for value in (None, 3, "no such", "l", ["cb"])),
        *(said(layers__0__weight=value) for value in (None, 3, "no such", "cb", "l", ["c"], {"c": 1})),
        *(said(layers__6__bias=value) for value in (3, "no such", "cb", ["c"])),
        *(said(layers__4__branch=value) for value in (None, 3, "a", [3], [None], [[]], [{"op": "relu", "a": 1}], {})),
        *(said(layers__2=value) for value in (None, 3, "relu", [], {}, {"op": 3}, {"op": "tanh"}, {"op": ["relu"]})),
        *(said(layers__2=value) for value in ({"op": None}, {"Op": "relu"}, {"op": "relu", "slope": 1})),
        *(said(layers__2={"op": "attention", "heads": heads, "qkv": "l", "output": "l"})
          for heads in (0, None, "2", 1.5)),
        said(layers__2={"op": "position", "embedding": "cb"}), said(layers__5=...), said(layers__6=...),
        said(input=..., inputs=INPUT), said(input__mean=..., input__means=[0.25]),
    ],
    "data .npz": [
        *_ARCHIVE, *_ANY, _half, holding(x=None), holding(y=None), holding(x=None, y=None),
        *(holding(x=np.zeros((5, 2), kind))
          for kind in ("c8", "c16", "U3", "S3", "M8[s]", "m8[s]", "V4", [("a", "f4")])),
        *(holding(x=x) for x in (np.float32(1), np.zeros(5), np.zeros((5, 0)), np.zeros((0, 2)), np.zeros((4, 2)))),
        *(holding(x=np.full((5, 2), value)) for value in (1e300, 2**24 + 1, -(2**53) - 1)),
        *(holding(x=x) for x in (_IMAGES, _IMAGES[:, :, :, :1], _IMAGES[:, :1], np.zeros((5, 2, 6, 6), np.uint8))),
        *(holding(x=np.zeros(shape, np.uint8)) for shape in ((5, 4), (5, 1, 1, 1, 1), (5, 4, 4, 4))),
        *(holding(y=y) for y in (np.int64(1), np.zeros(4, int), np.zeros((5, 1), int), np.zeros(5), np.zeros(5, bool))),
        holding(y=np.full(5, 2**63, np.uint64)), holding(y=np.array(list("abcde"))),
        holding(x=np.zeros((0, 2)), y=np.zeros(0, int)),
    ],
}  # fmt: skip

# -- the hunt --------------------------------------------------------------------------------------------------------


def outcome(kind: str, path: Path, known: Any) -> str:
    """ "named", "harmless", or what is wrong: another error, an error that names no file, or other contents."""
    _, read, equal = KINDS[kind]
    try:
        value = read(path)
    except (ValueError, TypeError, OSError) as error:  # DataUnavailable is one of OSError
        return "named" if path.stem in str(error) else f"nameless {type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "harmless" if equal(value, known) else "read as another"


def hunt(kind: str, n: int, seed: int = 0) -> collections.Counter[str]:
    """How many of n damaged files of a kind came out how."""
    make, read, _ = KINDS[kind]
    rng, outcomes = random.Random(f"{kind} {seed}"), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), rng)
        known, content = read(path), path.read_bytes()
        for _ in range(n):
            path.write_bytes(damage(content, rng))
            outcomes[outcome(kind, path, known)] += 1
    return outcomes


def edited(kind: str, seed: int = 0) -> list[str]:
    """How each edit of a kind came out; "named" is right."""
    make, read, _ = KINDS[kind]
    rng, outcomes = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), rng)
        known, content = read(path), path.read_bytes()
        for edit in EDITS.get(kind, []):
            path.write_bytes(content)
            edit(path, rng)
            outcomes.append(outcome(kind, path, known))
    return outcomes


def main(n: int) -> int:
    """Damage n files of each kind and record it; the exit status is 1 where one is neither named nor harmless."""
    outcomes = {}
    for kind in KINDS:
        outcomes[kind] = hunt(kind, n) + collections.Counter(edited(kind))
        print(f"{kind}: {dict(outcomes[kind])}", flush=True)
    records.save({"study": "inputs", "files of each kind": n, "outcomes": outcomes, "provenance": provenance()}, RECORD)
    return int(any(found.total() != found["named"] + found["harmless"] for found in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
