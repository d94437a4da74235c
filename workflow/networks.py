"""Random networks for tests and studies: weights N(0, 1/fan_in), biases N(0, 1), float64."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


def random_net(*widths: int, seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A fully connected network of the given widths, input first, logits last."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        linear = nn.Linear(into, out).double().requires_grad_(False)
        linear.weight.copy_(torch.randn(out, into, generator=generator, dtype=torch.float64) / math.sqrt(into))
        linear.bias.copy_(torch.randn(out, generator=generator, dtype=torch.float64))
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def random_sample(net: nn.Module, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` uniform points of [-2, 2]^n and uniform labels."""
    generator = torch.Generator().manual_seed(1000 + seed)
    n, classes = net[0].in_features, net[-1].out_features
    x = 4 * torch.rand(count, n, generator=generator, dtype=torch.float64) - 2
    return x, torch.randint(0, classes, (count,), generator=generator)


def one_hidden(W1: list, b1: list, W2: list, b2: list | None = None) -> nn.Sequential:
    """A network with one hidden ReLU layer and the given weights."""
    W1, b1, W2 = (torch.tensor(v, dtype=torch.float64) for v in (W1, b1, W2))
    net = nn.Sequential(nn.Linear(W1.shape[1], len(W1)), nn.ReLU(), nn.Linear(len(W1), len(W2))).double()
    net.requires_grad_(False)
    net[0].weight.copy_(W1), net[0].bias.copy_(b1), net[2].weight.copy_(W2)
    net[2].bias.copy_(torch.zeros(len(W2)) if b2 is None else torch.tensor(b2, dtype=torch.float64))
    return net
