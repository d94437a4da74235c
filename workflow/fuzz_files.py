"""Damage every kind of file that the package reads, in many ways, and see that each is named or harmless.

    python workflow/fuzz_files.py                  # 1,000 files
    python workflow/fuzz_files.py --files 5000 --seed 1

A valid file of each kind is made, damaged, and read through the public function. Either that raises a documented error
that names the file, or the result is that of the valid file. Only where nothing in a file states a checksum - because
it was removed, or people write such files by hand - may an edit within the format give other contents. Recorded in
data/results/fuzz/files.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wda
from wda import AdversarialDistribution, Bracket, Threat, experiment
from wda.experiment import Cell, provenance
from wda.experiment.records import save
from wda.training import finetune

RECORD = Path(__file__).parents[1] / "data" / "results" / "fuzz" / "files.json"


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a valid one is made in a folder, how it is read, and what of the result has to be the same.

    `own` compares contents that state no checksum, by what else in the file they follow from; by default not at all.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool]
    own: Callable[[Any, Any], bool] = lambda one, other: True
    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)
    stamped: bool = True


def network() -> nn.Module:
    """Three classes; the weights are the same on every machine."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for weights in net.parameters():
            weights.copy_((torch.arange(weights.numel(), dtype=torch.float64) * 7 % 16 / 8 - 1).view_as(weights))
    return net.eval()


def sample(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of (2, 3) and what the network says of them."""
    x = (torch.arange(n * 6, dtype=torch.float64) * 29 % 64 / 64).view(n, 2, 3)
    return x, network()(x).argmax(1)


def _of_cell(**about: Any) -> Callable[[Path], Path]:
    cell = Cell(n=12, **about)

    def make(folder: Path) -> Path:
        experiment.run_cell(cell, folder)
        return folder / f"{cell.name}.json"

    return make


def _figures(one: Any, other: Any) -> bool:
    """What tables show of records: accuracies, the risk, the cost, and the place in the table."""
    shown = ["data", "model", "norm", "eps", "order", "attack", "kappa", "n", "seed", "accuracy", "clean_accuracy"]
    shown += ["risk_ce", "transport_cost"]
    return all(_near(one[name].tolist(), other[name].tolist()) for name in shown)


def _cell_figures(one: Any, other: Any) -> bool:
    keys = ("data", "model", "norm", "attack", "n", "seed", "dtype")
    same = all(one["parameters"][key] == other["parameters"][key] for key in keys)
    return same and all(_near(one[name], other[name]) for name in ("clean_accuracy", "found"))


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_near, one, other))
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6) if isinstance(one, float) else bool(one == other)


def _read_cell(path: Path) -> Any:
    return experiment.records.load(path)


def _make_tuning(folder: Path) -> Path:
    small: dict[str, Any] = {"model": "digits-mlp", "n_train": 60, "n": 20, "epochs": 2, "batch_size": 24}
    experiment.run_finetune(**small, eps=0.05, attack_options={"steps": 2}, output=folder)
    [path] = folder.glob("*.json")
    return path


def _tuned_figures(one: Any, other: Any) -> bool:
    same = one["epoch"] == other["epoch"]
    return same and all(one[when]["clean"] == other[when]["clean"] for when in ("before", "after"))


def _make_bracket(folder: Path) -> Path:
    radius = torch.tensor([0.0, 0.0625, 0.125, 0.25, 0.5], dtype=torch.float64)
    distance = torch.tensor([0.0, 0.0625, 0.25, 0.5, math.inf], dtype=torch.float64)
    path = folder / "bracket.json"
    Bracket(Threat("Linf", 0.125, 2), radius, distance, None, None, (1.5, 2.5)).save(path, model="a model")
    return path


def _bracket_same(one: Bracket, other: Bracket) -> bool:
    sides = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("radius", "distance"))
    return sides and (one.threat, one.why, one.seconds) == (other.threat, other.why, other.seconds)


def _bracket_figures(one: Bracket, other: Bracket) -> bool:
    # another ball is another question, and other sides are other figures: only these have to follow from each other
    return one.threat != other.threat or one.lower <= one.upper


def _make_distribution(folder: Path) -> Path:
    x, y = sample()
    path = folder / "adv.npz"
    AdversarialDistribution.from_points(x, x * 0.875, y, Threat("Linf", 0.125, 2), weight=0.5).save(path)
    return path


def _distribution_same(one: AdversarialDistribution, other: AdversarialDistribution) -> bool:
    tensors = ("x", "labels", "moved", "moved_mass", "moved_source")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return same and (one.threat, one.counts) == (other.threat, other.counts)


_WIDE = Threat("Linf", 0.5, "inf")  # in which every sample falls to the first of AutoAttack's attacks


def _attacked(path: Path) -> AdversarialDistribution:
    with warnings.catch_warnings(action="ignore"):  # that there are few classes
        return wda.attack("autoattack", network(), *sample(), _WIDE, state=path, progress=False)


def _make_state(folder: Path) -> Path:
    path = folder / "state.npz"
    _attacked(path)
    return path


def _tuned(path: Path) -> Any:
    how: dict[str, Any] = {"batch_size": 6, "tau": 0.0625, "momentum": 0.5, "attack_options": {"steps": 2}}
    how |= {"epochs": 2, "checkpoint": path, "progress": False}
    return finetune(network(), sample(), sample(), Threat("Linf", 0.125, 2), test=sample(6), **how)


def _make_checkpoint(folder: Path) -> Path:
    path = folder / "run.pt"
    _tuned(path)
    return path


def _tuned_same(one: Any, other: Any) -> bool:
    before, after = (run.model.state_dict() for run in (one, other))
    same = all(torch.equal(before[name], after[name]) for name in before)
    return same and (one.epoch, one.history) == (other.epoch, other.history)


SWEEP = """about = "of the fuzz"
figures = ["kappa"]
[common]
data = "digits"
n = 20
norm = "Linf"
[[grid]]
model = ["digits-mlp", "digits-cnn"]
eps = [0.05, "1/10"]
order = 1
attack = ["fgsm", {name = "pgd", steps = [5, 10], kappa = 2}, "closest"]
"""


def _make_sweep(folder: Path) -> Path:
    path = folder / "mine.toml"
    path.write_text(SWEEP)
    return path


KINDS: dict[str, Kind] = {
    "record": Kind(
        _of_cell(attack="wda", eps=0.1, order=1, kappa=2, options={"steps": 3, "probe_steps": 1}),
        lambda path: experiment.read(path.parent),
        lambda one, other: bool(one.equals(other)),
        _figures,
    ),
    "record of distances": Kind(
        _of_cell(attack="closest", options={"steps": 2, "restarts": 1}),
        _read_cell,
        lambda one, other: bool(one == other),
        _cell_figures,
    ),
    "record of a fine-tuning": Kind(
        _make_tuning, experiment.read_finetune, lambda one, other: bool(one == other), _tuned_figures
    ),
    "bracket": Kind(_make_bracket, Bracket.load, _bracket_same, _bracket_figures),
    "distribution": Kind(_make_distribution, AdversarialDistribution.load, _distribution_same),
    "state of autoattack": Kind(_make_state, _attacked, lambda one, other: bool(torch.equal(one.points, other.points))),
    "checkpoint": Kind(_make_checkpoint, _tuned, _tuned_same),
    "sweep": Kind(
        _make_sweep,
        lambda path: experiment.load_sweep(str(path)),
        lambda one, other: bool(one == other),
        errors=(ValueError, TypeError, FileNotFoundError),
        stamped=False,
    ),
}


# -- damage to any file ----------------------------------------------------------------------------------------------


def cut(path: Path, draw: random.Random) -> None:
    """Only the beginning is left."""
    whole = path.read_bytes()
    path.write_bytes(whole[: draw.randrange(len(whole))])


def flip_a_bit(path: Path, draw: random.Random) -> None:
    """A single one, anywhere."""
    whole = bytearray(path.read_bytes())
    whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)


def zero_a_block(path: Path, draw: random.Random) -> None:
    """As where a page was never written."""
    whole = bytearray(path.read_bytes())
    start = draw.randrange(len(whole))
    stop = min(len(whole), start + draw.choice([1, 16, 512]))
    whole[start:stop] = bytes(stop - start)
    path.write_bytes(whole)


def move_a_block(path: Path, draw: random.Random) -> None:
    """A part of the file stands where another one should."""
    whole = bytearray(path.read_bytes())
    size = max(1, len(whole) // 10)
    one, other = (draw.randrange(len(whole) - size + 1) for _ in range(2))
    whole[one : one + size] = whole[other : other + size]
    path.write_bytes(whole)


def go_on_behind(path: Path, draw: random.Random) -> None:
    """Bytes behind the end."""
    path.write_bytes(path.read_bytes() + draw.choice([b"\0" * 64, b"}", b"more", path.read_bytes()]))


def become_empty(path: Path, draw: random.Random) -> None:
    """Or nearly so."""
    path.write_bytes(draw.choice([b"", b"\n", b"\0", b"{}", b"[]", b"null"]))


def become_another_file(path: Path, draw: random.Random) -> None:
    """A web page, a pickle, an image, an archive of something else, text in another encoding."""
    contents = [b"<!doctype html><html>503</html>", pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n" + bytes(99)]
    contents += [
        "π".encode("utf-16"),
        b"PK\x05\x06" + bytes(18),
        b"[" * 10000,
        b"a = " + b"[" * 10000,
        draw.randbytes(200),
    ]
    path.write_bytes(draw.choice(contents))


def become_a_folder(path: Path, draw: random.Random) -> None:
    """Of the same name."""
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path, draw: random.Random) -> None:
    """Nobody ever writes to it."""
    path.unlink()
    os.mkfifo(path)


def become_a_link(path: Path, draw: random.Random) -> None:
    """To itself, to nothing, or to a device."""
    path.unlink()
    path.symlink_to(draw.choice([path.name, "nothing", "/dev/null"]))


def take_another_name(path: Path, draw: random.Random) -> Path:
    """Another ending, or another stem."""
    name = draw.choice(
        [f"{path.stem}.txt", f"{path.stem}.bin", f"x{path.name}", path.name.replace("_", "-"), f"{path.name}~"]
    )
    return path.rename(path.with_name(name))


ANY = (cut, flip_a_bit, zero_a_block, move_a_block, go_on_behind, become_empty, become_another_file, become_a_folder)
ANY += (become_a_pipe, become_a_link)


# -- edits within the format -----------------------------------------------------------------------------------------


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested mappings and lists."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _nodes(tree[key])


def edit(tree: Any, draw: random.Random) -> None:
    """Change one place, drawn so that every name in the file has its turn and long lists do not outweigh it."""
    places = list(_nodes(tree))
    named = [(held, key) for held, key in places if isinstance(held, dict)]
    held, key = draw.choice(named if draw.random() < 0.7 else places)
    what = draw.randrange(10)
    if what == 0:
        del held[key]
    elif what == 1 and isinstance(held, dict):
        held[f"{key}_"] = held.pop(key)
    elif what == 2 and isinstance(held, dict):
        other = draw.choice(list(held))
        held[key], held[other] = held[other], held[key]
    else:
        held[key] = _other(held[key], draw)


def _other(value: Any, draw: random.Random) -> Any:
    """A value of another kind, out of range, or another one in it."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return _other_array(value, draw)
    if isinstance(value, list) and value and draw.random() < 0.6:
        return draw.choice(
            [value[:-1], [*value, value[0]], value[::-1], [value], [*value[:-1], _other(value[-1], draw)]]
        )
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.8:
        numbers = [-value - 1, value + 1, value + 0.25, value * 1e6 + 7, 0, 1e308, -1e308, math.nan, math.inf, 10**30]
        return draw.choice(numbers)
    if isinstance(value, str) and draw.random() < 0.6:
        return draw.choice([f"{value}x", value[:-1], value.upper(), "nosuch", ""])
    return draw.choice([None, True, 3, -1, 0.5, "text", "1/4", [], {}, [1, 2], {"a": 1}, math.nan])


def _other_array(value: Any, draw: random.Random) -> Any:
    tensor = isinstance(value, torch.Tensor)
    array = np.array(value.tolist() if tensor else value)
    changed: list[Callable[[], Any]] = [
        lambda: array[None],
        lambda: array.reshape(-1)[:-1],
        lambda: np.concatenate([array.reshape(-1)] * 2),
        lambda: array.astype(complex) if array.dtype.kind in "iuf" else np.array(3),
        lambda: array.astype(np.float32) if array.dtype.kind in "iuf" else np.array([1.0]),
        lambda: array.astype(np.int16) if array.dtype.kind in "iuf" else np.array(True),
        lambda: np.full_like(array, -1) if array.dtype.kind in "iuf" else np.array(""),
        lambda: np.zeros_like(array),
        lambda: np.zeros(0),
    ]
    if array.dtype.kind in "iuf" and array.size:
        changed += [functools.partial(_set, array, number, draw) for number in (math.nan, math.inf, 1e30, -7, 99)]
    if not tensor:
        changed += [lambda: array.astype(object), lambda: np.array("text")]
    with warnings.catch_warnings(action="ignore"):
        found = draw.choice(changed)()
    return torch.as_tensor(found) if tensor and found.dtype.kind in "iufcb" else found.tolist() if tensor else found


def _set(array: np.ndarray, number: float, draw: random.Random) -> np.ndarray:
    array = array.astype(float) if not math.isfinite(number) else array.copy()
    array.reshape(-1)[draw.randrange(array.size)] = min(number, 2**62) if array.dtype.kind in "iu" else number
    return array


def unpacked(path: Path) -> Any:
    """What a file holds, by its ending, stamp and all."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    return torch.load(path, weights_only=True)


def pack(path: Path, tree: Any) -> None:
    """The file anew."""
    if path.suffix == ".json":
        path.write_text(json.dumps(tree, indent=1))
    elif path.suffix == ".npz":
        np.savez(path, **{name: np.array(value) for name, value in tree.items()})
    else:
        torch.save(tree, path)


def edited(path: Path, draw: random.Random) -> None:
    """One entry is another; the checksum is left as it was."""
    _edited(path, draw, unpacked(path))


def edited_without_checksum(path: Path, draw: random.Random) -> None:
    """One entry is another, and the stamp is gone, as in files from before there were any."""
    tree = unpacked(path)
    del tree["schema"], tree["checksum"]
    _edited(path, draw, tree)


def _edited(path: Path, draw: random.Random, tree: Any) -> None:
    if path.suffix == ".npz" and "about" in tree and draw.random() < 0.4:
        about = json.loads(str(tree["about"]))
        edit(about, draw)
        tree["about"] = np.array(json.dumps(about))
    else:
        tree = copy.deepcopy(tree)
        edit(tree, draw)
    pack(path, tree)


def name_a_key_twice(path: Path, draw: random.Random) -> None:
    """JSON says nothing of which value counts."""
    text, key = path.read_text(), draw.choice(list(unpacked(path)))
    path.write_text(text.replace("{", f'{{"{key}": 1,', 1))


def edit_a_word(path: Path, draw: random.Random) -> None:
    """A word or a number of a text, as people write it."""
    words = path.read_text().split(" ")
    words[draw.randrange(len(words))] = draw.choice(
        ["-1", "nan", "inf", '"x"', "[]", "{}", "=", "1e400", "1979-05-27", ""]
    )
    path.write_text(" ".join(words))


UNSTAMPED = (edited_without_checksum, edit_a_word)


def damages(path: Path) -> tuple[Callable[..., Path | None], ...]:
    """All that can be done to a file."""
    if path.suffix == ".toml":
        return (*ANY, edit_a_word, edit_a_word, take_another_name)
    within: tuple[Callable[..., Path | None], ...] = (edited, edited, edited_without_checksum, edited_without_checksum)
    if path.suffix == ".json":
        within += (name_a_key_twice,)
    return (*ANY, *within, take_another_name)


# -- the run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Ten minutes are an error, and not the end of the world."""

    def late(*_: object) -> None:
        raise RuntimeError("ten minutes have passed")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(600)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(kind: Kind, path: Path, whole: Any, checked: bool) -> str:
    """What came of reading a damaged file."""
    try:
        with no_hang(), warnings.catch_warnings(action="ignore"):
            found = kind.read(path)
    except kind.errors as error:
        # where a folder is read and nothing is there, it is the folder that is named
        name = path.parent if isinstance(error, FileNotFoundError) else path
        return "named" if str(name) in str(error) else f"not named: {type(error).__name__}: {error}"
    except Exception as error:
        return f"another error: {type(error).__name__}: {error}"
    if kind.same(found, whole):
        return "equal"
    if checked:
        return f"believed: {found!r:.300}"
    return "within the format" if kind.own(found, whole) else f"another figure: {found!r:.300}"


def fuzz(
    folder: Path, files: int, seed: int, names: list[str] | None = None
) -> tuple[Counter[tuple[str, str, str]], list[str]]:
    """Damage and read so many files, in turn of each kind: what came of them, and what should not have."""
    draw = random.Random(seed)
    made = {name: KINDS[name].make(_new(folder / f"whole {name}")) for name in names or KINDS}
    read = {name: KINDS[name].read(path) for name, path in made.items()}
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong = []
    for number, name in zip(range(files), itertools.cycle(made), strict=False):
        kind, at = KINDS[name], _new(folder / str(number))
        path = Path(shutil.copy(made[name], at))
        every = damages(path)
        damage = every[number // len(made) % len(every)]
        path = damage(path, draw) or path
        found = tried(kind, path, read[name], kind.stamped and damage not in UNSTAMPED)
        if found not in ("named", "equal", "within the format"):
            wrong.append(f"{name}, {damage.__name__}, seed {seed}, file {number}: {found}")
            found = "wrong"
        else:
            shutil.rmtree(at)
        counts[name, damage.__name__.replace("_", " "), found] += 1
    return counts, wrong


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> int:
    """Damage files, read them, record what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="which; by default all")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = fuzz(Path(folder), given.files, given.seed, given.kinds)
    print(*wrong, sep="\n")
    outcomes: dict[str, dict[str, dict[str, int]]] = {}
    for (name, damage, found), count in sorted(counts.items()):
        outcomes.setdefault(name, {}).setdefault(damage, {})[found] = count
    total: Counter[str] = Counter()
    for (_, _, found), count in counts.items():
        total[found] += count
    print(f"{given.files} files: {', '.join(f'{count} {found}' for found, count in total.most_common())}")
    if not given.kinds:
        about = {"study": "files", "files": given.files, "seed": given.seed, "total": total, "outcomes": outcomes}
        save({**about, "provenance": provenance()}, RECORD)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
