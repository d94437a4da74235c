"""Adversarial distributions: atoms and masses, what they cost to reach, and what they do to a model."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wda.checks import choice, stored_number, whole
from wda.errors import BudgetExceeded
from wda.files import naming, read_arrays, write_arrays
from wda.losses import get, margin
from wda.norms import bounds, norm
from wda.passes import Counts, Model, Oracle, batches, check_labels, check_sample, distrust
from wda.threat import Threat

__all__ = ["AdversarialDistribution"]

_log = logging.getLogger("wda")


@dataclass(frozen=True, eq=False)
class AdversarialDistribution:
    r"""A discrete distribution together with the coupling that carries the sample to it.

    Each of the N samples holds mass 1/N. Part of it moves to `moved` atoms, of which a sample may have none, one or
    several; the rest stays where it was (eqs. 10 and 16 of the first paper). Labels never change.

    Attributes
    ----------
    x : Tensor, shape (N, ...)
        The sample. Kept as it is given, not copied.
    labels : int64 Tensor, shape (N,)
        Its labels.
    threat : Threat
        The ball the distribution was made for.
    moved : Tensor, shape (M', ...)
        The moved atoms.
    moved_mass : float64 Tensor, shape (M',)
        Their masses; those from one sample add up to at most 1/N.
    moved_source : int64 Tensor, shape (M',)
        The sample each came from.
    counts : Counts
        What it cost to find.

    Examples
    --------
    >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
    >>> adv = AdversarialDistribution.from_points(x, x + 0.5, y, Threat("L2", eps=0.25), weight=0.5)
    >>> adv.mass, adv.transport_cost()
    (tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64), 0.25)
    """

    x: Tensor
    labels: Tensor
    threat: Threat
    moved: Tensor
    moved_mass: Tensor
    moved_source: Tensor
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def from_points(
        cls,
        x: Tensor,
        x_adv: Tensor,
        y: Tensor,
        threat: Threat,
        weight: float | Tensor = 1.0,
        counts: Counts | None = None,
    ) -> AdversarialDistribution:
        """The distribution that keeps ``(1 - weight_i)/N`` at ``x_i`` and moves ``weight_i/N`` to ``x_adv_i``.

        Anybody's attack can be brought here and audited. Nothing is projected: `audit` says whether it fits.

        Parameters
        ----------
        x, x_adv : Tensor, shape (N, ...)
        y : integer Tensor, shape (N,)
        threat : Threat
        weight : float or Tensor of shape (N,)
            In [0, 1]; 1 for a point-wise attack.
        counts : Counts, optional

        Raises
        ------
        ValueError, TypeError
            The sample is no sample in the box, shapes or dtypes differ, x_adv is not finite, or a weight is
            outside [0, 1].

        Examples
        --------
        In single precision x + 0.1 is not always within 0.1 of x. So an attack of one's own ends with an exact
        projection and a rounding towards x, onto a radius a hair below eps:

        >>> from wda.norms import project, round_inward
        >>> x, y = torch.rand(50, 1, 8, 8), torch.zeros(50, dtype=torch.int64)
        >>> x_adv = x + 0.1 * torch.randn_like(x).sign()
        >>> threat = Threat("Linf", eps=0.1)
        >>> radius = (1 - 1e-9) * threat.eps
        >>> x_adv = project(x_adv, x, radius, "Linf", threat.box)
        >>> x_adv = round_inward(x_adv, x, radius, "Linf")
        >>> AdversarialDistribution.from_points(x, x_adv, y, threat).audit() <= 0.1
        True
        """
        y = check_sample(x, y, threat.box).to(x.device)
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or x_adv.dtype != x.dtype:
            given = f"{tuple(x_adv.shape)} {x_adv.dtype}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
            raise ValueError(f"x_adv is {given}: a tensor like x, {tuple(x.shape)} {x.dtype}, is accepted")
        try:
            share = torch.as_tensor(weight, dtype=torch.float64, device=x.device).expand(len(x))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"weight={weight!r}: a number or {len(x)} numbers in [0, 1] are accepted") from error
        if not bool(((share >= 0) & (share <= 1)).all()):
            raise ValueError(f"weight={weight}: numbers in [0, 1] are accepted")
        mass = share / len(x)
        source = ((mass > 0) & (x_adv != x).flatten(1).any(1)).nonzero()[:, 0]
        return cls(x.detach(), y, threat, x_adv[source].detach(), mass[source], source, counts or Counts())

    def __post_init__(self) -> None:
        atoms, n = len(self.moved), len(self.x)
        if self.moved_mass.shape != (atoms,) or self.moved_source.shape != (atoms,) or self.labels.shape != (n,):
            raise ValueError(
                f"{atoms} moved atoms with masses {tuple(self.moved_mass.shape)} and sources "
                f"{tuple(self.moved_source.shape)}, {n} samples with labels "
                f"{tuple(self.labels.shape)}: one of each is needed"
            )
        if atoms and not 0 <= int(self.moved_source.min()) <= int(self.moved_source.max()) < n:
            raise ValueError(f"moved_source: numbers of samples, from 0 to {n - 1}, are accepted")
        if not self.moved.isfinite().all():
            bad = int((~self.moved.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"the atom moved from sample {int(self.moved_source[bad])} has NaN or infinite values")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.x)} samples, {len(self.moved)} moved atoms, {self.threat})"

    # -- atoms ---------------------------------------------------------------------------------------------------

    @cached_property
    def _stayed(self) -> Tensor:
        """The mass that each sample keeps, (N,)."""
        n = len(self.x)
        gone = torch.zeros(n, dtype=torch.float64, device=self.x.device)
        gone.index_add_(0, self.moved_source, self.moved_mass)
        return 1 / n - gone

    @cached_property
    def source(self) -> Tensor:
        """The sample each of the M atoms comes from, int64 (M,): first the moved atoms, then those that stay."""
        return torch.cat([self.moved_source, (self._stayed > 0).nonzero()[:, 0]])

    @property
    def points(self) -> Tensor:
        """The M atoms, (M, ...), in the dtype and on the device of the sample."""
        return torch.cat([self.moved, self.x[self._stayed > 0]])

    @property
    def mass(self) -> Tensor:
        """The mass of each atom, float64 (M,); they sum to 1."""
        return torch.cat([self.moved_mass, self._stayed[self._stayed > 0]])

    @property
    def y(self) -> Tensor:
        """The label of each atom, int64 (M,)."""
        return self.labels[self.source]

    @property
    def x_adv(self) -> Tensor:
        """Where each sample's moved atom is, (N, ...); the sample itself where nothing moved.

        Raises
        ------
        ValueError
            A sample has more than one moved atom: use `points`, `mass` and `source`.
        """
        self._check_single()
        return self.x.index_copy(0, self.moved_source, self.moved)

    @property
    def weight(self) -> Tensor:
        """The share of each sample's mass that moved, float64 (N,). Errors as for `x_adv`."""
        self._check_single()
        share = torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        return share.index_copy(0, self.moved_source, self.moved_mass * len(self.x))

    def _check_single(self) -> None:
        times = self.moved_source.bincount()
        if (times > 1).any():
            raise ValueError(
                f"sample {int(times.argmax())} has {int(times.max())} moved atoms: use points, mass and source"
            )

    # -- what it does to a model ---------------------------------------------------------------------------------

    def logits(self, model: Model, batch_size: int = 256) -> Tensor:
        """The model's logits at the M atoms, (M, K), on the CPU.

        Warns
        -----
        Untrustworthy
            Some are NaN or infinite: a row of NaN, which counts as misclassified.

        Examples
        --------
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=1.0))
        >>> adv.logits(torch.nn.Linear(1, 3)).shape
        torch.Size([2, 3])
        """
        whole("batch_size", batch_size)
        points, rows = self.points, batches(len(self.mass), batch_size, "evaluation", progress=False)
        with Oracle(model) as oracle:
            logits = torch.cat([oracle.logits(oracle.to_model(points[batch])).cpu() for batch in rows])
        check_labels(self.labels, logits.shape[1])
        broken = self.source.cpu()[logits.isnan().any(1)]
        if len(broken):
            distrust(
                f"the model has NaN or infinite logits at {len(broken)} of {len(logits)} atoms, the first from sample "
                f"{int(broken[0])}: they count as misclassified"
            )
        return logits

    def mean(self, values: Tensor) -> float:
        """The expectation of a quantity that has `values` (M,) at the atoms, summed exactly.

        Examples
        --------
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=1.0), weight=0.25)
        >>> adv.mean(adv.points[:, 0])
        0.25
        """
        return math.fsum((values.double().cpu() * self.mass.cpu()).tolist())

    def accuracy(self, model: Model, batch_size: int = 256) -> float:
        """The mass of the atoms that `model` classifies correctly, in [0, 1].

        An atom is correct if its label is strictly the largest logit; ties are errors.

        Examples
        --------
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=1.0), weight=0.25)
        >>> adv.accuracy(lambda x: torch.cat([torch.full_like(x, 0.5), x], dim=1))  # class 1 where x > 1/2
        0.5
        """
        return self.mean(margin(self.logits(model, batch_size), self.y.cpu()) < 0)

    def risk(self, model: Model, loss: str = "ce", batch_size: int = 256) -> float:
        """The expected loss; `loss` is one of "ce", "margin", "dlr", "redlr".

        Examples
        --------
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 0])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=1.0), weight=0.25)
        >>> adv.risk(lambda x: torch.cat([torch.full_like(x, 0.5), x], dim=1), "margin")  # x - 1/2 for the label 0
        -0.25
        """
        value = get(loss)
        return self.mean(value(self.logits(model, batch_size), self.y.cpu()))

    # -- what it costs -------------------------------------------------------------------------------------------

    def distances(self) -> Tensor:
        """How far each moved atom is from its sample in the threat's norm, float64 (M',).

        Examples
        --------
        >>> x, x_adv = torch.zeros(2, 2), torch.tensor([[0.3, 0.4], [0.0, 0.0]])
        >>> adv = AdversarialDistribution.from_points(x, x_adv, torch.tensor([0, 1]), Threat("L2", eps=1.0))
        >>> adv.distances()
        tensor([0.5000], dtype=torch.float64)
        """
        return norm(self.moved.double() - self.x[self.moved_source].double(), self.threat.norm)

    def transport_cost(self, order: float | None = None) -> float:
        r"""The cost of this very coupling, :math:`(\sum_m \mu_m d_m^p)^{1/p}`: an upper bound of :math:`W_p`.

        Parameters
        ----------
        order : float, optional
            p >= 1 or ``math.inf``; by default the threat's.

        Examples
        --------
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=1.0), weight=0.25)
        >>> adv.transport_cost(), adv.transport_cost(2), adv.transport_cost(math.inf)
        (0.25, 0.5, 1.0)
        """
        p = self._order(order)
        d = self.distances()
        # scaled by the largest distance, so that a high power neither overflows nor vanishes
        scale = float(d.max()) if len(d) else 0.0
        if math.isinf(p) or scale == 0:
            return scale
        terms = self.moved_mass * (d / scale) ** p
        if scale == math.inf or float(terms.max()) < _LEAST_TERM:
            cost = float(self._cost_in_digits(p))
        else:
            cost = scale * math.fsum(terms.tolist()) ** (1 / p)
        # what is moved costs more than nothing, be it less than any number
        return max(cost, 5e-324) if bool((self.moved_mass[d > 0] > 0).any()) else cost

    def _cost_in_digits(self, p: float) -> Decimal:
        """`transport_cost` with sixty digits and no limit to exponents; a mass of the float64 number 1/N is one Nth."""
        with localcontext(_DIGITS):
            whole, power = Decimal(1 / len(self.x)) * len(self.x), Decimal(p)
            pairs = zip(self.moved, self.x[self.moved_source], strict=True)
            d = [_distance_in_digits(*pair, self.threat.norm) for pair in pairs]
            scale = max(d, default=Decimal(0))
            if math.isinf(p) or not scale:
                return scale
            terms = (Decimal(m) * (a / scale) ** power for m, a in zip(self.moved_mass.tolist(), d, strict=True) if a)
            return scale * (sum(terms, Decimal(0)) / whole) ** (1 / power)

    def wasserstein(self, order: float | None = None) -> float:
        r"""The exact :math:`W_p` distance from the sample.

        Where no atom has a nearer sample of its label than its own, this coupling is the cheapest, which is seen
        without a solver and at any size. Otherwise it takes optimal transport (the package POT). Labels cannot change
        at a finite cost, and every label keeps its mass, so that splits into one transport problem per label; each
        takes some 100 bytes for each pair of a sample and an atom of the label. For p = infinity the smallest threshold
        is sought at which a transport plan of zero excess exists.

        What takes more than 1 GB is said before, in the log ``wda``; `wasserstein_bounds` does without.

        Parameters
        ----------
        order : float, optional
            p >= 1 or ``math.inf``; by default the threat's.

        Returns
        -------
        float
            The cost of the plan that was found, computed in float64; never more than `transport_cost`.

        Examples
        --------
        Two samples of one label that swap places cost nothing:

        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0])
        >>> adv = AdversarialDistribution.from_points(x, 1 - x, y, Threat("L2", eps=1.0))
        >>> adv.transport_cost(), adv.wasserstein()
        (1.0, 0.0)
        """
        from wda._transport import exact_cost, least_cost, memory

        p, cost = self._order(order), self.transport_cost(order)
        blocks = self._blocks()
        if least_cost(blocks, len(self.x), self.threat.norm, p) >= cost * (1 - _SUMMED):
            return cost
        needed = memory(blocks)
        if needed > _LARGE:
            _log.warning(
                "wasserstein: the exact distance of %d samples and %d atoms takes about %.1f GB of memory; "
                "wasserstein_bounds() encloses it in little",
                len(self.x),
                len(self.mass),
                needed / 1e9,
            )
        # this coupling is a plan too: where the solver's rounding makes its own dearer, the cheaper one counts
        return min(exact_cost(blocks, len(self.x), self.threat.norm, p), cost)

    def wasserstein_bounds(self, order: float | None = None) -> tuple[float, float]:
        r"""A lower and an upper bound of the :math:`W_p` distance from the sample, at any size.

        The upper one is `transport_cost`, the cost of this coupling. For the lower one every mass goes to the nearest
        point of its label on the other side, whatever else goes there. The two meet where moves are short beside the
        distances between samples. Memory grows with the number of points, time with that of pairs.

        Parameters
        ----------
        order : float, optional
            p >= 1 or ``math.inf``; by default the threat's.

        Returns
        -------
        lower, upper : float
            The lower one rounded down by a part in 10^12, for the rounding of sums.

        Examples
        --------
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0])
        >>> adv = AdversarialDistribution.from_points(x, 1 - x, y, Threat("L2", eps=1.0))
        >>> adv.wasserstein_bounds()
        (0.0, 1.0)
        """
        from wda._transport import least_cost

        cost = self.transport_cost(order)
        least = least_cost(self._blocks(), len(self.x), self.threat.norm, self._order(order))
        return min(least * (1 - _SUMMED), cost), cost

    def _blocks(self) -> list[tuple[Tensor, Tensor, np.ndarray]]:
        """Per label the sample's points, the atoms, and their masses, on the CPU in double precision."""
        points, mass, y = self.points, self.mass, self.y
        blocks = []
        for label in self.labels.unique():
            here, there = self.labels == label, y == label
            start = self.x[here].flatten(1).double().cpu()
            end = points[there].flatten(1).double().cpu()
            blocks.append((start, end, mass[there].cpu().numpy()))
        return blocks

    def audit(self, threat: Threat | None = None) -> float:
        """Check that the distribution lies in the ball, with no tolerance.

        A sum that float64 cannot tell from eps is taken again with sixty digits, and fifty of them count. For order
        infinity nothing is summed, and a distance is what `distances` says, the nearest number or one beside it.

        Checked are the box, that no sample gives away more than its mass, and that `transport_cost` is at most eps.
        The sides of the box are rounded to the dtype of the sample, as the sample's own coordinates are.
        The cost of the coupling is an upper bound of the distance, so a distribution that passes is in the ball.

        Parameters
        ----------
        threat : Threat, optional
            By default the one the distribution was made for.

        Returns
        -------
        float
            The transport cost, at most eps.

        Raises
        ------
        BudgetExceeded
            The message names the worst offender and the excess.

        Examples
        --------
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=0.5), weight=0.25)
        >>> adv.audit()
        0.25
        >>> adv.audit(Threat("L2", eps=0.5, order="inf"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        wda.errors.BudgetExceeded: transport cost 1.0 exceeds eps=0.5 of W_inf L2 0.5 by 0.5; ...
        """
        threat = self.threat if threat is None else threat
        if threat.norm != self.threat.norm:
            return replace(self, threat=threat).audit()
        self._audit_box(threat)
        self._audit_mass()
        cost = self.transport_cost(threat.order)
        excess = cost - threat.eps
        if abs(excess) <= _UNDECIDED * threat.eps and not (math.isinf(threat.order) and excess <= 0):
            with localcontext(_DIGITS):
                exact = self._cost_in_digits(threat.order) - Decimal(threat.eps)
                excess = float(exact) if exact > Decimal(threat.eps).scaleb(-50) else 0.0
        if not excess <= 0:
            d = self.distances()
            share = d if math.isinf(threat.order) else self.moved_mass * (d / d.max()) ** threat.order
            worst = int(share.nan_to_num(nan=math.inf).argmax())
            message = (
                f"transport cost {cost!r} exceeds eps={threat.eps!r} of {threat} by {excess:.3g}; "
                f"the most comes from sample {int(self.moved_source[worst])}, moved by {float(d[worst])!r} "
                f"with mass {float(self.moved_mass[worst])!r}"
            )
            if excess < _ROUNDING * threat.eps:
                message += f"; {_rounding_advice(threat)}"
            raise BudgetExceeded(message)
        return min(cost, threat.eps)

    def _audit_box(self, threat: Threat) -> None:
        if threat.box is None:
            return
        low, high = bounds(threat.box, self.x)
        points = self.points.flatten(1).double()
        excess = torch.maximum(low - points, points - high).amax(1)
        worst = int(excess.argmax())
        if excess[worst] > 0:
            raise BudgetExceeded(
                f"an atom from sample {int(self.source[worst])} leaves box={threat.box} by {float(excess[worst]):.3g}; "
                "wda.norms.clamp(x_adv, box) brings the points back"
            )

    def _audit_mass(self) -> None:
        if not (self.moved_mass >= 0).all():
            bad = int((~(self.moved_mass >= 0)).nonzero()[0])
            raise BudgetExceeded(
                f"the atom moved from sample {int(self.moved_source[bad])} has mass {float(self.moved_mass[bad])}"
            )
        worst = int(self._stayed.argmin())
        if self._stayed[worst] < 0:
            raise BudgetExceeded(
                f"sample {worst} gives away more than its mass 1/{len(self.x)}, by {-float(self._stayed[worst]):.3g}"
            )

    def _order(self, order: float | None) -> float:
        return self.threat.order if order is None else Threat(order=order).order

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one ``.npz`` file, atomically and without pickles.

        Examples
        --------
        >>> import tempfile
        >>> x, y = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> adv = AdversarialDistribution.from_points(x, x + 1, y, Threat("L2", eps=1.0), weight=0.25)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adv.save(f"{folder}/adv.npz")
        ...     AdversarialDistribution.load(f"{folder}/adv.npz")
        AdversarialDistribution(2 samples, 2 moved atoms, W_1 L2 1)
        """
        about = {
            "threat": self.threat.stored(),
            "counts": asdict(self.counts),
            "dtype": str(self.x.dtype).removeprefix("torch."),
        }
        arrays: dict[str, Any] = {name: _to_numpy(getattr(self, name)) for name in _ARRAYS}
        write_arrays(path, {"about": np.array(json.dumps(about)), **arrays}, np.savez_compressed)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdversarialDistribution:
        """Read what `save` wrote, onto the CPU, in the dtype it had, and check it whole.

        Whether the distribution is in a ball is for `audit` to say. The checksum in the file tells of damage, not of
        malice; files from before there were checksums are read too.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is not one that `save` wrote, or damaged; the message names it.

        Examples
        --------
        >>> adv = AdversarialDistribution.load("adv.npz")  # doctest: +SKIP
        """
        with naming(path, "saved AdversarialDistribution, written by adv.save()"):
            arrays = read_arrays(path, ("about", *_ARRAYS))
            about = json.loads(str(arrays.pop("about")))
            if about.keys() != {"threat", "counts", "dtype"}:
                raise ValueError(f"it holds {', '.join(map(repr, about))}: threat, counts and dtype are accepted")
            dtype = _DTYPES[choice("dtype", about["dtype"], _DTYPES)]
            _check_arrays(arrays, dtype)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            tensors |= {name: tensors[name].to(dtype) for name in ("x", "moved")}
            return cls(threat=Threat.of_stored(about["threat"]), counts=_counts(about["counts"]), **tensors)


_ARRAYS = ("x", "labels", "moved", "moved_mass", "moved_source")
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def _check_arrays(arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
    """Raise an error where arrays have not the shapes, dtypes and ranges of a distribution's."""
    x, mass = arrays["x"], arrays["moved_mass"]
    n, atoms = len(x), len(arrays["moved"])
    points = _to_numpy(torch.empty(0, dtype=dtype)).dtype
    for name, kind, shape in (
        ("x", points, x.shape),
        ("labels", np.dtype(np.int64), (n,)),
        ("moved", points, (atoms, *x.shape[1:])),
        ("moved_mass", np.dtype(np.float64), (atoms,)),
        ("moved_source", np.dtype(np.int64), (atoms,)),
    ):
        if (held := arrays[name]).dtype != kind or held.shape != shape:
            raise ValueError(f"{name} is {held.shape} {held.dtype}: {shape} {kind} is accepted")
    if not np.isfinite(x).all():
        raise ValueError("x has NaN or infinite values")
    if (arrays["labels"] < 0).any():
        raise ValueError("labels: integers >= 0 are accepted")
    if not ((mass >= 0) & (mass <= 1)).all():
        raise ValueError("moved_mass: numbers from 0 to 1 are accepted")


def _counts(held: Mapping[str, Any]) -> Counts:
    """What a distribution cost, as a file holds it; the batch was not kept at first."""
    counts = Counts(**held)
    for name in {"forward", "backward", "vanished", "seconds"} | (held.keys() - {"batch"}):
        stored_number(f"counts: {name}", held[name])
    if counts.batch is not None:
        whole("counts: batch", counts.batch)
    return counts


# A sum of float64 numbers is off by less than this share of it. Attacks stay further inside.
_UNDECIDED = 2.0**-41
# What is lost where terms below the least normal number are added to one of this size does not count.
_LEAST_TERM = 2.0**-960
_DIGITS = Context(prec=60, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])


def _distance_in_digits(one: Tensor, other: Tensor, norm: str) -> Decimal:
    """The distance of two points, rounded to the context's digits."""
    pairs = zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
    gaps = [abs(Decimal(a) - Decimal(b)) for a, b in pairs if a != b]
    if norm == "Linf":
        return max(gaps, default=Decimal(0))
    return sum(gaps, Decimal(0)) if norm == "L1" else sum((gap * gap for gap in gaps), Decimal(0)).sqrt()


# what a solver takes beyond this is said before
_LARGE = 10**9

# the rounding of a sum of distances in double precision, as a share of it, with room
_SUMMED = 1e-12

# An excess below this share of eps is said to be rounding: single precision makes less of images in [0, 1].
_ROUNDING = 1e-5


def _rounding_advice(threat: Threat) -> str:
    name = repr(threat.norm)
    return (
        "this is rounding: use "
        f"wda.norms.round_inward(wda.norms.project(x_adv, x, R, {name}, {threat.box}), x, R, {name}) "
        "with R = (1 - 1e-9) * eps, or kappa times that where each sample moves the share kappa**-order of its mass"
    )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """A NumPy array of the tensor; NumPy knows no bfloat16, whose values float32 holds exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
