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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_every_way_to_run_out_of_memory_halves_the_batch(error: RuntimeError) -> None:
    def model(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise error
        return torch.cat([x, -x], 1)

    x = torch.randn(9, 1)
    with Oracle(model, batch_size=8) as oracle:
        torch.testing.assert_close(oracle.logits(x), torch.cat([x, -x], 1))
    assert oracle.counts(9, 0.0).batch == oracle.batch_size == 2


def test_another_error_of_the_model_does_not() -> None:
    def model(x: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Oracle(model, batch_size=8) as oracle:
        oracle.logits(torch.randn(9, 1))
    assert oracle.batch_size == 8


@pytest.mark.parametrize("attack", ["fgsm", "wda", "closest"])
def test_nan_at_the_first_sample_is_no_obstacle(attack: str) -> None:
    x, y = torch.rand(6, 2), torch.zeros(6, dtype=torch.int64)
    x[0] = 0
    with pytest.warns(wda.Untrustworthy, match=r"at 1 of 6 samples \(0\)"):
        adv = wda.attack(attack, lambda x: torch.cat([x[:, :1].log(), x[:, 1:]], 1), x, y, wda.Threat("L2", 0.1))
    assert (adv.x_adv[0] == 0).all()
