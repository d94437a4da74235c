r"""Small networks with thin cells, and what their slopes are in exact arithmetic: `python workflow/thin.py [count]`.

Hyperplanes that are the same up to 1e-12 to 1e-2, offsets up to 1e6, weights from 1e-9 to 1e9, differences of large
terms, units that contradict each other at a point. The oracle shares nothing with the package: it goes through all
:math:`2^U` masks, decides by Fourier-Motzkin elimination in rational numbers which have an inside, and looks for the
slope at infinity on the rays where hyperplanes meet. All bounds have to hold, and exact ones have to be right. What
came of it is written to data/results/thin.json.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wda.certificates as C
from wda.certificates import Slope
from wda.certificates.slope import TOLERANCE
from wda.experiment import provenance
from wda.experiment.records import save

RECORD = Path(__file__).parents[1] / "data" / "results" / "fuzz" / "thin.json"
COUNT = 400
NORMS = ("Linf", "L2", "L1")
KINDS = ("plain", "twins", "hat", "slab", "copies", "deep twins", "scales")
# what a bound may be off by
ROUNDING = 1e-9

Row = list[Fraction]


# -- networks ----------------------------------------------------------------------------------------------------------


def network(seed: int) -> tuple[str, nn.Sequential]:
    """A network with two logits, of a kind that the seed chooses."""
    g = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    n = int(g.integers(1, 4)) if kind not in ("hat", "slab") else 2 - (kind == "slab")
    apart = 10.0 ** -g.uniform(2, 12)
    if kind == "slab":
        return kind, _slab(g, apart)
    if kind == "hat":
        return kind, _hat(g, apart)
    units = int(g.integers(2, 5 if n < 3 else 4))
    W, b = g.normal(size=(units, n)), g.normal(size=units)
    out = g.normal(size=(1, units))
    if kind in ("twins", "deep twins"):
        W[1], b[1] = W[0] * (1 + apart * g.integers(0, 2)), b[0]
        W[1, -1] += apart * abs(W[0, -1]) * g.integers(0, 2)
        b[1] += apart * g.normal()
        out[0, :2] = [1 / apart, -1 / apart]
    if kind == "copies":
        W[1], b[1] = -2 * W[0], -2 * b[0]
        out[0, :2] = [3, -1]
    if kind == "scales":
        by = 10.0 ** g.uniform(-9, 9, units)
        W, b, out = W * by[:, None], b * by, out / by * 10.0 ** g.integers(-3, 4, units)
    shift = g.choice([0.0, 10.0 ** g.uniform(0, 6)])
    b = b - W @ np.full(n, shift)
    layers = [_linear(W, b)]
    if kind in ("deep twins", "plain") and seed % 2:
        second = g.normal(size=(2, units))
        third = g.normal(size=2)
        if kind == "deep twins":
            second[1], third[1] = second[0], third[0] + apart
            out = np.array([[1 / apart, -1 / apart]])
        else:
            out = g.normal(size=(1, 2))
        layers += [nn.ReLU(), _linear(second, third)]
    return kind, nn.Sequential(*layers, nn.ReLU(), _head(out, g.normal()))


def _linear(W: Any, b: Any) -> nn.Linear:
    W = torch.as_tensor(np.asarray(W, float))
    layer = nn.Linear(W.shape[1], W.shape[0]).double().requires_grad_(False)
    layer.weight.copy_(W)
    layer.bias.copy_(torch.as_tensor(np.asarray(b, float)))
    return layer


def _head(out: Any, bias: float = 0.0) -> nn.Linear:
    """Two logits, the first of which is 0."""
    out = np.asarray(out, float)
    return _linear(np.concatenate([np.zeros_like(out), out]), [0.0, bias])


def _slab(g: np.random.Generator, apart: float) -> nn.Sequential:
    """A steep rise over a slab of width `apart`, found by the second layer beside a unit that is far away."""
    far = 10.0 ** g.uniform(0, 6)
    second = [[1.0, 0.0], [1.0, 0.0]]
    return nn.Sequential(
        _linear([[1.0], [1.0]], [0.0, -far]), nn.ReLU(), _linear(second, [-1.0, -1.0 - apart]), nn.ReLU(),
        _head([[1 / apart, -1 / apart]], -0.5),
    )  # fmt: skip


def _hat(g: np.random.Generator, w: float) -> nn.Sequential:
    """[relu(t) - 2 relu(t - w x) + relu(t - 2 w x)] / w: it grows by 1 within a cone of width w."""
    W = np.array([[0.0, 1.0], [-w, 1.0], [-2 * w, 1.0]])
    return nn.Sequential(
        _linear(W, g.choice([0.0, 1.0]) * g.normal(size=3)), nn.ReLU(), _head([[1 / w, -2 / w, 1 / w]])
    )


# -- the oracle --------------------------------------------------------------------------------------------------------


def _layers(model: nn.Sequential) -> list[tuple[list[Row], Row]]:
    """Weights and biases as fractions."""
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [
        ([[Fraction(v) for v in row] for row in layer.weight.tolist()], [Fraction(v) for v in layer.bias.tolist()])
        for layer in linear
    ]


def pieces(model: nn.Sequential) -> Iterator[tuple[list[Row], Row]]:
    """For every mask: the rows [A, b] that are positive inside its cell, and the row of the second logit."""
    layers = _layers(model)
    n = len(layers[0][0][0])
    counts = [len(b) for _, b in layers[:-1]]
    for mask in itertools.product((True, False), repeat=sum(counts)):
        after = [[Fraction(i == j) for j in range(n + 1)] for i in range(n)]
        rows, bits = [], iter(mask)
        for weights, bias in layers:
            seen = [
                [sum((w * a[k] for w, a in zip(row, after, strict=True)), b * (k == n)) for k in range(n + 1)]
                for row, b in zip(weights, bias, strict=True)
            ]
            if bias is layers[-1][1]:
                yield rows, seen[1]
                break
            on = [next(bits) for _ in seen]
            for form, bit in zip(seen, on, strict=True):
                if any(form[:n]):
                    rows.append(form if bit else [-v for v in form])
                elif (form[n] > 0) != bit:
                    rows.append([Fraction(0)] * (n + 1))  # never positive
            after = [form if bit else [Fraction(0)] * (n + 1) for form, bit in zip(seen, on, strict=True)]


def has_inside(rows: list[Row]) -> bool:
    """Whether some x makes every ``A x + b`` positive, by eliminating one variable after the other."""
    rows = [_reduced(row) for row in rows]
    while rows and len(rows[0]) > 1:
        above = [row for row in rows if row[0] > 0]
        below = [row for row in rows if row[0] < 0]
        new = {tuple(row[1:]) for row in rows if not row[0]}
        for low, high in itertools.product(above, below):
            new.add(tuple(_reduced([a / low[0] - b / high[0] for a, b in zip(low[1:], high[1:], strict=True)])))
        rows = [list(row) for row in new]
    return all(row[0] > 0 for row in rows)


def _reduced(row: Row) -> Row:
    largest = max((abs(v) for v in row), default=Fraction(0))
    return [v / largest for v in row] if largest else row


def size(g: Row, norm: str) -> float:
    """The dual norm of a vector, rounded once or twice."""
    if norm != "L2":
        return float(sum(map(abs, g)) if norm == "Linf" else max(map(abs, g)))
    return _root(sum((v * v for v in g), Fraction(0)))


def _root(square: Fraction) -> float:
    """A square root, also where the square is no float64 number."""
    shift = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(square / Fraction(4) ** shift), shift)


def lipschitz(model: nn.Sequential, norm: str, box: tuple[float, float] | None) -> float:
    """The largest dual norm of a gradient of the difference of the logits."""
    return max(size(logit[:-1], norm) for logit in _with_inside(model, box))


def _with_inside(model: nn.Sequential, box: tuple[float, float] | None) -> list[Row]:
    found = []
    for rows, logit in pieces(model):
        n = len(logit) - 1
        faces = [
            [Fraction(-s * (i == j)) for j in range(n)] + [s * Fraction(side)]
            for i in range(n)
            for s, side in (((1, box[1]), (-1, box[0])) if box else ())
        ]
        if has_inside(rows + faces):
            found.append(logit)
    return found


def recession(model: nn.Sequential, norm: str) -> float | None:
    """The largest growth of the second logit in a direction of unit norm; None in the 2-norm of three dimensions."""
    layers = _layers(model)
    n = len(layers[0][0][0])
    if norm == "L2" and n > 2:
        return None
    normals = {tuple(_reduced(row[:-1])) for rows, _ in pieces(model) for row in rows if any(row[:-1])}
    one = [[Fraction(i == j) for j in range(n)] for i in range(n)]
    if norm == "L1":
        normals |= {tuple(e) for e in one}
    if norm == "Linf":
        pairs = itertools.combinations(one, 2)
        normals |= {tuple(a + s * b for a, b in zip(d, e, strict=True)) for d, e in pairs for s in (1, -1)}
    rays = [[Fraction(1)]] if n == 1 else [[-v[1], v[0]] for v in normals] if n == 2 else _cross(normals)
    if norm == "L2":
        rays += [logit[:-1] for _, logit in pieces(model)]
    best = 0.0
    for ray in rays:
        for u in (ray, [-v for v in ray]):
            if any(u):
                gain = _growth(layers, u)
                if norm == "L2":
                    best = max(best, _root(gain * gain / sum(v * v for v in u)) * (gain > 0))
                else:
                    best = max(best, float(gain / (max if norm == "Linf" else sum)(map(abs, u))))
    return best


def _cross(normals: set[tuple[Fraction, ...]]) -> list[Row]:
    return [
        [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
        for a, b in itertools.combinations(normals, 2)
    ]


def _growth(layers: list[tuple[list[Row], Row]], u: Row) -> Fraction:
    """The second logit at u, without biases."""
    for weights, _ in layers[:-1]:
        u = [max(Fraction(0), sum((w * v for w, v in zip(row, u, strict=True)), Fraction(0))) for row in weights]
    return sum((w * v for w, v in zip(layers[-1][0][1], u, strict=True)), Fraction(0))


# -- the comparison ----------------------------------------------------------------------------------------------------


def answers(model: nn.Sequential, norm: str, seed: int) -> Iterator[tuple[str, Slope, float]]:
    """What the package says of a network, each with the truth."""
    # a box around the place where the network bends
    n = int(model[0].in_features)
    centre = -float(model[0].bias[0]) / float(model[0].weight[0].sum() or 1)
    for box in (None, (centre - 3.0, centre + 4.0)):
        if box is None or (math.isfinite(centre) and box[0] < box[1]):
            truth = lipschitz(model, norm, box)
            yield f"lipschitz {box} cells", C.lipschitz(model, norm, method="cells", box=box), truth
            if box and norm != "L2":
                yield f"lipschitz {box} milp", C.lipschitz(model, norm, method="milp", box=box), truth
            if norm != "L2" or n < 3:
                yield f"lipschitz {box} bounds", C.lipschitz(model, norm, method="bounds", box=box), truth
    limit = recession(model, norm)
    if limit is None:
        return
    for method in ("cones", "cells", *(["milp"] if norm != "L2" else [])):
        yield f"recession {method}", C.recession_slope(model, norm, [0], method=method), limit


def judge(said: Slope, truth: float) -> str:
    """ "right" or "open", or what is wrong."""
    if not said.lower <= truth * (1 + ROUNDING):
        return "lower bound too high"
    if not truth <= said.upper * (1 + ROUNDING):
        return "upper bound too low"
    if not said.exact:
        return "open"
    return "right" if abs(said.value - truth) <= TOLERANCE * truth else "exact, and wrong"


def run(seed: int) -> list[dict[str, Any]]:
    """What came of one network, in the norm that its seed chooses."""
    (kind, model), norm = network(seed), NORMS[seed // len(KINDS) % len(NORMS)]
    return [
        {"seed": seed, "kind": kind, "norm": norm, "what": what, "said": [said.lower, said.upper], "truth": truth,
         "verdict": judge(said, truth)}
        for what, said, truth in answers(model, norm, seed)
    ]  # fmt: skip


def main(count: int = COUNT) -> None:
    start, tally, wrong = time.monotonic(), {}, []
    for seed in range(count):
        for found in run(seed):
            key = found["what"].split()[0] + " " + found["what"].split()[-1]
            tally.setdefault(key, {"right": 0, "open": 0, "wrong": 0})
            verdict = found["verdict"]
            tally[key][verdict if verdict in ("right", "open") else "wrong"] += 1
            if verdict not in ("right", "open"):
                wrong.append(found)
                print(found)
    print(json.dumps(tally, indent=1))
    seconds = round(time.monotonic() - start, 1)
    record = {"networks": count, "seconds": seconds, "answers": tally, "wrong": wrong, "provenance": provenance()}
    save(record, RECORD)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
