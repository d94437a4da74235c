r"""Bounds propagated through a network: intervals, backward linear bounds, and intervals of the Jacobian.

Everything works on the node graph of `wda.nets`, in float64, for a batch of regions at once, on the device of the
network. A region is a ball :math:`\|x - c\|_r \le R`, cut by a box if one is given.

**What is certified, and rounding.** Intervals and linear bounds hold for the function that the weights define in real
arithmetic, with the weights as they are stored and float64 results of what a model computes from constants alone. A
model that runs in float32 differs from it by its own rounding. Taken for granted are IEEE arithmetic, sums of products
in whatever order, fused or not (no Winograd or FFT convolutions, no TF32), and what `wda.certificates.activations`
says of library functions. The proof, with :math:`u = 2^{-53}` and :math:`\gamma_n = nu/(1 - nu)`: a sum of at most n
products is computed to within :math:`\gamma_n` times the sum of their absolute values (Higham, 2002, *Accuracy and
stability of numerical algorithms*, section 3.1), and so is one through which each term meets at most n roundings.

*Intervals.* Let :math:`v \in [l, h]`, c the middle as computed, and :math:`\hat v = \max(|l|, |h|)`. Then
:math:`Wv + b` is within :math:`|W|(h - l)/2 + \gamma_n(|W|\hat v + |b|)` of the computed :math:`Wc + b`. Sums of two
values are moved outward to the next number; a maximum is exact.

*Backward.* A row of coefficients r on a value :math:`Wv + b` is pulled back to p, computed for :math:`W^T r`, and
:math:`|p - W^T r| \le \gamma_n|W|^T|r|`. So for every v with :math:`|v| \le \hat v`

.. math:: |\langle r, Wv + b\rangle - \langle p, v\rangle - \langle r, b\rangle|
   \le \gamma_n\langle|r|, |W|\hat v + |b|\rangle,

the last term for the rounding of the inner product. It is computed from one tensor for each value, :math:`|W|\hat v +
|b|`, with the interval of v that is known. Likewise a row at an activation, times the slopes s and offsets t of lines
that hold exactly, is off by :math:`\gamma_n\langle|r|, |s|\hat z + |t|\rangle`; a sum of two rows on one value v by
:math:`u\langle|p|, \hat v\rangle`. The least value over the region is :math:`\langle r, c\rangle` less
`wda.norms.support`, a sum of terms of one sign that is within :math:`3\gamma_n` of itself: how far coordinates move is
within rounding of using up the radius, and in "L2", where they move by :math:`m_j = \min(t|r_j|, w_j)`, duality says
that the maximum exceeds :math:`\langle|r|, m\rangle` by at most :math:`(R^2 - \|m\|^2)/2t`, while :math:`\langle|r|,
m\rangle \ge \|m\|^2/t`. As nothing moves further than :math:`2\hat v`, this is off by :math:`7\gamma_n\langle|r|, \hat
v\rangle`.

All this is added up with at most two terms for each node, so the bound is off by at most :math:`7\gamma_n` times the
sum of the inner products on the right, for n the largest number of entries of a value plus twice the number of nodes.
`_gamma` takes 8(n + 8)u, which also covers the rounding of the right-hand sides, of batch normalisation's scale, and of
the last subtraction. A product too small to be a normal number is off by less than :math:`2^{-1022}`: as many times
this as there are products, times :math:`1 + \hat v`, is taken off too. A bound that is not a number becomes infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from wda.certificates.activations import TINY, Lines, bends, bent_lines, image, relu_lines
from wda.certificates.activations import slopes as _slopes
from wda.certificates.pooling import value_shape, windows, without_pooling
from wda.checks import whole
from wda.errors import NotPiecewiseAffine
from wda.nets import Net, Node
from wda.norms import dual, norm, support

__all__ = [
    "Bounds",
    "Relaxation",
    "adjoint",
    "gradient",
    "interval",
    "linear",
    "margins",
    "preactivations",
    "relax",
    "slopes",
    "value_shape",
    "windows",
]

ROUNDING = 1e-9
"""What Lipschitz constants are raised by, relative to themselves: far more than rounding does, but without a proof."""

Bounds = tuple[Tensor, Tensor]
"""Lower and upper bounds."""

# how many numbers the widest value of a chunk of rows may hold: 4 MB, near the processor
_CHUNK = 2**19
# the first step of the slopes' ascent, and by what it shrinks each time
_STEP, _DECAY = 0.3, 0.93


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
    if isinstance(node.layer, nn.Conv2d) and not (absolute or isinstance(node.layer.padding, str)):
        layer, before = node.layer, inputs[0].shape[1:]
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return (conv2d_input((len(rows), *before), layer.weight, rows, *geometry),)
    # one pass over all rows, without running the map itself on as many zeros
    back = torch.autograd.grad(output, inputs, rows[:, None], is_grads_batched=True)
    return tuple(part[:, 0] for part in back)


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
        values.append(_image(node, [values[j] for j in node.inputs], _gamma(net)))
    return values


def _image(node: Node, inputs: list[Bounds], gamma: float) -> Bounds:
    """Bounds of the output of a node, from those of its inputs."""
    low, high = inputs[0]
    if node.kind == "affine":
        assert node.absolute is not None
        centre = (low + high) / 2
        radius = node.absolute((high - low) / 2 + gamma * _size(inputs[0])) + gamma * _bias(node, low)[1] + TINY
        return node.call(centre) - radius, node.call(centre) + radius
    if node.kind == "sum":
        return _outward(*(node.call(*side) for side in zip(*inputs, strict=True)))
    if node.kind == "maxpool":
        return node.call(low), node.call(high)
    _refuse(node)
    return image(node, low, high)


def _gamma(net: Net) -> float:
    """The share of its terms that rounding may take from a bound; see above."""
    widest = max(math.prod(value_shape(net, i)) for i in range(len(net.nodes) + 1))
    return float(8 * (widest + 2 * len(net.nodes) + 8) * 2.0**-53)


def _size(bounds: Bounds) -> Tensor:
    return bounds[0].abs().maximum(bounds[1].abs())


def _outward(low: Tensor, high: Tensor) -> Bounds:
    """Bounds that were rounded once, moved to the next number."""
    infinite = torch.full_like(low, math.inf)
    return torch.nextafter(low, -infinite), torch.nextafter(high, infinite)


def _bias(node: Node, like: Tensor) -> Bounds:
    """The constant part of an affine node, (1, *shape), and the size of what it is computed from."""
    zero = like.new_zeros(1, *like.shape[1:])
    bias, layer = node.call(zero), node.layer
    if node.call is node.linear or not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return bias, bias.abs()
    assert node.absolute is not None
    assert layer.running_mean is not None
    channels = (1, -1, *[1] * (zero.ndim - 2))
    shift = node.absolute(zero + layer.running_mean.abs().view(channels))
    return bias, shift if layer.bias is None else shift + layer.bias.abs().view(channels)


def _refuse(node: Node) -> None:
    if node.kind == "bounded":
        raise NotPiecewiseAffine(f"{node.name}: no bound is propagated through this layer")


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
        low, high = _outward(self.centre - reach, self.centre + reach)
        return (low, high) if self.box is None else (low.clamp(min=self.box[0]), high.clamp(max=self.box[1]))

    def minimum(self, rows: Tensor, of: Tensor) -> Tensor:
        """The least value of each linear function over the region `of` it is asked."""
        if self.norm == "Linf":
            low, high = (_pick(side, of) for side in self.interval())
            return (rows * torch.where(rows > 0, low, high)).flatten(1).sum(1)
        centre = self.centre[of]
        return (rows * centre).flatten(1).sum(1) - support(-rows, centre, self.radius[of], self.norm, self.box)

    def minimiser(self, rows: Tensor, of: Tensor) -> Tensor:
        """Where each linear function is least: the gradient of its minimum with respect to its coefficients."""
        rows = rows.detach().requires_grad_()
        with torch.enable_grad():
            value = self.minimum(rows, of).sum()
        return torch.autograd.grad(value, rows)[0]


def _alone(of: Tensor) -> bool:
    """Whether all rows are of one sample."""
    return len(of) > 0 and bool((of == of[0]).all())


def _pick(values: Tensor, of: Tensor) -> Tensor:
    """What belongs to the sample of each row, (M, ...); (1, ...) if it is one and the same."""
    return values[of[:1] if _alone(of) else of]


def _inner(rows: Tensor, values: Tensor, of: Tensor) -> Tensor:
    """The inner product of each row with the values of its sample."""
    if _alone(of):
        return rows.flatten(1) @ values[of[0]].flatten()
    return (rows * values[of]).flatten(1).sum(1)


def linear(
    net: Net,
    rows: Tensor,
    centre: Tensor,
    radius: float | Tensor,
    norm_name: str,
    box: tuple[float, float] | None = None,
    refine: float = math.inf,
    steps: int = 0,
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
    steps : int
        Steps of gradient ascent on the slopes of the lines below ReLU, as in `Relaxation.least`.

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
    relaxed = relax(net, centre, radius, norm_name, box, refine)
    return relaxed.least(rows, steps), -relaxed.least(-rows, steps)


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
    bounds = relax(net, centre, radius, norm_name, box, refine).bounds
    place = without_pooling(net)[1]
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


@dataclass(frozen=True, eq=False)
class Relaxation:
    r"""A network with each activation between two lines, over a region for each sample; made by `relax`.

    Attributes
    ----------
    net : Net
        Without max pooling.
    bounds : list of pairs of tensors (N, \*shape)
        Of the input and of the output of every node.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> relaxed = relax(net, torch.tensor([[2.0, 0.0]]), 1.0, "Linf")
    >>> round(float(relaxed.least(torch.tensor([[3.0, -1.0]]))), 6)
    2.0
    """

    net: Net
    region: _Region
    bounds: list[Bounds]
    lines: dict[int, Lines] = field(default_factory=dict)
    # of each node: its bias if it has one, and what times a row bounds the rounding, in units of gamma
    biases: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)

    def least(self, rows: Tensor, steps: int = 0, of: Tensor | None = None) -> Tensor:
        r"""Lower bounds of linear functions of the logits; ``-least(-rows)`` are upper bounds.

        With `steps`, the slopes :math:`\alpha \in [0, 1]` of the lines below unstable ReLU units are optimised for each
        row and each sample (alpha-CROWN: Xu et al., 2021, *Fast and complete: enabling complete verification with rapid
        and massively parallel incomplete solvers*): projected gradient ascent by Adam from CROWN's choice, with the
        bounds of the pre-activations as they are. Any slopes in [0, 1] are sound, and the best bound met is returned,
        so more steps never give a worse one.

        Parameters
        ----------
        rows : Tensor, shape (R, K) or (N, R, K); with `of` (M, K)
        steps : int
        of : int64 Tensor, shape (M,), optional
            For which sample each row is; by default all rows are for all samples.

        Returns
        -------
        Tensor, shape (N, R); with `of` (M,)
        """
        steps = whole("steps", steps, 0)
        count, rows = len(self.region.centre), rows.to(self.net.like)
        if of is not None:
            return self._least(len(self.net.nodes), rows, of, steps)
        rows = rows.expand(count, -1, -1) if rows.ndim == 2 else rows
        of = torch.arange(count, device=rows.device).repeat_interleave(rows.shape[1])
        return self._least(len(self.net.nodes), rows.flatten(0, 1), of, steps).view(count, -1)

    def _least(self, value: int, rows: Tensor, of: Tensor, steps: int = 0) -> Tensor:
        """Lower bounds of rows of coefficients of a value, (M, *its shape), each over the region `of` it is asked."""
        size = _rows(self.net, bool(steps))
        parts = zip(rows.split(size), of.split(size), strict=True)
        if steps:
            return torch.cat([self._climb(value, part, sample, steps) for part, sample in parts])
        return torch.cat([self._pull_back(value, part, sample, {}, {}) for part, sample in parts])

    def _climb(self, value: int, rows: Tensor, of: Tensor, steps: int) -> Tensor:
        """The best lower bounds met by an ascent on the slopes of the lines below ReLU."""
        free = {i: self._free(i) for i in self.lines if i < value and not bends(self.net.nodes[i - 1])}
        slopes = {i: self.lines[i].lower[of].clone() for i in free if bool(free[i].any())}
        best = rows.new_full((len(rows),), -math.inf)
        ascent = torch.optim.Adam([*slopes.values()], _STEP, maximize=True) if slopes else None
        for step in range(steps + 1):
            seen: dict[int, Tensor] = {}
            best = best.maximum(self._pull_back(value, rows, of, slopes, seen))
            if ascent is None or step == steps:
                break
            at = self._run_forward(value, of, slopes, seen)
            for i, slope in slopes.items():
                # where no line below is used, the slope is as good as any other
                slope.grad = torch.where(_pick(free[i], of), seen[i].clamp(min=0) * at[i], 0)
            ascent.step()
            ascent.param_groups[0]["lr"] *= _DECAY
            for slope in slopes.values():
                slope.clamp_(0, 1)
        return best

    def _free(self, i: int) -> Tensor:
        """Which units of a ReLU node are unstable."""
        low, high = self.bounds[self.net.nodes[i - 1].inputs[0]]
        return (low < 0) & (high > 0)

    def _pull_back(
        self, value: int, rows: Tensor, of: Tensor, slopes: dict[int, Tensor], seen: dict[int, Tensor]
    ) -> Tensor:
        """Lower bounds with given slopes of the lines below ReLU; the rows met at each activation go into `seen`.

        The row at the input goes there too, as that of value 0.
        """
        pending = {value: rows}
        constant, size = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
        for i in range(value, -1, -1):
            if i not in pending:
                continue
            row = pending.pop(i)
            if i in self.sizes:
                size = size + _inner(row.abs(), self.sizes[i], of)
            if i == 0:
                seen[0] = row
                constant = constant + self.region.minimum(row, of)
                break
            node = self.net.nodes[i - 1]
            if node.kind == "activation":
                seen[i], line = row, self.lines[i]
                below, above = row.clamp(min=0), row.clamp(max=0)
                lower = slopes[i] if i in slopes else _pick(line.lower, of)
                constant = constant + _inner(above, line.upper_offset, of)
                if bends(node):
                    constant = constant + _inner(below, line.lower_offset, of)
                parts: tuple[Tensor, ...] = (below * lower + above * _pick(line.upper, of),)
            else:
                if i in self.biases:
                    constant = constant + row.flatten(1) @ self.biases[i].flatten()
                parts = adjoint(self.net, i, row)
            for j, part in zip(node.inputs, parts, strict=True):
                if j in pending:
                    part = pending[j] + part
                    size = size + _inner(part.abs(), _size(self.bounds[j]), of)
                pending[j] = part
        bound = constant - _gamma(self.net) * size - self._underflow(value)[of]
        return torch.where(bound.isnan(), -math.inf, bound)

    def _underflow(self, value: int) -> Tensor:
        """What products too small to be normal numbers may add up to, for each sample."""
        ends = (_size(bounds).flatten(1) for bounds in self.bounds[: value + 1])
        total = sum(((1 + size).sum(1) for size in ends), self.region.radius.new_zeros(()))
        return total * (_gamma(self.net) * 2.0**53 * TINY)

    def _run_forward(
        self, value: int, of: Tensor, slopes: dict[int, Tensor], seen: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """What each activation sees at the minimisers of the rows, if it is replaced by the lines that the rows use.

        The bound is the value of that affine network there, so its derivative with respect to the slope of a line below
        is the row's coefficient, where it is positive, times this.
        """
        at: dict[int, Tensor] = {}
        values = [self.region.minimiser(seen[0], of)]
        for i, node in enumerate(self.net.nodes[: value - 1], 1):
            before = [values[j] for j in node.inputs]
            if i in seen:
                at[i], line, below = before[0], self.lines[i], seen[i] > 0
                lower = slopes[i] if i in slopes else _pick(line.lower, of)
                slope = torch.where(below, lower, _pick(line.upper, of))
                offset = torch.where(below, _pick(line.lower_offset, of), _pick(line.upper_offset, of))
                values.append(slope * before[0] + offset)
            else:  # an activation that is not on the way changes nothing
                values.append(before[0] if node.kind == "activation" else node.call(*before))
        return at


def relax(
    net: Net,
    centre: Tensor,
    radius: float | Tensor,
    norm_name: str,
    box: tuple[float, float] | None = None,
    refine: float = math.inf,
) -> Relaxation:
    """The lines and bounds that `linear` uses: most of its time, to be spent once where several rows are asked for.

    Parameters
    ----------
    net, centre, radius, norm_name, box, refine
        As for `linear`.

    Returns
    -------
    Relaxation

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that is bounded only.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    >>> relax(net, torch.zeros(1, 2), 1.0, "L2").least(margins(net, [(0, 1)])).shape
    torch.Size([1, 1])
    """
    flat = without_pooling(net)[0]
    region = _region(net, centre, radius, norm_name, box)
    known = Relaxation(flat, region, [region.interval()])
    known.sizes[0] = _size(known.bounds[0])
    affine = {0}  # the values that are affine functions of the input
    refined = {0}  # over the region itself the interval is what a backward pass would give
    for i, node in enumerate(flat.nodes, 1):
        j = node.inputs[0]
        if node.kind == "activation":
            if j not in refined and (j in affine or math.prod(node.shape) <= refine):
                known.bounds[j] = _refine(known, j, everywhere=bends(node))
                refined.add(j)
            line = bent_lines(node, *known.bounds[j]) if bends(node) else relu_lines(*known.bounds[j])
            # a slope may be raised to 1
            steep = line.lower.abs().maximum(line.upper.abs()).ceil()
            offset = line.lower_offset.abs().maximum(line.upper_offset.abs())
            known.lines[i], known.sizes[i] = line, steep * _size(known.bounds[j]) + offset
        elif node.kind == "affine":
            assert node.absolute is not None
            bias, size = _bias(node, known.bounds[j][0])
            known.sizes[i] = node.absolute(_size(known.bounds[j])) + size
            if bool(bias.any()):
                known.biases[i] = bias.expand(1, *node.shape)
        if node.kind != "activation" and affine.issuperset(node.inputs):
            affine.add(i)
        known.bounds.append(_image(node, [known.bounds[k] for k in node.inputs], _gamma(flat)))
    return known


def _refine(known: Relaxation, value: int, everywhere: bool) -> Bounds:
    """Bounds of a value by backward passes, at least as tight as those known.

    Units whose ReLU is decided by what is known are left as they are, unless `everywhere`.
    """
    low, high = (side.flatten(1).clone() for side in known.bounds[value])
    of, unit = (low < high if everywhere else (low < 0) & (high > 0)).nonzero().T
    size = _rows(known.net)
    for sample, at in zip(of.split(size), unit.split(size), strict=True):
        rows = low.new_zeros(len(at), low.shape[1])
        rows[torch.arange(len(at), device=at.device), at] = 1
        rows = rows.view(len(at), *known.bounds[value][0].shape[1:])
        low[sample, at] = low[sample, at].maximum(known._least(value, rows, sample))
        high[sample, at] = high[sample, at].minimum(-known._least(value, -rows, sample))
    return low.view_as(known.bounds[value][0]), high.view_as(known.bounds[value][1])


def _rows(net: Net, climbing: bool = False) -> int:
    """How many rows are pulled back at a time; to climb, what every activation sees is kept."""
    widest = max(math.prod(value_shape(net, i)) for i in range(len(net.nodes) + 1))
    return max(1, _CHUNK // max(widest, sum(net.units) if climbing else 1))
