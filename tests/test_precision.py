"""Distances are those of the deployed model: whatever its precision, the constant and the scale of its logits."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wda
from wda.attacks import Distances
from wda.attacks.distances import _passes
from wda.errors import Untrustworthy
from wda.losses import margin
from wda.norms import dual, norm
from wda.passes import Oracle

NORMS = ("Linf", "L2", "L1")
HALF = (torch.float16, torch.bfloat16)
FEW: dict[str, dict[str, int]] = {"closest": {"steps": 10, "restarts": 1}, "wda++": {}, "fab": {"steps": 8}}
each_norm = pytest.mark.parametrize("name", NORMS)


def rescaled(model: nn.Module, offset: float, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda x: scale * model(x) + offset


def found(
    dtype: torch.dtype,
    name: str,
    offset: float = 0,
    scale: float = 1,
    n: int = 12,
    method: str = "closest",
    **options: int,
) -> tuple[Distances, Callable[[Tensor], Tensor]]:
    """The distances of a network in that precision, with another constant and scale of its logits; and the network."""
    x, y = wda.data.load("digits", n=n)
    model = rescaled(wda.models.load("digits-mlp").to(dtype).eval(), offset, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrustworthy)
        return wda.distances(
            model, x.to(dtype), y, name, method=method, progress=False, **{**FEW[method], **options}
        ), model


def ratios(result: Distances, name: str, method: str = "closest", **options: int) -> Tensor:
    """Over the distances in double precision, where neither is 0."""
    exact = found(torch.float64, name, n=len(result.x), method=method, **options)[0].distance
    both = (exact > 0) & (result.distance > 0)
    return (result.distance / exact)[both]


@each_norm
@pytest.mark.parametrize("method", ["closest", "wda++"])
def test_in_double_precision_constants_and_scales_change_nothing(name: str, method: str) -> None:
    for offset, scale in ((1e5, 1), (-1e5, 1), (17.3, 1), (0, 1e-6), (0, 1e6), (0, 0.3)):
        ratio = ratios(found(torch.float64, name, offset, scale, method=method)[0], name, method)
        assert ((ratio - 1).abs() <= 1e-6).all(), (offset, scale)


@each_norm
def test_fab_sees_gaps_and_not_constants(name: str) -> None:
    """The package is in single precision, and so is what it finds."""
    for offset, scale in ((1e5, 1), (0, 1e-6), (0, 1e6)):
        ratio = ratios(found(torch.float64, name, offset, scale, n=6, method="fab")[0], name, "fab")
        assert ((ratio - 1).abs() <= 1e-3).all(), (offset, scale)


@each_norm
def test_in_single_precision_a_constant_costs_the_rounding_of_the_logits_over_their_slope(name: str) -> None:
    whole = {"steps": 30, "restarts": 4}  # of a short search the first decisions, which may be close, count for more
    plain = found(torch.float32, name, **whole)[0]
    _, slope = Oracle(wda.models.load("digits-mlp")).gradient(plain.x_adv, plain.y, margin)
    for offset in (1e2, 1e3, 1e4):
        result = found(torch.float32, name, offset, **whole)[0]
        rounding = 4 * torch.finfo(torch.float32).eps * (offset + 100) / norm(slope, dual(name)).double()
        assert ((result.distance - plain.distance).abs() <= rounding + 2e-3 * plain.distance).all()
        assert ((ratios(result, name, **whole) - 1).abs() <= 0.02).all()


@each_norm
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_in_half_precision_distances_are_near_those_in_double(name: str, dtype: torch.dtype) -> None:
    for offset, scale in ((0, 1), (0, 1e-2), (0, 1e2), (100, 1e2)):
        ratio = ratios(found(dtype, name, offset, scale, n=20)[0], name)
        assert abs(float(ratio.median()) - 1) <= (0.03 if dtype == torch.float16 else 0.05), (offset, scale)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_in_half_precision_a_dense_search_finds_nothing_much_nearer(dtype: torch.dtype, seed: int) -> None:
    """Of the deployed model, over the numbers that its inputs can be."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight *= 4
        model[0].bias -= model[0].weight.sum(1) / 2
    x = torch.rand(6, 2).to(dtype)
    side = (torch.arange(257) / 256).to(dtype).unique()
    grid = torch.cartesian_prod(side, side)
    for offset, scale in ((0, 1), (0, 1e-2), (0, 1e2)):
        deployed = rescaled(model.to(dtype), offset, scale)
        with torch.no_grad():
            y, answers = deployed(x).argmax(1), deployed(grid)
        for name in NORMS:
            result = wda.distances(deployed, x, y, name, progress=False)
            for i in range(len(x)):
                errors = grid[margin(answers, y[i].expand(len(grid))) >= 0]
                dense = norm(errors.double() - x[i].double(), name).amin() if len(errors) else torch.tensor(math.inf)
                assert result.distance[i] <= 1.03 * dense + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float64, 0), (torch.float64, 1e5), (torch.float32, 0), (torch.float32, 1e4), *((d, 0) for d in HALF)],
    ids=str,
)
@pytest.mark.parametrize("method", ["closest", "wda++"])
def test_what_is_found_is_an_error_alone_in_sevens_and_in_batches(
    dtype: torch.dtype, offset: float, method: str
) -> None:
    for name in NORMS:
        result, model = found(dtype, name, offset, n=40, method=method)
        rows = result.distance.isfinite().nonzero()[:, 0]
        assert len(rows) > 30
        orders = rows, rows.flip(0), torch.arange(len(result.x))
        for size, order in itertools.product((1, 7, 256), orders):
            batches = zip(result.x_adv[order].split(size), result.y[order].split(size), strict=True)
            with torch.no_grad():
                wrong = torch.cat([margin(model(points), y) >= 0 for points, y in batches])
            assert wrong[result.distance[order].isfinite()].all()


def test_each_point_is_passed_at_every_size() -> None:
    sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.cat([0 * x, x], 1)

    points = torch.arange(10.0)[:, None]
    margins = _passes(Oracle(model), points, torch.zeros(10, dtype=torch.int64), 16)
    assert torch.equal(margins, points[:, 0].expand(len(margins), -1))
    assert set(sizes) == {1, 3, 7, 16}


def test_an_error_of_whole_batches_alone_is_none_and_is_counted() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), x[:, 0] - (0.5 if len(x) > 7 else 2.0)], 1)

    x, y = torch.full((10, 1), 0.4), torch.zeros(10, dtype=torch.int64)
    with pytest.warns(Untrustworthy, match="at 10 of 10 samples an error was found that not all passes"):
        result = wda.distances(model, x, y, progress=False)
    assert result.distance.isinf().all()
    assert torch.equal(result.x_adv, x)
    assert (result.rival == -1).all()


def test_an_error_that_one_pass_denies_is_sought_a_little_further_on() -> None:
    """A pass of one row alone has its boundary at 0.5003, all others at 0.5."""

    def model(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), x[:, 0] - (0.5003 if len(x) == 1 else 0.5)], 1)

    x, y = torch.full((10, 1), 0.4, dtype=torch.float64), torch.zeros(10, dtype=torch.int64)
    result = wda.distances(model, x, y, progress=False)
    assert ((result.distance >= 0.1003) & (result.distance <= 0.1008)).all()


@pytest.mark.parametrize("method", ["closest", "wda++", "fab"])
def test_saturated_ties_at_the_samples_are_counted(method: str) -> None:
    """The sigmoid of logits above 17 is 1 in single precision."""

    def model(x: Tensor) -> Tensor:
        return torch.sigmoid(torch.stack([100 * x[:, 0], 100 * x[:, 0] - 2], 1))

    x, y = torch.tensor([[0.0], [0.05], [0.5], [0.7], [0.9]]), torch.zeros(5, dtype=torch.int64)
    with pytest.warns(Untrustworthy, match="at 3 of 5 samples the label's logit ties"):
        result = wda.distances(model, x, y, method=method, progress=False)
    assert result.distance[2:].tolist() == [0, 0, 0]
    with pytest.warns(Untrustworthy, match="at 3 of 5 samples the label's logit ties"):
        wda.attack("pgd", model, x, y, wda.Threat("Linf", 0.01), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wda.distances(lambda z: torch.stack([z[:, 0] + 1, 2 * z[:, 0]], 1), x, y, box=None, method="wda++")


def test_a_tie_on_the_way_that_lasts_is_counted() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.sigmoid(torch.stack([100 * x[:, 0], 100 * x[:, 0] - 2], 1))

    x, y = torch.full((4, 1), 0.1), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(Untrustworthy, match="at 4 of 4 samples the error found is an exact tie"):
        result = wda.distances(model, x, y, progress=False)
    assert (result.distance > 0).all()


@pytest.mark.parametrize("method", ["closest", "wda++", "fab"])
def test_logits_keep_their_digits(method: str) -> None:
    """Of double precision, for samples in single precision: rounded to these all would tie."""

    def model(x: Tensor) -> Tensor:
        return 1e8 + torch.stack([torch.zeros(len(x)), x[:, 0] - 0.5], 1).double()

    x, y = torch.full((3, 1), 0.25), torch.zeros(3, dtype=torch.int64)
    distance = wda.distances(model, x, y, method=method, progress=False).distance
    torch.testing.assert_close(distance, torch.full_like(distance, 0.25), rtol=0.02, atol=0)
