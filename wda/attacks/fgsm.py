"""The fast gradient sign method, and its analogues in other norms."""

from __future__ import annotations

from torch import Tensor

from wda import losses
from wda.attacks.search import free
from wda.norms import dual_maximiser
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["fgsm"]


def fgsm(oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, *, loss: str = "ce") -> Tensor:
    """One step of full length along the dual-norm maximiser of the gradient (Goodfellow et al. 2015, eq. 1).

    Coordinates that the box stops do not count.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise; its `eps` is the radius around each sample.
    loss : {"ce", "margin", "dlr", "redlr"}

    Returns
    -------
    Tensor, shape (N, ...)
        Not yet projected onto the box.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> fgsm(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf")).shape
    torch.Size([4, 2])
    """
    _, gradient = oracle.gradient(x, y, losses.get(loss))
    return x + ball.eps * dual_maximiser(free(gradient, x, ball.box), ball.norm)
