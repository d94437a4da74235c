"""WDA++: march away from each sample until its label flips, then bisect the last step."""

from __future__ import annotations

import torch
from torch import Tensor

from wda.attacks.search import Widened, along, free, step_lengths, top_rivals
from wda.checks import whole
from wda.losses import margin
from wda.norms import clamp, dual, dual_maximiser, norm
from wda.passes import Oracle

__all__ = ["wda_plus_plus"]

# The default step: this share of the distance at which the model, linearised at the sample, changes its label. With 1/4
# the fourth step would end on the boundary of a model that is affine so far, and rounding decide whether to bisect it.
_SHARE = 0.26


def wda_plus_plus(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    norm: str,
    box: tuple[float, float] | None,
    *,
    steps: int = 20,
    step_size: float | None = None,
    rivals: int | None = None,
    bisections: int = 10,
) -> Tensor:
    r"""Per sample a misclassified point, found by marching across the nearest boundary and bisecting the last step.

    At each step every rival j proposes :math:`x_t + \alpha\,\mathcal M_r(\nabla(z_j - z_y)(x_t))`, within the box,
    and the proposal of largest margin becomes :math:`x_{t+1}`. The march ends where that margin is not negative; the
    boundary between the last two points is then bisected. No ball bounds the march: how much mass each sample sends
    to its point is decided afterwards, from all the distances (`wda.allocate`).

    This is what the authors of the first paper call WDA++. Its abstract names it; the paper has no algorithm for it.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        Within the box.
    y : int64 Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}
    box : (float, float) or None
    steps : int
        At most so many.
    step_size : float, optional
        The constant :math:`\alpha`, for all samples. By default each sample has its own: 0.26 of the distance
        :math:`\min_j |z_j - z_y| / \|\nabla(z_j - z_y)\|_s` to the nearest boundary of the model linearised there.
    rivals : int, optional
        March only towards the classes with the largest logits at the sample; by default all K-1.
    bisections : int
        The point is within :math:`2^{-\text{bisections}}` of the last step of a boundary.

    Returns
    -------
    Tensor, shape (N, ...)
        Misclassified and within the box; the sample itself where it is misclassified or where nothing was found.

    Examples
    --------
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> wda_plus_plus(Oracle(torch.nn.Linear(2, 3)), x, y, "L2", (0.0, 1.0)).shape
    torch.Size([4, 2])
    """
    whole("steps", steps), whole("bisections", bisections, 0)
    model = Widened(oracle, x, box)
    x, logits = model.x, model.logits(model.x)
    candidates = top_rivals(logits, y, rivals)
    right, wrong = x.clone(), x.clone()
    marching = (margin(logits, y) < 0).nonzero()[:, 0]
    length = torch.full(y.shape, step_lengths(1, 1.0, step_size)[0], dtype=x.dtype, device=x.device)
    for t in range(steps):
        if not len(marching):
            break
        here = right[marching]
        logits, gradients = model.margin_gradients(here, y[marching], candidates[marching])
        gradients = free(gradients, here[:, None], box)
        if t == 0 and step_size is None:
            length[marching] = _SHARE * _linear_distance(logits, gradients, y[marching], candidates[marching], norm)
        ahead, value = _best_step(model, here, gradients, y[marching], length[marching], norm, box)
        flips = value >= 0
        wrong[marching[flips]] = ahead[flips]
        # where no rival has a gradient nothing moves, nor ever will
        onward = (value < 0) & (ahead != here).flatten(1).any(1)
        right[marching[onward]] = ahead[onward]
        marching = marching[onward]
    crossed = (wrong != x).flatten(1).any(1).nonzero()[:, 0]
    wrong[crossed] = _bisect(model, right[crossed], wrong[crossed], y[crossed], bisections)
    return model.narrow(wrong)


def _linear_distance(logits: Tensor, gradients: Tensor, y: Tensor, rivals: Tensor, name: str) -> Tensor:
    """The distance to the nearest boundary of the linearised model, (N,); 0 where no rival has a gradient."""
    gaps = (logits.gather(1, rivals) - logits.gather(1, y[:, None])).abs()
    distance = (gaps / norm(gradients.flatten(0, 1), dual(name)).view_as(gaps)).amin(1)
    return torch.where(distance.isfinite(), distance, 0).to(gradients)


def _best_step(
    model: Widened,
    point: Tensor,
    gradients: Tensor,
    y: Tensor,
    length: Tensor,
    name: str,
    box: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """The rivals' proposal of largest margin, and that margin (N,); minus infinity where there is none."""
    directions = dual_maximiser(gradients.flatten(0, 1), name).view_as(gradients)
    proposals = clamp(point[:, None] + along(directions, length), box)
    margins = margin(model.logits(proposals.flatten(0, 1)), y.repeat_interleave(gradients.shape[1]))
    value, chosen = margins.view(gradients.shape[:2]).nan_to_num(nan=-torch.inf).max(dim=1)
    return proposals[torch.arange(len(point), device=point.device), chosen], value


def _bisect(model: Widened, right: Tensor, wrong: Tensor, y: Tensor, times: int) -> Tensor:
    """A misclassified point on each segment from `right` to `wrong`, just behind a boundary."""
    for _ in range(times):
        middle = (right + wrong) / 2
        flips = (margin(model.logits(middle), y) >= 0).view(-1, *[1] * (middle.ndim - 1))
        right, wrong = torch.where(flips, right, middle), torch.where(flips, middle, wrong)
    return wrong
