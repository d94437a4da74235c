r"""Lipschitz constants L that bound the worst-case risk from above, :math:`V(\epsilon) \le E + L\epsilon`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from wda.cells import Cells, enumerate, few
from wda.certificates import bounds, milp
from wda.certificates.gains import product
from wda.certificates.recession import pairs_of
from wda.certificates.slope import Slope
from wda.checks import choice, interval
from wda.nets import Net, from_module
from wda.norms import dual, exponent, operator_norm

__all__ = ["lipschitz"]

KINDS = ("margin", "corrected", "paper", "product")
METHODS = ("auto", "cells", "milp", "bounds")


def lipschitz(
    net: Net | nn.Module,
    norm: str,
    kind: str = "margin",
    labels: Sequence[int] | torch.Tensor | None = None,
    method: str = "auto",
    box: tuple[float, float] | None = None,
    time_limit: float = 60.0,
) -> Slope:
    r"""A Lipschitz constant of the margin and of the cross-entropy, in one of four forms.

    With s dual to the norm's exponent r, over the full-dimensional cells D:

    =========== ===================================================================================================
    "margin"    :math:`\max_D\max_{k\text{ present}}\max_{j\ne k}\|J_D^\top(e_j-e_k)\|_s`, the sharpest of the four
    "corrected" :math:`2^{1/r}\max_D\|J_D\|_{r\to s}`, eq. (6) with the exponent that its proof needs
    "paper"     :math:`2^{1/s}\max_D\|J_D\|_{r\to s}`, eq. (6) as printed; for r < 2 it is **no** upper bound
    "product"   a product of layer norms, no cells needed
    =========== ===================================================================================================

    Parameters
    ----------
    net : Net or nn.Module
    norm : {"Linf", "L2", "L1"}
        Norm of the input.
    kind : {"margin", "corrected", "paper", "product"}
    labels : sequence of int or Tensor, optional
        Those present in the data, for "margin" and "product"; by default all classes.
    method : {"auto", "cells", "milp", "bounds"}
        "cells" enumerates and is exact. "milp" is exact for "margin" with "Linf" or "L1" on a box. "bounds" has
        certified upper bounds by propagation for "margin", for any network, smooth ones too, with the steepest of
        some points from below. "auto" is "cells" for up to 20,000 of them, else "bounds". "product" has one method.
    box : (float, float), optional
        Inputs are in :math:`[low, high]^n`; by default they are unbounded.
    time_limit : float
        Seconds for "milp"; where they run out, the bounds found so far are returned.

    Returns
    -------
    Slope

    Raises
    ------
    NotPiecewiseAffine
        Names the layer that the method cannot treat.
    ValueError
        An argument that is not accepted, or a network too large for the method.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> lipschitz(net, "L2").value <= lipschitz(net, "L2", kind="corrected").value
    True
    """
    exponent(norm)
    choice("kind", kind, KINDS)
    choice("method", method, METHODS)
    box = interval("box", box)
    net = from_module(net)
    pairs = pairs_of(net.classes, labels)
    if kind == "product":
        upper = float(product(net, norm, pairs).max())
        return Slope(0.0, upper, "product")
    if method == "milp" and kind == "margin":
        if box is None:
            raise ValueError("box=None: method='milp' needs a box (low, high)")
        if norm == "L2":
            raise ValueError("norm='L2': method='milp' treats 'Linf' and 'L1'")
        return milp.lipschitz(net.dense, norm, pairs, box, time_limit)
    cells = enumerate(net, box) if method == "cells" else few(net, box) if method == "auto" else None
    if cells is not None:
        return _over_cells(cells, norm, kind, pairs)
    if kind != "margin" or method == "milp":
        raise ValueError(f"kind={kind!r} needs the cells (method='cells'); kind='margin' has other methods")
    upper = float(bounds.lipschitz_upper(net, norm, pairs, box).max())
    lower, label, rival = _steepest_seen(net, norm, pairs, box)
    return Slope(lower, upper, "bounds", None, label, rival)


def _over_cells(cells: Cells, norm: str, kind: str, pairs: list[tuple[int, int]]) -> Slope:
    if kind == "margin":
        steep = np.linalg.norm(cells.gradients(pairs), exponent(dual(norm)), axis=2)
        cell, pair = np.unravel_index(steep.argmax(), steep.shape)
        return Slope(float(steep[cell, pair]), float(steep[cell, pair]), "cells", None, *pairs[pair])
    r = exponent(norm if kind == "corrected" else dual(norm))
    largest = max(operator_norm(matrix, norm, dual(norm)) for matrix in torch.tensor(cells.jacobians()))
    return Slope(2 ** (1 / r) * largest, 2 ** (1 / r) * largest, "cells")


def _steepest_seen(
    net: Net, norm: str, pairs: list[tuple[int, int]], box: tuple[float, float] | None, points: int = 64
) -> tuple[float, int, int]:
    """The steepest margin at some random points: a lower bound of the constant."""
    generator = torch.Generator().manual_seed(0)
    if box is None:
        x = torch.randn(points, net.n, generator=generator, dtype=torch.float64)
    else:
        x = box[0] + (box[1] - box[0]) * torch.rand(points, net.n, generator=generator, dtype=torch.float64)
    J = net.jacobian(x.to(net.like))
    k, j = (list(side) for side in zip(*pairs, strict=True))
    steep = torch.linalg.vector_norm(J[:, j] - J[:, k], exponent(dual(norm)), dim=2).amax(0)
    best = int(steep.argmax())
    return float(steep[best]), *pairs[best]
