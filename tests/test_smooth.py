"""Smooth activations and transformers: slopes far away, Theorem 3.3's lower bound, and Jacobians over boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import random_net
from torch import Tensor, nn

from wda import Threat, attack, data, models
from wda.certificates import lipschitz, recession_slope, worst_case_curve
from wda.certificates.curve import envelopes
from wda.losses import margin
from wda.nets import Net, from_module

# sup |sigma(t) - relu(t)|, attained at 0 for softplus and where t Phi(-t) and t / (1 + e^t) are largest for the others
OFFSET = {nn.GELU: 0.1700, nn.SiLU: 0.27847, nn.Softplus: math.log(2)}
NORMS = ("Linf", "L2", "L1")
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
ORDER = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
SMOOTH = [nn.GELU, nn.SiLU, nn.Softplus]


def directions(n: int, norm: str, seed: int, count: int = 50) -> Tensor:
    u = torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u / torch.linalg.vector_norm(u, ORDER[norm], dim=1, keepdim=True)


def margins(net: Net, x: Tensor, label: int) -> Tensor:
    with torch.no_grad():
        return margin(net(x), torch.full((len(x),), label))


def gradient_norms(net: Net, x: Tensor, norm: str, label: int) -> Tensor:
    """The dual norms of the gradients of theta_j - theta_label, (N, K)."""
    J = net.jacobian(x)
    return torch.linalg.vector_norm(J - J[:, [label]], DUAL[norm], dim=2)


@pytest.mark.parametrize("activation", SMOOTH)
def test_how_far_each_activation_is_from_relu(activation: type[nn.Module]) -> None:
    t = torch.linspace(-60, 60, 1_200_001, dtype=torch.float64)
    assert (activation()(t) - t.clamp(min=0)).abs().max().item() == pytest.approx(OFFSET[activation], abs=1e-4)


@pytest.mark.parametrize("widths", [(2, 8, 3), (3, 6, 5, 2)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", SMOOTH)
def test_the_slope_along_rays_is_that_of_the_relu_network(
    activation: type[nn.Module], seed: int, widths: tuple[int, ...]
) -> None:
    net = from_module(random_net(*widths, seed=seed, activation=activation))
    relu = from_module(random_net(*widths, seed=seed))
    for norm in NORMS:
        slope = recession_slope(net, norm)
        assert slope.value == pytest.approx(recession_slope(relu, norm).value, abs=1e-12)
        assert slope.direction is not None
        assert slope.label is not None
        u = directions(widths[0], norm, seed)
        along = torch.stack([margins(net, 1e6 * u, k) for k in range(widths[-1])]) / 1e6
        reference = torch.stack([margins(relu, 1e6 * u, k) for k in range(widths[-1])]) / 1e6
        assert (along - reference).abs().max().item() < 1e-3
        assert along.max().item() < slope.value + 1e-3
        steepest = 1e6 * torch.from_numpy(slope.direction)[None]
        assert margins(net, steepest, slope.label).item() / 1e6 == pytest.approx(slope.value, abs=1e-3)


def test_the_slope_along_rays_of_a_trained_network() -> None:
    net = from_module(models.load("digits-gelu"), shape=(1, 8, 8))
    slope = recession_slope(net, "L2", method="bounds", starts=3)
    assert slope.direction is not None
    assert slope.label is not None
    u = directions(64, "L2", seed=0)
    for k in range(10):
        error = margins(net, 1e6 * u, k) / 1e6 - margins(net.recession(), u, k)
        assert error.abs().max().item() < 1e-3
    steepest = 1e6 * torch.from_numpy(slope.direction)[None]
    assert margins(net, steepest, slope.label).item() / 1e6 == pytest.approx(slope.lower, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_sigmoid_networks_have_slope_zero(seed: int) -> None:
    net = from_module(random_net(2, 6, 6, 3, seed=seed, activation=nn.Sigmoid))
    for norm in NORMS:
        assert recession_slope(net, norm).value == 0
        assert (net(1e6 * directions(2, norm, seed)).abs() / 1e6).max().item() < 1e-3


def one_layer_difference(net: nn.Sequential, label: int, offset: float) -> float:
    """The most by which the margin can differ from that of the ReLU network: one hidden layer."""
    W = net[2].weight
    return offset * (W - W[label]).abs().sum(1).max().item()


@pytest.mark.parametrize("norm", ["Linf", "L1"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_the_worst_case_risk_is_that_of_the_relu_network_up_to_a_constant(
    activation: type[nn.Module], norm: str
) -> None:
    """From below by an attack on a grid, for every budget; from above by the exact curve of the ReLU network."""
    for seed in range(3):
        module = random_net(2, 8, 3, seed=seed, activation=activation)
        net = from_module(module)
        x, y = directions(2, "L2", seed, 3), torch.tensor([0, 1, 2])
        exact = worst_case_curve(net.rectified(), x, y, norm)
        most = max(one_layer_difference(module, k, OFFSET[activation]) for k in range(3))
        side = torch.linspace(-8, 8, 81, dtype=torch.float64)
        square = torch.cartesian_prod(side, side).numpy()

        def loss(points: np.ndarray, net: Net = net, y: Tensor = y) -> np.ndarray:
            with torch.no_grad():
                z = net(torch.from_numpy(points.reshape(-1, 2)))
            return margin(z, y.repeat_interleave(points.shape[1])).view(points.shape[:2]).numpy()

        def size(v: np.ndarray) -> np.ndarray:
            return np.linalg.norm(v, ORDER[norm], axis=-1)

        found = envelopes(x.numpy(), [x.numpy()[:, None] + square], loss, size, None)
        budgets = np.linspace(0, 2, 41)
        difference = found(budgets) - exact(budgets)
        assert (np.abs(difference) <= most).all()
        assert np.abs(difference).max() > 0.01 * most


def certified_initial_slope(module: nn.Sequential, label: int) -> float:
    """An upper bound of the steepest line from 0 to the graph of the margin, n = 2, one hidden layer, 2-norm.

    The quotient F(t, u) is L-Lipschitz in u and 2L-Lipschitz in log t; near 0 a Lipschitz constant of a small box
    bounds it, far away its limit l and the distance to the ReLU network without biases.
    """
    net, count, near, far = from_module(module), 600, 0.05, 2000.0
    L = lipschitz(net, "L2", labels=[label], method="bounds").upper
    inner = lipschitz(net, "L2", labels=[label], method="bounds", box=(-near, near)).upper
    angle = 2 * math.pi / count
    turn = angle * torch.arange(count, dtype=torch.float64)
    u = torch.stack([turn.cos(), turn.sin()], 1)
    logs = torch.linspace(math.log(near), math.log(far), 1000, dtype=torch.float64)
    t = logs.exp()
    points = t[:, None, None] * u
    rise = margins(net, points.reshape(-1, 2), label).view(len(t), count) - margins(net, torch.zeros(1, 2), label)
    middle = (rise / t[:, None]).max().item() + L * (angle / 2 + (logs[1] - logs[0]).item())
    W, shift = module[2].weight - module[2].weight[label], module[2].bias - module[2].bias[label]
    activation = type(module[1])
    distance = (W.abs() @ (module[0].bias.abs() + OFFSET[activation] + 1e-4) + shift.abs()).max().item()
    outer = recession_slope(net, "L2", labels=[label]).value + 2 * distance / far
    return max(inner, middle, outer)


@pytest.mark.parametrize("activation", SMOOTH)
def test_the_lower_bound_of_theorem_3_3_fails(activation: type[nn.Module]) -> None:
    """V <= E + Lambda eps < E + l eps for every eps: Lambda bounded from above, the paper's l from below."""
    x = 4 * torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for seed in (0, 2, 7):
        module = random_net(2, 8, 3, seed=seed, activation=activation)
        Lambda = certified_initial_slope(module, 0)
        printed = gradient_norms(from_module(module), x, "L2", 0).max().item()
        assert recession_slope(module, "L2", labels=[0]).value <= Lambda + 1e-9
        assert Lambda < 0.9 * printed


def test_the_bound_of_the_initial_slope_where_it_is_known() -> None:
    """theta = (0, [gelu(10 x_1 + 20) - gelu(10 x_1 + 10) / 2] / 10): Lambda = 1/2, the steepest gradient 1.1289."""
    module = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)).double().requires_grad_(False)
    module[0].weight.copy_(torch.tensor([[10.0, 0.0], [10.0, 0.0]]))
    module[0].bias.copy_(torch.tensor([20.0, 10.0]))
    module[2].weight.copy_(torch.tensor([[0.0, 0.0], [0.1, -0.05]], dtype=torch.float64))
    module[2].bias.zero_()
    x = torch.stack([torch.linspace(-3, 3, 6001), torch.zeros(6001)], 1)
    assert gradient_norms(from_module(module), x, "L2", 0).max().item() == pytest.approx(1.1289, abs=1e-4)
    assert 0.5 <= certified_initial_slope(module, 0) < 0.55


@pytest.mark.parametrize("activation", [*SMOOTH, nn.Sigmoid])
@pytest.mark.parametrize("norm", NORMS)
def test_certified_jacobian_norms_over_boxes_are_never_below_sampled_ones(
    norm: str, activation: type[nn.Module]
) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        net = from_module(random_net(3, 8, 6, 3, seed=seed, activation=activation))
        anywhere = lipschitz(net, norm, method="bounds").upper
        assert anywhere <= lipschitz(net, norm, kind="product").upper * (1 + 1e-9)
        for low, high in ((-3.0, 3.0), (0.0, 1.0), (0.4, 0.5), (0.499, 0.5)):
            x = low + (high - low) * torch.rand(300, 3, generator=generator, dtype=torch.float64)
            seen = max(gradient_norms(net, x, norm, k).max().item() for k in range(3))
            slope = lipschitz(net, norm, method="bounds", box=(low, high))
            assert max(seen, slope.lower) <= slope.upper <= anywhere * (1 + 1e-9)
        assert slope.upper < 1.02 * slope.lower  # the narrowest box


@pytest.mark.parametrize("norm", NORMS)
def test_slopes_of_the_transformers(norm: str) -> None:
    """0 with a normalisation before the head; without it that of head, mean over the tokens and embedding."""
    assert recession_slope(from_module(models.load("digits-vit"), shape=(1, 8, 8)), norm).value == 0
    model = models.load("digits-vit-nonorm").double()
    slope = recession_slope(from_module(model, shape=(1, 8, 8)), norm)
    # the mean over the tokens of a strided convolution, one pixel at a time
    with torch.no_grad():
        pixels = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
        A = (model[0](pixels) - model[0](0 * pixels)).mean((2, 3)) @ model[-1].weight.T
        gaps = (A[:, None] - A[:, :, None]).movedim(0, 2)
        steepest = torch.linalg.vector_norm(gaps, DUAL[norm], dim=2).max().item()
        assert slope.lower * (1 - 1e-12) <= steepest <= slope.upper * (1 + 1e-12)
        assert slope.value == pytest.approx(steepest, rel=1e-7)
        assert slope.direction is not None
        far = 1e8 * torch.from_numpy(slope.direction).view(1, 1, 8, 8)
        assert margin(model(far), torch.tensor([slope.label])).item() / 1e8 == pytest.approx(slope.value, rel=1e-4)


def test_the_ceiling_of_a_transformer_with_a_last_normalisation() -> None:
    """theta_j - theta_k < sqrt(d) |Q(g w)| + <w, b> + c_j - c_k: reached by a token, passed by no attack."""
    model = models.load("digits-vit").double().requires_grad_(False)
    norm, head = model[-2], model[-1]
    w = head.weight[None] - head.weight[:, None]
    gained = w * norm.weight
    gained = gained - gained.mean(-1, keepdim=True)
    most = math.sqrt(32) * gained.norm(dim=-1) + w @ norm.bias + head.bias[None] - head.bias[:, None]
    # the bound is the supremum over tokens: far along the direction that it names it is reached
    z = head(norm(1e6 * gained.view(100, 32))).view(10, 10, 10)
    reached = torch.stack([torch.stack([z[k, j, j] - z[k, j, k] for j in range(10)]) for k in range(10)])
    rivals = ~torch.eye(10, dtype=torch.bool)
    torch.testing.assert_close(reached[rivals], most[rivals], rtol=1e-6, atol=1e-6)
    x, y = data.load("digits", n=20)
    for radius in (0.3, 3.0, 100.0):
        adv = attack("pgd", model, x.double(), y, Threat("L2", radius), loss="margin", steps=8, progress=False)
        z = model(adv.x_adv)
        ceiling = most[y].where(rivals[y], -math.inf).amax(1)
        assert (margin(z, y) <= ceiling).all()
        assert margin(z, y).max() > 0.5 * ceiling.min()
