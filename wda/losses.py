r"""Losses of one sample, as an adversary maximises them.

Each takes logits ``(N, K)`` and labels ``(N,)`` and returns one value per sample, differentiable, in the dtype and
on the device of the logits. What the first paper calls the "DLR loss" (eq. 12) is `margin` here, the difference of
two logits; `dlr` is the ratio of Croce & Hein, which is bounded and behaves otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wda.checks import choice

__all__ = ["Loss", "ce", "dlr", "get", "margin", "redlr", "rival_logits"]

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy, :math:`-\\log \\mathrm{softmax}(z)_y`.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    y : int64 Tensor, shape (N,)

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> ce(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


def rival_logits(logits: Tensor, y: Tensor) -> Tensor:
    """The logits with that of the label set to minus infinity, shape (N, K).

    Examples
    --------
    >>> rival_logits(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([[1., -inf, 2.]])
    """
    return logits.scatter(1, y[:, None], -torch.inf)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    r"""The margin by which the best rival wins, :math:`\max_{j\ne y} z_j - z_y` (eq. 12 of the first paper).

    Negative exactly where the label is strictly the largest logit.

    Parameters
    ----------
    logits : Tensor, shape (N, K), K >= 2
    y : int64 Tensor, shape (N,)

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([-1.])
    """
    return rival_logits(logits, y).amax(1) - logits.gather(1, y[:, None])[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""The difference of logits ratio, :math:`(\max_{j\ne y} z_j - z_y) / (z_{(1)} - z_{(3)})` (Croce & Hein 2020).

    Invariant under shifts and positive scalings of the logits. Where the three largest logits are equal the ratio
    is 0/0; it is 0 there.

    Parameters
    ----------
    logits : Tensor, shape (N, K), K >= 3
    y : int64 Tensor, shape (N,)

    Returns
    -------
    Tensor, shape (N,)

    Raises
    ------
    ValueError
        Fewer than three classes: there is no third logit.

    Examples
    --------
    >>> dlr(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([-0.5000])
    """
    return _ratio(logits, y, "dlr")


def _ratio(logits: Tensor, y: Tensor, name: str) -> Tensor:
    """The difference of logits ratio; `name` is for the error."""
    if logits.shape[1] < 3:
        raise ValueError(f"loss={name!r} needs K >= 3 classes, the model has {logits.shape[1]}: use 'margin'")
    # a quarter of logits whose differences might overflow; the ratio is the same
    large = logits.detach().abs().amax(1, keepdim=True) > torch.finfo(logits.dtype).max / 4
    logits = logits * torch.where(large, 0.25, 1.0).to(logits.dtype)
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2]
    return margin(logits, y) / torch.where(spread > 0, spread, 1)


def redlr(logits: Tensor, y: Tensor) -> Tensor:
    """The rectified `dlr`, min(dlr, 0): zero, with zero gradient, on misclassified samples (Bai et al. 2023).

    Parameters, return value and errors are those of `dlr`.

    Examples
    --------
    >>> redlr(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0]))
    tensor([0.])
    """
    value = _ratio(logits, y, "redlr")
    return torch.where(value < 0, value, 0)


_LOSSES: dict[str, Loss] = {"ce": ce, "margin": margin, "dlr": dlr, "redlr": redlr}


def get(name: str) -> Loss:
    """The loss called `name`.

    Raises
    ------
    ValueError
        `name` is not one of "ce", "margin", "dlr", "redlr".

    Examples
    --------
    >>> get("margin") is margin
    True
    """
    return _LOSSES[choice("loss", name, _LOSSES)]
