"""Numbers at the ends of what floats hold: the right result, or a word that names the argument."""

from __future__ import annotations

import json
import math
import warnings
from fractions import Fraction

import fuzz_calls
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wda
from wda import AdversarialDistribution, BudgetExceeded, Threat, losses, norms

NORMS = ("Linf", "L2", "L1")
each_norm = pytest.mark.parametrize("name", NORMS)


@pytest.mark.parametrize("kind", fuzz_calls.CALLS)
def test_public_calls_with_extreme_numbers(kind: str) -> None:
    """Other calls than the recorded ones; each kind both returns and, where it may, refuses."""
    ended = {fuzz_calls.call(kind, 10**6 + k) for k in range(150)}
    assert "returned" in ended
    assert ended - {"returned"} or kind in ("norm", "dual_maximiser", "losses")


def test_the_record_is_of_enough_calls() -> None:
    record = json.loads(fuzz_calls.RECORD.read_text())
    assert record["calls"] == sum(sum(ended.values()) for ended in record["ended"].values()) >= 200
    assert record["ended"].keys() == fuzz_calls.CALLS.keys()
    assert {"torch", "cpu"} <= record["provenance"].keys()


def test_the_fuzz_sees_an_audit_that_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before: squares that vanish, and sums at the mercy of rounding."""

    def blind(self: AdversarialDistribution, order: float | None = None) -> float:
        return 0.0

    monkeypatch.setattr(AdversarialDistribution, "transport_cost", blind)
    with pytest.raises(AssertionError, match="passed, but outside the ball"):
        fuzz_calls.fuzz(30, only="audit")


def pair(*moves: float, weight: float = 1.0, name: str = "L2", order: float = 1) -> AdversarialDistribution:
    """One sample at the origin for each move, of two equal coordinates."""
    x = torch.zeros(len(moves), 2, dtype=torch.float64)
    x_adv = torch.tensor([[move, move] for move in moves], dtype=torch.float64)
    threat = Threat(name, 1.0, order, None)
    return AdversarialDistribution.from_points(x, x_adv, torch.zeros(len(moves), dtype=torch.int64), threat, weight)


@pytest.mark.parametrize("size", [2.0**k for k in (-1070, -1022, -600, -540, -511, -30, 0, 500, 512, 600, 1020)])
@each_norm
def test_a_cost_scales_with_the_points(name: str, size: float) -> None:
    """By a power of two, so to the last bit, but where even that has fewer bits."""
    for order in (1, 1.5, 2, 50, 1000, math.inf):
        unit = pair(1.0, 0.5, 0.0, name=name, order=order).transport_cost()
        cost = pair(size, size / 2, 0.0, name=name, order=order).transport_cost()
        assert cost == pytest.approx(unit * size, rel=1e-12, abs=2 * 5e-324)


@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-160, 1e-300, 1e-320, 1e-323])
@pytest.mark.parametrize("order", [1, 2, 3, 100])
def test_tiny_shares_cost_what_they_cost(order: int, weight: float) -> None:
    adv = pair(1.0, 1.0, weight=weight, name="Linf", order=order)
    mass = Fraction(adv.moved_mass.sum().item())
    cost = Fraction(adv.transport_cost())
    assert float(cost**order / mass) == pytest.approx(1, rel=1e-9)
    assert not len(pair(1.0, 1.0, weight=5e-324).moved), "half of that is no number"
    assert pair(1e-200, weight=1e-200).transport_cost() == 5e-324, "less than any number, and not nothing"


@each_norm
def test_what_is_out_of_range_is_outside_every_ball(name: str) -> None:
    adv = pair(1.7e308, -1.7e308, name=name)
    far = AdversarialDistribution.from_points(adv.x - 1.7e308, adv.x_adv.abs(), adv.labels, adv.threat)
    assert far.transport_cost() == math.inf
    with pytest.raises(BudgetExceeded, match=r"transport cost inf exceeds eps=1.7e\+308"):
        far.audit(Threat(name, 1.7e308, 1, None))


def test_a_share_of_something_out_of_range_may_be_within() -> None:
    far = pair(1.7e308, weight=0.25, name="L1")
    assert far.transport_cost() == pytest.approx(0.85e308)
    assert far.audit(Threat("L1", 0.9e308, 1, None)) <= 0.9e308


@pytest.mark.parametrize("n", [3, 7, 10, 49, 1000])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_budget_that_is_met_exactly_is_met_whatever_the_sum_rounds_to(order: float, n: int) -> None:
    """A mass of the float64 number 1/N is one Nth: N points at distance eps cost eps."""
    for step in (0.1, 0.3, 1 / 3, 0.7):
        adv = pair(*[step] * n, name="Linf", order=order)
        assert adv.audit(Threat("Linf", step, order, None)) == pytest.approx(step)
        with pytest.raises(BudgetExceeded):
            adv.audit(Threat("Linf", math.nextafter(step, 0), order, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@each_norm
def test_a_norm_is_scaled_before_it_is_squared(name: str, dtype: torch.dtype) -> None:
    v = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    limit = torch.finfo(dtype)
    exact = norms.norm(v, name)
    for size in (limit.tiny, limit.tiny**0.5, limit.max / 16):
        unit = 2.0 ** math.floor(math.log2(size))
        torch.testing.assert_close(norms.norm(v * unit, name), exact * unit, rtol=2 * limit.eps, atol=0)


def test_norms_have_gradients_where_squares_vanish() -> None:
    v = torch.tensor([[3e-200, 4e-200]], dtype=torch.float64, requires_grad=True)
    norms.norm(v, "L2").sum().backward()
    torch.testing.assert_close(v.grad, torch.tensor([[0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_ratio_of_logits_is_invariant_up_to_the_largest(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, -0.5, 0.25, -1.0], [-1.0, 1.0, 0.5, 0.0]], dtype=dtype)
    y = torch.tensor([0, 3])
    for loss in ("dlr", "redlr"):
        value = losses.get(loss)
        torch.testing.assert_close(value(logits * torch.finfo(dtype).max, y), value(logits, y))


@pytest.mark.parametrize("given", [torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), np.array(0.25)])
def test_a_tensor_of_one_number_is_a_number(given: object) -> None:
    assert Threat("L2", given) == Threat("L2", 0.25)
    assert Threat("L2", 0.25, torch.tensor(2)) == Threat("L2", 0.25, 2)
    with pytest.raises(TypeError, match="eps="):
        Threat("L2", torch.tensor([0.25, 0.5]))


@pytest.mark.parametrize("eps", [5e-324, 1e-310, 2.2e-308])
def test_a_radius_of_few_digits_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=rf"eps={eps!r}: 0, a finite number from 2.23e-308 on"):
        Threat("L2", eps)


def test_a_box_of_infinite_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"box=.*a finite width"):
        Threat("L2", 1.0, box=(-1e308, 1e308))


@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_huge_radius_is_that_of_the_box_or_refused(name: str, dtype: torch.dtype) -> None:
    model, x = nn.Linear(4, 3).to(dtype), torch.rand(5, 4).to(dtype)
    y = model(x).argmax(1)
    with pytest.warns(UserWarning, match="within reach"):
        huge = wda.attack("pgd", model, x, y, Threat(name, 1e300, "inf"))
    reach = wda.attack("pgd", model, x, y, Threat("Linf", 1.0, "inf"))
    assert huge.audit() <= 4
    assert huge.accuracy(model) <= reach.accuracy(model) + 1 / 5
    with pytest.raises(ValueError, match=r"eps=1e\+300 .* a radius up to"):
        wda.attack("pgd", model, x, y, Threat(name, 1e300, "inf", None))


@pytest.mark.parametrize(("name", "least"), [("L2", 2.0), ("L1", 4.0), ("Linf", 1.0)])
@pytest.mark.parametrize("call", [wda.attack, wda.bracket])
def test_a_radius_that_reaches_across_the_box_is_told(call: object, name: str, least: float) -> None:
    """The farthest two corners of four coordinates are 1, 2 and 4 apart."""
    model, x, y = nn.Linear(4, 3), torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)

    def run(eps: float) -> Tensor:
        threat = Threat(name, eps, 2)
        if call is wda.attack:
            return wda.attack("fgsm", model, x, y, threat).points
        return wda.bracket(model, x, y, threat, steps=2, restarts=1, progress=False).distance

    with pytest.warns(UserWarning, match=r"all of it is within reach: did you mean '8/255'"):
        run(255.0)
    with pytest.warns(UserWarning, match="within reach"):
        run(1.01 * least)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*within reach")
        run(least)
