r"""Activation cells: the full-dimensional regions on which a small ReLU network is affine.

The first layer cuts space by one hyperplane per unit; inside each region the second layer is affine, so its units cut
that region by hyperplanes again, and so on. Each step is one arrangement of hyperplanes inside a polyhedron. Where it
is simple (no more hyperplanes through a vertex than dimensions), every cell has a vertex, and the cells at a vertex
are the :math:`2^n` ways to choose a side of the hyperplanes through it; so the vertices give all cells at once. Where
it is not, hyperplanes are added one by one and a linear program says which cells they cut. All in float64.
"""

from __future__ import annotations

import builtins
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import nn

from wda.checks import interval, whole
from wda.errors import NotPiecewiseAffine
from wda.nets import Array, Dense, Mask, Net, TooLarge, from_module

__all__ = ["Cell", "Cells", "TooManyCells", "at", "enumerate", "few"]

# rows of a unit normal: relative size below which a number is rounding
_ROUNDING = 1e-10
# relative error of a solution of linear equations, per unit of their condition
_EXACT = 1e-13
# a smallest singular value below which hyperplanes meet in no single point
_DEPENDENT = 1e-13
# a radius, in the unit of the arrangement, below which a cell is rounding
_EMPTY = 1e-12
# how many vertices are solved for at once, and in all for each cell that the limit allows
_CHUNK = 1 << 16
_TRIES = 100


class TooManyCells(TooLarge):
    """A network has more cells than the limit allows, or they would take too long to find."""


@dataclass(frozen=True, eq=False)
class Cell:
    r"""One activation cell: the closure of the set of inputs with one mask.

    Attributes
    ----------
    mask : bool array (U,)
        Which hidden units are on, all layers after each other.
    jacobian : float64 array (K, n)
        :math:`J_D`; the logits are ``jacobian @ x + offset`` on the cell.
    offset : float64 array (K,)
    halfspaces : (A, b)
        The cell is :math:`\{x : Ax \le b\}`: a row for each hidden unit that depends on x, then the faces of the box.

    Examples
    --------
    >>> cell = enumerate(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)))[0]
    >>> cell.jacobian.shape, cell.recession_cone.shape
    ((2, 1), (1, 1))
    """

    mask: Mask
    jacobian: Array
    offset: Array
    halfspaces: tuple[Array, Array]

    @property
    def recession_cone(self) -> Array:
        """A, with :math:`\\{u : Au \\le 0\\}` the directions in which one can walk for ever inside the cell."""
        return self.halfspaces[0]

    @cached_property
    def interior_point(self) -> Array:
        """The centre of a largest ball in the cell (of radius at most 1), (n,)."""
        return _chebyshev(*self.halfspaces, n=self.jacobian.shape[1])[1]


@dataclass(frozen=True, eq=False)
class Cells(Sequence[Cell]):
    """The activation cells of a network, as a sequence of `Cell`; the masks are the only thing stored.

    Attributes
    ----------
    dense : Dense
        The network.
    masks : bool array (M, U)
    box : (float, float) or None
        What the cells were cut to.

    Examples
    --------
    >>> cells = enumerate(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> len(cells) == 1 + 3 + 3, cells.masks.shape
    (True, (7, 3))
    >>> J, c = cells.affine()
    >>> A, b = cells.oriented()
    >>> J.shape, A.shape, np.array_equal(A[0], cells.constraints(0)[0])
    ((7, 2, 2), (7, 3, 2), True)
    """

    dense: Dense
    masks: Mask
    box: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.masks)

    @overload
    def __getitem__(self, i: int) -> Cell: ...
    @overload
    def __getitem__(self, i: slice) -> Cells: ...
    def __getitem__(self, i: int | slice) -> Cell | Cells:
        if isinstance(i, slice):
            return Cells(self.dense, self.masks[i], self.box)
        J, c = self.dense.affine(self.masks[i][None])
        return Cell(self.masks[i], J[0], c[0], self.constraints(i))

    def __iter__(self) -> Iterator[Cell]:
        return (self[i] for i in range(len(self)))

    def affine(self) -> tuple[Array, Array]:
        """The logits on each cell: Jacobians (M, K, n) and offsets (M, K)."""
        return self.dense.affine(self.masks)

    def oriented(self) -> tuple[Array, Array]:
        r"""The half-spaces of every cell from its units, :math:`Ax \le b`: arrays (M, U, n) and (M, U).

        A unit that does not depend on x has a row of zeros, which every x satisfies.
        """
        forms = self.dense.forms(self.dense.split(self.masks))[:-1]
        A = np.concatenate([A for A, _ in forms] or [np.zeros((len(self), 0, self.dense.n))], axis=1)
        b = np.concatenate([b for _, b in forms] or [np.zeros((len(self), 0))], axis=1)
        side = np.where(self.masks, -1.0, 1.0)
        return side[:, :, None] * A, -side * b

    def constraints(self, i: int) -> tuple[Array, Array]:
        """`Cell.halfspaces` of cell i."""
        A, b = Cells(self.dense, self.masks[i][None]).oriented()
        depends = A[0].any(1)
        G, g = _box_rows(self.box, self.dense.n)
        return np.concatenate([A[0][depends], G]), np.concatenate([b[0][depends], g])

    @cached_property
    def interior(self) -> Array:
        """An interior point of every cell, (M, n): one linear program each."""
        return np.array([_chebyshev(*self.constraints(i), n=self.dense.n)[1] for i in range(len(self))])


def enumerate(net: Net | nn.Module, box: tuple[float, float] | None = None, limit: int = 1_000_000) -> Cells:
    r"""Every full-dimensional activation cell of a small ReLU network, at any depth.

    Parameters
    ----------
    net : Net or nn.Module
        Affine layers and ReLU; no max pooling.
    box : (float, float), optional
        Only the cells that meet the inside of the box :math:`[low, high]^n`, cut to it.
    limit : int
        How many cells, and how many vertices of the first layer, are at most tried.

    Returns
    -------
    Cells
        One hidden layer of m units in general position on :math:`\mathbb R^n` has
        :math:`\sum_{i\le n}\binom mi` of them.

    Raises
    ------
    NotPiecewiseAffine
        The layer named is neither affine nor ReLU.
    TooManyCells
        The network is too large; the message says how large, and what to use instead.
    ValueError
        The box is empty.

    Examples
    --------
    >>> len(enumerate(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))))
    11
    """
    net = from_module(net)
    net.require("affine", "sum", "activation", why="enumeration of cells")
    whole("limit", limit)
    box = interval("box", box)
    _check_size(net.dense, limit)
    unit = _in_unit_box(net.dense, box) if box else _in_own_unit(net.dense)
    return Cells(net.dense, _walk(unit, *_box_rows(box and (-1.0, 1.0), net.n), limit), box)


def at(net: Net | nn.Module, x: Array, tolerance: float = 1e-9) -> Cells:
    r"""The cells whose closure holds the point x: the masks :math:`\mathcal D_x` of Definition 3.1.

    There is one unless x lies on the border of its cell, that is, a pre-activation is 0 there.

    Parameters
    ----------
    net : Net or nn.Module
        As for `enumerate`, of any width.
    x : array (n,)
    tolerance : float
        A unit counts as switching at x if x is nearer than this to its hyperplane (in the 2-norm).

    Examples
    --------
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> len(at(nn.Sequential(layer, nn.ReLU()), np.zeros(1))), len(at(nn.Sequential(layer, nn.ReLU()), np.ones(1)))
    (2, 1)
    """
    net = from_module(net)
    net.require("affine", "sum", "activation", why="enumeration of cells")
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    if len(x) != net.n or not np.isfinite(x).all():
        raise ValueError(f"x={x}: {net.n} finite numbers are accepted")
    return Cells(net.dense, _walk(net.dense, *_box_rows(None, net.n), 1_000_000, (x, tolerance)))


def few(net: Net | nn.Module, box: tuple[float, float] | None = None, limit: int = 20_000) -> Cells | None:
    """The cells, or None where they are more than `limit`, or a layer keeps them from being listed.

    Examples
    --------
    >>> few(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))) is None
    True
    """
    try:
        return enumerate(net, box, limit)
    except (TooLarge, NotPiecewiseAffine):
        return None


def _check_size(dense: Dense, limit: int) -> None:
    n, m = dense.n, int(dense.weights[0][0].any(1).sum()) if dense.units else 0
    # through one point, half of the cells of m - 1 hyperplanes in a space of one dimension less
    central = m > 0 and not any(b.any() for b in dense.bias)
    count = sum(math.comb(m - central, i) for i in range(min(n - central, m) + 1)) * (2 if central else 1)
    if count > limit:
        raise TooManyCells(
            f"the first layer has {m} units in {n} dimensions, in general position {count:.3g} cells; up to "
            f"limit={limit} are enumerated: use method='milp' or method='bounds', or raise the limit"
        )


def _box_rows(box: tuple[float, float] | None, n: int) -> tuple[Array, Array]:
    if box is None:
        return np.zeros((0, n)), np.zeros(0)
    return np.concatenate([np.eye(n), -np.eye(n)]), np.repeat([box[1], -box[0]], n)


def _in_unit_box(dense: Dense, box: tuple[float, float]) -> Dense:
    """The network as a function of the position in the box, which is [-1, 1]^n in these coordinates."""
    centre, half = box[0] / 2 + box[1] / 2, box[1] / 2 - box[0] / 2
    weights = tuple((W[0] * half, *W[1:]) for W in dense.weights)
    bias = tuple(b + centre * W[0].sum(1) for W, b in zip(dense.weights, dense.bias, strict=True))
    return Dense(weights, bias, dense.activations)


def _in_own_unit(dense: Dense) -> Dense:
    """The network with inputs in units of the typical distance of a hyperplane of its first layer from 0."""
    W, b = dense.weights[0][0], dense.bias[0]
    length = np.abs(W).max(1, initial=0)
    away = (length > 0) & (b != 0)
    if not away.any():
        return dense
    unit = 2.0 ** np.round(np.median(np.log2(np.abs(b[away])) - np.log2(length[away])))
    return Dense(tuple((W[0] * unit, *W[1:]) for W in dense.weights), dense.bias, dense.activations)


def _walk(dense: Dense, G: Array, g: Array, limit: int, near: tuple[Array, float] | None = None) -> Mask:
    """The masks of the cells inside {G x <= g}, layer by layer; with `near`, of those around one point."""
    masks, inside, tried = np.zeros((1, 0), bool), [(G, g)], 0
    for h in range(len(dense.units)):
        A, b = _layer(dense, h, masks)
        if near is not None:
            A, b = _around(A, b, *near)
        last = h + 1 == len(dense.units)
        found, regions, count = [], [], 0
        for mask, (G, g), normals, offsets in zip(masks, inside, A, b, strict=True):
            tried += math.comb(len(g) + int(normals.any(1).sum()), min(dense.n, len(g) + len(offsets)))
            if tried > _TRIES * limit:
                raise TooManyCells(_too_many(limit))
            signs, facets = _signs(G, g, normals, offsets, limit, not last)
            found.append(np.concatenate([np.repeat(mask[None], len(signs), 0), signs], axis=1))
            for side, facet in zip(np.where(signs, -1.0, 1.0), facets, strict=last is False):
                rows = np.concatenate([G, (side[:, None] * normals)[facet]])
                regions.append((rows, np.concatenate([g, (-side * offsets)[facet]])))
            count += len(signs)
            if count > limit:
                raise TooManyCells(_too_many(limit))
        masks, inside = np.concatenate(found), regions
    return masks


def _layer(dense: Dense, h: int, masks: Mask) -> tuple[Array, Array]:
    """`Dense.layer`, with a row of zeros for each unit whose row is what rounding left of larger terms."""
    before = dense.split(masks)[:h]
    A, b = dense.layer(h, before)
    if h:
        weights = tuple(tuple(np.abs(W) for W in row) for row in dense.weights)
        terms = Dense(weights, dense.bias, dense.activations).layer(h, before)[0].max(2)
        A = np.where((np.abs(A).max(2) > _ROUNDING * terms)[:, :, None], A, 0)
    return A, b


def _around(A: Array, b: Array, x: Array, tolerance: float) -> tuple[Array, Array]:
    """Hyperplanes as seen from close to x: those through x pass through 0, the others have a constant side."""
    value = A @ x + b
    through = np.abs(value) <= tolerance * np.linalg.norm(A, axis=-1)
    return np.where(through[..., None], A, 0), np.where(through, 0, value)


def _too_many(limit: int) -> str:
    return f"more than limit={limit} cells: use method='milp' or method='bounds', or raise the limit"


def _signs(G: Array, g: Array, A: Array, b: Array, limit: int, with_facets: bool) -> tuple[Mask, Mask]:
    """How the hyperplanes A x + b = 0 cut {G x <= g}.

    Returns the sides (k, m) of them that the full-dimensional cells take and, if asked for, which of them border each
    cell (k, m); of several units with the same hyperplane one counts.
    """
    rows = np.column_stack([np.concatenate([-G, A]), np.concatenate([g, b])])
    size = np.abs(rows[:, :-1]).max(1, initial=0)
    cuts = size > 0
    rows[cuts] /= size[cuts, None]
    planes, group, flipped = _merge(rows[cuts] / np.linalg.norm(rows[cuts, :-1], axis=1, keepdims=True))
    # in coordinates of the space that the normals span; along the other directions every cell goes on for ever
    _, size, basis = np.linalg.svd(planes[:, :-1], full_matrices=False)
    planes = np.column_stack([planes[:, :-1] @ basis[size > _ROUNDING * size.max(initial=0)].T, planes[:, -1]])
    required = np.zeros(len(planes), int)
    required[group[: len(G)]] = np.where(flipped[: len(G)], -1, 1)
    merged = _by_vertices(planes, required, limit)
    if merged is None or not len(merged):
        merged = _by_programs(planes, required, limit)
    signs = np.repeat((rows[:, -1] > 0)[None], len(merged), 0)
    signs[:, cuts] = merged[:, group] ^ flipped
    if not with_facets:
        return signs[:, len(G) :], np.zeros((0, len(A)), bool)
    facets = np.zeros(signs.shape, bool)
    _, first = np.unique(group, return_index=True)
    facets[:, np.flatnonzero(cuts)[first]] = _borders(merged) & (required == 0)
    return signs[:, len(G) :], facets[:, len(G) :]


def _borders(cells: Mask) -> Mask:
    """Which hyperplanes (k, q) border each cell: those across which there is another cell."""
    single = _pack(np.eye(cells.shape[1], dtype=bool))
    words = np.ascontiguousarray(_pack(cells))
    as_one = np.dtype((np.void, words.shape[1] * 8))
    across = [np.isin((words ^ plane).view(as_one)[:, 0], words.view(as_one)[:, 0]) for plane in single]
    return np.stack(across, axis=1) if len(single) else np.zeros(cells.shape, bool)


def _merge(planes: Array) -> tuple[Array, NDArray[np.intp], Mask]:
    """Distinct hyperplanes, which of them each row is, and whether with its sides exchanged."""
    large = np.abs(planes[:, :-1]) > 1e-7
    leading = planes[np.arange(len(planes)), large.argmax(1)] if len(planes) else np.zeros(0)
    flipped = leading < 0
    oriented = np.where(flipped[:, None], -planes, planes)
    close = np.abs(oriented[:, None] - oriented[None]) <= _ROUNDING * (1 + np.abs(oriented[:, None, -1:]))
    if not len(planes):
        return planes, np.zeros(0, np.intp), flipped
    kept, group = np.unique(close.all(2).argmax(1), return_inverse=True)
    return oriented[kept], group, flipped


def _by_vertices(planes: Array, required: NDArray[np.int_], limit: int) -> Mask | None:
    """The cells (k, q) of a simple arrangement, from its vertices; None if it is not simple.

    If all hyperplanes pass through the origin, the cells are cones, and their extreme rays serve as vertices.
    ``required`` asks for a side (+1 or -1) of some hyperplanes; 0 leaves both.
    """
    q, d = planes.shape[0], planes.shape[1] - 1
    central = not planes[:, -1].any()
    if d == 0:
        return np.ones((1, q), bool)
    if math.comb(q, d - central) > 32 * limit:
        return None
    wanted, asked = _pack((required > 0)[None])[0], _pack((required != 0)[None])[0]
    single = _pack(np.eye(q, dtype=bool))  # the word of each hyperplane alone
    combinations = itertools.combinations(range(q), d - central)
    found = np.empty((0, len(wanted)), np.uint64)
    while chunk := list(itertools.islice(combinations, _CHUNK)):
        through = np.array(chunk, dtype=np.intp).reshape(len(chunk), d - central)
        through, value, tolerance = (_rays if central else _vertices)(planes, through)
        inside = ~(value * required < -tolerance).any(1)
        np.put_along_axis(value, through, np.inf, axis=1)
        if (np.abs(value[inside]) <= tolerance[inside]).any():
            return None
        words = _pack(value > 0)
        words, through = words[inside], through[inside]
        around = []
        for sides in itertools.product((False, True), repeat=d - central):
            # the hyperplanes through the vertex are on in `words`: turn off those on whose other side we are
            turned = words.copy()
            for side, plane in zip(sides, through.T, strict=True):
                if not side:
                    turned &= ~single[plane]
            around.append(turned[~((turned ^ wanted) & asked).any(1)])
        found = _unique(found, *around)
        if len(found) > limit:
            raise TooManyCells(_too_many(limit))
    return np.unpackbits(found.view(np.uint8), axis=1, count=q, bitorder="little").astype(bool)


def _vertices(planes: Array, through: NDArray[np.intp]) -> tuple[NDArray[np.intp], Array, Array]:
    """Where d hyperplanes meet: which they are, every hyperplane's value there, and how exact these are (., 1)."""
    through = through[np.linalg.det(planes[through, :-1]) != 0]
    inverse = np.linalg.inv(planes[through, :-1])
    condition = np.abs(inverse).sum((1, 2))
    independent = condition < 1 / _DEPENDENT
    through, inverse, condition = through[independent], inverse[independent], condition[independent]
    vertex = -(inverse @ planes[through, -1:])[:, :, 0]
    error = _EXACT * condition * (1 + np.abs(vertex).max(1, initial=0))
    return through, vertex @ planes[:, :-1].T + planes[:, -1], error[:, None]


def _rays(planes: Array, through: NDArray[np.intp]) -> tuple[NDArray[np.intp], Array, Array]:
    """As `_vertices`, for the two unit vectors on which d - 1 hyperplanes through the origin meet."""
    _, size, directions = np.linalg.svd(planes[through, :-1])
    independent = (size > _DEPENDENT).all(1)
    value = directions[independent, -1] @ planes[:, :-1].T
    error = np.tile(_EXACT / size[independent].min(1, initial=1.0), 2)
    return np.tile(through[independent], (2, 1)), np.concatenate([value, -value]), error[:, None]


def _pack(bits: Mask) -> NDArray[np.uint64]:
    """Rows of bits as rows of 64-bit words."""
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def _unique(*words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    together = np.concatenate(words)
    if together.shape[1] == 1:
        return np.unique(together[:, 0])[:, None]
    return np.unique(together, axis=0)


def _by_programs(planes: Array, required: NDArray[np.int_], limit: int) -> Mask:
    """As `_by_vertices` for any arrangement: hyperplanes are added one by one, those with a required side first."""
    order = np.argsort(required == 0, kind="stable")
    cells = [np.zeros(0, int)]
    for i, plane in builtins.enumerate(order):
        added = planes[order[: i + 1]]
        cells = [
            sides
            for cell in cells
            for side in ((required[plane],) if required[plane] else (-1, 1))
            for sides in [np.append(cell, side)]
            if _chebyshev(-sides[:, None] * added[:, :-1], sides * added[:, -1])[0] > _EMPTY
        ]
        if len(cells) * (i + 1) > limit:
            raise TooManyCells(_too_many(limit))
    signs = np.zeros((len(cells), len(planes)), bool)
    signs[:, order] = np.array(cells).reshape(len(cells), -1) > 0
    return signs


def _chebyshev(A: Array, b: Array, n: int | None = None) -> tuple[float, Array]:
    """The radius, at most 1, and the centre of a largest ball in {A x <= b}; a negative radius if it is empty.

    The solver's tolerance is absolute. So a small ball is sought again around its centre, in a smaller unit.
    """
    n = A.shape[1] if n is None else n
    centre, unit = np.zeros(n), 1.0
    if not len(A):
        return 1.0, centre
    length = np.linalg.norm(A, axis=1)
    A, b = A / length[:, None], b / length
    while True:
        solved = linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=np.column_stack([A, np.ones(len(A))]),
            b_ub=(b - A @ centre) / unit,
            bounds=[*[(None, None)] * n, (None, 1.0)],
            method="highs",
        )
        if solved.x is None:
            raise RuntimeError(f"the linear program of a cell failed: {solved.message}")
        centre = centre + unit * solved.x[:-1]
        radius = float(min(unit, (b - A @ centre).min()))
        if abs(radius) > 1e-4 * unit or unit < 1e-8:
            return radius, centre
        unit *= 1e-4
