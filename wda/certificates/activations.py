r"""One activation at a time: its derivative, its image, and lines below and above it that rounding does not spoil.

With the unit roundoff :math:`u = 2^{-53}`, three things are taken for granted: sums, products and quotients are
correctly rounded (IEEE 754); the library's activations are within :math:`2^{-47}(|f(x)| + \min(|x|, 64))` of the exact
ones, and their derivatives within :math:`2^{-47}`. The second is 64u and what `tests/test_rounding.py` finds many
times over. What is said to hold below then holds in real arithmetic.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from wda.nets import Map, Node

__all__ = ["Lines", "bends", "bent_lines", "derivative", "image", "relu_lines", "slopes"]

Bounds = tuple[Tensor, Tensor]
"""Lower and upper bounds."""

# twice what activations and their derivatives may be off by
_ERROR = 2.0**-46
# torch's softplus is x from its threshold (at least 20) on, where it jumps down by exp(-20) / 20 of x or less
_JUMP = 2.0**-33
# a line above ReLU, raised by 8u of itself and by more than products lose that are too small to be normal numbers
_RAISED = 1 + 2.0**-50
TINY = 2.0**-1022

# where an activation's derivative has its limit, and powers of the input do not yet overflow
_FAR = 1e100


class Lines(NamedTuple):
    """A line below and a line above an activation: slope and offset for each unit.

    Examples
    --------
    >>> lines = relu_lines(torch.tensor([-1.0]), torch.tensor([3.0]))
    >>> lines.lower.tolist(), lines.upper.tolist()
    ([1.0], [0.75])
    """

    lower: Tensor
    lower_offset: Tensor
    upper: Tensor
    upper_offset: Tensor


def bends(node: Node) -> bool:
    """Whether an activation is another one than ReLU.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> [bends(node) for node in from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU())).activations]
    [True]
    """
    return node.activation != "relu"


def derivative(call: Map, x: Tensor, order: int = 1) -> Tensor:
    """A derivative of an elementwise map at each entry of x; at infinity its limit.

    Examples
    --------
    >>> derivative(torch.sigmoid, torch.tensor([0.0, torch.inf]).double()).tolist()
    [0.25, 0.0]
    """
    x = x.detach().clamp(-_FAR, _FAR).requires_grad_()
    with torch.enable_grad():
        value = call(x)
        for _ in range(order):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value.detach()


@functools.lru_cache(maxsize=64)
def _turning_points(call: Map) -> Bounds:
    """Where the first and where the second derivative of an elementwise map change sign, in float64.

    Between turning points of f' it is monotone. They are looked for on [-40, 40]: beyond it GELU, SiLU, softplus and
    the sigmoid are affine to double precision. A derivative below 1e-13 has no sign.
    """
    grid = torch.linspace(-40.0, 40.0, 8001, dtype=torch.float64)
    found = []
    for order in (1, 2):
        values = derivative(call, grid, order)
        signed = (values.abs() > 1e-13).nonzero()[:, 0]
        sign = values[signed].sign()
        at = (sign[1:] != sign[:-1]).nonzero()[:, 0]
        low, high, start = grid[signed[at]], grid[signed[at + 1]], sign[at]
        for _ in range(50):
            middle = (low + high) / 2
            left = derivative(call, middle, order).sign() == start
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        found.append((low + high) / 2)
    return found[0], found[1]


def slopes(node: Node, low: Tensor, high: Tensor) -> Bounds:
    """The least and the largest derivative over [low, high], as computed.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> (gelu,) = from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU())).activations
    >>> low, high = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    >>> [round(float(side), 4) for side in slopes(gelu, low, high)]
    [-0.0833, 1.0833]
    """
    if not bends(node):
        return (low > 0).to(low), (high >= 0).to(low)
    inside = [t.clamp(low, high) for t in _turning_points(node.call)[1].to(low)]
    derivatives = torch.stack([derivative(node.call, x) for x in (low, high, *inside)])
    return derivatives.amin(0), derivatives.amax(0)


def image(node: Node, low: Tensor, high: Tensor) -> Bounds:
    """Bounds of an activation over [low, high]: its extremes are at the ends or where its derivative changes sign.

    An error in that place enters the value squared.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> (gelu,) = from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU())).activations
    >>> low, high = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    >>> [round(float(side), 4) for side in image(gelu, low, high)]
    [-0.17, 0.8413]
    """
    if not bends(node):
        return relu(low), relu(high)
    ends = [low, high, *(t.clamp(low, high) for t in _turning_points(node.call)[0].to(low))]
    images = torch.stack([node.call(end) for end in ends])
    slack = _slack(node, images.abs().amax(0), low, high)
    return images.amin(0) - slack, images.amax(0) + slack


def _slack(node: Node, size: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Twice what values of an activation over [low, high] may be off by, if they are at most `size`."""
    error = _ERROR * (size + low.abs().maximum(high.abs()).clamp(max=64)) + TINY
    return error + _JUMP * high.clamp(min=0) if node.activation == "softplus" else error


def relu_lines(low: Tensor, high: Tensor) -> Lines:
    """CROWN's lines for ReLU over [low, high].

    Through 0 with a slope in [0, 1] a line is below. With whatever slope s in [0, 1], the line of offset
    max(-s low, (1 - s) high) is above: it is so at both ends, and ReLU is convex. So the rounding of s does no harm,
    and that of the offset, 3u of itself, is made good.

    Examples
    --------
    >>> relu_lines(torch.tensor([-1.0]), torch.tensor([1.0])).upper_offset.tolist()
    [0.5]
    """
    unstable = (low < 0) & (high > 0)
    on = (low >= 0).to(low)
    chord = torch.where(unstable, (high / torch.where(unstable, high - low, 1)).clamp(min=TINY), on)
    offset = (-chord * low).maximum((1 - chord) * high) * _RAISED + TINY
    lower = torch.where(unstable, (high > -low).to(low), on)
    return Lines(lower, torch.zeros_like(low), chord, torch.where(unstable, offset, 0))


def bent_lines(node: Node, low: Tensor, high: Tensor) -> Lines:
    """Lines for a smooth activation: of two slopes that with the tighter line in the middle of [low, high].

    Examples
    --------
    >>> from wda.nets import from_module
    >>> (gelu,) = from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU())).activations
    >>> low, high = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    >>> lines, middle = bent_lines(gelu, low, high), gelu.call(torch.zeros(1).double())
    >>> bool(lines.lower_offset <= middle <= lines.upper_offset)
    True
    """
    middle = (low + high) / 2
    tangent = derivative(node.call, middle)
    wide = high - low > 1e-6  # the chord of a shorter interval is lost to rounding
    rise = (node.call(high) - node.call(low)) / (high - low).clamp(min=1e-6)
    chord = torch.where(wide, rise, tangent)
    (tangent_below, tangent_above), (chord_below, chord_above) = (
        _touching(node, slope, low, high) for slope in (tangent, chord)
    )
    lower = tangent * middle + tangent_below > chord * middle + chord_below
    upper = tangent * middle + tangent_above < chord * middle + chord_above
    return Lines(
        torch.where(lower, tangent, chord),
        torch.where(lower, tangent_below, chord_below),
        torch.where(upper, tangent, chord),
        torch.where(upper, tangent_above, chord_above),
    )


def _touching(node: Node, slope: Tensor, low: Tensor, high: Tensor) -> Bounds:
    r"""The offsets of the lines of a given slope s that touch the graph of an activation f over [low, high].

    The extremes of :math:`g(x) = f(x) - sx` are at the ends or where :math:`f' = s`; between turning points of f' there
    is at most one such place x*, found by bisection. If it lies in the last interval [a, b], then
    :math:`|g(a) - g(x^*)| \le (b - a)|f'(b) - f'(a)|`, as f' is monotone. If it lies outside, some sign of f' - s came
    out wrong, and :math:`|f' - s|` is at most the error of f' from [a, b] to x*. Both are allowed for.
    """
    ends = [low, *(t.clamp(low, high) for t in _turning_points(node.call)[1].to(low)), high]
    left, right = torch.stack(ends[:-1]), torch.stack(ends[1:])
    rising = derivative(node.call, right) > derivative(node.call, left)
    # down to 2^-40, as the derivative may turn within a few units of a range however wide
    widest = float((right - left).amax()) if left.numel() else 0.0
    for _ in range(40 + max(0, math.frexp(widest)[1])):
        middle = (left + right) / 2
        go_right = (derivative(node.call, middle) < slope) == rising
        left, right = torch.where(go_right, middle, left), torch.where(go_right, right, middle)
    turn = (derivative(node.call, right) - derivative(node.call, left)).abs() + _ERROR
    images = torch.stack([node.call(x) for x in (*ends, *left)])
    gap = images - slope * torch.stack([*ends, *left])
    size = images.abs().amax(0) + slope.abs() * low.abs().maximum(high.abs())
    slack = _slack(node, size, low, high) + _ERROR * (high - low) + ((right - left) * turn).sum(0)
    return gap.amin(0) - slack, gap.amax(0) + slack
