"""Each counterexample of the book's chapter on verdicts: the paper's number, the true one, and the repaired one.

The true values come from closed forms and from `line_value`, a linear program that sees logits only. The package's
certificates must agree with them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import wda
from wda import AdversarialDistribution, Threat, cells, certificates, losses, norms

NORMS = ("L1", "L2", "Linf")
each_norm = pytest.mark.parametrize("norm", NORMS)
each_loss = pytest.mark.parametrize("loss", ["margin", "ce"])
FAR = 1e3  # beyond every kink of the networks on the line below


def one_hidden(
    w1: Sequence[Sequence[float]],
    b1: Sequence[float],
    w2: Sequence[Sequence[float]],
    b2: Sequence[float] | None = None,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """W2 activation(W1 x + b1) + b2, in float64."""
    hidden, head = nn.Linear(len(w1[0]), len(w1)), nn.Linear(len(w1), len(w2))
    net = nn.Sequential(hidden, activation(), head).double()
    with torch.no_grad():
        for layer, weight, bias in ((hidden, w1, b1), (head, w2, b2 or [0.0] * len(w2))):
            layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
            layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return net.eval()


def loss_at(net: nn.Module, points: Sequence[float], label: int, loss: str = "margin") -> np.ndarray:
    """The loss at points of the line, for one label."""
    x = torch.tensor(points, dtype=torch.float64)[:, None]
    with torch.no_grad():
        return losses.get(loss)(net(x), torch.full((len(points),), label)).numpy()


def jacobians(net: nn.Module, points: Sequence[float]) -> list[torch.Tensor]:
    """The Jacobian (K, 1) at each point of the line, one point for each cell."""
    return [torch.autograd.functional.jacobian(net, torch.tensor([p], dtype=torch.float64)) for p in points]


def eq6(net: nn.Module, points: Sequence[float], norm: str) -> float:
    """L of eq. (6): 2^{1/s} max ||J_D||_{r->s}."""
    largest = max(norms.operator_norm(J, norm, norms.dual(norm)) for J in jacobians(net, points))
    return float(2 ** (1 / norms.exponent(norms.dual(norm))) * largest)


def corrected(net: nn.Module, points: Sequence[float], norm: str) -> float:
    """The same with 2^{1/r}."""
    r, s = norms.exponent(norm), norms.exponent(norms.dual(norm))
    return eq6(net, points, norm) * float(2 ** (1 / r - 1 / s))


def margin_constant(net: nn.Module, points: Sequence[float], labels: Sequence[int]) -> float:
    """The largest slope of theta_j - theta_k over cells, labels k in the data, and rivals j."""
    return max(
        float((J[j] - J[k]).abs()) for J in jacobians(net, points) for k in labels for j in range(len(J)) if j != k
    )


def eq7(net: nn.Module, labels: Sequence[int] | None = None) -> float:
    """l of eq. (7) on the line, where the two outer cells have rays; `labels` restricts k to the data's."""
    left, right = jacobians(net, [-FAR, FAR])
    classes = range(len(left))
    rates = [
        float(u * (J[j] - J[k]))
        for J, u in ((left, -1), (right, 1))
        for k in labels or classes
        for j in classes
        if j != k
    ]
    return max(rates)


def line_value(
    net: nn.Module, kinks: Sequence[float], x: Sequence[float], y: Sequence[int], eps: float, loss: str = "margin"
) -> float:
    """V(eps) of a ReLU network on the line, exactly.

    Between kinks and samples the loss minus a price for the distance is convex, so an optimal distribution lives on
    these points, plus mass that escapes along one of the two rays, at the slope of its tail.
    """
    points = sorted({*kinks, *x})
    gain, cost, mass = [], [], []
    for i, (start, label) in enumerate(zip(x, y, strict=True)):
        far, further = (loss_at(net, [-r, r], label, loss) for r in (FAR, 2 * FAR))
        gain += [*loss_at(net, points, label, loss), *(further - far) / FAR]
        cost += [*(abs(p - start) for p in points), 1.0, 1.0]
        row = np.zeros((len(x), len(points) + 2))
        row[i, : len(points)] = 1
        mass.append(row)
    solved = linprog(
        -np.array(gain),
        A_ub=np.array(cost)[None],
        b_ub=[eps],
        A_eq=np.hstack(mass),
        b_eq=np.full(len(x), 1 / len(x)),
        method="highs",
    )
    assert solved.status == 0
    return -float(solved.fun)


def worst_case(
    net: nn.Module, kinks: Sequence[float], x: Sequence[float], y: Sequence[int], eps: float, loss: str = "margin"
) -> float:
    """The same, after the package has agreed."""
    exact = line_value(net, kinks, x, y, eps, loss)
    points, labels = torch.tensor(x, dtype=torch.float64)[:, None], torch.tensor(y)
    for norm in ("L1", "Linf"):
        threat = Threat(norm, eps, order=1, box=None)
        assert certificates.worst_case_risk(net, points, labels, threat, loss) == pytest.approx(exact, abs=1e-7)
    return exact


def check_slopes(net: nn.Module, points: Sequence[float], labels: Sequence[int]) -> None:
    """The package's constants and l against those of this file; `points` has one in each cell."""
    for norm in NORMS:
        by_kind = {
            "paper": eq6(net, points, norm),
            "corrected": corrected(net, points, norm),
            "margin": margin_constant(net, points, labels),
        }
        for kind, expected in by_kind.items():
            assert certificates.lipschitz(net, norm, kind, labels).value == pytest.approx(expected), (norm, kind)
        slope = certificates.recession_slope(net, norm, labels).value
        assert slope == pytest.approx(max(0.0, eq7(net, labels)))


def risk(net: nn.Module, atoms: Sequence[tuple[float, Sequence[float]]], label: int, loss: str = "margin") -> float:
    """The mean loss of atoms (mass, point) of one label."""
    points = torch.tensor([point for _, point in atoms], dtype=torch.float64)
    with torch.no_grad():
        values = losses.get(loss)(net(points), torch.full((len(atoms),), label))
    return float(values @ torch.tensor([mass for mass, _ in atoms], dtype=torch.float64))


# Theorem 3.1, upper bound -------------------------------------------------------------------------------------------

NET_A = one_hidden([[1.0]], [0.0], [[-1.0], [1.0]])  # theta = (-relu x, relu x)
NET_B = one_hidden([[1.0, 0.5]], [0.0], [[-1.0], [1.0], [0.3]])


@each_loss
def test_upper_bound_fails_at_r_1_on_one_unit(loss: str) -> None:
    start = {"margin": 0.0, "ce": math.log(2)}[loss]
    paper = start + eq6(NET_A, [-1, 1], "L1") * 1.0
    value = worst_case(NET_A, [0], [0.0], [0], 1.0, loss)
    assert paper == pytest.approx({"margin": 1.0, "ce": 1.6931}[loss], abs=1e-4)
    assert value == pytest.approx({"margin": 2.0, "ce": 2.6931}[loss], abs=1e-4)
    assert value <= start + corrected(NET_A, [-1, 1], "L1") + 1e-9  # and here with equality
    assert margin_constant(NET_A, [-1, 1], [0]) == corrected(NET_A, [-1, 1], "L1") == 2.0
    check_slopes(NET_A, [-1, 1], [0])
    # the package's own distribution, audited without tolerance, breaks the printed bound as well
    ball = Threat("L1", 1.0, order=1, box=None)
    adv = certificates.worst_case_distribution(
        NET_A, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0]), ball, loss
    )
    adv.audit()
    assert adv.risk(NET_A, loss) == pytest.approx(value, abs=1e-5)
    # the distributions that break it need no limit
    two_atoms, one_atom = [(0.9, [0.0]), (0.1, [10.0])], [(1.0, [1.0])]
    for atoms, expected in ((two_atoms, {"margin": 2.0, "ce": 2.6238}), (one_atom, {"margin": 2.0, "ce": 2.1269})):
        assert sum(mass * abs(point[0]) for mass, point in atoms) == pytest.approx(1.0)
        assert risk(NET_A, atoms, 0, loss) == pytest.approx(expected[loss], abs=1e-4)
        assert paper < risk(NET_A, atoms, 0, loss) <= value + 1e-9


@pytest.mark.parametrize(("norm", "constant"), [("L1", 1.0), ("L2", 2.0), ("Linf", 4.0)])
def test_the_constant_of_eq_6_is_right_for_r_2_alone(norm: str, constant: float) -> None:
    """Net A satisfies the sufficient condition for l = L in every norm, and l = 2."""
    assert eq7(NET_A) == eq7(NET_A, [0]) == 2.0
    assert eq6(NET_A, [-1, 1], norm) == pytest.approx(constant)
    assert corrected(NET_A, [-1, 1], norm) == pytest.approx(2.0)
    assert worst_case(NET_A, [0], [0.0], [0], 3.0) == pytest.approx(6.0)


def test_the_sufficient_condition_in_its_terms() -> None:
    """On net A: the maximiser lies in the recession cone, and e_2 - e_1 attains the operator norm of J^T."""
    J = torch.tensor([[-1.0], [1.0]])
    pair = torch.tensor([[-1.0, 1.0]])
    for norm in NORMS:
        s = norms.dual(norm)
        assert norms.dual_maximiser(pair @ J, norm).item() > 0  # rec of (0, inf)
        attained = norms.norm(pair @ J, s) / norms.norm(pair, norm)
        assert attained.item() == pytest.approx(norms.operator_norm(J.T, norm, s))


@pytest.mark.parametrize("r", [1.0, 1.2, 1.5, 2.0, 3.0, math.inf])
def test_eq_12_needs_the_exponent_of_the_dual_norm(r: float) -> None:
    """Logits that move along e_2 - e_1: the margin gains 2 per step of s-norm 2^{1/s}."""
    s = math.inf if r == 1 else 1.0 if r == math.inf else r / (r - 1)
    gain, length = 2.0, 2 ** (1 / s)
    assert gain == pytest.approx(2 ** (1 / r) * length)  # repaired: equality
    assert (gain > 2 ** (1 / s) * length + 1e-9) == (r < 2)  # printed: broken below 2
    ce = math.log((1 + math.exp(2)) / 2)  # eq. (11) at r = 1: from (0, 0) to (-1, 1)
    assert ce > 1.0 == 2 ** (1 / math.inf) * 1.0
    assert ce < 2.0


@each_loss
def test_upper_bound_fails_at_r_1_with_two_inputs_and_three_classes(loss: str) -> None:
    start = {"margin": 0.0, "ce": math.log(3)}[loss]
    J = torch.tensor([[-1.0, -0.5], [1.0, 0.5], [0.3, 0.15]])
    paper = start + norms.operator_norm(J, "L1", "Linf")  # 2^{1/inf} = 1
    assert paper == pytest.approx({"margin": 1.0, "ce": 2.0986}[loss], abs=1e-4)
    atoms = [(0.9, [0.0, 0.0]), (0.1, [10.0, 0.0])]
    printed = risk(NET_B, atoms, 0, loss)
    assert printed == pytest.approx({"margin": 2.0, "ce": 2.9888}[loss], abs=1e-4)
    # along the first axis the loss is convex, so V(1) is its slope at infinity; no pair of rows is steeper
    slope = (risk(NET_B, [(1.0, [2e3, 0.0])], 0, loss) - risk(NET_B, [(1.0, [1e3, 0.0])], 0, loss)) / 1e3
    repaired = max(float((J[j] - J[0]).abs().max()) for j in (1, 2))
    assert slope == pytest.approx(repaired) == 2.0
    assert paper < printed <= start + repaired
    x, y, ball = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), Threat("L1", 1.0, order=1, box=None)
    assert certificates.worst_case_risk(NET_B, x, y, ball, loss) == pytest.approx(start + repaired)
    assert certificates.lipschitz(NET_B, "L1", "paper", [0]).value == pytest.approx(paper - start)
    assert certificates.lipschitz(NET_B, "L1", "margin", [0]).value == pytest.approx(repaired)
    assert certificates.recession_slope(NET_B, "L1", [0]).value == pytest.approx(repaired)
    assert start + repaired == pytest.approx({"margin": 2.0, "ce": 3.0986}[loss], abs=1e-4)


@pytest.mark.parametrize(("M", "paper"), [(1, 2 * math.sqrt(2)), (100, 200.01)])
def test_eq_6_grows_without_bound_on_one_and_the_same_loss(M: float, paper: float) -> None:
    net = one_hidden([[1.0]], [0.0], [[M - 1.0], [M + 1.0]])
    check_slopes(net, [-1, 1], [0])
    assert eq6(net, [-1, 1], "L2") == pytest.approx(paper, abs=1e-4)
    assert eq6(net, [-1, 1], "L2") == pytest.approx(2 * math.sqrt(M**2 + 1))
    assert corrected(net, [-1, 1], "Linf") == pytest.approx(2 * M)
    assert margin_constant(net, [-1, 1], [0]) == pytest.approx(2.0)  # repaired
    assert worst_case(net, [0], [0.0], [0], 1.0) == pytest.approx(2.0)  # true


def test_a_rival_that_never_leads_counts_in_l_margin() -> None:
    """theta = (100, h, -h), label 2, h the ramp from 0 to 1: L_margin = 2, the margin's modulus is 1."""
    net = one_hidden([[1.0], [1.0]], [0.0, -1.0], [[0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]], [100.0, 0.0, 0.0])
    grid = np.linspace(-3, 3, 601)
    modulus = np.abs(np.diff(loss_at(net, list(grid), 1)) / np.diff(grid)).max()
    assert modulus == pytest.approx(1.0)
    check_slopes(net, [-1, 0.5, 2], [1])
    assert margin_constant(net, [-1, 0.5, 2], [1]) == 2.0
    assert margin_constant(net, [-1, 0.5, 2], [0]) == 1.0  # label 1 has no such rival
    assert worst_case(net, [0, 1], [1.0], [1], 0.5) == pytest.approx(99.5)


def test_the_active_rivals_alone_do_not_bound_the_cross_entropy() -> None:
    """theta = (0, relu x, -10 relu x), label 1: rival 3 never leads, yet its logit moves the softmax."""
    net = one_hidden([[1.0]], [0.0], [[0.0], [1.0], [-10.0]])
    start = math.log(10) / 11
    active, full = 1.0, margin_constant(net, [-1, 1], [0])
    assert full == 10.0
    check_slopes(net, [-1, 1], [0])
    x, y = torch.tensor([[start]], dtype=torch.float64), torch.tensor([0])
    assert certificates.initial_slope(net, x, y, "Linf", "ce").value == pytest.approx(1.1541, abs=1e-4)
    assert certificates.initial_slope(net, x, y, "Linf", "margin").value == pytest.approx(active)
    E = float(loss_at(net, [start], 0, "ce")[0])
    value = worst_case(net, [0], [start], [0], 0.1, "ce")
    assert (value - E) / 0.1 == pytest.approx(1.1541, abs=1e-4)
    assert value == pytest.approx(0.97244, abs=1e-5)
    assert E + active * 0.1 == pytest.approx(0.95702, abs=1e-5)
    assert E + active * 0.1 < value <= E + full * 0.1
    margin = worst_case(net, [0], [start], [0], 0.1)  # for the margin the active rivals are enough
    assert margin == pytest.approx(start + active * 0.1)


# Theorem 3.1, lower bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "start"), [("margin", 0.0), ("ce", math.log(2))])
def test_lower_bound_needs_the_label_in_the_data(loss: str, start: float) -> None:
    net = one_hidden([[1.0]], [0.0], [[1.0], [0.0]])
    check_slopes(net, [-1, 1], [0])
    check_slopes(net, [-1, 1], [0, 1])
    assert eq7(net) == 1.0  # from the pair k' = 1, k = 2
    assert max(eq7(net, [0]), 0.0) == 0.0  # repaired: label 1 alone occurs
    for eps in (0.1, 1.0, 10.0):
        assert worst_case(net, [0], [0.0], [0], eps, loss) == pytest.approx(start)
        assert start < start + eq7(net) * eps
    # with a sample of label 2 the slope is the paper's
    both = worst_case(net, [0], [0.0, 0.0], [0, 1], 1.0, loss)
    assert both == pytest.approx(start + 1.0)


def test_sphere_and_ball_differ_where_every_ray_goes_down() -> None:
    """theta = (relu(x) + relu(-x - 1), 0), label 1: the supremum over the sphere is -1, V stays at E."""
    net = one_hidden([[1.0], [-1.0]], [0.0, -1.0], [[1.0, 1.0], [0.0, 0.0]])
    check_slopes(net, [-3, -0.5, 1], [0])
    assert eq7(net, [0]) == -1.0
    assert max(eq7(net, [0]), 0.0) == 0.0
    assert worst_case(net, [-1, 0], [-0.5], [0], 3.0) == pytest.approx(0.0) == loss_at(net, [-0.5], 0)[0]


def test_corollary_3_2_holds_but_may_say_nothing() -> None:
    """theta = (0, relu(x - 1)) from 0: the sample's own cell has no rising ray, so l_N = 0 < l = 1."""
    net = one_hidden([[1.0]], [-1.0], [[0.0], [1.0]])
    (own,) = jacobians(net, [0.0])
    l_N = max(0.0, *(float(-1 * (own[j] - own[0])) for j in (0, 1)))  # rec of (-inf, 1) is the ray to the left
    slope = max(eq7(net, [0]), 0.0)
    assert (l_N, slope) == (0.0, 1.0)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])
    assert certificates.sample_slope(net, x, y, "L2").value == l_N
    check_slopes(net, [0, 2], [0])
    for eps in (0.5, 4.0):
        assert eps * l_N <= eps * slope <= worst_case(net, [1], [0.0], [0], eps) + 1e-9


def test_the_interior_of_a_recession_cone_may_be_empty() -> None:
    """theta = (0, relu(x1) + relu(1 - x1) + relu(x2)): a half-strip, whose cone is one ray of rate 1."""
    net = one_hidden([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [0.0, 1.0, 0.0], [[0.0] * 3, [1.0] * 3])
    angles = np.linspace(0, 2 * np.pi, 3601)
    u = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    stays = (u @ np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]) >= -1e-12).all(1)  # at (1/2, 1) all units are on
    assert u[stays] == pytest.approx(np.array([[0.0, 1.0]]))
    assert risk(net, [(1.0, [0.5, 11.0])], 0) - risk(net, [(1.0, [0.5, 1.0])], 0) == pytest.approx(10.0)  # l_N = 1
    slope = np.abs(u[:, 0]) + np.maximum(u[:, 1], 0)  # the recession network's margin
    far = [risk(net, [(1.0, list(1e6 * d))], 0) / 1e6 for d in u[::100]]
    assert far == pytest.approx(slope[::100], abs=1e-5)
    assert slope.max() == pytest.approx(math.sqrt(2))  # l at r = 2
    x, y = torch.tensor([[0.5, 1.0]], dtype=torch.float64), torch.tensor([0])
    assert certificates.sample_slope(net, x, y, "L2").value == pytest.approx(1.0)
    assert certificates.recession_slope(net, "L2", [0]).value == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_lower_bound_fails_on_a_bounded_set(eps: float) -> None:
    """theta = (0, relu x) on X = [0, 1] from 1/2; the loss is convex there, so the ends and the sample suffice."""
    points = np.array([0.0, 0.5, 1.0])
    solved = linprog(-points, A_ub=[abs(points - 0.5)], b_ub=[eps], A_eq=[[1, 1, 1]], b_eq=[1], method="highs")
    value, paper = -solved.fun, 0.5 + 1.0 * eps
    assert value == pytest.approx(0.5 + min(eps, 0.5))
    assert (value < paper - 1e-9) == (eps > 0.5)
    net = one_hidden([[1.0]], [0.0], [[0.0], [1.0]])
    x, y, threat = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0]), Threat("L1", eps, box=(0.0, 1.0))
    assert certificates.worst_case_risk(net, x, y, threat) == pytest.approx(value)
    best, furthest = 1.0, 0.5  # repaired: M and the mean distance to the maximisers
    assert 0.5 + min(1.0, eps / furthest) * (best - 0.5) <= value + 1e-9 <= min(best, 0.5 + eps) + 2e-9


def test_upper_bound_fails_on_a_set_that_is_not_convex() -> None:
    """theta = (0, 10 relu(x - 1) - 10 relu(x - 2)) on X = {0, 3}: every J_D is 0 there."""
    net = one_hidden([[1.0], [1.0]], [-1.0, -2.0], [[0.0, 0.0], [10.0, -10.0]])
    paper = eq6(net, [0.0, 3.0], "L2")
    at = loss_at(net, [0.0, 3.0], 0)
    value = float(at[0] + (at[1] - at[0]) * 1.0 / 3)  # budget 1 carries a third of the mass
    assert paper == 0.0
    assert value == pytest.approx(10 / 3)
    repaired = certificates.lipschitz(net, "L2", "margin", [0], box=(0.0, 3.0)).value  # the cells of the convex hull
    assert value <= repaired == pytest.approx(10.0)


def test_neither_bound_holds_for_the_ratio() -> None:
    """Mirrored from the chapter on rays: theta = (relu(x + 1) - 1, 0, -0.01), label 1, from 0."""
    net = one_hidden([[1.0]], [1.0], [[1.0], [0.0], [0.0]], [-1.0, 0.0, -0.01])
    ratio = loss_at(net, [0.0, -0.01], 0, "dlr")
    assert ratio == pytest.approx([0.0, 1.0])
    value = float(ratio[1])  # moving all mass by 0.01
    assert value > math.sqrt(2) * 0.01 == pytest.approx(eq6(net, [-2, 0], "L2") * 0.01)
    grid = list(np.linspace(-20, 20, 4001))
    assert abs(loss_at(net, grid, 0, "dlr")).max() <= 1 + 1e-12  # K = 3: V <= 1 at every budget
    assert eq7(net) * 2.0 > 1.0
    margin = worst_case(net, [-1], [0.0], [0], 0.01)  # repaired: the margin obeys both
    assert margin == pytest.approx(0.01)
    assert margin <= eq6(net, [-2, 0], "L2") * 0.01


def test_a_slope_of_the_ratio_where_three_logits_tie() -> None:
    net = one_hidden([[1.0]], [0.0], [[-1.0], [0.0], [0.0], [0.0]], [0.0, 0.1, 0.05, 0.0])
    near, far = loss_at(net, [1e3, 2e3], 0, "dlr")
    assert (far - near) / 1e3 == pytest.approx(10.0)
    near, far = loss_at(net, [1e3, 2e3], 0)
    assert (far - near) / 1e3 == pytest.approx(1.0)  # what Lemma B.1 says


def test_masks_without_an_interior_do_not_count() -> None:
    """theta = relu(x) - relu(-x) = x: the mask (1, 1) has no cell, and its product is 2."""
    w1, w2 = np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])
    product = {mask: (w2 @ np.diag(mask) @ w1).item() for mask in ((0, 1), (1, 0), (1, 1))}
    assert product == {(0, 1): 1.0, (1, 0): 1.0, (1, 1): 2.0}
    x = np.linspace(-5, 5, 101)
    moduli = np.diff(np.maximum(w1 * x, 0).T @ w2[0]) / np.diff(x)
    assert moduli == pytest.approx(np.ones(100))
    net = one_hidden([[1.0], [-1.0]], [0.0, 0.0], [[0.0, 0.0], [1.0, -1.0]])
    assert len(cells.enumerate(net)) == 2
    assert certificates.lipschitz(net, "L2", "margin", [0]).value == pytest.approx(1.0)


def test_the_remark_is_a_network_whose_upper_bound_is_not_tight() -> None:
    h = [1.0, 1.0, -0.5, -0.5]
    net = one_hidden([[1.0], [-1.0], [1.0], [-1.0]], [0.0, 0.0, -1.0, -1.0], [[-v / 2 for v in h], [v / 2 for v in h]])
    points = [-2.0, -0.5, 0.5, 2.0]
    check_slopes(net, points, [0])
    assert eq6(net, points, "L2") == pytest.approx(1.0) == margin_constant(net, points, [0])
    assert eq7(net, [0]) == pytest.approx(0.5)
    for eps in (0.1, 1.0, 5.0):
        assert worst_case(net, [-1, 0, 1], [2.0], [0], eps) == pytest.approx(1.5 + eps / 2)
        assert worst_case(net, [-1, 0, 1], [0.0], [0], eps) == pytest.approx(min(eps, (1 + eps) / 2))  # no line at all


# Theorem 3.3 --------------------------------------------------------------------------------------------------------

SMOOTH = [(nn.GELU, 10.0, 1.1289), (nn.SiLU, 20.0, 1.0998), (nn.Softplus, 10.0, 0.9905)]


def two_kinks(activation: type[nn.Module], scale: float, rows: Sequence[float]) -> nn.Sequential:
    """rows * f with f(x) = [s(cx) - s(c(x - 1)) / 2] / c: a kinked line of slopes 0, 1, 1/2, rounded."""
    head = [[row / scale, -row / 2 / scale] for row in rows]
    return one_hidden([[scale], [scale]], [0.0, -scale], head, activation=activation)


def slopes_of(net: nn.Module) -> tuple[float, float, float]:
    """Of the margin at label 1 from x = 2: the steepest derivative, Lambda, and the slope at infinity, on a grid."""
    x = torch.linspace(-8, 40, 480_001, dtype=torch.float64)[:, None].requires_grad_()
    logits = net(x)
    values = logits[:, 1] - logits[:, 0]
    (derivative,) = torch.autograd.grad(values.sum(), x)
    start = float(loss_at(net, [2.0], 0)[0])
    away = (x[:, 0] - 2).abs()
    steepest_line = ((values - start) / away)[away > 0.3].max()  # nearer, the derivative is the bound
    near = derivative[:, 0][away <= 0.3].abs().max()
    far, further = loss_at(net, [1e3, 2e3], 0)
    return derivative.abs().max().item(), max(steepest_line.item(), near.item()), float(further - far) / 1e3


@each_loss
@pytest.mark.parametrize(("activation", "scale", "steepest"), SMOOTH)
def test_smooth_lower_bound_fails(activation: type[nn.Module], scale: float, steepest: float, loss: str) -> None:
    net = two_kinks(activation, scale, [0.0, 1.0])
    paper, initial, tail = slopes_of(net)
    E = float(loss_at(net, [2.0], 0, loss)[0])
    assert paper == pytest.approx(steepest, abs=1e-4)
    assert tail == pytest.approx(0.5, abs=1e-6)
    assert initial == pytest.approx(0.5, abs=2e-3)  # both losses: the cross-entropy is a contraction of the margin
    truth, claimed = E + initial * 1.0, E + paper * 1.0
    assert truth < claimed - 0.4
    if activation is nn.GELU:
        assert truth == pytest.approx({"margin": 2.0, "ce": 2.2014}[loss], abs=1e-4)
        assert claimed == pytest.approx({"margin": 2.6289, "ce": 2.8303}[loss], abs=1e-4)
    # the ReLU network with the same weights has the same slope at infinity: the repaired lower bound
    assert certificates.recession_slope(net, "Linf", [0]).value == pytest.approx(tail, abs=1e-6)
    upper = certificates.lipschitz(net, "Linf", "margin", [0])
    assert upper.lower <= paper + 1e-6 <= upper.upper + 1e-5
    relu = two_kinks(nn.ReLU, scale, [0.0, 1.0])
    assert eq7(relu, [0]) == pytest.approx(tail, abs=1e-6)
    assert worst_case(relu, [0, 1], [2.0], [0], 1.0) == pytest.approx(2.0)
    # a distribution that comes close: mass 1/1000 a thousand away
    reached = risk(net, [(0.999, [2.0]), (0.001, [1002.0])], 0, loss)
    assert reached == pytest.approx(E + 0.5, abs=2e-3)


def test_equal_constants_do_not_make_the_smooth_bound_tight() -> None:
    """theta = (-f/2, f/2), r = 2: l = L in Theorem 3.3, and still V = E + eps/2."""
    net = two_kinks(nn.GELU, 10.0, [-0.5, 0.5])
    paper, initial, tail = slopes_of(net)
    x = torch.linspace(-1, 3, 400_001, dtype=torch.float64)[:, None].requires_grad_()
    (row,) = torch.autograd.grad(net(x)[:, 1].sum(), x)
    L = math.sqrt(2) * math.sqrt(2) * row.abs().max().item()  # rows -d and d: the 2-norm is sqrt(2) |d|
    assert pytest.approx(paper, abs=1e-6) == L
    assert (initial, tail) == pytest.approx((0.5, 0.5), abs=2e-3)


def test_smallest_smooth_network_without_a_lower_bound() -> None:
    """theta = (0, tanh x) from 0: l of Theorem 3.3 is 1, the loss is below 1, V(eps) = tanh(eps)."""
    net = one_hidden([[1.0]], [0.0], [[0.0], [1.0]], activation=nn.Tanh)
    derivative = max(abs(float(J[1])) for J in jacobians(net, list(np.linspace(-3, 3, 601))))
    assert derivative == pytest.approx(1.0)
    grid = np.linspace(-12, 12, 2401)
    values = loss_at(net, list(grid), 0)
    for eps in (0.5, 1.0, 2.0):
        solved = linprog(
            -values, A_ub=abs(grid)[None], b_ub=[eps], A_eq=np.ones((1, grid.size)), b_eq=[1], method="highs"
        )
        assert -solved.fun == pytest.approx(math.tanh(eps), abs=1e-4)
        assert -solved.fun < derivative * eps - 0.03


def test_smooth_upper_bound_fails_at_r_1_on_an_affine_map() -> None:
    net = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    assert eq6(net, [0.0], "L1") == 1.0
    assert worst_case(net, [], [0.0], [0], 1.0) == pytest.approx(2.0) == corrected(net, [0.0], "L1")


# Where l = L_margin -------------------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("seed", range(4))
def test_monotone_networks_have_one_slope(norm: str, seed: int) -> None:
    """Nonnegative hidden weights and W^T(e_2 - e_1) >= 0: V = E + ||W_1^T W_2^T c||_s eps if label 1 occurs."""
    g = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)]
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for layer in (layers[0], layers[2], layers[4]):
            layer.weight.copy_(torch.rand(layer.weight.shape, generator=g))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=g))
        layers[4].weight[1] += layers[4].weight[0]  # both rise, the second one faster
        c = layers[4].weight[1] - layers[4].weight[0]
        steep = norms.norm((c @ layers[2].weight @ layers[0].weight)[None], norms.dual(norm)).item()
    x, y = torch.randn(3, 2, generator=g, dtype=torch.float64), torch.tensor([0, 1, 0])
    assert certificates.lipschitz(net, norm, "margin", [0, 1]).value == pytest.approx(steep)
    assert certificates.recession_slope(net, norm, [0]).value == pytest.approx(steep)
    assert certificates.recession_slope(net, norm, [1]).value == pytest.approx(0.0, abs=1e-9)
    assert certificates.lipschitz(net, norm, "corrected").value > 1.01 * steep
    with torch.no_grad():
        E = losses.margin(net(x), y).mean().item()
    for eps in (0.2, 2.0):
        V = certificates.worst_case_risk(net, x, y, Threat(norm, eps, box=None))
        assert pytest.approx(E + steep * eps, abs=1e-6) == V


# Sections 2, 4 and 6 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "end", "moved"), [("L1", 0.5, 9.0), ("L2", 0.7071, 6.0711), ("Linf", 1.0, 4.0)])
def test_eq_2_as_printed_leaves_the_ball(norm: str, end: float, moved: float) -> None:
    x0, origin = torch.tensor([[5.0, 5.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    printed = norms.project(x0, origin, 1.0, norm)
    assert printed[0].tolist() == pytest.approx([end, end], abs=1e-4)
    assert norms.norm(printed - x0, norm).item() == pytest.approx(moved, abs=1e-4)
    assert torch.equal(norms.project(x0, x0, 1.0, norm), x0)  # repaired: the ball around the anchor


@pytest.mark.parametrize(("norm", "end"), [("L1", (1.0, 0.7)), ("L2", (1.0, 0.5 + math.sqrt(0.08)))])
def test_clipping_after_projecting_wastes_radius(norm: str, end: tuple[float, float]) -> None:
    x0, z = torch.tensor([[0.9, 0.5]], dtype=torch.float64), torch.tensor([[1.9, 1.5]], dtype=torch.float64)
    clipped = norms.project(z, x0, 0.3, norm).clamp(0, 1)
    if norm == "L2":
        assert norms.norm(clipped - x0, norm).item() == pytest.approx(0.2345, abs=1e-4)
    else:
        assert norms.norm(clipped - x0, norm).item() == pytest.approx(0.25)
    assert norms.project(z, x0, 0.3, norm, box=(0.0, 1.0))[0].tolist() == pytest.approx(end)


@pytest.mark.parametrize(("labels", "exact"), [((0, 0), (0.1, 0.05)), ((0, 1), (0.9, 0.45))])
def test_eq_10_may_lie_strictly_inside_its_ball(labels: tuple[int, int], exact: tuple[float, float]) -> None:
    x, x_adv = torch.tensor([[[0.0], [1.0]], [[0.9], [0.1]]], dtype=torch.float64)
    for kappa, distance in zip((1, 2), exact, strict=True):
        P = AdversarialDistribution.from_points(x, x_adv, torch.tensor(labels), Threat("L2", 0.9), 1 / kappa)
        assert P.transport_cost() == pytest.approx(0.9 / kappa)
        assert P.wasserstein() == pytest.approx(distance)


def test_the_weights_of_eq_10_leave_omega_2() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    threat = Threat("L2", 0.5, order=2, box=None)
    P, Q = (AdversarialDistribution.from_points(x, x + 1, torch.tensor([0]), threat, share) for share in (1 / 2, 1 / 4))
    assert P.wasserstein(1) == pytest.approx(0.5)
    assert P.wasserstein(2) == pytest.approx(math.sqrt(0.5)) == 2 ** (1 - 1 / 2) * 0.5
    assert Q.wasserstein(2) == pytest.approx(0.5)  # repaired: kappa^{-p}


def test_line_11_depends_on_more_than_the_classifier() -> None:
    """The first candidates of the example in the chapter on the attack, and their logits."""
    logits = {2: np.array([10.0, 9.0, 6.0]), 3: np.array([3.0, 0.0, 4.0])}  # at (1, 0) and (0, 1)
    shift = {2: -3.0, 3: 4.0}  # h = 4b - 3a: the same softmax, other raw logits
    raw = max(logits, key=lambda j: logits[j][j - 1])
    shifted = max(logits, key=lambda j: logits[j][j - 1] + shift[j])
    margin = max(logits, key=lambda j: logits[j][j - 1] - logits[j][0])
    assert (raw, shifted, margin) == (2, 3, 3)
    assert logits[raw].argmax() == 0  # the label stays
    assert logits[margin].argmax() == 2  # and falls


def knapsack(d: np.ndarray, eps: float) -> float:
    """The flipped mass that a budget buys at distances d, by a solver."""
    N = len(d)
    solved = linprog(-np.full(N, 1 / N), A_ub=d[None] / N, b_ub=[eps], bounds=(0, 1), method="highs")
    return -float(solved.fun)


def best_kappa(d: np.ndarray, eps: float) -> float:
    """The flipped mass of eq. (10) with the best kappa: max F(t) eps / t over t >= eps."""
    t = np.maximum(np.sort(d), eps)
    return float((np.arange(1, len(d) + 1) / len(d) * eps / t).max())


def test_one_radius_for_all_is_far_from_the_optimum() -> None:
    N, eps = 2000, 0.02
    d = (np.arange(N) + 0.5) / N  # as good as uniform on (0, 1)
    B, best = best_kappa(d, eps), knapsack(d, eps)
    assert pytest.approx(0.02, abs=1e-3) == B
    assert best == pytest.approx(0.2, abs=1e-3)
    assert B <= best <= math.sqrt(B**2 + 2 * B) + 1e-9
    same = np.full(30, 1.5)  # all errors at distance 1.5, budget 1
    assert [(same <= k).mean() / k for k in (1, 2)] == [0.0, 0.5]
    assert knapsack(same, 1.0) == pytest.approx(2 / 3) == best_kappa(same, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_gap_between_the_best_kappa_and_the_optimum_is_bounded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, eps = rng.lognormal(sigma=rng.uniform(0.1, 2), size=40), float(rng.uniform(0.05, 2))
    B, best = best_kappa(d, eps), knapsack(d, eps)
    assert B - 1e-9 <= best <= min(1.0, math.sqrt(B**2 + 2 * B)) + 1e-9


def table1() -> list[dict[str, str]]:
    path = Path(wda.__file__).parents[1] / "data" / "published" / "wda_table1.csv"
    with path.open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["wda_k1"]]


def test_what_section_6_says_about_table_1() -> None:
    rows = table1()
    assert len(rows) == 18
    block = {
        (data, norm): [row for row in rows if (row["dataset"], row["norm"]) == (data, norm)]
        for data, norm in (("cifar10", "Linf"), ("cifar10", "L2"), ("cifar100", "Linf"))
    }
    ahead = {key: sum(float(row["a3pp"]) < float(row["a3"]) for row in part) for key, part in block.items()}
    assert (len(block["cifar10", "Linf"]), ahead["cifar10", "Linf"]) == (7, 4)  # the paper: 3 of 7
    assert (len(block["cifar10", "L2"]), ahead["cifar10", "L2"]) == (6, 1)  # the paper: 1 of 6

    def behind(column: str, part: list[dict[str, str]]) -> list[str]:
        return [
            row["robustbench_id"]
            for row in part
            if float(row[column]) >= min(float(row["apgd_ce"]), float(row["apgd_dlr"]))
        ]

    cifar10 = block["cifar10", "Linf"] + block["cifar10", "L2"]
    assert behind("wda_k1", cifar10) == ["Rony2019Decoupling"]
    assert behind("wda_k2", cifar10) == []
    assert len(behind("wda_k2", block["cifar100", "Linf"])) == 3
    weaker = [row for row in rows if float(row["wda_k2"]) > float(row["wda_k1"])]  # section 6.2 says none
    assert [(row["wda_k1"], row["wda_k2"]) for row in weaker] == [
        ("39.12", "43.61"), ("28.26", "37.64"), ("39.57", "43.68"),
    ]  # fmt: skip


def test_table_1_implies_much_lower_accuracies() -> None:
    """What falls within eps (to any attack) pays eps, what falls to WDA within 2 eps pays 2 eps."""
    point_wise = ("apgd_ce", "apgd_dlr", "wda_k1", "aa", "a3", "a3pp")
    implied = {}
    for row in table1():
        clean, k2 = float(row["clean"]) / 100, float(row["wda_k2"]) / 100
        near = clean - min(float(row[column]) for column in point_wise) / 100
        further = 2 * (clean - k2) - near
        spent = linprog([-1, -1], A_ub=[[1, 2]], b_ub=[1], bounds=[(0, near), (0, further)], method="highs")
        implied[row["dataset"], row["norm"], row["robustbench_id"]] = 100 * (clean + spent.fun), 100 * k2
    cifar = {key[2]: value for key, value in implied.items() if key[:2] == ("cifar10", "Linf")}
    assert cifar["Bartoldson2024Adversarial_WRN-94-16"] == pytest.approx((36.82, 65.25), abs=0.01)
    assert cifar["Bartoldson2024Adversarial_WRN-82-8"] == pytest.approx((32.285, 62.06), abs=0.01)
    assert cifar["Sehwag2021Proxy_R18"] == pytest.approx((24.71, 54.65), abs=0.01)
    assert all(printed - value > 17 for value, printed in implied.values())
