"""Max pooling between linear maps: which entries a window holds, and its maximum as a chain of ReLUs."""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import relu

from wda.nets import Net, Node

__all__ = ["value_shape", "windows", "without_pooling"]


def value_shape(net: Net, value: int) -> tuple[int, ...]:
    """The shape of a value of a network: of the input for 0, of the output of a node otherwise.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Linear(3, 2))
    >>> value_shape(net, 0), value_shape(net, 1)
    ((3,), (2,))
    """
    return net.nodes[value - 1].shape if value else net.shape


def windows(net: Net, i: int) -> tuple[Tensor, Tensor]:
    """Which rows and which columns of its input each output of a max pooling node sees.

    Its windows are rectangles, so it is asked about one row and one column at a time.

    Returns
    -------
    Tensors of 0 and 1, shapes (height out, height in) and (width out, width in)

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.Flatten()), shape=(1, 4, 2))
    >>> windows(net, 1)[0].tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    node = net.nodes[i - 1]
    channels, height, width = value_shape(net, node.inputs[0])
    like = net.like.new_zeros(1, channels, 1, 1)
    rows = node.call(torch.eye(height).to(like)[:, None, :, None] + like.expand(-1, -1, height, width))
    columns = node.call(torch.eye(width).to(like)[:, None, None, :] + like.expand(-1, -1, height, width))
    return rows[:, 0, :, 0].T, columns[:, 0, 0, :].T


def without_pooling(net: Net) -> tuple[Net, list[int]]:
    """The same function without max pooling, and the place of each old value among the new ones.

    The entries of a window are gathered by linear maps, one for each position in it, and their maximum is built from
    :math:`\\max(a, b) = a + [b - a]_+`, halving their number each time.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.Flatten()), shape=(1, 2, 2))
    >>> flat, place = without_pooling(net)
    >>> flat.units, float(flat(torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]])))
    ((1, 1, 1), 4.0)
    """
    nodes: list[Node] = []
    place = [0]
    for i, node in enumerate(net.nodes, 1):
        moved = replace(node, inputs=tuple(place[j] for j in node.inputs))
        if node.kind != "maxpool":
            nodes.append(moved)
        else:
            entries = []
            for index in _entries(*windows(net, i), channels=node.shape[0]):
                nodes.append(_gather(moved, index))
                entries.append(len(nodes))
            while len(entries) > 1:
                pairs = itertools.zip_longest(entries[::2], entries[1::2])
                entries = [a if b is None else _maximum(nodes, moved, a, b) for a, b in pairs]
        place.append(len(nodes))
    return replace(net, nodes=tuple(nodes)), place


def _entries(rows: Tensor, columns: Tensor, channels: int) -> list[Tensor]:
    """For each position in the window, which entry of the flattened input each output sees.

    A window that the border cuts short sees its last row or column again.
    """
    height, width = rows.shape[1], columns.shape[1]
    down, across = ([_nth(seen, k) for k in range(int(seen.sum(1).max()))] for seen in (rows, columns))
    channel = torch.arange(channels, device=rows.device)[:, None, None] * (height * width)
    return [channel + y[:, None] * width + x for y in down for x in across]


def _nth(seen: Tensor, k: int) -> Tensor:
    """The position of the k-th 1 of each row, counted from 0, or of the last one."""
    order = seen.cumsum(1) * seen
    return (order == (order.amax(1, keepdim=True)).clamp(max=k + 1)).to(torch.int8).argmax(1)


def _gather(node: Node, index: Tensor) -> Node:
    def call(v: Tensor) -> Tensor:
        return v.flatten(1)[:, index]

    return Node("affine", node.name, node.inputs, node.shape, call, call, call)


def _maximum(nodes: list[Node], node: Node, a: int, b: int) -> int:
    """Append a + [b - a]_+, and say which value it is."""
    nodes.append(Node("affine", node.name, (a,), node.shape, operator.neg, operator.neg, lambda v: v))
    nodes.append(Node("sum", node.name, (b, len(nodes)), node.shape, operator.add))
    nodes.append(Node("activation", node.name, (len(nodes),), node.shape, relu, activation="relu"))
    nodes.append(Node("sum", node.name, (a, len(nodes)), node.shape, operator.add))
    return len(nodes)
