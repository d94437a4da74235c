"""How far each sample is from its nearest error, as an attack finds it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wda.attacks.autoattack import fab
from wda.attacks.closest import closest
from wda.attacks.search import Widened, along, free
from wda.attacks.wda_plus_plus import wda_plus_plus
from wda.budget import allocate, robust_accuracy
from wda.checks import choice, interval, whole
from wda.distribution import AdversarialDistribution
from wda.inspection import inspected
from wda.losses import margin, rival_logits
from wda.norms import clamp, dual_maximiser, exponent, rounded
from wda.norms import norm as lengths
from wda.passes import Counts, Model, Oracle, batches, check_sample, distrust
from wda.threat import Threat

__all__ = ["METHODS", "Distances", "distances"]

METHODS: dict[str, Callable[..., Tensor]] = {"fab": fab, "wda++": wda_plus_plus, "closest": closest}


@dataclass(frozen=True, eq=False)
class Distances:
    r"""For each sample the nearest misclassified point that was found: an upper bound of its distance to an error.

    Attributes
    ----------
    x, y : Tensor, shape (N, ...); int64 Tensor, shape (N,)
        The sample. Kept as it is given, not copied.
    norm : str
    box : (float, float) or None
    distance : float64 Tensor, shape (N,)
        In that norm; 0 where the sample itself is misclassified, infinite where nothing was found.
    x_adv : Tensor, shape (N, ...)
        The points; the sample itself where the distance is 0 or infinite.
    rival : int64 Tensor, shape (N,)
        The class that wins there; -1 where the distance is infinite.
    counts : Counts

    Examples
    --------
    >>> model = torch.nn.Linear(2, 2)
    >>> x, y = torch.rand(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> found = distances(model, x, y, norm="L2")
    >>> adv = found.distribution(Threat("L2", eps=0.1, order=2))
    >>> adv.audit() <= 0.1
    True
    """

    x: Tensor
    y: Tensor
    norm: str
    box: tuple[float, float] | None
    distance: Tensor
    x_adv: Tensor
    rival: Tensor
    counts: Counts = field(default_factory=Counts)

    def __repr__(self) -> str:
        found = int(self.distance.isfinite().sum())
        return f"{type(self).__name__}({len(self.x)} samples, {found} with an error in reach, {self.norm})"

    def distribution(self, threat: Threat) -> AdversarialDistribution:
        """The distribution in the ball that flips the most mass, given these points: see `wda.allocate`.

        Raises
        ------
        ValueError
            The threat has another norm or box.
        """
        if (threat.norm, threat.box) != (self.norm, self.box):
            raise ValueError(
                f"threat={threat} with box={threat.box}: norm={self.norm!r} and box={self.box} are accepted, "
                "those of the distances"
            )
        weight = allocate(self.distance, threat)
        return AdversarialDistribution.from_points(self.x, self.x_adv, self.y, threat, weight, self.counts)

    def robust_accuracy(self, eps: float | str | Sequence[float] | Tensor, order: float | str = 1.0) -> Tensor:
        r"""The accuracy that is left in balls of order p and radius eps, for one radius or many.

        An upper bound of the model's least accuracy over the ball; `distribution` attains it. Arguments, result and
        errors are those of `wda.robust_accuracy`.

        Examples
        --------
        >>> model = lambda x: torch.cat([torch.full_like(x, 0.5), x], dim=1)  # class 1 where x > 1/2
        >>> x, y = torch.tensor([[0.1], [0.3], [0.4], [0.9]]), torch.zeros(4, dtype=torch.int64)
        >>> distances(model, x, y).robust_accuracy([0.0, 0.1, 1.0]).round(decimals=2)
        tensor([0.7500, 0.1900, 0.0000], dtype=torch.float64)
        """
        return robust_accuracy(self.distance, eps, order)


def distances(
    model: Model,
    x: Tensor,
    y: Tensor,
    norm: str = "Linf",
    box: tuple[float, float] | None = (0.0, 1.0),
    *,
    method: str = "closest",
    seed: int = 0,
    batch_size: int = 256,
    autocast: bool = False,
    progress: bool | None = None,
    **parameters: object,
) -> Distances:
    """Search the nearest misclassified point of each sample.

    Every point that is returned was classified anew: alone, in batches of three, of seven and of the size at hand. It
    is an error of the model as it runs, in its own precision; a tie of the label's logit with another one counts. One
    set of distances serves all budgets and all orders.

    Parameters
    ----------
    model : nn.Module, or another callable
        Maps (N, ...) to logits (N, K), as for `wda.attack`.
    x : Tensor, shape (N, ...)
        The sample, within the box; its dtype must be the model's.
    y : integer Tensor, shape (N,)
        Labels from 0 to K-1.
    norm : {"Linf", "L2", "L1"}
    box : (float, float) or None
    method : str
        "closest", the strongest; "wda++" of the first paper; or "fab" of Croce & Hein, from the AutoAttack package.
    seed : int
        For methods that draw random numbers. They depend on the seed and on the sample itself: not on the batch
        size, nor on the order of the samples.
    batch_size : int
        To begin with; halved where memory runs out.
    autocast : bool
        Search in bfloat16 where torch's autocast does so, for models in single precision: faster on many GPUs and on
        some CPUs. What was found is verified in the precision of the model.
    progress : bool or None
        Show a bar; by default on a terminal only, and elsewhere lines in the log "wda".
    **parameters
        Options of the method.

    Returns
    -------
    Distances

    Raises
    ------
    ValueError, TypeError
        A bad argument: the message names it, its value and what is accepted.

    Warns
    -----
    Untrustworthy
        The model is random, or its logits depend on the other samples of a batch; it has NaN logits; many gradients
        are zero; a sample's logits tie exactly, or those of what was found do so over 5 % of its distance; or an error
        was found that its other passes deny, and none near it holds in all of them: then its distance is infinite.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 2)
    >>> x, y = torch.rand(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> distances(model, x, y, norm="L1").distance.shape
    torch.Size([5])
    """
    search = METHODS[choice("method", method, METHODS)]
    known = inspect.signature(search).parameters
    for parameter in parameters:
        if parameter not in known or known[parameter].kind is not inspect.Parameter.KEYWORD_ONLY:
            accepted = ", ".join(name for name, p in known.items() if p.kind is p.KEYWORD_ONLY)
            raise TypeError(f"{parameter}={parameters[parameter]!r}: method {method!r} accepts {accepted}")
    exponent(norm)
    box = interval("box", box)
    seed, batch_size = whole("seed", seed, 0, 2**64 - 1), whole("batch_size", batch_size)
    y, within = check_sample(x, y, box), rounded(box, x)
    if "seed" in known:
        parameters["seed"] = seed

    start = time.monotonic()
    x_adv, gap = x.detach().clone(), torch.empty(len(x), dtype=torch.float64, device=x.device)
    rival = torch.full_like(y, -1)
    lost, tied = torch.zeros(2, len(x), dtype=torch.bool)
    with Oracle(model, batch_size, autocast) as oracle, inspected(oracle, x, y, x_adv):

        def measure(rows: slice) -> None:
            clean = oracle.to_model(x[rows]).detach()
            labels = y[rows].to(clean.device)
            found = clamp(search(oracle, clean, labels, norm, within, **parameters), within)
            points, wrong, seen = _confirmed(oracle, clean, found, labels, norm, within)
            logits = oracle.logits(points)
            x_adv[rows] = points.to(x.device)
            rival[rows] = rival_logits(logits, labels).argmax(1).masked_fill(~wrong, -1).to(x.device)
            gap[rows] = lengths(points.double() - clean.double(), norm).masked_fill(~wrong, math.inf).to(x.device)
            tied[rows] = _ties(oracle, clean, points, logits, labels, within).cpu()
            lost[rows] = (seen & ~wrong).cpu()

        for rows in batches(len(x), batch_size, f"{method} {norm}", progress):
            oracle.in_batches(measure, rows)
    counts = oracle.counts(len(x), time.monotonic() - start)
    if lost.any():
        distrust(
            f"at {int(lost.sum())} of {len(x)} samples an error was found that not all passes of it confirm, alone, in "
            "sevens and in whole batches; none near it is confirmed either, and the distance is infinite there"
        )
    if tied.any():
        distrust(
            f"at {int(tied.sum())} of {len(x)} samples the error found is an exact tie, and still is one "
            f"{100 * _WIDE:.0f} % further on: the logits are saturated or coarsely rounded. A tie counts as an error, "
            "and here that decides the distance"
        )
    return Distances(x.detach(), y.to(x.device), norm, box, gap, x_adv, rival, counts)


def _confirmed(
    oracle: Oracle, x: Tensor, points: Tensor, y: Tensor, norm: str, box: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The points, moved on where need be until all passes misclassify them; whether they do, and whether any did.

    A point on the very boundary may fall on either side when it is evaluated in a batch of another size. Such a point
    goes on along its ray from the sample or, where that leads nowhere, up the margin; where that leads nowhere either,
    it is the sample. A sample that is wrong itself, if only by a tie, or whose logits are NaN, stays.
    """
    points, stays = points.clone(), (points == x).flatten(1).all(1)
    margins = _passes(oracle, points, y, len(y))
    seen = ~stays | ~(margins < 0).all(0)
    wrong = torch.where(stays, ~(margins < 0).any(0), _agreed(margins))
    for direction in (_outward, _uphill):
        rows = (~wrong & ~stays).nonzero()[:, 0]
        if len(rows):
            way = direction(oracle, x[rows], points[rows], y[rows], norm, box)
            points[rows], wrong[rows] = _moved_on(oracle, points[rows], way, y[rows], box, len(y))
    return points.where(wrong.view(-1, *[1] * (x.ndim - 1)), x), wrong, seen


def _passes(oracle: Oracle, points: Tensor, y: Tensor, whole: int) -> Tensor:
    """Margins (6, N) in passes of each point alone, in batches of three, of seven and in a whole one.

    It is the size of a batch that decides how sums are rounded, and in a small one the place within it: so each point
    comes near the front, the middle and the end of a seven. What the points do not fill is filled with some of them.
    """
    margins, count = [], len(y)
    for most, place in ((1, 0), (3, 0), (7, 0), (7, 2), (7, 4), (whole, 0)):
        size = min(most, oracle.batch_size)
        filled = -(-(count + place) // size) * size
        rows = (torch.arange(filled, device=y.device) - place) % count
        logits = torch.cat([oracle.logits(points[part]) for part in rows.split(size)])
        oracle.forward -= filled - count  # each point's pass is counted, and not whether others filled its batch
        oracle.checks += filled - count
        margins.append(margin(logits, y[rows])[place : place + count])
    return torch.stack(margins)


def _agreed(margins: Tensor) -> Tensor:
    """Whether a point is an error in every pass, and by as much as these differ: then other passes agree as well."""
    least, most = margins.aminmax(dim=0)
    return least >= most - least


def _outward(
    oracle: Oracle, x: Tensor, points: Tensor, y: Tensor, norm: str, box: tuple[float, float] | None
) -> Tensor:
    """From the sample to the point and as far again."""
    return points.double() - x.double()


def _uphill(oracle: Oracle, x: Tensor, points: Tensor, y: Tensor, norm: str, box: tuple[float, float] | None) -> Tensor:
    """Where the margin grows fastest, by no more than the distance from the sample."""
    model = Widened(oracle, points, box)
    gradient = free(model.gradient(model.x, y, margin)[1], model.x, box)
    return along(dual_maximiser(gradient, norm).double(), lengths(points.double() - x.double(), norm))


def _moved_on(
    oracle: Oracle, points: Tensor, way: Tensor, y: Tensor, box: tuple[float, float] | None, whole: int
) -> tuple[Tensor, Tensor]:
    """Points as little along the way as makes all passes agree, and whether any do.

    The first step is one unit in the last place, each next one is twice as long; then the last one is bisected.
    """
    unit = torch.finfo(points.dtype).eps
    right = torch.zeros(len(points), dtype=torch.float64, device=points.device)  # shares of the way
    wrong = torch.full_like(right, math.inf)
    while True:
        share = torch.where(wrong.isinf(), (2 * right).clamp(min=unit), (right + wrong) / 2)
        rows = ((share <= 1) & (wrong - right > _RESOLUTION)).nonzero()[:, 0]
        if not len(rows):
            break
        tried, share = _on(points[rows], way[rows], share[rows], box), share[rows]
        agreed = _agreed(_passes(oracle, tried, y[rows], whole))
        right[rows], wrong[rows] = right[rows].where(agreed, share), share.where(agreed, wrong[rows])
    found = wrong.isfinite()
    return _on(points, way, wrong.where(found, 0), box), found


def _on(points: Tensor, way: Tensor, share: Tensor, box: tuple[float, float] | None) -> Tensor:
    """A share of the way further, rounded."""
    return clamp((points.double() + along(way, share)).to(points.dtype), box)


def _ties(
    oracle: Oracle, x: Tensor, points: Tensor, logits: Tensor, y: Tensor, box: tuple[float, float] | None
) -> Tensor:
    """Where a point other than the sample is an error by an exact tie that lasts."""
    tied = (margin(logits, y) == 0) & (points != x).flatten(1).any(1)
    rows = tied.nonzero()[:, 0]
    if len(rows):
        share = torch.full((len(rows),), _WIDE, dtype=torch.float64, device=x.device)
        ahead = _on(points[rows], points[rows].double() - x[rows].double(), share, box)
        tied[rows] = margin(oracle.logits(ahead), y[rows]) == 0
    return tied


# To this share of a distance a boundary is bisected.
_RESOLUTION = 1e-3
# A tie at a point found is told of if it lasts over this share of the distance.
_WIDE = 0.05
