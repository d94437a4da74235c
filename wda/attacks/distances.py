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
from wda.attacks.wda_plus_plus import wda_plus_plus
from wda.budget import allocate, robust_accuracy
from wda.checks import choice, interval, whole
from wda.distribution import AdversarialDistribution
from wda.inspection import inspected
from wda.losses import margin, rival_logits
from wda.norms import clamp, exponent
from wda.norms import norm as lengths
from wda.passes import Counts, Model, Oracle, batches, check_sample
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

    Every point that is returned was classified anew, by a forward pass of its own. One set of distances serves all
    budgets and all orders.

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
        The model is random, or its logits depend on the other samples of a batch; it has NaN logits; or many
        gradients are zero.

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
    y = check_sample(x, y, box)
    if "seed" in known:
        parameters["seed"] = seed

    start = time.monotonic()
    x_adv, gap = x.detach().clone(), torch.empty(len(x), dtype=torch.float64, device=x.device)
    rival = torch.full_like(y, -1)
    with Oracle(model, batch_size, autocast) as oracle, inspected(oracle, x, y, x_adv):

        def measure(rows: slice) -> None:
            clean = oracle.to_model(x[rows]).detach()
            labels = y[rows].to(clean.device)
            points = clamp(search(oracle, clean, labels, norm, box, **parameters), box)
            points, wrong, winner = _verified(oracle, clean, points, labels, box)
            x_adv[rows], rival[rows] = points.to(x.device), winner.to(x.device)
            gap[rows] = lengths(points.double() - clean.double(), norm).masked_fill(~wrong, math.inf).to(x.device)

        for rows in batches(len(x), batch_size, f"{method} {norm}", progress):
            oracle.in_batches(measure, rows)
    counts = oracle.counts(len(x), time.monotonic() - start)
    return Distances(x.detach(), y.to(x.device), norm, box, gap, x_adv, rival, counts)


def _verified(
    oracle: Oracle, x: Tensor, points: Tensor, y: Tensor, box: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The points that a fresh pass finds misclassified, whether one was found, and the class that wins there.

    A point on the very boundary may fall on either side when it is evaluated again in a batch of another size. So it
    should be wrong by more than rounding: one that is not is tried a little further along its ray, in steps that grow
    fourfold from a few units in the last place. A sample that is wrong itself, if only by a tie, or whose logits are
    NaN, stays.
    """
    points, logits = points.clone(), oracle.logits(points)
    stays = (points == x).flatten(1).all(1)
    wrong = torch.where(stays, ~(margin(logits, y) < 0), margin(logits, y) >= 0)
    firm = stays | _firmly_wrong(logits, y)
    unit = 16 * torch.finfo(x.dtype).eps
    for k in range(_PUSHES):
        rows = (~firm).nonzero()[:, 0]
        if not len(rows):
            break
        longer = clamp(points[rows] + unit * 4**k * (points[rows] - x[rows]), box)
        found = oracle.logits(longer)
        better = _firmly_wrong(found, y[rows])
        rows, longer, found = rows[better], longer[better], found[better]
        points[rows], logits[rows], wrong[rows], firm[rows] = longer, found, True, True
    winner = rival_logits(logits, y).argmax(1).masked_fill(~wrong, -1)
    return torch.where(wrong.view(-1, *[1] * (x.ndim - 1)), points, x), wrong, winner


def _firmly_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the margin exceeds what rounding makes of logits of this size."""
    return margin(logits, y) > 64 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)


_PUSHES = 10
