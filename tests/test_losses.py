"""Losses against closed forms, NumPy and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from wda import losses

NAMES = ("ce", "margin", "dlr", "redlr")
each_loss = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=[(3, torch.float32), (3, torch.float64), (10, torch.float32), (10, torch.float64)], ids=str)
def sample(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Logits, right and wrong, and labels."""
    classes, dtype = request.param
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(40, classes, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    return logits, torch.where(torch.arange(40) < 20, logits.argmax(1), torch.arange(40) % classes)


def by_hand(name: str, z: np.ndarray, y: int) -> float:
    """One loss of one sample, as the papers define it."""
    first, second, third = sorted(z, reverse=True)[:3]
    gap = (second if z[y] == first else first) - z[y]
    if name == "ce":
        return math.log(sum(math.exp(value - z[y]) for value in z))
    ratio = gap / (first - third)
    return {"margin": gap, "dlr": ratio, "redlr": min(ratio, 0.0)}[name]


@each_loss
def test_loss_is_that_of_the_definition(name: str, sample: tuple[Tensor, Tensor]) -> None:
    logits, y = sample
    values = losses.get(name)(logits, y)
    assert values.dtype == logits.dtype
    expected = [by_hand(name, z, label) for z, label in zip(logits.double().numpy(), y.tolist(), strict=True)]
    assert values.double().numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@each_loss
def test_gradients_agree_with_finite_differences(name: str, sample: tuple[Tensor, Tensor]) -> None:
    logits, y = sample[0].double().requires_grad_(), sample[1]
    assert torch.autograd.gradcheck(lambda z: losses.get(name)(z, y), logits)


@each_loss
def test_adding_one_number_to_all_logits_changes_nothing(name: str, sample: tuple[Tensor, Tensor]) -> None:
    logits, y = sample
    loss = losses.get(name)
    torch.testing.assert_close(loss(logits + 17, y), loss(logits, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "power"), [("dlr", 0), ("redlr", 0), ("margin", 1)])
def test_scaling_the_logits(name: str, power: int, sample: tuple[Tensor, Tensor]) -> None:
    logits, y = sample
    loss = losses.get(name)
    torch.testing.assert_close(loss(8 * logits, y), 8**power * loss(logits, y))


def test_margin_is_negative_exactly_where_the_label_is_strictly_largest() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    assert losses.margin(logits, torch.zeros(3, dtype=torch.int64)).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("name", ["dlr", "redlr"])
@pytest.mark.parametrize("y", [0, 3])
def test_three_equal_logits_give_no_nan(name: str, y: int) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]], requires_grad=True)
    value = losses.get(name)(logits, torch.tensor([y]))
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("logits", [[1.0, 2.0, 0.0], [2.0, 2.0, 0.0]], ids=["wrong", "tied"])
def test_redlr_is_zero_with_zero_gradient_on_errors(logits: list[float]) -> None:
    """A tie is an error, as for the accuracy."""
    z = torch.tensor([logits], requires_grad=True)
    value = losses.redlr(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ["dlr", "redlr"])
def test_ratios_need_three_classes(name: str) -> None:
    with pytest.raises(ValueError, match=f"loss='{name}' needs K >= 3 .* has 2"):
        losses.get(name)(torch.zeros(1, 2), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_huge_logits_is_finite_with_a_gradient(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e30, 0.0], [0.0, 1e30]], dtype=dtype, requires_grad=True)
    values = losses.ce(logits, torch.tensor([0, 0]))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values.tolist() == pytest.approx([0, 1e30])
    assert gradient.tolist() == [[0, 0], [-1, 1]]


@pytest.mark.parametrize("name", ["CE", "", None, 1, ["ce"]])
def test_an_unknown_loss_is_named(name: object) -> None:
    with pytest.raises(ValueError, match=r"loss=.*'ce', 'margin', 'dlr', 'redlr' is accepted"):
        losses.get(name)
