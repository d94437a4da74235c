"""The distance to the nearest error: that of the cells, with a witness, and bounded when time is short."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import wda
from wda import cells
from wda.certificates.nearest import Nearest, nearest
from wda.errors import NotPiecewiseAffine
from wda.losses import margin
from wda.nets import Net, from_module
from wda.norms import norm as length

each_norm = pytest.mark.parametrize("norm", ["Linf", "L1"])
each_box = pytest.mark.parametrize("box", [(0.0, 1.0), None], ids=str)


def network(sizes: tuple[int, ...], seed: int) -> Net:
    """A chain of linear layers and ReLU whose units bend within the unit cube, and whose label changes there."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after).double().requires_grad_(False), nn.ReLU()]
        layers[-2].weight.normal_(std=2 / math.sqrt(before))
        layers[-2].bias.normal_(std=0.5).sub_(layers[-2].weight.sum(1) / 2)
    return from_module(nn.Sequential(*layers[:-1]))


def samples(net: Net, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of the unit cube with the net's own labels."""
    x = torch.rand(count, *net.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, net(x).argmax(1)


def in_cells(net: Net, x: np.ndarray, label: int, norm: str, box: tuple[float, float] | None) -> float:
    """The distance of the nearest error: a linear program for each cell and rival."""
    best, n = math.inf, net.n
    # variables: the point, and the length of each coordinate's move, all equal for "Linf"
    moves = 1 if norm == "Linf" else n
    eye, spread = np.eye(n), np.ones((n, 1)) if norm == "Linf" else np.eye(n)
    for cell in cells.enumerate(net, box):
        A, b = cell.halfspaces
        for rival in range(net.classes):
            if rival == label:
                continue
            g, c = cell.jacobian[rival] - cell.jacobian[label], cell.offset[rival] - cell.offset[label]
            solved = linprog(
                np.r_[np.zeros(n), np.ones(moves)],
                A_ub=np.r_[
                    np.c_[A, np.zeros((len(A), moves))],
                    np.c_[eye, -spread],
                    np.c_[-eye, -spread],
                    np.r_[-g, np.zeros(moves)][None],
                ],
                b_ub=np.r_[b, x, -x, c],
                bounds=[(None, None)] * n + [(0, None)] * moves,
            )
            if solved.status == 0:
                best = min(best, solved.fun)
    return best


def check_witnesses(net: Net, x: Tensor, y: Tensor, norm: str, box: tuple[float, float] | None, found: Nearest) -> None:
    """Each is an error in the box at the distance claimed, or the sample itself."""
    known = found.upper.isfinite()
    assert (found.lower <= found.upper).all()
    assert torch.equal(found.x_adv[~known], x[~known])
    assert (margin(net(found.x_adv[known]), y[known]) >= 0).all()
    torch.testing.assert_close(length(found.x_adv - x, norm)[known], found.upper[known], rtol=1e-14, atol=0)
    if box is not None:
        assert float(found.x_adv.min()) >= box[0]
        assert float(found.x_adv.max()) <= box[1]


def alone(value: list[list[float]], bias: list[float]) -> nn.Linear:
    """One linear layer."""
    layer = nn.Linear(len(value[0]), len(value)).double().requires_grad_(False)
    layer.weight.copy_(torch.tensor(value))
    layer.bias.copy_(torch.tensor(bias))
    return layer


def one(*rows: float) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)


# -- the exact distance ----------------------------------------------------------------------------------------------


@each_norm
@each_box
@pytest.mark.parametrize(
    ("seed", "sizes"),
    enumerate([(3, 5, 4), (4, 5, 2), (3, 4, 2), (2, 5, 4, 3), (3, 4, 3, 4), (2, 4, 3, 3, 2)]),
    ids=str,
)
def test_the_distance_is_that_of_the_nearest_cell(
    norm: str, box: tuple[float, float] | None, seed: int, sizes: tuple[int, ...]
) -> None:
    net = network(sizes, seed)
    x, y = samples(net, 1, seed)
    found = nearest(net, x, y, norm, box)
    exact = in_cells(net, x[0].numpy(), int(y), norm, box)
    check_witnesses(net, x, y, norm, box, found)
    assert found.exact.all()
    if math.isinf(exact):
        if box is None:
            assert float(found.lower) >= 1e6
        assert math.isinf(found.upper)
        assert box is None or math.isinf(found.lower)
    else:
        assert float(found.lower) <= exact
        assert float(found.lower) == pytest.approx(exact, rel=1e-5)
        assert float(found.upper) == pytest.approx(exact, rel=1e-6)


@each_norm
def test_affine_models(norm: str) -> None:
    """Without a box the distance to a half-space is the gap over the dual norm of its normal."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    x = torch.rand(8, 6, dtype=torch.float64)
    z = layer(x).detach()
    y = z.argmax(1)
    found = nearest(layer, x, y, norm)
    for i, label in enumerate(y.tolist()):
        slopes = torch.linalg.vector_norm(
            (layer.weight - layer.weight[label]).detach(), 1 if norm == "Linf" else math.inf, dim=1
        )
        distances = [float((z[i, label] - z[i, j]) / slopes[j]) for j in range(4) if j != label]
        assert float(found.upper[i]) == pytest.approx(min(distances), rel=1e-7)
        assert float(found.lower[i]) == pytest.approx(min(distances), rel=1e-5)
    assert (found.lower <= found.upper).all()


@each_norm
def test_convolutions_sums_and_batch_norm(norm: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
            self.c = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(x - 0.5 + torch.relu(self.b(self.a(x)))).flatten(1))

    torch.manual_seed(3)
    model = Residual()
    nn.init.normal_(model.a.weight)
    nn.init.normal_(model.c.weight)
    model.b.running_mean.fill_(0.2)
    x = torch.rand(1, 1, 2, 2)
    y = model.eval()(x).argmax(1)
    found = nearest(model, x, y, norm, (0.0, 1.0))
    net = from_module(model, (1, 2, 2))
    check_witnesses(net, x.double(), y, norm, (0.0, 1.0), found)
    exact = in_cells(net, x[0].double().flatten().numpy(), int(y), norm, (0.0, 1.0))
    assert float(found.upper) == pytest.approx(exact, rel=1e-6)
    assert float(found.lower) <= exact
    assert found.exact.all()


@each_norm
@pytest.mark.parametrize(("weight", "unit"), [(1e-5, 1.0), (1e5, 1.0), (1.0, 255.0), (1.0, 1e-3)])
def test_distances_have_the_unit_of_the_input(norm: str, weight: float, unit: float) -> None:
    """Logits times a constant change nothing; inputs in another unit have distances in it."""
    torch.manual_seed(1)
    first, last = nn.Linear(3, 6).double(), nn.Linear(6, 3).double()
    x = torch.rand(3, 3, dtype=torch.float64)
    plain = nn.Sequential(first, nn.ReLU(), last).requires_grad_(False)
    y = plain(x).argmax(1)
    before = nearest(plain, x, y, norm, (0.0, 1.0))
    assert before.upper.isfinite().any()
    first.weight /= unit
    last.weight *= weight
    last.bias *= weight
    after = nearest(plain, x * unit, y, norm, (0.0, unit))
    torch.testing.assert_close(after.upper, before.upper * unit, rtol=1e-6, atol=0)
    assert before.exact.all()
    assert after.exact.all()


@each_norm
def test_errors_have_distance_0(norm: str) -> None:
    net = network((3, 6, 3), 0)
    x, y = samples(net, 4, 0)
    wrong = (y + 1) % 3
    tie = alone([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0.0, 0.0])
    for model, labels in ((net, wrong), (tie, torch.zeros(4, dtype=torch.int64))):
        found = nearest(model, x, labels, norm, (0.0, 1.0))
        assert found.lower.tolist() == found.upper.tolist() == [0.0] * 4
        assert torch.equal(found.x_adv, x)
        assert found.exact.all()


@each_norm
def test_where_no_error_exists(norm: str) -> None:
    x, y = torch.rand(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    constant = alone([[0.0] * 3, [0.0] * 3], [1.0, 0.5])
    beyond = alone([[0.0] * 3, [1.0, 1.0, 1.0]], [3.1, 0.0])  # the rival wins where the sum of x is 3.1
    for model in (constant, beyond):
        found = nearest(model, x, y, norm, (0.0, 1.0))
        assert found.lower.tolist() == found.upper.tolist() == [math.inf] * 2
        assert torch.equal(found.x_adv, x)
        assert found.exact.all()
    endless = nearest(constant, x, y, norm)
    assert (endless.lower >= 1e6).all()
    assert endless.lower.isfinite().all()
    assert endless.upper.isinf().all()
    assert not endless.exact.any()


def test_a_plateau_of_ties() -> None:
    """theta = (relu(1/2 - x), 0) ties from x = 1/2 on, where no margin is positive."""
    model = nn.Sequential(alone([[-1.0]], [0.5]), nn.ReLU(), alone([[1.0], [0.0]], [0.0, 0.0]))
    found = nearest(model, one(0.2), torch.tensor([0]), "Linf", (0.0, 1.0))
    assert float(found.lower) <= 0.3
    assert float(found.lower) == pytest.approx(0.3, rel=1e-5)
    assert float(found.upper) == pytest.approx(0.3, rel=1e-5)


@each_norm
def test_the_digits_network(norm: str) -> None:
    """At most what the attack finds, at least what propagated bounds certify, and little below the attack."""
    from wda.certificates.propagation import linear, margins

    x, y = wda.data.load("digits", n=3)
    model = wda.models.load("digits-mlp")
    attack = wda.distances(model, x, y, norm)
    found = nearest(model, x, y, norm, (0.0, 1.0), upper=attack.distance, x_adv=attack.x_adv)
    net = from_module(model, x.shape[1:])
    check_witnesses(net, x.double(), y, norm, (0.0, 1.0), found)
    assert found.exact.all()
    assert (found.upper <= attack.distance * (1 + 1e-5)).all()
    assert (attack.distance <= found.upper * 1.01).all()
    for i, label in enumerate(y.tolist()):
        rows = margins(net, [(label, j) for j in range(10) if j != label])
        short, far = (
            float(linear(net, rows, x[i : i + 1].double(), float(found.upper[i]) * share, norm, (0.0, 1.0))[1].max())
            for share in (0.3, 1.001)
        )
        assert short < 0 <= far


# -- what is known before, and time limits ---------------------------------------------------------------------------


@each_norm
def test_limits_and_starting_points(norm: str) -> None:
    net = network((3, 5, 4, 3), 0)
    x, y = samples(net, 3, 0)
    free = nearest(net, x, y, norm, (0.0, 1.0))
    reached = free.upper.isfinite()
    assert reached.any()
    for known in (
        {"upper": free.upper},
        {"upper": free.upper * 3},
        {"upper": torch.zeros(3)},
        {"x_adv": free.x_adv},
        {"upper": free.upper, "x_adv": free.x_adv.float()},
        {"x_adv": x},
        {"x_adv": torch.full_like(x, math.nan)},
    ):
        found = nearest(net, x, y, norm, (0.0, 1.0), **known)
        check_witnesses(net, x, y, norm, (0.0, 1.0), found)
        assert found.exact.all()
        torch.testing.assert_close(found.upper, free.upper, rtol=1e-6, atol=0)
        assert (found.lower <= free.upper).all()
    short = nearest(net, x, y, norm, (0.0, 1.0), upper=0.9 * free.upper.where(reached, torch.tensor(1.0)))
    torch.testing.assert_close(short.lower[reached], 0.9 * free.upper[reached], rtol=2e-5, atol=0)
    assert short.upper.isinf().all()
    assert torch.equal(short.x_adv, x)


@each_norm
@each_box
def test_bounds_hold_when_time_runs_out(norm: str, box: tuple[float, float] | None) -> None:
    net = network((3, 8, 5, 3), 0)
    x, y = samples(net, 2, 0)
    exact = nearest(net, x, y, norm, box)
    for time_limit, known in itertools.product((0.0, 0.03), ({}, {"upper": exact.upper}, {"x_adv": exact.x_adv})):
        found = nearest(net, x, y, norm, box, time_limit=time_limit, **known)
        check_witnesses(net, x, y, norm, box, found)
        assert (found.lower <= exact.upper).all()
        assert (found.lower > 0).all()
        if time_limit == 0:
            assert found.upper.isinf().all() or "x_adv" in known
            assert (found.lower < exact.lower).all()


@each_norm
def test_a_solver_that_fails_proves_nothing(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    net = network((3, 6, 5, 3), 0)
    x, y = samples(net, 3, 0)
    exact, free = nearest(net, x, y, norm, (0.0, 1.0)), nearest(net, x, y, norm, (0.0, 1.0), time_limit=0)

    for status, bound in ((1, math.inf), (3, 7.0), (4, 7.0)):
        failed = SimpleNamespace(x=None, fun=7.0, mip_dual_bound=bound, status=status)
        monkeypatch.setattr("wda.certificates.program.milp", lambda *_, failed=failed, **__: failed)
        found = nearest(net, x, y, norm, (0.0, 1.0))
        assert torch.equal(found.lower, free.lower)
        assert (found.lower <= exact.upper).all()
        assert found.upper.isinf().all()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    net = network((2, 3, 2), 0)
    x, y = samples(net, 2, 0)
    with pytest.raises(ValueError, match="norm='L2': one of 'Linf', 'L1' is accepted"):
        nearest(net, x, y, "L2", (0.0, 1.0))
    for limit in (-1, math.nan):
        with pytest.raises(ValueError, match="time_limit="):
            nearest(net, x, y, "L1", time_limit=limit)
    with pytest.raises(ValueError, match=r"outside box=\(0.0, 0.1\)"):
        nearest(net, x, y, "L1", (0.0, 0.1))
    with pytest.raises(ValueError, match="box="):
        nearest(net, x, y, "L1", (1.0, 0.0))
    with pytest.raises(ValueError, match="the label 2, the model has K=2 classes"):
        nearest(net, x, y + 2 - y, "L1")
    with pytest.raises(ValueError, match="the label -1"):
        nearest(net, x, y - y - 1, "L1")
    with pytest.raises(ValueError, match="inputs"):
        nearest(net, torch.zeros(2, 5), y, "L1")
    with pytest.raises(ValueError, match="K=1 logits"):
        nearest(network((2, 3, 1), 0), x, y - y, "L1")
    for upper in (torch.ones(3), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="upper of shape"):
            nearest(net, x, y, "L1", upper=upper)
    with pytest.raises(ValueError, match="x_adv of shape"):
        nearest(net, x, y, "L1", x_adv=torch.zeros(2, 3))
    for bad in (math.nan, math.inf):
        broken = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
        broken[2].weight[0, 0] = bad
        with pytest.raises(ValueError, match=r"2\.weight has NaN or infinite values"):
            nearest(broken, x, y, "L1")
    for layer in (nn.GELU(), nn.LayerNorm(3)):
        with pytest.raises(NotPiecewiseAffine, match=type(layer).__name__):
            nearest(nn.Sequential(nn.Linear(2, 3), layer, nn.Linear(3, 2)), x, y, "L1")
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2))
    with pytest.raises(NotPiecewiseAffine, match="MaxPool2d"):
        nearest(pooled, torch.zeros(1, 1, 2, 2), torch.tensor([0]), "L1")
