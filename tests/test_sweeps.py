"""Cells of an experiment, their shards and records; sweeps and their tables."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import kills
import psutil
import pytest
import torch
from kills import HANG

import wda
from wda import cli, experiment
from wda.experiment import Cell, Sweep, engine, load_sweep, merge, run_cell, run_sweep, within
from wda.experiment.sweeps import shipped

BALL: dict[str, Any] = {"eps": 0.1, "order": 1}
ONE_BY_ONE: list[dict[str, Any]] = [
    {"attack": "fgsm", **BALL},
    {"attack": "pgd", **BALL, "kappa": 2, "options": {"steps": 5}},
    {"attack": "deepfool", "norm": "L2", "eps": 0.5, "order": "inf", "options": {"steps": 5}},
    {"attack": "apgd-ce", **BALL, "options": {"steps": 5}},
    {"attack": "apgd-dlr", **BALL, "options": {"steps": 5, "restarts": 2}},
    {"attack": "wda", **BALL, "kappa": 2, "options": {"steps": 4, "probe_steps": 2}},
    {"attack": "fab", "options": {"steps": 5}},
    {"attack": "wda++", "options": {"steps": 5}},
    {"attack": "closest", "norm": "L2", "options": {"steps": 5, "restarts": 2}},
]
COUPLED = [name for name in wda.attacks.available() if wda.attacks.kind(name) in ("together", "budgeted")]


def content(record: dict[str, Any]) -> dict[str, Any]:
    """A record but for timing and provenance; the batch size is one of the latter."""
    record = json.loads(json.dumps(record))
    del record["passes"]["seconds"], record["provenance"], record["parameters"]["batch_size"]
    return record


def close(one: Any, other: Any) -> None:
    """Equal, but for 1e-5 in numbers that are not whole."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, list):
        assert one == pytest.approx(other, abs=1e-5)
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(one, float) else other)


@pytest.mark.parametrize("chosen", ONE_BY_ONE, ids=lambda chosen: str(chosen["attack"]))
def test_shards_and_batch_sizes_do_not_change_a_record(chosen: dict[str, Any], tmp_path: Path) -> None:
    cell = Cell(n=40, batch_size=200, **chosen)
    whole = run_cell(cell, tmp_path)
    assert merge([whole]) == whole
    others = [merge([run_cell(part, tmp_path) for part in cell.split(shards)[::-1]]) for shards in (3, 7)]
    small = run_cell(Cell(n=40, batch_size=16, **chosen), tmp_path / "small")
    for other in (*others, small):
        passes = other["passes"]
        del passes["checks"]  # of the model, for each shard
        for way in ("forward", "backward"):  # whether a point on a boundary needs one more, rounding decides
            assert passes.pop(way) == pytest.approx(whole["passes"][way], rel=0.01 * (cell.eps is None))
    for way in ("forward", "backward", "checks"):
        del whole["passes"][way]
    for other in others:
        assert content(other) == content(whole)
    close(content(small), content(whole))


def test_records_in_which_checks_of_the_model_count_as_passes_keep_their_figures(tmp_path: Path) -> None:
    """Two passes in each shard were its own; of a whole run they are two. Beside newer shards, which have none, too."""
    whole = run_cell(Cell(attack="fgsm", eps=0.1, order=1, n=9), tmp_path)["passes"]["forward"]
    for older in (3, 2, 1):
        shards = [run_cell(part, tmp_path) for part in Cell(attack="fgsm", eps=0.1, order=1, n=9).split(3)]
        for shard in shards[:older]:
            del shard["passes"]["checks"]
            shard["passes"]["forward"] += 2 / len(shard["samples"]["index"])
        passes = merge(shards)["passes"]
        assert passes["forward"] == pytest.approx(whole + 2 / 9)
        assert ("checks" in passes) == (older < 3)


def test_every_attack_is_in_one_of_the_two_tests() -> None:
    assert {chosen["attack"] for chosen in ONE_BY_ONE} | set(COUPLED) == set(wda.attacks.available())


@pytest.mark.parametrize("name", COUPLED)
def test_more_than_one_shard_of_an_attack_that_couples_samples_is_an_error(name: str) -> None:
    Cell(attack=name, eps=0.1, order=2)
    words = re.escape(f"shards=3: attack '{name}' moves samples together, so 1 is accepted")
    with pytest.raises(ValueError, match=words):
        Cell(attack=name, eps=0.1, order=2, shards=3)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"attack": "nobody"}, "attack='nobody'"),
        ({"attack": "pgd"}, "eps=None, order=None: attack 'pgd' needs both"),
        ({"attack": "closest", "eps": 0.1}, "eps=0.1.*'closest' takes None"),
        ({"attack": "closest", "kappa": 2}, "kappa=2.0"),
        ({"attack": "closest", "norm": "L3"}, "norm='L3'"),
        ({"attack": "wpgd", "eps": 0.1, "order": 1}, "order=1: attack 'wpgd'"),
        ({"attack": "wda", "eps": 0.1, "order": "inf", "kappa": 2}, "kappa=2.0 with order=inf"),
        ({"options": {"stepz": 3}}, "'stepz'"),
        ({"shards": 3, "shard": 3}, "shard=3"),
        ({"shards": 0}, "shards=0"),
        ({"n": 3, "shards": 4}, "shards=4"),
        ({"n": 0}, "n=0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_bad_cell_is_refused_when_it_is_made(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cell(**chosen)


def test_more_shards_than_samples_are_found_before_the_first_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shards=600"):
        run_cell(Cell(shards=600), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_one_record_of_distances_serves_every_budget(tmp_path: Path) -> None:
    x, y = wda.data.load("digits", n=40)
    net = wda.models.load("digits-cnn").double()
    distances = wda.distances(net, x.double(), y)
    record = run_cell(Cell(model="digits-cnn", n=40), tmp_path)
    for order in (1, 2, math.inf):
        for eps in (0.0, 0.02, 0.1):
            threat = wda.Threat("Linf", eps, order)
            adv = distances.distribution(threat)
            found = within(record, threat)
            assert found["accuracy"] == pytest.approx(adv.accuracy(net), abs=1e-6)
            assert found["risk_ce"] == pytest.approx(adv.risk(net), abs=1e-6)
            assert found["transport_cost"] <= eps
            assert found["transport_cost"] == pytest.approx(adv.audit(), abs=1e-6)
    with pytest.raises(ValueError, match=r"'closest' serves every ball: name one, by wda\.experiment\.within"):
        experiment.read(tmp_path)
    with pytest.raises(ValueError, match="in its norm"):
        within(record, wda.Threat("L2", 0.1))


def test_a_finished_cell_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    cell = Cell(attack="fgsm", n=5, **BALL)
    first = run_cell(cell, tmp_path)
    assert run_cell(cell, tmp_path) == first
    assert journal(tmp_path) == [f"start {cell.name}", f"end {cell.name}"]
    run_cell(cell, tmp_path, again=True)
    assert len(journal(tmp_path)) == 4


def test_a_record_of_another_model_under_the_same_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pt"
    (tmp_path / "stale_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def train(seed: int) -> None:
        torch.manual_seed(seed)
        torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).state_dict(), weights)

    train(0)
    cell = Cell(model=f"stale_model:make@{weights}", attack="fgsm", n=5, **BALL)
    first = run_cell(cell, tmp_path / "out" / "records")
    assert run_cell(cell, tmp_path / "out" / "records") == first
    train(1)
    with pytest.raises(ValueError, match="of another model of these names"):
        run_cell(cell, tmp_path / "out" / "records")
    grid = 'attack = "fgsm"\nn = 5\nnorm = "Linf"\neps = 0.1\norder = 1\n'
    sweep_of(tmp_path, f'[[grid]]\nmodel = "{cell.model}"\n{grid}')
    assert cli.main(["sweep", str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]) == 2
    assert "of another model of these names" in capsys.readouterr().err
    assert run_cell(cell, tmp_path / "out" / "records", again=True) != first
    weights.unlink()
    assert run_cell(cell, tmp_path / "out" / "records")["parameters"]["model"] == cell.model, "it is still a record"


def journal(folder: Path) -> list[str]:
    """What was started and ended, in turn."""
    return [line.split(maxsplit=1)[1] for line in (folder / "journal.txt").read_text().splitlines()]


def test_two_processes_with_one_cell_run_it_once(tmp_path: Path) -> None:
    script = (
        "import sys; from wda.experiment import Cell, run_cell\n"
        "run_cell(Cell(attack='pgd', eps=0.1, order=1, n=200), sys.argv[1])"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [line.split()[0] for line in journal(tmp_path)] == ["start", "end"]


def test_a_cell_that_fails_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"{tmp_path}/\S+ cannot be written: No space left"):
        run_cell(Cell(attack="fgsm", n=5, **BALL), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(wda.DataUnavailable, match="nobody"):
        run_cell(Cell(model="nobody", n=5), tmp_path)
    assert not list(tmp_path.glob("*.json"))


CRAMPED = """
import torch
import wda

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = wda.models.load("digits-mlp")

    def forward(self, x):
        if len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(x)
"""


@pytest.mark.parametrize("chosen", [{"attack": "pgd", **BALL}, {"attack": "closest", "options": {"steps": 3}}])
def test_a_cell_that_runs_out_of_memory_takes_smaller_batches_and_its_record_says_so(
    chosen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cramped.py").write_text(CRAMPED)
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level("INFO", logger="wda"):
        record = run_cell(Cell(model="cramped:Net", n=20, batch_size=16, **chosen), tmp_path)
    assert "out of memory: batches of 4 rows from here on" in caplog.text
    assert record["provenance"]["batch"] == 4
    roomy = run_cell(Cell(n=20, batch_size=16, **chosen), tmp_path)
    assert roomy["provenance"]["batch"] == roomy["parameters"]["batch_size"] == 16
    close(record["samples"], roomy["samples"])


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(4e9, -1e6)
    monkeypatch.setattr(time, "time", lambda: next(ticks))
    right = time.gmtime
    monkeypatch.setattr(time, "gmtime", lambda: right(next(ticks)))
    cell = Cell(attack="fgsm", n=5, **BALL)
    first = run_cell(cell, tmp_path)
    assert first["passes"]["seconds"] >= 0
    assert journal(tmp_path) == [f"start {cell.name}", f"end {cell.name}"]
    for path in tmp_path.iterdir():
        os.utime(path, (4e9, 4e9))  # in 2096
    assert run_cell(cell, tmp_path) == first
    assert len(journal(tmp_path)) == 2


def test_shards_of_different_runs_do_not_merge(tmp_path: Path) -> None:
    one, two = (run_cell(part, tmp_path) for part in Cell(n=6, options={"steps": 2, "restarts": 1}).split(2))
    with pytest.raises(ValueError, match="shards \\[1\\]: 0 to 1"):
        merge([two])
    two["parameters"]["model_sha256"] = "another"
    with pytest.raises(ValueError, match="differ in model_sha256"):
        merge([one, two])


SWEEP = """
about = "for tests"
figures = ["kappa", "passes", "steps"]
[common]
n = 12
data = "digits"
norm = "Linf"
eps = [0.05, 0.1]
[[grid]]
model = ["digits-mlp", "digits-cnn"]
order = 1
attack = [
  { name = "wda", kappa = [1, 2], steps = [2, 4], probe_steps = 1 },
  { name = "closest", order = [1, 2], steps = 3 },
]
"""


def sweep_of(tmp_path: Path, text: str = SWEEP) -> Sweep:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_sweep(str(path))


def test_a_grid_is_a_product_and_nearest_errors_are_sought_once(tmp_path: Path) -> None:
    tasks = sweep_of(tmp_path).tasks
    assert len(tasks) == 2 * (2 * 2 * 2 + 1)
    closest = [task for task in tasks if task.cell.attack == "closest"]
    balls = ["W_1 Linf 0.05", "W_2 Linf 0.05", "W_1 Linf 0.1", "W_2 Linf 0.1"]
    assert [str(ball) for ball in closest[0].balls] == balls
    assert closest[0].cell.options == {"steps": 3}
    assert {task.cell.options["steps"] for task in tasks if task.cell.attack == "wda"} == {2, 4}
    assert len({task.cell.name for task in tasks}) == len(tasks)


@pytest.mark.parametrize("name", experiment.sweeps())
def test_the_shipped_sweeps_can_be_read(name: str) -> None:
    assert load_sweep(name).about


def test_table1_has_all_the_rows_of_the_paper() -> None:
    import csv

    with (Path(__file__).parents[1] / "data" / "published" / "wda_table1.csv").open() as file:
        read = list(csv.DictReader(file))
    rows = [(f"robustbench:{row['dataset']}/{row['norm']}/{row['robustbench_id']}", row["eps"]) for row in read]
    balls = {(task.cell.model, str(ball.eps)) for task in load_sweep("table1").tasks for ball in task.balls}
    assert balls == {(model, str(wda.Threat("L2", eps).eps)) for model, eps in rows}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid = [", "mine.toml"),
        ("about = 'x'", "'grid' is missing"),
        (SWEEP + "kapa = 1", "'kapa'"),
        (SWEEP.replace("figures", "figure"), "'figure'"),
        (SWEEP.replace('"closest"', '"nearest"'), "attack='nearest'"),
        (SWEEP.replace("eps = [0.05, 0.1]", ""), "'eps' is missing"),
        (SWEEP.replace("kappa = [1, 2]", "kappa = 0.5"), "kappa=0.5"),
        (SWEEP + "shards = 3", "'shards'"),
        (SWEEP.replace('"wda"', '"Wda"'), "attack='Wda'"),
        (SWEEP.replace("n = 12", 'n = "12"'), "n='12': a whole number"),
        (SWEEP.replace("order = 1", 'order = "two"', 1), "order='two'"),
        (SWEEP.replace("[0.05, 0.1]", '"abc"'), "eps='abc'"),
        (SWEEP.replace('["digits-mlp", "digits-cnn"]', "[]"), "no cell is defined"),
        ("grid = []", "no cell is defined"),
    ],
)
def test_a_bad_sweep_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        sweep_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SWEEP.replace('"for tests"', "5"), "about=5: text is accepted"),
        (SWEEP.replace('["kappa", "passes", "steps"]', '"kappa"'), "figures='kappa': a list of names is accepted"),
        ("common = 3\ngrid = []", "common=3: one table"),
        ("grid = 3", "grid=3: tables"),
        ("grid = [3]", r"grid=\[3\]: tables"),
        (SWEEP.replace("[[grid]]", "[grid]"), "tables .* is accepted"),
        ("[[grid]]\nattack = 3", "attack=3: a name, or a table"),
        (SWEEP.replace('["digits-mlp", "digits-cnn"]', "3"), "model=3: a name is accepted"),
        (SWEEP.replace("[0.05, 0.1]", "true"), "eps=True"),
    ],
)
def test_a_value_of_another_kind_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        sweep_of(tmp_path, text)


def test_a_file_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["sweep", str(path)]) == 2
    assert f"wda sweep: {path}: 'utf-8' codec" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "table"])
@pytest.mark.parametrize(
    ("name", "said"), [("tabel1", "is 'table1' meant? "), ("kapa", "is 'kappa' meant? "), ("nothing", "")]
)
def test_an_unknown_sweep_names_the_nearest_and_those_there_are(
    name: str, said: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, name]) == 2
    assert f"sweep='{name}': {said}kappa, local, runtime" in capsys.readouterr().err


def test_the_same_records_give_the_same_tables_whole_or_in_shards(tmp_path: Path) -> None:
    text = SWEEP.replace('"digits-mlp", "digits-cnn"', '"digits-mlp"')
    sweep = sweep_of(tmp_path, text)
    for task in sweep.tasks:
        run_cell(task.cell, tmp_path / "whole")
        for shard in task.cell.split(3):
            run_cell(shard, tmp_path / "shards")
    paths, missing = experiment.write_tables(sweep, tmp_path / "whole", tmp_path / "a")
    assert not missing
    names = [path.name for path in paths]
    assert names == ["table.csv", "cells.csv", "costs.csv", *(f"{figure}-digits.svg" for figure in sweep.figures)]
    experiment.write_tables(sweep, tmp_path / "whole", tmp_path / "again")
    experiment.write_tables(sweep, tmp_path / "shards", tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        if name not in ("costs.csv", "passes-digits.svg"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    lines = (tmp_path / "a" / "cells.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 2 + 4


def test_a_table_says_what_is_missing_and_no_record_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tmp_path)
    words = ["table", str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "holds no record of the sweep 'mine'" in capsys.readouterr().err
    run_cell(sweep.tasks[0].cell, tmp_path / "out" / "records")
    assert cli.main(words) == 1
    assert "17 of 18 cells have no record" in capsys.readouterr().err


def test_records_of_another_version_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, records = sweep_of(tmp_path), tmp_path / "out" / "records"
    record = run_cell(sweep.tasks[0].cell, records)
    record["provenance"]["wda"] = "0.0.1"
    experiment.records.save(record, records / f"{sweep.tasks[0].cell.name}.json")
    for command in ("sweep", "table"):
        assert cli.main([command, str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]) == 2
        assert "a record of version 0.0.1 of wda" in capsys.readouterr().err


def test_a_folder_takes_one_sweep_at_a_time_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_of(tmp_path)
    monkeypatch.setattr("wda.experiment.engine._PATIENCE", 0.2)
    (tmp_path / "out").mkdir()
    words = ["sweep", str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]
    with (tmp_path / "out" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cli.main(words) == 2
    assert "another sweep is at work in this folder: a process that is not known" in capsys.readouterr().err
    with engine._only_one(tmp_path / "out" / ".lock", print):
        assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert f"this folder: process {os.getpid()} on " in said
    assert f"it ends by: kill {os.getpid()}" in said


HUNG = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
cell = subprocess.Popen(["sleep", "3600"])
with open("PLACE.new", "w") as file:
    file.write(f"{os.getpid()} {cell.pid}")
os.rename("PLACE.new", "PLACE")
time.sleep(3600)
"""


def alive(number: str) -> bool:
    """Whether a process of that number runs; one that has ended and waits to be noticed does not."""
    return psutil.pid_exists(int(number)) and psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE


def wait_for_the_end_of(*numbers: str) -> None:
    """Of processes that have been killed: that takes a moment."""
    begun = time.monotonic()
    while any(map(alive, numbers)):
        assert time.monotonic() - begun < HANG
        time.sleep(0.02)


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an engine that hears no signal, in the place of Snakemake, writes its number and that of a cell."""
    (tmp_path / "engine.py").write_text(HUNG.replace("PLACE", str(tmp_path / "numbers")))
    monkeypatch.setattr(engine, "shipped", lambda: tmp_path)
    monkeypatch.setattr(engine, "_GRACE", 0.3)
    return tmp_path / "numbers"


def interrupt(at: Path, *numbers: int) -> None:
    """Send signals to this process once the engine is there."""
    while not at.exists():
        time.sleep(0.02)
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("sent", "grace"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGHUP, 0.3), (signal.SIGINT, HANG)]
)
def test_a_signal_ends_an_engine_that_hangs(
    sent: int, grace: float, hung: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while, or at once where there is a second signal."""
    monkeypatch.setattr(engine, "_GRACE", grace)
    before = signal.signal(sent, signal.default_int_handler)
    sender = threading.Thread(target=interrupt, args=(hung, *[sent] * (2 if grace == HANG else 1)))
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep_of(tmp_path), tmp_path / "out")
    finally:
        sender.join()
        assert signal.signal(sent, before) is signal.default_int_handler
    wait_for_the_end_of(*hung.read_text().split())


def test_an_engine_ends_with_whoever_listens(hung: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(line: str) -> None:
        if hung.exists():
            raise BrokenPipeError(line)

    def follow(*rest: Any) -> None:
        while not hung.exists():
            time.sleep(0.02)
        deaf("1/18 done")

    monkeypatch.setattr(engine, "_follow", follow)
    with pytest.raises(BrokenPipeError):
        run_sweep(sweep_of(tmp_path), tmp_path / "out", say=deaf)
    wait_for_the_end_of(*hung.read_text().split())


def test_a_reader_that_has_gone_ends_a_sweep_and_that_is_said(tmp_path: Path) -> None:
    sweep_of(tmp_path)
    words = [sys.executable, "-m", "wda.cli", "sweep", str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.stderr is not None
        said = run.stderr.read()
    assert said == "wda sweep: nobody reads what it prints: ended; the same command goes on from here\n"
    assert run.returncode == 128 + signal.SIGPIPE


STUCK = """
import os, signal, subprocess, sys, threading

def main(arguments):
    lock = threading.Lock()
    def handler(*_):
        with lock:
            pass
    signal.signal(signal.SIGTERM, handler)
    cell = subprocess.Popen(["sleep", "3600"])
    print(cell.pid, flush=True)
    if arguments == ["signal"]:
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
    if arguments == ["deaf"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Event().wait()
"""


@pytest.mark.parametrize("how", ["signal", "parent", "deaf"])
def test_snakemake_ends_with_the_sweep_and_by_a_signal_that_its_handler_cannot_take(how: str, tmp_path: Path) -> None:
    """In the place of Snakemake: a handler that takes a lock of the thread it interrupts, or one that hears nothing."""
    (tmp_path / "snakemake").mkdir()
    (tmp_path / "snakemake" / "__init__.py").touch()
    (tmp_path / "snakemake" / "cli.py").write_text(STUCK)
    theirs, ours = os.pipe()
    words = [sys.executable, "-P", str(shipped() / "engine.py"), str(theirs), "0.3", how]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        words, env=environment, pass_fds=[theirs], start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        cell = run.stdout.readline().strip()
        if how != "signal":
            os.close(ours)
        run.wait(HANG)
    wait_for_the_end_of(cell)
    assert run.returncode != 0


SELECTED = """
import sys
if any(word.endswith("engine.py") for word in sys.orig_argv):
    import os, signal
    from snakemake.scheduling.job_scheduler import JobScheduler

    update = JobScheduler.update_available_resources

    def selected(self, jobs):
        assert self._lock.locked()
        for process in WHICH:
            os.kill(process, signal.SIGTERM)
        return update(self, jobs)

    JobScheduler.update_available_resources = selected
"""


@pytest.mark.parametrize("which", ["[os.getppid(), os.getpid()]", "[os.getpid()]"])
def test_a_signal_at_the_moment_when_snakemake_has_selected_its_first_job(which: str, tmp_path: Path) -> None:
    """There its own handler of SIGTERM waits for ever for the lock that the selection holds."""
    sweep_of(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(SELECTED.replace("WHICH", which))
    words = [sys.executable, "-m", "wda.cli", "sweep", str(tmp_path / "mine.toml"), "-o", str(tmp_path / "out")]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path, "WDA_KILLS": str(tmp_path / "out")})
    kills.gone(run, tmp_path / "out")
    assert run.returncode == 130 if "ppid" in which else run.returncode > 0
    log = (tmp_path / "out" / "snakemake.log").read_text()
    assert "Select jobs to execute" in log
    assert "AssertionError" not in log
    assert not (tmp_path / "out" / "records" / "journal.txt").exists(), "no cell was started"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "jobs=0"),
        (["--shards", "0"], "shards=0"),
        (["--profile", "nothing"], "profile='nothing'"),
        (["-o", "mine.toml/out"], "cannot be written"),
    ],
)
def test_bad_words_of_a_sweep_are_named(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep_of(tmp_path)
    assert cli.main(["sweep", "mine.toml", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_sweep_goes_by_its_records_whatever_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that Snakemake compares is dated later than what it makes, as where a clock has been set back."""
    prepare = engine._prepare

    def dated(folder: Path, *rest: Any) -> None:
        prepare(folder, *rest)
        for path in (folder / ".state").rglob("*"):
            os.utime(path, (4e9, 4e9))

    monkeypatch.setattr(engine, "_prepare", dated)
    grid = 'n = 10\ndata = "digits"\nmodel = "digits-mlp"\nnorm = "Linf"\neps = 0.1\norder = 1\nattack = "fgsm"\n'
    sweep, told = sweep_of(tmp_path, f"[[grid]]\n{grid}"), list[str]()
    assert experiment.run_sweep(sweep, tmp_path / "out", say=told.append) == []
    assert told[0] == "mine: 1 of 1 cells to run"
    assert re.fullmatch(r"1/1 done, \d+ s, about 0 s left", told[1])
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (1, 1))
    assert experiment.run_sweep(sweep, tmp_path / "out", say=told.append) == []
    assert told[2:] == ["mine: 0 of 1 cells to run"]


def test_a_full_disk_is_said_where_no_log_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried on a real one: then a notebook is empty, and the log ends in the middle of a traceback."""
    (tmp_path / "snakemake.log").write_text("something else\n")
    cell = Cell(attack="fgsm", n=5, **BALL)
    assert engine._failure(tmp_path, cell).error == "something else"
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert engine._failure(tmp_path, cell).error == f"no space is left on the disk of {tmp_path}"


KILLED = f"""{kills.SHORT}
[[grid]]
model = "nobody"
eps = 0.1
attack = "fgsm"
"""


def test_a_killed_sweep_goes_on_and_a_broken_cell_fails_alone(tmp_path: Path) -> None:
    sweep, out = sweep_of(tmp_path, KILLED), tmp_path / "out"
    command = [sys.executable, "-m", "wda.cli", "sweep", str(tmp_path / "mine.toml"), "-o", str(out)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as first:
        while not list((out / "records").glob("[!.]*.json")) and first.poll() is None:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1, second.stderr
    lines = journal(out / "records")
    for cell in (sweep.tasks[0].cell, sweep.tasks[1].cell):
        assert f"start {cell.name}" not in lines[lines.index(f"end {cell.name}") :], "run again after its end"
    broken = sweep.tasks[2].cell.name
    assert f"failed: {broken}\n  DataUnavailable: model='nobody'" in second.stderr
    assert "Traceback" in (out / "log" / f"{broken}.ipynb").read_text()
    assert "1 of 3 cells have no record" in second.stderr
    lines = (out / "tables" / "cells.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[4]) for line in lines] == [0.05, 0.1]


def test_a_sweep_ends_by_signals_and_with_any_of_its_processes_and_goes_on(tmp_path: Path) -> None:
    """A few of what `make kills` does: nothing is left running, and it comes to the same records and tables."""
    (tmp_path / "short.toml").write_text(kills.SHORT.replace("[0.05, 0.1]", "0.1"))
    name, calm = str(tmp_path / "short.toml"), tmp_path / "calm"
    sweep = load_sweep(name)
    run_cell(sweep.tasks[0].cell, calm / "records")
    experiment.write_tables(sweep, calm / "records", calm / "tables")
    sent, ends = kills.signalled(name, calm, tmp_path / "signals", 2, random.Random(1), 8)
    assert len(sent) == 2
    assert ends["same_records_and_tables"] == ends["sweeps"]
    found = kills.killed_alone(name, calm, tmp_path / "alone", "wda sweep")
    assert found["status"] == -signal.SIGKILL
    assert found["status_of_the_same_command"] == 0
    assert found["same_records_and_tables"]
