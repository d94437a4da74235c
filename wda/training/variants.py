"""How fine-tuning starts: with a new last layer, which alone is trained, or with a little noise on all weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wda.checks import choice
from wda.passes import Oracle
from wda.training.replay import generator

__all__ = ["VARIANTS", "disturb", "last_layer"]

VARIANTS = ("last", "whole")


def last_layer(model: nn.Module, x: Tensor) -> nn.Linear:
    """The linear layer whose values are the logits, wherever in the model it is.

    Parameters
    ----------
    model : nn.Module
    x : Tensor, shape (N, ...)
        One input is enough, to see what the layers give.

    Raises
    ------
    ValueError
        The logits are not the values of an `nn.Linear`.

    Examples
    --------
    >>> last_layer(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), torch.rand(1, 2))
    Linear(in_features=4, out_features=3, bias=True)
    """
    given: list[tuple[nn.Linear, object]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, values: given.append((module, values)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with Oracle(model), torch.no_grad():
            logits = model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    for layer, values in given:
        if values is logits:
            return layer
    raise ValueError(
        f"variant='last': the logits of {type(model).__name__} are not the values of a torch.nn.Linear; "
        "'whole' is accepted"
    )


def disturb(model: nn.Module, x: Tensor, variant: str, *, noise: float = 0.01, seed: int = 0) -> list[nn.Parameter]:
    """Change a model's weights as a variant of fine-tuning starts, and return those that it trains.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    x : Tensor, shape (N, ...)
        On the model's device.
    variant : {"last", "whole"}
        "last": the last layer is drawn anew, as torch initialises one, and trained alone. "whole": to every tensor of
        weights that takes a gradient Gaussian noise is added, `noise` times the root of the tensor's mean square, and
        all are trained.
    noise : float
        For "whole". The second paper speaks of a small noise and gives no figure; this one is ours.
    seed : int

    Raises
    ------
    ValueError
        The model has no last linear layer, or no weight that takes a gradient.

    Examples
    --------
    >>> len(disturb(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), torch.rand(1, 2), "last"))
    2
    """
    draw = generator(seed, "disturb")
    if choice("variant", variant, VARIANTS) == "last":
        layer = last_layer(model, x)
        parameters = list(layer.parameters())
        bound = layer.in_features**-0.5
        drawn = [(2 * _uniform(weights, draw) - 1) * bound for weights in parameters]
    else:
        parameters = [weights for weights in model.parameters() if weights.requires_grad]
        drawn = [weights + noise * _root_mean_square(weights) * _normal(weights, draw) for weights in parameters]
    if not parameters:
        raise ValueError(f"model: {type(model).__name__} has no weight that takes a gradient (requires_grad)")
    with torch.no_grad():
        for weights, new in zip(parameters, drawn, strict=True):
            weights.requires_grad_().copy_(new)
    return parameters


def _uniform(like: Tensor, draw: torch.Generator) -> Tensor:
    """Numbers from [0, 1), drawn on the CPU: the same on every device."""
    return torch.rand(like.shape, generator=draw).to(like)


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw).to(like)


def _root_mean_square(weights: Tensor) -> Tensor:
    return weights.square().mean().sqrt()
