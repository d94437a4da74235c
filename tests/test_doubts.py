"""A model of one's own: each usual mistake is told, alone, and a right model is not doubted; the example's files."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wda
from wda import cli
from wda.experiment import doubts
from wda.experiment.notebooks import run_notebook

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor]:
    return wda.data.load("digits", n=100)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return wda.models.load("digits-mlp")


@pytest.mark.parametrize("n", [1, 2, 5, 100])
@pytest.mark.parametrize("name", sorted(path.stem for path in wda.models.bundled().glob("*.json")))
def test_a_bundled_model_is_not_doubted(name: str, n: int) -> None:
    assert doubts(wda.models.load(name), *wda.data.load("digits", n=n)) == []


Change = Callable[[nn.Module], Callable[[Tensor], Tensor]]
RIGHT: dict[str, Change] = {
    "log-probabilities, whose margins are the logits'": lambda net: lambda x: net(x).log_softmax(1),
    "logits of another size": lambda net: lambda x: 1e-3 * net(x),
    "a network that centres its inputs itself": lambda net: lambda x: net(((x - 0.3) / 0.4) * 0.4 + 0.3),
}
WRONG: dict[str, tuple[Change, str]] = {
    "probabilities": (lambda net: lambda x: net(x).softmax(1), "model(x) is probabilities, no logits"),
    "dropout that stays on": (lambda net: lambda x: nn.functional.dropout(net(x)), "the model is random"),
    "statistics of the batch": (
        lambda net: lambda x: net((x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), keepdim=True) * 0.4 + 0.3),
        "the logits of a sample depend on the others in its batch",
    ),
    "rounded inputs": (lambda net: lambda x: net(x.round() + 0 * x), "of the gradients were zero"),
    "NaN at black pixels": (
        lambda net: lambda x: net(x) + 0 * x[:, :, 3, 3].log(),
        "the model has NaN or infinite logits or gradients at",
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_is_not_doubted(case: str, net: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    assert doubts(RIGHT[case](net), *sample) == []


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told(case: str, net: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    change, said = WRONG[case]
    told = [doubt for doubt in doubts(change(net), *sample, batch_size=40) if "ties exactly" not in doubt]
    assert len(told) == 1
    assert said in told[0]


@pytest.mark.parametrize("shape", [(1,), (2, 1, 1)])
@pytest.mark.parametrize(
    ("at", "boundary", "said"),
    [
        (0.25, 0.0, "on inputs less their mean, over their standard deviation"),
        (0.5, 0.0, "on inputs in [-1, 1]"),
        (0.5, 127.5, "on inputs in [0, 255]"),
    ],
)
def test_inputs_of_another_scale_are_told(at: float, boundary: float, said: str, shape: tuple[int, ...]) -> None:
    """Inputs of mean 1/4; the right answer is whether they are beyond `at`, the model's whether beyond `boundary`."""
    u = torch.linspace(0, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))] ** 3
    x, y = u.view(-1, *[1] * len(shape)).expand(-1, *shape), (u > at).long()

    def model(z: Tensor) -> Tensor:
        first = z.flatten(1)[:, :1]
        return torch.cat([boundary - first, first - boundary], 1)

    assert said in " ".join(doubts(model, x, y))
    right = doubts(lambda x: model((x - at) * 100 + boundary), x, y)
    assert right == []


def test_labels_in_another_order_are_told_with_the_order(net: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    x, y = sample
    right = 100 * float((net(x).argmax(1) == y).double().mean())
    [two] = doubts(net, x, torch.where(y == 3, 8, torch.where(y == 8, 3, y)))
    assert two.endswith(f"with 3 as 8, 8 as 3 the accuracy is {right:.1f} %")
    chance, order = doubts(net, x, (y + 1) % 10)
    assert "Are the weights loaded" in chance
    assert "with 0 as 9, 1 as 0, 2 as 1" in order
    assert order.endswith(f"the accuracy is {right:.1f} %")


@pytest.mark.parametrize("seed", range(5))
def test_weights_that_were_never_loaded_are_told(seed: int, sample: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(seed)
    told = doubts(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), *sample)
    assert any("Are the weights loaded" in line for line in told)
    assert not any("numbered" in line for line in told)


def test_what_no_attack_takes_is_an_error(net: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    x, y = sample
    for bad, labels, said in (
        (255 * x, y, "divide by 255"),
        (x - 0.5, y, "normalisation belongs inside"),
        (x, y + 1, "K=10"),
    ):
        with pytest.raises(ValueError, match=said):
            doubts(net, bad, labels)


def test_the_model_comes_back_in_the_mode_it_was_in(net: nn.Module, sample: tuple[Tensor, Tensor]) -> None:
    own = nn.Sequential(net, nn.Dropout(0.9)).train()
    assert doubts(own, *sample) == []
    assert own.training


# -- the notebook and its example ----------------------------------------------------------------------------------


def test_the_example_can_be_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NOTEBOOKS)
    example = importlib.import_module("example_model")
    x, y = wda.data.load("digits")
    shipped, trained = (
        100 * float((net.eval()(x).argmax(1) == y).double().mean()) for net in (example.build(), example.train())
    )
    assert shipped > 95
    assert trained == pytest.approx(shipped, abs=1.5)  # rounding differs between machines
    named = wda.models.load(f"example_model:Net@{NOTEBOOKS / 'example_model.safetensors'}")
    assert torch.equal(named(x), wda.models.load("example_model:build")(x))


@pytest.mark.parametrize("where", ["elsewhere", "beside"])
def test_a_notebook_finds_the_modules_beside_it(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "notebooks"
    beside.mkdir()
    for name in ("own_model.ipynb", "example_model.py", "example_model.safetensors"):
        shutil.copy(NOTEBOOKS / name, beside)
    monkeypatch.chdir(beside if where == "beside" else tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    path = "own_model.ipynb" if where == "beside" else "notebooks/own_model.ipynb"
    quick = ["-p", "n", "5", "-p", "attacks", "['fgsm']", "-p", "radii", "['1/50']", "-p", "certify", "none"]
    assert cli.main(["run", path, *quick]) == 0, capsys.readouterr().err
    assert "PYTHONPATH" not in os.environ
    assert wda.AdversarialDistribution.load("results/own-model/distribution.npz").audit() <= 1 / 50
    [record] = Path("results/own-model").glob("*.json")
    assert json.loads(record.read_text())["parameters"]["model"] == "example_model:build"


def test_a_notebook_says_why_there_is_no_certificate(tmp_path: Path) -> None:
    out = tmp_path / "done.ipynb"
    given = {"n": 4, "attacks": ["fgsm"], "model": "digits-vit", "norm": "L2", "orders": ["inf"], "radii": ["1/10"]}
    run_notebook(NOTEBOOKS / "own_model.ipynb", out, output=str(tmp_path / "kept"), **given)
    text = out.read_text()
    assert "no certificate: LayerNorm" in text
    assert wda.Bracket.load(tmp_path / "kept" / "bracket.json").why


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["radii", "[2/255]"], "TypeError: radii='[2/255]': a list is accepted"),
        (["certify", "linaer"], "ValueError: certify='linaer': one of 'none', 'auto'"),
    ],
)
def test_a_parameter_that_does_not_fit_is_found_before_anything_runs(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", str(NOTEBOOKS / "own_model.ipynb"), "-p", *given]) == 1
    assert f"wda run: {said}" in capsys.readouterr().err
    assert not (tmp_path / "results" / "own-model").exists()
