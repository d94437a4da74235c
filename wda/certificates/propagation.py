r"""Bounds propagated through a network: intervals, backward linear bounds, and intervals of the Jacobian.

Everything works on the node graph of `wda.nets`, in float64, for a batch of regions at once, on the device of the
network. A region is a ball :math:`\|x - c\|_r \le R`, cut by a box if one is given. Results hold up to rounding, which
is allowed for by a slack of 1e-9 relative to the sum of the absolute values of all terms: millions of times what
rounding does to sums of this length, but no proof about floating point.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from wda.errors import NotPiecewiseAffine
from wda.nets import Map, Net, Node
from wda.norms import dual, norm, support

__all__ = ["Bounds", "adjoint", "gradient", "interval", "linear", "margins", "preactivations", "slopes", "windows"]

ROUNDING = 1e-9
"""What certified bounds are widened by, relative to the size of their terms."""

Bounds = tuple[Tensor, Tensor]
"""Lower and upper bounds."""

# how many numbers the widest value of a chunk of rows may hold: 4 MB, near the processor
_CHUNK = 2**19
# where an activation's derivative has its limit, and powers of the input do not yet overflow
_FAR = 1e100


def margins(net: Net, pairs: Sequence[tuple[int, int]]) -> Tensor:
    r"""The rows :math:`e_j - e_k` for label k and rival j, (pairs, K): logits to :math:`\theta_j - \theta_k`.

    Raises
    ------
    ValueError
        A pair is not made of two different classes of the network.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> margins(from_module(torch.nn.Linear(4, 3)), [(0, 2)]).tolist()
    [[-1.0, 0.0, 1.0]]
    """
    classes = range(net.classes)
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not all(label in classes for label in pair):
            raise ValueError(f"pairs has {pair}: (label, rival) with two different classes of 0..{net.classes - 1}")
    labels, rivals = torch.tensor([*pairs], device=net.like.device).reshape(-1, 2).T
    unit = torch.eye(net.classes).to(net.like)
    return unit[rivals] - unit[labels]


def adjoint(net: Net, i: int, rows: Tensor, absolute: bool = False) -> tuple[Tensor, ...]:
    r"""The transpose of an affine or sum node applied to rows on its output.

    Parameters
    ----------
    net : Net
    i : int
        The node ``net.nodes[i - 1]``, whose output is value i.
    rows : Tensor, shape (M, \*node.shape)
    absolute : bool
        With the absolute values of the weights.

    Returns
    -------
    tuple of tensors (M, \*shape of the input), one for each input of the node

    Examples
    --------
    >>> from wda.nets import from_module
    >>> layer = torch.nn.Linear(2, 1)
    >>> net = from_module(layer)
    >>> bool((adjoint(net, 1, net.like.new_ones(1, 1))[0] == layer.weight).all())
    True
    """
    node = net.nodes[i - 1]
    through = node.call if node.kind == "sum" else node.absolute if absolute else node.linear
    assert through is not None
    inputs = [net.like.new_zeros(1, *value_shape(net, j), requires_grad=True) for j in node.inputs]
    with torch.enable_grad():
        output = through(*inputs)
    if not (len(rows) and output.requires_grad):  # no rows, or the zero map
        return tuple(rows.new_zeros(len(rows), *v.shape[1:]) for v in inputs)
    # one pass over all rows, without running the map itself on as many zeros
    back = torch.autograd.grad(output, inputs, rows[:, None], is_grads_batched=True)
    return tuple(part[:, 0] for part in back)


def value_shape(net: Net, value: int) -> tuple[int, ...]:
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


def interval(net: Net, low: Tensor, high: Tensor) -> list[Bounds]:
    r"""Interval bounds of every value of a network.

    Parameters
    ----------
    net : Net
    low, high : Tensor, shape (N, \*net.shape)

    Returns
    -------
    list of pairs of tensors
        Of the input, and of the output of every node, (N, \*shape) each.

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that is bounded only (layer normalisation, attention).

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> low, high = interval(net, torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))[-1]
    >>> low.round(decimals=6).tolist(), high.round(decimals=6).tolist()
    ([[0.0, 2.0]], [[1.0, 3.0]])
    """
    values = [(low.to(net.like), high.to(net.like))]
    for node in net.nodes:
        values.append(_image(node, [values[j] for j in node.inputs]))
    return values


def _image(node: Node, inputs: list[Bounds]) -> Bounds:
    """Bounds of the output of a node, from those of its inputs."""
    if node.kind == "affine":
        (low, high), absolute = inputs[0], node.absolute
        assert absolute is not None
        centre = (low + high) / 2
        # rounding included: the centre is as large as what it is made of
        radius = absolute((high - low) / 2 + ROUNDING * centre.abs())
        return node.call(centre) - radius, node.call(centre) + radius
    if node.kind in ("sum", "maxpool"):
        return node.call(*(low for low, _ in inputs)), node.call(*(high for _, high in inputs))
    _refuse(node)
    low, high = inputs[0]
    ends = (
        [low, high, *(t.clamp(low, high) for t in _turning_points(node.call)[0].to(low))]
        if _bends(node)
        else [low, high]
    )
    images = torch.stack([_apply(node, end) for end in ends])
    return images.amin(0), images.amax(0)


def _refuse(node: Node) -> None:
    if node.kind == "bounded":
        raise NotPiecewiseAffine(f"{node.name}: no bound is propagated through this layer")


def _bends(node: Node) -> bool:
    return node.activation != "relu"


def _apply(node: Node, x: Tensor) -> Tensor:
    return node.call(x) if _bends(node) else relu(x)


def _derivative(call: Map, x: Tensor, order: int = 1) -> Tensor:
    """A derivative of an elementwise map at each entry of x; at infinity its limit."""
    x = x.detach().clamp(-_FAR, _FAR).requires_grad_()
    with torch.enable_grad():
        value = call(x)
        for _ in range(order):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value.detach()


@functools.lru_cache(maxsize=64)
def _turning_points(call: Map) -> tuple[Tensor, Tensor]:
    """Where the first and where the second derivative of an elementwise map change sign, in float64.

    Between turning points of f' it is monotone. They are looked for on [-40, 40]: beyond it GELU, SiLU, softplus and
    the sigmoid are affine to double precision. A derivative below 1e-13 has no sign.
    """
    grid = torch.linspace(-40.0, 40.0, 8001, dtype=torch.float64)
    found = []
    for order in (1, 2):
        derivative = _derivative(call, grid, order)
        signed = (derivative.abs() > 1e-13).nonzero()[:, 0]
        sign = derivative[signed].sign()
        at = (sign[1:] != sign[:-1]).nonzero()[:, 0]
        low, high, start = grid[signed[at]], grid[signed[at + 1]], sign[at]
        for _ in range(50):
            middle = (low + high) / 2
            left = _derivative(call, middle, order).sign() == start
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        found.append((low + high) / 2)
    return found[0], found[1]


def slopes(net: Net, ranges: Sequence[Bounds] | None = None) -> list[Bounds]:
    r"""The least and the largest value of each activation's derivative.

    Parameters
    ----------
    net : Net
    ranges : sequence of pairs of tensors (N, units), optional
        Bounds of each pre-activation, as `preactivations` gives them; by default all of :math:`\mathbb R`.

    Returns
    -------
    list of pairs of tensors (N, units); N = 1 without ranges

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU()))
    >>> low, high = slopes(net)[0]
    >>> round(float(low), 4), round(float(high), 4)
    (-0.1289, 1.1289)
    """
    if ranges is None:
        everywhere = (net.like.new_full((1, units), math.inf) for units in net.units)
        ranges = [(-end, end) for end in everywhere]
    return [_slopes(node, low, high) for node, (low, high) in zip(net.activations, ranges, strict=True)]


def _slopes(node: Node, low: Tensor, high: Tensor) -> Bounds:
    if not _bends(node):
        return (low > 0).to(low), (high >= 0).to(low)
    inside = [t.clamp(low, high) for t in _turning_points(node.call)[1].to(low)]
    derivatives = torch.stack([_derivative(node.call, x) for x in (low, high, *inside)])
    return derivatives.amin(0), derivatives.amax(0)


def gradient(net: Net, norm_name: str, pairs: Sequence[tuple[int, int]], steep: Sequence[Bounds]) -> Tensor:
    r"""Upper bounds of the dual norm of the gradient of :math:`\theta_j - \theta_k`, by intervals.

    Entrywise bounds of the Jacobian are propagated backwards through
    :math:`\sigma' \in [\sigma'_{\text{low}}, \sigma'_{\text{high}}]`, as in Fast-Lip (Weng et al., 2018, *Towards fast
    computation of certified robustness for ReLU networks*), and the largest absolute values enter the dual norm. On a
    convex region where the slopes hold this bounds the Lipschitz constant.

    Parameters
    ----------
    net : Net
    norm_name : {"Linf", "L2", "L1"}
        Of the input.
    pairs : sequence of (label, rival)
    steep : sequence of pairs of tensors (1, units)
        From `slopes`.

    Returns
    -------
    Tensor, shape (pairs,)

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that is bounded only.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> round(float(gradient(net, "Linf", [(0, 1)], slopes(net))), 6)
    2.0
    """
    rows = margins(net, pairs)
    pending = {len(net.nodes): (rows, rows)}
    ranges = list(steep)
    for i in range(len(net.nodes), 0, -1):
        node = net.nodes[i - 1]
        slope = ranges.pop() if node.kind == "activation" else None
        if i not in pending:
            continue
        low, high = pending.pop(i)
        if slope is not None:
            products = torch.stack([row * s.view(1, *node.shape) for row in (low, high) for s in slope])
            parts: list[Bounds] = [(products.amin(0), products.amax(0))]
        elif node.kind == "maxpool":
            down, across = windows(net, i)
            parts = [
                (
                    torch.einsum("mcab,ah,bw->mchw", low.clamp(max=0), down, across),
                    torch.einsum("mcab,ah,bw->mchw", high.clamp(min=0), down, across),
                )
            ]
        else:
            _refuse(node)
            centres = adjoint(net, i, (low + high) / 2)
            radii = adjoint(net, i, (high - low) / 2, absolute=True)
            parts = [(c - r, c + r) for c, r in zip(centres, radii, strict=True)]
        for j, part in zip(node.inputs, parts, strict=True):
            pending[j] = (pending[j][0] + part[0], pending[j][1] + part[1]) if j in pending else part
    if 0 not in pending:
        return rows.new_zeros(len(rows))
    low, high = pending[0]
    return norm(torch.maximum(-low, high), dual(norm_name)) * (1 + ROUNDING)


@dataclass(frozen=True)
class _Region:
    """The points within a ball around each centre, and within the box."""

    centre: Tensor
    radius: Tensor
    norm: str
    box: tuple[float, float] | None

    def interval(self) -> Bounds:
        """The least axis-parallel box around each ball that the box leaves."""
        reach = self.radius.view(-1, *[1] * (self.centre.ndim - 1))
        low, high = self.centre - reach, self.centre + reach
        return (low, high) if self.box is None else (low.clamp(min=self.box[0]), high.clamp(max=self.box[1]))

    def minimum(self, rows: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """The least value of each linear function over the region `of` it is asked, and the size of its terms."""
        centre = self.centre[of]
        down = support(-rows, centre, self.radius[of], self.norm, self.box)
        return (rows * centre).flatten(1).sum(1) - down, (rows * centre).abs().flatten(1).sum(1) + down


class _Lines(NamedTuple):
    """A line below and a line above an activation: slope and offset for each unit."""

    lower: Tensor
    lower_offset: Tensor
    upper: Tensor
    upper_offset: Tensor


def linear(
    net: Net,
    rows: Tensor,
    centre: Tensor,
    radius: float | Tensor,
    norm_name: str,
    box: tuple[float, float] | None = None,
    refine: float = math.inf,
) -> Bounds:
    r"""Bounds of linear functions of the logits over balls, by backward propagation of linear bounds.

    Each activation is put between two lines, over bounds of its pre-activation that come from the same backward passes
    and from intervals, whichever is tighter; rows of coefficients are then pulled back to the input, where the extreme
    value over the ball and the box is exact. The lines are those of CROWN (Zhang et al., 2018, *Efficient neural
    network robustness certification with general activation functions*) for ReLU: the chord above, and below a line of
    slope 0 or 1, whichever leaves less area. For other activations a line has the slope of the chord or of the tangent
    in the middle, whichever is tighter in the middle, and touches the curve. A maximum is
    :math:`\max(a, b) = a + [b - a]_+`.

    Parameters
    ----------
    net : Net
    rows : Tensor, shape (R, K) or (N, R, K)
        Coefficients of the logits.
    centre : Tensor, shape (N, \*net.shape)
        Within the box.
    radius : float or Tensor, shape (N,)
        At least 0.
    norm_name : {"Linf", "L2", "L1"}
    box : (float, float), optional
    refine : float
        A layer behind another activation with more units than this keeps its bounds by intervals.

    Returns
    -------
    pair of tensors (N, R)

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that is bounded only.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> low, high = linear(net, torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]), 1.0, "Linf")
    >>> round(float(low), 6), round(float(high), 6)  # the lines for the second unit: 0 and (x + 1) / 2
    (1.0, 4.0)
    """
    flat = _without_pooling(net)[0]
    region = _region(net, centre, radius, norm_name, box)
    lines, _ = _relax(flat, region, refine)
    count = len(region.centre)
    rows = rows.to(net.like).expand(count, -1, -1) if rows.ndim == 2 else rows.to(net.like)
    of = torch.arange(count, device=rows.device).repeat_interleave(rows.shape[1])
    low, high = _extremes(flat, len(flat.nodes), rows.flatten(0, 1), of, lines, region)
    return low.view(count, -1), high.view(count, -1)


def preactivations(
    net: Net,
    centre: Tensor,
    radius: float | Tensor,
    norm_name: str,
    box: tuple[float, float] | None = None,
    refine: float = math.inf,
) -> list[Bounds]:
    """Bounds of what each activation is applied to, over balls: those that `linear` uses.

    Parameters
    ----------
    net, centre, radius, norm_name, box, refine
        As for `linear`.

    Returns
    -------
    list of pairs of tensors (N, units)

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> low, high = preactivations(net, torch.zeros(1, 2), 2.0, "L1")[0]
    >>> low.round(decimals=6).tolist(), high.round(decimals=6).tolist()
    ([[-2.0, -2.0]], [[2.0, 2.0]])
    """
    flat, place = _without_pooling(net)
    bounds = _relax(flat, _region(net, centre, radius, norm_name, box), refine)[1]
    seen = [place[node.inputs[0]] for node in net.activations]
    return [(bounds[j][0].flatten(1), bounds[j][1].flatten(1)) for j in seen]


def _region(
    net: Net, centre: Tensor, radius: float | Tensor, norm_name: str, box: tuple[float, float] | None
) -> _Region:
    centre = centre.to(net.like).reshape(-1, *net.shape)
    if box is not None and bool(((centre < box[0]) | (centre > box[1])).any()):
        raise ValueError(f"the centre leaves box={box}: centres within it are accepted")
    reach = torch.as_tensor(radius, dtype=torch.float64, device=net.like.device).expand(len(centre))
    if not bool((reach >= 0).all()):
        raise ValueError(f"radius={radius}: numbers >= 0 are accepted")
    return _Region(centre, reach, norm_name, box)


def _relax(net: Net, region: _Region, refine: float) -> tuple[dict[int, _Lines], list[Bounds]]:
    """Lines for each activation, and bounds of every value, refined by backward passes before each activation."""
    bounds = [region.interval()]
    lines: dict[int, _Lines] = {}
    affine = {0}  # the values that are affine functions of the input
    refined = {0}  # over the region itself the interval is what a backward pass would give
    for i, node in enumerate(net.nodes, 1):
        if node.kind == "activation":
            j = node.inputs[0]
            if j not in refined and (j in affine or math.prod(node.shape) <= refine):
                bounds[j] = _refine(net, j, bounds[j], lines, region, everywhere=_bends(node))
                refined.add(j)
            lines[i] = _bent_lines(node.call, *bounds[j]) if _bends(node) else _relu_lines(*bounds[j])
        elif affine.issuperset(node.inputs):
            affine.add(i)
        bounds.append(_image(node, [bounds[j] for j in node.inputs]))
    return lines, bounds


def _refine(net: Net, value: int, known: Bounds, lines: dict[int, _Lines], region: _Region, everywhere: bool) -> Bounds:
    """Bounds of a value by backward passes, at least as tight as those known.

    Units whose ReLU is decided by what is known are left as they are, unless `everywhere`.
    """
    low, high = (side.flatten(1).clone() for side in known)
    of, unit = (low < high if everywhere else (low < 0) & (high > 0)).nonzero().T
    for sample, at in zip(of.split(_rows(net)), unit.split(_rows(net)), strict=True):
        rows = low.new_zeros(len(at), low.shape[1])
        rows[torch.arange(len(at), device=at.device), at] = 1
        least, largest = _extremes(net, value, rows.view(len(at), *known[0].shape[1:]), sample, lines, region)
        low[sample, at] = low[sample, at].maximum(least)
        high[sample, at] = high[sample, at].minimum(largest)
    return low.view_as(known[0]), high.view_as(known[1])


def _rows(net: Net) -> int:
    """How many rows are pulled back at a time."""
    widest = max(math.prod(value_shape(net, i)) for i in range(len(net.nodes) + 1))
    return max(1, _CHUNK // widest)


def _extremes(net: Net, value: int, rows: Tensor, of: Tensor, lines: dict[int, _Lines], region: _Region) -> Bounds:
    """The least and the largest value that rows of coefficients of a value can take, each over its own region."""
    least, largest = [], []
    for part, sample in zip(rows.split(_rows(net)), of.split(_rows(net)), strict=True):
        both = _pull_back(net, value, torch.cat([part, -part]), torch.cat([sample, sample]), lines, region)
        least.append(both[: len(part)])
        largest.append(-both[len(part) :])
    return torch.cat(least), torch.cat(largest)


def _pull_back(net: Net, value: int, rows: Tensor, of: Tensor, lines: dict[int, _Lines], region: _Region) -> Tensor:
    """A lower bound of each row of coefficients of a value, (M, *shape of the value), over region `of`."""
    pending = {value: rows}
    constant, size = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for i in range(value, 0, -1):
        if i not in pending:
            continue
        row, node = pending.pop(i), net.nodes[i - 1]
        if node.kind == "activation":
            line = lines[i]
            positive, negative = row.clamp(min=0), row.clamp(max=0)
            terms = positive * line.lower_offset[of] + negative * line.upper_offset[of]
            parts: tuple[Tensor, ...] = (positive * line.lower[of] + negative * line.upper[of],)
        else:
            _refuse(node)
            terms = row * node.call(*(row.new_zeros(1, *value_shape(net, j)) for j in node.inputs))
            parts = adjoint(net, i, row)
        constant = constant + terms.flatten(1).sum(1)
        size = size + terms.abs().flatten(1).sum(1)
        for j, part in zip(node.inputs, parts, strict=True):
            pending[j] = pending[j] + part if j in pending else part
    if 0 in pending:
        least, terms = region.minimum(pending[0], of)
        constant, size = constant + least, size + terms
    return constant - ROUNDING * size


def _relu_lines(low: Tensor, high: Tensor) -> _Lines:
    """CROWN's lines for ReLU over [low, high]."""
    unstable = (low < 0) & (high > 0)
    on = (low >= 0).to(low)
    chord = torch.where(unstable, high / (high - low).clamp(min=1e-300), on)
    lower = torch.where(unstable, (high > -low).to(low), on)
    return _Lines(lower, torch.zeros_like(low), chord, torch.where(unstable, -chord * low, 0.0))


def _bent_lines(call: Map, low: Tensor, high: Tensor) -> _Lines:
    """Lines for a smooth activation: of two slopes that with the tighter line in the middle of [low, high]."""
    middle = (low + high) / 2
    tangent = _derivative(call, middle)
    wide = high - low > 1e-6  # the chord of a shorter interval is lost to rounding
    chord = torch.where(wide, (call(high) - call(low)) / (high - low).clamp(min=1e-6), tangent)
    (tangent_below, tangent_above), (chord_below, chord_above) = (
        _touching(call, slope, low, high) for slope in (tangent, chord)
    )

    lower = tangent * middle + tangent_below > chord * middle + chord_below
    upper = tangent * middle + tangent_above < chord * middle + chord_above
    return _Lines(
        torch.where(lower, tangent, chord),
        torch.where(lower, tangent_below, chord_below),
        torch.where(upper, tangent, chord),
        torch.where(upper, tangent_above, chord_above),
    )


def _touching(call: Map, slope: Tensor, low: Tensor, high: Tensor) -> Bounds:
    """The offsets of the lines of a given slope that touch the graph of an activation over [low, high].

    The extremes of f(x) - slope x are at the ends or where f' is the slope; between turning points of f' there is at
    most one such place, found by bisection. An error there enters the offset squared.
    """
    ends = [low, *(t.clamp(low, high) for t in _turning_points(call)[1].to(low)), high]
    left, right = torch.stack(ends[:-1]), torch.stack(ends[1:])
    rising = _derivative(call, right) > _derivative(call, left)
    # down to 2^-40, as the derivative may turn within a few units of a range however wide
    widest = float((right - left).amax()) if left.numel() else 0.0
    for _ in range(40 + max(0, math.frexp(widest)[1])):
        middle = (left + right) / 2
        go_right = (_derivative(call, middle) < slope) == rising
        left, right = torch.where(go_right, middle, left), torch.where(go_right, right, middle)
    gap = torch.stack([call(x) - slope * x for x in (*ends, *left)])
    slack = ROUNDING * (1 + gap.abs().amax(0))
    return gap.amin(0) - slack, gap.amax(0) + slack


def _without_pooling(net: Net) -> tuple[Net, list[int]]:
    """The same function without max pooling, and the place of each old value among the new ones.

    The entries of a window are gathered by linear maps, one for each position in it, and their maximum is built from
    :math:`\\max(a, b) = a + [b - a]_+`, halving their number each time.
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
