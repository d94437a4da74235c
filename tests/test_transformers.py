r"""How the bundled transformers grow along rays x + a u: their layers' bounds, and so their slopes.

A pre-norm block adds a bounded term, so the logits are :math:`A x` plus a bounded term, with A the head, the mean over
the tokens and the embedding; where a normalisation precedes the head they are bounded themselves.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wda import data, models
from wda.losses import margin

DUAL = {"Linf": 1, "L2": 2, "L1": float("inf")}  # the order of the norm dual to each


def norm_bound(layer: nn.LayerNorm) -> float:
    """What the norm of one token cannot exceed behind a layer normalisation: sqrt(d) max |gain| + |bias|."""
    width = layer.normalized_shape[0]
    return width**0.5 * layer.weight.abs().max().item() + layer.bias.norm().item()


def affine_bound(layer: nn.Linear, bound: float) -> float:
    """The same behind a linear layer, where its input's norm is at most `bound`."""
    return torch.linalg.matrix_norm(layer.weight, 2).item() * bound + layer.bias.norm().item()


def attention_bound(attention: models.Attention, bound: float) -> float:
    """The same behind attention: in each head a convex combination of values, and each head may take another one."""
    width = attention.output.in_features
    values = zip(attention.qkv.weight[2 * width :].chunk(attention.heads),
                 attention.qkv.bias[2 * width :].chunk(attention.heads), strict=True)  # fmt: skip
    heads = [torch.linalg.matrix_norm(weight, 2).item() * bound + bias.norm().item() for weight, bias in values]
    return affine_bound(attention.output, torch.tensor(heads, dtype=torch.float64).norm().item())


def branch_bound(branch: nn.Sequential) -> float:
    """The same for what a pre-norm block adds to each token. |gelu(t)| <= |t|."""
    normalise, *layers = branch
    bound = norm_bound(normalise)
    for layer in layers:
        if not isinstance(layer, nn.GELU):
            bound = (attention_bound if isinstance(layer, models.Attention) else affine_bound)(layer, bound)
    return bound


def linear_part(model: nn.Sequential) -> Tensor:
    """Head, mean over the tokens and embedding as one matrix, shape (K, 64)."""
    patches = nn.functional.conv2d(torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8), model[0].weight, stride=2)
    return model[-1].weight @ patches.mean((2, 3)).T


def directions(seed: int, n: int = 20) -> Tensor:
    """Directions of norm 1, from dense to one pixel."""
    torch.manual_seed(seed)
    u = torch.randn(n, 64, dtype=torch.float64) * (torch.rand(n, 64) < torch.linspace(1, 0.05, n)[:, None])
    u[u.eq(0).all(1), 0] = 1
    return (u / u.norm(dim=1, keepdim=True)).view(n, 1, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    x, y = data.load("digits", n=20)
    return x.double(), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [2, 3, 32])
def test_layer_normalisation_is_bounded_by_gain_and_bias(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    layer = nn.LayerNorm(width, dtype=dtype)
    slack = 1 + 10 * torch.finfo(dtype).eps
    for scale in (1e-3, 1.0, 1e4):
        layer.weight.normal_()
        layer.bias.normal_()
        tokens = torch.cat([torch.randn(200, width, dtype=dtype), torch.eye(width, dtype=dtype)])
        norms = layer(scale * tokens).norm(dim=1)
        assert norms.max().item() <= norm_bound(layer) * slack
    # A token with one large entry, where the gain is largest, almost reaches it.
    layer.bias.zero_()
    reached = layer(1e4 * torch.eye(width, dtype=dtype)).norm(dim=1).max().item()
    assert reached >= 0.999 * (1 - 1 / width) ** 0.5 * norm_bound(layer)


@pytest.mark.parametrize("name", ["digits-vit", "digits-vit-nonorm"])
def test_each_layer_stays_within_its_bound(name: str, images: tuple[Tensor, Tensor]) -> None:
    model, found = models.load(name).double(), []
    bounds = {module: norm_bound(module) for module in model.modules() if isinstance(module, nn.LayerNorm)} | {
        module.branch: branch_bound(module.branch) for module in model if isinstance(module, models.Residual)
    }
    for module in bounds:
        module.register_forward_hook(lambda m, _, out: found.append((out.norm(dim=-1).max().item(), bounds[m])))
    for seed, scale in enumerate((0, 1, 1e2, 1e4, 1e6)):
        model(images[0] + scale * directions(seed))
    assert len(found) == 5 * len(bounds) == 5 * (9 if name == "digits-vit" else 8)
    assert all(norm <= bound for norm, bound in found)
    assert max(norm / bound for norm, bound in found) > 0.1  # the bounds are not idle


def test_without_the_last_normalisation_the_logits_are_linear_up_to_a_bounded_term(
    images: tuple[Tensor, Tensor],
) -> None:
    """|theta(x + v) - theta(x) - A v| <= 2 |W_head| B whatever v is: theta(x + a u) / a tends to A u at rate 1 / a."""
    model = models.load("digits-vit-nonorm").double()
    matrix = linear_part(model)
    added = sum(branch_bound(module.branch) for module in model if isinstance(module, models.Residual))
    most = 2 * torch.linalg.matrix_norm(model[-1].weight, 2).item() * added
    for seed in range(3):
        u, errors = directions(seed), {}
        for a in (1.0, 1e2, 1e4, 1e6, 1e8):
            moved = a * u.flatten(1) @ matrix.T
            errors[a] = (model(images[0] + a * u) - model(images[0]) - moved).norm(dim=1).max().item()
        assert max(errors.values()) <= most
        assert errors[1e8] == pytest.approx(errors[1e6], rel=1e-3)  # it converges, and does not only stay bounded
        assert errors[1e8] > 0.1  # the blocks do add something


@pytest.mark.parametrize("norm", DUAL)
def test_without_the_last_normalisation_the_slope_is_that_of_head_pooling_and_embedding(
    norm: str, images: tuple[Tensor, Tensor]
) -> None:
    """l = max over labels k and rivals k' of the dual norm of A^T (e_k' - e_k): reached by one ray, passed by none."""
    model, y = models.load("digits-vit-nonorm").double(), torch.arange(10)
    matrix, x = linear_part(model), images[0][:1].expand(10, -1, -1, -1)
    gaps = matrix[None] - matrix[:, None]  # (label, rival, 64)
    slopes = torch.linalg.vector_norm(gaps, DUAL[norm], dim=2)
    slope, (label, rival) = slopes.max().item(), divmod(slopes.argmax().item(), 10)
    gap = gaps[label, rival]
    one_pixel = torch.eye(64, dtype=torch.float64)[gap.abs().argmax()]
    steepest = {"Linf": gap.sign(), "L2": gap / gap.norm(), "L1": gap.sign() * one_pixel}[norm]
    a = 1e8
    along = margin(model(x + a * steepest.view(1, 8, 8)), y) / a
    assert along.argmax() == label
    assert along[label].item() == pytest.approx(slope, rel=1e-5)

    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    for seed in range(3):
        u = directions(seed, 10).flatten(1)
        u = u / torch.linalg.vector_norm(u, order, dim=1, keepdim=True)
        for turned in u:
            assert (margin(model(x + a * turned.view(1, 8, 8)), y) / a).max().item() <= slope * (1 + 1e-5)


def test_with_the_last_normalisation_the_logits_are_bounded_and_the_slope_is_zero(
    images: tuple[Tensor, Tensor],
) -> None:
    model = models.load("digits-vit").double()
    norm, head = model[-2], model[-1]
    assert isinstance(norm, nn.LayerNorm)
    most = affine_bound(head, norm_bound(norm))
    for seed in range(3):
        u = directions(seed)
        logits = {a: model(images[0] + a * u) for a in (0.0, 1.0, 1e2, 1e4, 1e6, 1e8)}
        assert max(z.norm(dim=1).max().item() for z in logits.values()) <= most
        assert (logits[1e8] / 1e8).abs().max().item() < 1e-6
        torch.testing.assert_close(logits[1e8], logits[1e6], rtol=1e-3, atol=1e-3)  # a limit along each ray
