"""Certified radii: the distance itself where that is known, never beyond it elsewhere, and nothing left behind."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from test_closest import affine, nearest_boundary, nearest_in_cells
from test_soundness import random_network
from torch import Tensor, nn

import wda
from wda import nets
from wda.certificates.radius import METHODS, margin_bound, radius, verified
from wda.errors import NotPiecewiseAffine
from wda.losses import margin
from wda.models import Residual
from wda.norms import clamp, norm, project, support

NORMS = ("Linf", "L2", "L1")
PROPAGATED = ("optimised", "linear", "interval")
LEAST = torch.finfo(torch.float64).tiny
each_norm = pytest.mark.parametrize("name", NORMS)
each_box = pytest.mark.parametrize("box", [(0.0, 1.0), None], ids=str)


def accepts(method: str, name: str) -> bool:
    """Mixed-integer programs are for norms that are linear."""
    return method != "milp" or name != "L2"


each_pair = pytest.mark.parametrize(
    ("method", "name"), [pair for pair in itertools.product(METHODS, NORMS) if accepts(*pair)]
)


def small(seed: int, hidden: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network on the unit square, whose cells meet it, points, and its own answers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()
    with torch.no_grad():
        model[0].weight *= 4
        model[0].bias -= model[0].weight.sum(1) / 2
    x = torch.rand(8, 2, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def exact_distances(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    each = (nearest_in_cells(model, row, label, name) for row, label in zip(x.numpy(), y.tolist(), strict=True))
    return torch.tensor(list(each), dtype=torch.float64)


def sampled(net: nets.Net, x: Tensor, y: Tensor, reach: Tensor, name: str, box: tuple[float, float] | None) -> Tensor:
    """The largest margin among points of each ball: random ones, some at its corners, and steps uphill; (N,)."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.full((len(x),), -math.inf, dtype=torch.float64)
    around = reach.view(-1, *[1] * (x.ndim - 1))
    for k in range(15):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if k % 3 == 0:
            step = step.sign() if name == "Linf" else step * (step.abs() == norm(step, "Linf").view_as(around))
        point = project(x + around * step / norm(step, name).view_as(around), x, reach, name, box)
        for _ in range(3):
            point = point.detach().requires_grad_()
            value = margin(net(point), y)
            largest = largest.maximum(value.detach())
            (slope,) = torch.autograd.grad(value.sum(), point)
            point = project(point + around * slope / norm(slope, name).view_as(around).clamp(min=LEAST), x, reach, name)
            point = clamp(point, box)
    return largest


# -- the distance is known -------------------------------------------------------------------------------------------


@each_norm
@each_box
@pytest.mark.parametrize(("classes", "seed", "dtype"), [(2, 0, torch.float64), (10, 3, torch.float32)], ids=str)
def test_of_affine_models_it_is_the_distance(
    name: str, box: tuple[float, float] | None, classes: int, seed: int, dtype: torch.dtype
) -> None:
    model, x, y = affine(classes, seed, dtype)
    exact = nearest_boundary(model, x, y, name, box)
    model.to(dtype)
    assert exact.isfinite().any()
    for method in METHODS:
        if not accepts(method, name) or method == "auto":
            continue
        rows = slice(2 if method == "milp" else None)
        certified = radius(model, x[rows], y[rows], name, box, method=method, tolerance=1e-4)
        assert certified.dtype == torch.float64
        assert (certified > 0).all()
        assert (certified <= exact[rows] * (1 + 1e-12)).all(), method
        # intervals take the logits apart, and a Lipschitz constant knows no box
        if method not in ("interval", "lipschitz") or (method == "lipschitz" and box is None):
            torch.testing.assert_close(certified, exact[rows], rtol=1.1e-4, atol=0)


@pytest.mark.parametrize("name", ["Linf", "L1"])
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_no_certificate_goes_beyond_the_distance_and_each_method_is_better_than_the_last(name: str, seed: int) -> None:
    model, x, y = small(seed)
    x, y = x[:5], y[:5]
    exact, found = exact_distances(model, x, y, name), wda.distances(model, x, y, name, progress=False).distance
    reached = exact.isfinite()
    assert reached.any()
    mean = {}
    for method in ("lipschitz", "interval", "linear", "optimised", "milp"):
        certified = radius(model, x, y, name, method=method, tolerance=1e-2, progress=False)
        # the yardstick's own programs are solved to 1e-7
        assert (certified <= exact + 1e-6).all(), method
        assert (certified <= found).all(), method
        mean[method] = certified[reached].mean()
    assert mean["interval"] <= mean["linear"] * 1.01
    assert mean["linear"] <= mean["optimised"] * 1.01
    assert mean["optimised"] <= mean["milp"] * 1.01
    assert mean["lipschitz"] <= mean["milp"]
    assert float(mean["milp"]) == pytest.approx(float(exact[reached].mean()), rel=1e-4)


@each_norm
def test_no_point_of_a_certified_ball_is_an_error_whatever_the_layers(name: str) -> None:
    certain = 0
    for seed in range(3):
        net, box = random_network(seed), ((0.0, 1.0), None)[seed % 2]
        x = torch.rand(2, *net.shape, dtype=torch.float64)
        y = net(x).argmax(1)
        for method in ("linear", "optimised") if seed < 2 else ("linear",):
            certified = radius(net, x, y, name, box, method=method, tolerance=0.3)
            # where all of the box is safe, any ball will do
            reach = certified.clamp(max=10.0)
            assert (sampled(net, x, y, reach, name, box) < 0).all(), (seed, method)
            certain += int((certified > 1e-6).sum())
    assert certain > 6


@each_norm
@pytest.mark.parametrize("model", ["digits-mlp", "digits-cnn-adv", "digits-gelu"])
def test_bundled_models_have_no_error_within_the_radius(model: str, name: str) -> None:
    x, y = wda.data.load("digits", n=4)
    network = wda.models.load(model)
    found = wda.distances(network, x, y, name, steps=20, restarts=2, progress=False).distance
    certified = radius(network, x, y, name, method="linear", upper=found, tolerance=0.1)
    assert torch.equal(certified == 0, found == 0)
    assert (certified <= found).all()
    assert (certified[found > 0] > 0.1 * found[found > 0]).all()
    net = nets.from_module(network, x.shape[1:])
    assert (sampled(net, x.double(), y, certified, name, (0.0, 1.0))[certified > 0] < 0).all()


# -- special cases ---------------------------------------------------------------------------------------------------


def line(slope: float, offset: float) -> nn.Module:
    """On one coordinate: class 1 wins where slope * x + offset >= 0."""
    model = nn.Linear(1, 2).double()
    model.weight.data, model.bias.data = torch.tensor([[0.0], [slope]]).double(), torch.tensor([0.0, offset]).double()
    return model


@each_pair
def test_ties_and_errors_have_radius_zero(name: str, method: str) -> None:
    x, y = torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64), torch.tensor([0, 0, 0])
    found = radius(line(1.0, -0.5), x, y, name, method=method, tolerance=1e-6)
    assert found[1:].tolist() == [0, 0]
    assert found[0] == pytest.approx(0.3, rel=1e-5) if method not in ("interval",) else 0 < found[0] <= 0.3


@each_pair
def test_a_box_without_errors_is_safe_all_through(name: str, method: str) -> None:
    x, y = torch.tensor([[0.2], [0.9]], dtype=torch.float64), torch.tensor([0, 0])
    assert radius(line(0.0, -1.0), x, y, name, method=method).tolist() == [math.inf] * 2
    if method == "lipschitz":  # knows of no box, and so certifies a finite ball
        assert radius(line(1.0, -1.5), x, y, name, method=method).tolist() == pytest.approx([1.3, 0.6])
    else:
        assert radius(line(1.0, -1.5), x, y, name, method=method).tolist() == [math.inf] * 2
    beyond = radius(line(1.0, -1.5), x, y, name, box=None, method=method, tolerance=1e-6).tolist()
    assert beyond == pytest.approx([1.3, 0.6], rel=1e-4)


def test_the_box_makes_room() -> None:
    x, y = wda.data.load("digits", n=5)
    model = wda.models.load("digits-mlp")
    for name in NORMS:
        free, boxed, wide = (
            radius(model, x, y, name, box, method="linear", tolerance=0.01) for box in (None, (0.0, 1.0), (-9.0, 9.0))
        )
        assert (boxed >= free * 0.98).all()
        assert boxed.sum() > 1.03 * free.sum(), "most pixels are black: half of what could be done is forbidden"
        torch.testing.assert_close(wide, free, rtol=0.02, atol=0)


def test_the_largest_certified_radius_is_verified_and_what_is_much_larger_is_not() -> None:
    x, y = wda.data.load("digits", n=4)
    model = wda.models.load("digits-mlp")
    for method in PROPAGATED:
        certified = radius(model, x, y, "Linf", method=method, tolerance=0.01)
        for i, reach in enumerate(certified.tolist()):
            row = slice(i, i + 1)
            assert verified(model, x[row], y[row], "Linf", reach, method=method).all()
            assert not verified(model, x[row], y[row], "Linf", 1.3 * reach, method=method).any()


def test_what_is_known_already_shortens_the_search_without_changing_the_answer() -> None:
    x, y = wda.data.load("digits", n=6)
    model = wda.models.load("digits-mlp")
    plain = radius(model, x, y, method="linear", tolerance=0.01)
    found = wda.distances(model, x, y, progress=False).distance
    for upper in (found, torch.full_like(found, math.inf), found.where(torch.arange(6) % 2 == 0, math.inf)):
        limited = radius(model, x, y, method="linear", upper=upper, tolerance=0.01)
        torch.testing.assert_close(limited, plain, rtol=0.025, atol=0)
        assert (limited <= upper).all()
    assert (radius(model, x, y, method="linear", upper=plain / 2) <= plain / 2).all()


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 0.001])
def test_the_search_ends_as_near_as_asked_for(tolerance: float) -> None:
    x, y = wda.data.load("digits", n=4)
    model = wda.models.load("digits-mlp")
    fine = radius(model, x, y, "L2", method="linear", tolerance=1e-6)
    coarse = radius(model, x, y, "L2", method="linear", tolerance=tolerance)
    assert (coarse <= fine * (1 + 1e-5)).all()
    assert (coarse >= fine * (1 - tolerance) * (1 - 1e-5)).all()


# -- what must not matter, and what is left as it was ----------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("method", ["optimised", "linear", "interval", "lipschitz"])
def test_neither_the_batch_size_nor_the_order_of_the_samples_matters(name: str, method: str) -> None:
    model, x, y = small(1)
    x, y = x[:5], y[:5]
    y[2] = (y[2] + 1) % 3
    reference = radius(model, x, y, name, method=method, tolerance=0.2)
    assert reference[2] == 0
    again = radius(model, x, y, name, method=method, tolerance=0.2, batch_size=2)
    torch.testing.assert_close(again, reference, rtol=1e-7, atol=0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    shuffled = radius(model, x[order], y[order], name, method=method, tolerance=0.2, batch_size=1)
    torch.testing.assert_close(shuffled, reference[order], rtol=1e-7, atol=0)


def test_the_function_is_that_of_the_weights_in_double_precision_and_the_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    block = Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()), nn.Identity())
    model = nn.Sequential(block, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 6), nn.ReLU())
    model = nn.Sequential(*model, nn.Linear(6, 3))
    model[0].branch[1].running_mean.normal_()
    x = torch.rand(2, 2, 4, 4).requires_grad_()
    y = model.eval()(x).argmax(1).int()
    fast = {"method": "linear", "tolerance": 0.5}
    reference = {name: radius(model, x, y, name, **fast) for name in NORMS}
    assert all((certified > 0).all() for certified in reference.values())

    model.train()
    model[2].eval()
    model[4].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones(3, 6)
    modes = [module.training for module in model.modules()]
    state, before = {key: value.clone() for key, value in model.state_dict().items()}, x.detach().clone()
    random = torch.get_rng_state()
    for name in NORMS:
        torch.testing.assert_close(radius(model, x, y, name, **fast), reference[name], rtol=0, atol=0)
        assert verified(model, x, y, name, 1e-6).all()
    assert not radius(model, x[:1], y[:1], "L2", method="optimised", tolerance=0.5).requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[6].weight.grad, torch.ones(3, 6))
    assert not model[4].weight.requires_grad
    assert model[6].bias.requires_grad
    assert model[6].bias.grad is None
    assert x.grad is None
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    double = {name: radius(model.double(), x.double(), y, name, **fast) for name in NORMS}
    for name in NORMS:
        torch.testing.assert_close(double[name], reference[name], rtol=1e-6, atol=0)


def test_a_network_that_was_read_before_and_other_layouts_are_accepted() -> None:
    model, x, y = small(0)
    net = nets.from_module(model)
    reference = radius(model, x, y, method="linear")
    assert torch.equal(radius(net, x, y, method="linear"), reference)
    turned = x.T.contiguous().T
    assert not turned.is_contiguous()
    assert torch.equal(radius(model, turned, y, method="linear"), reference)
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(radius(model, x, y, method="linear"), reference)


# -- bounds over balls of given radii --------------------------------------------------------------------------------


@each_norm
@each_box
def test_margins_of_affine_models_are_bounded_by_their_largest_value(
    name: str, box: tuple[float, float] | None
) -> None:
    model, x, y = affine(4, 5, torch.float64)
    layer, radii = model[1], torch.tensor([0.3, 0.0, 0.05, 2.0])
    logits = model(x).detach()
    exact = torch.full((len(x), len(radii)), -math.inf, dtype=torch.float64)
    for rival in range(4):
        rows = (y != rival).nonzero()[:, 0]
        g = (layer.weight[rival] - layer.weight[y[rows]]).detach().view_as(x[rows])
        gap = logits[rows, rival] - logits[rows, y[rows]]
        for j, reach in enumerate(radii.tolist()):
            top = gap + support(g, x[rows], torch.full((len(rows),), reach, dtype=torch.float64), name, box)
            exact[rows, j] = exact[rows, j].maximum(top)
    for method in ("linear", "optimised"):
        bound = margin_bound(model, x, y, name, radii, box, method=method)
        assert (bound >= exact - 1e-12).all()
        torch.testing.assert_close(bound, exact, rtol=1e-6, atol=1e-7)


@each_norm
def test_bounds_of_margins_grow_with_the_radius_and_hold(name: str) -> None:
    model, x, y = small(2)
    x, y = x[:5], y[:5]
    radii = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.3, 1.0])
    net = nets.from_module(model)
    linear, optimised, plain = (
        margin_bound(model, x, y, name, radii, method=m) for m in ("linear", "optimised", "interval")
    )
    reaches = [torch.full((len(x),), reach, dtype=torch.float64) for reach in radii.tolist()]
    seen = torch.stack([sampled(net, x, y, reach, name, (0.0, 1.0)) for reach in reaches], 1)
    for bound in (linear, optimised, plain):
        assert (bound.diff(dim=1) >= 0).all()
        assert (seen <= bound + 1e-12).all()
    assert (linear <= plain + 1e-9).all()
    assert optimised.mean() <= linear.mean() + 1e-9
    assert optimised.mean() < linear.mean()
    torch.testing.assert_close(linear[:, 0], margin(model(x), y).detach(), rtol=1e-6, atol=1e-7)
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(margin_bound(model, x, y, name, radii[shuffled], method="linear"), linear[:, shuffled])
    torch.testing.assert_close(margin_bound(model, x, y, name, radii, method="linear", batch_size=1), linear)


# -- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -0.1, 1.5, math.nan, "x"])
def test_the_tolerance_is_between_0_and_1(bad: object) -> None:
    model, x, y = small(0)
    with pytest.raises(ValueError, match=r"tolerance=.*a number between 0 and 1 is accepted"):
        radius(model, x, y, tolerance=bad)


@pytest.mark.parametrize(("what", "options"), [
    ("norm='L3'.*'Linf', 'L2', 'L1'", {"norm": "L3"}),
    ("method='crown'.*'optimised'", {"method": "crown"}),
    ("box=\\(1, 0\\).*low < high", {"box": (1, 0)}),
    ("batch_size=0", {"batch_size": 0}),
    ("upper of shape \\(3,\\): 8 numbers >= 0", {"upper": torch.ones(3)}),
    ("upper of shape \\(8,\\): 8 numbers >= 0", {"upper": torch.full((8,), -1.0)}),
    ("upper of shape \\(8,\\): 8 numbers >= 0", {"upper": torch.full((8,), math.nan)}),
    ("outside box=\\(0.9, 1", {"box": (0.9, 1.0)}),
    ("time_limit=-1", {"time_limit": -1, "method": "milp"}),
    ("norm='L2'", {"norm": "L2", "method": "milp"}),
])  # fmt: skip
def test_an_error_names_the_argument_and_what_is_accepted(what: str, options: dict[str, object]) -> None:
    model, x, y = small(0)
    with pytest.raises(ValueError, match=what):
        radius(model, x, y, **options)


def test_labels_and_samples_are_checked() -> None:
    model, x, y = small(0)
    for labels, what in ((y + 3, "labels from 0 to K-1"), (y - 3, "labels from 0 to K-1")):
        with pytest.raises(ValueError, match=what):
            radius(model, x, labels)
    with pytest.raises(TypeError, match="an integer tensor"):
        radius(model, x, y.double())
    with pytest.raises(ValueError, match="x has NaN or infinite values, first in sample 3"):
        radius(model, x.index_fill(0, torch.tensor([3]), math.nan), y)


def test_weights_that_are_no_numbers_are_named() -> None:
    model, x, y = small(0)
    model[2].weight.data[1, 2] = math.nan
    for function in (radius, lambda *a: verified(*a, "Linf", 0.1)):
        with pytest.raises(ValueError, match=r"2\.weight has NaN or infinite values"):
            function(model, x, y)
    model[2].weight.data[1, 2] = 1e308
    model[0].weight.data *= 1e10
    with pytest.raises(ValueError, match=r"the logits of sample \d are NaN or infinite"):
        radius(model, x, y)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_cannot_be_bounded_is_named(method: str) -> None:
    x, y = wda.data.load("digits", n=2)
    with pytest.raises(NotPiecewiseAffine, match=r"LayerNorm '3\.branch\.0'"):
        radius(wda.models.load("digits-vit"), x, y, method=method)


def test_a_program_is_for_relu() -> None:
    x, y = wda.data.load("digits", n=2)
    with pytest.raises(NotPiecewiseAffine, match=r"GELU '2'.* mixed-integer program"):
        radius(wda.models.load("digits-gelu"), x, y, method="milp")


@pytest.mark.parametrize("name", ["Linf", "L1"])
def test_without_time_a_program_leaves_what_propagated_bounds_certify(name: str) -> None:
    model, x, y = small(0)
    x, y = x[:4], y[:4]
    exact = exact_distances(model, x, y, name)
    hasty = radius(model, x, y, name, method="milp", time_limit=0)
    assert (hasty <= exact + 1e-6).all()
    assert (hasty > 0).all()
    linear = radius(model, x, y, name, method="linear", tolerance=0.01)
    assert (hasty >= 0.5 * linear.clamp(max=1))[exact.isfinite()].all()


@pytest.mark.parametrize(("given", "meant"), [("8/255", 8 / 255), ("0.1", 0.1), (0, 0.0), (1, 1.0)])
def test_radii_may_be_given_as_fractions(given: float | str, meant: float) -> None:
    model, x, y = small(0)
    assert torch.equal(verified(model, x, y, "Linf", given), verified(model, x, y, "Linf", meant))


@pytest.mark.parametrize("bad", [-1, math.inf, math.nan, "8/0", "far", None])
def test_a_radius_to_verify_is_finite(bad: object) -> None:
    model, x, y = small(0)
    with pytest.raises((ValueError, TypeError), match=r"eps=.*a finite number >= 0"):
        verified(model, x, y, "Linf", bad)
    with pytest.raises(ValueError, match="method='milp'"):
        verified(model, x, y, "Linf", 0.1, method="milp")
    if isinstance(bad, float):
        with pytest.raises(ValueError, match=r"radii=.*finite numbers >= 0"):
            margin_bound(model, x, y, "Linf", torch.tensor([0.1, bad]))


def test_a_published_network_on_mnist(wda_data: Path) -> None:
    x, y = wda.data.load("mnist", n=4)
    model = wda.models.load("mnist_kw_small_eps0.1")
    assert verified(model, x, y, "Linf", 0.1, method="linear").sum() >= 3, "it was trained so that this can be proved"
