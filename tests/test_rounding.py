"""Certified bounds hold to the last bit: against rational arithmetic, and library functions against 50 digits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wda.certificates import activations, propagation
from wda.models import Residual
from wda.nets import Net, Node, from_module

NORMS = ("Linf", "L2", "L1")
Exact = np.ndarray  # of Fraction


def rational(values: Tensor) -> Exact:
    return np.array([Fraction(v) for v in values.flatten().tolist()], dtype=object)


def scale_and_shift(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Exact, Exact]:
    """Of batch normalisation whose variances are squares, with eps = 0."""
    scale = rational(layer.weight) / rational(layer.running_var.sqrt())
    return scale, rational(layer.bias) - scale * rational(layer.running_mean)


def affine(node: Node, x: Exact, shape: tuple[int, ...]) -> Exact:
    """An affine node in rational arithmetic; its matrix is read off unit vectors, which round nothing here."""
    if isinstance(node.layer, nn.BatchNorm1d | nn.BatchNorm2d):
        scale, shift = (v.repeat(len(x) // len(v)) for v in scale_and_shift(node.layer))
        return scale * x + shift
    unit = torch.eye(len(x), dtype=torch.float64).view(-1, *shape)
    matrix = node.linear(unit).flatten(1)  # type: ignore[misc]
    columns = rational(matrix).reshape(len(x), -1)
    return x @ columns + rational(node.call(0 * unit[:1]))


def exact(net: Net, x: Exact) -> list[Exact]:
    """Every value of a network in rational arithmetic."""
    shapes, values = [net.shape, *(node.shape for node in net.nodes)], [x]
    for node in net.nodes:
        inputs = [values[j] for j in node.inputs]
        if node.kind == "sum":
            values.append(sum(inputs[1:], inputs[0]))
        elif node.kind == "activation":
            values.append(np.array([max(v, Fraction(0)) for v in inputs[0]], dtype=object))
        elif node.kind == "maxpool":  # comparisons round nothing: where is each maximum?
            index = torch.arange(len(inputs[0])).view(1, *shapes[node.inputs[0]]).double()
            ranks = torch.tensor([float(sorted(inputs[0]).index(v)) for v in inputs[0]], dtype=torch.float64)
            chosen = node.call(ranks.view_as(index)).flatten()
            values.append(np.array([sorted(inputs[0])[int(rank)] for rank in chosen], dtype=object))
        else:
            values.append(affine(node, inputs[0], shapes[node.inputs[0]]))
    return values


def cancelling(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """Weights and biases of 1e8 that nearly cancel, and some of 1."""
    with torch.no_grad():
        flat = layer.weight.view(-1)
        flat += 1e8 * torch.randn(len(flat)).double()
        half = len(flat) // 2
        flat[:half] = -flat[-half:] + torch.randn(half)
        layer.bias.copy_(1e7 * torch.randn(len(layer.bias)))
    return layer


def normalised(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """A large mean that the bias nearly undoes."""
    layer.eps = 0.0
    layer.running_var.copy_((2.0 * torch.randint(1, 5, layer.running_var.shape) + 1) ** 2)
    layer.running_mean.copy_(1e8 * torch.randn(len(layer.running_mean)))
    nn.init.normal_(layer.weight)
    shift = layer.weight.double() * layer.running_mean / layer.running_var.sqrt()
    layer.bias.data = (shift + torch.randn(len(shift))).detach()
    return layer


def linear_layer(n: int, m: int) -> nn.Module:
    return cancelling(nn.Linear(n, m).double())


def convolution(channels: int, out: int, kernel: int) -> nn.Module:
    return cancelling(nn.Conv2d(channels, out, kernel).double())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(
        *(nn.Flatten(), linear_layer(16, 5), nn.ReLU(), linear_layer(5, 4), nn.ReLU(), linear_layer(4, 2))
    ),
    "residual": lambda: nn.Sequential(
        *(nn.Flatten(), linear_layer(16, 4), normalised(nn.BatchNorm1d(4).double()), nn.ReLU()),
        Residual(nn.Sequential(linear_layer(4, 3), nn.ReLU(), linear_layer(3, 4)), nn.Identity()),
        *(nn.ReLU(), linear_layer(4, 2)),
    ),
    "convolution": lambda: nn.Sequential(
        *(normalised(nn.BatchNorm2d(1).double()), convolution(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        linear_layer(2, 2),
    ),
    "max pooling": lambda: nn.Sequential(
        *(convolution(1, 2, 2), nn.MaxPool2d(2, stride=1), nn.ReLU(), nn.Flatten(), linear_layer(8, 2))
    ),
}


def network(kind: str, seed: int) -> Net:
    torch.manual_seed(seed)
    return from_module(NETWORKS[kind]().eval(), (1, 4, 4))


def corners(centre: Tensor, radius: float, name: str) -> list[Exact]:
    """The centre and points of the ball, within it in rational arithmetic."""
    start, reach = rational(centre), Fraction(radius)
    points = [start]
    for _ in range(3):
        sign = rational(torch.randn(len(start)).sign())
        if name == "Linf":
            points.append(start + reach * sign)
        elif name == "L1":
            at = int(torch.randint(len(start), ()))
            points.append(start + reach * sign * (np.arange(len(start)) == at))
        else:
            points.append(start + reach * sign / 4)  # of 16 entries
    return points


def outside(kind: str, name: str, radius: float, box: tuple[float, float] | None, seed: int) -> set[str]:
    """Which bounds exact values leave."""
    net = network(kind, seed)
    torch.manual_seed(seed)
    centre = 0.25 + torch.rand(1, 1, 4, 4, dtype=torch.float64) / 2
    rows = torch.randn(3, 2, dtype=torch.float64)
    relaxed = propagation.relax(net, centre, radius, name, box)
    bounds = {f"steps={k}": (relaxed.least(rows, k)[0], -relaxed.least(-rows, k)[0]) for k in (0, 3)}
    seen = propagation.preactivations(net, centre, radius, name, box)
    intervals = propagation.interval(net, *relaxed.bounds[0])
    found = set()
    for point in corners(centre, radius, name):
        values = exact(net, point)
        margins = np.array([values[-1] @ rational(row) for row in rows], dtype=object)
        known = [(what, *pair, margins) for what, pair in bounds.items()]
        known += [("interval", *pair, v) for pair, v in zip(intervals, values, strict=True)]
        known += [
            ("preactivations", *pair, values[node.inputs[0]]) for pair, node in zip(seen, net.activations, strict=True)
        ]
        for what, low, high, v in known:
            if (rational(low) > v).any() or (v > rational(high)).any():
                found.add(what)
    return found


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", NORMS)
def test_bounds_hold_in_rational_arithmetic(kind: str, name: str) -> None:
    for seed, (radius, box) in enumerate(itertools.product((0.0, 1e-12, 0.1), (None, (0.0, 1.0)))):
        assert outside(kind, name, radius, box, seed) == set()


@pytest.mark.parametrize("kind", NETWORKS)
def test_without_the_allowance_for_rounding_they_do_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "_gamma", lambda net: 0.0)
    monkeypatch.setattr(propagation, "_outward", lambda *bounds: bounds)
    found = set.union(*(outside(kind, "Linf", 0.0, None, seed) for seed in range(5)))
    assert {"steps=0", "steps=3", "interval"} <= found


def test_a_batch_norm_whose_bias_cancels_needs_the_size_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def cancelled(node: Node, like: Tensor) -> tuple[Tensor, Tensor]:
        bias = node.call(like.new_zeros(1, *like.shape[1:]))
        return bias, bias.abs()

    layer = nn.Sequential(normalised(nn.BatchNorm1d(2).double()))
    centre, rows = torch.full((1, 2), 1e-9, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for truly in (True, False):
        if not truly:
            monkeypatch.setattr(propagation, "_bias", cancelled)
        held = []
        for seed in range(20):
            torch.manual_seed(seed)
            net = from_module(normalised(layer[0]).eval(), (2,))
            value = exact(net, rational(centre))[-1]
            low, high = (rational(side[0]) for side in propagation.linear(net, rows, centre, 0.0, "L2"))
            held.append(bool((low <= value).all() and (value <= high).all()))
        assert all(held) == truly


def test_lines_of_relu_in_rational_arithmetic() -> None:
    """They lie on the right side at both ends, which for a convex function is enough above, and at 0 below."""
    torch.manual_seed(0)
    size = 10.0 ** torch.empty(2, 3000, dtype=torch.float64).uniform_(-320, 300)
    size[:, 1000:] = torch.rand(2, 2000).double() * 10.0 ** torch.randint(-9, 9, (2, 2000))
    low, high = -size[0], size[1]
    lines = activations.relu_lines(low, high)
    assert ((lines.lower >= 0) & (lines.lower <= 1) & (lines.lower_offset == 0)).all()
    slope, offset, left, right = (rational(v) for v in (lines.upper, lines.upper_offset, low, high))
    assert (slope * left + offset >= 0).all()
    assert (slope * right + offset >= right).all()
    area = (slope * left + offset).astype(float) / (high - low).numpy()
    assert area[1000:].max() < 1e-12  # through both ends, but for rounding


FUNCTIONS: dict[str, tuple[nn.Module, Callable]] = {
    "relu": (nn.ReLU(), lambda x: max(x, mpmath.mpf(0))),
    "sigmoid": (nn.Sigmoid(), lambda x: 1 / (1 + mpmath.exp(-x))),
    "silu": (nn.SiLU(), lambda x: x / (1 + mpmath.exp(-x))),
    "gelu": (nn.GELU(), lambda x: x * mpmath.ncdf(x)),
    "gelu-tanh": (
        nn.GELU("tanh"),
        lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3))),
    ),
    "softplus": (nn.Softplus(), lambda x: x if x > 20 else mpmath.log1p(mpmath.exp(x))),
    "softplus, beta": (nn.Softplus(beta=3), lambda x: x if 3 * x > 20 else mpmath.log1p(mpmath.exp(3 * x)) / 3),
    "softplus, small beta": (
        nn.Softplus(beta=0.01), lambda x: x if x > 2000 else mpmath.log1p(mpmath.exp(mpmath.mpf(0.01) * x)) / 0.01
    ),
}  # fmt: skip


def places() -> Tensor:
    torch.manual_seed(0)
    near = torch.empty(200, dtype=torch.float64).uniform_(-45, 45)
    small = torch.randn(200, dtype=torch.float64) * 10.0 ** torch.empty(200).uniform_(-12, 1)
    return torch.cat([near, small, torch.tensor([-1e3, -100.0, 0.0, 100.0, 1e3, 1e9], dtype=torch.float64)])


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_activations_are_as_accurate_as_taken_for_granted(kind: str) -> None:
    layer, function = FUNCTIONS[kind]
    x = places()
    found, slope = layer(x), activations.derivative(layer, x)
    with mpmath.workdps(50):
        for at, value, steep in zip(x.tolist(), found.tolist(), slope.tolist(), strict=True):
            true = function(mpmath.mpf(at))
            assert abs(value - true) <= 2.0**-47 * (abs(true) + min(abs(at), 64))
            if kind != "relu" or at:
                step = mpmath.mpf(10) ** -15
                derivative = (function(at + step) - function(at - step)) / (2 * step)
                assert abs(steep - derivative) <= 2.0**-47


@pytest.mark.parametrize("kind", [kind for kind in FUNCTIONS if kind != "relu"])
def test_lines_and_images_of_activations_hold_to_50_digits(kind: str) -> None:
    layer, function = FUNCTIONS[kind]
    node = from_module(nn.Sequential(nn.Flatten(), layer), (1,)).activations[0]
    torch.manual_seed(1)
    ends = torch.cat([places()[torch.randperm(400)][:60].view(2, 30), places()[:200].view(2, 100)], dim=1)
    low, high = ends.amin(0), ends.amax(0)
    lines, (least, largest) = activations.bent_lines(node, low, high), activations.image(node, low, high)
    inside = [low, high, *(low + t * (high - low) for t in torch.linspace(0, 1, 23).double())]
    with mpmath.workdps(50):
        for k in range(len(low)):
            below, below_offset, above, above_offset = (mpmath.mpf(float(v[k])) for v in lines)
            for x in inside:
                at = mpmath.mpf(float(x[k].clamp(low[k], high[k])))
                true = function(at)
                assert below * at + below_offset <= true <= above * at + above_offset
                assert float(least[k]) <= true <= float(largest[k])
