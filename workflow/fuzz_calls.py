"""Call the public functions with extreme numbers: none may fail in its own way, give NaN, or let a ball be left.

    python workflow/fuzz_calls.py              # so many calls of each kind, and a record in data/results/fuzz
    python workflow/fuzz_calls.py --calls 50   # fewer of each

Each call is drawn from its own seed. What may be raised is a `ValueError` or `TypeError` (`BudgetExceeded` is one) that
names an argument. What an audit says is compared with rational arithmetic, both ways.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wda
from wda import AdversarialDistribution, BudgetExceeded, Threat, losses, norms
from wda.experiment import provenance
from wda.files import write_atomically

RECORD = Path(__file__).parents[1] / "data" / "results" / "fuzz" / "calls.json"
NORMS = ("Linf", "L2", "L1")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = (0.0, 5e-324, 2.3e-308, 1e-300, 1e-170, 1e-45, 6e-8, 1e-3, 8 / 255, 0.5, 1.0)
SIZES = (*SIZES, 255.0, 65504.0, 1e30, 1e160, 1e300, sys.float_info.max)
ODD = (math.inf, -math.inf, math.nan, -1.0, "8/255", "inf", "1/0", "much", "1e400", None, True, 10**400)
ORDERS = (1, 1.0, 1.5, 2, 3, 50, 1000, 1e300, math.inf, "inf", "3/2")
BOXES = ((0.0, 1.0), None, (0.0, 1e-3), (-1.0, 1e-300), (0.0, 5e-324), (1 / 3, 0.34), (-1e30, 1e30))
WRONG = ((-1e308, 1e308), (1, 0), (0, math.nan), (0.0,), "01")
RAISED = (ValueError, TypeError, BudgetExceeded)


class Draw(random.Random):
    """Random arguments."""

    def size(self) -> float:
        return self.choice(SIZES)

    def any_number(self) -> Any:
        drawn = self.choice((*SIZES, *ODD))
        return torch.tensor(drawn, dtype=torch.float64) if isinstance(drawn, float) and self.random() < 0.1 else drawn

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, sizes: tuple[float, ...] = SIZES) -> Tensor:
        """Finite numbers of one size, or each of its own."""
        same, n = self.choice(sizes), math.prod(shape)
        values = [self.choice((-1, 1)) * (same if self.random() < 0.7 else self.choice(sizes)) for _ in range(n)]
        factors = [self.choice((1.0, self.random())) for _ in values]
        made = torch.tensor([a * b for a, b in zip(values, factors, strict=True)], dtype=torch.float64)
        dtype = dtype or self.choice(DTYPES)
        return made.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).view(shape)

    def ball(self) -> Threat:
        return Threat(self.choice(NORMS), self.any_number(), self.choice(ORDERS), self.choice((*BOXES, *BOXES, *WRONG)))

    def sample(self, box: tuple[float, float] | None) -> Tensor:
        """Points that mostly lie in the box, at its sides too."""
        x = self.tensor(3, 4)
        return x if box is None or self.random() < 0.1 else norms.clamp(x, box)


def model(draw: Draw, dtype: torch.dtype) -> nn.Module:
    """A small network of some size, and of the sample's dtype."""
    torch.manual_seed(draw.randrange(1000))
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        net[2].weight *= draw.choice((1, 1, 1, 0, 1e-6, 1e6))
    return net


# -- the calls -------------------------------------------------------------------------------------------------------


def a_threat(draw: Draw) -> object:
    return str(draw.ball())


def a_norm(draw: Draw) -> object:
    v, name = draw.tensor(3, 4), draw.choice(NORMS)
    lengths = norms.norm(v, name)
    limit = torch.finfo(v.dtype)
    for found, row in zip(lengths.tolist(), v.tolist(), strict=True):
        true = rooted(length(row, [0.0] * len(row), name), name)[0]
        if true < Fraction(limit.max) * (1 - Fraction(limit.eps)):
            spare = 8 * Fraction(limit.eps) * true + Fraction(limit.smallest_normal * limit.eps)
            assert abs(Fraction(found) - true) <= spare, (row, found)
    return lengths


def a_direction(draw: Draw) -> object:
    return norms.dual_maximiser(draw.tensor(3, 4), draw.choice(NORMS))


def a_projection(draw: Draw) -> object:
    box, name = draw.choice(BOXES), draw.choice(NORMS)
    x = draw.sample(box)
    if x.abs().max() > 1e150 or (x.dtype != torch.float64 and x.abs().max() > torch.finfo(x.dtype).max / 4):
        x = x / x.abs().max()
    points, radius = (
        x + draw.tensor(3, 4, dtype=x.dtype).clamp(-1e4, 1e4),
        draw.choice((draw.size(), draw.any_number())),
    )
    radius = radius if isinstance(radius, float | Tensor) else 1.0
    xi = norms.project(points, x, radius, name, box)
    if not torch.equal(norms.clamp(xi, box), xi):
        raise AssertionError("a projection leaves the box")
    return xi


def an_allocation(draw: Draw) -> object:
    threat = draw.ball()
    distance = draw.tensor(6, dtype=torch.float64).abs()
    shares = wda.allocate(distance, threat)
    assert bool(((shares >= 0) & (shares <= 1)).all())
    if threat.order in (1, 2, 50):
        p = int(threat.order)
        cost = [Fraction(a) * Fraction(b) ** p for a, b in zip(shares.tolist(), distance.tolist(), strict=True)]
        assert sum(cost) <= 6 * Fraction(threat.eps) ** p, (distance, threat)
    return shares


def a_purchase(draw: Draw) -> object:
    radii, values = draw.tensor(3, 4, dtype=torch.float64).abs(), draw.tensor(3, 4, dtype=torch.float64)
    radii[:, 0] = draw.choice((0, 0, 0, 1))
    shares = wda.budget.spend(radii, values, draw.ball())
    torch.testing.assert_close(shares.sum(1), torch.ones(3, dtype=torch.float64))
    return shares


def a_curve(draw: Draw) -> object:
    left = wda.robust_accuracy(
        draw.tensor(6).abs(), draw.choice((draw.any_number(), [draw.size()] * 2)), draw.choice(ORDERS)
    )
    assert bool(((left >= 0) & (left <= 1)).all())
    return left


def an_audit(draw: Draw) -> object:
    """Of points anywhere; half of the budgets are within some units in the last place of the cost."""
    dtype = draw.choice((torch.float64, torch.float64, torch.float32))
    x, x_adv = draw.tensor(3, 4, dtype=dtype), draw.tensor(3, 4, dtype=dtype)
    sizes = (0.0, 5e-324, 1e-300, 1e-30, 1 / 3, 0.5, 1.0)
    weight = torch.tensor([draw.choice(sizes) for _ in range(3)], dtype=torch.float64)
    name, order = draw.choice(NORMS), draw.choice((1, 2, 3, 20, math.inf))
    y = torch.tensor([0, 1, 2])
    adv = AdversarialDistribution.from_points(x, x_adv, y, Threat(name, 1.0, order, None), weight)
    cost = adv.transport_cost()
    eps = draw.choice((draw.size(), cost, math.nextafter(cost, 0), math.nextafter(cost, math.inf)))
    threat = Threat(name, eps, order, None)
    lower, upper = exact_cost(adv, threat)
    budget = Fraction(threat.eps) ** (1 if math.isinf(order) else int(order))
    try:
        told = adv.audit(threat)
    except BudgetExceeded:
        assert upper > budget, f"refused, but in the ball: {adv.x}, {adv.points}, {threat}"
        raise
    # fifty digits of a sum count; a distance is one of float64
    spare = Fraction(1, 2**50) if math.isinf(order) else order * Fraction(1, 10**49)
    assert lower <= budget * (1 + spare), f"passed, but outside the ball: {adv.x}, {adv.points}, {threat}"
    assert told <= threat.eps
    return told


def exact_cost(adv: AdversarialDistribution, threat: Threat) -> tuple[Fraction, Fraction]:
    """Rational bounds of the p-th power of the cost; equal but for the roots of odd powers of lengths in L2."""
    x, p, n = adv.x, threat.order, len(adv.x)
    lower, upper = [Fraction(0)], [Fraction(0)]
    for point, source, mass in zip(adv.moved, adv.moved_source.tolist(), adv.moved_mass.tolist(), strict=True):
        square = length(point.tolist(), x[source].tolist(), threat.norm)
        share = Fraction(mass) / Fraction(1 / n) / n
        if math.isinf(p) or p % 2 or threat.norm != "L2":
            ends, power = rooted(square, threat.norm), 1 if math.isinf(p) else int(p)
        else:
            ends, power = (square, square), int(p) // 2
        for side, end in zip((lower, upper), ends, strict=True):
            side.append(end if math.isinf(p) else share * end**power)
    return (max(lower), max(upper)) if math.isinf(p) else (sum(lower, Fraction(0)), sum(upper, Fraction(0)))


def length(one: list[float], other: list[float], name: str) -> Fraction:
    """The distance of two points, in L2 its square."""
    gaps = [abs(Fraction(a) - Fraction(b)) for a, b in zip(one, other, strict=True)]
    if name == "Linf":
        return max(gaps)
    return sum((gap**2 for gap in gaps) if name == "L2" else gaps, Fraction(0))


def rooted(square: Fraction, name: str) -> tuple[Fraction, Fraction]:
    """Bounds of the length whose square this is in L2: 300 bits; elsewhere it is the length."""
    if name != "L2" or not square:
        return square, square
    shift = 600 + 2 * max(0, square.denominator.bit_length() - square.numerator.bit_length())
    low = math.isqrt((square.numerator << shift) // square.denominator)
    unit = Fraction(1, 1 << (shift // 2))
    return low * unit, (low + 1) * unit


def an_attack(draw: Draw) -> object:
    name = draw.choice(("fgsm", "pgd", "deepfool", "wda", "closest", "wda++", "wfgsm", "wpgd"))
    threat = draw.ball()
    x = draw.sample(threat.box)
    kappa = draw.choice((1, 1, 1, 2, draw.any_number()))
    few = {"steps": 3, "probe_steps": 2, "restarts": 1}
    options = {key: value for key, value in few.items() if key in wda.attacks.options(name)}
    y = torch.tensor([0, 1, 2])
    adv = wda.attack(name, model(draw, x.dtype), x, y, threat, kappa=kappa, progress=False, **options)
    assert adv.audit() <= threat.eps
    return adv.points, adv.mass


def a_loss(draw: Draw) -> object:
    """Of logits that are finite; a difference of two may be infinite, as it may overflow."""
    logits = draw.tensor(3, 4)
    return losses.get(draw.choice(("margin", "dlr", "redlr", "ce")))(logits, torch.tensor([0, 1, 3]))


CALLS: dict[str, tuple[Callable[[Draw], object], str]] = {
    "Threat": (a_threat, "norm eps order box"),
    "norm": (a_norm, "v name"),
    "dual_maximiser": (a_direction, "g name"),
    "project": (a_projection, "points anchor radius box"),
    "allocate": (an_allocation, "distance threat eps order box"),
    "spend": (a_purchase, "radii values threat eps order box"),
    "robust_accuracy": (a_curve, "distance eps order"),
    "audit": (an_audit, "x x_adv eps weight order"),
    "attack": (an_attack, "model x y threat eps order box kappa distance"),
    "losses": (a_loss, "logits y"),
}


def call(kind: str, seed: int) -> str:
    """Make one call and tell its outcome, "returned" or the name of what was raised; else an `AssertionError`."""
    function, arguments = CALLS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = function(Draw(f"{kind} {seed}"))
        except RAISED as error:
            if any(re.search(rf"\b{name}\b", str(error)) for name in arguments.split()):
                return type(error).__name__
            raise AssertionError(f"{kind} {seed}: {type(error).__name__} names no argument: {error}") from error
        except AssertionError as error:
            raise AssertionError(f"{kind} {seed}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {error}") from error
    for value in result if isinstance(result, tuple) else (result,):
        bad = bool(value.isnan().any()) if isinstance(value, Tensor) else value != value
        assert not bad, f"{kind} {seed}: NaN"
    return "returned"


def fuzz(calls: int, only: str | None = None) -> dict[str, Counter[str]]:
    """How the calls of each kind, or of one, ended."""
    return {kind: Counter(call(kind, k) for k in range(calls)) for kind in CALLS if only in (None, kind)}


def main() -> None:
    """Make the calls, and record how they ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=500, help="of each kind")
    given = parser.parse_args()
    begin = time.monotonic()
    ended = fuzz(given.calls)
    record = {
        "study": "fuzz_calls", "calls": given.calls * len(CALLS), "ended": ended,
        "seconds": round(time.monotonic() - begin, 1), "provenance": provenance(),
    }  # fmt: skip
    with write_atomically(RECORD) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(ended, indent=1))


if __name__ == "__main__":
    main()
