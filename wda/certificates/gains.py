r"""Lipschitz constants from above by norms of layers: their product, and the same around the middle of the slopes.

The gain of a value of the network is a Lipschitz constant of the map from the input to it, both in the norm r. Bounds
are computed in float64 and raised by 1e-9 of themselves for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wda.certificates.propagation import ROUNDING, Bounds, adjoint, margins, slopes, value_shape, windows
from wda.errors import NotPiecewiseAffine
from wda.nets import Net
from wda.norms import dual, exponent, norm

__all__ = ["circular_norm", "halved", "homogeneous", "layer_norm", "product", "spectral_norm"]

# the largest Gram matrix whose eigenvalues are computed, a few seconds
_GRAM = 2048
# how many numbers a chunk of unit vectors may hold
_CHUNK = 2**24


def product(net: Net, norm_name: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
    r"""Lipschitz constants of :math:`\theta_j - \theta_k` from above: the product of the norms of the layers.

    Affine maps multiply the gain by their operator norm (`layer_norm`), activations by
    :math:`\sup|\sigma'|`, which is 1 for ReLU and softplus, 1.129 for GELU, 1.0999 for SiLU and 1/4 for the sigmoid;
    sums add the gains of their terms. Max pooling multiplies by 1 in "Linf", and otherwise by the number of windows
    that an entry lies in ("L1") or by its root ("L2"), since
    :math:`|\max_i a_i - \max_i b_i| \le \max_i |a_i - b_i|`. The last affine map W contributes
    :math:`\|W^\top(e_j - e_k)\|_s`.

    Parameters
    ----------
    net : Net
    norm_name : {"Linf", "L2", "L1"}
        Of the input.
    pairs : sequence of (label, rival)

    Returns
    -------
    Tensor, shape (pairs,)

    Raises
    ------
    NotPiecewiseAffine
        Names a layer that has no finite Lipschitz constant on all inputs, or none that is known here.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(2, 2, bias=False)), shape=(2,))
    >>> net.nodes[-1].layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).shape
    torch.Size([2, 2])
    >>> round(float(product(net, "Linf", [(0, 1)])), 6)
    5.0
    """
    rows, last = margins(net, pairs), len(net.nodes)
    steepest = [max(float(-low.min()), float(high.max())) for low, high in slopes(net)]
    gains = [1.0]
    for i, node in enumerate(net.nodes, 1):
        before = [gains[j] for j in node.inputs]
        if node.kind == "affine":
            if i == last:
                rows = adjoint(net, i, rows)[0]
                return norm(rows, dual(norm_name)) * before[0] * (1 + ROUNDING)
            gains.append(before[0] * layer_norm(net, i, norm_name))
        elif node.kind == "sum":
            gains.append(sum(before))
        elif node.kind == "activation":
            gains.append(before[0] * steepest.pop(0))
        elif node.kind == "maxpool":
            down, across = windows(net, i)
            overlap = float(down.sum(0).max() * across.sum(0).max())
            gains.append(before[0] * overlap ** (1 / exponent(norm_name)))
        else:
            raise NotPiecewiseAffine(f"{node.name}: no Lipschitz constant is known for this layer on all inputs")
    return norm(rows, dual(norm_name)) * gains[last] * (1 + ROUNDING)


def layer_norm(net: Net, i: int, norm_name: str) -> float:
    r"""The operator norm r to r of the affine node ``net.nodes[i - 1]``, or an upper bound of it.

    "Linf" is the largest row sum of absolute values and "L1" the largest column sum. "L2" is exact for a linear layer
    and for a convolution with a side of at most 2048; a larger convolution is bounded by
    `circular_norm`, and what is neither by :math:`\|A\|_2 \le (\|A\|_\infty\|A\|_1)^{1/2}`, which is an equality for
    reshapes, scalings and means over disjoint windows.

    Parameters
    ----------
    net : Net
    i : int
    norm_name : {"Linf", "L2", "L1"}

    Returns
    -------
    float

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), shape=(1, 4, 4))
    >>> [layer_norm(net, 1, name) for name in ("Linf", "L2", "L1")]
    [1.0, 0.5, 0.25]
    """
    node = net.nodes[i - 1]
    shape = value_shape(net, node.inputs[0])
    assert node.absolute is not None
    largest_row = float(node.absolute(net.like.new_ones(1, *shape)).max())
    if norm_name == "Linf":
        return largest_row
    largest_column = float(adjoint(net, i, net.like.new_ones(1, *node.shape), absolute=True)[0].max())
    if norm_name == "L1":
        return largest_column
    bound = math.sqrt(largest_row * largest_column)
    if isinstance(node.layer, nn.Linear):
        return min(bound, spectral_norm(node.layer.weight))
    if isinstance(node.layer, nn.Conv2d):
        small = min(math.prod(shape), math.prod(node.shape)) <= _GRAM
        return min(bound, _gram_norm(net, i) if small else circular_norm(node.layer, (shape[1], shape[2])))
    return bound


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix (..., m, n), the largest over all leading axes.

    Examples
    --------
    >>> spectral_norm(torch.tensor([[3.0, 4.0]]))
    5.0
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    gram = matrix @ matrix.mH if wide else matrix.mH @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram).max()), 0.0))


def _gram_norm(net: Net, i: int) -> float:
    """The spectral norm of an affine node, from its Gram matrix on the smaller side."""
    node = net.nodes[i - 1]
    before, after = value_shape(net, node.inputs[0]), node.shape
    assert node.linear is not None
    side = min(math.prod(before), math.prod(after))
    wide = max(math.prod(before), math.prod(after))
    gram = []
    for unit in torch.eye(side).to(net.like).split(max(1, _CHUNK // wide)):
        if side == math.prod(before):
            image = adjoint(net, i, node.linear(unit.view(-1, *before)))[0]
        else:
            image = node.linear(adjoint(net, i, unit.view(-1, *after))[0])
        gram.append(image.flatten(1))
    return math.sqrt(max(float(torch.linalg.eigvalsh(torch.cat(gram)).max()), 0.0))


def circular_norm(layer: nn.Conv2d, size: tuple[int, int]) -> float:
    r"""An upper bound of the spectral norm of a zero-padded convolution: that of a circular one.

    Embed the image in a torus on which the padded image does not wrap around. The convolution is then a part of the
    circular one: inputs restricted to the image, outputs to some places. The circular one with stride
    :math:`s_1 \times s_2` is block-diagonal in Fourier space: the :math:`s_1 s_2` frequencies :math:`\omega_m` that
    the stride cannot tell apart give the block :math:`(s_1 s_2)^{-1/2}[\hat W(\omega_1), \hat W(\omega_2), \dots]`,
    with the matrix :math:`\hat W(\omega)` of the channels' transfer functions (Sedghi, Gupta & Long, 2019, *The
    singular values of convolutional layers*, for stride 1). Its norm is the largest norm of a block.

    Parameters
    ----------
    layer : nn.Conv2d
    size : (int, int)
        Height and width of the image.

    Returns
    -------
    float

    Examples
    --------
    >>> layer = nn.Conv2d(1, 1, 3, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> circular_norm(layer, (8, 8))
    9.0
    """
    weight = layer.weight.detach()
    out, into, *kernel = weight.shape
    reach = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
    padding = reach if isinstance(layer.padding, str) else layer.padding
    torus = [
        math.ceil(max(side + 2 * p, r + 1) / s) * s
        for side, p, r, s in zip(size, padding, reach, layer.stride, strict=True)
    ]
    taps = weight.new_zeros(out, into, *torus)
    taps[:, :, : reach[0] + 1 : layer.dilation[0], : reach[1] + 1 : layer.dilation[1]] = weight
    (s1, s2), (c1, c2) = layer.stride, (torus[0] // layer.stride[0], torus[1] // layer.stride[1])
    transfer = torch.fft.fft2(taps).view(layer.groups, out // layer.groups, into, s1, c1, s2, c2)
    blocks = transfer.permute(0, 4, 6, 1, 2, 3, 5).reshape(layer.groups * c1 * c2, out // layer.groups, into * s1 * s2)
    return spectral_norm(blocks) / math.sqrt(s1 * s2)


def halved(net: Net, norm_name: str, pairs: Sequence[tuple[int, int]], steep: Sequence[Bounds] | None = None) -> Tensor:
    r"""Lipschitz constants of :math:`\theta_j - \theta_k` from above, around the middle of the activations' slopes.

    Write the slopes of activation j as :math:`D_j = C_j + R_j S_j` with the middle :math:`C_j`, half the range
    :math:`R_j`, both diagonal, and an unknown :math:`|S_j| \le I`: for ReLU :math:`D = (I + S)/2`. In the network
    whose slopes are the middles, the map from :math:`a_j` (with :math:`a_0 = x`) to what layer h sees is

    .. math:: T_{hj} = W_{hj} + \sum_{j<i<h} W_{hi} C_i T_{ij}.

    So the differences of two evaluations satisfy
    :math:`\delta z_h = T_{h0}\,\delta x + \sum_{1 \le j < h} T_{hj} R_j S_j\,\delta z_j`. Bound the gains
    :math:`B_h` of :math:`z_h` in the norm r, :math:`\beta_h` of its single units, and :math:`\Gamma_h` of its units
    with respect to single inputs, each by

    .. math::

        B_h &\le \|T_{h0}\|_{r\to r} + \sum_j \|T_{hj}R_j\|_{r\to r} B_j \text{ and } B_h \le \|\beta_h\|_r, \\
        \beta_{hm} &\le \|e_m^\top T_{h0}\|_s + \sum_j \min(\|e_m^\top T_{hj}R_j\|_s B_j,\
            |e_m^\top T_{hj}R_j| \beta_j) \text{ and } \beta_{hm} \le \|e_m^\top\Gamma_h\|_s, \\
        \Gamma_h &\le |T_{h0}| + \sum_j |T_{hj} R_j| \Gamma_j,

    with the rows :math:`e_j - e_k` of the logits as the units of the last layer. In a ReLU chain the first bound is
    :math:`2^{1-h}\|W_h\cdots W_1\| + \sum_j 2^{j-h}\|W_h \cdots W_{j+1}\| B_j`: the loop transformation of Fazlyab et
    al. (2023, *Certified robustness via dynamic margin maximization and improved Lipschitz regularization*). As the
    norm of a product is at most the product of the norms, and :math:`\|C\| + \|R\| = \sup|\sigma'|` for the slopes on
    all of :math:`\mathbb R`, it is then never above the product of the layers' norms.

    Parameters
    ----------
    net : Net
    norm_name : {"Linf", "L2", "L1"}
        Of the input.
    pairs : sequence of (label, rival)
    steep : sequence of pairs of tensors (1, units), optional
        From `slopes`; by default those on all of :math:`\mathbb R`. Where they hold on a convex region only, so does
        the bound.

    Returns
    -------
    Tensor, shape (pairs,)

    Raises
    ------
    NotPiecewiseAffine, ValueError
        The network cannot be written as explicit matrices, see `Net.dense`.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    >>> bool(halved(net, "L2", [(0, 1)]) <= product(net, "L2", [(0, 1)]))
    True
    """
    path, spread, layers = _around_the_middle(
        net, norm_name, margins(net, pairs), slopes(net) if steep is None else steep
    )
    entries = path.abs()
    for T, layer in zip(spread, layers, strict=True):
        entries += T.abs() @ layer.entries
    bound = norm(entries, dual(norm_name)).minimum(_unit_gains(path, spread, layers, norm_name))
    return bound.to(net.like) * (1 + ROUNDING)


def homogeneous(limit: Net, norm_name: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
    r"""Upper bounds of :math:`\theta_j - \theta_k` over the unit ball, for a ReLU network without biases.

    As `halved`, with :math:`[z]_+ = (z + |z|)/2`: in the last row, of the network in which every slope is 1/2, only
    positive coefficients of :math:`|z_j| \ge 0` count,

    .. math:: \theta_j - \theta_k \le \|t_0\|_s + \tfrac12\sum_j \min([t_j]_+ \beta_j, \|[t_j]_+\|_s B_j).

    Parameters
    ----------
    limit : Net
        A recession network (`Net.recession`).
    norm_name : {"Linf", "L2", "L1"}
    pairs : sequence of (label, rival)

    Returns
    -------
    Tensor, shape (pairs,)

    Raises
    ------
    NotPiecewiseAffine, ValueError
        The network cannot be written as explicit matrices, see `Net.dense`.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(nn.Sequential(nn.Flatten(), nn.ReLU()), shape=(2,))
    >>> round(float(homogeneous(net, "L1", [(0, 1)])), 6)
    1.0
    """
    path, spread, layers = _around_the_middle(limit, norm_name, margins(limit, pairs), slopes(limit))
    bound = _unit_gains(path, [T.clamp(min=0) for T in spread], layers, norm_name)
    return bound.to(limit.like) * (1 + ROUNDING)


class _Gains(NamedTuple):
    """Lipschitz constants of a layer's pre-activations: B, beta and Gamma of `halved`."""

    layer: float
    units: Tensor
    entries: Tensor


def _around_the_middle(
    net: Net, norm_name: str, rows: Tensor, steep: Sequence[Bounds]
) -> tuple[Tensor, list[Tensor], list[_Gains]]:
    """For rows of coefficients of the logits: T_0, all T_j R_j, and the gains of the hidden layers j."""
    dense = net.dense
    bounds = [(low[0].cpu(), high[0].cpu()) for low, high in steep]
    middle = [(low + high) / 2 for low, high in bounds]
    half = [(high - low) / 2 for low, high in bounds]
    paths: list[list[Tensor]] = []
    layers: list[_Gains] = []
    for h in range(len(dense.units) + 1):
        weights = [torch.from_numpy(W) for W in dense.weights[h]]
        if h == len(dense.units):
            weights = [rows.cpu() @ W for W in weights]
        scaled = [W * middle[i] for i, W in enumerate(weights[1:])]
        paths.append(
            [
                weights[j] + sum((scaled[i] @ paths[i][j] for i in range(j, h) if scaled[i].any()), torch.zeros(()))
                for j in range(h + 1)
            ]
        )
        path, spread = paths[h][0], [T * R for T, R in zip(paths[h][1:], half, strict=False)]
        if h < len(dense.units):
            layers.append(_layer_gains(path, spread, layers, norm_name))
    return path, spread, layers


def _layer_gains(path: Tensor, spread: list[Tensor], layers: list[_Gains], norm_name: str) -> _Gains:
    entries = path.abs()
    gain = _matrix_norm(path, norm_name)
    for T, layer in zip(spread, layers, strict=True):
        if T.any():
            entries = entries + T.abs() @ layer.entries
            gain += _matrix_norm(T, norm_name) * layer.layer
    units = _unit_gains(path, spread, layers, norm_name).minimum(norm(entries, dual(norm_name)))
    return _Gains(min(gain, float(norm(units[None], norm_name))), units.clamp(max=gain), entries)


def _unit_gains(path: Tensor, spread: list[Tensor], layers: list[_Gains], norm_name: str) -> Tensor:
    units = norm(path, dual(norm_name))
    for T, layer in zip(spread, layers, strict=True):
        units = units + (norm(T, dual(norm_name)) * layer.layer).minimum(T.abs() @ layer.units)
    return units


def _matrix_norm(matrix: Tensor, norm_name: str) -> float:
    if norm_name == "L2":
        return spectral_norm(matrix)
    return float(matrix.abs().sum(1 if norm_name == "Linf" else 0).max())
