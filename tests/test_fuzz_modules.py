"""Networks are read as what they compute, or refused by name: random modules, planted misreadings, and the record."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fuzz_modules as fuzz
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import wda
from wda import NotPiecewiseAffine, Threat, certificates, nets
from wda.certificates.radius import METHODS

POINT = torch.full((1, 4), 0.5)


@pytest.mark.parametrize("start", range(0, 240, 80))
def test_random_modules_are_refused_by_name_or_read_as_what_they_are(start: int) -> None:
    seen = Counter(fuzz.examine(seed)[0] for seed in range(10_000 + start, 10_080 + start))
    assert not seen["misread"]
    assert not seen["refused: "]
    assert seen["read"] > 20
    assert len(seen) > 8


@pytest.mark.parametrize("name", fuzz.PLAIN)
def test_each_plain_piece_is_read_in_every_hiding_place(name: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        fuzz.random.seed(seed)
        piece = fuzz.PLAIN[name]()
        model = nn.Sequential(nn.Linear(3, fuzz.WIDTH), fuzz.hidden(piece) if seed else piece, nn.Linear(fuzz.WIDTH, 2))
        model = model.double().eval()
        assert fuzz.alike(nets.from_module(model), model, fuzz.points((3,), seed))


@pytest.mark.parametrize("name", fuzz.ODD)
def test_each_odd_piece_is_refused_by_name_in_every_hiding_place(name: str) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        fuzz.random.seed(seed)
        piece = fuzz.ODD[name]()
        model = nn.Sequential(nn.Linear(3, fuzz.WIDTH), fuzz.hidden(piece) if seed else piece, nn.Linear(fuzz.WIDTH, 2))
        with pytest.raises(NotPiecewiseAffine) as caught:
            nets.from_module(model.eval())
        assert fuzz.named(caught.value)


def test_nothing_is_found_in_certified_balls_of_random_modules() -> None:
    found: Counter[str] = Counter()
    seeds = iter(range(20_000, 30_000))
    while found["modules"] < 4:
        seed = next(seeds)
        net = fuzz.examine(seed)[1]
        if net is not None:
            found.update({"modules": 1, **fuzz.hunt(net, seed)})
    assert found["certified"] > 10
    assert not found["errors within"]


class Branched(nn.Module):
    """The first class, but for a branch that is off along the diagonal and wins where x1 exceeds x2 by 0.1."""

    def __init__(self, cut: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.features, self.head, self.cut = nn.Linear(4, 4), nn.Linear(4, 2), cut
        self.layers = nn.ModuleList(layers)
        for parameter in self.parameters():
            parameter.data.zero_()
        self.head.bias.data[0] = 1.0
        self.features.weight.data[1] = torch.tensor([10.0, -10.0, 0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.cut(self.features(x), *self.layers)


def of_chunks(h: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return torch.relu(a) + torch.relu(b)


def of_rows(h: Tensor) -> Tensor:
    a, b = h.view(-1, 2, 2).unbind(1)
    return torch.relu(a) + torch.relu(b)


def of_attention(h: Tensor, attention: nn.Module) -> Tensor:
    tokens = h[:, None]
    return torch.relu(tokens + 1e-6 * attention(tokens, tokens, tokens)[0])[:, 0, :2]


READ: dict[str, Callable[..., Tensor]] = {
    "chunk": of_chunks,
    "unbind": of_rows,
    "split": lambda h: torch.relu(torch.split(h, 2, dim=1)[0]) + torch.relu(torch.split(h, 2, dim=1)[1]),
    "split by sizes": lambda h: torch.relu(h.split([2, 2], 1)[0]),
    "slice": lambda h: torch.relu(h[:, :2]),
    "number": lambda h: torch.relu(torch.cat([h[:, 0:1], h[:, 1, None]], 1)),
}
REFUSED: dict[str, Callable[..., Tensor]] = {
    "max": lambda h: torch.relu(h.view(-1, 2, 2).max(1).values),
    "max, unpacked": lambda h: torch.relu(torch.max(h.view(-1, 2, 2), 1)[0]),
    "max_pool1d_with_indices": lambda h: torch.relu(
        nn.functional.max_pool1d(h[:, None], 1, 2, return_indices=True)[0][:, 0] * 0 + h[:, :2]
    ),
    "sort": lambda h: torch.relu(torch.sort(h, dim=1)[0][:, 2:].flip(1)),
    "topk": lambda h: torch.relu(h.topk(2, 1)[0].flip(1)),
    "MultiheadAttention": of_attention,
    "min": lambda h: -torch.relu(-h.view(-1, 2, 2).min(1).values),
}


@pytest.mark.parametrize("name", READ)
def test_pieces_of_a_value_are_no_constants(name: str) -> None:
    model = Branched(READ[name])
    y = torch.tensor([0])
    for method in set(METHODS) - {"auto"}:
        certified = certificates.radius(model, POINT, y, "Linf", method=method)
        assert 0.04 < float(certified) <= 0.05 + 1e-9
    b = wda.bracket(model, POINT, y, Threat("Linf", eps=0.2, order="inf"))
    assert (b.lower, b.upper, b.why) == (0.0, 0.0, None)
    assert 0.05 - 1e-9 <= float(b.distance) <= 0.0501


@pytest.mark.parametrize("name", REFUSED)
def test_other_tuples_are_refused_by_name_and_the_attack_stands(name: str) -> None:
    attention = [nn.MultiheadAttention(4, 1, batch_first=True)] if name == "MultiheadAttention" else []
    model = Branched(REFUSED[name], *attention)
    word = name.split(",", maxsplit=1)[0]
    with pytest.raises(NotPiecewiseAffine, match=word):
        certificates.radius(model, POINT, torch.tensor([0]), "Linf")
    b = wda.bracket(model, POINT, torch.tensor([0]), Threat("Linf", eps=0.2, order="inf"))
    assert b.why is not None
    assert word in b.why
    assert float(b.radius) < 1e-300
    assert float(b.distance) == float(b.distances.distance)


def constant_pieces(self: Any, step: Any, *_: Any) -> None:
    """What reads a tuple as a constant."""


def first_term(self: Any, step: Any, name: str, subtract: bool) -> None:
    """What drops the second term of a sum."""
    whole = step.args
    step.args = (whole[0], 0.0)
    REAL_SUM(self, step, name, subtract)
    step.args = whole  # the graph is right, and what is read of it is not


REAL_SUM, REAL_READ = nets._Reader._sum, dict(nets._READ)


def signed(kind: Any, *given: Any) -> nets.Node:
    """What forgets the absolute values of the weights."""
    node = REAL_READ[kind](kind, *given)
    return replace(node, absolute=node.linear)


def biased(kind: Any, *given: Any) -> nets.Node:
    """What takes the map with its bias for the linear one."""
    node = REAL_READ[kind](kind, *given)
    return replace(node, linear=node.call)


def shrunk(kind: Any, *given: Any) -> nets.Node:
    """What is wrong by a millionth of the weights."""
    node = REAL_READ[kind](kind, *given)
    linear = node.linear
    assert linear is not None
    return replace(node, linear=lambda v: (1 - 1e-6) * linear(v))


def planted_reader(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Break the reader, and give a module that shows it everywhere."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    if name in ("tuple", "branch"):
        patched = {"tuple": ("_cut", constant_pieces), "branch": ("_sum", first_term)}[name]
        monkeypatch.setattr(nets._Reader, *patched)
        return Branched(of_chunks)
    if name == "tiny branch":
        monkeypatch.setattr(nets._Reader, "_sum", first_term)
        return nn.Sequential(
            nn.Linear(4, 4), fuzz.Apply(lambda x, f: x + 1e-6 * f(x), nn.Linear(4, 4)), nn.Linear(4, 2)
        )
    wrong = {"signed": signed, "biased": biased, "shrunk": shrunk}[name]
    monkeypatch.setitem(nets._READ, nn.Linear, wrong)
    return model


@pytest.mark.parametrize("name", ["tuple", "branch", "tiny branch", "signed", "biased", "shrunk"])
def test_planted_misreadings_are_found_when_a_network_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = planted_reader(name, monkeypatch)
    with pytest.raises(NotPiecewiseAffine, match=r"does more than|does not compute what was read"):
        nets.from_module(model, (4,))


@pytest.mark.parametrize("name", ["tuple", "branch"])
def test_planted_misreadings_are_found_at_the_errors_of_an_attack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the branch had been off wherever the network was compared with the model."""
    model = planted_reader(name, monkeypatch)
    monkeypatch.setattr(nets, "_places", lambda net, sample: torch.full((5, 4), 0.5, dtype=torch.float64))
    y = torch.tensor([0])
    assert float(certificates.radius(model, POINT, y, "Linf")) == torch.inf  # as wrong as it was
    with pytest.raises(ValueError, match="the network as read does not agree with the model at sample 0"):
        wda.bracket(model, POINT, y, Threat("Linf", eps=0.2, order="inf"))


@pytest.mark.parametrize("name", ["tuple", "branch", "tiny branch"])
def test_planted_misreadings_are_found_by_the_fuzz(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted_reader(name, monkeypatch).double().eval()
    monkeypatch.setattr(nets, "_denied", lambda net, x, told: torch.zeros(len(x), dtype=torch.bool))
    net = nets.from_module(model, (4,))
    assert not fuzz.alike(net, model, fuzz.points((4,), 0))


def test_errors_that_single_precision_alone_makes_are_no_misreadings() -> None:
    """Where float32 rounds the margin to a tie, the distance is that of the function in float64."""
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1e-3, 0.0], [0.0, 0.0]])
    layer.bias.data = torch.tensor([1e5, 1e5])
    x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    b = wda.bracket(layer, x, y, Threat("Linf", 0.1))
    assert b.why is None
    assert float(b.distance) == pytest.approx(0.5)
    assert float(b.radius) == pytest.approx(0.5, rel=0.05)


def test_the_record_is_of_a_fuzz_that_was_large_enough_and_found_nothing() -> None:
    record = json.loads(fuzz.FILE.read_text())
    refused = record["refused"]
    assert record["modules"] == record["read"] + sum(refused.values()) >= 2000
    assert record["misread"] == 0 == len(record["seeds of misread or unnamed"])
    assert record["read"] > 800
    assert "" not in refused
    assert len(refused) > 30
    assert record["hunt"]["errors within"] == 0
    assert record["hunt"]["certified"] > 300


# -- what a graph holds as a constant ----------------------------------------------------------------------------------


class Moving(nn.Module):
    """A hat between 19 and 20 whose borders are one tensor, moved on after each use; and a class that never wins."""

    def __init__(self, third: float) -> None:
        super().__init__()
        self.total, self.head = nn.Linear(20, 1, bias=False), nn.Linear(20, 3)
        with torch.no_grad():
            self.total.weight.fill_(1.0)
            self.head.weight.zero_()
            self.head.weight[1] = 1e-3
            self.head.bias.copy_(torch.tensor([1.0, 0.0, third]))

    def forward(self, x: Tensor) -> Tensor:
        border, hat = torch.tensor([19.0]), 0.0
        for factor in (1, -2, 1):
            hat = hat + factor * functional.relu(self.total(x) - border)
            border += 0.5
        return self.head(x) + torch.cat([-4 * hat, 4 * hat, 0 * hat], 1)


class Turned(nn.Module):
    """A constant changes its sign after its use, beside a logit of another size."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.tensor([1.0, 1.0])
        z = x * signs
        signs[1] = -1.0
        return torch.cat([z, x[:, :1] * 0 + self.mask], 1)


class Private(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, generator: object, draw: Callable[[], float]) -> None:
        super().__init__()
        self.head, self.generator, self.draw = nn.Linear(2, 2), generator, draw

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(x) * (-1.0 if self.draw() < 0.2 else 1.0)
        return z


class Counting(nn.Module):
    """Another function from some call on, counted in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls = nn.Linear(2, 2), {"count": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls["count"] += 1
        z: Tensor = self.head(x) * (-1.0 if self.calls["count"] > 60 else 1.0)
        return z


def private() -> list[nn.Module]:
    ours, torchs, numpys = random.Random(0), torch.Generator().manual_seed(0), np.random.default_rng(0)
    return [
        Private(ours, ours.random),
        Private(torchs, lambda: float(torch.rand(1, generator=torchs))),
        Private(numpys, numpys.random),
        Private(None, random.Random(0).random),
    ]


@pytest.mark.parametrize(
    ("model", "n"),
    [
        *((Moving(third), 20) for third in (0.0, -1e12, -1e30)),
        *((Turned(mask), 2) for mask in (0.0, -1e15)),
        *((model, 2) for model in private()),
        (Counting(), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_forward_changes_or_draws_is_no_constant(model: nn.Module, n: int) -> None:
    with pytest.raises(NotPiecewiseAffine, match=type(model).__name__):
        nets.from_module(model.eval(), shape=(n,))


def test_a_class_that_never_wins_hides_nothing_and_is_no_obstacle() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.body(x), x[:, :1] * 0 - 1e12], 1)

    model, x = Masked().double(), torch.rand(5, 4).double()
    net = nets.from_module(model, sample=x, shape=(4,))
    torch.testing.assert_close(net(x), model(x))
    first = net.nodes[0]
    broken = replace(net, nodes=(replace(first, call=lambda v: first.call(v) + 1e-3), *net.nodes[1:]))
    with pytest.raises(ValueError, match="does not agree with the model"):
        nets.check_reading(broken, model, x)
