r"""A network as a graph of affine maps and activations: masks, Jacobians, and the recession network.

`from_module` reads an ``nn.Module`` made of linear and convolutional layers, batch normalisation in evaluation mode,
average and max pooling, reshapes, sums and activations. Between its activations such a network is affine, which is
what every certificate here rests on. Everything is computed in float64, on the device of the model.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from wda.errors import NotPiecewiseAffine
from wda.models import Attention
from wda.passes import Model
from wda.tracing import copied, draws, follow, trace

__all__ = ["Dense", "Net", "Node", "TooLarge", "check_reading", "from_module"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Map = Callable[..., Tensor]

# dense() pushes one unit vector per input and per hidden unit through the network
_MAX_DENSE = 8192
# a network is read with so many samples at once: what takes their number into account shows
_BATCHES = (1, 2, 3)
# rows that are compared with the model together
_CHUNK = 64
# so often one place is passed again: a forward that is random one time in ten is noticed with probability 0.97
_AGAIN = 32
# single places at which the functions that a model applies are compared with those of its graph
_FOLLOWED = 8
# of every value, when its rounding is estimated: thousands of times as much as rounding makes of it
_NOISE = 1e-12
# what rounding to 24 bits, or to TF32's 11, does to the logits is less than this times what that noise does
_COARSE = 1e9


class TooLarge(ValueError):
    """A network is too large for the method asked for; the message says how large, and what to use instead."""


@dataclass(frozen=True)
class Node:
    """One step of a network: a map applied to the values of earlier nodes.

    Attributes
    ----------
    kind : {"affine", "sum", "activation", "maxpool", "bounded"}
        "bounded": the output stays bounded however far the input goes (layer normalisation, and attention behind it).
    name : str
        The layer it was read from, for messages.
    inputs : tuple of int
        The values it takes; 0 is the input of the network, i + 1 the output of ``nodes[i]``.
    shape : tuple of int
        Of its output, for one sample.
    call : callable
        From values ``(N, ...)`` to the value ``(N, *shape)``.
    linear, absolute : callable or None
        For an affine node: the map without its bias, and with the absolute values of its weights.
    activation : str
        "relu", "gelu", "silu", "softplus" or "sigmoid" for an activation.
    layer : nn.Module or None
        The Linear, Conv2d or batch normalisation layer that an affine node was read from.

    Examples
    --------
    >>> net = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    >>> [(node.kind, node.inputs) for node in net.nodes]
    [('affine', (0,)), ('activation', (1,))]
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    call: Map
    linear: Map | None = None
    absolute: Map | None = None
    activation: str = ""
    layer: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Net:
    r"""A network read by `from_module`.

    Attributes
    ----------
    nodes : tuple of Node
        In the order in which they are computed; the last one gives the logits.
    shape : tuple of int
        Of one input.
    like : Tensor
        An empty float64 tensor on the device of the weights.
    normalised : bool
        The model gives the log-softmax of these logits.

    Examples
    --------
    >>> net = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> net.n, net.classes, net.units
    (2, 2, (3,))
    >>> len(net.values(torch.zeros(1, 2))) == 1 + len(net.nodes)
    True
    """

    nodes: tuple[Node, ...]
    shape: tuple[int, ...]
    like: Tensor
    normalised: bool = False

    @property
    def n(self) -> int:
        """The number of inputs."""
        return math.prod(self.shape)

    @property
    def classes(self) -> int:
        """The number of logits, K."""
        return self.nodes[-1].shape[0]

    @property
    def activations(self) -> tuple[Node, ...]:
        """The activation nodes, in order."""
        return tuple(node for node in self.nodes if node.kind == "activation")

    @property
    def units(self) -> tuple[int, ...]:
        """How many units each activation has."""
        return tuple(math.prod(node.shape) for node in self.activations)

    def values(self, x: Tensor) -> list[Tensor]:
        """The input and the output of every node, at `x` (N, \\*shape) or (N, n)."""
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.n:
            raise ValueError(f"x of shape {tuple(x.shape)}: inputs (N, {', '.join(map(str, self.shape))}) are accepted")
        values = [x.to(self.like).reshape(-1, *self.shape)]
        for node in self.nodes:
            values.append(node.call(*(values[i] for i in node.inputs)))
        return values

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K) in float64."""
        return self.values(x)[-1]

    def preactivations(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each activation is applied to, (N, units) each.

        Examples
        --------
        >>> net = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> [tuple(z.shape) for z in net.preactivations(torch.zeros(5, 2))]
        [(5, 3)]
        """
        values = self.values(x)
        return tuple(values[node.inputs[0]].flatten(1) for node in self.activations)

    def masks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Which units are on at `x` (Definition 3.1), bool (N, units) for each activation.

        A unit with pre-activation 0 counts as off; there `x` lies on the border of its cell.

        Examples
        --------
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> from_module(nn.Sequential(layer, nn.ReLU())).masks(torch.tensor([[-1.0], [2.0]]))[0].tolist()
        [[False], [True]]
        """
        return tuple(z > 0 for z in self.preactivations(x))

    def jacobian(self, x: Tensor) -> Tensor:
        r"""The Jacobian of the logits at each `x`, (N, K, n): :math:`J_D` inside the cell of the mask D.

        Examples
        --------
        >>> from_module(nn.Sequential(nn.Flatten(), nn.Identity()), shape=(2,)).jacobian(torch.zeros(1, 2)).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
        """
        point = x.detach().to(self.like).reshape(len(x), *self.shape).requires_grad_()
        with torch.enable_grad():
            logits = self(point)
            if not logits.requires_grad:  # the zero network, as where the recession of what is bounded ends
                return point.new_zeros(len(point), self.classes, self.n)
            rows = [
                torch.autograd.grad(logits[:, k].sum(), point, retain_graph=True, materialize_grads=True)[0]
                for k in range(self.classes)
            ]
        return torch.stack([row.flatten(1) for row in rows], dim=1)

    def recession(self) -> Net:
        r"""The recession network :math:`\theta^0`: every bias zero, every activation replaced by its limit.

        :math:`\theta(x + \alpha u)/\alpha \to \theta^0(u)` for every x, since :math:`\sigma(\alpha s + b)/\alpha`
        tends to the positive part of s for ReLU, GELU, SiLU and softplus, and to 0 for the sigmoid. What is bounded
        tends to 0. The result is positively homogeneous.

        Raises
        ------
        NotPiecewiseAffine
            The attention layer named is not fed by a layer normalisation.

        Examples
        --------
        >>> layer = nn.Linear(1, 1)
        >>> _ = nn.init.ones_(layer.weight)
        >>> from_module(nn.Sequential(layer, nn.GELU())).recession()(torch.tensor([[3.0], [-3.0]])).tolist()
        [[3.0], [0.0]]
        """
        nodes: list[Node] = []
        zero = {0: False}
        for i, node in enumerate(self.nodes, 1):
            still = all(zero[j] for j in node.inputs)
            if node.name.startswith("Attention") and not still:
                raise NotPiecewiseAffine(f"{node.name}: attention is bounded only behind a layer normalisation")
            zero[i] = still or node.kind == "bounded" or node.activation == "sigmoid"
            if zero[i]:
                nodes.append(_zero(node))
            elif node.kind == "affine":
                assert node.linear is not None
                nodes.append(replace(node, call=node.linear))
            elif node.kind == "activation":
                nodes.append(replace(node, call=functional.relu, activation="relu"))
            else:
                nodes.append(node)
        return replace(self, nodes=tuple(nodes))

    def rectified(self) -> Net:
        """The ReLU network with the same weights and biases.

        Examples
        --------
        >>> from_module(nn.Sequential(nn.Linear(1, 1), nn.SiLU())).rectified().activations[0].activation
        'relu'
        """
        return replace(
            self,
            nodes=tuple(
                replace(node, call=functional.relu, activation="relu") if node.kind == "activation" else node
                for node in self.nodes
            ),
        )

    def require(self, *kinds: str, why: str) -> None:
        """Raise `NotPiecewiseAffine` for the first node of another kind; activations must be ReLU.

        Parameters
        ----------
        *kinds : str
            The node kinds that are accepted.
        why : str
            What needs this, for the message.

        Examples
        --------
        >>> from_module(nn.Sequential(nn.Linear(1, 1), nn.ReLU())).require("affine", "activation", why="here")
        """
        for node in self.nodes:
            if node.kind not in kinds:
                raise NotPiecewiseAffine(f"{node.name}: {why} treats {', '.join(kinds)} layers only")
            if node.kind == "activation" and node.activation != "relu":
                raise NotPiecewiseAffine(f"{node.name}: {why} needs ReLU activations; see Net.rectified, Net.recession")

    @cached_property
    def dense(self) -> Dense:
        """The same network as explicit matrices.

        Raises
        ------
        NotPiecewiseAffine
            It has max pooling or a bounded layer, which are no affine maps between activations.
        TooLarge
            It has more than 8192 inputs and hidden units.

        Examples
        --------
        >>> from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))).dense.bias[0].shape
        (3,)
        """
        for node in self.nodes:
            if node.kind in ("maxpool", "bounded"):
                raise NotPiecewiseAffine(
                    f"{node.name}: cells, mixed-integer programs and explicit matrices need a network of affine layers "
                    "and elementwise activations; method='bounds' treats this layer"
                )
        if self.n + sum(self.units) > _MAX_DENSE:
            raise TooLarge(
                f"the network has {self.n} inputs and {sum(self.units)} hidden units; up to {_MAX_DENSE} in all are "
                "written as explicit matrices: use method='bounds'"
            )
        return _dense(self)


@dataclass(frozen=True, eq=False)
class Dense:
    r"""A network as matrices: what each activation sees of the input and of each earlier activation.

    With :math:`a_0 = x`, the pre-activations are :math:`z_h = \sum_{j<h} W_{hj} a_j + b_h` and
    :math:`a_h = \sigma_h(z_h)`, for h = 1, ..., H; the logits are :math:`z_{H+1}`. In a plain chain only
    :math:`W_{h,h-1}` is not zero.

    Attributes
    ----------
    weights : tuple of tuples of arrays
        ``weights[h][j]`` is :math:`W_{h+1,j}`, (units of h + 1, units of j), for j = 0, ..., h; float64.
    bias : tuple of arrays
    activations : tuple of str

    Examples
    --------
    >>> dense = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))).dense
    >>> dense.weights[1][0].any(), dense.weights[1][1].shape
    (np.False_, (2, 3))
    >>> [z.shape for z in dense.preactivations(np.zeros((5, 2)))]
    [(5, 3), (5, 2)]
    >>> masks = dense.split(np.ones((4, 3), bool))
    >>> [A.shape for A, b in dense.forms(masks)]
    [(4, 3, 2), (4, 2, 2)]
    """

    weights: tuple[tuple[Array, ...], ...]
    bias: tuple[Array, ...]
    activations: tuple[str, ...]

    @property
    def n(self) -> int:
        """The number of inputs."""
        return int(self.weights[0][0].shape[1])

    @property
    def classes(self) -> int:
        """The number of logits, K."""
        return len(self.bias[-1])

    @property
    def units(self) -> tuple[int, ...]:
        """The number of units of each hidden layer."""
        return tuple(len(b) for b in self.bias[:-1])

    def split(self, masks: Mask) -> list[Mask]:
        """Masks (M, units in all) cut into one array per hidden layer."""
        return np.split(masks, np.cumsum(self.units), axis=1)[:-1]

    def layer(self, h: int, masks: Sequence[Mask]) -> tuple[Array, Array]:
        """What layer `h` (0 the first, H the logits) sees, as an affine function of x, under given masks.

        Parameters
        ----------
        h : int
        masks : sequence of bool arrays (M, units)
            Of the layers before h.

        Returns
        -------
        arrays (M, units of h, n) and (M, units of h)

        Examples
        --------
        >>> dense = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))).dense
        >>> A, b = dense.layer(1, [np.zeros((1, 3), bool)])
        >>> A.any(), np.array_equal(b[0], dense.bias[1])
        (np.False_, True)
        """
        return self.forms(masks, h)[h]

    def forms(self, masks: Sequence[Mask], last: int | None = None) -> list[tuple[Array, Array]]:
        """`layer` for every layer from the first to `last`, by default to the logits."""
        last = len(self.units) if last is None else last
        count = len(masks[0]) if len(masks) else 1
        forms: list[tuple[Array, Array]] = []
        for h in range(last + 1):
            A = np.broadcast_to(self.weights[h][0], (count, *self.weights[h][0].shape)).copy()
            b = np.broadcast_to(self.bias[h], (count, len(self.bias[h]))).copy()
            for j in range(h):
                W = self.weights[h][j + 1]
                if W.any():
                    Aj, bj = forms[j]
                    A += W @ np.where(masks[j][:, :, None], Aj, 0)
                    b += np.where(masks[j], bj, 0) @ W.T
            forms.append((A, b))
        return forms

    def affine(self, masks: Mask) -> tuple[Array, Array]:
        r"""The logits on each cell, :math:`\theta(x) = J_D x + c_D`: arrays (M, K, n) and (M, K).

        Parameters
        ----------
        masks : bool array, shape (M, units in all)

        Examples
        --------
        >>> dense = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))).dense
        >>> J, c = dense.affine(np.ones((4, 3), bool))
        >>> J.shape, c.shape
        ((4, 2, 2), (4, 2))
        """
        return self.forms(self.split(masks))[-1] if self.units else _repeat(self.forms([])[-1], len(masks))

    def mask(self, x: Array) -> Mask:
        """Which units are on at `x` (B, n): bool (B, units in all).

        Examples
        --------
        >>> dense = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))).dense
        >>> dense.mask(np.zeros((5, 2))).shape
        (5, 3)
        """
        return np.concatenate([z > 0 for z in self.preactivations(x)[:-1]] or [np.empty((len(x), 0), bool)], axis=1)

    def logits(self, x: Array) -> Array:
        """The logits (B, K) at `x` (B, n) of the ReLU network.

        Examples
        --------
        >>> dense = from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))).dense
        >>> dense.logits(np.zeros((5, 2))).shape
        (5, 2)
        """
        return self.preactivations(x)[-1]

    def preactivations(self, x: Array) -> list[Array]:
        """What each layer sees at `x` (B, n) in the ReLU network; the last are the logits."""
        seen: list[Array] = []
        after = [x]
        for W, b in zip(self.weights, self.bias, strict=True):
            seen.append(sum((a @ w.T for a, w in zip(after, W, strict=True)), b))
            after.append(np.maximum(seen[-1], 0))
        return seen


def from_module(model: nn.Module | Net, shape: Sequence[int] | None = None, sample: Tensor | None = None) -> Net:
    """Read a network; its weights are copied, the model stays as it is.

    What is read is compared with the model in float64: each affine step with itself, the whole at points near and far
    and at the sample. What the comparison allows is a few thousand times what rounding makes of the logits there.

    A log-softmax of the logits at the end is left out (`Net.normalised`). It subtracts one number from all logits of a
    sample, so that classes, margins and the cross-entropy, and with them distances, radii, worst-case risks and the
    constants of kind "margin", are those of the model. The logits themselves and their Jacobian are not.

    Parameters
    ----------
    model : nn.Module
        Traceable by torch.fx; made of Linear, Conv2d, BatchNorm (taken in evaluation mode), AvgPool2d,
        AdaptiveAvgPool2d, MaxPool2d, Flatten, Dropout, sums, chunks, slices and concatenations, constants that are
        added or multiplied by, and ReLU, GELU, SiLU, Softplus or Sigmoid. LayerNorm and `wda.models.Attention` are read
        as bounded layers. DataParallel and torch.compile are looked through.
    shape : sequence of int, optional
        Of one input, without the batch. Needed unless the first layer is linear.
    sample : Tensor, shape (N, ...), optional
        Where the network read is compared with the model, besides points of its own.

    Returns
    -------
    Net

    Raises
    ------
    NotPiecewiseAffine
        Names the first layer that is none of these, or says what else the model does.
    ValueError
        The shape is missing, or the model does not accept it; or a weight is not finite, and named.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> from_module(model, shape=(1, 4, 4)).units
    (8,)
    """
    if isinstance(model, Net):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: a torch.nn.Module is accepted")
    with torch.inference_mode(False), torch.no_grad():
        exact = copied(model)
        shape = _input_shape(exact) if shape is None else tuple(int(side) for side in shape)
        root = nn.Sequential(exact)
        graph = trace(root)
        like = next((p for p in exact.parameters()), torch.empty(0, dtype=torch.float64)).new_empty(0)
        try:
            net = _Reader(root, graph, shape, like).read()
        except (RuntimeError, IndexError) as error:
            if _runs(model, shape):
                raise NotPiecewiseAffine(f"{type(model).__name__}: it fails in float64: {error}") from error
            raise ValueError(f"shape={shape}: the model fails on an input of this shape: {error}") from error
        for node in net.nodes:
            _check_affine(net, node)
        places = _places(net, sample)
        follow(root, graph, (*(places[:count] for count in _BATCHES), *places[1:_FOLLOWED].split(1)))
        told = [exact(part.clone()) for part in (*places[:4].split(1), *places[4:].split(_CHUNK))]
        if bool(_denied(net, places, told).any()):
            raise NotPiecewiseAffine(f"{type(model).__name__}: its forward does more than its layers, or mixes samples")
        again = [exact(places[:1].clone()) for _ in range(_AGAIN)]
        if bool(_denied(net, places[:1].expand(_AGAIN, *shape), again).any()):
            raise NotPiecewiseAffine(f"{type(model).__name__}: its forward is random, or remembers earlier ones")
        if sample is not None and bool(_coarsely_denied(net, model, places[-len(sample) :]).any()):
            raise NotPiecewiseAffine(f"{type(model).__name__}: it is another function in float64")
    return net


def check_reading(net: Net, model: Model, x: Tensor) -> None:
    """Raise an error where the network that was read and the model, both in float64, differ by more than rounding.

    An error of a float32 model that is none in float64 is no such difference.

    Raises
    ------
    ValueError
        Names the first sample where they differ.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> check_reading(from_module(model), model, torch.rand(3, 2))
    """
    if not isinstance(model, nn.Module) or not len(x):
        return
    with torch.inference_mode(False), torch.no_grad():
        exact, points = copied(model), x.detach().to(net.like)
        denied = _denied(net, points, [exact(part.clone()) for part in points.split(_CHUNK)])
        if bool(denied.any()):
            i = int(denied.nonzero()[0])
            raise ValueError(
                f"model: the network as read does not agree with the model at sample {i}: logits "
                f"{_some(net(points[i : i + 1])[0])}, and {_some(exact(points[i : i + 1].clone())[0])} of the model. "
                "No certificate can be given"
            )


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model runs on one input, in its own dtype."""
    own = copied(model, None)
    like = next((p for p in own.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        own(like.new_zeros(1, *shape))
    except Exception:
        return False
    return True


def _coarsely_denied(net: Net, model: nn.Module, x: Tensor) -> Tensor:
    """Where logits of the model in its own dtype are further from the network's than any rounding to 24 bits."""
    own = copied(model, None)
    like = next((p for p in own.parameters() if p.is_floating_point()), torch.empty(0))
    if like.dtype not in (torch.float32, torch.float64):  # half precision may be off by anything
        return torch.zeros(len(x), dtype=torch.bool)
    told = torch.cat([own(part.to(like)) for part in x.split(_CHUNK)]).to(x)
    read = net(x).log_softmax(1) if net.normalised else net(x)
    return ((told - read).abs() > _COARSE * _rounding(net, x).amax(1, keepdim=True)).logical_and(told.isfinite()).any(1)


def _some(logits: Tensor) -> str:
    return f"({', '.join(f'{z:.9g}' for z in logits[:5].tolist())}{', ...' if len(logits) > 5 else ''})"


def _denied(net: Net, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Where the logits that a model gave at points, in batches, are not those of the network, bool (N,)."""
    told = torch.cat(list(parts))
    read, allowed = (torch.cat([of(part) for part in x.split(_CHUNK)]) for of in (net, partial(_rounding, net)))
    if net.normalised:
        read = read.log_softmax(1)
    if told.shape != read.shape:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    lost = ~told.isfinite() & ~read.isfinite()  # both overflow
    return ~((read - told).abs() <= allowed.nan_to_num(nan=math.inf, posinf=math.inf)).logical_or(lost).all(1)


def _rounding(net: Net, x: Tensor) -> Tensor:
    """Ten times what noise makes of each logit that is thousands of times as large as rounding, (N, K).

    Every value is off by a share of itself before it is used: so sums that cancel are noisy, as they are when rounded.
    """
    generator = torch.Generator().manual_seed(0)

    def noisy(v: Tensor) -> Tensor:
        return v * (1 + _NOISE * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v))

    logits = net(x)
    moved = _NOISE * logits.abs()
    for _ in range(3):  # one alone may be near 0 by chance
        values = [noisy(x.reshape(-1, *net.shape))]
        for node in net.nodes:
            values.append(noisy(node.call(*(values[i] for i in node.inputs))))
        moved = moved.maximum((values[-1] - logits).abs())
    if net.normalised:  # one number is subtracted from all of them, which is off as the largest are
        shift = (logits.softmax(1) * moved).sum(1, keepdim=True)
        moved = moved + shift + _NOISE * logits.log_softmax(1).abs()
    return 20 * moved + torch.finfo(torch.float64).tiny


def _places(net: Net, sample: Tensor | None) -> Tensor:
    """Points of the box, its corners, and points around the sample from near to far away; then the sample itself."""
    generator = torch.Generator().manual_seed(0)
    random: Any = {"generator": generator, "dtype": torch.float64}
    given = torch.empty(0, net.n, dtype=torch.float64)
    if sample is not None:
        given = sample.detach().double().cpu().reshape(-1, net.n)
    centre = given[:1] if len(given) else torch.full((1, net.n), 0.5, dtype=torch.float64)
    around = [centre + scale * torch.randn(2, net.n, **random) for scale in (1e-3, 0.1, 1.0, 10.0, 1e3)]
    line = torch.linspace(0, 1, 2 * net.n, dtype=torch.float64).reshape(2, net.n)
    corners = torch.randint(0, 2, (2, net.n), generator=generator).double()
    return torch.cat([line, torch.rand(2, net.n, **random), corners, *around, given]).to(net.like).view(-1, *net.shape)


def _check_affine(net: Net, node: Node) -> None:
    """Refuse an affine node whose three maps do not belong together, at random points and at single coordinates."""
    if node.kind != "affine":
        return
    assert node.linear is not None
    assert node.absolute is not None
    shape = net.nodes[node.inputs[0] - 1].shape if node.inputs[0] else net.shape
    generator, count = torch.Generator().manual_seed(0), math.prod(shape)
    v, w = torch.randn(2, count, generator=generator, dtype=torch.float64)
    single = functional.one_hot(torch.randint(count, (4,), generator=generator), count)
    points = torch.cat([torch.stack([v, w, v + w, -3 * v]), single]).to(net.like).view(-1, *shape)
    zero, linear, size = node.call(torch.zeros_like(points[:1])), node.linear(points), node.absolute(points.abs())
    value, alone = node.call(points), node.call(points[:1])
    # what overflows is not compared: no number exceeds infinity, and none that is NaN exceeds any
    allowed = 1e-11 * (size + zero.abs() + value.abs()) + torch.finfo(torch.float64).tiny
    off = [
        value - zero - linear,
        (alone - value[:1]).expand_as(value),
        (linear[0] + linear[1] - linear[2]).expand_as(value),
        (3 * linear[0] + linear[3]).expand_as(value),
        (linear.abs() - size).clamp(min=0),
    ]
    single_off = (linear.abs() - size)[4:]
    # the sum of two random points is bounded by both bounds
    bound = allowed + 1e-11 * (size[0] + size[1])
    if any(bool((part.abs() > bound).any()) for part in off) or bool((single_off.abs() > allowed[4:]).any()):
        raise NotPiecewiseAffine(f"{node.name}: it does not compute what was read of it, or mixes samples")


def _input_shape(model: nn.Module) -> tuple[int, ...]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d | nn.BatchNorm2d):
            break
    raise ValueError(
        "shape=None: give the shape of one input, as shape=(1, 28, 28), where the first layer is not linear"
    )


_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys([nn.ReLU, functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"], "relu"),
    **dict.fromkeys([nn.GELU, functional.gelu], "gelu"),
    **dict.fromkeys([nn.SiLU, functional.silu], "silu"),
    **dict.fromkeys([nn.Softplus, functional.softplus], "softplus"),
    **dict.fromkeys([nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid"], "sigmoid"),
}
_RESHAPES = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, functional.dropout, nn.Flatten, nn.Unflatten}
_RESHAPES |= {nn.Identity, nn.Dropout, nn.Dropout2d, "flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous"}
# linear maps without weights, or with positive ones
_POSITIVE = {nn.AvgPool2d, nn.AdaptiveAvgPool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.mean}
_POSITIVE |= {torch.transpose, torch.permute, operator.getitem, "mean", "transpose", "permute"}
_PIECES = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
_DIFFERENCES = {operator.sub, operator.isub, torch.sub, "sub"}
_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, "div"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul"}
_ANEW = {operator.imul: operator.mul, operator.itruediv: operator.truediv}
_SUMS = {operator.add, operator.iadd, torch.add, "add", *_DIFFERENCES}
_JOINS = {torch.cat, torch.concat}
_SIZES = {"size", "dim", "numel"}
_ABOUT = {"shape", "ndim", "dtype", "device"}
_LOG_SOFTMAX = {nn.LogSoftmax, functional.log_softmax, torch.log_softmax, "log_softmax"}


class _Reader:
    """Runs a traced graph on batches of several sizes and writes down a node for each step that depends on the input.

    Every value that depends on the input is one of three: a tensor with a number among the values of the network, the
    pieces of one, or a size. Anything else is refused by name.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, shape: tuple[int, ...], like: Tensor) -> None:
        self.root, self.graph, self.shape, self.like = root, graph, shape, like
        self.nodes: list[Node] = []
        self.known: dict[fx.Node, list[Any]] = {}  # what each step of the graph gave, for each batch
        self.number: dict[fx.Node, int] = {}  # the value of the network that it is
        self.pieces: dict[fx.Node, tuple[fx.Node, Map]] = {}  # the value that it holds pieces of, and what cuts them
        self.sizes: dict[fx.Node, bool] = {}  # a size, and whether it varies with the batch
        self.spoiled: dict[fx.Node, str] = {}  # changed by a step in place, and no value of the network since

    def read(self) -> Net:
        """The network."""
        normalised, result = False, None
        for step in self.graph.nodes:
            if step.op == "placeholder":
                self.known[step] = [self.like.new_zeros(count, *self.shape) for count in _BATCHES]
                self.number[step] = 0
            elif step.op == "get_attr":
                self.known[step] = [operator.attrgetter(step.target)(self.root)] * len(_BATCHES)
            elif step.op == "output":
                result = step.args[0]
            elif self._ends_in_log_softmax(step):
                normalised = True
                self.known[step], self.number[step] = self.known[step.args[0]], self.number[step.args[0]]
            else:
                self._step(step)
        if not isinstance(result, fx.Node) or result not in self.number or self.known[result][0].ndim != 2:
            raise ValueError("the model does not return logits (N, K)")
        self._refuse_spoiled(result, "output")
        nodes = self._used(self.number[result])
        if not nodes:
            nodes = (Node("affine", "identity", (0,), self.shape, _same, _same, _same),)
        return Net(nodes, self.shape, self.like, normalised)

    def _used(self, last: int) -> tuple[Node, ...]:
        """The nodes that a value depends on, itself the last of them."""
        used = {last}
        for i in range(last, 0, -1):
            if i in used:
                used.update(self.nodes[i - 1].inputs)
        place = {i: k for k, i in enumerate(sorted(used | {0}))}
        return tuple(
            replace(self.nodes[i - 1], inputs=tuple(place[j] for j in self.nodes[i - 1].inputs)) for i in place if i
        )

    def _ends_in_log_softmax(self, step: fx.Node) -> bool:
        """Whether a step gives the result, as the log-softmax over the classes of what was read."""
        kind, _, _, module = self._what(step)
        if kind not in _LOG_SOFTMAX or {user.op for user in step.users} != {"output"}:
            return False
        options: dict[str, Any] = dict(zip(("dim",), step.args[1:], strict=False)) | dict(step.kwargs)
        options = {"dim": module.dim} if module is not None else options
        options.pop("_stacklevel", None)  # what torch hands on for a warning
        if options.get("dtype", ...) is None:
            del options["dtype"]
        source = step.args[0] if step.args else None
        return (
            isinstance(source, fx.Node)
            and source in self.number
            and source not in self.spoiled
            and self.known[source][0].ndim == 2
            and options in ({"dim": 1}, {"dim": -1})
        )

    def _step(self, step: fx.Node) -> None:
        kind, name, function, module = self._what(step)
        sources = [node for node in step.all_input_nodes if node in self.number or node in self.pieces]
        sizes = [node for node in step.all_input_nodes if node in self.sizes]
        for node in step.all_input_nodes:
            self._refuse_spoiled(node, name)
        about = kind is getattr and step.args[1] in _ABOUT
        if sources and kind not in _TREATED and not about:
            raise NotPiecewiseAffine(_unread(name))
        values, changed = self._run(step, name, function)
        self.known[step] = values
        varying = any(self.sizes[node] for node in sizes)
        if not sources:
            if sizes:
                self._size(step, name, values, varying)
        elif kind in _SIZES or about:
            self.sizes[step] = not values[0] == values[1] == values[2]
        elif varying and kind not in _RESHAPES:
            raise NotPiecewiseAffine(f"{name}: it takes the number of samples into account: each is read by itself")
        elif kind in _PIECES:
            self._cut(step, name, function, sources)
        else:
            self._check(name, values)
            self._read(step, kind, name, function, module, sources)
        for node in changed:
            if all(a is b for a, b in zip(self.known[node], values, strict=True)):
                self.number[node] = self.number[step]  # what reads it from here on finds the result in it
            else:
                self.spoiled[node] = name

    def _read(
        self, step: fx.Node, kind: Any, name: str, function: Map, module: nn.Module | None, sources: list[fx.Node]
    ) -> None:
        taken = _nodes((step.args, step.kwargs))
        if kind in _SUMS and not step.kwargs and len(step.args) == 2:
            self._sum(step, name, subtract=kind in _DIFFERENCES)
            return
        if kind in _JOINS:
            self._join(step, name)
            return
        inverted = kind in _QUOTIENTS and (bool(step.kwargs) or step.args[0] not in sources)
        if kind not in _READ or sum(node in sources for node in taken) > 1 or inverted:
            raise NotPiecewiseAffine(_unread(name))
        if kind is operator.getitem and sources[0] in self.number:
            self._check_index(step)
        if _ACTIVATIONS.get(kind) == "softplus":
            _check_softplus(name, module, *self._arguments(step, 0))
        function = _ANEW.get(function, function)
        source, cut = self.pieces.get(sources[0], (sources[0], _same))

        def call(v: Tensor) -> Tensor:
            of = cut(v)

            def given(node: fx.Node) -> Any:
                return of if node in sources else self.known[node][0]

            arguments = fx.map_arg((step.args, step.kwargs), given)
            result: Tensor = function(*arguments[0], **arguments[1])
            return result

        try:
            node = _READ[kind](kind, module, call, self.known[source][0], self.known[step][0])
        except NotPiecewiseAffine as error:
            raise NotPiecewiseAffine(f"{name}: {error}") from None
        self._append(step, replace(node, name=name, inputs=(self.number[source],)))

    def _arguments(self, step: fx.Node, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = fx.map_arg(
            (step.args, step.kwargs), lambda node: self.known[node][batch]
        )
        return arguments

    def _run(self, step: fx.Node, name: str, function: Map) -> tuple[list[Any], list[fx.Node]]:
        """What a step gives for each batch, and the earlier values that it changes in place."""
        before, constant = {node: _version(values[-1]) for node, values in self.known.items()}, self._constants()
        drawn, values = draws(), []
        for batch, count in enumerate(_BATCHES):
            args, kwargs = self._arguments(step, batch)
            try:
                values.append(function(*args, **kwargs))
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                if batch:  # one sample alone went well
                    raise NotPiecewiseAffine(f"{name}: it fails on {count} samples at once: {error}") from error
                raise
        if draws() != drawn:
            raise NotPiecewiseAffine(f"{name}: it draws random numbers")
        changed = [node for node, version in before.items() if _version(self.known[node][-1]) != version]
        if self._constants() != constant or any(node not in {*self.number, *self.pieces} for node in changed):
            raise NotPiecewiseAffine(f"{name}: it changes in place what is no value of the input")
        return values, changed

    def _constants(self) -> int:
        return sum(value._version for value in itertools.chain(self.root.parameters(), self.root.buffers()))

    def _refuse_spoiled(self, node: fx.Node, name: str) -> None:
        if node in self.spoiled:
            raise NotPiecewiseAffine(f"{name}: it is given what {self.spoiled[node]} has changed in place")

    def _size(self, step: fx.Node, name: str, values: list[Any], varying: bool) -> None:
        """A size out of others, or a constant that is made for one."""
        if step.target is operator.getitem:
            varying = not values[0] == values[1] == values[2]
        if not any(isinstance(value, Tensor) for value in values):
            self.sizes[step] = varying
        elif varying:
            raise NotPiecewiseAffine(f"{name}: it makes a tensor out of the number of samples, which is not read")

    def _check(self, name: str, values: list[Any]) -> None:
        """Refuse what is no tensor of the network's dtype with one row for each sample."""
        for count, value in zip(_BATCHES, values, strict=True):
            if not isinstance(value, Tensor):
                raise NotPiecewiseAffine(
                    f"{name}: what it makes of the input is a {type(value).__name__}, which is not read"
                )
            if value.ndim < 1 or len(value) != count or value.shape[1:] != values[0].shape[1:]:
                raise NotPiecewiseAffine(f"{name}: it mixes samples, or takes their number into account")
            if value.dtype != self.like.dtype:
                raise NotPiecewiseAffine(f"{name}: it gives {value.dtype}, which is not read")

    def _what(self, step: fx.Node) -> tuple[Any, str, Map, nn.Module | None]:
        """What a step applies: its kind as in `_READ`, its name, the function, and the layer if it is one."""
        if step.op == "call_module":
            module = self.root.get_submodule(str(step.target))
            kind: Any = type(module)
            if parametrize.is_parametrized(module):  # a class made for this module alone
                kind = kind.__mro__[1]
            return kind, f"{type(module).__name__} '{str(step.target)[2:]}'", module, module
        if step.op == "call_method":
            method = str(step.target)
            return method, method, lambda v, *args, **kwargs: getattr(v, method)(*args, **kwargs), None
        assert callable(step.target)
        return step.target, getattr(step.target, "__name__", str(step.target)), step.target, None

    def _sum(self, step: fx.Node, name: str, subtract: bool) -> None:
        terms: list[int] = []
        shift: Any = 0.0
        shape = tuple(self.known[step][0].shape[1:])
        for sign, term in zip((1.0, -1.0 if subtract else 1.0), step.args, strict=True):
            if isinstance(term, fx.Node) and term in self.number:
                terms.append(self.number[term])
                if sign < 0:
                    minus = _scaling(self.known[term][0], self.like.new_tensor(-1.0))
                    self.nodes.append(replace(minus, name=name, inputs=(terms[-1],)))
                    terms[-1] = len(self.nodes)
            else:
                constant: Any = fx.map_arg(term, lambda node: self.known[node][0])
                shift = sign * constant

        def spread(v: Tensor) -> Tensor:  # a constant may have more entries than the value
            return v.expand(len(v), *shape)

        if len(terms) == 2:
            node = Node("sum", name, tuple(terms), shape, operator.add)
        else:
            node = Node("affine", name, tuple(terms), shape, lambda v: v + shift, spread, spread)
        self._append(step, node)

    def _check_index(self, step: fx.Node) -> None:
        """Refuse an index that may pick samples."""
        value, index = self._arguments(step, 0)[0]
        plain = isinstance(index, tuple) and all(type(i) in (int, slice) or i is None or i is ... for i in index)
        taken = len([i for i in index if i is not None and i is not ...]) if plain else 0
        if not plain or not (index[0] == slice(None) or (index[0] is ... and taken < value.ndim)):
            raise NotPiecewiseAffine("getitem: only numbers and slices behind all samples, as in x[:, 1:3], are read")

    def _cut(self, step: fx.Node, name: str, function: Map, sources: list[fx.Node]) -> None:
        """Pieces of a value along an axis; each is read where it is taken."""
        given = _nodes((step.args, step.kwargs))
        if len(sources) > 1 or len(given) != 1 or step.args[:1] != (sources[0],) or sources[0] in self.pieces:
            raise NotPiecewiseAffine(f"{name}: only pieces of one value along one axis are read")
        (source,), rest, options = sources, step.args[1:], dict(step.kwargs)
        self.pieces[step] = source, lambda v: function(v, *rest, **options)

    def _join(self, step: fx.Node, name: str) -> None:
        """Values side by side: the sum of each between zeros."""
        options: dict[str, Any] = dict(zip(("tensors", "dim"), step.args, strict=False)) | dict(step.kwargs)
        parts, dim = options.get("tensors"), options.get("dim", 0)
        if not isinstance(parts, list | tuple) or any(part not in self.number for part in parts):
            raise NotPiecewiseAffine(f"{name}: only values that depend on the input are read side by side")
        shapes = [tuple(self.known[part][0].shape[1:]) for part in parts]
        shape, total = tuple(self.known[step][0].shape[1:]), 0

        def between(place: int) -> Map:
            def embed(v: Tensor) -> Tensor:
                zeros = [v.new_zeros(len(v), *sides) for sides in shapes]
                return torch.cat([*zeros[:place], v, *zeros[place + 1 :]], dim)

            return embed

        for place, part in enumerate(parts):
            embed = between(place)
            self.nodes.append(Node("affine", name, (self.number[part],), shape, embed, embed, embed))
            if place:
                self.nodes.append(Node("sum", name, (total, len(self.nodes)), shape, operator.add))
            total = len(self.nodes)
        self.number[step] = total

    def _append(self, step: fx.Node, node: Node) -> None:
        self.nodes.append(node)
        self.number[step] = len(self.nodes)


def _nodes(arguments: Any) -> list[fx.Node]:
    """The steps that arguments name, as often as they do."""
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _version(value: Any) -> int:
    """How often tensors were changed in place."""
    if isinstance(value, Tensor):
        return value._version
    return sum(map(_version, value)) if isinstance(value, tuple | list) else 0


def _same(v: Tensor) -> Tensor:
    return v


def _check_softplus(name: str, module: Any, args: Any, kwargs: Any) -> None:
    """Refuse what is no smooth, convex curve from 0 to x: a low threshold cuts it, a high one overflows before it."""
    given = {"beta": 1.0, "threshold": 20.0} | dict(zip(("beta", "threshold"), args[1:], strict=False)) | kwargs
    beta, threshold = (module.beta, module.threshold) if module is not None else (given["beta"], given["threshold"])
    if not 20 <= threshold <= 700:
        raise NotPiecewiseAffine(f"{name} jumps at threshold={threshold}: 20 to 700 are accepted")
    if not 0 < beta < math.inf:
        raise NotPiecewiseAffine(f"{name} has beta={beta}: a finite number above 0 is accepted")


def _activation(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    # an activation in place would change what it is applied to
    return Node("activation", "", (), tuple(value.shape[1:]), lambda v: call(v.clone()), activation=_ACTIVATIONS[kind])


def _reshape(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    shape = tuple(value.shape[1:])
    entries = torch.arange(1.0, 1.0 + source.numel()).to(source).view_as(source)
    if not torch.equal(call(entries.clone()).flatten(), entries.flatten()):
        raise NotPiecewiseAffine("it changes values, or their order")

    def reshape(v: Tensor) -> Tensor:
        return v.reshape(len(v), *shape)

    return _positive(kind, module, reshape, source, value)


def _positive(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    return Node("affine", "", (), tuple(value.shape[1:]), call, call, call)


def _linear(kind: Any, module: nn.Linear, call: Map, source: Tensor, value: Tensor) -> Node:
    weight = module.weight
    return Node(
        "affine", "", (), tuple(value.shape[1:]), call,
        lambda v: functional.linear(v, weight), lambda v: functional.linear(v, weight.abs()), layer=module,
    )  # fmt: skip


def _convolution(kind: Any, module: nn.Conv2d, call: Map, source: Tensor, value: Tensor) -> Node:
    if module.padding_mode != "zeros":
        raise NotPiecewiseAffine(f"padding_mode={module.padding_mode!r}: 'zeros' is accepted")

    def convolve(v: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(v, weight, None, module.stride, module.padding, module.dilation, module.groups)

    weight = module.weight
    return Node(
        "affine", "", (), tuple(value.shape[1:]), call,
        lambda v: convolve(v, weight), lambda v: convolve(v, weight.abs()), layer=module,
    )  # fmt: skip


def _batch_norm(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    scale = (module.running_var + module.eps).rsqrt()
    scale = (scale if module.weight is None else scale * module.weight).view(-1, *[1] * (value.ndim - 2))
    return replace(_scaling(value, scale), call=call, layer=module)


def _scale(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    """A product with a constant, a quotient by one, or a change of sign."""
    return replace(_scaling(value, call(torch.ones_like(source))), call=call)


def _scaling(value: Tensor, scale: Tensor) -> Node:
    return Node(
        "affine", "", (), tuple(value.shape[1:]), lambda v: v * scale, lambda v: v * scale, lambda v: v * scale.abs()
    )


def _max_pool(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    if source.ndim != 4:
        raise NotPiecewiseAffine(f"it is read for images (N, C, H, W), not for values {('N', *source.shape[1:])}")
    return Node("maxpool", "", (), tuple(value.shape[1:]), call)


def _bounded(kind: Any, module: Any, call: Map, source: Tensor, value: Tensor) -> Node:
    return Node("bounded", "", (), tuple(value.shape[1:]), call)


def _zero(node: Node) -> Node:
    def zero(*values: Tensor) -> Tensor:
        return values[0].new_zeros(len(values[0]), *node.shape)

    return Node("affine", node.name, node.inputs[:1], node.shape, zero, zero, zero)


_READ: dict[Any, Callable[[Any, Any, Map, Tensor, Tensor], Node]] = {
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_POSITIVE, _positive),
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d], _batch_norm),
    **dict.fromkeys([*_PRODUCTS, *_QUOTIENTS, operator.neg, torch.neg, "neg"], _scale),
    **dict.fromkeys([nn.MaxPool2d, functional.max_pool2d], _max_pool),
    **dict.fromkeys([nn.LayerNorm, Attention], _bounded),
}
_TREATED = {*_READ, *_SUMS, *_JOINS, *_PIECES, *_SIZES}
_KNOWN = ", ".join(sorted(kind.__name__ for kind in _READ if isinstance(kind, type)))


def _unread(name: str) -> str:
    return f"{name}: this is not read, be it piecewise affine or not; read are {_KNOWN}, sums, scalings, slices and cat"


def _repeat(form: tuple[Array, Array], count: int) -> tuple[Array, Array]:
    return tuple(np.broadcast_to(part, (count, *part.shape[1:])) for part in form)  # type: ignore[return-value]


def _dense(net: Net) -> Dense:
    """Push the unit vectors of the input and of each activation through what is affine."""
    hidden = len(net.activations)
    weights = [[np.empty(0)] * (h + 1) for h in range(hidden + 1)]
    for j, units in enumerate((net.n, *net.units)):
        for h, seen in enumerate(_replaced(net, j, torch.eye(units).to(net.like), biased=False)):
            if h >= j:
                weights[h][j] = seen.T.cpu().numpy()
    bias = [seen[0].cpu().numpy() for seen in _replaced(net, 0, net.like.new_zeros(1, net.n), biased=True)]
    names = tuple(node.activation for node in net.activations)
    return Dense(tuple(tuple(row) for row in weights), tuple(bias), names)


def _replaced(net: Net, source: int, value: Tensor, biased: bool) -> list[Tensor]:
    """What each activation and the logits see if one source has a given value, and all others give 0.

    Source 0 is the input and source j the output of activation j.
    """
    values = [value.new_zeros(len(value), *net.shape)]
    if source == 0:
        values[0] = value.reshape(-1, *net.shape)
    seen = []
    for node in net.nodes:
        arguments = [values[i] for i in node.inputs]
        if node.kind == "activation":
            seen.append(arguments[0].flatten(1))
            here = source == len(seen)
            values.append(value.reshape(-1, *node.shape) if here else value.new_zeros(len(value), *node.shape))
        else:
            call = node.call if biased or node.linear is None else node.linear
            values.append(call(*arguments))
    return [*seen, values[-1]]
