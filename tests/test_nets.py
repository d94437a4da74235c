"""Networks read as graphs: every kind of layer against the module itself, autograd and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import fuzz_modules
import pytest
import torch
from networks import random_net
from torch import Tensor, nn
from torch.nn import functional

from wda import NotPiecewiseAffine, models, nets
from wda.certificates import radius
from wda.certificates.activations import bent_lines


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


def branched(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function between two layers."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.function = nn.Linear(3, 6), nn.Linear(6, 2), function

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.function(self.first(x)))

    torch.manual_seed(0)
    return Between()


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1}, {"threshold": 19.9}, {"threshold": 1e4}, {"beta": -1}, {"beta": 0}, {"beta": math.inf}],
)
def test_softplus_is_refused_alike_as_a_layer_and_as_a_function(options: dict[str, float]) -> None:
    given = {"beta": 1, "threshold": 20} | options
    layer, function = nn.Softplus(**options), functional.softplus
    ways = [layer, lambda h: function(h, **options), lambda h: function(h, given["beta"], given["threshold"])]
    for way in ways:
        with pytest.raises(NotPiecewiseAffine, match=rf"[Ss]oftplus.* {next(iter(options))}="):
            nets.from_module(branched(way))


@pytest.mark.parametrize("options", [{}, {"threshold": 30}, {"beta": 0.01}, {"beta": 50, "threshold": 21}])
def test_softplus_is_the_same_as_a_layer_and_as_a_function(options: dict[str, float]) -> None:
    layer, function = (
        nets.from_module(branched(f)) for f in (nn.Softplus(**options), lambda h: functional.softplus(h, **options))
    )
    x = 10 * torch.randn(50, 3)
    torch.testing.assert_close(layer(x), function(x), rtol=0, atol=0)
    low, high = torch.full((1, 6), -3.0).double(), torch.full((1, 6), 9.0).double()
    for one, other in zip(*(bent_lines(net.activations[0], low, high) for net in (layer, function)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_each_form_of_gelu_has_lines_of_its_own(approximate: str) -> None:
    """The two forms differ by up to 5e-4; each lies between its own lines on every interval."""
    net = nets.from_module(branched(lambda h: functional.gelu(h, approximate=approximate)))
    low = torch.linspace(-6, 5, 45).double()
    for width in (0.01, 0.5, 4.0):
        lines = bent_lines(net.activations[0], low, low + width)
        z = low + width * torch.linspace(0, 1, 101).double()[:, None]
        curve = functional.gelu(z, approximate=approximate)
        assert (lines.lower * z + lines.lower_offset <= curve).all()
        assert (curve <= lines.upper * z + lines.upper_offset).all()
    assert net.activations[0].call(torch.tensor([2.0]).double()) == functional.gelu(
        torch.tensor([2.0]).double(), approximate=approximate
    )


@pytest.mark.parametrize("size", [1e-12, 1e-5, 1e5, 1e10, 1e15])
def test_weights_of_every_size_are_read(size: float) -> None:
    model = random_net(4, 8, 6, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    net = nets.from_module(model)
    x = torch.rand(20, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x), rtol=1e-9, atol=0)
    y = net(x).argmax(1)
    certified = radius(net, x, y, "Linf", method="linear")
    assert (certified > 1e-6).any()
    torch.testing.assert_close(certified, radius(model, x, y, "Linf", method="linear"))


def test_weights_that_overflow_are_no_error_of_the_reading() -> None:
    model = random_net(4, 8, 3)
    model[0].weight.mul_(1e200), model[2].weight.mul_(1e200)
    assert not nets.from_module(model)(torch.rand(1, 4)).isfinite().all()


def change(h: Tensor) -> Tensor:
    same = h
    h += 1
    return same * 2 + h


def viewed(h: Tensor) -> Tensor:
    functional.relu_(h.view(-1, 2, 3))
    return h


def chained(h: Tensor) -> Tensor:
    once = functional.silu(h, inplace=True)
    functional.relu(once, inplace=True)
    return h


def identity(h: Tensor) -> Tensor:
    other = functional.dropout(h, 0.5, False)
    functional.relu_(other)
    return h


def pieces(h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    functional.relu_(a)
    return torch.cat([a, b], 1) + h


@pytest.mark.parametrize("function", [change, viewed, chained, identity, pieces])
def test_what_is_changed_in_place_is_followed_or_refused(function: Callable[[Tensor], Tensor]) -> None:
    model = branched(function).double()
    x = 3 * torch.randn(50, 3, dtype=torch.float64)
    try:
        net = nets.from_module(model)
    except NotPiecewiseAffine as error:
        assert "in place" in str(error)  # noqa: PT017  # either is right
    else:
        torch.testing.assert_close(net(x), model(x))


def test_sums_with_fewer_entries_than_constants_spread() -> None:
    """x (N, 1) plus a constant (6,): the map without its bias has six rows, not one."""
    constant = torch.randn(6).double()
    model = branched(lambda h: h[:, :1] + constant).double()
    net = nets.from_module(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x))
    node = net.nodes[2]
    assert node.linear is not None
    assert node.linear(torch.ones(2, 1).double()).shape == (2, 6)
    torch.testing.assert_close(torch.from_numpy(net.dense.logits(x.numpy())), model(x))


def test_values_that_lead_nowhere_are_left_out() -> None:
    def idle(h: Tensor) -> Tensor:
        torch.relu(h).add(1)
        return functional.silu(h)

    net = nets.from_module(branched(idle))
    assert [node.activation for node in net.activations] == ["silu"]
    x = torch.rand(2, 3)
    assert radius(net, x, net(x).argmax(1), "Linf").shape == (2,)


@pytest.mark.parametrize("where", ["layer", "function", "method"])
def test_a_log_softmax_at_the_end_changes_no_margin(where: str) -> None:
    ways = {
        "layer": nn.LogSoftmax(1),
        "function": fuzz_modules.Apply(lambda z: functional.log_softmax(z, dim=-1)),
        "method": fuzz_modules.Apply(lambda z: z.log_softmax(1)),
    }
    logits = random_net(4, 8, 3)
    model = nn.Sequential(logits, ways[where])
    net = nets.from_module(model)
    x = torch.rand(6, 4, dtype=torch.float64)
    y = logits(x).argmax(1)
    assert net.normalised
    assert not nets.from_module(logits).normalised
    torch.testing.assert_close(net(x).log_softmax(1), model(x))
    torch.testing.assert_close(radius(model, x, y, method="linear"), radius(logits, x, y, method="linear"))
    nets.check_reading(net, model, x)
    again = nn.Sequential(model, nn.Linear(3, 2).double())
    with pytest.raises(NotPiecewiseAffine, match=r"[Ll]og"):
        nets.from_module(again)


def test_a_log_softmax_over_the_samples_is_refused() -> None:
    with pytest.raises(NotPiecewiseAffine, match="LogSoftmax"):
        nets.from_module(nn.Sequential(random_net(4, 3), nn.LogSoftmax(0)))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_what_is_put_around_modules_is_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner = random_net(4, 8, 3)
    x = torch.rand(5, 4, dtype=torch.float64)
    for model in (wrap(inner), nn.Sequential(wrap(inner), nn.Identity())):
        torch.testing.assert_close(nets.from_module(model, (4,))(x), inner(x))


def test_messages_do_not_say_what_a_layer_is_not() -> None:
    """LeakyReLU is piecewise affine, and is not read."""
    for layer in (nn.LeakyReLU(), nn.Hardtanh()):
        with pytest.raises(NotPiecewiseAffine, match=r"is not read") as caught:
            nets.from_module(nn.Sequential(nn.Linear(2, 2), layer))
        assert "is not piecewise affine" not in str(caught.value)


def test_batches_do_not_decide_what_is_read() -> None:
    """Arithmetic on the number of samples is refused, even where it is off for few of them."""
    for function in (
        lambda h: h * h.size(0),
        lambda h: h + torch.relu(h) * (h.shape[0] // 1000),
        lambda h: h.reshape(-1, 6) + h.numel(),
        lambda h: h.reshape(1, -1).reshape(-1, 6),
        lambda h: h[:1000],
        lambda h: h + torch.zeros(h.size(0), 6),
    ):
        with pytest.raises(NotPiecewiseAffine):
            nets.from_module(branched(function))
    read = nets.from_module(branched(lambda h: h.view(h.size(0) * 1, h.numel() // h.size(0)) / h.size(1)))
    assert read(torch.rand(7, 3)).shape == (7, 2)


class ByDtype(nn.Module):
    """Another function in float64 than in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("one", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.one.dtype == torch.float64 else torch.relu(self.layer(x)) + 1


def test_a_model_that_depends_on_its_precision_is_refused_at_a_sample() -> None:
    with pytest.raises(NotPiecewiseAffine, match="another function in float64"):
        nets.from_module(ByDtype(), (3,), torch.rand(2, 3))


def test_reading_draws_no_random_numbers() -> None:
    model = random_net(3, 4, 2)
    state = torch.get_rng_state()
    nets.from_module(model, (3,), torch.zeros(2, 3))
    assert torch.equal(state, torch.get_rng_state())


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
