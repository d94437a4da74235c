"""Table 1: the notebook on RobustBench's own architectures and loading code, and its numbers beside the paper's."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import wda
from wda import cli, experiment, models, zoo
from wda.experiment import Failed, beside_published, frame, run_table1, table1

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "table1.ipynb"
R18 = "robustbench:cifar10/Linf/Sehwag2021Proxy_R18"
WIDE = "robustbench:cifar10/Linf/Wang2023Better_WRN-28-10"
MISSING = "robustbench:cifar10/Linf/Xu2023Exploring_WRN-28-10"
CUT = "robustbench:cifar10/L2/Sehwag2021Proxy_R18"
NEAR, MEAN = "W∞: each image by at most ε", "W1: ε on average"


def said(path: Path) -> str:
    """All that a notebook has printed."""
    return "".join(o.get("text", "") for c in nbformat.read(path, 4).cells for o in c.get("outputs", []))


# -- the whole notebook, on RobustBench's models -----------------------------------------------------------------------


def place(folder: Path, name: str) -> Path:
    path = folder / "robustbench" / f"{name.removeprefix(zoo.PREFIX)}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def reading(net: nn.Module, head: nn.Linear, x: Tensor, y: Tensor) -> nn.Module:
    """A network with random weights, whose last layer is set so that it reads two images by a small margin."""
    features: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, given, __: features.append(given[0]))
    with torch.no_grad():
        net(x)
        hook.remove()
        [[one, two]] = features
        across, middle = one - two, (one + two) / 2
        head.bias[y] += 5
        for label, towards in ((y[0], across), (y[1], -across)):
            head.weight[label] = towards / across.norm() ** 2 / 5
            head.bias[label] -= head.weight[label] @ middle
        assert net(x).argmax(1).tolist() == y.tolist()
    return net


@pytest.fixture(scope="module")
def robustbench(wda_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for WDA_DATA with images, two files of weights as RobustBench's own, and one that is cut short."""
    if importlib.util.find_spec("robustbench") is None:
        pytest.skip("RobustBench is not installed: pip install 'wda[zoo]'")
    zoo.package()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    listed = model_dicts[BenchmarkDataset("cifar10")][ThreatModel("Linf")]
    folder = tmp_path_factory.mktemp("wda-data")
    x, y = wda.data.load("cifar10", n=2)
    (folder / "data").mkdir()
    np.savez(folder / "data" / "cifar10_test.npz", x=x.numpy(), y=y.numpy())
    for name, head in ((R18, "linear"), (WIDE, "logits")):
        torch.manual_seed(0)
        net = listed[name.rpartition("/")[2]]["model"]().eval()
        torch.save(reading(net, getattr(net, head), x, y).state_dict(), place(folder, name))
    place(folder, CUT).write_bytes(place(folder, R18).read_bytes()[:1_000_000])
    return folder


STEPS: dict[str, dict[str, Any]] = {
    "apgd-ce": {"steps": 2},
    "apgd-dlr": {"steps": 2},
    "wda": {"steps": 2, "probe_steps": 1, "rivals": 2},
    "a3": {"steps": 3, "levels": 1},  # three is the least it takes
}
# Only on the smaller network, as they rank and probe rivals. AutoAttack has no number of steps to cut down.
MORE: dict[str, dict[str, Any]] = {"a3++": {"steps": 3, "levels": 1}, "closest": {"steps": 2, "restarts": 1}}


def test_the_notebook_runs_robustbenchs_models_and_tells_of_those_it_cannot(
    robustbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WDA_DATA", str(robustbench))
    names, out, folder = [MISSING, WIDE, CUT, R18], tmp_path / "out.ipynb", tmp_path / "records"
    words = ["run", str(NOTEBOOK), "-o", str(out), "-p", "models", repr(names), "-p", "n", "2"]
    words += ["-p", "dtype", "float32", "-p", "kappas", "[2]"]
    words += ["-p", "attacks", repr([*STEPS]), "-p", "settings", repr(STEPS), "-p", "output", str(folder)]
    assert cli.main(words) == 0
    text = said(out)
    for name, reason in ((MISSING, f"`wda fetch {MISSING}` fetches them"), (CUT, "is cut short or damaged")):
        [line] = [line for line in text.splitlines() if reason in line]
        assert f"model='{name}'" in line
    assert text.endswith("2 failed\n")
    assert "16 of 18 rows not run here" in text
    for model in (R18, WIDE):
        for ball in (NEAR, MEAN):
            assert f"{model}, {ball}, 2 images" in text
    cells = len(STEPS)
    results = experiment.read(folder)
    assert results.model.value_counts().to_dict() == {R18: cells, WIDE: cells}
    assert set(results.eps) == {8 / 255}
    assert (results.clean_accuracy == 1).all()
    assert (results.groupby("model").accuracy.min() < 1).all()  # the margins are small: there is something to find
    assert (results.transport_cost <= results.eps).all()

    lines: list[str] = []
    records, failed = run_table1(
        [R18], attacks=[*STEPS, *MORE], kappas=[2], settings=STEPS | MORE, n=2, output=folder, say=lines.append
    )
    assert not failed
    assert [", on record" in line for line in lines] == cells * [True] + len(MORE) * [False]
    rows = beside_published(frame(records)).dropna(subset="reproduced")
    assert len(rows) == 1 + cells + 1 + 2  # the sample; a3++; closest in both balls
    assert rows.model.unique().tolist() == [R18]


# -- what is run, and what is not --------------------------------------------------------------------------------------


def quick(folder: Path, names: list[str], **given: Any) -> tuple[list[dict[str, Any]], list[Failed], list[str]]:
    lines: list[str] = []
    chosen = {"attacks": ["pgd", "wda", "closest"], "n": 20, "dtype": "float64", **given}
    return *run_table1(names, **chosen, output=folder, say=lines.append), lines


def test_each_attack_is_in_the_ball_of_its_column(tmp_path: Path) -> None:
    records, failed, lines = quick(tmp_path, ["digits-mlp"], attacks=["pgd", "wda", "wpgd", "closest"])
    assert not failed
    found = [(r["parameters"]["attack"], r["parameters"]["kappa"], r["parameters"]["order"]) for r in records]
    assert found == [
        ("pgd", 1, "inf"), ("wda", 1, "1.0"), ("wda", 2, "1.0"), ("wpgd", 1, "2.0"), ("closest", 1, "inf"),
        ("closest", 1, "1.0"),
    ]  # fmt: skip
    for record in records:
        threat = wda.Threat("Linf", record["parameters"]["eps"], record["parameters"]["order"])
        assert record["transport_cost"] <= threat.eps
        moved = [d for d, flipped in zip(record["samples"]["distance"], record["samples"]["flipped"], strict=True)]
        if record["parameters"]["attack"] != "closest" and threat.order == np.inf:
            assert max(moved) <= threat.eps + 1e-8
    assert len(lines) == 5
    assert all(f"{k}/5 digits-mlp " in line and " s left" in line for k, line in enumerate(lines, 1))


def test_a_model_that_fails_does_not_stop_the_others_and_a_second_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> nn.Module:
        raise ZeroDivisionError("in the model")

    monkeypatch.setattr(models, "mine", broken, raising=False)
    names = ["nobody", "wda.models:mine", "digits-mlp", "robustbench:cifar10/Linf/Nobody"]
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    records, failed, lines = quick(tmp_path / "records", names, data="digits", norm="Linf", eps=0.1)
    assert {r["parameters"]["model"] for r in records} == {"digits-mlp"}
    assert {failure.model for failure in failed} == {names[0], names[1], names[3]}
    assert all(failure.attacks == ("pgd", "wda κ=1", "wda κ=2", "closest") for failure in failed)
    assert "ZeroDivisionError" in failed[1].error
    assert sum("failed" in line for line in lines) == 3 * 4
    again, _, lines = quick(tmp_path / "records", ["digits-mlp"])
    assert all(", on record; " in line and "left" not in line for line in lines)
    assert again == records
    another = models.load("digits-cnn")
    with monkeypatch.context() as other:
        other.setattr(models, "load", lambda _: another)
        with pytest.raises(RuntimeError, match="is of another model of these names"):
            quick(tmp_path / "records", ["digits-mlp"])
    with pytest.raises(RuntimeError, match=r"nothing ran\nnobody: DataUnavailable: model='nobody'"):
        quick(tmp_path / "records", ["nobody"])


def test_an_attack_that_fails_leaves_the_others_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = wda.experiment.cells._measure

    def failing(cell: experiment.Cell, at: Any) -> Any:
        if cell.attack == "pgd":
            raise MemoryError("no more")
        return real(cell, at)

    monkeypatch.setattr("wda.experiment.cells._measure", failing)
    records, failed, _ = quick(tmp_path, ["digits-mlp"])
    assert failed == [Failed("digits-mlp", ("pgd",), "MemoryError: no more")]
    assert len(records) == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"models": []}, r"models=\[\]: a list is accepted"),
        ({"models": "digits-mlp"}, r"models='digits-mlp': .* -p models \"\['digits-mlp'\]\""),
        ({"models": ["digits-mlp"] * 2}, "each once"),
        ({"attacks": ["pgdd"]}, "'pgdd'"),
        ({"attacks": []}, "attacks="),
        ({"kappas": [0.5]}, "kappa=0.5"),
        ({"kappas": [2, 2]}, "kappas="),
        ({"kappas": 2}, r"kappas=2: .* -p kappas \"\[1\]\""),
        ({"settings": {"fgsm": {}}}, "settings='fgsm'"),
        ({"settings": {"pgd": {"stepz": 3}}}, "'stepz'"),
        ({"eps": -1}, "eps=-1"),
        ({"norm": "L1"}, "eps=None: no radius is usual for 'digits' in L1"),
        ({"models": ["wda.models:mine"]}, "data=None: nothing says which data 'wda.models:mine' is for"),
        ({"models": ["robustbench:Carmon2019Unlabeled"]}, "'robustbench:DATA/THREAT/ID' is accepted"),
        ({"n": 0}, "n=0"),
    ],
)
def test_a_bad_argument_is_refused_before_the_first_pass(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"models": ["digits-mlp"], "attacks": ["pgd", "wda"], **given}
    with pytest.raises(ValueError, match=words):
        run_table1(**chosen, output=tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{"models": [3]}, {"data": 3}, {"settings": [1]}, {"settings": {"pgd": 3}}])
def test_an_argument_of_another_type_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"models": ["digits-mlp"], "attacks": ["pgd"], "eps": 0.1, **given}
    with pytest.raises(TypeError, match=f"{next(iter(given))}="):
        run_table1(**chosen, output=tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_data_norm_and_radius_are_those_of_the_row() -> None:
    """In the published table no two rows of one data set and one norm have different radii; so a name says it all."""
    from wda.experiment.published import _ball

    with (ROOT / "data" / "published" / "wda_table1.csv").open() as file:
        for row in csv.DictReader(file):
            name = f"robustbench:{row['dataset']}/{row['norm']}/{row['robustbench_id']}"
            ball = _ball(name, None, None, None)
            assert (ball["data"], ball["norm"]) == (row["dataset"], row["norm"])
            assert ball["eps"] == wda.Threat(row["norm"], row["eps"]).eps


# -- published beside reproduced ---------------------------------------------------------------------------------------


def made_up(accuracy: float = 0.5, **given: Any) -> dict[str, Any]:
    """A line of results as `frame` gives it."""
    line = {"model": R18, "data": "cifar10", "norm": "Linf", "eps": 8 / 255, "order": "inf", "attack": "apgd-ce"}
    line |= {"kappa": 1.0, "options": {}, "n": 100, "seed": 0, "dtype": "float32", "accuracy": accuracy}
    line |= {"clean_accuracy": 0.9, "clean_accuracy_interval": experiment.interval(0.9, 100)}
    return {**line, "accuracy_interval": experiment.interval(accuracy, 100), **given}


def test_every_published_number_is_there_once_and_none_is_reproduced() -> None:
    rows = beside_published()
    with (ROOT / "data" / "published" / "wda_table1.csv").open() as file:
        printed = [
            float(row[column])
            for row in csv.DictReader(file)
            for column in ("clean", "apgd_ce", "apgd_dlr", "wda_k1", "wda_k2", "aa", "a3", "a3pp")
        ]
    assert sorted(rows.published) == sorted(printed)
    assert rows.reproduced.isna().all()
    assert rows.groupby("model").size().tolist() == 18 * [8]
    [note] = rows[rows.note.str.contains("mislabelled")].model.unique()
    assert note.endswith("Rony2019Decoupling")


def test_a_result_stands_beside_the_number_of_its_own_column() -> None:
    results = pd.DataFrame([
        made_up(0.6),
        made_up(0.55, attack="wda", order="1.0"),
        made_up(0.52, attack="wda", order="1.0", kappa=2.0),
        made_up(0.51, attack="autoattack"),
        made_up(0.4, attack="closest", order="1.0"),
        made_up(0.51, attack="closest"),
    ])  # fmt: skip
    rows = beside_published(results)
    assert len(rows) == 144 + 2
    found = rows.dropna(subset="reproduced").set_index(["ball", "attack"])
    with (ROOT / "data" / "published" / "wda_table1.csv").open() as file:
        [row] = [
            r for r in csv.DictReader(file) if r["robustbench_id"] == "Sehwag2021Proxy_R18" and r["norm"] == "Linf"
        ]
    columns = {
        ("sample", "clean"): ("clean", 90),
        (NEAR, "apgd-ce"): ("apgd_ce", 60),
        (MEAN, "wda κ=1"): ("wda_k1", 55),
        (MEAN, "wda κ=2"): ("wda_k2", 52),
        (NEAR, "autoattack"): ("aa", 51),
    }
    for place, (name, ours) in columns.items():
        assert found.loc[place, "published"] == float(row[name])
        assert found.loc[place, "difference"] == pytest.approx(ours - float(row[name]))
        assert found.loc[place, "low"] < ours < found.loc[place, "high"]
        assert found.loc[place, "n"] == 100
    assert set(found.index) == {*columns, (NEAR, "closest"), (MEAN, "closest")}
    assert found.loc[[(NEAR, "closest"), (MEAN, "closest")], "published"].isna().all()


@pytest.mark.parametrize(
    "given", [{"eps": 4 / 255}, {"norm": "L2"}, {"data": "mine.npz"}, {"model": "digits-mlp", "data": "digits"}]
)
def test_another_ball_or_other_data_are_not_held_against_the_paper(given: dict[str, Any]) -> None:
    rows = beside_published(pd.DataFrame([made_up(**given)]))
    assert len(rows) == 144
    assert rows.reproduced.isna().all()


def test_another_order_or_other_options_have_a_line_of_their_own() -> None:
    rows = beside_published(pd.DataFrame([made_up(order="1.0"), made_up(options={"steps": 2})]))
    assert len(beside_published(pd.DataFrame([made_up(order="3.0")]))) == 144 + 1
    found = rows[rows.reproduced.notna() & (rows.attack != "clean")]
    assert found.attack.tolist() == ["apgd-ce steps=2", "apgd-ce"]
    assert found.published.notna().tolist() == [True, False]


def test_the_lines_of_a_ball_stand_together() -> None:
    balls = beside_published().groupby("model", sort=False).ball.agg(list)
    assert all(of_row == sorted(of_row, key=["sample", NEAR, MEAN].index) for of_row in balls)


def test_records_of_the_sweep_stand_beside_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the book does with records of the sweep `table1`; they are made up here, and of one row."""
    monkeypatch.delenv("WDA_DATA", raising=False)
    sweep = experiment.load_sweep("table1")
    cells = [task.cell for task in sweep.tasks if task.cell.model == R18]
    for cell in cells:
        ball = {key: getattr(cell, key) for key in ("eps", "order", "kappa")}
        attack = "closest" if cell.eps is None else "fgsm"
        record = experiment.run_cell(experiment.Cell(n=10, attack=attack, dtype=cell.dtype, **ball), tmp_path / "like")
        record["parameters"] |= {key: getattr(cell, key) for key in ("data", "model", "attack")}
        record["parameters"]["options"] = wda.attacks.options(cell.attack)
        experiment.records.save(record, tmp_path / f"{cell.name}.json")
    found, missing = experiment.results(sweep, tmp_path)
    assert len(missing) == len(sweep.tasks) - len(cells)
    rows = beside_published(frame(found)).dropna(subset="reproduced")
    assert rows.model.unique().tolist() == [R18]
    assert rows.published.notna().sum() == 8
    assert rows[rows.published.isna()].attack.tolist() == ["closest", "closest"]
    assert (rows.difference.dropna() == (rows.reproduced - rows.published).dropna()).all()


def test_two_balls_are_never_in_one_column(tmp_path: Path) -> None:
    records, _, _ = quick(tmp_path, ["digits-mlp", "digits-cnn"])
    wide = table1(frame(records))
    assert wide.columns.tolist() == [
        ("sample", "clean"), (NEAR, "pgd"), (NEAR, "closest"), (MEAN, "wda κ=1"), (MEAN, "wda κ=2"), (MEAN, "closest")
    ]  # fmt: skip
    assert wide.notna().all(axis=None)
    assert (wide[MEAN, "closest"] <= wide[NEAR, "closest"]).all()
    with pytest.raises(ValueError, match="two results are of"):
        table1(frame(records + records))
