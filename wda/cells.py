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
from fractions import Fraction
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import nn

from wda.checks import interval, whole
from wda.errors import NotPiecewiseAffine
from wda.nets import Array, Dense, Mask, Net, TooLarge, from_module
from wda.rational import Integers, canonical, inside, integers

__all__ = ["Cell", "Cells", "TooManyCells", "absolute", "at", "enumerate", "few", "has_inside"]

# rows of a unit normal: relative size below which a number is rounding
_ROUNDING = 1e-10
# relative error of a solution of linear equations, per unit of their condition
_EXACT = 1e-13
# a smallest singular value below which hyperplanes meet in no single point
_DEPENDENT = 1e-13
# the distance from 1 to the next number
_ULP = 2.0**-52
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
    >>> cells.gradients([(0, 1)]).shape, np.allclose(cells.jacobians(), J), cells.rounding(0) < 1e-9
    ((7, 1, 2), True, True)
    >>> np.allclose((cells.forms(0)[-1] / cells.scale).astype(float), np.c_[J[0], c[0]])
    True
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

    def gradients(self, pairs: Sequence[tuple[int, int]]) -> Array:
        r"""The gradients of :math:`\theta_j - \theta_k` on each cell, (M, pairs, n), for pairs (k, j).

        Each is right up to 1e-10 of its length, however much of larger terms cancels.
        """
        select = np.zeros((len(pairs), self.dense.classes), int)
        for p, (k, j) in builtins.enumerate(pairs):
            select[p, [k, j]] = -1, 1
        return self._combined(select)

    def jacobians(self) -> Array:
        """The gradients of the logits, (M, K, n), as accurate as `gradients`."""
        return self._combined(np.eye(self.dense.classes, dtype=int))

    def _combined(self, select: NDArray[np.int_]) -> Array:
        """The gradients of sums of logits with integer factors (P, K): (M, P, n)."""
        terms = absolute(self.dense)
        found: Array = select @ self.affine()[0]
        size = np.abs(select) @ terms.affine(self.masks)[0]
        with np.errstate(invalid="ignore"):
            sure = _rounding(terms) * size.max(2, initial=0) <= _ROUNDING * np.abs(found).max(2, initial=0)
        doubtful = np.flatnonzero(~sure.all(1)).tolist() if _ordinary(terms) else range(len(self))
        for i in doubtful:
            rows = select.astype(object) @ self.forms(i)[-1][:, :-1]
            found[i] = [[float(Fraction(value, self.scale)) for value in row] for row in rows]
        return found

    def rounding(self, i: int) -> float:
        """What rounding may have done to a row of `constraints` of cell i, relative to the row."""
        A, terms = self.constraints(i)[0], absolute(self.dense)
        if not len(A) or not _ordinary(terms):
            return 0.0 if not len(A) else math.inf
        size = np.concatenate([A[0] for A, _ in terms.forms(terms.split(self.masks[i][None]))[:-1]])
        own = np.concatenate([A[0] for A, _ in self.dense.forms(self.dense.split(self.masks[i][None]))[:-1]])
        ratio = size.max(1, initial=0)[own.any(1)] / np.abs(own[own.any(1)]).max(1, initial=0)
        return float(_rounding(terms) * ratio.max(initial=1.0))

    def forms(self, i: int) -> list[Integers]:
        """What each layer sees on cell i, exactly: rows of integers [A, b], which have one positive factor a layer."""
        return self._exact.forms(self.masks[i], len(self.dense.units))

    @property
    def scale(self) -> int:
        """By how much the rows of the logits in `forms` are larger than the network's."""
        return self._exact.factor(len(self.dense.units))

    @cached_property
    def _exact(self) -> _Exact:
        return _Exact(self.dense, self.box)

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
    exact, terms = _Exact(net.dense, box), absolute(net.dense)
    if box:
        unit = _in_unit_box(net.dense, *_centred(box))
        terms = _in_unit_box(terms, *np.abs(_centred(box)))
    else:
        unit, terms = (_in_unit_box(dense, 0.0, _own_unit(net.dense)) for dense in (net.dense, terms))
    return Cells(net.dense, _walk(exact, unit, terms, box and (-1.0, 1.0), limit), box)


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
    exact, terms = _Exact(net.dense, None), absolute(net.dense)
    return Cells(net.dense, _walk(exact, net.dense, terms, None, 1_000_000, (x, tolerance)))


def has_inside(dense: Dense, mask: Mask, box: tuple[float, float] | None = None) -> bool:
    """Whether a mask is one of those that `enumerate` lists, decided in exact arithmetic.

    Examples
    --------
    >>> both = np.array([[1.0], [-1.0]]), np.zeros(2)
    >>> dense = Dense(((both[0],), (np.zeros((1, 1)), np.ones((1, 2)))), (both[1], np.zeros(1)), ("relu",))
    >>> has_inside(dense, np.array([True, True])), has_inside(dense, np.array([True, False]))
    (False, True)
    """
    exact = _Exact(dense, box)
    units = np.arange(len(mask))
    forms = exact.forms(mask, len(dense.units))[:-1]
    rows = np.concatenate([np.zeros((0, dense.n + 1), object), *forms])
    depends = (rows[:, :-1] != 0).any(1)
    if ((rows[:, -1] > 0) != mask)[~depends].any():
        return False
    region, _ = exact.region(mask, len(dense.units), units[depends])
    return inside(region) is not None


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


def _centred(box: tuple[float, float]) -> tuple[float, float]:
    """The centre of a box, and half its side."""
    return box[0] / 2 + box[1] / 2, box[1] / 2 - box[0] / 2


def absolute(dense: Dense) -> Dense:
    """The network with the absolute values of its weights and biases: what its values are added up from.

    Examples
    --------
    >>> absolute(Dense(((-np.ones((1, 1)),),), (-np.ones(1),), ())).bias
    (array([1.]),)
    """
    weights = tuple(tuple(np.abs(W) for W in row) for row in dense.weights)
    return Dense(weights, tuple(np.abs(b) for b in dense.bias), dense.activations)


def _in_unit_box(dense: Dense, centre: float, half: float) -> Dense:
    """The network as a function of the position in a box, which is [-1, 1]^n in these coordinates."""
    weights = tuple((W[0] * half, *W[1:]) for W in dense.weights)
    bias = tuple(b + centre * W[0].sum(1) for W, b in zip(dense.weights, dense.bias, strict=True))
    return Dense(weights, bias, dense.activations)


def _own_unit(dense: Dense) -> float:
    """The typical distance of a hyperplane of the first layer from 0, as a power of two."""
    W, b = dense.weights[0][0], dense.bias[0]
    length = np.abs(W).max(1, initial=0)
    away = (length > 0) & (b != 0)
    if not away.any():
        return 1.0
    return float(2.0 ** np.round(np.median(np.log2(np.abs(b[away])) - np.log2(length[away]))))


@dataclass(frozen=True, eq=False)
class _Region:
    """A polyhedron {A x + b >= 0}: rows [A, b] in the unit of the arrangement, what rounding may have done, and whose.

    ``units`` says which hidden unit each row is; the rows of the box come first and have none.
    """

    rows: Array
    noise: Array
    units: NDArray[np.intp]


def _walk(
    exact: _Exact,
    dense: Dense,
    terms: Dense,
    box: tuple[float, float] | None,
    limit: int,
    near: tuple[Array, float] | None = None,
) -> Mask:
    """The masks of the cells, layer by layer; with `near`, of those around one point.

    ``dense`` is the network in the unit of the arrangement, ``terms`` what its entries were added up from in absolute
    value, ``exact`` the network as it was given.
    """
    G, g = _box_rows(box, dense.n)
    faces = _Region(np.column_stack([-G, g]), np.zeros((len(G), 2)), np.empty(0, np.intp))
    masks, regions, tried, starts = np.zeros((1, 0), bool), [faces], 0, np.cumsum((0, *dense.units))
    for h in range(len(dense.units)):
        rows, noise = _layer(dense, terms, h, masks)
        last = h + 1 == len(dense.units)
        found, inside, count = [], [], 0
        for mask, region, own, doubt in zip(masks, regions, rows, noise, strict=True):
            if near is not None:
                own, doubt = _around(exact, mask, h, own, doubt, *near)
            planes = len(region.rows) + int(own[:, :-1].any(1).sum())
            tried += math.comb(planes, min(dense.n, len(region.rows) + len(own)))
            if tried > _TRIES * limit:
                raise TooManyCells(_too_many(limit))
            cut = _by_vertices(region, own, doubt, limit)
            if cut is None:
                cut = _exactly(*exact.region(mask, h, region.units, own if near else None), limit)
            signs, facets = cut
            found.append(np.concatenate([np.repeat(mask[None], len(signs), 0), signs], axis=1))
            for side, facet in () if last else zip(np.where(signs, 1.0, -1.0), facets, strict=True):
                inside.append(
                    _Region(
                        np.concatenate([region.rows, (side[:, None] * own)[facet]]),
                        np.concatenate([region.noise, doubt[facet]]),
                        np.concatenate([region.units, starts[h] + np.flatnonzero(facet)]),
                    )
                )
            count += len(signs)
            if count > limit:
                raise TooManyCells(_too_many(limit))
        masks, regions = np.concatenate(found), inside
    return masks


def _layer(dense: Dense, terms: Dense, h: int, masks: Mask) -> tuple[Array, Array]:
    """`Dense.layer` as rows [A, b] (M, units, n + 1), and what rounding may have done to A and to b, (M, units, 2)."""
    before = dense.split(masks)[:h]
    A, b = dense.layer(h, before)
    size, offset = terms.layer(h, before)
    noise = _rounding(terms) * np.stack([size.max(2, initial=0), offset], axis=2)
    rows = np.concatenate([A, b[:, :, None]], axis=2)
    return rows, noise if _ordinary(terms) else np.full_like(noise, math.inf)


def _rounding(dense: Dense) -> float:
    """What sums of products of weights may be off by, relative to the sum of their absolute values."""
    return _ULP * (8 + dense.n + sum(dense.units))


def _ordinary(terms: Dense) -> bool:
    """Whether no product along a path is too large or too small for float64."""
    sizes = [np.concatenate([b, *(W.ravel() for W in row)]) for row, b in zip(terms.weights, terms.bias, strict=True)]
    spans = [np.log2(size[size > 0]) for size in sizes if size.any()]
    return bool(max(sum(max(0.0, -span.min()) for span in spans), sum(max(0.0, span.max()) for span in spans)) < 900)


def _around(
    exact: _Exact, mask: Mask, h: int, rows: Array, noise: Array, x: Array, tolerance: float
) -> tuple[Array, Array]:
    """Hyperplanes as seen from close to x: those through x pass through 0, the others have a constant side."""
    A, value = rows[:, :-1], rows @ np.append(x, 1.0)
    doubt = noise @ np.array([np.abs(x).sum(), 1.0]) * 2
    through = np.abs(value) <= tolerance * np.linalg.norm(A, axis=1)
    doubtful = np.abs(value) <= doubt
    if tolerance == 0 and doubtful.any():
        value = np.where(doubtful, exact.signs(mask, h, x), value)
        through = value == 0
    seen = np.column_stack([np.where(through[:, None], A, 0), np.where(through, 0, value)])
    return seen, np.column_stack([np.where(through, noise[:, 0], 0), np.zeros(len(rows))])


def _too_many(limit: int) -> str:
    return f"more than limit={limit} cells: use method='milp' or method='bounds', or raise the limit"


class _Exact:
    """The units of a network as rows of integers [A, b], each up to a positive factor, in the inputs as given."""

    def __init__(self, dense: Dense, box: tuple[float, float] | None) -> None:
        self._units, self._box = dense.units, box
        count = [len(row) for row in dense.weights]
        self._shift, flat = integers(*(W for row in dense.weights for W in row), *dense.bias)
        ends = np.cumsum([0, *count])
        self._weights = [flat[a:b] for a, b in itertools.pairwise(ends)]
        self._bias = flat[ends[-1] :]

    def forms(self, mask: Mask, last: int) -> list[Integers]:
        """What each layer up to `last` sees, (units, n + 1), under a mask of those before; one factor for a layer."""
        on = np.split(mask, np.cumsum(self._units[:last]))[:last]
        forms: list[Integers] = []
        for h in range(last + 1):
            rows = np.column_stack([self._weights[h][0], self._bias[h]]) * 2 ** (self._shift * h)
            for j in range(h):
                W = self._weights[h][j + 1][:, on[j]]
                if W.any():
                    rows = rows + (W @ forms[j][on[j]]) * 2 ** (self._shift * (h - j - 1))
            forms.append(rows)
        return forms

    def factor(self, h: int) -> int:
        """By how much the rows of `forms` in layer `h` are larger than the network's."""
        return 1 << self._shift * (h + 1)

    def signs(self, mask: Mask, h: int, x: Array) -> Array:
        """The signs of what layer `h` sees at x, (units,)."""
        shift, (point,) = integers(x)
        value = self.forms(mask, h)[h] @ np.append(point, 1 << shift)
        signs: Array = np.sign(value).astype(float)
        return signs

    def region(
        self, mask: Mask, h: int, units: NDArray[np.intp], seen: Array | None = None
    ) -> tuple[Integers, Integers]:
        """The half-spaces of the region of a mask, of which `units` are not implied by others, and the rows of layer h.

        Where the rows are `seen` from a point close by, all hyperplanes that matter pass through 0.
        """
        forms = self.forms(mask, h)
        before = np.concatenate([np.zeros((0, forms[0].shape[1]), object), *forms[:h]])[units]
        before, own = before * np.where(mask[units], 1, -1).astype(object)[:, None], forms[h]
        if seen is not None:
            before[:, -1] = 0
            through = (seen[:, :-1] != 0).any(1)
            own = np.where(through[:, None], own, 0)
            own[:, -1] = np.where(through, 0, np.sign(seen[:, -1])).astype(int).astype(object)
        return np.concatenate([self.faces(own.shape[1] - 1), before]), own

    def faces(self, n: int) -> Integers:
        """The rows of the box."""
        if self._box is None:
            return np.zeros((0, n + 1), object)
        shift, (ends,) = integers(np.array(self._box))
        one = np.eye(n, dtype=int).astype(object) << shift
        return np.concatenate(
            [np.column_stack([-one, np.full(n, ends[1])]), np.column_stack([one, np.full(n, -ends[0])])]
        )


def _exactly(region: Integers, rows: Integers, limit: int) -> tuple[Mask, Mask]:
    """How hyperplanes [A, b] cut a region, in exact arithmetic: the sides (k, m) of each cell, and which border it.

    Hyperplanes are added one by one, and linear programs say which cells they cut; of several units with the same
    hyperplane one counts as a border.
    """
    cuts = (rows[:, :-1] != 0).any(1)
    planes: list[Integers] = []
    first: list[int] = []
    keys: dict[tuple[int, ...], int] = {}
    group, flipped = np.zeros(len(rows), np.intp), np.zeros(len(rows), bool)
    for i in np.flatnonzero(cuts).tolist():
        key, flipped[i] = canonical(rows[i])
        group[i] = keys.setdefault(key, len(keys))
        if group[i] == len(planes):
            planes.append(np.array(key, object))
            first.append(i)
    region = np.array([_primitive(row) for row in region], object).reshape(-1, rows.shape[1])
    start = inside(region)
    cells = [] if start is None else [(region, np.zeros(0, bool), start)]
    for count, plane in builtins.enumerate(planes, 1):
        cells = [
            (np.concatenate([walls, (plane if side else -plane)[None]]), np.append(sides, side), point)
            for walls, sides, known in cells
            for side in (False, True)
            for point in [_inside_too(walls, plane if side else -plane, known)]
            if point is not None
        ]
        if len(cells) * count > limit:
            raise TooManyCells(_too_many(limit))
    merged = np.array([sides for _, sides, _ in cells], bool).reshape(len(cells), len(planes))
    signs = np.repeat((rows[:, -1] > 0).astype(bool)[None], len(merged), 0)
    signs[:, cuts] = merged[:, group[cuts]] ^ flipped[cuts]
    facets = np.zeros(signs.shape, bool)
    facets[:, first] = _borders(merged)
    return signs, facets


def _primitive(row: Integers) -> Integers:
    """The smallest integers with the same ratios and signs."""
    return row // (int(np.gcd.reduce(row)) or 1)


def _inside_too(walls: Integers, wall: Integers, known: Integers) -> Integers | None:
    """A point on the inner side of one more wall: the known one, or another, or None."""
    return known if wall @ known > 0 else inside(np.concatenate([walls, wall[None]]))


def _borders(cells: Mask) -> Mask:
    """Which hyperplanes (k, q) border each cell: those across which there is another cell."""
    single = _pack(np.eye(cells.shape[1], dtype=bool))
    words = np.ascontiguousarray(_pack(cells))
    as_one = np.dtype((np.void, words.shape[1] * 8))
    across = [np.isin((words ^ plane).view(as_one)[:, 0], words.view(as_one)[:, 0]) for plane in single]
    return np.stack(across, axis=1) if len(single) else np.zeros(cells.shape, bool)


def _by_vertices(region: _Region, own: Array, doubt: Array, limit: int) -> tuple[Mask, Mask] | None:
    """How hyperplanes cut a region, from the vertices of a simple arrangement; None if rounding leaves anything open.

    Returns the sides (k, m) that the full-dimensional cells take, and which hyperplanes border each cell (k, m). If all
    hyperplanes pass through the origin, the cells are cones, and their extreme rays serve as vertices.
    """
    cuts = own[:, :-1].any(1)
    # a unit that does not depend on x, and one of which this is not known
    if (doubt[cuts, 0] > _ROUNDING * np.abs(own[cuts, :-1]).max(1)).any():
        return None
    if (np.abs(own[~cuts, -1]) < doubt[~cuts, 1]).any() or doubt[~cuts, 0].any():
        return None
    constant = (own[:, -1] > 0)[None]
    if not cuts.any():
        return constant, np.zeros_like(constant)
    planes, noise = np.concatenate([region.rows, own[cuts]]), np.concatenate([region.noise, doubt[cuts]])
    largest = np.abs(planes[:, :-1]).max(1, keepdims=True)
    planes, noise = planes / largest, noise / largest
    length = np.linalg.norm(planes[:, :-1], axis=1, keepdims=True)
    planes, noise = planes / length, (noise / length).max(0)
    if not np.isfinite(planes).all() or _close(planes):
        return None
    # in coordinates of the space that the normals span; along the other directions every cell goes on for ever
    _, size, basis = np.linalg.svd(planes[:, :-1], full_matrices=False)
    if (size <= _ROUNDING * size.max()).any():
        return None
    planes = np.column_stack([planes[:, :-1] @ basis.T, planes[:, -1]])
    (q, columns), faces = planes.shape, len(region.rows) - len(region.units)
    d, central = columns - 1, not planes[:, -1].any()
    if math.comb(q, d - central) > 32 * limit or (central and noise[1]):
        return None
    required = np.arange(q) < len(region.rows)
    asked = _pack(required[None])[0]
    single = _pack(np.eye(q, dtype=bool))  # the word of each hyperplane alone
    combinations = itertools.combinations(range(q), d - central)
    found = np.empty((0, len(asked)), np.uint64)
    while chunk := list(itertools.islice(combinations, _CHUNK)):
        through = np.array(chunk, dtype=np.intp).reshape(len(chunk), d - central)
        if faces:  # those opposite to each other never meet
            half = faces // 2
            opposite = (through[:, :, None] + half == through[:, None]) & (through[:, None] < faces)
            through = through[~opposite.any((1, 2))]
        solved = (_rays if central else _vertices)(planes, through, noise)
        if solved is None:
            return None
        through, value, tolerance = solved
        kept = ~(value[:, required] < -tolerance).any(1)
        np.put_along_axis(value, through, np.inf, axis=1)
        if (np.abs(value[kept]) <= tolerance[kept]).any():
            return None
        words, through = _pack(value > 0)[kept], through[kept]
        around = []
        for sides in itertools.product((False, True), repeat=d - central):
            # the hyperplanes through the vertex are on in `words`: turn off those on whose other side we are
            turned = words.copy()
            for side, plane in zip(sides, through.T, strict=True):
                if not side:
                    turned &= ~single[plane]
            around.append(turned[~((turned ^ asked) & asked).any(1)])
        found = _unique(found, *around)
        if len(found) > limit:
            raise TooManyCells(_too_many(limit))
    if not len(found):
        return None
    merged = np.unpackbits(found.view(np.uint8), axis=1, count=q, bitorder="little").astype(bool)
    signs = np.repeat(constant, len(merged), 0)
    signs[:, cuts] = merged[:, len(region.rows) :]
    facets = np.zeros(signs.shape, bool)
    facets[:, cuts] = _borders(merged)[:, len(region.rows) :]
    return signs, facets


def _close(planes: Array) -> bool:
    """Whether two hyperplanes are the same up to rounding."""
    size = 1 + np.abs(planes[:, None, -1:])
    apart = np.minimum(np.abs(planes[:, None] - planes), np.abs(planes[:, None] + planes)) > _ROUNDING * size
    return bool((~apart.any(2) & ~np.eye(len(planes), dtype=bool)).any())


_Meeting = tuple[NDArray[np.intp], Array, Array]


def _vertices(planes: Array, through: NDArray[np.intp], noise: Array) -> _Meeting | None:
    """Where d hyperplanes meet: which they are, every hyperplane's value there, and how exact these are (., 1).

    None if it is open whether some of them meet in one point.
    """
    normals = planes[through, :-1]
    if (np.linalg.det(normals) == 0).any():
        return None
    inverse = np.linalg.inv(normals)
    condition = np.abs(inverse).sum((1, 2))
    if not (condition < 1 / _DEPENDENT).all():
        return None
    vertex = -(inverse @ planes[through, -1:])[:, :, 0]
    error = condition * ((_EXACT + noise[0]) * (1 + np.abs(vertex).sum(1)) + noise[1])
    return through, vertex @ planes[:, :-1].T + planes[:, -1], 2 * error[:, None]


def _rays(planes: Array, through: NDArray[np.intp], noise: Array) -> _Meeting | None:
    """As `_vertices`, for the two unit vectors on which d - 1 hyperplanes through the origin meet."""
    _, size, directions = np.linalg.svd(planes[through, :-1])
    if not (size > _DEPENDENT).all():
        return None
    value = directions[:, -1] @ planes[:, :-1].T
    error = np.tile((_EXACT + noise[0]) / size.min(1, initial=1.0), 2)
    return np.tile(through, (2, 1)), np.concatenate([value, -value]), 2 * error[:, None]


def _pack(bits: Mask) -> NDArray[np.uint64]:
    """Rows of bits as rows of 64-bit words."""
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def _unique(*words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    together = np.concatenate(words)
    if together.shape[1] == 1:
        return np.unique(together[:, 0])[:, None]
    return np.unique(together, axis=0)


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
