"""Files: old ones are still read, damaged ones are named or harmless, and none is believed against its inputs."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_files
import numpy as np
import pytest
import torch
from torch import nn

import wda
from wda import AdversarialDistribution, Bracket, Threat, cli, experiment, files, models
from wda.experiment import Cell, finished, load_sweep, read_finetune, run_cell, run_sweep
from wda.experiment.inputs import Inputs
from wda.experiment.records import load, save
from wda.experiment.sweeps import whole_record
from wda.passes import Counts
from wda.training import finetune

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"
OLD = Path(__file__).parent / "written_by_472b3d5"
BALL: dict[str, Any] = {"eps": 0.1, "order": 1}

# -- files of before -------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """The network and the sample of the old files; every number is exact on every machine."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for weights in net.parameters():
            weights.copy_((torch.arange(weights.numel(), dtype=torch.float64) * 7 % 16 / 8 - 1).view_as(weights))
    return net.eval()


def sample(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    x = (torch.arange(n * 6, dtype=torch.float64) * 29 % 64 / 64).view(n, 2, 3)
    return x, network()(x).argmax(1)


THREAT = Threat("Linf", 0.125, order=2)


def test_an_old_distribution_is_read() -> None:
    x, y = sample()
    counts = Counts(3, 2, 0.5, 0.25, 7)
    written = AdversarialDistribution.from_points(x, x * 0.875, y, THREAT, weight=0.5, counts=counts)
    found = AdversarialDistribution.load(OLD / "distribution.npz")
    assert fuzz_files._distribution_same(found, written)
    assert found.counts.batch == 7


def test_an_old_bracket_is_read() -> None:
    found = Bracket.load(OLD / "bracket.json")
    assert found.radius.tolist() == [0, 0.0625, 0.25, 0.5]
    assert found.distance.tolist() == [0, 0.0625, 0.5, torch.inf]
    assert (found.threat, found.why, found.seconds) == (THREAT, None, (1.5, 2.5))


@pytest.mark.parametrize("path", sorted(OLD.glob("digits_*.json")), ids=lambda path: path.stem)
def test_an_old_record_is_read(path: Path) -> None:
    assert load(path) == json.loads(path.read_text())


def test_an_old_state_of_autoattack_is_gone_on_with(tmp_path: Path) -> None:
    state = shutil.copy(OLD / "state.npz", tmp_path)
    x, y = sample(8)
    adv = wda.attack("autoattack", network(), x, y, Threat("Linf", 0.125, "inf"), state=state, progress=False)
    assert adv.counts.backward == 0, "all its attacks were done"
    with np.load(OLD / "state.npz") as written:
        assert np.array_equal(adv.moved.numpy(), written["points"][adv.moved_source])


def test_an_old_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    path = Path(shutil.copy(OLD / "checkpoint.pt", tmp_path))
    held = torch.load(path, weights_only=True)["state"]
    how: dict[str, Any] = {"batch_size": 8, "tau": 0.0625, "momentum": 0.5, "attack_options": {"steps": 2}}
    how |= {"test": sample(12), "checkpoint": path, "progress": False}
    done = finetune(network(), sample(), sample(), THREAT, epochs=1, **how)
    assert [epoch.validation.clean for epoch in done.history] == [e["validation"]["clean"] for e in held["history"]]
    assert all(torch.equal(tensor, held["best"][name]) for name, tensor in done.model.state_dict().items())
    longer = finetune(network(), sample(), sample(), THREAT, epochs=2, **how)
    assert longer.history[:2] == done.history
    assert files.unstamped(torch.load(path, weights_only=True))["state"]["epoch"] == 3


CELLS = [p for name in ("digits", "mnist", "sweep/*") for p in sorted(RESULTS.glob(f"{name}/*.json"))]


def test_all_committed_records_are_read_with_their_figures() -> None:
    """Their aggregates follow from their tables, their names from their parameters, both sides from the radii."""
    for path in CELLS:
        assert load(path) == json.loads(path.read_text()), path
    tuned = sorted(RESULTS.glob("finetune/*.json"))
    for path in tuned:
        assert read_finetune(path) == json.loads(path.read_text()), path
    brackets = sorted(RESULTS.glob("bracket/*.json"))
    for path in brackets:
        found, stored = Bracket.load(path), json.loads(path.read_text())
        assert (found.lower, found.upper) == pytest.approx((stored["lower"], stored["upper"]), abs=1e-12)
    assert min(map(len, (CELLS, tuned, brackets))) > 15


def test_all_committed_records_are_of_the_models_and_data_at_hand() -> None:
    at_hand, compared = Inputs(), 0
    for path in [*CELLS, *sorted(RESULTS.glob("finetune/*.json"))]:
        about = json.loads(path.read_text())["parameters"]
        now = {"data_sha256": at_hand.data(about["data"], about["n"]), "model_sha256": at_hand.model(about["model"])}
        for key, value in now.items():
            assert value in (None, about[key]), path
            compared += value is not None
    assert compared > 300


# -- damage ----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_or_harmless(tmp_path: Path) -> None:
    counts, wrong = fuzz_files.fuzz(tmp_path, 20 * len(fuzz_files.KINDS), seed=7)
    assert not wrong
    found = Counter[str]()
    for (_, _, outcome), count in counts.items():
        found[outcome] += count
    assert found["named"] > 0.6 * found.total()


def test_the_fuzz_sees_what_a_checksum_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as blind:
        blind.setattr(files, "digest", lambda _: "0")
        _, wrong = fuzz_files.fuzz(tmp_path / "one", 120, 0, ["bracket", "distribution"])
        assert any("believed" in line for line in wrong)
    with monkeypatch.context() as blind:
        blind.setattr(experiment.records, "_check_aggregates", lambda _: None)
        runs = (fuzz_files.fuzz(tmp_path / f"two {seed}", 100, seed, ["record"])[1] for seed in range(20))
        assert any("another figure" in line for wrong in runs for line in wrong)


def test_a_single_bit_of_an_archive_never_makes_other_data(tmp_path: Path) -> None:
    path = fuzz_files._make_distribution(tmp_path)
    whole, read, draw = path.read_bytes(), AdversarialDistribution.load(path), random.Random(0)
    for _ in range(400):
        path.write_bytes(whole)
        fuzz_files.flip_a_bit(path, draw)
        assert fuzz_files.tried(fuzz_files.KINDS["distribution"], path, read, checked=True) in ("named", "equal")


@pytest.mark.parametrize("content", [
    {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": 1, "b": None}, {"a": {"b": 1}},
    {"a": np.array(1)}, {"a": np.array([1])}, {"a": np.array([1], np.int32)}, {"a": torch.tensor(1)},
    {"a": torch.tensor([[1]])},
])  # fmt: skip
def test_a_digest_tells_kinds_and_shapes_apart(content: dict[str, Any]) -> None:
    assert files.digest(content) == files.digest(dict(content)) != files.digest({"a": 1})


def test_half_a_stamp_or_one_of_another_schema_is_refused() -> None:
    whole = files.stamped({"a": 1})
    for left_out in ("schema", "checksum"):
        with pytest.raises(KeyError):
            files.unstamped({key: value for key, value in whole.items() if key != left_out})
    later = {"a": 1, "schema": files.SCHEMA + 1}
    with pytest.raises(ValueError, match="schema=2: 1 is accepted"):
        files.unstamped({**later, "checksum": files.digest(later)})


# -- records that were edited ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cell = Cell(attack="wda", n=12, kappa=2, options={"steps": 3, "probe_steps": 1}, **BALL)
    folder = tmp_path_factory.mktemp("record")
    run_cell(cell, folder)
    return folder / f"{cell.name}.json"


OTHER_FIGURES = [
    ("accuracy", 7), ("accuracy", 0.123), ("accuracy_interval", [0.1, 0.2]), ("clean_accuracy", 0.75), ("risk_ce", 0.1),
    ("clean_accuracy_interval", [0.0, 1.0]), ("risk_ce_interval", [0.0, 1.0]), ("transport_cost", 0.0),
    ("risk_ce", None),
]  # fmt: skip
OTHER_PARAMETERS = [
    ("data", "mnist"), ("model", "digits-cnn"), ("norm", "L2"), ("eps", 0.5), ("order", "2.0"), ("attack", "pgd"),
    ("kappa", 1.0), ("n", 11), ("seed", 1), ("dtype", "float32"), ("shards", 2), ("options", {"steps": 4}),
    ("data_sha256", "0"), ("batch_size", 0), ("kappa", 0.5), ("eps", -0.1), ("order", 1),
]  # fmt: skip


@pytest.mark.parametrize("stamp", ["as it was", "made anew", "removed"])
@pytest.mark.parametrize(("key", "value"), [*OTHER_FIGURES, *((f"parameters.{k}", v) for k, v in OTHER_PARAMETERS)])
def test_an_edited_record_is_not_believed(stamp: str, key: str, value: object, record: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(record, tmp_path))
    held = json.loads(path.read_text())
    inner = held["parameters"] if "." in key else held
    inner[key.rpartition(".")[2]] = value
    if stamp != "as it was":
        del held["checksum"], held["schema"]
    if stamp == "made anew":
        held = files.stamped(held)
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"makes no row.*no record, or damaged") as error:
        experiment.read(tmp_path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="no record, or damaged"):
        finished(Cell(attack="wda", n=12, kappa=2, options={"steps": 3, "probe_steps": 1}, **BALL), tmp_path)


def test_a_record_under_another_name_is_not_believed(record: Path, tmp_path: Path) -> None:
    """The other way round: the content is as it was written, and its place says another ball."""
    shutil.copy(record, tmp_path / record.name.replace("_0.1_", "_0.5_"))
    with pytest.raises(ValueError, match=r"its parameters are those of digits_digits-mlp_Linf_0\.1_W1_wda"):
        experiment.read(tmp_path)


# -- tables beside bad records ---------------------------------------------------------------------------------------

FGSM = 'n = 8\ndata = "digits"\nmodel = "digits-mlp"\nnorm = "Linf"\norder = 1\nattack = "fgsm"\n'


def sweep_of(folder: Path, text: str) -> experiment.Sweep:
    (folder / "mine.toml").write_text(text)
    return load_sweep(str(folder / "mine.toml"))


def lacking(key: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        held = json.loads(path.read_text())
        del held[key]
        path.write_text(json.dumps(held))

    return spoil


def shard_of_many(path: Path) -> None:
    """Every one of these would have been looked for."""
    for part in ("1of999999999", "1of0", "of", "²of³", "1of2of3", "3of2"):
        path.with_name(f"{path.stem}_{part}.json").write_text("{}")
    path.write_text("half a rec")


SPOILT: dict[str, Callable[[Path], Any]] = {
    **{
        f"without {key}": lacking(key)
        for key in ("provenance", "parameters", "samples", "passes", "accuracy", "schema")
    },
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "empty": lambda path: path.write_bytes(b""),
    "shards": shard_of_many,
}


def test_bad_records_are_named_and_the_others_make_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    radii = [round(0.01 * (k + 1), 2) for k in range(len(SPOILT) + 1)]
    sweep, records = sweep_of(tmp_path, f"[[grid]]\neps = {radii}\n{FGSM}"), tmp_path / "out" / "records"
    paths = []
    for task in sweep.tasks:
        run_cell(task.cell, records)
        paths.append(records / f"{task.cell.name}.json")
    for path, spoil in zip(paths, SPOILT.values(), strict=False):
        spoil(path)
    with fuzz_files.no_hang():
        assert cli.main(["table", str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    for path in paths[:-1]:
        assert told.count(f"wda table: path={str(path)!r} is no record, or damaged") == 1
    assert str(paths[-1]) not in told
    assert f"{len(SPOILT)} of {len(paths)} cells have no record that can be used" in told
    lines = (tmp_path / "out" / "tables" / "cells.csv").read_text().splitlines()
    assert len(lines) == 2
    with pytest.raises(ValueError, match="no record, or damaged"):
        experiment.results(sweep, records)
    with pytest.raises(ValueError, match="no record, or damaged"):
        run_sweep(sweep, tmp_path / "out")


def test_stray_shards_stop_nothing(tmp_path: Path) -> None:
    cell = Cell(attack="fgsm", n=8, **BALL)
    for part in cell.split(2):
        run_cell(part, tmp_path)
    for part in ("1of999999999", "1of0", "of", "²of³", "1of2of3", "3of2", "1of1"):
        (tmp_path / f"{cell.name}_{part}.json").write_text("{}")
    whole = whole_record(cell, tmp_path)
    assert whole is not None
    assert len(whole["samples"]["index"]) == 8


# -- inputs that changed ---------------------------------------------------------------------------------------------


def store_model(folder: Path, seed: int, name: str = "mine", more: tuple[str, ...] = ()) -> None:
    """A card and its weights, as under WDA_DATA."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(10, 64, generator=generator).numpy(), "b": torch.zeros(10).numpy()}
    (folder / "models").mkdir(parents=True, exist_ok=True)
    path = folder / "models" / f"{name}.npz"
    np.savez(path, **weights)
    layers = [{"op": "flatten"}, {"op": "linear", "weight": "w", "bias": "b"}, *({"op": op} for op in more)]
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"layers": layers, "weights_file": path.name, "weights_sha256": sha, "data": "digits"}
    path.with_suffix(".json").write_text(json.dumps(about))


def store_data(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    x = torch.rand(12, 1, 8, 8, generator=generator).numpy()
    np.savez(path, x=x, y=np.arange(12) % 10)


def store_function(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), folder / "weights.pt")


MODULE = "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
READING = MODULE.replace("return ", "net = ") + (
    "    net.load_state_dict(torch.load({path!r}, weights_only=True))\n    return net\n"
)


def inputs(what: str, folder: Path) -> tuple[dict[str, Any], Callable[[int], None], str]:
    """Names in a cell, how what they stand for is stored anew, and what a message calls it."""
    if what == "stored model":
        return {"model": "mine"}, lambda seed: store_model(folder, seed), "another model"
    if what == "layers":  # of the same weights
        return {"model": "mine"}, lambda seed: store_model(folder, 0, more=("relu",) * seed), "another network"
    if what == "data set":
        return {"data": "own"}, lambda seed: store_data(folder / "data" / "own_test.npz", seed), "another data set"
    if what == "file of data":
        return {"data": str(folder / "a.npz")}, lambda seed: store_data(folder / "a.npz", seed), "another data set"
    store_function(folder, 0)
    module = f"made_{hashlib.sha256(bytes(folder)).hexdigest()[:8]}"
    if what == "source":

        def write(seed: int) -> None:
            text = MODULE.replace("10))", f"10){', torch.nn.Tanh()' * seed})").replace(
                "():\n", "():\n    torch.manual_seed(0)\n"
            )
            (folder / f"{module}.py").write_text(text)
            sys.modules.pop(module, None)  # as in another process
            importlib.invalidate_caches()
            shutil.rmtree(folder / "__pycache__", ignore_errors=True)

        return {"model": f"{module}:make"}, write, "another network"
    text = MODULE if what == "function and weights" else READING.format(path=str(folder / "weights.pt"))
    (folder / f"{module}.py").write_text(text)
    at = f"@{folder / 'weights.pt'}" if what == "function and weights" else ""
    return (
        {"model": f"{module}:make{at}"},
        lambda seed: store_function(folder, seed),
        "another model",
    )


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("what", [
    "stored model", "layers", "data set", "file of data", "function and weights", "function that reads", "source",
])  # fmt: skip
def test_what_a_name_stands_for_now_is_compared_wherever_a_record_says_that_a_cell_is_done(
    what: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    names, store, called = inputs(what, tmp_path)
    store(0)
    of = "".join(f'{key} = "{value}"\n' for key, value in names.items())
    rest = "\n".join(line for line in FGSM.splitlines() if line.partition(" ")[0] not in names)
    sweep, out = sweep_of(tmp_path, f"[[grid]]\neps = 0.1\n{of}{rest}\n"), tmp_path / "out"
    [task], words = sweep.tasks, [str(tmp_path / "mine.toml"), "-o", str(out)]
    cells = [task.cell] if shards == 1 else task.cell.split(shards)
    for cell in cells:
        run_cell(cell, out / "records")
    told = list[str]()
    assert run_sweep(sweep, out, say=told.append) == []
    assert told == ["mine: 0 of 1 cells to run"]
    assert cli.main(["table", *words]) == 0
    store(1)
    capsys.readouterr()
    for command in ("sweep", "table"):
        assert cli.main([command, *words]) == 2
        said = capsys.readouterr().err
        assert re.search(rf"is of {called}( with the same weights)? of these names: run it again", said)
        assert str(out / "records" / cells[0].name) in said
    with pytest.raises(ValueError, match=f"is of {called}"):
        run_cell(cells[-1], out / "records")
    if shards == 1:  # one shard alone decides that it need not be run, too
        (part, _) = task.cell.split(2)
        store(0)
        (out / "records" / f"{task.cell.name}.json").unlink()
        run_cell(part, out / "records")
        store(1)
        with pytest.raises(ValueError, match=f"is of {called}"):
            run_sweep(sweep, out, shards=2)


RANDOM = """import torch
class Net(torch.nn.Linear):
    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x.flatten(1), 0.5, training=True))
def make():
    torch.manual_seed(0)
    return Net(64, 10)
"""


@pytest.mark.filterwarnings("ignore::wda.Untrustworthy")
def test_a_random_model_is_known_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random_model_of_mine.py").write_text(RANDOM)
    monkeypatch.syspath_prepend(tmp_path)
    cell = Cell(model="random_model_of_mine:make", attack="fgsm", n=8, **BALL)
    assert run_cell(cell, tmp_path) == run_cell(cell, tmp_path)


def test_what_is_no_longer_at_hand_leaves_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    store_model(tmp_path, 0)
    cell = Cell(model="mine", attack="fgsm", n=8, **BALL)
    first = run_cell(cell, tmp_path / "records")
    shutil.rmtree(tmp_path / "models")
    assert finished(cell, tmp_path / "records") == first
    store_model(tmp_path, 0)
    (tmp_path / "models" / "mine.npz").write_bytes(b"PK, and no more")  # there, and not what the card states
    with pytest.raises(ValueError, match=r"has inputs that cannot be loaded now: .*mine\.npz"):
        finished(cell, tmp_path / "records")


def test_inputs_are_loaded_once_and_again_only_where_files_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    monkeypatch.setattr("wda.experiment.inputs._TICK", 0)
    store_model(tmp_path, 0)
    loaded, plain = list[str](), models.load
    monkeypatch.setattr(models, "load", lambda name: (loaded.append(name), plain(name))[1])

    def summed() -> str | None:
        at_hand = Inputs(tmp_path)
        found = at_hand.model("mine")
        assert at_hand.model("mine") == found
        at_hand.keep()
        return found

    first = summed()
    assert (summed(), loaded) == (first, ["mine"]), "it was kept"
    cache = tmp_path / ".inputs.json"
    for damage in (b"", b"[]", b'{"model mine": 3}', cache.read_bytes().replace(first.encode(), b"0" * 64)):
        cache.write_bytes(damage)
        assert summed() == first, "it only saves time"
    path = tmp_path / "models" / "mine.npz"
    before = path.stat()
    store_model(tmp_path, 1)
    assert path.stat().st_size == before.st_size
    for file in (path, path.with_suffix(".json")):
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert summed() != first, "as old and as large, and another file"


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    store_model(tmp_path, 0)
    at_hand = Inputs(tmp_path)
    monkeypatch.setattr(time, "time_ns", lambda: os.stat(tmp_path / "models" / "mine.npz").st_ctime_ns + 1)
    at_hand.model("mine")
    at_hand.keep()
    assert not (tmp_path / ".inputs.json").exists()


def test_records_of_any_study_are_stamped(tmp_path: Path) -> None:
    save({"study": "mine", "rows": [1, 0.5, None]}, tmp_path / "a.json")
    assert files.read_json(tmp_path / "a.json") == {"study": "mine", "rows": [1, 0.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        save({"study": float("nan")}, tmp_path / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["robustbench:cifar10/Linf/Any", "wda.models:available@{}/mine.pt", "cifar10"])
def test_other_bytes_in_a_file_are_looked_at_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of RobustBench's models, of weights beside a name, and in the folder of a data set."""
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    monkeypatch.setattr("wda.experiment.inputs._TICK", 0)
    named = {
        "robustbench:cifar10/Linf/Any": "robustbench/cifar10/Linf/Any.pt",
        "cifar10": "torchvision/cifar-10-batches-py/a",
    }
    path = tmp_path / named.get(name, "mine.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    name = name.format(tmp_path) if ":" in name and "@" in name else name
    loaded = list[str]()

    def data(of: str, n: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        loaded.append(of)
        return torch.full((4, 2), path.stat().st_size / 10), torch.arange(4)

    def model(of: str) -> nn.Module:
        loaded.append(of)
        return nn.Linear(path.stat().st_size, 2)

    monkeypatch.setattr(models, "load", model)
    monkeypatch.setattr("wda.experiment.inputs.load_data", data)
    path.write_bytes(b"1")
    at_hand, sums = Inputs(), set[str | None]()
    for content in (b"1", b"22", b"333"):
        path.write_bytes(content)
        at_hand = Inputs() if "@" in name else at_hand  # whatever a function reads, it is called again by the next
        sums |= {at_hand.data(name, None) if name == "cifar10" else at_hand.model(name) for _ in range(3)}
    assert len(sums) == len(loaded) == 3
