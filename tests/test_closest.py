"""The nearest errors: exact where the distance is known, never below it, and near it elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_nearest import in_cells
from torch import Tensor, nn

import wda
from wda import Threat, attack, distances
from wda.attacks.closest import _radius, _step
from wda.losses import margin
from wda.nets import from_module
from wda.norms import norm, support

NORMS = ("Linf", "L2", "L1")
each_norm = pytest.mark.parametrize("name", NORMS)


def affine(classes: int, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """An affine classifier, points in [0, 1], and its own answers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    x = torch.rand(20, 3, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    return model.to(dtype), x.to(dtype), y


def nearest_boundary(model: nn.Module, x: Tensor, y: Tensor, name: str, box: tuple[float, float] | None) -> Tensor:
    """The distance of an affine classifier's nearest error: bisection of the radius, for each rival."""
    layer = model[1].double()
    x = x.double()
    z = layer(x.flatten(1)).detach()
    best = torch.full((len(x),), math.inf, dtype=torch.float64)
    for rival in range(z.shape[1]):
        g = (layer.weight[rival] - layer.weight[y]).detach().view_as(x)
        gap = z.gather(1, y[:, None])[:, 0] - z[:, rival]
        low, high = torch.zeros_like(gap), torch.full_like(gap, 100.0)
        for _ in range(80):
            middle = (low + high) / 2
            reached = support(g, x, middle, name, box) >= gap
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        found = support(g, x, high, name, box) >= gap
        best = torch.where((y != rival) & found, best.minimum(high), best)
    return best


@each_norm
@pytest.mark.parametrize("box", [(0.0, 1.0), None], ids=str)
@pytest.mark.parametrize(
    ("classes", "seed", "dtype"),
    [(2, 0, torch.float32), (2, 1, torch.float64), (4, 2, torch.float64), (10, 3, torch.float32)],
    ids=str,
)
def test_affine_models_have_their_nearest_boundary_found(
    name: str, box: tuple[float, float] | None, classes: int, seed: int, dtype: torch.dtype
) -> None:
    model, x, y = affine(classes, seed, dtype)
    exact = nearest_boundary(model, x, y, name, box)
    found = distances(model.to(dtype), x, y, name, box).distance
    assert exact.isfinite().any()
    assert torch.equal(found.isfinite(), exact.isfinite())
    ratio = (found / exact)[exact.isfinite()]
    assert (ratio >= 1 - (1e-12 if dtype == torch.float64 else 1e-5)).all()
    # in single precision the logits of a sample near the boundary are known to about that share of its margin
    assert (ratio <= 1 + (1e-9 if dtype == torch.float64 else 2e-3)).all()


def nearest_in_cells(model: nn.Module, x: np.ndarray, label: int, name: str) -> float:
    """The exact distance of the nearest error in the unit square."""
    return in_cells(from_module(model), x, label, name, (0.0, 1.0))


@pytest.mark.parametrize("name", ["Linf", "L1"])
@pytest.mark.parametrize("seed", range(3))
def test_small_relu_networks_have_their_nearest_error_found(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    with torch.no_grad():
        model[0].weight *= 4
        model[0].bias -= model[0].weight.sum(1) / 2
    x = torch.rand(8, 2, dtype=torch.float64)
    y = model(x).argmax(1)
    found = distances(model, x, y, name).distance
    exact = torch.tensor(
        [nearest_in_cells(model, row, label, name) for row, label in zip(x.numpy(), y.tolist(), strict=True)],
        dtype=torch.float64,
    )
    assert torch.equal(found.isfinite(), exact.isfinite())
    reached = exact.isfinite()
    assert reached.any()
    # the solver's rows hold to 1e-7
    assert (found[reached] >= exact[reached] - 1e-6).all()
    assert (found / exact)[reached].median() < 1.01


@pytest.mark.parametrize("model", ["digits-mlp", "digits-cnn-adv", "digits-gelu"])
@each_norm
def test_nothing_that_other_attacks_find_is_much_nearer(model: str, name: str) -> None:
    """Beside DeepFool's walk, and PGD in growing balls: each with the budget spent in the best way."""
    x, y = wda.data.load("digits", n=40)
    network = wda.models.load(model)
    found = distances(network, x, y, name)
    walk = attack("deepfool", network, x, y, Threat(name, 1e3 if name != "Linf" else 1.0, "inf"))
    flipped = margin(walk.logits(network), walk.y)[: len(walk.moved)] >= 0
    deepfool = found.distance.clone().fill_(math.inf)
    deepfool[walk.moved_source[flipped]] = walk.distances()[flipped]
    right = (found.distance > 0) & deepfool.isfinite()
    share = (found.distance[right] <= deepfool[right] * 1.001).double().mean()
    assert share >= (0.9 if name == "L1" else 0.95)
    assert found.distance[right].sum() < deepfool[right].sum()
    for radius in torch.linspace(0.4, 1.4, 3) * found.distance[found.distance > 0].median():
        ball = attack("pgd", network, x, y, Threat(name, float(radius), "inf"), steps=30)
        ours = found.robust_accuracy(float(radius), "inf")
        assert ours <= ball.accuracy(network) + 0.02


def test_more_passes_find_nearer_errors() -> None:
    x, y = wda.data.load("digits", n=100)
    model = wda.models.load("digits-cnn-adv")
    few, some, many = (
        distances(model, x, y, steps=steps, restarts=restarts) for steps, restarts in ((10, 1), (30, 1), (30, 4))
    )
    assert few.distance.sum() > some.distance.sum() > many.distance.sum()
    # the first ascent is the same; the polish of another flip may end a little further away
    assert (many.distance <= some.distance * 1.01).all()
    assert few.counts.backward < some.counts.backward < many.counts.backward
    wrong = some.distance == 0
    assert some.counts.backward == pytest.approx((~wrong).double().mean().item() * (30 + 9 + 5)), "errors cost nothing"


def test_the_radius_shrinks_behind_the_boundary_and_grows_before_it() -> None:
    inf = math.inf
    radius = torch.tensor([inf, 1.0, 1.0, 1.0, 1.0, inf])
    linear = torch.tensor([0.7, 5.0, 1.2, 5.0, 9.0, inf])
    flipped = torch.tensor([False, False, False, True, False, False])
    nearest = torch.tensor([inf, inf, inf, 1.0, 2.0, inf])
    grown = _radius(radius, linear, flipped, nearest, rate=0.1)
    # to the linear distance at once; half again at the most; the linear distance; a tenth less; a tenth more; nothing
    torch.testing.assert_close(grown, torch.tensor([0.7, 1.5, 1.2, 0.9, 1.1, 0.0]))
    assert _radius(radius[4:5], linear[4:5], flipped[4:5], torch.tensor([1.0]), 0.1) < 1, "within the nearest flip"


@each_norm
@pytest.mark.parametrize("box", [(0.0, 1.0), None], ids=str)
def test_steps_point_uphill_and_are_as_long_as_the_radius_or_a_quarter_of_the_room(
    name: str, box: tuple[float, float] | None
) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(5, 3, 20)
    gradient[0] = 0
    radius = torch.tensor([1.0, 0.2, 0.5, 3.0, 9.0])
    step = _step(gradient, radius, name, box)
    assert torch.equal(step[0], gradient[0])
    assert ((gradient * step).flatten(1).sum(1)[1:] > 0).all()
    room = radius if box is None else radius.clamp(max=1)
    length, expected = (norm(step, "Linf"), room / 4) if name == "L1" else (norm(step, name), radius)
    torch.testing.assert_close(length[1:], expected[1:])


@each_norm
def test_neither_batch_size_nor_order_nor_duplicates_change_a_distance(name: str) -> None:
    x, y = wda.data.load("digits", n=12)
    x = torch.cat([x, x[:5]]).double()
    y = torch.cat([y, y[:5]])
    model = wda.models.load("digits-cnn-adv").double()
    found = distances(model, x, y, name, steps=10, restarts=2, batch_size=256).distance
    torch.testing.assert_close(found[12:], found[:5], rtol=1e-5, atol=0)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for rows, size in ((torch.arange(len(x)), 1), (torch.arange(len(x)), 7), (shuffled, 256)):
        again = distances(model, x[rows], y[rows], name, steps=10, restarts=2, batch_size=size).distance
        torch.testing.assert_close(again, found[rows], rtol=1e-5, atol=0)


@each_norm
def test_constant_logits_and_errors_at_the_sample_leave_it_where_it_is(name: str) -> None:
    def constant(x: Tensor) -> Tensor:
        return 0 * x[:, :2] + torch.tensor([1.0, 0.0])

    x = torch.rand(1, 4)
    with pytest.warns(wda.errors.Untrustworthy):
        right = distances(constant, x, torch.tensor([0]), name)
    wrong = distances(constant, x, torch.tensor([1]), name)
    assert right.distance.tolist() == [math.inf]
    assert wrong.distance.tolist() == [0]
    assert torch.equal(right.x_adv, x)
    assert torch.equal(wrong.x_adv, x)
