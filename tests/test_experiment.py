"""Records, tables, the notebook runner and the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import wda
from wda import cli, experiment
from wda.distribution import AdversarialDistribution

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "attack.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a short run, in a folder that did not exist."""
    out = tmp_path_factory.mktemp("records") / "made" / "here"
    experiment.run(n=40, attacks=["fgsm", "wda"], kappas=[1, 2], output=out)
    return out


def test_records_state_everything_needed_to_read_them(folder: Path) -> None:
    records = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    names = [(r["parameters"]["attack"], r["parameters"]["kappa"]) for r in records]
    assert names == [("fgsm", 1), ("wda", 1), ("wda", 2)]
    for record in records:
        assert record["transport_cost"] <= record["parameters"]["eps"]
        assert record["accuracy_interval"][0] <= record["accuracy"] <= record["accuracy_interval"][1]
        assert record["passes"]["backward"] > 0
        assert record["parameters"]["options"] == wda.attacks.options(record["parameters"]["attack"])
        assert record["risk_ce_interval"][0] < record["risk_ce"] < record["risk_ce_interval"][1]
        assert {"wda", "commit", "python", "torch", "cpu", "threads", "gpu", "batch"} == record["provenance"].keys()


def test_aggregates_follow_from_the_samples(folder: Path) -> None:
    """Eq. (10): accuracy = clean - (flipped share) / kappa, and the cost is the mean distance over kappa."""
    for path in folder.iterdir():
        record = json.loads(path.read_text())
        samples, kappa = record["samples"], record["parameters"]["kappa"]
        n = len(samples["index"])
        correct = sum(
            label == guess for label, guess in zip(samples["label"], samples["clean_prediction"], strict=True)
        )
        assert record["clean_accuracy"] == pytest.approx(correct / n)
        assert record["accuracy"] == pytest.approx((correct - sum(samples["flipped"]) / kappa) / n)
        assert record["transport_cost"] == pytest.approx(sum(samples["distance"]) / n / kappa, abs=1e-7)
        for flipped, rival, label in zip(samples["flipped"], samples["rival"], samples["label"], strict=True):
            assert not flipped or rival not in (-1, label)


def test_table_and_costs_hold_the_records(folder: Path) -> None:
    results = experiment.read(folder)
    table = experiment.table(results)
    assert list(table.columns) == ["clean", "fgsm", "wda κ=1", "wda κ=2"]
    two = results[results.kappa == 2].accuracy.item()
    assert table.loc[("digits-mlp", "W1 Linf 0.1"), "wda κ=2"] == pytest.approx(100 * two)
    assert f"{100 * two:.1f}" in experiment.costs(results).accuracy.tolist()


def test_options_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    sizes = [None, 0.02, 0.1]
    chosen = [{"steps": steps, "step_size": size} for size in sizes for steps in (10, 2)]
    records = [experiment.run(n=5, attacks=["pgd"], settings={"pgd": of}, output=tmp_path)[0] for of in chosen]
    by_size = ["pgd steps=2", "pgd steps=2 step_size=0.02", "pgd steps=2 step_size=0.1"]
    in_turn = [*by_size, *(name.replace("=2", "=10", 1) for name in by_size)]
    assert list(experiment.table(experiment.frame(records)))[1:] == in_turn


def test_table_names_what_differs_and_never_averages(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    experiment.run(n=10, attacks=["fgsm"], output=tmp_path)
    results = experiment.read(tmp_path)
    table = experiment.table(results)
    assert table.index.names == ["n", "model", "threat"]
    for n in (10, 40):
        one = results[(results.attack == "fgsm") & (results.n == n)]
        assert table.loc[(n, "digits-mlp", "W1 Linf 0.1"), "fgsm"] == pytest.approx(100 * one.accuracy.item())


NET = """
import torch
def net():
    torch.manual_seed({seed})
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


def test_records_of_two_models_or_data_sets_of_one_name_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    x, y = (values.numpy() for values in wda.data.load("digits", n=20))
    for seed, samples in ((0, slice(0, 10)), (1, slice(0, 10)), (1, slice(10, 20)), (1, slice(10, 20))):
        Path("own_net.py").write_text(NET.format(seed=seed))
        sys.modules.pop("own_net", None)
        shutil.rmtree("__pycache__", ignore_errors=True)
        np.savez("own.npz", x=x[samples], y=y[samples])
        experiment.run(data="own.npz", model="own_net:net", attacks=["fgsm"], output="records")
    assert len(list(Path("records").iterdir())) == 3  # the last one is a rerun
    table = experiment.table(experiment.read("records"))
    assert table.index.names == ["data", "model", "threat"]
    assert len(table) == 3
    assert all(name.startswith("own_net:net ") for name in table.index.get_level_values("model"))


def test_a_radius_in_255ths_is_shown_so(tmp_path: Path) -> None:
    records = experiment.run(n=10, attacks=["fgsm"], eps="8/255", output=tmp_path)
    assert experiment.table(experiment.frame(records)).index.tolist() == [("digits-mlp", "W1 Linf 8/255")]


def test_costs_name_only_what_differs(folder: Path) -> None:
    results = experiment.read(folder)
    assert experiment.costs(results).columns[0] == "attack"
    other = results.assign(model="other")
    both = experiment.costs(pd.concat([results, other], ignore_index=True))
    assert both.columns[:2].tolist() == ["model", "attack"]
    assert both["transport cost"].tolist() == 2 * experiment.costs(results)["transport cost"].tolist()


def test_two_results_in_one_place_are_an_error(folder: Path) -> None:
    results = experiment.read(folder)
    with pytest.raises(ValueError, match="two results are of"):
        experiment.table(results.loc[[0, 1, 2, 0]].reset_index(drop=True))


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="makes no row"):
        experiment.read(tmp_path)


def test_a_rerun_gives_the_same_record_but_for_seconds(folder: Path, tmp_path: Path) -> None:
    experiment.run(n=40, attacks=["fgsm", "wda"], kappas=[1, 2], output=tmp_path, batch_size=7)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in folder.iterdir():
        old, new = json.loads(path.read_text()), json.loads((tmp_path / path.name).read_text())
        for record in (old, new):
            del record["passes"]["seconds"], record["parameters"]["batch_size"]
        assert new["samples"]["flipped"] == old["samples"]["flipped"]
        assert new["samples"]["distance"] == pytest.approx(old["samples"]["distance"], abs=1e-7)
        assert new["accuracy"] == old["accuracy"]


def test_settings_reach_the_attack_and_tell_records_apart(tmp_path: Path) -> None:
    common = {"n": 20, "attacks": ["pgd", "wpgd", "closest"], "order": 2, "output": tmp_path}
    experiment.run(**common)
    experiment.run(**common, settings={"pgd": {"steps": 3}, "closest": {"steps": 5, "restarts": 1}})
    results = experiment.read(tmp_path)
    assert len(results) == 5, "the record of an attack that kept its defaults is replaced"
    wide = experiment.table(results)
    assert wide.columns.tolist() == ["clean", "pgd", "pgd steps=3", "wpgd", "closest", "closest steps=5 restarts=1"]
    passes = experiment.costs(results).set_index("attack").backward
    assert passes["pgd steps=3"] == 3
    assert passes["closest steps=5 restarts=1"] <= 5 + 9 + 5 < passes["closest"]


def test_a_model_with_nan_logits_has_a_record_without_a_risk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_broken.py").write_text(
        "import torch, wda\n"
        "class Broken(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = wda.models.load('digits-mlp')\n"
        "    def forward(self, x):\n"
        "        return self.inner(x) + torch.where(x.mean((1, 2, 3)) > 0.3, torch.nan, 0.0)[:, None]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(wda.Untrustworthy, match="NaN or infinite logits"):
        [record] = experiment.run(model="half_broken:Broken", attacks=["fgsm"], n=30, output=tmp_path / "out")
    assert record["risk_ce"] is None
    assert record["risk_ce_interval"] is None
    assert 0 < record["clean_accuracy"] < 1
    assert len(experiment.costs(experiment.frame([record]))) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"attacks": ["wda", "nonsense"]}, ValueError, "attack='nonsense'"),
        ({"attacks": "wda"}, ValueError, r"attacks='wda': .* -p attacks \"\['fgsm'\]\""),
        ({"attacks": []}, ValueError, r"attacks=\[\]"),
        ({"attacks": 3}, ValueError, "attacks=3"),
        ({"kappas": 2}, ValueError, r"kappas=2: .* -p kappas \"\[1\]\""),
        ({"kappas": [1, 2, 1.0]}, ValueError, "each once"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"device": "abacus"}, ValueError, "device='abacus'"),
        ({"data": 3}, TypeError, "data=3"),
        ({"model": 3}, TypeError, "model=3"),
        ({"kappas": [1, 0.5]}, ValueError, "kappa=0.5"),
        ({"kappas": [2], "order": "inf"}, ValueError, r"kappas=\[2\] with order=inf: .* -p kappas \"\[1\]\""),
        ({"attacks": ["fgsm", "wpgd"]}, ValueError, "order=1: 'wpgd' needs an order above 1"),
        ({"settings": {"pgd": {"stepz": 3}}}, ValueError, r"settings\['pgd'\]='stepz': one of 'loss', 'steps'"),
        ({"settings": {"a4": {}}}, ValueError, "settings='a4': one of 'fgsm', 'pgd'"),
        ({"settings": {"pgd": 3}}, TypeError, "settings=.* -p settings"),
        ({"settings": [1]}, TypeError, r"settings=\[1\]"),
        ({"eps": "8/0"}, ValueError, "eps='8/0'"),
        ({"norm": "L3"}, ValueError, "norm='L3'"),
        ({"dtype": "float128"}, ValueError, "dtype='float128'"),
        ({"n": 10**6}, ValueError, "n=1000000"),
        ({"data": "nowhere"}, wda.DataUnavailable, "WDA_DATA"),
        ({"model": "nobody"}, wda.DataUnavailable, "digits-mlp"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    arguments: dict, error: type, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WDA_DATA", raising=False)
    with pytest.raises(error, match=words):
        experiment.run(output=tmp_path / "out", **arguments)
    assert not list(tmp_path.rglob("*.json"))


def test_output_that_cannot_be_written_is_found_before_the_first_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("wda.experiment.cells.attack", lambda *_, **__: pytest.fail("an attack ran"))
    with pytest.raises(OSError, match=r"file.*cannot be written"):
        experiment.run(n=5, output=tmp_path / "file" / "out")


def test_an_interrupted_run_keeps_what_is_finished_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AdversarialDistribution.audit
    calls = []

    def interrupted(self: AdversarialDistribution) -> float:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return audit(self)

    monkeypatch.setattr(AdversarialDistribution, "audit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(n=5, attacks=["fgsm", "pgd"], output=tmp_path)
    [only] = tmp_path.iterdir()
    assert json.loads(only.read_text())["parameters"]["attack"] == "fgsm"


def test_interval_is_that_of_scipy_on_counts() -> None:
    from scipy.stats import binomtest

    for k, n in ((0, 7), (3, 10), (599, 599), (420, 1000)):
        theirs = binomtest(k, n).proportion_ci(method="wilson")
        assert experiment.interval(k / n, n) == pytest.approx((theirs.low, theirs.high))


def test_runner_refuses_an_undeclared_parameter(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'kapas'.*kappas"):
        experiment.run_notebook(NOTEBOOK, tmp_path / "out.ipynb", kapas=[1])
    assert not list(tmp_path.iterdir())


def test_command_line_runs_a_notebook_and_a_failing_run_leaves_the_last_one_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, unfinished = tmp_path / "out.ipynb", tmp_path / "out.partial.ipynb"
    out.write_text("of an earlier run")
    words = ["run", str(NOTEBOOK), "-o", str(out), "-p", "n", "5", "-p", "attacks", "['fgsm', 'wda']"]
    words += ["-p", "kappas", "[2]", "-p", "output", str(tmp_path / "records")]
    assert cli.main([*words, "-p", "eps", "-1"]) == 1
    told = capsys.readouterr().err
    assert "eps=-1" in told
    assert told.endswith(f"The notebook as far as it ran: {unfinished}\n")
    assert out.read_text() == "of an earlier run"
    assert "eps=-1" in unfinished.read_text()
    assert cli.main([*words, "-p", "eps", "8/255"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "2 records in" in captured.err, "what the notebook prints is shown as it runs"
    assert "IPKernelApp" not in captured.err
    assert nbformat.read(out, as_version=4).cells
    assert not unfinished.exists()
    results = experiment.read(tmp_path / "records")
    assert set(results.attack) == {"fgsm", "wda"}
    assert results.eps.unique() == pytest.approx(8 / 255)


@pytest.mark.parametrize("out", ["file/out.ipynb", "folder"])
def test_a_notebook_that_cannot_be_written_is_found_before_the_run(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import papermill

    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("the notebook ran"))
    assert cli.main(["run", str(NOTEBOOK), "-o", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.startswith(f"wda run: output='{tmp_path / out}': ")


def test_an_interrupted_run_ends_quietly(tmp_path: Path) -> None:
    """Ctrl-C reaches the command and its kernel, as in a terminal."""
    started = tmp_path / "started"
    cells = [nbformat.v4.new_code_cell("marker = ''", metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell("import pathlib, time; pathlib.Path(marker).touch(); time.sleep(600)")]
    kernel = {"kernelspec": nbformat.read(NOTEBOOK, as_version=4).metadata.kernelspec}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "slow.ipynb")
    command = [sys.executable, "-m", "wda.cli", "run", tmp_path / "slow.ipynb", "-o", tmp_path / "out.ipynb"]
    command += ["-p", "marker", started]
    # a shell's background jobs, and what they start, ignore the signal unless told otherwise
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as run:
        try:
            while not started.exists() and run.poll() is None:
                time.sleep(0.1)
            run.send_signal(signal.SIGINT)
            _, said = run.communicate(timeout=600)
        finally:
            run.kill()
    assert run.returncode == 130
    assert "Traceback" not in said
    assert said.endswith(f"The notebook so far: {tmp_path / 'out.partial.ipynb'}\n")
    assert not (tmp_path / "out.ipynb").exists()


def test_a_bracket_is_recorded_with_what_made_it(tmp_path: Path) -> None:
    found, path = experiment.run_bracket(n=12, method="linear", eps="1/20", order="inf", output=tmp_path / "new")
    assert path.name == "digits_digits-mlp_Linf_0.05_Winf_linear_n12_s0_float64.json"
    record = json.loads(path.read_text())
    assert (record["lower"], record["upper"], record["n"]) == (found.lower, found.upper, 12)
    assert record.keys() >= {"data", "model", "norm", "method", "seed", "model_sha256", "provenance"}
    again = wda.Bracket.load(path)
    radii = [0.02, 0.05, 0.1]
    table = experiment.bracket_table(again, radii)
    assert list(table.index) == [f"W{p} Linf {eps}" for p in ("1", "2", "inf") for eps in radii]
    for p in (1, 2, "inf"):
        lower, upper = found.curve(radii, p)
        rows = table.loc[[f"W{p} Linf {eps}" for eps in radii]]
        assert rows.certified.tolist() == pytest.approx((100 * lower).tolist())
        assert rows.attacked.tolist() == pytest.approx((100 * upper).tolist())
        assert rows.width.tolist() == pytest.approx((100 * (upper - lower)).tolist())


def test_curves_of_a_bracket_show_what_it_says() -> None:
    import torch

    from wda import figures

    ends = torch.tensor([0.0, 0.1, 0.4]), torch.tensor([0.0, 0.2, torch.inf])
    found = {norm: wda.Bracket(wda.Threat(norm, 0.1), *ends) for norm in ("Linf", "L2")}
    figure = figures.bracket_curves({"here": found["Linf"]}, 0.5, confidence=0.9)
    for panel, order in zip(figure.axes, (1, 2, "inf"), strict=True):
        eps = panel.lines[0].get_xdata()
        shown = [line.get_ydata() for line in panel.lines]
        expected = [*found["Linf"].curve(eps, order), *found["Linf"].population(eps, order, 0.9)]
        for line, values in zip(shown, expected, strict=True):
            assert line == pytest.approx((100 * values).numpy())
    for brackets in (found, {}):
        with pytest.raises(ValueError, match="one is accepted"):
            figures.bracket_curves(brackets, 0.5)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"method": "magic"}, "method='magic'"),
        ({"eps": -1}, "eps=-1"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"time_limit": -1}, "time_limit=-1"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"n": 0}, "n=0"),
        ({"model": "no-such"}, "no-such"),
    ],
)
def test_a_bracket_is_refused_before_the_first_pass(bad: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, wda.DataUnavailable), match=said):
        experiment.run_bracket(**{"n": 2, **bad}, output=tmp_path / "new")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_bracket_notebook_runs_on_a_model_without_a_certificate(tmp_path: Path) -> None:
    """The attack's side is given, and a line says which layer stands in the way."""
    words = ["run", str(ROOT / "notebooks" / "bracket.ipynb"), "-o", str(tmp_path / "out.ipynb"), "-p", "n", "5"]
    assert cli.main([*words, "-p", "model", "digits-vit", "-p", "output", str(tmp_path)]) == 0
    said = [o.text for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", []) if "text" in o]
    assert any("no certificate: " in text for text in said)
    [record] = tmp_path.glob("*.json")
    found = wda.Bracket.load(record)
    assert found.why
    assert found.lower == 0 < found.upper


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"wda {wda.__version__}\n"


def test_a_sample_that_does_not_fit_is_found_before_the_first_pass(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "bad.npz", x=np.full((2, 1, 8, 8), np.nan, dtype=np.float32), y=np.array([1, 2]))
    with pytest.raises(ValueError, match="x has NaN"):
        experiment.run(data=str(tmp_path / "bad.npz"), output=tmp_path / "out")
    np.savez(tmp_path / "bad.npz", x=np.zeros((2, 1, 8, 8), dtype=np.float32), y=np.array([1, 12]))
    with pytest.raises(ValueError, match="y has the label 12"):
        experiment.run(data=str(tmp_path / "bad.npz"), output=tmp_path / "out")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", str(ROOT / "README.md")], "is no notebook"),
        (["run", str(NOTEBOOK), "-p", "kapas", "1"], "kapas"),
        (["run", "missing.ipynb"], "missing.ipynb"),
    ],
)
def test_command_line_failures_have_a_status_and_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "-o", str(tmp_path / "out.ipynb")]) == 2
    assert said in capsys.readouterr().err
