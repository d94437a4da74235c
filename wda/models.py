"""Models by name: the bundled ones, those under ``WDA_DATA``, or a function of one's own.

A stored model is a card, ``NAME.json``, beside its weights, ``NAME.safetensors`` or ``NAME.npz``. The card lists
the layers; so a model is read without executing code.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wda.data import data_folder
from wda.errors import DataUnavailable

__all__ = ["Normalise", "Residual", "available", "build", "bundled", "card", "load"]


def bundled() -> Path:
    """The folder of the models that come with the package: inside an installed one, or in the checkout."""
    inside = Path(__file__).parent / "_bundled"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "data" / "models"


def _folders() -> list[Path]:
    folder = data_folder()
    return [bundled()] if folder is None else [bundled(), folder / "models"]


def available() -> list[str]:
    """The names of the stored models at hand: the bundled ones, then those under ``WDA_DATA``.

    Examples
    --------
    >>> "digits-mlp" in available()
    True
    """
    return [path.stem for folder in _folders() for path in sorted(folder.glob("*.json"))]


def card(name: str) -> dict[str, Any]:
    """What is known of a stored model: layers, checksum, and how it was trained or where it is from.

    Raises
    ------
    DataUnavailable
        There is no such model here; the message says what is, and where others are looked for.

    Examples
    --------
    >>> card("digits-mlp")["data"]
    'digits'
    """
    return dict(json.loads(_card_path(name).read_text(encoding="utf-8")))


def load(name: str) -> nn.Module:
    """A model in evaluation mode, on the CPU, that takes inputs in [0, 1]; any normalisation is inside.

    Parameters
    ----------
    name : str
        A name of `available`, or ``"module:function"`` for an importable function that takes no argument and
        returns a module.

    Raises
    ------
    DataUnavailable
        There is no such model here.
    ValueError
        The weights do not have the checksum that the card states, or do not fit the layers; or the function
        returns no module.

    Examples
    --------
    >>> load("digits-mlp")(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """
    if not isinstance(name, str):
        raise TypeError(f"model={name!r}: a name is accepted")
    if ":" in name:
        return _from_function(name)
    path = _card_path(name)
    about = json.loads(path.read_text(encoding="utf-8"))
    weights = path.with_name(about["weights_file"])
    if not weights.is_file():
        raise DataUnavailable(f"model={name!r}: its weights {weights} are not there")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != about["weights_sha256"]:
        raise ValueError(
            f"model={name!r}: {weights} has the SHA-256 checksum {digest}, its card states {about['weights_sha256']}: "
            "the file is damaged or another one; fetch it again"
        )
    return build(about["layers"], _read(weights), about.get("input", {})).eval()


def build(
    layers: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Tensor],
    about_input: Mapping[str, Any] | None = None,
) -> nn.Sequential:
    """A network from a list of layers and the tensors they name.

    Parameters
    ----------
    layers : sequence of mappings
        Each with an ``op``: linear, conv2d, relu, gelu, sigmoid, softplus, flatten, maxpool2d (with ``size``), or
        residual (with the lists ``branch`` and ``shortcut``).
    weights : mapping from names to tensors
    about_input : mapping, optional
        ``mean`` and ``std``, one number per channel, to normalise by inside the network.

    Raises
    ------
    ValueError
        An unknown ``op``, or a tensor that is missing.

    Examples
    --------
    >>> net = build([{"op": "flatten"}, {"op": "linear", "weight": "w"}], {"w": torch.eye(2)})
    >>> net(torch.ones(1, 2, 1)).tolist()
    [[1.0, 1.0]]
    """
    modules = [_module(layer, weights) for layer in layers]
    about = about_input or {}
    mean, std = about.get("mean", [0.0]), about.get("std", [1.0])
    if any(m != 0 for m in mean) or any(s != 1 for s in std):
        modules.insert(0, Normalise(mean, std))
    return nn.Sequential(*modules)


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, ...)."""
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


class Residual(nn.Module):
    """The sum of a branch and a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """branch(x) + shortcut(x)."""
        total: Tensor = self.branch(x) + self.shortcut(x)
        return total


_KEYS = {"linear": {"op", "weight", "bias"}, "conv2d": {"op", "weight", "bias", "stride", "padding"}}
_PLAIN = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "flatten": nn.Flatten,
}


def _module(layer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    op = layer["op"]
    if op in _PLAIN:
        plain: nn.Module = _PLAIN[op]()
        return plain
    if op == "maxpool2d":
        return nn.MaxPool2d(layer["size"])
    if op == "residual":
        return Residual(build(layer["branch"], weights), build(layer["shortcut"], weights))
    if op not in ("linear", "conv2d"):
        raise ValueError(
            f"op={op!r}: one of {', '.join([*_PLAIN, 'maxpool2d', 'residual', 'linear', 'conv2d'])} is accepted"
        )
    if unknown := layer.keys() - _KEYS[op]:
        raise ValueError(f"layer {op!r} has {', '.join(sorted(unknown))}: {', '.join(sorted(_KEYS[op]))} are accepted")
    try:
        weight = weights[layer["weight"]]
        bias = weights[layer["bias"]] if layer.get("bias") else None
    except KeyError as error:
        raise ValueError(f"the weights have no tensor {error} that the layers name") from error
    module: nn.Linear | nn.Conv2d
    if op == "linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        out, into, *kernel = weight.shape
        stride, padding = layer.get("stride", 1), layer.get("padding", 0)
        module = nn.Conv2d(into, out, (kernel[0], kernel[1]), stride, padding, bias=bias is not None, device="meta")
    # made without storage, so that nothing is drawn at random; the tensors keep their dtype
    module.weight = nn.Parameter(weight)
    if bias is not None:
        if bias.shape != (len(weight),):
            raise ValueError(
                f"layer {op!r}: bias of shape {tuple(bias.shape)} for weight of shape {tuple(weight.shape)}"
            )
        module.bias = nn.Parameter(bias)
    return module


def _card_path(name: str) -> Path:
    for folder in _folders():
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    where = "set the variable WDA_DATA to a folder" if data_folder() is None else f"put it in {_folders()[-1]}"
    raise DataUnavailable(
        f"model={name!r}: at hand are {', '.join(available())}; for others {where} "
        "(models/NAME.json beside its weights), or give 'module:function'"
    )


def _from_function(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataUnavailable(
            f"model={name!r}: {error}; the module must be importable from here (its folder on PYTHONPATH)"
        ) from error
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name!r} returns {type(model).__name__}: a torch.nn.Module is needed")
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read without executing code."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise DataUnavailable(f"{path.name} needs the package safetensors: pip install 'wda[data]'") from error
    return dict(load_file(path))
