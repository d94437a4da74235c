"""What is minimised: the loss at a sample, and how far the prediction changes when an adversary moves it."""

from __future__ import annotations

from torch import Tensor

from wda.checks import choice
from wda.losses import ce

__all__ = ["PENALTIES", "objective"]

PENALTIES = ("ce", "kl")


def objective(
    clean: Tensor,
    moved: Tensor,
    y: Tensor,
    *,
    beta: float = 6.0,
    weight: float | Tensor = 1.0,
    penalty: str = "ce",
) -> Tensor:
    r"""The integrand of eq. 5.1 of the second paper for each sample of which an adversary moves a share w.

    .. math:: \mathrm{CE}(f(x),y)+\beta\,\bigl[w\,D(f(x),f(x'))+(1-w)\,D(f(x),f(x))\bigr]

    With P, P' the probabilities at x, x', the penalty D is the cross-entropy :math:`-\sum_kP_k\log P'_k` of Algorithm 1
    there, or the Kullback-Leibler divergence of TRADES (Zhang et al. 2019). The first is the second plus the entropy of
    P: so for the same x' the adversary sees no difference, but the gradients with respect to the weights differ by that
    of the entropy, which the cross-entropy drives down and the divergence leaves alone.

    Parameters
    ----------
    clean, moved : Tensor, shape (N, K)
        Logits at x and at x', with the graphs of the weights.
    y : int64 Tensor, shape (N,)
    beta : float
    weight : float or Tensor of shape (N,)
        w in [0, 1]: 1 where all mass of a sample moves.
    penalty : {"ce", "kl"}

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> import torch
    >>> clean, moved, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    >>> objective(clean, moved, y, penalty="kl"), objective(clean, clean, y, penalty="kl")
    (tensor([2.0938]), tensor([0.1269]))
    """
    choice("penalty", penalty, PENALTIES)
    probability = clean.softmax(1)
    entropy = -(probability * clean.log_softmax(1)).sum(1)
    divergence = -(probability * moved.log_softmax(1)).sum(1) - entropy
    disagreement = weight * divergence + (entropy if penalty == "ce" else 0)
    return ce(clean, y) + beta * disagreement
