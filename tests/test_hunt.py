"""Attacks inside certified balls find nothing, unless the bounds are broken on purpose; and the record says so."""

from __future__ import annotations

import json

import hunt
import pytest
import torch
from torch import nn

from wda import nets
from wda.certificates import propagation, radius
from wda.losses import margin
from wda.norms import norm

BOX = (0.0, 1.0)
each_norm = pytest.mark.parametrize("name", hunt.NORMS)


def records() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(hunt.FOLDER.glob("*.json"))}


@each_norm
def test_nothing_is_found_in_certified_balls(name: str) -> None:
    net, x, y = hunt.load("digits-mlp")
    found = hunt.hunt(net, x[:25], y[:25], name)
    assert found["violations"] == found["known_errors_within"] == 0
    assert found["tuples"] == len(hunt.SHARES) * found["images"] > 80
    assert 0 < found["optimised"] <= 5
    # the best attack comes near: what is left of the margin is little
    assert 0 < found["least_margin_left"] < 0.1


@pytest.mark.parametrize("model", hunt.PLANTED)
def test_a_wrong_sign_in_the_bounds_is_caught(model: str) -> None:
    net, x, y = hunt.load(model)
    sound = propagation.relu_lines
    with hunt.planted():
        found = hunt.hunt(net, x[:10], y[:10], "Linf")
    assert propagation.relu_lines is sound
    assert found["violations"] > 0
    assert found["least_margin_left"] <= 0


@each_norm
def test_errors_just_within_a_ball_are_found(name: str) -> None:
    """In place of a certificate a little more than the distance: of an affine model, and of a network."""
    torch.manual_seed(0)
    affine = nets.from_module(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), (1, 3, 3))
    x = torch.rand(20, 1, 3, 3, dtype=torch.float64)
    y = affine(x).argmax(1)
    distance = radius(affine, x, y, name, method="linear", tolerance=1e-6)
    reached = distance.isfinite()
    x, y, distance = x[reached], y[reached], distance[reached]
    for reach, beaten in ((0.99 * distance, False), (1.02 * distance, True)):
        start = hunt.starts(x, reach, name, torch.rand_like(x), torch.Generator().manual_seed(0))
        assert start.shape == (hunt.STARTS + 2, *x.shape)
        largest = hunt.climb(affine, x, y, reach, name, start, BOX)
        assert ((largest >= 0) == beaten).all()


@each_norm
def test_starts_are_in_the_ball_and_some_at_its_corners(name: str) -> None:
    x, reach = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0.01, 0.1, 0.3]).double()
    flips = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = hunt.starts(x, reach, name, flips, torch.Generator().manual_seed(0))
    away = torch.stack([norm(part - x, name) for part in start]) / reach
    assert (away <= 1 + 1e-9).all()
    assert torch.equal(start[0], x)
    torch.testing.assert_close(away[1], torch.ones(3).double())
    torch.testing.assert_close(away[2::2], torch.ones(hunt.STARTS // 2, 3).double())
    assert (away[3::2] < 1).all()
    moved = ((start[2::2] - x).abs() > 1e-12).flatten(2).sum(2)
    assert (moved == {"Linf": 16, "L2": 16, "L1": 1}[name]).all()
    if name == "Linf":
        torch.testing.assert_close((start[2::2] - x).abs(), reach.view(3, 1, 1, 1).expand(10, 3, 1, 4, 4))


def test_points_that_leave_the_ball_or_the_box_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = hunt.load("digits-mlp")
    x, y = x[:4], y[:4]
    reach = torch.full((4,), 1e-3, dtype=torch.float64)
    start = hunt.starts(x, reach, "Linf", x, torch.Generator().manual_seed(0))
    monkeypatch.setattr(hunt, "project", lambda points, *_: points)
    largest = hunt.climb(net, x, y, reach, "Linf", start + 3, BOX)
    assert (largest == -torch.inf).all()
    largest = hunt.climb(net, x, y, reach, "Linf", start[:1], BOX)
    torch.testing.assert_close(largest, margin(net(x), y).detach())


def test_the_records_are_of_a_hunt_that_was_large_enough_and_found_nothing() -> None:
    found = records()
    plant = found.pop("planted")
    runs = [(name, run) for name, record in found.items() for run in record["networks"][name].values()]
    assert all(not record["planted"] for record in found.values())
    assert all(run["violations"] == run["known_errors_within"] == 0 for _, run in runs)
    assert len(found) >= 5
    assert sum(run["tuples"] for _, run in runs) >= 10_000
    assert found["digits-mlp"]["networks"]["digits-mlp"]["Linf"]["images"] >= 500
    assert all(record["starts"] >= 20 for record in found.values())
    assert min(min(record["shares"]) for record in found.values()) >= 0.9
    assert plant["planted"]
    for networks in plant["networks"].values():
        assert sum(run["violations"] for run in networks.values()) > 0
