"""Adversarial distributions: atoms, masses, costs, audits and files."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from torch import Tensor, nn

import wda
from wda import AdversarialDistribution, BudgetExceeded, Threat, _transport
from wda.passes import Counts

NORMS = ("Linf", "L2", "L1")
each_norm = pytest.mark.parametrize("norm", NORMS)
from_points = AdversarialDistribution.from_points


def column(*values: float) -> Tensor:
    """A sample of points on a line."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


def random_distribution(seed: int, norm: str = "L2", n: int = 8, classes: int = 2) -> AdversarialDistribution:
    """Points in the plane, most of which move in part, some wholly, some not at all."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    weight[0], weight[1] = 0, 1
    y = torch.arange(n) % classes
    return from_points(x, x + 3 * noise, y, Threat(norm, eps=99.0, box=None), weight)


@pytest.fixture
def two_moves() -> AdversarialDistribution:
    """One sample that is wholly given away to two atoms, beside one that stays."""
    masses = torch.tensor([0.25, 0.25], dtype=torch.float64)
    threat = Threat("L2", 0.5, box=None)
    return AdversarialDistribution(column(0.0, 1.0), labels(0, 1), threat, column(0.5, -1.0), masses, labels(0, 0))


@pytest.fixture
def step() -> nn.Module:
    """A classifier of the line: class 1 where x > 0, with the logits (0, x)."""
    layers = [{"op": "linear", "weight": "w"}]
    return wda.models.build(layers, {"w": torch.tensor([[0.0], [1.0]])}).double()


# -- atoms and masses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1, 2, 5])
def test_masses_are_those_of_equation_10(kappa: int) -> None:
    x, y = column(0.1, 0.2, 0.3), labels(2, 0, 1)
    adv = from_points(x, x + 0.5, y, Threat(eps=1.0), weight=1 / kappa)
    stay = [] if kappa == 1 else [(1 - 1 / kappa) / 3] * 3
    assert adv.mass.tolist() == pytest.approx([1 / kappa / 3] * 3 + stay)
    assert torch.equal(adv.points, torch.cat([x + 0.5, x[: len(stay)]]))
    assert adv.source.tolist() == [0, 1, 2, *range(len(stay))]
    assert torch.equal(adv.y, y[adv.source])


def test_samples_that_do_not_move_keep_their_mass() -> None:
    x = column(0.1, 0.2, 0.3)
    adv = from_points(x, column(0.1, 0.9, 0.8), labels(0, 0, 0), Threat(eps=1.0), torch.tensor([1.0, 0.25, 0.0]))
    assert adv.moved_source.tolist() == [1]
    assert adv.weight.tolist() == [0, 0.25, 0]
    assert torch.equal(adv.x_adv, column(0.1, 0.9, 0.3))
    assert adv.mass.tolist() == pytest.approx([1 / 12, 1 / 3, 1 / 4, 1 / 3])


@given(st.integers(0, 1000), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_masses_are_positive_and_every_sample_hands_out_its_own(seed: int, n: int) -> None:
    adv = random_distribution(seed, n=n)
    assert (adv.mass > 0).all()
    assert adv.mass.sum().item() == pytest.approx(1, abs=1e-14)
    shares = torch.zeros(n, dtype=torch.float64).index_add(0, adv.source, adv.mass)
    assert shares.numpy() == pytest.approx(1 / n)


def test_a_sample_may_have_two_moved_atoms(two_moves: AdversarialDistribution) -> None:
    assert two_moves.points.flatten().tolist() == [0.5, -1, 1]
    assert two_moves.mass.tolist() == [0.25, 0.25, 0.5]
    assert two_moves.y.tolist() == [0, 0, 1]
    assert two_moves.transport_cost() == two_moves.wasserstein() == 0.375
    assert two_moves.audit() == 0.375


@pytest.mark.parametrize("view", ["x_adv", "weight"])
def test_the_view_of_one_atom_a_sample_refuses_two(two_moves: AdversarialDistribution, view: str) -> None:
    with pytest.raises(ValueError, match="sample 0 has 2 moved atoms: use points, mass and source"):
        getattr(two_moves, view)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x_adv": column(0.1)}, "x_adv is .*like x"),
        ({"x_adv": column(0.1, 0.2).float()}, "x_adv is .*float32"),
        ({"x_adv": [0.1, 0.2]}, "x_adv is list"),
        ({"x_adv": column(0.1, math.nan)}, "moved from sample 1 has NaN"),
        ({"x": column(0.1, 1.1)}, r"x has values in \[0.1, 1.1\], outside box"),
        ({"y": torch.tensor([0.0, 1.0])}, "y: an integer tensor"),
        ({"weight": 1.5}, "weight=1.5"),
        ({"weight": -0.1}, "weight=-0.1"),
        ({"weight": math.nan}, "weight=nan"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"weight": "all"}, "weight"),
    ],
    ids=str,
)
def test_from_points_names_what_is_wrong(changed: dict[str, object], named: str) -> None:
    good = {"x": column(0.1, 0.2), "x_adv": column(0.3, 0.4), "y": labels(0, 1), "threat": Threat(eps=1.0)}
    with pytest.raises((ValueError, TypeError), match=named):
        from_points(**{**good, **changed})


# -- accuracy and risk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_accuracy_and_risk_weigh_every_atom_by_its_mass(step: nn.Module, batch_size: int) -> None:
    x, y = column(0.5, 0.5, -0.5, 0.5), labels(1, 1, 0, 0)  # right, right, right, wrong
    adv = from_points(x, column(-1.0, 1.0, 0.0, 2.0), y, Threat(eps=9.0, box=None), column(0.25, 1.0, 0.75, 0.5)[:, 0])
    # right: 3/4 of the first, the second, 1/4 of the third, whose moved part is tied, and nothing of the last
    assert adv.accuracy(step, batch_size) == pytest.approx((0.75 + 1 + 0.25) / 4)
    margins = [0.25 * 1.0 - 0.75 * 0.5, -1.0, 0.75 * 0.0 - 0.25 * 0.5, 0.5 * 2.0 + 0.5 * 0.5]
    assert adv.risk(step, "margin", batch_size) == pytest.approx(sum(margins) / 4)


def test_risk_of_the_cross_entropy_by_hand(step: nn.Module) -> None:
    adv = from_points(column(0.0), column(2.0), labels(0), Threat(eps=9.0, box=None), 0.25)
    assert adv.risk(step) == pytest.approx(0.75 * math.log(2) + 0.25 * math.log(1 + math.exp(2)))


def test_evaluation_checks_labels_losses_and_batches(step: nn.Module) -> None:
    adv = from_points(column(0.0), column(1.0), labels(2), Threat(eps=1.0))
    with pytest.raises(ValueError, match="y has the label 2, the model has K=2"):
        adv.accuracy(step)
    with pytest.raises(ValueError, match="loss='hinge'"):
        adv.risk(step, "hinge")
    with pytest.raises(ValueError, match="batch_size=0"):
        adv.accuracy(step, batch_size=0)


# -- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 1000, math.inf])
def test_transport_cost_by_hand(order: float) -> None:
    x = torch.zeros(2, 2)
    x_adv, weight = torch.tensor([[6.0, 8.0], [0.0, 2.0]]), torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    adv = from_points(x, x_adv, labels(0, 1), Threat("L2", box=None), weight)
    # masses 1/6 and 1/2 move by 10 and 2
    expected = {1: 10 / 6 + 1, 2: math.sqrt(100 / 6 + 2), math.inf: 10.0, 1000: 10 * (1 / 6) ** 1e-3}[order]
    assert adv.transport_cost(order) == pytest.approx(expected)


@each_norm
def test_distances_are_in_the_norm_of_the_threat(norm: str) -> None:
    adv = from_points(torch.zeros(1, 1, 2), torch.tensor([[[3.0, -4.0]]]), labels(0), Threat(norm, box=None))
    assert adv.distances().tolist() == [{"Linf": 4, "L2": 5, "L1": 7}[norm]]
    assert adv.distances().dtype == torch.float64


def test_nothing_moved_costs_nothing() -> None:
    adv = from_points(column(0.5), column(0.5), labels(0), Threat(eps=0))
    assert adv.transport_cost() == adv.wasserstein() == adv.audit() == 0
    assert adv.mass.tolist() == [1]


def lp_wasserstein(adv: AdversarialDistribution, order: float) -> float:
    """W_p by one linear program over all couplings, where pairs of different labels may carry nothing."""
    metric = {"Linf": "chebyshev", "L2": "euclidean", "L1": "cityblock"}[adv.threat.norm]
    d = cdist(adv.x.flatten(1).double().numpy(), adv.points.flatten(1).double().numpy(), metric)
    n, m = d.shape
    same = adv.labels[:, None].numpy() == adv.y[None].numpy()
    marginals = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    sums = np.concatenate([np.full(n, 1 / n), adv.mass.numpy()])

    def solve(cost: np.ndarray, allowed: np.ndarray) -> float | None:
        bounds = [(0, None if free else 0) for free in allowed.ravel()]
        solution = linprog(cost.ravel(), A_eq=marginals, b_eq=sums, bounds=bounds)
        return solution.fun if solution.status == 0 else None

    if math.isinf(order):
        return next(t for t in np.unique(d[same]) if solve(np.zeros_like(d), same & (d <= t)) is not None)
    return solve(d**order, same) ** (1 / order)


@each_norm
@pytest.mark.parametrize("order", [1, 1.5, 2, math.inf])
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_wasserstein_agrees_with_a_linear_program(norm: str, order: float, classes: int, seed: int) -> None:
    adv = random_distribution(seed, norm, classes=classes)
    assert adv.wasserstein(order) == pytest.approx(lp_wasserstein(adv, order), rel=1e-6)


@pytest.mark.parametrize(
    ("kappa", "y", "cost", "exact"),
    [(1, (0, 0), 0.9, 0.1), (2, (0, 0), 0.45, 0.05), (1, (0, 1), 0.9, 0.9), (2, (0, 1), 0.45, 0.45)],
)
def test_a_coupling_may_cost_more_than_the_distance(kappa: int, y: tuple[int, int], cost: float, exact: float) -> None:
    """Row 10 of the audit: atoms that change places cost nothing to swap, unless their labels differ."""
    adv = from_points(column(0.0, 1.0), column(0.9, 0.1), labels(*y), Threat("L2", eps=1.0), 1 / kappa)
    assert adv.transport_cost() == pytest.approx(cost)
    assert adv.wasserstein() == pytest.approx(exact)


@pytest.mark.parametrize(("order", "share", "distance"), [(1, 0.5, 0.5), (2, 0.5, math.sqrt(0.5)), (2, 0.25, 0.5)])
def test_only_the_share_kappa_to_the_minus_p_stays_in_the_ball(order: int, share: float, distance: float) -> None:
    """Row 10 of the audit: kappa = 2, eps = 0.5. The paper's share 1/kappa is for p = 1; at p = 2 it costs 0.7071."""
    adv = from_points(column(0.0, 10.0), column(1.0, 11.0), labels(0, 0), Threat("L2", 0.5, order, box=None), share)
    assert adv.wasserstein() == adv.transport_cost() == pytest.approx(distance)


@each_norm
@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_wasserstein_resolves_small_moves_of_many_distant_points(norm: str, order: float) -> None:
    """Far from the origin |a|^2 - 2ab + |b|^2 cancels; small moves leave each sample nearest to its own atom."""
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.rand(40, 3, generator=generator, dtype=torch.float64)
    adv = from_points(x, x + 1e-6, torch.zeros(40, dtype=torch.int64), Threat(norm, box=None), 0.5)
    assert adv.wasserstein(order) == pytest.approx(adv.transport_cost(order), rel=1e-6)


@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(NORMS),
    order=st.sampled_from([1.0, 1.5, 2.0, math.inf]),
    kappa=st.floats(1, 4),
    name=st.sampled_from(["fgsm", "pgd", "deepfool", "wda"]),
)
@settings(max_examples=40, deadline=None)
def test_exact_distance_is_at_most_the_cost_and_the_cost_at_most_eps(
    seed: int, norm: str, order: float, kappa: float, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(12, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=generator)
    threat = Threat(norm, eps=0.2, order=order)
    kappa = 1.0 if math.isinf(order) else kappa
    adv = wda.attack(name, lambda z: z @ weight, x, y, threat, kappa=kappa, progress=False)
    cost = adv.audit()
    assert adv.wasserstein() <= cost * (1 + 1e-9) + 1e-12
    assert cost <= threat.eps


@pytest.mark.parametrize("function", ["transport_cost", "wasserstein"])
@pytest.mark.parametrize("order", [0.5, math.nan, "second"])
def test_a_bad_order_is_named(function: str, order: object) -> None:
    with pytest.raises(ValueError, match="order="):
        getattr(random_distribution(0), function)(order)


# -- audit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, math.inf])
@each_norm
def test_audit_has_no_tolerance(order: float, norm: str) -> None:
    x, y, threat = column(0, 0, 0, 0), labels(0, 0, 0, 0), Threat(norm, eps=0.3, order=order)
    assert from_points(x, x + 0.3, y, threat).audit() == 0.3
    over = x + math.nextafter(0.3, 1)
    with pytest.raises(BudgetExceeded, match=r"transport cost .* exceeds eps=0.3 .* by 5.55e-17"):
        from_points(x, over, y, threat).audit()


@pytest.mark.parametrize(("order", "worst"), [(1, 2), (2, 2), (4, 1), (math.inf, 1)])
def test_audit_names_the_sample_that_contributes_most(order: float, worst: int) -> None:
    adv = from_points(
        column(0, 0, 0), column(0.1, 0.9, 0.8), labels(0, 0, 0), Threat("L2", 0.05, order), column(1.0, 0.7, 1.0)[:, 0]
    )
    with pytest.raises(BudgetExceeded, match=f"sample {worst}, moved by {adv.distances()[worst].item()!r} with mass"):
        adv.audit()


def test_audit_in_another_ball() -> None:
    adv = from_points(torch.zeros(2, 2), torch.full((2, 2), 0.5), labels(0, 1), Threat("Linf", eps=0.5))
    assert adv.audit() == 0.5
    assert adv.audit(Threat("L1", eps=1.0)) == 1.0
    with pytest.raises(BudgetExceeded, match=r"W_1 L1 0\.9"):
        adv.audit(Threat("L1", eps=0.9))
    with pytest.raises(BudgetExceeded, match=r"W_1 Linf 0\.4"):
        adv.audit(Threat("Linf", eps=0.4))
    with pytest.raises(BudgetExceeded, match="leaves box"):
        adv.audit(Threat("Linf", eps=0.4, box=(0.0, 0.4)))


@pytest.mark.parametrize("outside", [math.nextafter(1, 2), -5e-324])
def test_audit_of_the_box_has_no_tolerance(outside: float) -> None:
    adv = from_points(column(0.5, 0.5), column(0.6, outside), labels(0, 0), Threat(eps=1.0))
    with pytest.raises(BudgetExceeded, match=r"atom from sample 1 leaves box=\(0.0, 1.0\) by .*wda.norms.clamp"):
        adv.audit()
    assert from_points(adv.x, wda.norms.clamp(adv.x_adv, (0, 1)), labels(0, 0), Threat(eps=1.0)).audit() < 1


def own_attack(seed: int, norm: str, dtype: torch.dtype, eps: float, kappa: float) -> tuple[Tensor, Tensor]:
    """Images and, about kappa * eps away from them, points as one writes them: neither projected nor rounded."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(49, 1, 8, 8, generator=generator).to(dtype)
    direction = wda.norms.dual_maximiser(torch.randn(x.shape, generator=generator).to(dtype), norm)
    return x, x + kappa * eps * direction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("norm", "order", "kappa"), [("Linf", 1, 1), ("Linf", 2, 2), ("L2", math.inf, 1), ("L1", 1, 3)]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_advice_on_rounding_works(norm: str, order: float, kappa: float, dtype: torch.dtype, seed: int) -> None:
    """The expression in the message is run as it stands; R is the one it states."""
    eps = 8 / 255
    x, x_adv = own_attack(seed, norm, dtype, eps, kappa)
    y, threat = torch.zeros(49, dtype=torch.int64), Threat(norm, eps, order, box=None)
    share = 1.0 if math.isinf(order) else kappa**-order
    # a millionth more than allowed, as single precision may make it
    with pytest.raises(BudgetExceeded, match="this is rounding") as error:
        from_points(x, x + (1 + 1e-6) * (x_adv - x), y, threat, share).audit()
    assert f"R = (1 - 1e-9) * eps, or kappa times that where each sample moves the share kappa**-{'order'}" in str(
        error.value
    )
    expression = str(error.value).split("use ")[1].split(" with R")[0]
    inside = eval(expression, {"wda": wda, "x": x, "x_adv": x_adv, "R": kappa * (1 - 1e-9) * eps})
    assert from_points(x, inside, y, threat, share).audit() <= eps


def test_more_than_rounding_is_not_called_so() -> None:
    x, x_adv = own_attack(0, "Linf", torch.float32, 8 / 255, 1.0001)
    with pytest.raises(BudgetExceeded) as error:
        from_points(x, x_adv, torch.zeros(49, dtype=torch.int64), Threat("Linf", "8/255", box=None)).audit()
    assert "rounding" not in str(error.value)


def test_a_distribution_shows_its_size_and_its_ball(two_moves: AdversarialDistribution) -> None:
    assert repr(two_moves) == "AdversarialDistribution(2 samples, 2 moved atoms, W_1 L2 0.5)"


@pytest.mark.parametrize("masses", [(0.25, 0.2500001), (0.6, -0.1), (-0.1, 0.2), (math.nan, 0.1)], ids=str)
def test_audit_refuses_masses_that_a_sample_does_not_have(
    two_moves: AdversarialDistribution, masses: tuple[float, float]
) -> None:
    threat, mass = Threat("L2", 9.0, box=None), torch.tensor(masses, dtype=torch.float64)
    bad = dataclasses.replace(two_moves, moved_mass=mass, threat=threat)
    with pytest.raises(BudgetExceeded, match="sample 0"):
        bad.audit()


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "threat", [Threat("L1", "1/3", 1.1), Threat("L2", 1.0, math.inf, (-1.0, 2.0)), Threat(box=None)], ids=str
)
def test_load_gives_back_what_was_saved(tmp_path: Path, dtype: torch.dtype, threat: Threat) -> None:
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, weight = labels(0, 1, 2, 0, 1), torch.tensor([0.1, 1.0, 0.0, 0.3, 0.5])
    adv = from_points(x, (x * 0.9).to(dtype), y, threat, weight, Counts(1.2, 3.0, 0.1))
    adv.save(tmp_path / "new" / "adv.npz")
    loaded = AdversarialDistribution.load(tmp_path / "new" / "adv.npz")
    for field in dataclasses.fields(adv):
        before, after = getattr(adv, field.name), getattr(loaded, field.name)
        if isinstance(before, Tensor):
            assert after.dtype == before.dtype
            assert torch.equal(after, before)
        else:
            assert after == before


OTHER_KINDS = {
    "empty": lambda path, whole: path.write_bytes(b""),
    "text": lambda path, whole: path.write_text("hello"),
    "truncated": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "damaged": lambda path, whole: path.write_bytes(whole[:300] + bytes(len(whole) - 600) + whole[-300:]),
    "npy": lambda path, whole: np.save(path.open("wb"), np.zeros(3)),
    "pickle": lambda path, whole: np.save(path.open("wb"), np.array([{}]), allow_pickle=True),
    "npz without description": lambda path, whole: np.savez(path, x=np.zeros(3)),
    "npz with another description": lambda path, whole: np.savez(
        path, about=np.array("{}"), x=0, labels=0, moved=0, moved_mass=0, moved_source=0
    ),
    "folder": lambda path, whole: path.mkdir(),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_load_says_that_a_file_is_of_another_kind(tmp_path: Path, kind: str) -> None:
    random_distribution(0).save(tmp_path / "whole.npz")
    path = tmp_path / "other.npz"
    OTHER_KINDS[kind](path, (tmp_path / "whole.npz").read_bytes())
    with pytest.raises(
        ValueError, match=r"path='.*other.npz' is no saved AdversarialDistribution.*written by adv.save"
    ) as error:
        AdversarialDistribution.load(path)
    assert "pickle" not in str(error.value)  # NumPy's advice for such a file is to load it unsafely


def test_load_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        AdversarialDistribution.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    path = tmp_path / "adv.npz"
    random_distribution(0).save(path)
    old = path.read_bytes()

    def interrupted(file: object, **arrays: object) -> None:
        file.write(b"half")
        raise failure

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(failure):
        random_distribution(1).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    random_distribution(0).save(tmp_path / "adv.npz")
    (tmp_path / "plain").touch()
    assert os.stat(tmp_path / "adv.npz").st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the folder .*file cannot be written"):
        random_distribution(0).save(tmp_path / "file" / "adv.npz")


# -- high orders and small masses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 4.5, 5, 10, 20, 50])
@pytest.mark.parametrize("seed", range(4))
def test_high_orders_agree_with_an_assignment_solver(order: float, seed: int) -> None:
    """Equal masses make transport an assignment, which SciPy solves on its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    moved = x + 0.05 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    adv = AdversarialDistribution.from_points(x, moved, torch.zeros(12, dtype=torch.int64), Threat("L2", 1, box=None))
    cost = torch.cdist(x, moved, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    scale = adv.distances().max().item()
    rows, columns = linear_sum_assignment((cost / scale) ** order)
    best = scale * ((cost[rows, columns] / scale) ** order).mean() ** (1 / order)
    assert adv.wasserstein(order) == pytest.approx(best, rel=1e-9)
    assert adv.wasserstein(order) <= adv.transport_cost(order)


@pytest.mark.parametrize("weight", [1.0, 1e-6, 1e-12, 2.0**-50])
def test_a_small_mass_counts_in_the_bottleneck(weight: float) -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    adv = AdversarialDistribution.from_points(x, x + 0.5, torch.zeros(1, dtype=torch.int64), Threat("Linf", 1), weight)
    assert adv.wasserstein(math.inf) == 0.5


@pytest.mark.parametrize("order", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("step", [1e-3, 1e-5])
def test_small_moves_of_shuffled_samples_are_resolved(order: float, step: float) -> None:
    """Samples swap places and move a little: the plan to find is short, the coupling given is long."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 2, generator=generator, dtype=torch.float64)
    near = x + step * torch.randn(60, 2, generator=generator, dtype=torch.float64)
    swapped = near[torch.arange(60) ^ 1]
    adv = AdversarialDistribution.from_points(x, swapped, torch.zeros(60, dtype=torch.int64), Threat("L2", 1, box=None))
    cost = torch.cdist(x, swapped, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    scale = 4 * step
    power = np.minimum((cost / scale) ** order, 1e6)
    rows, columns = linear_sum_assignment(power)
    best = scale * power[rows, columns].mean() ** (1 / order)
    assert best < adv.transport_cost(order) / 10
    assert adv.wasserstein(order) == pytest.approx(best, rel=1e-9)


def test_a_mass_that_is_no_mass_is_named() -> None:
    x, y = torch.zeros(2, 1), torch.tensor([0, 1])
    for mass in (-0.1, math.nan):
        adv = AdversarialDistribution(
            x, y, Threat("L2", 1), x[1:] + 0.5, torch.tensor([mass], dtype=torch.float64), torch.tensor([1])
        )
        with pytest.raises(BudgetExceeded, match=f"moved from sample 1 has mass {mass}"):
            adv.audit()


# -- bounds, and what memory they take -------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("order", [1, 1.5, 2, 7, math.inf])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_bounds_enclose_the_exact_distance(norm: str, order: float, classes: int, seed: int) -> None:
    adv = random_distribution(seed, norm, classes=classes)
    lower, upper = adv.wasserstein_bounds(order)
    blocks = adv._blocks()
    exact = min(_transport.exact_cost(blocks, len(adv.x), norm, order), upper)
    assert 0 <= lower <= exact * (1 + 1e-9)
    assert upper == adv.transport_cost(order)
    assert adv.wasserstein(order) == pytest.approx(exact, rel=1e-9)


def line(n: int, step: float, shuffle: bool = False) -> AdversarialDistribution:
    """n samples of one label at the whole numbers, all moved by `step`, and perhaps shuffled."""
    x = torch.arange(n, dtype=torch.float64)[:, None]
    there = x.flip(0) if shuffle else x
    return AdversarialDistribution.from_points(
        x, there + step, torch.zeros(n, dtype=torch.int64), Threat("L1", 1, box=None)
    )


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_short_moves_of_many_samples_are_exact_without_a_matrix_of_all_pairs(
    order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    distances = _transport._distances
    monkeypatch.setattr(
        _transport,
        "_distances",
        lambda *a: sizes.append(len(a[0]) * len(a[1])) or distances(*a),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(_transport, "_plan", lambda *_: pytest.fail("a solver was called"))
    adv = line(5000, 0.25)
    assert adv.wasserstein(order) == pytest.approx(0.25, rel=1e-12)
    lower, upper = adv.wasserstein_bounds(order)
    assert lower <= 0.25 * (1 + 1e-12)
    assert lower == pytest.approx(upper, rel=1e-9)
    assert max(sizes) <= 2**22 < 5000**2
    assert sum(sizes) == 2 * 5000**2


def test_what_takes_much_memory_is_said_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_transport, "exact_cost", lambda *_: 0.0)
    line(1000, 0.25, shuffle=True).wasserstein()
    assert not caplog.records
    line(4000, 0.25, shuffle=True).wasserstein()
    [record] = caplog.records
    assert "of 4000 samples and 4000 atoms takes about 1.6 GB of memory; wasserstein_bounds()" in record.getMessage()


def test_the_lower_bound_knows_of_other_couplings() -> None:
    """A shuffled sample costs little to reach; a lower bound by the coupling's own moves would be wrong."""
    adv = line(30, 0.25, shuffle=True)
    lower, upper = adv.wasserstein_bounds(1)
    assert lower == pytest.approx(adv.wasserstein(1)) == pytest.approx(0.25)
    assert upper > 10
