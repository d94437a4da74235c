r"""How far each sample certainly is from its nearest error: a certificate for one radius, searched for the largest."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from wda.certificates.bounds import lipschitz_upper
from wda.certificates.nearest import Nearest, nearest
from wda.certificates.propagation import interval, relax
from wda.checks import choice, number, whole
from wda.checks import interval as checked_interval
from wda.losses import margin
from wda.nets import Net, from_module
from wda.norms import clamp, dual, exponent, rounded
from wda.norms import norm as lengths
from wda.passes import batches, check_labels, check_sample

__all__ = ["LEAST", "METHODS", "by_programs", "margin_bound", "radius", "read", "verified"]

METHODS = ("auto", "optimised", "linear", "interval", "lipschitz", "milp")

# gradient steps for the slopes of "optimised"
_STEPS = 20
# a search ends after so many certificates, even if it is not yet as close as asked for
_TRIALS = 30
# of the size of the logits: more than rounding makes of a difference of two of them
_ROUNDING = 1e-9
LEAST = torch.finfo(torch.float64).tiny
"""The radius of a sample that is right, where nothing more is certified."""


def radius(
    model: nn.Module | Net,
    x: Tensor,
    y: Tensor,
    norm: str = "Linf",
    box: tuple[float, float] | None = (0.0, 1.0),
    *,
    method: str = "auto",
    upper: Tensor | None = None,
    tolerance: float = 0.01,
    refine: float = math.inf,
    time_limit: float = 60.0,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Tensor:
    r"""A certified lower bound of each sample's distance to its nearest error within the box.

    An error is a point whose margin :math:`\max_{j\ne k}z_j-z_k` is at least 0: ties count. No point of the closed ball
    of the radius returned is one.

    ============ =====================================================================================================
    "optimised"  backward linear bounds with the slopes of ReLU optimised for each rival (`propagation.relax`);
                 this is "auto"
    "linear"     the same with fixed slopes
    "interval"   the same with intervals of the logits
    "lipschitz"  the gap to each rival over a Lipschitz constant of their difference (`bounds.lipschitz_upper`)
    "milp"       the exact distance, by mixed-integer programs (`nearest`); small ReLU networks, "Linf" and "L1".
                 Where their time runs out, "optimised" if that is more
    ============ =====================================================================================================

    What is certified is the function that the weights define in real arithmetic. Bounds are computed in float64, with
    an allowance for its rounding; for "milp" see `nearest`. A model that runs in float32 differs from that function by
    its own rounding, and may err where its margin is within that of 0.

    Parameters
    ----------
    model : nn.Module or Net
        Of the layers that `wda.nets.from_module` reads. Works on its device.
    x : Tensor, shape (N, ...)
        Within the box.
    y : integer Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}
    box : (float, float) or None
    method : str
    upper : Tensor, shape (N,), optional
        Distances at which errors are known (`wda.distances`), to search below; infinity where none is known.
    tolerance : float
        The search ends when the largest certified radius and the least that is not are this close, relative to the
        latter.
    refine : float
        For the linear bounds: a layer with more units than this, behind another activation, keeps its bounds by
        intervals. Faster, and looser.
    time_limit : float
        Seconds for each sample, for "milp".
    batch_size : int
        Samples bounded together.
    progress : bool or None
        As for `wda.attack`.

    Returns
    -------
    float64 Tensor, shape (N,)
        On the device of `x`. 0 where the sample is misclassified itself, the least positive number (2e-308) where it
        is right but nothing more could be certified, infinite where the box holds no error.

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that the method cannot treat.
    ValueError, TypeError
        A bad argument; a weight, or a logit at a sample, that is NaN or infinite.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=3)
    >>> model = wda.models.load("digits-mlp")
    >>> certified = radius(model, x, y, "Linf")
    >>> bool((certified <= wda.distances(model, x, y, "Linf").distance).all())
    True
    """
    number("tolerance", tolerance, "a number between 0 and 1", 1e-9, 1)
    problem = _Problem(model, x, y, norm, box, method, refine)
    limit = torch.full((len(y),), math.inf, dtype=torch.float64) if upper is None else upper.double().cpu()
    if limit.shape != (len(y),) or not bool((limit >= 0).all()):
        raise ValueError(f"upper of shape {tuple(limit.shape)}: {len(y)} numbers >= 0 are accepted")
    found = problem.least()
    right = found.nonzero()[:, 0]
    if problem.method == "milp":
        search: dict[str, Any] = {
            "tolerance": tolerance,
            "refine": refine,
            "batch_size": batch_size,
            "progress": progress,
        }
        known = by_programs(problem.net, x, y, norm, problem.box, time_limit=time_limit, upper=upper, **search)
        found = found.maximum(known.lower.cpu())
    elif problem.method == "lipschitz":
        found[right] = problem.lipschitz(right).cpu().clamp(min=LEAST)
    else:
        for rows in batches(len(right), whole("batch_size", batch_size), f"certificate {norm}", progress):
            of = right[rows]
            found[of] = found[of].maximum(_search(problem, of, limit[of], tolerance))
    return found.to(x.device)


def by_programs(
    net: Net,
    x: Tensor,
    y: Tensor,
    norm: str,
    box: tuple[float, float] | None,
    *,
    time_limit: float,
    upper: Tensor | None = None,
    x_adv: Tensor | None = None,
    **search: Any,
) -> Nearest:
    """What `nearest` finds; where its time ran out, the better of its lower bound and that of "optimised".

    Parameters
    ----------
    net, x, y, norm, box, time_limit, upper, x_adv
        As for `nearest`.
    **search
        As for `radius`: tolerance, refine, batch_size, progress.

    Returns
    -------
    Nearest

    Examples
    --------
    >>> x = torch.rand(2, 2).double()
    >>> net = read(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double(), x)
    >>> by_programs(net, x, net(x).argmax(1), "Linf", (0.0, 1.0), time_limit=math.inf).exact.tolist()
    [True, True]
    """
    progress = search.get("progress")
    known = nearest(net, x, y, norm, box, time_limit=time_limit, upper=upper, x_adv=x_adv, progress=progress)
    rows = (~known.exact).nonzero()[:, 0]
    if not len(rows):
        return known
    limit = known.upper if upper is None else known.upper.minimum(upper.to(known.upper))
    rest = radius(net, x[rows], y[rows], norm, box, method="optimised", upper=limit[rows], **search)
    return replace(known, lower=known.lower.index_copy(0, rows, known.lower[rows].maximum(rest)))


def verified(
    model: nn.Module | Net,
    x: Tensor,
    y: Tensor,
    norm: str,
    eps: float | str,
    box: tuple[float, float] | None = (0.0, 1.0),
    *,
    method: str = "auto",
    refine: float = math.inf,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Tensor:
    """Whether no point within `eps` of a sample, and within the box, is misclassified.

    One certificate for each sample instead of a search for the largest radius.

    Parameters
    ----------
    model, x, y, norm, box, refine, batch_size, progress
        As for `radius`.
    eps : float or str
        At least 0.
    method : {"auto", "optimised", "linear", "interval"}
        "auto" and "optimised" try the fixed slopes first.

    Returns
    -------
    bool Tensor, shape (N,)
        False where the certificate fails, which does not mean that there is an error.

    Raises
    ------
    NotPiecewiseAffine, ValueError, TypeError
        As for `radius`.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=3)
    >>> verified(wda.models.load("digits-cnn-adv"), x, y, "Linf", 0.01).tolist()
    [True, True, True]
    """
    choice("method", method, ("auto", "optimised", "linear", "interval"))
    reach = number("eps", eps, "a finite number >= 0", 0, math.nextafter(math.inf, 0))
    problem = _Problem(model, x, y, norm, box, method, refine)
    holds = torch.zeros(len(y), dtype=torch.bool)
    right = problem.least().nonzero()[:, 0]
    for rows in batches(len(right), whole("batch_size", batch_size), f"certificate {norm}", progress):
        of = right[rows]
        holds[of] = problem.bound(of, torch.full((len(of),), reach, dtype=torch.float64)).cpu() < 0
    return holds.to(x.device)


def margin_bound(
    model: nn.Module | Net,
    x: Tensor,
    y: Tensor,
    norm: str,
    radii: Tensor,
    box: tuple[float, float] | None = (0.0, 1.0),
    *,
    method: str = "auto",
    refine: float = math.inf,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Tensor:
    r"""Certified upper bounds of the margin :math:`\max_{j\ne k}z_j-z_k` over balls of several radii.

    The least of the bound that the method gives, of intervals of the logits, of what a Lipschitz constant over the box
    allows, and of the bounds at larger radii.

    Parameters
    ----------
    model, x, y, norm, box, refine, batch_size, progress
        As for `radius`.
    radii : Tensor, shape (R,)
        Finite, at least 0.
    method : {"auto", "optimised", "linear", "interval"}

    Returns
    -------
    float64 Tensor, shape (N, R)
        On the device of `x`.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=2)
    >>> bound = margin_bound(wda.models.load("digits-mlp"), x, y, "Linf", torch.tensor([0.01, 0.1]))
    >>> bool((bound[:, 0] < bound[:, 1]).all())
    True
    """
    choice("method", method, ("auto", "optimised", "linear", "interval"))
    problem = _Problem(model, x, y, norm, box, method, refine)
    if radii.ndim != 1 or not bool((radii.isfinite() & (radii >= 0)).all()):
        raise ValueError(f"radii={radii.tolist()}: finite numbers >= 0 are accepted")
    result = torch.empty(len(y), len(radii), dtype=torch.float64)
    for rows in batches(len(y), whole("batch_size", batch_size), f"bounds {norm}", progress):
        of = torch.arange(len(y))[rows]
        for j, reach in enumerate(radii.double().cpu().tolist()):
            at = torch.full((len(of),), reach, dtype=torch.float64)
            bound = problem.bound(of, at, only_sign=False).minimum(problem.by_intervals(of, at))
            result[rows, j] = bound.minimum(problem.rise(of, reach)).cpu()
    order = radii.argsort(descending=True).cpu()
    result[:, order] = result[:, order].cummin(1).values
    return result.to(x.device)


def read(model: nn.Module | Net, x: Tensor) -> Net:
    """The network as a graph in float64, compared with the model at a sample.

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that cannot be read.
    ValueError
        Names a weight that is NaN or infinite.

    Examples
    --------
    >>> read(nn.Linear(2, 3), torch.zeros(1, 2)).classes
    3
    """
    return from_module(model, shape=x.shape[1:], sample=x)


class _Problem:
    """A network, a sample with its rivals, and the certificate asked for."""

    def __init__(
        self,
        model: nn.Module | Net,
        x: Tensor,
        y: Tensor,
        norm_name: str,
        box: tuple[float, float] | None,
        method: str,
        refine: float,
    ) -> None:
        exponent(norm_name)
        method = choice("method", method, METHODS)
        self.method = "optimised" if method == "auto" else method
        self.norm, self.box, self.refine = norm_name, checked_interval("box", box), refine
        self.y = check_sample(x, y, self.box)
        self.net = read(model, x)
        check_labels(self.y, self.net.classes)
        self.box = rounded(self.box, x)
        self.x, self.y = x.detach().to(self.net.like), self.y.to(self.net.like.device)
        self.logits = torch.cat([self.net(part) for part in self.x.split(64)]).detach()
        bad = (~self.logits.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"model: the logits of sample {int(bad[0])} are NaN or infinite")
        self.margins = margin(self.logits, self.y)

    def least(self) -> Tensor:
        """The radii that go without saying, (N,): the least positive number where a sample is right beyond rounding."""
        right = self.margins < -_ROUNDING * self.logits.abs().amax(1)
        return (right.double() * LEAST).cpu()

    def rivals(self, of: Tensor) -> Tensor:
        """All classes but the label, (n, K-1)."""
        every = torch.arange(self.net.classes, device=self.y.device).expand(len(of), -1)
        return every[every != self.y[of, None]].view(len(of), -1)

    def rows(self, of: Tensor) -> Tensor:
        """From logits to the differences to each rival, (n, K-1, K)."""
        unit = torch.eye(self.net.classes).to(self.net.like)
        return unit[self.rivals(of)] - unit[self.y[of], None]

    def bound(self, of: Tensor, reach: Tensor, only_sign: bool = True) -> Tensor:
        """An upper bound of each margin over its ball; slopes are not optimised where the sign is plain."""
        if self.method == "interval":
            return self.by_intervals(of, reach)
        relaxed = relax(self.net, self.x[of], reach.to(self.x), self.norm, self.box, self.refine)
        rows = self.rows(of)
        found = -relaxed.least(-rows)
        if self.method == "optimised":
            undecided = found >= 0 if only_sign else torch.ones_like(found, dtype=torch.bool)
            found[undecided] = -relaxed.least(-rows[undecided], _STEPS, of=undecided.nonzero()[:, 0])
        return found.amax(1)

    def by_intervals(self, of: Tensor, reach: Tensor) -> Tensor:
        """An upper bound of each margin over its ball, from intervals of the logits."""
        low, high = interval(self.net, *self.around(of, reach.to(self.x)))[-1]
        return (high.gather(1, self.rivals(of)) - low.gather(1, self.y[of, None])).amax(1)

    def around(self, of: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """The least axis-parallel box around each ball, rounded outward, that the box leaves."""
        centre = self.x[of]
        wide = reach.view(-1, *[1] * (centre.ndim - 1)) * (1 + 2**-50) + 2**-50 * centre.abs()
        return clamp(centre - wide, self.box), clamp(centre + wide, self.box)

    def lipschitz(self, of: Tensor) -> Tensor:
        """The gap to each rival over a Lipschitz constant of their difference, the least over rivals."""
        steep = self.steepness[self.y[of]]
        return torch.where(steep > 0, self.gaps(of) / steep, math.inf).amin(1).clamp(min=0) * (1 - _ROUNDING)

    def rise(self, of: Tensor, reach: float) -> Tensor:
        """How large the margin can get within some distance, by the same constants."""
        return (self.steepness[self.y[of]] * reach * (1 + _ROUNDING) - self.gaps(of)).amax(1)

    def gaps(self, of: Tensor) -> Tensor:
        """By how much the label certainly leads each rival, (n, K-1)."""
        logits = self.logits[of]
        gap = logits.gather(1, self.y[of, None]) - logits.gather(1, self.rivals(of))
        return gap - _ROUNDING * logits.abs().amax(1, keepdim=True)

    @cached_property
    def steepness(self) -> Tensor:
        """Lipschitz constants of the differences between the logits of rivals and of the labels present, (K, K-1)."""
        K = self.net.classes
        steep = self.net.like.new_full((K, K - 1), math.inf)
        for label in self.y.unique().tolist():
            pairs = [(label, rival) for rival in range(K) if rival != label]
            steep[label] = lipschitz_upper(self.net, self.norm, pairs, self.box)
        return steep

    def linearised(self, of: Tensor) -> Tensor:
        """How far the model linearised at each sample is from an error: a scale for the search."""
        J = self.net.jacobian(self.x[of])
        slopes = torch.einsum("njk,nki->nji", self.rows(of), J)
        gaps = -torch.einsum("njk,nk->nj", self.rows(of), self.logits[of])
        steep = lengths(slopes.flatten(0, 1), dual(self.norm)).view_as(gaps)
        return (gaps / steep).amin(1).cpu()

    def farthest(self, of: Tensor) -> Tensor:
        """The distance of the farthest corner of the box."""
        if self.box is None:
            return torch.full((len(of),), math.inf, dtype=torch.float64)
        away = torch.maximum(self.x[of] - self.box[0], self.box[1] - self.x[of])
        return lengths(away, self.norm).cpu() * (1 + 1e-12)


def _search(problem: _Problem, of: Tensor, upper: Tensor, tolerance: float) -> Tensor:
    """The largest radius that is certified, in a bracket that interpolation shrinks."""
    farthest = problem.farthest(of)
    low, high = torch.zeros(len(of), dtype=torch.float64), upper.minimum(farthest)
    at_low, at_high = problem.margins[of].cpu(), torch.full_like(low, math.inf)
    start = -at_low
    scale = problem.linearised(of)
    for _ in range(_TRIALS):
        rows = (high.isinf() | (high - low > tolerance * high)).nonzero()[:, 0]
        if not len(rows):
            break
        reach = _between(*(v[rows] for v in (low, at_low, high, at_high, start, scale)))
        value = problem.bound(of[rows], reach).cpu()
        good = value < 0
        low[rows[good]], at_low[rows[good]] = reach[good], value[good]
        high[rows[~good]], at_high[rows[~good]] = reach[~good], value[~good]
    # all of the box may be safe: the search has come near its farthest corner then
    last = ((upper >= farthest) & at_high.isinf() & farthest.isfinite()).nonzero()[:, 0]
    if len(last):
        safe = problem.bound(of[last], farthest[last]).cpu() < 0
        low[last[safe]] = math.inf
    return low


def _between(low: Tensor, at_low: Tensor, high: Tensor, at_high: Tensor, start: Tensor, scale: Tensor) -> Tensor:
    """Where to try next: where a parabola through what is known is 0, away from the ends.

    Bounds grow faster than linearly in the radius, as more units become unstable.
    """
    share = -at_low / (at_high - at_low)
    inner = (low**2 + share * (high**2 - low**2)).sqrt()
    grown = low * (start / (start + at_low).clamp(min=0)).sqrt().clamp(1.2, 4)
    outer = torch.where(low > 0, grown, torch.where(scale.isfinite() & (scale > 0), scale / 2, 1.0))
    reach = torch.where(at_high.isfinite(), inner, outer)
    width = high - low
    return torch.where(high.isfinite(), reach.maximum(low + 0.1 * width).minimum(high - 0.1 * width), reach)
