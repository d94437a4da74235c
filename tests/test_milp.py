"""Mixed-integer programs: the slopes are those of enumeration, and bounds hold when time runs out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from wda import cells
from wda.certificates import milp
from wda.certificates.recession import recession_slope
from wda.errors import NotPiecewiseAffine
from wda.nets import Dense, Net, from_module

DUAL = {"Linf": 1, "L1": np.inf}
each_norm = pytest.mark.parametrize("norm", ["Linf", "L1"])
each_seed = pytest.mark.parametrize("seed", range(3))
each_shape = pytest.mark.parametrize("sizes", [(2, 7, 2), (3, 6, 3), (2, 5, 4, 3), (3, 4, 4, 2)], ids=str)
each_box = pytest.mark.parametrize("box", [(-1.0, 1.0), (0.0, 1.0), (-20.0, 30.0)], ids=str)


def network(sizes: tuple[int, ...], seed: int, scale: float = 1.0) -> Net:
    """A chain of linear layers and ReLU with random weights, biased enough that cells meet small boxes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after).double(), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=scale / math.sqrt(before))
        nn.init.normal_(layers[-2].bias, std=0.5 * scale)
    return from_module(nn.Sequential(*layers[:-1]))


def one_layer(W: object, c: object, b: object = None) -> Dense:
    """theta = (0, c . relu(W x + b))."""
    W, c = np.array(W, float), np.array(c, float)
    bias = np.zeros(len(W)) if b is None else np.array(b, float)
    return Dense(((W,), (np.zeros((2, W.shape[1])), np.stack([0 * c, c]))), (bias, np.zeros(2)), ("relu",))


def all_pairs(classes: int) -> list[tuple[int, int]]:
    return list(itertools.permutations(range(classes), 2))


def steepest(J: np.ndarray, norm: str, pairs: list[tuple[int, int]]) -> float:
    """The largest dual norm of a row difference of the Jacobians J (M, K, n)."""
    return max(np.linalg.norm(J[:, j] - J[:, k], DUAL[norm], axis=1).max() for k, j in pairs)


# -- the Lipschitz constant over a box -------------------------------------------------------------------------------


@each_norm
@each_seed
@each_shape
@each_box
def test_lipschitz_is_the_steepest_cell_of_the_box(
    norm: str, seed: int, sizes: tuple[int, ...], box: tuple[float, float]
) -> None:
    net = network(sizes, seed)
    pairs = all_pairs(net.classes)
    slope = milp.lipschitz(net.dense, norm, pairs, box)
    J, _ = cells.enumerate(net, box).affine()
    assert slope.lower == slope.upper
    assert slope.lower == pytest.approx(steepest(J, norm, pairs), rel=1e-9)
    assert slope.lower == pytest.approx(steepest(J, norm, [(slope.label, slope.rival)]), rel=1e-9)


@each_norm
@each_seed
def test_no_sampled_gradient_is_steeper(norm: str, seed: int) -> None:
    net = network((6, 12, 3), seed)
    pairs = [(2, 0), (2, 1)]
    slope = milp.lipschitz(net.dense, norm, pairs, (-1.0, 1.0))
    x = torch.rand(2000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    seen = steepest(net.jacobian(x).numpy(), norm, pairs)
    assert slope.lower == slope.upper
    assert seen <= slope.lower * (1 + 1e-12)


@each_norm
@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_small_and_large_weights(norm: str, scale: float) -> None:
    net = network((2, 5, 4, 3), 0, scale)
    pairs = all_pairs(3)
    J, _ = cells.enumerate(net, (-2.0, 1.0)).affine()
    slope = milp.lipschitz(net.dense, norm, pairs, (-2.0, 1.0))
    assert slope.lower == slope.upper == pytest.approx(steepest(J, norm, pairs), rel=1e-9)
