"""Bounds for networks too large to enumerate: sound at sampled points, exact where a closed form exists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import wda
from wda.cells import enumerate as cells_of
from wda.certificates import activations, bounds, gains, pooling, propagation
from wda.certificates.propagation import margins
from wda.errors import NotPiecewiseAffine
from wda.models import Residual
from wda.nets import Net, from_module
from wda.norms import dual, dual_maximiser, norm, project, support

NORMS = ("Linf", "L2", "L1")
SLACK = 1 + 1e-8


def normalised(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with statistics of its own, one scale of which is negative."""
    layer = nn.BatchNorm2d(channels)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def perceptron(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(16, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3))
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: perceptron(nn.ReLU),
    "gelu": lambda: perceptron(nn.GELU),
    "gelu-tanh": lambda: perceptron(lambda: nn.GELU("tanh")),
    "silu": lambda: perceptron(nn.SiLU),
    "softplus": lambda: perceptron(lambda: nn.Softplus(beta=3)),
    "sigmoid": lambda: perceptron(nn.Sigmoid),
    "residual": lambda: nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), normalised(2), nn.ReLU()),
        Residual(
            nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1)),
            nn.Conv2d(2, 3, 1, stride=2),
        ),
        *(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3)),
    ),
    "max pooling": lambda: nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    ),
    "overlapping max pooling": lambda: nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2, stride=1, padding=1), nn.SiLU()),
        *(nn.MaxPool2d((3, 2), stride=2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(3)),
    ),
}


def network(name: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    module = NETWORKS[name]()
    module.eval()(torch.zeros(1, 1, 4, 4))  # the lazy layers
    for parameter in module.parameters():
        parameter.data *= 1.5
    return from_module(module, (1, 4, 4))


def points_in(centre: Tensor, radius: float, name: str, box: tuple[float, float] | None, count: int) -> Tensor:
    """Points of the ball and the box, most of them far out: (count, *shape)."""
    step = torch.randn(count, *centre.shape[1:], dtype=torch.float64)
    step[: count // 4] = step[: count // 4].sign()
    step[count // 4 : count // 2] *= torch.rand_like(step[count // 4 : count // 2]) < 0.1
    length = norm(step, name).clamp(min=1e-9).view(-1, 1, 1, 1)
    return wda.norms.clamp(centre + radius * step / length * (1 - 1e-12), box)


def attacked(
    net: Net, rows: Tensor, centre: Tensor, radius: float, name: str, box: tuple[float, float] | None
) -> Tensor:
    """Points of the ball and the box where the rows of the logits are large or small: projected steepest ascent."""
    goals = torch.cat([rows, -rows])
    points = centre.expand(len(goals), *centre.shape[1:])
    for k in range(6):
        points = points.detach().requires_grad_()
        (slope,) = torch.autograd.grad((net(points) * goals).sum(), points)
        step = radius / (1 + k) * dual_maximiser(slope, name)
        points = project(points.detach() + step, centre.expand_as(points), radius * (1 - 1e-12), name, box)
    return points


def escape(net: Net, name: str, box: tuple[float, float] | None, radius: float, seed: int) -> float:
    """By how much sampled or attacked points leave any of the bounds: of all values, by two methods, and of margins."""
    torch.manual_seed(seed)
    centre = torch.rand(2, *net.shape, dtype=torch.float64)
    rows = margins(net, list(itertools.permutations(range(3), 2)))
    reach = radius * torch.ones(1, 1, 1, 1, dtype=torch.float64)
    intervals = propagation.interval(net, centre - reach, centre + reach)
    relaxed = propagation.relax(net, centre, radius, name, box)
    place = pooling.without_pooling(net)[1]
    sides = [(relaxed.least(rows, steps), -relaxed.least(-rows, steps)) for steps in (0, 3)]
    worst = -math.inf
    for k in range(2):
        found = attacked(net, rows, centre[k : k + 1], radius, name, box)
        points = torch.cat([points_in(centre[k : k + 1], radius, name, box, 2000), found])
        values = net.values(points)
        known = [(a[k], b[k], v) for (a, b), v in zip(intervals, values, strict=True)]
        known += [(*(side[k] for side in relaxed.bounds[i]), v) for i, v in zip(place, values, strict=True)]
        known += [(low[k], high[k], values[-1] @ rows.T) for low, high in sides]
        worst = max(worst, *(float(torch.maximum(a - v, v - b).max()) for a, b, v in known))
    return worst


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_no_point_leaves_the_bounds(kind: str, name: str) -> None:
    for seed, (box, radius) in enumerate([(None, 2.0), ((0.0, 1.0), 0.1), ((0.0, 1.0), 2.0)]):
        assert escape(network(kind, seed), name, box, radius, seed) <= 0


@pytest.mark.parametrize("flaw", ["upper", "lower", "upper_offset"])
@pytest.mark.parametrize("kind", ["relu", "gelu", "max pooling"])
def test_a_wrong_line_is_caught_by_the_same_check(kind: str, flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for lines in ("relu_lines", "bent_lines"):
        true = getattr(propagation, lines)

        def wrong(*arguments: Tensor, true: Callable = true) -> activations.Lines:
            line = true(*arguments)
            return line._replace(**{flaw: getattr(line, flaw) * (3 if flaw == "lower" else 0.5)})

        monkeypatch.setattr(propagation, lines, wrong)
    assert any(escape(network(kind, seed), "Linf", None, 0.3, seed) > 1e-3 for seed in range(6))


def coupled(factor: float, seed: int) -> Net:
    """V ReLU(Wx) - factor V W x: a slope of `factor` below ReLU would cancel all of it."""
    torch.manual_seed(seed)
    first, last, shortcut = nn.Linear(16, 4), nn.Linear(4, 3), nn.Linear(16, 3)
    shortcut.weight.data = -factor * last.weight.data @ first.weight.data
    return from_module(
        nn.Sequential(nn.Flatten(), Residual(nn.Sequential(first, nn.ReLU(), last), shortcut)), (1, 4, 4)
    )


@pytest.mark.parametrize("factor", [1.5, -1.0])
def test_a_slope_outside_0_1_is_caught_by_the_same_check(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = [coupled(factor, seed) for seed in range(3)]
    assert max(escape(net, "Linf", None, 1.0, 0) for net in nets) <= 0
    true = propagation.Relaxation._pull_back

    def wrong(
        known: propagation.Relaxation, value: int, rows: Tensor, of: Tensor, slopes: dict, *rest: object
    ) -> Tensor:
        steeper = {i: factor * slope for i, slope in slopes.items()}
        return true(known, value, rows, of, steeper, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(propagation.Relaxation, "_pull_back", wrong)
    assert max(escape(net, "Linf", None, 1.0, 0) for net in nets) > 1e-2


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", ["relu", "residual", "max pooling", "overlapping max pooling", "gelu"])
def test_optimised_slopes_are_never_worse(kind: str, name: str) -> None:
    better = []
    for seed, box in enumerate((None, (0.0, 1.0))):
        net = network(kind, seed)
        centre, rows = torch.rand(3, *net.shape, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        radius = torch.tensor([0.0, 0.3, 3.0])
        relaxed = propagation.relax(net, centre, radius, name, box)
        low = torch.stack([relaxed.least(rows, steps) for steps in (0, 1, 5)])
        high = -torch.stack([relaxed.least(-rows, steps) for steps in (0, 1, 5)])
        assert (low.diff(dim=0) >= 0).all()
        assert (high.diff(dim=0) <= 0).all()
        steps, at = ((0, 0), (5, 2))[seed]  # `linear` gives the same
        both = propagation.linear(net, rows, centre, radius, name, box, steps=steps)
        torch.testing.assert_close(both, (low[at], high[at]))
        better.append(float((low[-1] - low[0]).sum()))
    has_relu = any(node.activation == "relu" for node in pooling.without_pooling(net)[0].nodes)
    assert (max(better) > 1e-3) == has_relu


def triangles(net: Net, row: Tensor, centre: Tensor, radius: float) -> float:
    """The least value of a row of the logits where each ReLU is put into its triangle: a linear program in "Linf"."""
    import cvxpy as cp

    seen = [(low[0].numpy(), high[0].numpy()) for low, high in propagation.preactivations(net, centre, radius, "Linf")]
    x = cp.Variable(net.n)
    value: cp.Expression = x
    limits = [cp.abs(x - centre.flatten().numpy()) <= radius]
    for node in net.nodes[1:]:  # after Flatten
        if node.kind == "affine":
            value = node.layer.weight.numpy() @ value + node.layer.bias.numpy()  # type: ignore[union-attr, operator]
        else:
            low, high = seen.pop(0)
            after = cp.Variable(len(low), nonneg=True)
            limits.append(after >= value)
            for k in range(len(low)):
                chord = high[k] * (value[k] - low[k]) / (high[k] - low[k]) if low[k] < 0 < high[k] else None
                limits.append(after[k] <= chord if chord is not None else after[k] == (value[k] if low[k] >= 0 else 0))
            value = after
    return float(cp.Problem(cp.Minimize(row.numpy() @ value), limits).solve(solver=cp.CLARABEL))


def test_the_best_slopes_solve_the_linear_program_of_triangles() -> None:
    """Salman et al. (2019): with the bounds of the pre-activations given, the two are dual to each other."""
    closed = []
    for seed in range(5):
        net = network("relu", seed)
        centre, row = torch.rand(1, *net.shape, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
        first, last = (propagation.linear(net, row, centre, 0.3, "Linf", steps=steps)[0] for steps in (0, 60))
        best = triangles(net, row[0], centre, 0.3)
        assert float(last) <= best + 1e-6
        if best > first + 1e-3:
            closed.append(float((last - first) / (best - first)))
    assert len(closed) >= 2
    assert min(closed) > 0.95


@pytest.mark.parametrize("name", NORMS)
def test_linear_bounds_of_an_affine_network_are_exact(name: str) -> None:
    torch.manual_seed(1)
    net = from_module(nn.Sequential(nn.Conv2d(1, 2, 2), normalised(2), nn.Flatten(), nn.Linear(18, 3)), (1, 4, 4))
    centre, radius = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.5, 2.0])
    rows = torch.randn(5, 3, dtype=torch.float64)
    J = net.jacobian(centre)
    for box in (None, (0.0, 1.0)):
        low, high = propagation.linear(net, rows, centre, radius, name, box)
        for k, row in itertools.product(range(3), range(5)):
            g, value = (rows[row] @ J[k]).view(1, 1, 4, 4), float(net(centre[k : k + 1])[0] @ rows[row])
            up, down = (float(support(s * g, centre[k : k + 1], radius[k : k + 1], name, box)) for s in (1, -1))
            assert float(high[k, row]) == pytest.approx(value + up, rel=1e-6, abs=1e-7)
            assert float(low[k, row]) == pytest.approx(value - down, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", NORMS)
def test_support_agrees_with_a_convex_solver(name: str) -> None:
    import cvxpy as cp

    torch.manual_seed(2)
    g, anchor = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    g[0, 1:3] = 0
    g[1] = g[1].sign()  # ties
    radius = torch.tensor([0.05, 0.3, 0.8, 1.2, 5.0, 0.0])
    for box in (None, (0.0, 1.0), (-0.2, 3.0)):
        found = support(g, anchor, radius, name, box)
        for k in range(6):
            x, start = cp.Variable(5), anchor[k].numpy()
            limits = [cp.norm(x - start, {"Linf": "inf", "L2": 2, "L1": 1}[name]) <= float(radius[k])]
            limits += [] if box is None else [x >= box[0], x <= box[1]]
            best = cp.Problem(cp.Maximize(g[k].numpy() @ (x - start)), limits).solve(solver=cp.CLARABEL)
            assert float(found[k]) == pytest.approx(best, abs=1e-6)
    assert not support(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, name, (0.0, 1.0)).any()


@pytest.mark.parametrize("kind", ["residual", "overlapping max pooling", "silu"])
def test_a_batch_gives_what_its_samples_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(kind)
    centre, radius = torch.rand(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.4, 0.0])
    rows = torch.randn(4, 2, 3, dtype=torch.float64)
    together = propagation.linear(net, rows, centre, radius, "L2", (0.0, 1.0))
    monkeypatch.setattr(propagation, "_CHUNK", 200)  # a few rows at a time
    for k in range(4):
        alone = propagation.linear(net, rows[k], centre[k : k + 1], radius[k : k + 1], "L2", (0.0, 1.0))
        for side, other in zip(together, alone, strict=True):
            torch.testing.assert_close(side[k : k + 1], other)
    values = (rows[3] @ net(centre[3:])[0]).expand(2, 2)  # a ball of radius 0
    torch.testing.assert_close(torch.stack([side[3] for side in together]), values, rtol=1e-6, atol=1e-6)


def test_rows_may_be_of_any_samples_in_any_order() -> None:
    net = network("residual")
    relaxed = propagation.relax(net, torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.2, 1.0]), "Linf")
    rows, of = torch.randn(5, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 0, 2])
    for steps in (0, 2):
        everywhere = relaxed.least(rows, steps)
        torch.testing.assert_close(relaxed.least(rows, steps, of), everywhere[of, torch.arange(5)])


def test_backward_bounds_beat_intervals() -> None:
    net = network("relu")
    centre = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    intervals = propagation.interval(net, centre - 0.1, centre + 0.1)
    for node, (low, high) in zip(net.activations, propagation.preactivations(net, centre, 0.1, "Linf"), strict=True):
        least, largest = intervals[node.inputs[0]]
        assert (low >= least - 1e-7).all()
        assert (high <= largest + 1e-7).all()
    for refine in (0, 6, math.inf):
        low, high = propagation.linear(net, torch.eye(3), centre, 0.1, "Linf", refine=refine)
        assert (low <= net(centre)).all()
        assert (net(centre) <= high).all()
    assert ((high - low) < (intervals[-1][1] - intervals[-1][0])).all()


@pytest.mark.parametrize("options", [
    {"kernel_size": 2}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": 2, "dilation": 3}, {"kernel_size": 3, "stride": 2, "ceil_mode": True},
])  # fmt: skip
def test_a_network_without_pooling_is_the_same_function(options: dict) -> None:
    torch.manual_seed(0)
    net = from_module(nn.Sequential(nn.MaxPool2d(**options), nn.Flatten()), (2, 6, 5))
    flat, place = pooling.without_pooling(net)
    x = torch.randn(50, 2, 6, 5, dtype=torch.float64)
    assert {node.kind for node in flat.nodes} <= {"affine", "sum", "activation"}
    for old, new in zip(net.values(x), [flat.values(x)[i] for i in place], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-13)


def convolutions() -> Iterator[tuple[nn.Conv2d, int, int]]:
    for k, (stride, padding, dilation, groups) in enumerate(itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2))):
        torch.manual_seed(k)
        kernel = (3, 2 + k % 2)
        yield nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups).double(), 7, 6
    yield nn.Conv2d(2, 3, 3, padding="same", dilation=2).double(), 6, 6
    yield nn.Conv2d(2, 3, 3, padding="valid").double(), 6, 6
    yield nn.Conv2d(1, 2, 5, stride=4, padding=4).double(), 5, 9


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_convolutions(name: str) -> None:
    for layer, height, width in convolutions():
        net = from_module(nn.Sequential(layer, nn.Flatten()), (layer.in_channels, height, width))
        unit = torch.eye(layer.in_channels * height * width, dtype=torch.float64)
        image = net.nodes[0].linear(unit.view(-1, layer.in_channels, height, width))  # type: ignore[misc]
        exact = torch.linalg.matrix_norm(image.flatten(1).T, {"Linf": math.inf, "L2": 2, "L1": 1}[name])
        assert gains.layer_norm(net, 1, name) == pytest.approx(float(exact), rel=1e-9)
        if name == "L2":
            assert gains.circular_norm(layer, (height, width)) >= exact * (1 - 1e-12)


def test_the_circular_bound_is_close_for_images_much_larger_than_the_kernel() -> None:
    torch.manual_seed(0)
    for stride in (1, 2):
        layer = nn.Conv2d(2, 3, 3, stride, padding=1).double()
        net = from_module(nn.Sequential(layer, nn.Flatten()), (2, 24, 24))
        exact = gains.layer_norm(net, 1, "L2")
        assert exact * (1 - 1e-12) <= gains.circular_norm(layer, (24, 24)) <= 1.05 * exact


def test_norms_of_maps_without_weights() -> None:
    torch.manual_seed(0)
    overlapping = nn.AvgPool2d(3, stride=1, padding=1)
    layers = [nn.AvgPool2d(2), overlapping, normalised(2), nn.Flatten(), nn.AdaptiveAvgPool2d(1)]
    for layer, name in itertools.product(layers, NORMS):
        net = from_module(nn.Sequential(layer, nn.Flatten()), (2, 4, 4))
        image = net.nodes[0].linear(torch.eye(32, dtype=torch.float64).view(32, 2, 4, 4)).flatten(1).T  # type: ignore[misc]
        exact = float(torch.linalg.matrix_norm(image, {"Linf": math.inf, "L2": 2, "L1": 1}[name]))
        found = gains.layer_norm(net, 1, name)
        assert found >= exact * (1 - 1e-12)
        if not (name == "L2" and layer is overlapping):
            assert found == pytest.approx(exact)


@pytest.mark.parametrize(("layer", "low", "high"), [
    (nn.ReLU(), 0, 1), (nn.GELU(), -0.12904, 1.12904), (nn.SiLU(), -0.09984, 1.09984), (nn.Softplus(), 0, 1),
    (nn.Softplus(beta=0.3), 0, 1), (nn.Softplus(beta=1e-6), 0, 1), (nn.Softplus(beta=1e-9), 0, 1),
    (nn.Sigmoid(), 0, 0.25), (nn.GELU("tanh"), -0.1290, 1.1290),
])  # fmt: skip
def test_slopes_of_activations(layer: nn.Module, low: float, high: float) -> None:
    net = from_module(nn.Sequential(nn.Flatten(), layer), (5,))
    least, largest = propagation.slopes(net)[0]
    assert float(least.min()) == pytest.approx(low, abs=2e-4)
    assert float(largest.max()) == pytest.approx(high, abs=2e-4)
    for a, b in [(-3.0, -1.0), (-1.0, 0.5), (0.2, 2.0), (-9.0, 9.0)]:
        ranges = [(torch.full((1, 5), a, dtype=torch.float64), torch.full((1, 5), b, dtype=torch.float64))]
        x = torch.linspace(a, b, 20001, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x).sum(), x)
        least, largest = (float(side[0, 0]) for side in propagation.slopes(net, ranges)[0])
        assert least - 1e-12 <= float(slope.min()) <= least + 1e-3
        assert largest - 1e-3 <= float(slope.max()) <= largest + 1e-12


@pytest.mark.parametrize(
    "layer", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(), nn.Softplus(beta=1e-6), nn.Sigmoid()], ids=str
)
def test_activations_over_wide_ranges(layer: nn.Module) -> None:
    """The lines lie around the curve, close to it at the ends and in the middle; derivatives are at their limits."""
    net = from_module(nn.Sequential(nn.Flatten(), layer), (1,))
    inside = torch.linspace(-60, 60, 2401, dtype=torch.float64).expand(5, -1)
    for far in (1e3, 1e12, 1e20, 1e160):
        ranges = [(-far, far), (far / 2, far), (-far, -far / 2), (1.0, far), (-far, 1.0)]
        low, high = torch.tensor(ranges, dtype=torch.float64).T[..., None]
        lines = activations.bent_lines(net.activations[0], low, high)
        across = torch.linspace(0, 1, 1001).double() * (high - low) + low
        x = torch.cat([across, inside, 1e6 * inside], 1).clamp(low, high)
        below, above = lines.lower * x + lines.lower_offset, lines.upper * x + lines.upper_offset
        rounding = 1e-12 * (1 + x.abs() * (lines.lower.abs() + lines.upper.abs()))
        assert (below <= layer(x) + rounding).all()
        assert (layer(x) <= above + rounding).all()
        assert float((above - below).max()) <= 1.2 * far
        least, largest = propagation.slopes(net, [(low, high)])[0]
        slope = activations.derivative(layer, x)
        assert (slope >= least - 1e-12).all()
        assert (slope <= largest + 1e-12).all()


def steepest(net: Net, name: str, pairs: list[tuple[int, int]], points: Tensor) -> Tensor:
    """The largest dual norm of the gradient at some points, for each pair."""
    J = margins(net, pairs) @ net.jacobian(points)
    return norm(J.flatten(0, 1), dual(name)).view(len(points), len(pairs)).amax(0)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_lipschitz_bounds_hold_at_sampled_points(kind: str, name: str) -> None:
    pairs = list(itertools.permutations(range(3), 2))
    for seed in range(2):
        net = network(kind, seed)
        points = torch.randn(500, 1, 4, 4, dtype=torch.float64) * torch.logspace(-1, 2, 500)[:, None, None, None]
        everywhere = steepest(net, name, pairs, points)
        whole = bounds.lipschitz_upper(net, name, pairs)
        assert (whole >= everywhere / SLACK).all()
        assert (gains.product(net, name, pairs) >= everywhere / SLACK).all()
        assert (propagation.gradient(net, name, pairs, propagation.slopes(net)) >= everywhere / SLACK).all()
        for box in ((0.0, 1.0), (0.4, 0.5)):
            inside = box[0] + (box[1] - box[0]) * torch.rand(500, 1, 4, 4, dtype=torch.float64)
            upper = bounds.lipschitz_upper(net, name, pairs, box)
            assert (upper >= steepest(net, name, pairs, inside) / SLACK).all()
            assert (upper <= whole * SLACK).all()


def small(seed: int, depth: int, classes: int, bias: bool = True) -> Net:
    torch.manual_seed(seed)
    widths = [2, *[5] * depth, classes]
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out, bias=bias), nn.ReLU()]
    return from_module(nn.Sequential(*layers[:-1]))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_bounds_are_ordered_and_above_the_exact_constant(name: str, depth: int) -> None:
    pairs = [(0, 1), (2, 0)]
    for seed in range(4):
        net = small(seed, depth, 3)
        J = torch.from_numpy(cells_of(net).affine()[0])
        rows = margins(net, pairs)
        exact = norm((rows @ J).flatten(0, 1), dual(name)).view(-1, 2).amax(0)
        product, halved = (f(net, name, pairs) for f in (gains.product, gains.halved))
        gradient = propagation.gradient(net, name, pairs, propagation.slopes(net))
        assert (exact <= halved * SLACK).all()
        assert (halved <= product * SLACK).all()
        assert (exact <= gradient * SLACK).all()
        assert (bounds.lipschitz_upper(net, name, pairs) <= torch.stack([product, halved, gradient])).all()


def test_the_halved_bound_of_a_chain_is_the_formula() -> None:
    """In "L2", with one row, without the refinements by units, which are worse for these matrices."""
    torch.manual_seed(0)
    orthogonal = [torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] for _ in range(2)]
    net = from_module(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    for node, weight in zip(net.nodes[::2], orthogonal, strict=False):
        node.layer.weight.copy_(weight)
    row = margins(net, [(0, 1)])[0] @ net.nodes[-1].layer.weight
    first, second = 1.0, 0.5 + 0.5  # |W_1|; |W_2 W_1| / 2 + |W_2| B_1 / 2
    whole = float((row @ orthogonal[1] @ orthogonal[0]).norm()) / 4 + float((row @ orthogonal[1]).norm()) / 4 * first
    whole += float(row.norm()) / 2 * second
    assert float(gains.halved(net, "L2", [(0, 1)])) <= whole * SLACK
    spread = [row[None] @ orthogonal[1] / 4, row[None] / 2]
    layers = [gains._Gains(B, torch.full((6,), math.inf).double(), torch.empty(0)) for B in (first, second)]
    path = row[None] @ orthogonal[1] @ orthogonal[0] / 4
    assert float(gains._unit_gains(path, spread, layers, "L2")) == pytest.approx(whole)


@pytest.mark.parametrize("name", NORMS)
def test_bounds_of_an_affine_network_are_the_norm_of_its_rows(name: str) -> None:
    torch.manual_seed(0)
    net = from_module(nn.Linear(4, 3))
    pairs = [(0, 1), (2, 1)]
    exact = norm(margins(net, pairs) @ net.nodes[0].layer.weight, dual(name))
    for bound in (gains.product, gains.halved, bounds.lipschitz_upper, bounds.recession_upper):
        torch.testing.assert_close(bound(net, name, pairs), exact, rtol=1e-8, atol=0)
    values, directions = bounds.recession_lower(net, name, pairs)
    torch.testing.assert_close(values, exact, rtol=1e-12, atol=0)
    assert (norm(directions, name) <= 1 + 1e-12).all()


def growth_in_the_plane(net: Net, name: str, row: Tensor) -> float:
    """The largest value of a row of the logits over the unit ball of the plane, from a grid refined around its best."""
    low, high = 0.0, 2 * math.pi
    for _ in range(3):
        angles = torch.linspace(low, high, 4_001, dtype=torch.float64)  # first with the corners of both squares
        circle = torch.stack([angles.cos(), angles.sin()], dim=1)
        values = net(circle / norm(circle, name)[:, None]) @ row
        best = float(angles[values.argmax()])
        low, high = best - (high - low) / 2_000, best + (high - low) / 2_000
    return max(0.0, float(values.max()))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("depth", [1, 2])
def test_growth_along_rays_in_the_plane(name: str, depth: int) -> None:
    pairs = list(itertools.permutations(range(3), 2))
    for seed in range(3):
        net = small(seed, depth, 3)
        lower, directions = bounds.recession_lower(net, name, pairs)
        upper = bounds.recession_upper(net, name, pairs)
        exact = [growth_in_the_plane(net.recession(), name, row) for row in margins(net, pairs)]
        assert lower.tolist() == pytest.approx(exact, rel=1e-6, abs=1e-9)
        assert (upper * SLACK >= lower).all()
        assert (upper <= gains.product(net.recession(), name, pairs) * SLACK).all()
        assert (gains.homogeneous(net.recession(), name, pairs) * SLACK >= lower).all()
        values = (net.recession()(directions) * margins(net, pairs)).sum(1)
        torch.testing.assert_close(values, lower)
        assert (norm(directions, name) <= 1 + 1e-12).all()


@pytest.mark.parametrize("kind", NETWORKS)
def test_growth_of_networks_of_every_kind(kind: str) -> None:
    pairs = [(0, 1), (1, 0), (0, 2)]
    net = network(kind)
    for name in NORMS:
        lower, directions = bounds.recession_lower(net, name, pairs, starts=20, steps=10)
        upper = bounds.recession_upper(net, name, pairs)
        assert (lower <= upper * SLACK).all()
        assert (upper <= gains.product(net.recession(), name, pairs) * SLACK).all()
        far = 1e6
        grown = (net(far * directions) - net(torch.zeros_like(directions))) / far
        torch.testing.assert_close((grown * margins(net, pairs)).sum(1), lower, rtol=1e-4, atol=1e-4)
        if kind == "sigmoid":  # its logits are bounded
            assert not upper.any()


def test_the_published_reference_for_lipschitz_constants(wda_data: object) -> None:
    """LipSDP's random network: the product of spectral norms is 43.31, its semidefinite bound 36.48."""
    name = "reference_lipsdp_random_2_10_30_20_2"
    net, card = from_module(wda.models.load(name)), wda.models.card(name)
    spectral = math.prod(gains.layer_norm(net, i, "L2") for i in (1, 3, 5, 7))
    assert spectral == pytest.approx(card["verified"]["product_of_spectral_norms"], rel=1e-9)
    # the published figures are for the two logits together
    path, spread, layers = gains._around_the_middle(net, "L2", torch.eye(2).double(), propagation.slopes(net))
    ours = gains._layer_gains(path, spread, layers, "L2").layer
    exact = float(torch.linalg.matrix_norm(torch.from_numpy(cells_of(net).affine()[0]), 2).max())
    assert exact <= ours * SLACK
    assert ours <= spectral
    # both meet the exact constant, that of the cell where every unit is on; published with three decimals
    assert exact == pytest.approx(min(entry["value"] for entry in card["published"]), abs=5e-4)
    assert ours == pytest.approx(exact, rel=1e-6)


def test_bad_input() -> None:
    net = small(0, 1, 3)
    with pytest.raises(ValueError, match=r"pairs has \(1, 1\).*0\.\.2"):
        bounds.lipschitz_upper(net, "L2", [(1, 1)])
    with pytest.raises(ValueError, match="norm='L3'"):
        bounds.lipschitz_upper(net, "L3", [(0, 1)])
    with pytest.raises(ValueError, match=r"box=\(1, 0\)"):
        bounds.lipschitz_upper(net, "L2", [(0, 1)], box=(1, 0))
    with pytest.raises(ValueError, match="the centre leaves box"):
        propagation.linear(net, torch.eye(3), torch.ones(1, 2), 0.1, "L2", (0.0, 0.5))
    with pytest.raises(ValueError, match="starts=0"):
        bounds.recession_lower(net, "L2", [(0, 1)], starts=0)
    bounded = from_module(nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    for bound in (
        lambda: bounds.lipschitz_upper(bounded, "L2", [(0, 1)]),
        lambda: propagation.gradient(bounded, "L2", [(0, 1)], []),
        lambda: propagation.interval(bounded, torch.zeros(1, 2), torch.ones(1, 2)),
        lambda: propagation.linear(bounded, torch.eye(3), torch.zeros(1, 2), 1.0, "L2"),
    ):
        with pytest.raises(NotPiecewiseAffine, match="LayerNorm '1'"):
            bound()
    assert not bounds.recession_upper(bounded, "L2", [(0, 1)]).any()
