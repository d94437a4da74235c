r"""Robust accuracy, and the margin risk, over a whole W_p ball from both sides: an attack and a certificate.

Both sides spend the same budget in the optimal way (`wda.allocate`), which is monotone in the distances: those at
which an attack succeeded bound the accuracy from above, certified radii from below.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wda.attacks import Distances, attack, distances
from wda.budget import robust_accuracy, spend
from wda.certificates.nearest import Nearest
from wda.certificates.radius import LEAST, METHODS, by_programs, margin_bound, radius, read, verified
from wda.certificates.slope import agree
from wda.checks import choice, number, stored_number, stored_numbers, whole
from wda.errors import NotPiecewiseAffine
from wda.files import naming, read_json, write_json
from wda.inspection import tell_reach
from wda.losses import margin, rival_logits
from wda.nets import Net, check_reading
from wda.norms import bounds, rounded
from wda.norms import norm as lengths
from wda.passes import Counts, Model, check_sample
from wda.threat import Threat

__all__ = ["Bracket", "RiskBracket", "bracket", "risk_bracket"]

Budgets = float | str | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Bracket:
    r"""Robust accuracy over a W_p ball, between a certified lower bound and what an attack leaves.

    Attributes
    ----------
    threat : Threat
        The ball that `lower` and `upper` are for.
    radius : float64 Tensor, shape (N,)
        Certified: no error is within this distance; 0 where the sample is misclassified. See `certificates.radius`.
    distance : float64 Tensor, shape (N,)
        At which errors were found; infinite where none was.
    distances : Distances or None
        The errors themselves.
    why : str or None
        Why there is no certificate, where there is none: the layer that stands in its way.
    seconds : (float, float)
        What the attack and the certificate took.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=20)
    >>> b = bracket(wda.models.load("digits-mlp"), x, y, Threat("Linf", eps=0.05))
    >>> 0 <= b.lower <= b.upper <= 1
    True
    >>> lower, upper = b.curve([0.01, 0.02, 0.05], order=2)
    >>> bool((lower <= upper).all())
    True
    """

    threat: Threat
    radius: Tensor
    distance: Tensor
    distances: Distances | None = None
    why: str | None = None
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def lower(self) -> float:
        """A certified lower bound of the accuracy under every distribution in the ball."""
        return float(self.curve(self.threat.eps)[0])

    @property
    def upper(self) -> float:
        """The accuracy under a distribution in the ball, ``distances.distribution(threat)``."""
        return float(self.curve(self.threat.eps)[1])

    @property
    def exact(self) -> Tensor:
        """The samples whose distance is known, bool (N,): attack and certificate meet, to a relative 1e-5."""
        known: Tensor = agree(self.radius, self.distance)
        return known

    def curve(self, eps: Budgets, order: float | str | None = None) -> tuple[Tensor, Tensor]:
        """The bracket in balls of other radii, and of another order if one is given.

        Parameters
        ----------
        eps : float, str, sequence or Tensor
            As for `wda.robust_accuracy`.
        order : float, optional
            By default that of the threat.

        Returns
        -------
        lower, upper : float64 tensors, of the shape of `eps`
        """
        p = self.threat.order if order is None else order
        return (
            _certified_accuracy(self.radius, eps, p),
            robust_accuracy(self.distance, eps, p),
        )

    def population(
        self,
        eps: Budgets | None = None,
        order: float | str | None = None,
        confidence: float = 0.95,
    ) -> tuple[Tensor, Tensor]:
        r"""An interval for the robust accuracy around the distribution that the sample is drawn from.

        The robust accuracy is a monotone function of the distribution of the distances. Its distribution function is
        within :math:`\delta=\sqrt{\ln(2/\alpha)/(2N)}` of the empirical one with probability :math:`1-\alpha`
        (Dvoretzky, Kiefer & Wolfowitz 1956; the constant is Massart's, 1990). So a share :math:`\delta` of the
        certified radii, the largest, is set to 0 for the lower end, and of the attack's distances, the smallest, to
        infinity for the upper end. The interval holds for all radii and orders at once.

        Parameters
        ----------
        eps : float, str, sequence or Tensor, optional
            By default that of the threat.
        order : float, optional
        confidence : float
            :math:`1-\alpha`, between 0 and 1.

        Returns
        -------
        lower, upper : float64 tensors, of the shape of `eps`

        Examples
        --------
        >>> distance = torch.linspace(0.01, 1, 100, dtype=torch.float64)
        >>> lower, upper = Bracket(Threat("Linf", eps=0.2, order="inf"), distance, distance).population()
        >>> round(float(lower), 2), round(float(upper), 2)
        (0.67, 0.94)
        """
        level = number("confidence", confidence, "a number between 0 and 1", 1e-9, 1 - 1e-9)
        N = len(self.radius)
        delta = math.sqrt(math.log(2 / (1 - level)) / (2 * N))
        moved = min(N, math.ceil(delta * N))
        worst, best = self.radius.clone(), self.distance.clone()
        worst[worst.argsort(descending=True)[:moved]] = 0
        best[best.argsort()[:moved]] = math.inf
        return replace(self, radius=worst, distance=best).curve(self.threat.eps if eps is None else eps, order)

    def save(self, path: str | os.PathLike[str], **about: object) -> None:
        """Write both sides, without the points, as a record in JSON, atomically.

        Parameters
        ----------
        path : path
        **about
            What else to say in the record, such as the model and where the figures are from.

        Examples
        --------
        >>> import tempfile, wda
        >>> x, y = wda.data.load("digits", n=4)
        >>> b = bracket(wda.models.load("digits-mlp"), x, y, Threat("Linf", eps=0.05))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     b.save(folder + "/b.json", model="digits-mlp")
        ...     Bracket.load(folder + "/b.json").lower == b.lower
        True
        """
        sides = {name: [d if d < math.inf else None for d in getattr(self, name).tolist()] for name in _SIDES}
        record = {
            **about,
            "threat": self.threat.stored(),
            "n": len(self.radius),
            "lower": self.lower,
            "upper": self.upper,
            "exact": int(self.exact.sum()),
            "why": self.why,
            "seconds": list(self.seconds),
            **sides,
        }
        write_json(path, record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bracket:
        """Read what `save` wrote, and check it whole; `distances` is None.

        Both sides are computed anew from the radii and the distances. The checksum in the file tells of damage, not of
        malice; files from before there were checksums are read too.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is not one that `save` wrote, or damaged; the message names it.

        Examples
        --------
        >>> Bracket.load("bracket.json")  # doctest: +SKIP
        """
        with naming(path, "saved Bracket, written by Bracket.save()"):
            record = read_json(path)
            n = whole("n", record["n"])
            for name in _SIDES:
                stored_numbers(name, record[name], n, missing=True)
            stored_numbers("seconds", record["seconds"], 2)
            stored_numbers("exact", [record["exact"]], 1, 0, n, int)
            if not isinstance(record["why"], str | None):
                raise ValueError(f"why={record['why']!r}: text, or null, is accepted")
            sides = ([math.inf if d is None else d for d in record[name]] for name in _SIDES)
            lower, upper = (torch.tensor(side, dtype=torch.float64) for side in sides)
            if bool((lower > upper * (1 + _SOLVED)).any()):
                raise ValueError("a certified radius is beyond the distance at which an error was found")
            found = cls(Threat.of_stored(record["threat"]), lower, upper, None, record["why"], tuple(record["seconds"]))
            for name in ("lower", "upper"):
                stored_number(name, record[name], 0, 1)
                if abs(record[name] - getattr(found, name)) > _STORED:
                    raise ValueError(
                        f"{name}={record[name]!r}, and {getattr(found, name)!r} follows from its distances"
                    )
            return found


_STORED = 1e-9  # what the arithmetic of another machine can do to an accuracy
_SOLVED = 1e-5  # by which a solver's radius may be beyond a distance
_SIDES = ("radius", "distance")


def _budgets(eps: Budgets) -> Tensor:
    """Radii of balls, one of which may be a fraction, in float64."""
    accepted = 'a finite number >= 0, or a fraction such as "8/255",'
    value = number("eps", eps, accepted, 0, sys.float_info.max) if isinstance(eps, str) else eps
    return torch.as_tensor(value, dtype=torch.float64)


def _certified_accuracy(radius: Tensor, eps: Budgets, order: float | str) -> Tensor:
    """The optimal budget over certified radii: errors are beyond them, and sums of powers are rounded upward."""
    beyond = torch.nextafter(radius, torch.full_like(radius, math.inf)).where(radius > 0, 0.0)
    budgets = _budgets(eps)
    spare = 0.0 if math.isinf(Threat(order=order).order) else 2.0**-40 + 2.0**-52 * len(radius)
    return robust_accuracy(beyond, budgets * (1 + spare), order)


def bracket(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    method: str = "auto",
    tolerance: float = 0.01,
    refine: float = math.inf,
    time_limit: float = 60.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool | None = None,
    **parameters: object,
) -> Bracket:
    r"""Bound the least accuracy over a W_p ball from both sides.

    .. math:: A(r) \le \inf_{W_p(Q,P_N)\le\epsilon} \mathrm{acc}(Q) = A(d) \le A(\hat d), \qquad
              A(d) = 1-\max_{w\in[0,1]^N}\Big\{\tfrac1N\sum_iw_i : \tfrac1N\sum_iw_id_i^p\le\epsilon^p\Big\},

    with :math:`d_i` the distance of sample i to the nearest error, :math:`r_i \le d_i` a certified radius
    (`wda.certificates.radius`) and :math:`\hat d_i \ge d_i` the distance at which the attack "closest" succeeded.
    One pair of sets serves every radius and every order (`Bracket.curve`).

    Parameters
    ----------
    model : nn.Module or callable
        Runs in evaluation mode; `wda.nets.from_module` says of which layers it may be made. With others, and for any
        other callable, the upper side is given all the same, and `Bracket.why` says why the lower one is not.
    x : Tensor, shape (N, ...)
        Within the threat's box, in the model's dtype.
    y : integer Tensor, shape (N,)
    threat : Threat
        For order infinity, radii that come near its `eps` are tried there.
    method : str
        Of the certificate, as for `wda.certificates.radius`. "milp" gives the attack's side too.
    tolerance, refine, time_limit
        As for `wda.certificates.radius`.
    seed, batch_size, progress
        As for `wda.distances`.
    **parameters
        Options of "closest".

    Returns
    -------
    Bracket
        Both sides are about the function that the weights define, in float64: errors found in another precision are
        verified, and those that do not hold are searched anew.

    Raises
    ------
    ValueError, TypeError
        A bad argument, or a weight that is NaN or infinite; or, at an error found, the network that was read differs
        from the model by more than rounding.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=10)
    >>> bracket(wda.models.load("digits-mlp"), x, y, Threat("Linf", eps=0.05, order=2), steps=10).why is None
    True
    """
    choice("method", method, METHODS)
    number("tolerance", tolerance, "a number between 0 and 1", 1e-9, 1)
    if method == "milp":
        choice("norm", threat.norm, ("Linf", "L1"))
    start = time.monotonic()
    options = {"seed": seed, "batch_size": batch_size, "progress": progress, **parameters}
    check_sample(x, y, threat.box)
    net = _readable(model, x)
    found = distances(model, x, y, threat.norm, threat.box, **options)  # type: ignore[arg-type]
    tell_reach(threat, x)
    if (box := rounded(threat.box, x)) != threat.box:  # what follows is in float64, and its box is still that of x
        threat, found = replace(threat, box=box), replace(found, box=box)
    if isinstance(net, str):
        return _from_above(threat, found, net)
    try:
        found = _confirmed(found, net, model, options)
        middle = time.monotonic()
        sample = (net, found.x, found.y, found.norm, found.box)
        search: dict[str, Any] = {"tolerance": tolerance, "refine": refine, "progress": progress}
        if method == "milp":
            exact = by_programs(*sample, time_limit=time_limit, upper=found.distance, x_adv=found.x_adv, **search)
            check_reading(net, model, exact.x_adv)
            certified, found = exact.lower, _nearer(found, exact, net)
        else:
            certified = radius(*sample, method=method, upper=found.distance, **search)
        if math.isinf(threat.order):
            certified = _at_eps(net, found, certified, threat, method, tolerance, refine)
    except NotPiecewiseAffine as error:
        return _from_above(threat, found, str(error))
    # an error that is one by less than rounding may be nearer than what a solver certifies
    certified = certified.minimum(found.distance)
    return Bracket(threat, certified, found.distance, found, None, (middle - start, time.monotonic() - middle))


def _readable(model: Model, x: Tensor) -> Net | str:
    """The network, or why it cannot be read."""
    if callable(model) and not isinstance(model, nn.Module | Net):
        return f"{getattr(model, '__name__', type(model).__name__)}: only the layers of a torch.nn.Module can be read"
    try:
        return read(model, x)  # what is neither is named there
    except NotPiecewiseAffine as error:
        return str(error)


def _from_above(threat: Threat, found: Distances, why: str) -> Bracket:
    """The attack's side alone: all that is known of a sample that is right is that it is."""
    least = (found.distance > 0).double() * LEAST
    return Bracket(threat, least, found.distance, found, why, (found.counts.seconds, 0.0))


def _confirmed(found: Distances, net: Net, model: Model, options: dict[str, object]) -> Distances:
    """The distances of the network in float64: errors that are none there are searched anew.

    An error that the model itself makes in float64, and the network read does not, is one of the reading, and raised.
    """
    x, x_adv = found.x.double(), found.x_adv.double()
    reached = found.distance.isfinite()
    check_reading(net, model, x_adv)
    wrong = margin(_logits(net, x_adv), found.y.to(net.like.device)).cpu() >= 0
    distance, rival, counts = found.distance.clone(), found.rival.clone(), found.counts
    again = (reached.cpu() & ~wrong).nonzero()[:, 0].to(x.device)
    if len(again):
        anew = distances(net, x[again], found.y[again], found.norm, found.box, **options)  # type: ignore[arg-type]
        check_reading(net, model, anew.x_adv)
        x_adv[again], distance[again], rival[again] = anew.x_adv, anew.distance, anew.rival
        share = len(again) / len(x)
        counts = Counts(
            counts.forward + share * anew.counts.forward,
            counts.backward + share * anew.counts.backward,
            counts.vanished,
            counts.seconds + anew.counts.seconds,
            checks=counts.checks + share * anew.counts.checks,
        )
    return Distances(x, found.y, found.norm, found.box, distance, x_adv, rival, counts)


def _logits(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part) for part in x.to(net.like).split(64)])


def _nearer(found: Distances, exact: Nearest, net: Net) -> Distances:
    """The witnesses of the mixed-integer programs where they are nearer."""
    better = exact.upper < found.distance
    distance = torch.where(better, exact.upper, found.distance)
    x_adv = exact.x_adv.where(better.view(-1, *[1] * (found.x.ndim - 1)), found.x_adv)
    winner = rival_logits(_logits(net, x_adv), found.y.to(net.like.device)).argmax(1).to(found.rival.device)
    return replace(found, distance=distance, x_adv=x_adv, rival=torch.where(better, winner, found.rival))


def _at_eps(
    net: Net, found: Distances, certified: Tensor, threat: Threat, method: str, tolerance: float, refine: float
) -> Tensor:
    """Radii that the search left just below eps are raised to it where that is certified too."""
    if method in ("lipschitz", "milp"):
        return certified
    near = (certified < threat.eps) & (certified > (1 - 2 * tolerance) * threat.eps) & (found.distance > threat.eps)
    rows = near.nonzero()[:, 0]
    if len(rows):
        holds = verified(
            net, found.x[rows], found.y[rows], threat.norm, threat.eps, threat.box, method=method, refine=refine
        )
        certified[rows[holds]] = threat.eps
    return certified


@dataclass(frozen=True, eq=False)
class RiskBracket:
    r"""The worst-case margin risk over a W_p ball, between an attack and a certificate.

    Attributes
    ----------
    threat : Threat
    clean : float
        The margin risk of the sample itself.
    lower, upper : float
        Attained by a distribution in the ball; certified.
    radii : float64 Tensor, shape (R,)
        0 first; those that the curves are known at.
    attacked, certified : float64 Tensor, shape (N, R)
        The largest margins found within each radius, and bounds that no margin there exceeds.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=5)
    >>> b = risk_bracket(wda.models.load("digits-mlp"), x, y, Threat("Linf", eps=0.05), count=4)
    >>> b.clean <= b.lower <= b.upper
    True
    """

    threat: Threat
    clean: float
    lower: float
    upper: float
    radii: Tensor
    attacked: Tensor
    certified: Tensor

    def curve(self, eps: Budgets, order: float | str | None = None) -> tuple[Tensor, Tensor]:
        """The bracket in balls of other radii, and of another order if one is given; as for `Bracket.curve`.

        Examples
        --------
        >>> radii, known = torch.tensor([0.0, 1.0]), torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
        >>> lower, upper = RiskBracket(Threat("L2", eps=0.5), -1.0, 0.0, 1.0, radii, known, known).curve([0.25, 0.4])
        >>> lower.round(decimals=6).tolist(), upper.tolist()
        ([-0.5, -0.2], [1.0, 1.0])
        """
        p, budgets = self.threat.order if order is None else order, _budgets(eps)
        balls = [_ball(self.threat, e, p) for e in budgets.flatten().tolist()]
        pairs = [_risks(self.radii, self.attacked, self.certified, ball) for ball in balls]
        lower, upper = budgets.new_tensor(pairs).view(*budgets.shape, 2).unbind(-1)
        return lower, upper


def risk_bracket(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    count: int = 12,
    steps: int = 40,
    method: str = "auto",
    refine: float = math.inf,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool | None = None,
) -> RiskBracket:
    r"""Bound the worst-case margin risk :math:`\sup_{W_p(Q,P_N)\le\epsilon} E_Q[\max_{j\ne k}z_j-z_k]` from both sides.

    The risk is what the best spending (`wda.budget.spend`) makes of the radius curves
    :math:`\phi_i(t)`, the largest margin within t of sample i, and it is monotone in them. On a grid of radii
    :math:`t_0=0<t_1<\dots<t_R`, the last of which reaches every corner of the box, an attack gives
    :math:`\phi_i(t_j)` from below, and linear bounds give it from above. Between two radii a curve is at most what is
    certified at the larger one: that value counts at the smaller one's cost.

    Parameters
    ----------
    model : nn.Module
        Of the layers that `wda.nets.from_module` reads.
    x, y : Tensor
        As for `bracket`.
    threat : Threat
        With a box: in an unbounded space no finite grid bounds the risk.
    count : int
        Radii of the grid, R: from eps / 16 to the farthest corner, in equal ratios, with eps itself.
    steps : int
        Of the attack at each radius ("pgd" on the margin).
    method, refine
        Of the certificate, as for `wda.certificates.verified`.
    seed, batch_size, progress
        As for `wda.attack`.

    Returns
    -------
    RiskBracket

    Raises
    ------
    NotPiecewiseAffine
        Names a layer through which no bound is propagated.
    ValueError, TypeError
        A bad argument; a threat without a box.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", n=5)
    >>> model = wda.models.load("digits-cnn-adv")
    >>> b = risk_bracket(model, x, y, Threat("Linf", eps=0.02, order=2), count=4, steps=10)
    >>> b.radii.shape, b.attacked.shape
    (torch.Size([5]), torch.Size([5, 5]))
    """
    if threat.box is None:
        raise ValueError("threat has box=None: a box (low, high) is accepted, its farthest corner ends the grid")
    check_sample(x, y, threat.box)
    net = read(model, x)
    radii = _grid(x, threat, whole("count", count, 2))
    attacked = torch.empty(len(x), len(radii), dtype=torch.float64)
    attacked[:, 0] = margin(_logits(net, x), y.to(net.like.device)).cpu()
    for j, reach in enumerate(radii.tolist()[1:], 1):
        ball = _ball(threat, reach)
        options = {"loss": "margin", "steps": steps, "seed": seed, "batch_size": batch_size, "progress": progress}
        adv = attack("pgd", model, x, y, ball, **options)  # type: ignore[arg-type]
        check_reading(net, model, adv.x_adv)
        value = margin(_logits(net, adv.x_adv), y.to(net.like.device)).cpu()
        attacked[:, j] = attacked[:, j - 1].maximum(value)
    certified = margin_bound(
        net, x, y, threat.norm, radii, threat.box, method=method, refine=refine, progress=progress
    ).cpu()
    certified[:, 0] = attacked[:, 0]
    lower, upper = _risks(radii, attacked, certified, threat)
    return RiskBracket(threat, float(attacked[:, 0].mean()), lower, upper, radii, attacked, certified)


def _ball(threat: Threat, eps: float, order: float | str = math.inf) -> Threat:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the largest balls hold all of the box, on purpose
        return Threat(threat.norm, eps, order, threat.box)


def _grid(x: Tensor, threat: Threat, count: int) -> Tensor:
    """0, and radii in equal ratios up to the farthest corner of the box; eps among them."""
    assert threat.box is not None
    low, high = bounds(threat.box, x)
    away = torch.maximum(x.double() - low, high.double() - x.double())
    reach = float(lengths(away, threat.norm).max()) * (1 + 1e-9)
    first = min(threat.eps, reach) / 16 or reach / 1000
    radii = torch.logspace(math.log10(first), math.log10(reach), count, dtype=torch.float64)
    radii[-1] = reach
    if 0 < threat.eps < reach:
        radii[(radii[:-1] - threat.eps).abs().argmin()] = threat.eps
    return torch.cat([torch.zeros(1, dtype=torch.float64), radii.sort().values])


def _risks(radii: Tensor, attacked: Tensor, certified: Tensor, threat: Threat) -> tuple[float, float]:
    """What the best spending makes of both curves."""
    t = radii.expand_as(attacked)
    lower = (spend(t, attacked, threat) * attacked).sum(1).mean()
    if math.isinf(threat.order):
        above = certified[:, min(int((radii < threat.eps).sum()), len(radii) - 1)]
        return float(lower), float(above.mean())
    wider = _ball(threat, threat.eps * (1 + 2.0**-39 + 2.0**-51 * t.numel()), threat.order)
    beyond = torch.cat([certified[:, 1:], certified[:, -1:]], 1) if threat.eps > 0 else certified
    upper = (spend(t, beyond, wider) * beyond).sum(1).mean()
    return float(lower), float(upper)
