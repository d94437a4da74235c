"""No certificate is beaten: random networks of every layer, sizes from 1e-8 to 1e8, and exact rational arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wda import Threat
from wda.cells import at, enumerate
from wda.certificates import (
    bounds,
    gains,
    initial_slope,
    lipschitz,
    propagation,
    recession_slope,
    sample_slope,
    worst_case_curve,
    worst_case_distribution,
    worst_case_risk,
)
from wda.models import Residual
from wda.nets import Net, from_module
from wda.norms import dual, norm

NORMS = ("Linf", "L2", "L1")
SCALES = (1.0, 1e-8, 1e-3, 1e3, 1e8)
BOXES = (None, (0.0, 1.0), (-1e-9, 1e-9), (0.3, 0.3000001), (-1e4, 1e4), (-50.0, 80.0))
# rounding of the sampled values themselves; the bounds have a slack of their own
TIGHT = 1 + 1e-12


class Shifted(nn.Module):
    """Constants that are added, multiplied by and divided by."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return (1.5 - x * self.factor) / 2 - 0.25 * self.factor


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus),
    *(lambda: nn.GELU("tanh"), lambda: nn.Softplus(beta=3), lambda: nn.Softplus(beta=0.2)),
)
POOLS: tuple[Callable[[], nn.Module], ...] = (
    *(lambda: nn.AvgPool2d(2), lambda: nn.AdaptiveAvgPool2d((2, 3)), lambda: nn.AvgPool2d(3, stride=1, padding=1)),
    lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
    *(lambda: nn.MaxPool2d(2), lambda: nn.MaxPool2d(3, stride=1, padding=1)),
    *(lambda: nn.MaxPool2d(2, stride=1, ceil_mode=True), lambda: nn.MaxPool2d(2, dilation=2, padding=1)),
)


def normalised(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
        tensor.normal_()
    layer.running_var.uniform_(0.1, 3)
    return layer


def random_network(seed: int) -> Net:
    """A perceptron, a residual one or a small CNN, of random layers; some with dead units, small or large weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    def activation() -> nn.Module:
        return ACTIVATIONS[rng.integers(len(ACTIVATIONS))]()

    if seed % 3 == 0:
        n, m = rng.integers(1, 6, 2)
        shape, body = (
            (n,),
            [nn.Linear(n, m), activation(), nn.Linear(m, m), normalised(nn.BatchNorm1d(m)), activation()],
        )
    elif seed % 3 == 1:
        block = nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 3))
        shape, body = (3,), [Residual(block, nn.Identity()), activation(), Shifted(3), nn.Linear(3, 4), activation()]
    else:
        groups, stride, padding, dilation, kernel = (int(rng.integers(1, 3)) for _ in range(5))
        shape = (2, 6, 5)
        body = [
            nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups),
            *(normalised(nn.BatchNorm2d(4)), activation()),
            Residual(
                nn.Sequential(nn.Conv2d(4, 2, 3, padding="same"), activation(), nn.Conv2d(2, 4, 1)), nn.Identity()
            ),
            *(POOLS[rng.integers(len(POOLS))](), nn.Flatten()),
        ]
    with torch.no_grad():
        width = nn.Sequential(*body).eval()(torch.zeros(1, *shape)).shape[1]
        model = nn.Sequential(*body, nn.Linear(width, 3))
        for weight in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            weight *= SCALES[seed % len(SCALES)]
            if seed % 4 == 0:
                weight[torch.rand(len(weight)) < 0.5] = 0
    return from_module(model, tuple(int(side) for side in shape))


def violations(net: Net, name: str, box: tuple[float, float] | None, seed: int) -> list[str]:
    """The upper bounds that a sampled point, direction or Jacobian exceeds."""
    generator = torch.Generator().manual_seed(seed)
    pairs = list(itertools.permutations(range(net.classes), 2))
    rows = propagation.margins(net, pairs)
    if box is None:
        size = 10.0 ** torch.randint(-2, 3, (64, *[1] * len(net.shape)), generator=generator)
        x = size * torch.randn(64, *net.shape, generator=generator, dtype=torch.float64)
    else:
        x = box[0] + (box[1] - box[0]) * torch.rand(64, *net.shape, generator=generator, dtype=torch.float64)
        x[:16] = box[0] + (box[1] - box[0]) * (x[:16] > sum(box) / 2)
        x = x.clamp(*box)
    found = []
    steep = norm((rows @ net.jacobian(x)).flatten(0, 1), dual(name)).view(len(x), -1).amax(0)
    upper = bounds.lipschitz_upper(net, name, pairs, box)
    if not (steep <= TIGHT * upper).all():
        found.append("lipschitz_upper")
    if not (bounds.lipschitz_upper(net, name, pairs) <= TIGHT * gains.product(net, name, pairs)).all():
        found.append("product")
    directions = torch.randn(256, *net.shape, generator=generator, dtype=torch.float64)
    growth = (net.recession()(directions) @ rows.T / norm(directions, name)[:, None]).amax(0)
    if not (growth <= TIGHT * bounds.recession_upper(net, name, pairs)).all():
        found.append("recession_upper")
    radius = float(10.0 ** (seed % 5 - 2))
    step = torch.randn(64, *net.shape, generator=generator, dtype=torch.float64)
    step = radius * step / norm(step, name).view(-1, *[1] * len(net.shape))
    inside = x[:1] + step if box is None else (x[:1] + step).clamp(*box)
    values = net(inside) @ rows.T
    rounding = 1e-13 * values.abs().max()
    low, high = propagation.linear(net, rows, x[:1], radius, name, box)
    if not ((low - rounding <= values) & (values <= high + rounding)).all():
        found.append("linear")
    boxed = propagation.interval(net, inside.amin(0, keepdim=True), inside.amax(0, keepdim=True))
    for value, (low, high) in zip(net.values(inside), boxed, strict=True):
        rounding = 1e-13 * value.abs().max()
        if not ((low - rounding <= value) & (value <= high + rounding)).all():
            found.append("interval")
            break
    return found


@pytest.mark.parametrize("seed", range(54))
def test_no_sample_beats_a_bound(seed: int) -> None:
    assert violations(random_network(seed), NORMS[seed // 3 % len(NORMS)], BOXES[seed // 9], seed) == []


def steeper_by_less(bound: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def wrong(*arguments: object) -> tuple[Tensor, Tensor]:
        low, high = bound(*arguments)
        return low, low + 0.3 * (high - low)

    return wrong


def too_small(bound: Callable[..., float]) -> Callable[..., float]:
    return lambda *arguments: 0.05 * bound(*arguments)


@pytest.mark.parametrize(("module", "function", "flaw", "caught"), [
    (propagation, "_slopes", steeper_by_less, {"lipschitz_upper"}),
    (propagation, "_image", steeper_by_less, {"interval", "linear"}),
    (gains, "layer_norm", too_small, {"product", "lipschitz_upper"}),
])  # fmt: skip
def test_a_bound_that_is_too_small_is_caught(
    module: object, function: str, flaw: Callable, caught: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = range(0, 54, 2 * len(SCALES))  # weights as torch draws them
    nets = {seed: random_network(seed) for seed in seeds}
    monkeypatch.setattr(module, function, flaw(getattr(module, function)))
    found = [violations(net, NORMS[seed // 3 % len(NORMS)], BOXES[seed // 9], seed) for seed, net in nets.items()]
    assert caught & set(itertools.chain(*found))


def one_layer(W: np.ndarray, b: np.ndarray, V: np.ndarray | None = None) -> nn.Sequential:
    first, last = nn.Linear(W.shape[1], len(W)).double(), nn.Linear(len(W), 2).double()
    first.weight.data, first.bias.data = torch.tensor(W), torch.tensor(b)
    if V is not None:
        last.weight.data = torch.tensor(V)
    return nn.Sequential(first, nn.ReLU(), last)


def rational_cells(W: np.ndarray, b: np.ndarray, box: tuple[float, float] | None) -> set[tuple[bool, ...]]:
    """The cells of lines in the plane of which no three meet, in rational arithmetic: the four around each vertex."""
    lines = [[Fraction(float(v)) for v in (*w, c)] for w, c in zip(W, b, strict=True)]
    if box:
        low, high = map(Fraction, box)
        lines += [[Fraction(1), Fraction(0), -low], [Fraction(-1), Fraction(0), high]]
        lines += [[Fraction(0), Fraction(1), -low], [Fraction(0), Fraction(-1), high]]
    found = set()
    for i, j in itertools.combinations(range(len(lines)), 2):
        (a, c, e), (d, f, g) = lines[i], lines[j]
        if a * f == c * d:
            continue
        x, y = (c * g - e * f) / (a * f - c * d), (e * d - a * g) / (a * f - c * d)
        value = [p * x + q * y + r for p, q, r in lines]
        assert all(v for k, v in zip(range(len(lines)), value, strict=True) if k not in (i, j))
        for sides in itertools.product((False, True), repeat=2):
            on = [v > 0 for v in value]
            on[i], on[j] = sides
            if all(on[len(W) :]):
                found.add(tuple(on[: len(W)]))
    return found


@pytest.mark.parametrize("distance", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("kind", ["nearly through one point", "nearly parallel", "nearly a face of the box"])
@pytest.mark.parametrize("seed", range(3))
def test_cells_of_nearly_degenerate_lines_in_rational_arithmetic(kind: str, distance: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    W, b, box = rng.normal(size=(5, 2)), rng.normal(size=5), None
    if kind == "nearly through one point":
        b[:3] = distance * rng.normal(size=3) - W[:3] @ [0.3, 0.2]
    elif kind == "nearly parallel":
        W[1] = W[0] + distance * rng.normal(size=2)
    else:
        box = (-1.0, 1.0)
        W[0], b[0] = [1, distance * rng.normal()], distance * rng.normal() - 1
    assert {tuple(mask) for mask in enumerate(one_layer(W, b), box).masks.tolist()} == rational_cells(W, b, box)


@pytest.mark.parametrize("seed", range(6))
def test_the_steepest_cell_in_rational_arithmetic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    W, b, V = rng.normal(size=(5, 2)), rng.normal(size=5), rng.normal(size=(2, 5))
    on = np.array(sorted(rational_cells(W, b, (-1.0, 1.0))))
    gradients = (on * (V[1] - V[0])) @ W
    net = one_layer(W, b, V)
    for name, steepest in (("Linf", np.abs(gradients).sum(1).max()), ("L1", np.abs(gradients).max())):
        for method in ("cells", "milp"):
            assert lipschitz(net, name, method=method, box=(-1.0, 1.0)).value == pytest.approx(steepest, rel=1e-6)
        found = lipschitz(net, name, method="bounds", box=(-1.0, 1.0))
        assert found.lower <= TIGHT * steepest
        assert steepest <= TIGHT * found.upper


@pytest.mark.parametrize("seed", range(5))
def test_cells_around_a_point_on_many_hyperplanes(seed: int) -> None:
    """Small integers put points on borders exactly; the cells are those whose closure holds the point."""
    torch.manual_seed(seed)
    n = 1 + seed % 3
    net = nn.Sequential(nn.Linear(n, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    for parameter in net.parameters():
        parameter.data = (3 * parameter.data).round()
    cells = enumerate(net)
    A, b = cells.oriented()
    for x in np.random.default_rng(seed).integers(-2, 3, size=(4, n)).astype(float):
        held = {tuple(mask) for mask in cells.masks[(A @ x <= b).all(1)].tolist()}
        assert {tuple(mask) for mask in at(net, x).masks.tolist()} == held
        for name in NORMS:
            slope = sample_slope(net, torch.tensor(x)[None], torch.tensor([1]), name).value
            assert slope <= recession_slope(net, name, labels=[1]).value + 1e-9


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("unit", [2.0**-10, 2.0**8])
def test_the_risk_does_not_depend_on_the_unit_of_the_input(
    name: str, box: tuple[float, float] | None, unit: float
) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, y = torch.rand(3, 2).double(), torch.tensor([0, 1, 2], dtype=torch.int32)
    risk = worst_case_risk(net, x, y, Threat(name, 0.3, box=box))
    start = initial_slope(net, x, y, name, box=box).value
    net[0].weight.data /= unit
    scaled = Threat(name, 0.3 * unit, box=box and (box[0] * unit, box[1] * unit))
    assert worst_case_risk(net, unit * x, y, scaled) == pytest.approx(risk, abs=1e-7)
    assert unit * initial_slope(net, unit * x, y, name, box=scaled.box).value == pytest.approx(start, abs=1e-7)


@pytest.mark.parametrize("loss", ["margin", "ce"])
@pytest.mark.parametrize("name", ["Linf", "L1"])
def test_budgets_from_nothing_to_1e200(name: str, loss: str) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.rand(2, 2).double(), torch.tensor([0, 1])
    curve = worst_case_curve(net, x, y, name, loss)
    for eps in (0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e6, 1e200):
        worst = worst_case_distribution(net, x, y, Threat(name, eps, box=None), loss)
        assert worst.audit() <= eps
        assert len(worst.mass) <= 3
        assert curve(eps) <= curve(0.0) + curve.initial * eps * TIGHT + 1e-12
        assert worst.risk(net, loss) == pytest.approx(curve(eps), rel=2e-6, abs=2e-6)
