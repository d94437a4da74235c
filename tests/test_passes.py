"""Gradients in bfloat16: every flip is one of full precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wda
from wda.losses import margin
from wda.passes import Oracle


def near_the_boundary(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and points whose margins bfloat16 cannot tell from zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(400, 6)
    y = model(x).argmax(1)
    with torch.no_grad():
        for _ in range(30):
            other = x.roll(1, 0)
            middle = (x + other) / 2
            same = (model(middle).argmax(1) == y)[:, None]
            x = torch.where(same, middle, x)
    return model, x, y


@pytest.mark.parametrize("seed", range(4))
def test_flips_of_bfloat16_alone_are_not_claimed(seed: int) -> None:
    model, x, y = near_the_boundary(seed)
    exact = margin(model(x), y).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = margin(model(x).float(), y).detach()
    assert ((rough >= 0) & (exact < 0)).any(), "nothing to tell apart"
    rivals = (y[:, None] + 1) % 3
    with Oracle(model, batch_size=64, autocast=True) as oracle:
        logits, gradient = oracle.gradient(x, y, margin)
        again, gradients = oracle.margin_gradients(x, y, rivals)
    for found in (logits, again):
        assert not ((margin(found, y) >= 0) & (exact < 0)).any()
        assert found.dtype == x.dtype
    assert oracle.forward == 2 * len(x) + 2 * int((rough >= 0).sum())
    with Oracle(model) as oracle:
        _, full = oracle.gradient(x, y, margin)
    assert gradient.dtype == gradients.dtype == x.dtype
    cosine = nn.functional.cosine_similarity(gradient, full)
    assert cosine.median() > 0.999
    assert not torch.equal(gradient, full), "autocast had no effect"


def test_distances_found_in_bfloat16_are_those_of_full_precision() -> None:
    x, y = wda.data.load("digits", n=60)
    model = wda.models.load("digits-cnn")
    full, fast = (wda.distances(model, x, y, autocast=autocast, steps=20, restarts=1) for autocast in (False, True))
    assert fast.distance.isfinite().all()
    assert (fast.distance / full.distance).nan_to_num(nan=1.0).median() == pytest.approx(1, abs=0.02)
    moved = fast.distance > 0
    assert (margin(model(fast.x_adv[moved]), y[moved]) >= 0).all()


def test_autocast_is_a_flag() -> None:
    with pytest.raises(TypeError, match="autocast=1"):
        wda.distances(nn.Linear(2, 2), torch.rand(2, 2), torch.tensor([0, 1]), autocast=1)
