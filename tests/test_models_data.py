"""Data sets and models by name: what they hold, and what is said where they are not there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from wda import DataUnavailable, data, models

ROOT = Path(__file__).parents[1]
BUNDLED = ("digits-cnn", "digits-cnn-adv", "digits-gelu", "digits-mlp", "digits-vit", "digits-vit-nonorm")


def percent_correct(model: nn.Module, split: str) -> float:
    x, y = data.load("digits", split)
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


@pytest.fixture
def no_wda_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDA_DATA", raising=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of data sets and models, named by WDA_DATA."""
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    return tmp_path


# -- data ------------------------------------------------------------------------------------------------------------


def test_the_digits_split_is_fixed_and_disjoint_and_covers_everything() -> None:
    images, digits = load_digits(return_X_y=True)
    (x, y), (x_train, y_train) = data.load("digits"), data.load("digits", "train")
    assert (x.shape, x_train.shape) == ((599, 1, 8, 8), (1198, 1, 8, 8))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    rows = np.arange(len(images))
    assert np.array_equal(x.flatten(1).numpy() * 16, images[rows % 3 == 0])
    assert np.array_equal(x_train.flatten(1).numpy() * 16, images[rows % 3 != 0])
    assert y.tolist() == digits[rows % 3 == 0].tolist()
    assert y_train.tolist() == digits[rows % 3 != 0].tolist()
    assert (x.min(), x.max()) == (0, 1)


def test_the_first_n_samples() -> None:
    x, y = data.load("digits", n=7)
    assert torch.equal(x, data.load("digits")[0][:7])
    assert len(y) == 7


@pytest.mark.parametrize("path", ["given", "exact", "first"])
@pytest.mark.parametrize("colour", [False, True])
def test_bytes_are_images_with_channels_first(folder: Path, path: str, colour: bool) -> None:
    pixels = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    pixels = pixels if colour else pixels[..., 0]
    name = {"given": str(folder / "mine.npz"), "exact": "mine", "first": "mine"}[path]
    file = {"given": "mine.npz", "exact": "data/mine_test.npz", "first": "data/mine_test_first2.npz"}[path]
    np.savez(folder / file, x=pixels, y=np.array([3, 1], dtype=np.uint8))
    x, y = data.load(name)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y.tolist() == [3, 1]
    assert x.shape == (2, 3 if colour else 1, 5, 6)
    expected = pixels[1, 1, 3, 2] if colour else pixels[1, 1, 3]
    assert x[1, -1, 1, 3].item() * 255 == pytest.approx(expected)


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "points.npz", x=np.array([[-1.5, 300.0]]), y=[0])
    assert data.load(str(tmp_path / "points.npz"))[0].tolist() == [[-1.5, 300.0]]


def test_the_whole_split_comes_before_its_beginning_and_the_longest_beginning_first(folder: Path) -> None:
    for n, name in [(3, "mine_test_first3"), (12, "mine_test_first12"), (5, "mine_train"), (9, "mine_train_first9")]:
        np.savez(folder / "data" / f"{name}.npz", x=np.zeros((n, 2)), y=np.zeros(n, dtype=int))
    assert len(data.load("mine", "test")[0]) == 12
    assert len(data.load("mine", "train")[0]) == 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "valid"}, "split='valid': one of 'test', 'train'"),
        ({"n": 0}, "n=0"),
        ({"n": 2.0}, "n=2.0"),
        ({"n": True}, "n=True"),
        ({"n": 600}, "n=600: 'digits' holds 599 test samples"),
    ],
)
def test_a_bad_argument_of_load_is_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        data.load("digits", **arguments)


FILES = {
    "no y": {"x": np.zeros((2, 2))},
    "lengths differ": {"x": np.zeros((2, 2)), "y": [0]},
    "y is not whole": {"x": np.zeros((2, 2)), "y": [0.5, 1.0]},
}


@pytest.mark.parametrize("kind", [*FILES, "text", "truncated"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.npz"
    if kind in FILES:
        np.savez(path, **FILES[kind])
    elif kind == "text":
        path.write_text("hello")
    else:
        np.savez(path, x=np.zeros((2, 2)), y=[0, 1])
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"data='.*odd.npz'"):
        data.load(str(path))


def test_missing_data_says_which_variable_to_set(no_wda_data: None) -> None:
    with pytest.raises(DataUnavailable, match=r"data='mnist'.*set the variable WDA_DATA .*data/mnist_test.npz"):
        data.load("mnist")


def test_missing_data_says_which_file_is_looked_for(folder: Path) -> None:
    with pytest.raises(
        DataUnavailable, match=rf"'mnist': neither {folder}/data/mnist_train.npz nor mnist_train_firstN"
    ):
        data.load("mnist", "train")
    with pytest.raises(DataUnavailable, match=r"data='nowhere.npz': there is no such file"):
        data.load("nowhere.npz")


# -- bundled models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_as_accurate_as_its_card_says(name: str) -> None:
    model, card = models.load(name), models.card(name)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    for split, stated in card["accuracy_percent"].items():
        assert percent_correct(model, split) == pytest.approx(stated, abs=0.2)  # rounding may turn one image of 599


def test_the_bundled_models_are_available(no_wda_data: None) -> None:
    assert sorted(models.available()) == sorted(BUNDLED)


def test_training_again_reproduces_the_card_within_half_a_point() -> None:
    spec = importlib.util.spec_from_file_location("train_models", ROOT / "workflow" / "train_models.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    net = script.train("digits-mlp")
    for split, stated in models.card("digits-mlp")["accuracy_percent"].items():
        assert percent_correct(net, split) == pytest.approx(stated, abs=0.5)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wda_data: None) -> Path:
    """A copy of the folder of bundled models, in its place."""
    copy = shutil.copytree(models.bundled(), tmp_path / "copy")
    monkeypatch.setattr(models, "bundled", lambda: copy)
    return copy


def test_damaged_weights_are_refused(copied: Path) -> None:
    weights = copied / "digits-mlp.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model='digits-mlp': .*checksum .*its card states"):
        models.load("digits-mlp")
    models.load("digits-cnn")


def test_missing_weights_are_named(copied: Path) -> None:
    (copied / "digits-mlp.safetensors").unlink()
    with pytest.raises(DataUnavailable, match=r"model='digits-mlp': its weights .*mlp.safetensors are not there"):
        models.load("digits-mlp")


# -- stored models ---------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """What the layers below say, written out."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.w = weights

    def forward(self, x: Tensor) -> Tensor:
        f, w = nn.functional, self.w
        x = (x - torch.tensor([0.1, 0.2]).view(2, 1, 1)) / torch.tensor([0.5, 2.0]).view(2, 1, 1)
        x = f.relu(f.conv2d(x, w["c"], w["cb"], stride=2, padding=2))
        x = f.max_pool2d(x, 2)
        x = f.gelu(f.conv2d(x, w["r"], padding=1)) + x
        return f.linear(f.softplus(torch.sigmoid(x)).flatten(1), w["l"], w["lb"])


LAYERS = [
    {"op": "conv2d", "weight": "c", "bias": "cb", "stride": 2, "padding": 2},
    {"op": "relu"},
    {"op": "maxpool2d", "size": 2},
    {"op": "residual", "shortcut": [],
     "branch": [{"op": "conv2d", "weight": "r", "bias": None, "padding": 1}, {"op": "gelu"}]},
    {"op": "sigmoid"},
    {"op": "softplus"},
    {"op": "flatten"},
    {"op": "linear", "weight": "l", "bias": "lb"},
]  # fmt: skip
INPUT = {"mean": [0.1, 0.2], "std": [0.5, 2.0]}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"c": (3, 2, 3, 3), "cb": (3,), "r": (3, 3, 3, 3), "l": (4, 12), "lb": (4,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class TransformerByHand(nn.Module):
    """What TRANSFORMER says, written out; its attention is torch's own."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        w = self.w = weights
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        self.attention.load_state_dict(dict(zip(names, (w["q"], w["qb"], w["o"], w["ob"]), strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        f, w = nn.functional, self.w
        scale, shift = w["bw"] / (w["bv"] + 0.25).sqrt(), w["bb"] - w["bm"] * w["bw"] / (w["bv"] + 0.25).sqrt()
        x = f.conv2d(x, w["c"]) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        x = x * torch.sigmoid(x)
        x = sum(x[:, :, i::2, j::2] for i in range(2) for j in range(2)) / 4
        x = torch.einsum("ndhw->nhwd", x).reshape(len(x), -1, 8) + w["p"]
        spread = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        normed = spread * w["nw"] + w["nb"]
        x = x + self.attention(normed, normed, normed)[0]
        return x.sum(1) / x.shape[1]


TRANSFORMER = [
    {"op": "conv2d", "weight": "c"},
    {"op": "batchnorm2d", "weight": "bw", "bias": "bb", "mean": "bm", "variance": "bv", "eps": 0.25},
    {"op": "silu"},
    {"op": "avgpool2d", "size": 2},
    {"op": "tokens"},
    {"op": "position", "embedding": "p"},
    {"op": "residual", "shortcut": [],
     "branch": [{"op": "layernorm", "weight": "nw", "bias": "nb"},
                {"op": "attention", "heads": 2, "qkv": "q", "qkv_bias": "qb", "output": "o", "output_bias": "ob"}]},
    {"op": "meanpool"},
]  # fmt: skip


@pytest.fixture
def transformer_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"c": (8, 2, 3, 3), "p": (6, 8), "q": (24, 8), "qb": (24,), "o": (8, 8), "ob": (8,)}
    shapes |= dict.fromkeys(("bw", "bb", "bm", "bv", "nw", "nb"), (8,))
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return weights | {"bv": weights["bv"].square()}


def test_build_makes_the_network_that_the_layers_describe(weights: dict[str, Tensor]) -> None:
    x = torch.rand(5, 2, 8, 8)
    torch.testing.assert_close(models.build(LAYERS, weights, INPUT)(x), ByHand(weights)(x))


def test_build_makes_a_transformer(transformer_weights: dict[str, Tensor]) -> None:
    x = torch.rand(5, 2, 6, 8, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in transformer_weights.items()}
    net = models.build(TRANSFORMER, transformer_weights)
    torch.testing.assert_close(net(x), TransformerByHand(transformer_weights)(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer_weights.items())  # fixed statistics


def test_every_layer_can_be_traced(weights: dict[str, Tensor], transformer_weights: dict[str, Tensor]) -> None:
    nets = [
        (models.build(LAYERS, weights, INPUT), torch.rand(5, 2, 8, 8)),
        (models.build(TRANSFORMER, transformer_weights), torch.rand(5, 2, 6, 8, dtype=torch.float64)),
        *((models.load(name), torch.rand(5, 1, 8, 8)) for name in BUNDLED),
    ]
    for net, x in nets:
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (3, 7)])
def test_one_channel_is_normalised_whatever_the_shape(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    torch.testing.assert_close(models.build([], {}, {"mean": [0.25], "std": [0.5]})(x), 2 * x - 0.5)


def test_normalisation_is_only_there_where_it_does_something(weights: dict[str, Tensor]) -> None:
    inputs = (None, {}, {"mean": [0, 0], "std": [1, 1]}, INPUT)
    assert [len(models.build(LAYERS, weights, about)) for about in inputs] == [8, 8, 8, 9]


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ({"op": "tanh"}, "op='tanh': one of relu, .*batchnorm2d, .*residual is accepted"),
        ({"op": "linear", "weight": "v"}, "no tensor 'v'"),
        ({"op": "position", "embedding": "v"}, "no tensor 'v'"),
        ({"op": "linear"}, "layer 'linear': missing a required argument: 'weight'; weight, bias is accepted"),
        ({"op": "maxpool2d", "size": 2, "stride": 1}, "layer 'maxpool2d': .*'stride'; size is accepted"),
        ({"op": "relu", "slope": 0.1}, "layer 'relu': .*'slope'; no option is accepted"),
        ({"op": "linear", "weight": "l", "bias": "cb"}, r"bias='cb' of shape \(3,\): \(4,\) is needed in Linear"),
        ({"op": "layernorm", "weight": "cb", "bias": "lb"}, r"bias='lb' of shape \(4,\): \(3,\) is needed"),
        ({"op": "attention", "heads": 2, "qkv": "l", "output": "l"}, "qkv of width 4, output from width 12, heads=2"),
        ({"op": "attention", "heads": 0, "qkv": "l", "output": "l"}, "heads=0: a whole number >= 1"),
    ],
)
def test_build_names_what_it_does_not_know(layer: dict[str, str], named: str, weights: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=named):
        models.build([layer], weights)


def test_a_model_under_wda_data_is_found_and_listed(folder: Path, weights: dict[str, Tensor]) -> None:
    path = folder / "models" / "mine.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in weights.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = {"layers": LAYERS, "input": INPUT, "weights_file": "mine.npz", "weights_sha256": digest}
    path.with_suffix(".json").write_text(json.dumps(card))
    x = torch.rand(5, 2, 8, 8)
    torch.testing.assert_close(models.load("mine")(x), ByHand(weights)(x))
    assert models.available()[-1] == "mine"
    assert len(models.available()) == len(BUNDLED) + 1


def test_a_missing_model_says_what_is_there_and_where_others_go(no_wda_data: None) -> None:
    with pytest.raises(DataUnavailable, match=r"model='resnet': at hand are digits-.*set the variable WDA_DATA"):
        models.load("resnet")


def test_a_missing_model_names_the_folder_that_was_searched(folder: Path) -> None:
    with pytest.raises(DataUnavailable, match=f"model='resnet'.*{folder}/models"):
        models.card("resnet")


OWN = """
from torch import nn
def net(): return nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
def number(): return 3
def fails(): return nn.NoSuchLayer()
"""
BROKEN = {"lacks": "import no_such_package", "typo": "def net(:", "early": "1 / 0"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with functions of one's own."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_networks"


def test_a_function_of_ones_own_gives_a_model_in_evaluation_mode(own: str) -> None:
    model = models.load(f"{own}:net")
    assert model[1].in_features == 2
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("function", "error", "named"),
    [
        ("number", ValueError, "own_networks:number' returns int: a torch.nn.Module is needed"),
        ("absent", DataUnavailable, "own_networks:absent': .*own_networks.py has no function 'absent'"),
        ("nn", DataUnavailable, "has no function 'nn'"),
        ("fails", ValueError, r"own_networks:fails': fails\(\) fails: AttributeError: .*NoSuchLayer"),
    ],
)
def test_a_function_that_gives_no_model_is_named(own: str, function: str, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        models.load(f"{own}:{function}")


@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_a_function_of_ones_own_is_filled_from_a_file(kind: str, own: str, tmp_path: Path) -> None:
    state = {"1.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "1.bias": torch.tensor([5.0, 6.0])}
    path = tmp_path / f"net.{kind}"
    if kind == "pt":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif kind == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        save_file(state, path)
    model = models.load(f"{own}:net@{path}")
    assert not model.training
    assert model(torch.tensor([[1.0, -1.0]])).tolist() == [[4.0, 5.0]]


def test_a_file_that_does_not_fill_a_function_is_named(own: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    name = f"{own}:net@{path}"
    with pytest.raises(DataUnavailable, match=f"model='{name}': the weights {path} are not there"):
        models.load(name)
    torch.save({"1.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(
        ValueError, match=rf"(?s)model='{name}': the weights do not fit what {own}:net returns: .*1.bias"
    ):
        models.load(name)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=rf"model='{name}': {path} holds more than tensors: .*Linear"):
        models.load(name)
    with pytest.raises(ValueError, match="'module:function' is accepted"):
        models.load(f"own.py:net@{path}")


def test_a_misspelt_model_is_told_the_nearest(no_wda_data: None) -> None:
    with pytest.raises(DataUnavailable, match=r"model='digits-mpl': is 'digits-mlp' meant\? at hand are"):
        models.load("digits-mpl")


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(DataUnavailable, match=r"model='no_such_module:net': there is no module .*PYTHONPATH"):
        models.load("no_such_module:net")


@pytest.mark.parametrize(
    ("module", "said"),
    [("lacks", "No module named 'no_such_package'"), ("typo", "SyntaxError"), ("early", "ZeroDivisionError")],
)
def test_a_module_that_does_not_import_says_why(
    module: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}_networks.py").write_text(BROKEN[module])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"model='{module}_networks:net': importing {module}_networks fails: .*{said}"):
        models.load(f"{module}_networks:net")


@pytest.mark.parametrize("name", ["my_module.py:net", ":net", "models/my_module.py:net"])
def test_a_file_is_no_module(name: str) -> None:
    with pytest.raises(ValueError, match=f"model='{name}': 'module:function' is accepted"):
        models.load(name)
