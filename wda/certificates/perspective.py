r"""The worst-case risk as one convex program, by the perspective of each activation cell.

Let the loss of label k on the closure of cell D, :math:`\{x:A_Dx\le b_D\}`, be the largest of affine pieces
:math:`g_p\cdot x+c_p`; for the margin :math:`g=J_D^\top(e_j-e_k)` for each rival j. Split the mass that leaves sample i
by the cell D in which it lands and the piece p that is largest there. A part of mass w and mean displacement v/w adds
exactly :math:`g_p\cdot v+w(g_p\cdot x_i+c_p)` to the risk, and at least :math:`\|v\|_r` to the transport cost. The
other way round, w at the one point :math:`x_i+v/w` of D costs :math:`\|v\|_r` and adds at least that much. So

.. math::
    V(\epsilon)=\max_{v,\,w\ge0}\ \sum_{i,D,p} g_p\cdot v_{iDp}+w_{iDp}(g_p\cdot x_i+c_p)\quad\text{subject to}\quad
    A_Dv_{iDp}\le w_{iDp}(b_D-A_Dx_i),\quad \sum_{D,p}w_{iDp}=\tfrac1N,\quad \sum_{i,D,p}\|v_{iDp}\|_r\le\epsilon .

A block with w = 0 and v not 0 is mass that escapes to infinity along a recession direction of its cell. The program is
linear for r = 1 and infinity and a second-order cone program for r = 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from wda.cells import Cells
from wda.nets import Array
from wda.norms import exponent

__all__ = ["Pieces", "Program", "hinge_pieces", "margin_pieces", "program", "softplus_pieces"]

# The loss of one label as a maximum of affine functions of the logits z, max_p (C z + d)_p: C (P, K) and d (P,).
Pieces = tuple[Array, Array]


def margin_pieces(label: int, classes: int) -> Pieces:
    """The margin of a label: a piece z_j - z_k for each rival j.

    Examples
    --------
    >>> margin_pieces(0, 3)[0].tolist()
    [[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    rivals = [j for j in range(classes) if j != label]
    C = np.eye(classes)[rivals]
    C[:, label] = -1
    return C, np.zeros(len(rivals))


def hinge_pieces(label: int, classes: int) -> Pieces:
    """The margin or 0, whichever is larger; less than the cross-entropy by at most log K.

    Examples
    --------
    >>> hinge_pieces(0, 2)[0].tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    C, d = margin_pieces(label, classes)
    return np.vstack([C, np.zeros(classes)]), np.append(d, 0)


def softplus_pieces(label: int, classes: int, count: int = 16) -> Pieces:
    r"""For K = 2: a piecewise affine function above the cross-entropy :math:`\log(1+e^m)` of the margin m.

    It is linear between `count` points of the graph, constant before the first and of slope 1 after the last. They
    are at :math:`1/(1+e^{-m})=\sin^2\varphi` for equally spaced :math:`\varphi`, which makes all gaps between the two
    functions about equal: half the squared step, 0.005 for 16 points.

    Examples
    --------
    >>> C, d = softplus_pieces(0, 2)
    >>> m = np.linspace(-20, 20, 999)
    >>> gap = (m[:, None] * C[:, 1] + d).max(1) - np.logaddexp(0, m)
    >>> bool(gap.min() >= -1e-15), bool(gap.max() < 0.005)
    (True, True)
    """
    step = np.pi / 2 / (count - 1 + math.sqrt(2))
    m = 2 * np.log(np.tan(step * (math.sqrt(0.5) + np.arange(count))))
    f = np.logaddexp(0, m)
    slope = np.concatenate([[0], np.diff(f) / np.diff(m), [1]])
    sign = np.where(np.arange(classes) == label, -1.0, 1.0)
    return slope[:, None] * sign, np.append(f, f[-1]) - slope * np.append(m, m[-1])


# a block with a smaller share of its sample's mass has it at infinity, up to the solver's rounding
_ESCAPES = 1e-8


@dataclass(frozen=True, eq=False)
class Program:
    """The data of the program; one block (v, w) for each sample, piece and cell, in this order.

    Attributes
    ----------
    x : float64 array (N, n)
    gradient : float64 array (N, P, M, n)
        Of each piece on each cell.
    level : float64 array (N, P, M)
        The value of each piece at the sample, continued affinely from the cell.
    A : float64 array (R, n)
        The constraints of all cells after each other, of unit normals.
    b : float64 array (R,)
    cell : int array (R,)
        The cell of each constraint.

    Examples
    --------
    >>> from torch import nn
    >>> from wda import cells
    >>> found = cells.enumerate(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)))
    >>> value, points = program(found, np.zeros((1, 2)), [margin_pieces(0, 4)]).risk("Linf", 0.1)
    >>> points.shape  # one point for each of 3 rivals and 7 cells
    (1, 21, 2)
    """

    x: Array
    gradient: Array
    level: Array
    A: Array
    b: Array
    cell: NDArray[np.intp]

    def risk(self, norm: str, eps: float) -> tuple[float, Array]:
        """Solve the program.

        Parameters
        ----------
        norm : {"Linf", "L2", "L1"}
        eps : float
            The budget, in units of the input.

        Returns
        -------
        float
            V. The solver's error is about 1e-9 of the larger of V(eps) - V(0) and the unit of the loss (see `units`).
        float64 array (N, C, n)
            Where each block with mass has it; the sample for the other blocks.

        Raises
        ------
        ModuleNotFoundError
            "L2" needs cvxpy.
        RuntimeError
            The solver does not vouch for its solution.

        Examples
        --------
        >>> from torch import nn
        >>> from wda import cells
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
        >>> _ = [nn.init.ones_(p) for p in net.parameters()]  # both logits are the same: the margin is 0
        >>> value, _ = program(cells.enumerate(net), np.zeros((1, 1)), [margin_pieces(0, 2)]).risk("L1", 1.0)
        >>> abs(value) < 1e-9
        True
        """
        count, start, (length, steep) = len(self.x), self._start(), self.units(eps)
        # masses in units of 1/N, so that every sample has mass 1
        budget = count * (eps / length)
        value, v, w = self._solve(norm, self.level - start[:, None, None], budget, length, steep, mass=True)
        carries = (w > _ESCAPES)[:, :, None]
        away = length * (np.where(carries, v, 0) / np.where(carries, w[:, :, None], 1))
        return float(start.mean() + value / count * steep * length), self.x[:, None] + away

    def units(self, eps: float = 0.0) -> tuple[float, float]:
        """The units in which the program is solved, as its solvers have absolute tolerances.

        Returns
        -------
        float
            Of lengths: about N times the budget `eps` or, if that is larger, half of the samples' distances to the
            hyperplanes are below it. A power of two, so that no rounding comes with it.
        float
            Of slopes: about the largest gradient. The loss is in units of the product.

        Examples
        --------
        >>> from wda import cells
        >>> from wda.nets import Dense
        >>> linear = cells.Cells(Dense(((np.array([[0.0], [3.0]]),),), (np.zeros(2),), ()), np.zeros((1, 0), bool))
        >>> program(linear, np.zeros((1, 1)), [margin_pieces(0, 2)]).units(eps=0.25)
        (0.25, 2.0)
        """
        distance = np.abs(self.b - self.x @ self.A.T)
        usual = float(np.median(distance[distance > 0])) if distance.any() else 0.0
        return _power(max(usual, len(self.x) * eps)), _power(float(np.abs(self.gradient).max(initial=0)))

    def _start(self) -> Array:
        """The loss at each sample, (N,): on the cell that it is in, or nearest to the inside of."""
        inside = np.full(self.level.shape[::2], np.inf)
        np.minimum.at(inside.T, self.cell, (self.b - self.x @ self.A.T).T)
        start: Array = self.level[np.arange(len(self.x)), :, inside.argmax(1)].max(1)
        return start

    def slope(self, norm: str, start: Array) -> tuple[float, Array, int]:
        r"""The steepest way up from a sample: the largest :math:`(g\cdot x+c-s_i)/\|x-x_i\|_r`, at least 0.

        Without the constraint on the masses and with a budget of 1 the program is positively homogeneous in each
        block, and its value is the largest ratio. At x = 0 for the recession network and s = 0 it is the recession
        slope.

        Parameters
        ----------
        norm : {"Linf", "L2", "L1"}
        start : float64 array (N,)
            The :math:`s_i`, the loss at each sample.

        Returns
        -------
        float
            The ratio.
        array (n,)
            The direction in which it is had, of unit norm; 0 if the ratio is 0.
        int
            The sample.

        Examples
        --------
        >>> from torch import nn
        >>> from wda import cells
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)).double()
        >>> _ = net[0].weight.data.fill_(1), net[2].weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> at_zero = program(cells.enumerate(net), np.zeros((1, 1)), [margin_pieces(0, 2)])
        >>> slope, direction, _ = at_zero.slope("L1", np.zeros(1))
        >>> round(slope, 9), direction.round(9).tolist()
        (2.0, [1.0])
        """
        level = self.level - start[:, None, None]
        # the budget is one unit of length, whichever it is
        unit, steep = self.units()
        _, v, w = self._solve(norm, level, 1.0, unit, steep, mass=False)
        v *= unit
        length = np.linalg.norm(v, exponent(norm), axis=2)
        gain = (self._blocks(self.gradient) * v).sum(2) + self._blocks(level) * w
        # an optimal program may split its budget over blocks of the same ratio; a tiny block is the solver's rounding
        ratio = np.where(length > 1e-3 * length.max(), gain, 0) / np.where(length > 0, length, 1)
        best = np.unravel_index(ratio.argmax(), ratio.shape)
        if ratio[best] <= 0:
            return 0.0, np.zeros(self.x.shape[1]), 0
        return float(ratio[best]), v[best] / length[best], int(best[0])

    def _blocks(self, values: Array) -> Array:
        """Pieces and cells as one axis: (N, P, M, ...) as (N, P M, ...)."""
        return values.reshape(len(self.x), -1, *values.shape[3:])

    def _solve(
        self, norm: str, level: Array, budget: float, length: float, steep: float, mass: bool
    ) -> tuple[float, Array, Array]:
        """Maximise; the value, v (N, P M, n) and w (N, P M), in units of `length` and `steep`, as the budget is."""
        r, count, blocks, n = exponent(norm), len(self.x), level.size, self.x.shape[1]
        copies = blocks // level.shape[2]
        rows = np.arange(len(self.A))
        once = sparse.csr_array(
            (self.A.ravel(), (np.repeat(rows, n), (self.cell[:, None] * n + np.arange(n)).ravel())),
            shape=(len(rows), level.shape[2] * n),
        )
        of_v = sparse.kron(sparse.eye_array(copies), once, format="csr")
        slack = np.repeat((self.b - self.x @ self.A.T) / length, copies // count, axis=0)  # (copies, R)
        column = np.arange(copies)[:, None] * level.shape[2] + self.cell
        of_w = sparse.csr_array((slack.ravel(), (np.arange(slack.size), column.ravel())), shape=(slack.size, blocks))
        total = sparse.kron(sparse.eye_array(count), np.ones((1, blocks // count)), format="csr") if mass else None
        solve = _cone_program if r == 2 else _linear_program
        gradient, height = (self.gradient / steep).reshape(blocks, n), (level / steep / length).ravel()
        value, v, w = solve(gradient, height, of_v, of_w, total, budget, r)
        return value, v.reshape(count, -1, n), w.reshape(count, -1)


def program(cells: Cells, x: Array, pieces: Sequence[Pieces]) -> Program:
    """Set up the program.

    Parameters
    ----------
    cells : Cells
        All activation cells that meet the box, if there is one.
    x : float64 array (N, n)
    pieces : sequence of Pieces
        The loss of each sample, with its label; each with the same number of pieces.

    Examples
    --------
    >>> from torch import nn
    >>> from wda import cells
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    >>> program(cells.enumerate(net), np.zeros((1, 2)), [margin_pieces(0, 4)]).gradient.shape
    (1, 3, 7, 2)
    """
    J, c = cells.affine()
    C, d = (np.stack(part) for part in zip(*pieces, strict=True))
    gradient = np.einsum("ipk,mkn->ipmn", C, J)
    level = np.einsum("ipmn,in->ipm", gradient, x) + np.einsum("ipk,mk->ipm", C, c) + d[:, :, None]
    halfspaces = [cells.constraints(m) for m in range(len(cells))]
    A = np.concatenate([A for A, _ in halfspaces])
    b = np.concatenate([b for _, b in halfspaces])
    cell = np.repeat(np.arange(len(cells)), [len(b) for _, b in halfspaces])
    length = np.linalg.norm(A, axis=1)
    return Program(x, gradient, level, A / length[:, None], b / length, cell)


def _power(size: float) -> float:
    """The power of two next below a size; 1 for 0."""
    return math.ldexp(0.5, math.frexp(size)[1]) if size > 0 else 1.0


_Solved = tuple[float, Array, Array]


def _linear_program(
    gradient: Array, level: Array, of_v: sparse.csr_array, of_w: sparse.csr_array, total: sparse.csr_array | None,
    budget: float, r: float,
) -> _Solved:  # fmt: skip
    """r = 1 or infinity: t bounds the entries of v one by one, or those of a block together."""
    blocks, n = gradient.shape
    v, w = blocks * n, blocks
    bound = sparse.eye_array(v) if r == 1 else sparse.kron(sparse.eye_array(blocks), np.ones((n, 1)))
    t = bound.shape[1]
    A_ub = sparse.block_array(
        [
            [of_v, -of_w, None],
            [sparse.eye_array(v), None, -bound],
            [-sparse.eye_array(v), None, -bound],
            [None, None, np.ones((1, t))],
        ],
        format="csr",
    )
    solved = linprog(
        -np.concatenate([gradient.ravel(), level, np.zeros(t)]),
        A_ub=A_ub,
        b_ub=np.append(np.zeros(A_ub.shape[0] - 1), budget),
        A_eq=None if total is None else sparse.hstack(
            [sparse.csr_array((total.shape[0], v)), total, sparse.csr_array((total.shape[0], t))]
        ),
        b_eq=None if total is None else np.ones(total.shape[0]),
        bounds=[*[(None, None)] * v, *[(0, None)] * (w + t)],
        method="highs",
    )  # fmt: skip
    if solved.status != 0:
        raise RuntimeError(f"the linear program of the worst-case risk failed: {solved.message}")
    return -float(solved.fun), solved.x[:v], solved.x[v : v + w]


def _cone_program(
    gradient: Array, level: Array, of_v: sparse.csr_array, of_w: sparse.csr_array, total: sparse.csr_array | None,
    budget: float, r: float,
) -> _Solved:  # fmt: skip
    try:
        import cvxpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "norm='L2' in more than one dimension needs a solver of cone programs: pip install 'wda[certificates]'"
        ) from error
    v, w = cvxpy.Variable(gradient.shape), cvxpy.Variable(len(level), nonneg=True)
    constraints = [
        of_v @ cvxpy.vec(v, order="C") <= of_w @ w,
        cvxpy.sum(cvxpy.norm(v, r, axis=1)) <= budget,
    ]
    if total is not None:
        constraints.append(total @ w == 1)
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.multiply(gradient, v)) + level @ w), constraints)
    try:
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    except cvxpy.SolverError as error:
        raise RuntimeError(f"the cone program of the worst-case risk failed: {error}") from error
    if problem.status != cvxpy.OPTIMAL:
        raise RuntimeError(
            f"the cone program of the worst-case risk failed: its solver says {problem.status!r}; the budget, or a "
            "cell, may be larger than others by too many orders of magnitude"
        )
    return float(problem.value), v.value, w.value
