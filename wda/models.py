"""Models by name: the bundled ones, those under ``WDA_DATA``, RobustBench's, or a function of one's own.

A stored model is a card, ``NAME.json``, beside its weights, ``NAME.safetensors`` or ``NAME.npz``. The card lists
the layers; so a model is read without executing code.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wda import zoo
from wda.checks import whole
from wda.data import data_folder
from wda.errors import DataUnavailable
from wda.weights import read, state_dict

__all__ = [
    "Attention",
    "Normalise",
    "Position",
    "Residual",
    "TokenMean",
    "Tokens",
    "available",
    "build",
    "bundled",
    "card",
    "load",
]


def bundled() -> Path:
    """The folder of the models that come with the package: inside an installed one, or in the checkout.

    Examples
    --------
    >>> (bundled() / "digits-mlp.json").is_file()
    True
    """
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
    ValueError
        The card is damaged: the message names its file, the key, its value, and what is accepted.

    Examples
    --------
    >>> card("digits-mlp")["data"]
    'digits'
    """
    return _read_card(_card_path(name))


def load(name: str) -> nn.Module:
    """A model in evaluation mode, on the CPU, that takes inputs in [0, 1]; any normalisation is inside.

    Parameters
    ----------
    name : str
        - a name of `available`;
        - ``"robustbench:DATA/THREAT/ID"`` for a model of RobustBench, see `wda.zoo`;
        - ``"module:function"`` for an importable function that takes no argument and returns a module;
        - any of these and ``"@weights.pt"``, to fill the model from a file, ``.npz``, ``.safetensors`` or what
          `torch.save` wrote of a ``state_dict()``, without executing code in it.

    Raises
    ------
    DataUnavailable
        There is no such model here, or its weights are missing.
    ValueError
        The card is damaged; the weights are, or do not have the checksum that the card states, do not fit the layers,
        or would run code; or the module cannot be imported, or the function fails or returns no module.

    Examples
    --------
    >>> load("digits-mlp")(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """
    if not isinstance(name, str):
        raise TypeError(f"model={name!r}: a name is accepted")
    name, at, weights = name.partition("@")
    if at and not weights.strip():
        raise ValueError(f"model='{name}@{weights}': a file of weights is accepted after the @, and nothing is there")
    named = zoo.load if name.startswith(zoo.PREFIX) else _from_function if ":" in name else _stored
    return _filled_from(named(name), name, weights) if weights else named(name)


def _stored(name: str) -> nn.Module:
    path = _card_path(name)
    about = _read_card(path)
    weights = path.with_name(about["weights_file"])
    if not weights.is_file():
        raise DataUnavailable(f"model={name!r}: its weights {weights} are not there")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != about["weights_sha256"].lower():
        raise ValueError(
            f"model={name!r}: {weights} has the SHA-256 checksum {digest}, its card states {about['weights_sha256']}: "
            "the file is damaged or another one; fetch it again"
        )
    held = read(weights)
    try:
        net = build(about["layers"], held, about.get("input", {}))
        _check_fit(net, about)
    except ValueError as error:
        raise ValueError(f"model={name!r}: the card {path} does not fit its weights {weights.name}: {error}") from error
    return net


def _read_card(path: Path) -> dict[str, Any]:
    """What a card says; of what `build` and `load` use, every value is one that they accept."""
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the model's card {path} is no JSON: {error}") from error
    try:
        _check_card(about)
    except ValueError as error:
        raise ValueError(f"the model's card {path}: {error}") from error
    return dict(about)


def _check_card(about: object) -> None:
    if not isinstance(about, dict):
        raise ValueError(f"it holds {type(about).__name__}: keys and values are needed")
    _check_spelling("", about, ("layers", "weights_file", "weights_sha256", "input", "parameters"))
    for key, (accepted, fits) in _KEYS.items():
        if not fits(about.get(key)):
            raise ValueError(f"{key}={_short(about.get(key))}: {accepted} is accepted")
    if "parameters" in about:
        whole("parameters", about["parameters"], least=0)
    for number, layer in enumerate(about["layers"]):
        _check_layer(layer, f"layers[{number}]")
    _check_input(about.get("input", {}))


def _check_spelling(within: str, about: Mapping[str, Any], known: Sequence[str]) -> None:
    """A card may say more than is used here; a key that is nearly one of those used would be without effect."""
    for key in about:
        near = [] if key in known else difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)
        if near:
            raise ValueError(f"{within}{_short(key)} is no key that is known: is {near[0]!r} meant?")


def _beside(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip(". ")) and not set(value) & set("/\\:\0")


# What a card must have: each key with what is accepted, in words and as a test.
_KEYS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "layers": ("a list of layers", lambda value: isinstance(value, list) and len(value) > 0),
    "weights_file": ("the name of a file beside the card", _beside),
    "weights_sha256": (
        "64 hexadecimal digits",
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{64}", value),
    ),
}


def _check_input(about: object) -> None:
    if not isinstance(about, Mapping):
        raise ValueError(f"input={_short(about)}: a mapping, with mean and std, is accepted")
    _check_spelling("input.", about, ("mean", "std", "shape", "range", "pixel_range"))
    shape = about.get("shape", [1])
    if not _list(shape) or not all(map(_size, shape)):
        raise ValueError(f"input.shape={_short(shape)}: a list of sizes is accepted")
    channels = shape[0] if "shape" in about else max(len(_list(about.get(key))) for key in ("mean", "std"))
    for key, sign, least in (("mean", "finite", -math.inf), ("std", "positive finite", 0.0)):
        values = about.get(key, [1])
        fits = len(_list(values)) in (1, channels) and all(_finite(value) and value > least for value in values)
        if not fits:
            raise ValueError(
                f"input.{key}={_short(values)}: a list of {sign} numbers, one or as many as channels, is accepted"
            )
    for key in ("range", "pixel_range"):
        if about.get(key, [0, 1]) != [0, 1]:
            raise ValueError(f"input.{key}={_short(about[key])}: [0, 1] is accepted, as models take inputs in it")


def _check_fit(net: nn.Module, about: Mapping[str, Any]) -> None:
    """The parameters are as many as the card states, and an input of the shape it states gives logits."""
    count, stated = sum(parameter.numel() for parameter in net.parameters()), about.get("parameters")
    if stated is not None and count != stated:
        raise ValueError(f"parameters={stated}: the layers and the weights make {count}")
    shape = about.get("input", {}).get("shape")
    if shape is None:
        return
    dtype = next((parameter.dtype for parameter in net.parameters()), torch.float32)
    try:
        with torch.no_grad():
            logits = net(torch.zeros(1, *shape, dtype=dtype))
    except Exception as error:  # whatever a layer stumbles over
        raise ValueError(f"the layers do not take an input of shape {shape}: {error}") from error
    if logits.ndim != 2:
        raise ValueError(f"the layers end in shape {tuple(logits.shape[1:])}: one number for each class is needed")


def build(
    layers: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Tensor],
    about_input: Mapping[str, Any] | None = None,
) -> nn.Sequential:
    """A network in evaluation mode from a list of layers and the tensors they name.

    Parameters
    ----------
    layers : sequence of mappings
        Each with an ``op`` and its options. An option that is a tensor is given by the tensor's name.

        ===================================== ==================================================================
        op                                    options
        ===================================== ==================================================================
        relu, gelu, silu, sigmoid, softplus   none
        flatten, tokens, meanpool             none
        linear                                weight, bias (or null)
        conv2d                                weight, bias (or null), stride (1), padding (0)
        batchnorm2d                           weight, bias, mean, variance (fixed, from training), eps (1e-5)
        maxpool2d, avgpool2d                  size
        layernorm                             weight, bias, eps (1e-5); over the last axis
        attention                             heads, qkv, qkv_bias (or null), output, output_bias (or null)
        position                              embedding
        residual                              branch and shortcut, both lists of layers; [] is the identity
        ===================================== ==================================================================
    weights : mapping from names to tensors
    about_input : mapping, optional
        ``mean`` and ``std``, one number per channel, to normalise by inside the network.

    Raises
    ------
    ValueError
        An unknown ``op`` or option, an option or a tensor that is missing, or a tensor of another shape.

    Examples
    --------
    >>> net = build([{"op": "flatten"}, {"op": "linear", "weight": "w"}], {"w": torch.eye(2)})
    >>> net(torch.ones(1, 2, 1)).tolist()
    [[1.0, 1.0]]
    """
    about = about_input or {}
    _check_input(about)
    for number, layer in enumerate(layers):
        _check_layer(layer, f"layers[{number}]")
    modules = [_module(layer, weights) for layer in layers]
    mean, std = about.get("mean", [0.0]), about.get("std", [1.0])
    if any(m != 0 for m in mean) or any(s != 1 for s in std):
        modules.insert(0, Normalise(mean, std))
    return nn.Sequential(*modules).eval()


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    Parameters
    ----------
    mean, std : sequences of C numbers
        Where C = 1, inputs of any shape are taken; else images of shape (N, C, H, W).

    Examples
    --------
    >>> Normalise([0.5], [0.25])(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # the shape is settled here, not in forward, so that torch.fx can trace it
        shape = (1,) if len(mean) == 1 else (-1, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (x - self.mean) / self.std


class Residual(nn.Module):
    """The sum of a branch and a shortcut.

    Examples
    --------
    >>> Residual(nn.ReLU(), nn.Identity())(torch.tensor([[-1.0, 2.0]]))
    tensor([[-1.,  4.]])
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """branch(x) + shortcut(x)."""
        total: Tensor = self.branch(x) + self.shortcut(x)
        return total


class Tokens(nn.Module):
    """Images of features as sequences: (N, d, H, W) to (N, H * W, d), row by row.

    Examples
    --------
    >>> Tokens()(torch.zeros(1, 32, 4, 4)).shape
    torch.Size([1, 16, 32])
    """

    def forward(self, x: Tensor) -> Tensor:
        """One token of d features for each of the H * W places."""
        return x.flatten(2).transpose(1, 2)


class Position(nn.Module):
    """Add a learnt vector to each token.

    Parameters
    ----------
    embedding : Tensor, shape (T, d)
        One vector for each of the T tokens.

    Examples
    --------
    >>> Position(torch.eye(2))(torch.zeros(1, 2, 2)).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)

    def forward(self, x: Tensor) -> Tensor:
        """x + embedding, for x of shape (N, T, d)."""
        return x + self.embedding


class Attention(nn.Module):
    r"""Multi-head self-attention (Vaswani et al. 2017): each token takes a weighted mean of the values of all.

    In each head, :math:`\mathrm{softmax}(Q K^\top / \sqrt{h}) V`, with the queries Q, keys K and values V of that head
    and their length h; the heads' results, side by side, pass through the output layer. The softmax makes convex
    combinations, so the result is bounded where the values are.

    Parameters
    ----------
    qkv : nn.Linear, d to 3 h heads
        All queries, then all keys, then all values; within each, head after head.
    output : nn.Linear, h heads to d
    heads : int

    Raises
    ------
    ValueError
        The widths of the layers do not fit each other or the number of heads.

    Examples
    --------
    >>> Attention(torch.nn.Linear(32, 96), torch.nn.Linear(32, 32), heads=4)(torch.rand(5, 16, 32)).shape
    torch.Size([5, 16, 32])
    """

    def __init__(self, qkv: nn.Linear, output: nn.Linear, heads: int) -> None:
        super().__init__()
        heads = whole("heads", heads)
        if qkv.out_features != 3 * output.in_features or output.in_features % heads:
            raise ValueError(
                f"qkv of width {qkv.out_features}, output from width {output.in_features}, heads={heads}: "
                "3 h heads and h heads are accepted, h whole"
            )
        self.qkv, self.output, self.heads = qkv, output, heads

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens of x, shape (N, T, d)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)  # (N, heads, T, h)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class TokenMean(nn.Module):
    """The mean over the tokens: (N, T, d) to (N, d).

    Examples
    --------
    >>> TokenMean()(torch.eye(2)[None])
    tensor([[0.5000, 0.5000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """The mean over axis 1."""
        return x.mean(1)


_Layer = Mapping[str, Any]
_Weights = Mapping[str, Tensor]
_M = TypeVar("_M", bound=nn.Module)


def _tensor(weights: _Weights, name: str, *axes: int) -> Tensor:
    """The tensor of that name, which must have one of these numbers of axes, where they are given."""
    if name not in weights:
        raise ValueError(f"the weights have no tensor {name!r} that the layers name")
    tensor = weights[name]
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
        about = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"the tensor {name!r} is {about}: floating-point numbers are needed, one at least")
    if axes and tensor.ndim not in axes:
        raise ValueError(f"the tensor {name!r} is of shape {tuple(tensor.shape)}: {axes[0]} axes are needed")
    return tensor


def _filled(module: _M, weights: _Weights, **names: str | None) -> _M:
    """The module with tensors in the place of its own; they keep their dtype."""
    for own, name in names.items():
        if name is None:
            continue
        old, new = getattr(module, own), _tensor(weights, name)
        if new.shape != old.shape:
            raise ValueError(f"{own}={name!r} of shape {tuple(new.shape)}: {tuple(old.shape)} is needed in {module}")
        setattr(module, own, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    return module


# Modules are made on the device "meta", without storage, so that nothing is drawn at random.


def _linear(weights: _Weights, weight: str, bias: str | None = None) -> nn.Linear:
    out, into = _tensor(weights, weight, 2).shape
    return _filled(nn.Linear(into, out, bias=bias is not None, device="meta"), weights, weight=weight, bias=bias)


def _conv2d(weights: _Weights, weight: str, bias: str | None = None, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    out, into, *kernel = _tensor(weights, weight, 4).shape
    size = (kernel[0], kernel[1])
    module = nn.Conv2d(into, out, size, stride, padding, bias=bias is not None, device="meta")
    return _filled(module, weights, weight=weight, bias=bias)


def _batchnorm2d(
    weights: _Weights, weight: str, bias: str, mean: str, variance: str, eps: float = 1e-5
) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(len(_tensor(weights, weight, 1)), eps)  # its counter of batches needs storage
    return _filled(module, weights, weight=weight, bias=bias, running_mean=mean, running_var=variance)


def _layernorm(weights: _Weights, weight: str, bias: str, eps: float = 1e-5) -> nn.LayerNorm:
    module = nn.LayerNorm(len(_tensor(weights, weight, 1)), eps, device="meta")
    return _filled(module, weights, weight=weight, bias=bias)


def _attention(
    weights: _Weights, heads: int, qkv: str, output: str, qkv_bias: str | None = None, output_bias: str | None = None
) -> Attention:
    return Attention(_linear(weights, qkv, qkv_bias), _linear(weights, output, output_bias), heads)


def _residual(weights: _Weights, branch: Sequence[_Layer], shortcut: Sequence[_Layer]) -> Residual:
    return Residual(build(branch, weights), build(shortcut, weights))


# What makes each layer: from the weights, with the layer's options as keywords.
_OPS: dict[str, Callable[..., nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "gelu": lambda _: nn.GELU(),
    "silu": lambda _: nn.SiLU(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "softplus": lambda _: nn.Softplus(),
    "flatten": lambda _: nn.Flatten(),
    "tokens": lambda _: Tokens(),
    "meanpool": lambda _: TokenMean(),
    "linear": _linear,
    "conv2d": _conv2d,
    "batchnorm2d": _batchnorm2d,
    "maxpool2d": lambda _, size: nn.MaxPool2d(size),
    "avgpool2d": lambda _, size: nn.AvgPool2d(size),
    "layernorm": _layernorm,
    "attention": _attention,
    "position": lambda weights, embedding: Position(_tensor(weights, embedding, 2)),
    "residual": _residual,
}


def _module(layer: _Layer, weights: _Weights) -> nn.Module:
    options = dict(layer)
    return _OPS[options.pop("op")](weights, **options)


def _check_layer(layer: object, where: str) -> None:
    """The layer is one of those in the table of `build`, and each of its options has a value of the option's kind."""
    if not isinstance(layer, Mapping):
        raise ValueError(f"{where}={_short(layer)}: a mapping with the key op is accepted")
    options = dict(layer)
    op = options.pop("op", None)
    if not isinstance(op, str) or op not in _OPS:
        raise ValueError(f"{where}.op={_short(op)}: one of {', '.join(_OPS)} is accepted")
    signature = inspect.signature(_OPS[op])
    try:
        signature.bind(None, **options)
    except TypeError as error:
        accepted = ", ".join(list(signature.parameters)[1:]) or "no option"
        raise ValueError(f"{where}, layer {op!r}: {error}; {accepted} is accepted") from error
    for name, value in options.items():
        if name in ("branch", "shortcut"):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{where}.{name}={_short(value)}: a list of layers is accepted")
            for number, inner in enumerate(value):
                _check_layer(inner, f"{where}.{name}[{number}]")
            continue
        accepted, fits = _OPTIONS.get(name, _NAME)
        optional = signature.parameters[name].default is None
        if not fits(value) and not (optional and value is None):
            raise ValueError(f"{where}.{name}={_short(value)}: {accepted} is accepted" + ", or null" * optional)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38  # of float32


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _size(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _sizes(value: object, least: int = 1) -> bool:
    """One for both, or one for the height and one for the width."""
    pair = _list(value) or (value, value)
    return len(pair) == 2 and all(_size(one, least) for one in pair)


# What each option takes, where it is not the name of a tensor.
_NAME = ("the name of a tensor", lambda value: isinstance(value, str))
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number >= 1, or two", _sizes),
    "stride": ("a whole number >= 1, or two", _sizes),
    "padding": ("a whole number >= 0, or two", lambda value: _sizes(value, 0)),
    "eps": ("a number > 0", lambda value: _finite(value) and value > 0),
    "heads": ("a whole number >= 1", _size),
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _card_path(name: str) -> Path:
    for folder in _folders():
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    where = "set the variable WDA_DATA to a folder" if data_folder() is None else f"put it in {_folders()[-1]}"
    near = difflib.get_close_matches(name, available(), n=1)
    raise DataUnavailable(
        f"model={name!r}: {f'is {near[0]!r} meant? ' if near else ''}at hand are {', '.join(available())}; for others "
        f"{where} (models/NAME.json beside its weights), or give 'module:function' or '{zoo.PREFIX}DATA/THREAT/ID'"
    )


def _from_function(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    if module.endswith(".py") or not module:
        raise ValueError(f"model={name!r}: 'module:function' is accepted, as in 'my_module:my_function'")
    try:
        functions = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"model={name!r}: importing {module} fails: {error}") from error
        raise DataUnavailable(
            f"model={name!r}: there is no module {error.name!r}; its folder must be the current one or on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(f"model={name!r}: importing {module} fails: {type(error).__name__}: {error}") from error
    make = getattr(functions, function, None)
    if not callable(make):
        raise DataUnavailable(f"model={name!r}: {functions.__file__} has no function {function!r}")
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"model={name!r}: {function}() fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name!r} returns {type(model).__name__}: a torch.nn.Module is needed")
    return model.eval()


def _filled_from(model: nn.Module, name: str, path: str) -> nn.Module:
    try:
        held = state_dict(path)
        for key, own in model.state_dict().items():
            # copied into numbers of another kind, they would lose a part in silence
            if key in held and _kind(held[key]) != _kind(own):
                raise ValueError(f"{path} has {held[key].dtype} for {key}, which is {own.dtype} in {name}")
        model.load_state_dict(held)
    except (DataUnavailable, ValueError) as error:
        raise type(error)(f"model='{name}@{path}': {error}") from error
    except RuntimeError as error:
        raise ValueError(f"model='{name}@{path}': the weights do not fit what {name} returns: {error}") from error
    return model


def _kind(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "whole"
