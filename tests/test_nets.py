"""Networks read as graphs: every kind of layer against the module itself, autograd and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import random_net
from torch import Tensor, nn
from torch.nn import functional

from wda import NotPiecewiseAffine, models, nets


class Wide(nn.Module):
    """Most of what is accepted, written as people write it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.flat = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.BatchNorm1d(7)
        self.into, self.last, self.act = nn.Linear(16, 7), nn.Linear(7, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.4) / torch.tensor(0.3)
        h = self.act(self.norm(self.first(x)))
        h = 2 * h - h * 0.5 + 1
        h = self.act(self.second(h)) - functional.avg_pool2d(h, 2)
        h = functional.dropout(h, 0.5, self.training).view(h.size(0), -1)
        h = self.flat(self.into(h))
        return self.last(-self.act(h)) + 0.1


def wide(activation: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Wide(activation).double()
    for norm in (model.norm, model.flat):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return model.eval().requires_grad_(False)


ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Softplus(), nn.Sigmoid()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_jacobians_are_those_of_the_module(activation: nn.Module, seed: int) -> None:
    model = wide(activation, seed)
    net = nets.from_module(model, shape=(2, 4, 4))
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x))
    autograd = torch.stack([torch.autograd.functional.jacobian(model, row[None])[0, :, 0].flatten(1) for row in x])
    torch.testing.assert_close(net.jacobian(x), autograd)
    assert (net.n, net.classes, net.units) == (32, 3, (64, 16, 7))


@pytest.mark.parametrize("seed", range(3))
def test_explicit_matrices_are_the_same_network(seed: int) -> None:
    net = nets.from_module(wide(nn.ReLU(), seed), shape=(2, 4, 4))
    x = torch.randn(6, 32, dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(net.dense.logits(x.numpy())), net(x))
    masks = net.dense.mask(x.numpy())
    assert (masks == torch.cat(net.masks(x), 1).numpy()).all()
    J, c = net.dense.affine(masks)
    torch.testing.assert_close(torch.from_numpy(J), net.jacobian(x))
    torch.testing.assert_close(torch.einsum("mkn,mn->mk", torch.from_numpy(J), x) + torch.from_numpy(c), net(x))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_recession_network_is_the_limit_along_rays(activation: nn.Module) -> None:
    net = nets.from_module(wide(activation), shape=(2, 4, 4))
    limit = net.recession()
    x, u = torch.randn(2, 8, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x + 1e7 * u) / 1e7, limit(u), atol=1e-5, rtol=0)
    torch.testing.assert_close(limit(3 * u), 3 * limit(u))
    if isinstance(activation, nn.Sigmoid):
        assert not limit(u).any()  # the last layer before the logits is bounded
    else:
        torch.testing.assert_close(net.rectified().recession()(u), limit(u))


def test_max_pooling_and_residual_blocks() -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 1, 1))
    model = nn.Sequential(models.Residual(branch, nn.AdaptiveAvgPool2d(2)), nn.Flatten(), nn.Linear(4, 2))
    net = nets.from_module(model, shape=(1, 4, 4))
    x = torch.randn(4, 1, 4, 4)
    torch.testing.assert_close(net(x), model.double()(x.double()))
    with pytest.raises(NotPiecewiseAffine, match="MaxPool2d"):
        _ = net.dense


class InPlace(nn.Module):
    """A block that overwrites its input, so that the shortcut carries the activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(3, 4), nn.Linear(4, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(self.activation(x)) + x


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), functional.relu_, torch.relu_])
def test_activations_in_place(activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module = InPlace(activation).double()
    net, x = nets.from_module(module), torch.randn(20, 3, dtype=torch.float64)
    before = module.first(x)
    torch.testing.assert_close(net(x), module(x))
    torch.testing.assert_close(net.preactivations(x)[0], before)


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = nets.from_module(model)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model[0].weight.data.zero_()
    assert not torch.equal(net(torch.ones(1, 2)), net(torch.zeros(1, 2)))  # the weights were copied


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Quotient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


BAD = [
    (nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU()), "LeakyReLU '1'"),
    (nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), "Softmax '1'"),
    (nn.Sequential(nn.Linear(2, 2), Twice()), "mul"),
    (nn.Sequential(nn.Linear(2, 2), Quotient()), "truediv"),
    (nn.Sequential(nn.Linear(2, 2), Branching()), "torch.fx"),
    (nn.Sequential(nn.Linear(2, 2), Mixing()), "mixes samples"),
    (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), "statistics"),
]


@pytest.mark.parametrize(("model", "named"), BAD, ids=[named for _, named in BAD])
def test_what_is_not_piecewise_affine_is_named(model: nn.Module, named: str) -> None:
    with pytest.raises(NotPiecewiseAffine, match=named):
        nets.from_module(model)


def test_bad_shapes_are_named() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="shape=None"):
        nets.from_module(conv)
    with pytest.raises(ValueError, match=r"shape=\(1, 9, 9\)"):
        nets.from_module(conv, shape=(1, 9, 9))
    with pytest.raises(ValueError, match="logits"):
        nets.from_module(nn.Conv2d(1, 1, 3), shape=(1, 4, 4))
    with pytest.raises(ValueError, match="x of shape"):
        nets.from_module(random_net(2, 3, 2))(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="Module"):
        nets.from_module("digits-mlp")


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2))
        self[0].register_forward_hook(lambda layer, given, result: 10 * result)


def test_what_would_be_half_read_is_refused() -> None:
    with pytest.raises(NotPiecewiseAffine, match="hooks"):
        nets.from_module(Hooked())
    with pytest.raises(NotPiecewiseAffine, match=r"threshold=1"):
        nets.from_module(nn.Sequential(nn.Linear(2, 2), nn.Softplus(threshold=1)))
    for value in (float("nan"), float("inf")):
        net = random_net(2, 3, 2)
        net[2].bias[0] = value
        with pytest.raises(ValueError, match=r"2\.bias has NaN"):
            nets.from_module(net)


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn", "digits-gelu", "digits-vit", "digits-vit-nonorm"])
def test_bundled_models_are_read(name: str) -> None:
    model = models.load(name)
    net = nets.from_module(model, shape=(1, 8, 8))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(net(x).float(), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mnist_trades_smallcnn", (1, 28, 28)),
        ("cifar10_resnet2b_adv_eps2", (3, 32, 32)),
        ("cifar10_cnn_a_adv", (3, 32, 32)),
    ],
)
def test_published_models_are_read(wda_data: object, name: str, shape: tuple[int, ...]) -> None:
    model = models.load(name)
    net = nets.from_module(model, shape)
    x = torch.rand(2, *shape)
    torch.testing.assert_close(net(x).float(), model(x), atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_stay_on_their_device() -> None:
    net = nets.from_module(wide(nn.ReLU()).cuda(), shape=(2, 4, 4))
    assert net(torch.zeros(1, 2, 4, 4)).is_cuda
    assert net.dense.bias[-1].shape == (3,)
