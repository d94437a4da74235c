"""How fast WDA is, against Algorithm 1 letter by letter; and the strongest attack against AutoAttack's APGD-DLR.

    python benchmarks/attacks.py [--rounds R] [--output data/results/benchmarks/attacks.json]

1. Algorithm 1 as printed, but for a whole batch at once: rival after rival, each with a forward and a backward pass for
   its gradient and, while probing, a forward pass for its proposal; raw logits compared, a constant step, the last
   iterate. Its step is the one of those in STEPS that leaves the least accuracy. Beside it `wda` with the same radius,
   steps and rivals. Both as often as there are rounds, in turn; a ratio is the median over the rounds.
2. Both against the number of samples, of classes and of rivals, on a network of random weights.
3. APGD-DLR with its 100 steps, and how long attacks of this package take to leave no more accuracy than it does. Each
   is run with more and more steps until it does.
4. A wide residual network of random weights at the shape of CIFAR-10: WideResNet-28-10 on a GPU, and without one a tiny
   network, to see that it works. With the share of the device's matrix-product rate, measured in the same run.

Seconds are those of the processor on a CPU, where other programs then do not count, and of the clock on a GPU. Networks
on real data need WDA_DATA; without it the bundled ones are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import wda
from wda.attacks.a3 import a3
from wda.attacks.autoattack import apgd_dlr
from wda.attacks.closest import closest
from wda.attacks.search import top_rivals
from wda.attacks.wda import wda as search
from wda.experiment import provenance
from wda.files import write_atomically
from wda.losses import margin
from wda.norms import dual_maximiser, norm, project
from wda.passes import Oracle
from wda.threat import Threat

STEPS = (1 / 10, 1 / 4, 1 / 2)  # of the radius
BATCH = 128
VARIANTS: dict[str, dict[str, bool]] = {
    "wda": {},
    "wda, halving": {"halving": True},
    "wda, halving, stop at flip": {"halving": True, "stop_at_flip": True},
}
Attack = Callable[[Oracle, Tensor, Tensor, Threat], Tensor]


@dataclass(frozen=True)
class Case:
    """A network, images, and the radius of an attack."""

    model: str
    data: str
    n: int
    norm: str
    eps: float


BUNDLED = [Case("digits-cnn", "digits", 256, "L2", 0.5), Case("digits-cnn-adv", "digits", 256, "Linf", 0.1)]
REAL = [
    Case("mnist_trades_smallcnn", "mnist", 200, "Linf", 0.3),
    Case("cifar10_cnn_a_adv", "cifar10", 200, "Linf", 2 / 255),
]


def algorithm_1(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    ball: Threat,
    alpha: float,
    rivals: Tensor,
    steps: int = 20,
    probe_steps: int = 10,
) -> Tensor:
    """Lines 5 to 14 of Algorithm 1 of the first paper as printed, for a batch and the rivals (N, m)."""
    point = x
    for t in range(steps):
        value = torch.full(y.shape, -math.inf, dtype=x.dtype, device=x.device)
        following, chosen = point.clone(), rivals[:, 0].clone()
        for j in range(rivals.shape[1]):  # line 7
            rival = rivals[:, j]
            _, gradient = oracle.margin_gradients(point, y, rival[:, None])  # line 8
            direction = dual_maximiser(gradient[:, 0], ball.norm)  # line 9
            proposal = project(point + alpha * direction, x, ball.eps, ball.norm, ball.box)  # line 10
            if rivals.shape[1] == 1:
                following = proposal
                continue
            logit = oracle.logits(proposal).gather(1, rival[:, None])[:, 0]  # line 11
            better = logit > value
            value[better], following[better], chosen[better] = logit[better], proposal[better], rival[better]
        point = following  # line 12
        if t == probe_steps - 1:
            rivals = chosen[:, None]
    return point


def literal(oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, *, share: float, m: int | None = None) -> Tensor:
    """Algorithm 1 with steps that are a share of the radius, on all rivals or on the m of largest logit."""
    return algorithm_1(oracle, x, y, ball, share * ball.eps, top_rivals(oracle.logits(x), y, m))


def clock(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, ball: Threat, autocast: bool = False
) -> dict[str, float]:
    """What an attack leaves, and what it costs per image."""
    with Oracle(model, BATCH, autocast) as oracle:
        start = clock(x.device)
        points = attack(oracle, x, y, ball)
        seconds = clock(x.device) - start
        forward, backward = oracle.forward, oracle.backward
        margins = margin(oracle.logits(points), y)
    return {
        "accuracy": float((margins < 0).double().mean()),
        "margin": float(margins.mean()),
        "seconds": seconds / len(x),
        "forward": forward / len(x),
        "backward": backward / len(x),
    }


def in_turn(
    runs: dict[str, Callable[[], dict[str, float]]], rounds: int, title: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each run, with the median of its seconds and of how many times slower the first one is."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    first = [result["seconds"] for result in next(iter(results.values()))]
    rows = []
    for name, found in results.items():
        seconds = [result["seconds"] for result in found]
        ratios = [slow / fast for slow, fast in zip(first, seconds, strict=True)]
        rows.append(
            {
                **title,
                "attack": name,
                **found[0],
                "seconds": statistics.median(seconds),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


HEADER = f"{'attack':34}{'accuracy':>9}{'margin':>9}{'ms':>9}{'forward':>9}{'backward':>9}{'ratio':>7}   per image"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['attack']:34}{100 * row['accuracy']:7.1f} %{row['margin']:9.3f}{1000 * row['seconds']:9.3f}"
        f"{row['forward']:9.1f}{row['backward']:9.1f}{row['ratio']:7.2f}"
    )


def load(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and the images of a case."""
    x, y = wda.data.load(case.data, n=case.n)
    return wda.models.load(case.model), x, y


def against_algorithm_1(case: Case, kappa: float, rounds: int) -> list[dict[str, Any]]:
    """Part 1, for one network and one kappa."""
    model, x, y = load(case)
    ball = Threat(case.norm, kappa * case.eps, math.inf)
    print(f"\n{case.model}, {case.n} images, {ball}, kappa = {kappa:g}\n{HEADER}")
    tried = {share: measure(partial(literal, share=share), model, x, y, ball) for share in STEPS}
    share = min(tried, key=lambda s: (tried[s]["accuracy"], -tried[s]["margin"]))
    runs = {f"algorithm 1, steps of {share:g} R": partial(measure, partial(literal, share=share), model, x, y, ball)}
    for name, options in VARIANTS.items():
        runs[name] = partial(measure, partial(search, **options), model, x, y, ball)
    return in_turn(runs, rounds, {**asdict(case), "kappa": kappa})


def convolutional(classes: int) -> nn.Module:
    """A small network of random weights for (3, 16, 16)."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


def scaling(rounds: int) -> list[dict[str, Any]]:
    """Part 2: one of N, K and the number of rivals at a time."""
    rows = []
    sizes = (
        [(n, 10, 9) for n in (1, 16, 256)]
        + [(64, k, k - 1) for k in (2, 10, 100)]
        + [(64, 100, m) for m in (1, 3, 9, 27)]
    )
    for n, classes, rivals in sizes:
        model = convolutional(classes)
        x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = model(x).argmax(1)
        ball = Threat("Linf", 8 / 255, math.inf)
        print(f"\nrandom weights: N = {n}, K = {classes}, {rivals} rivals\n{HEADER}")
        runs = {
            "algorithm 1, steps of 0.25 R": partial(measure, partial(literal, share=0.25, m=rivals), model, x, y, ball)
        }
        for name, options in VARIANTS.items():
            runs[name] = partial(measure, partial(search, rivals=rivals, **options), model, x, y, ball)
        rows += in_turn(runs, rounds, {"n": n, "classes": classes, "rivals": rivals})
    return rows


def nearby(oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, **options: int) -> Tensor:
    """The nearest errors where they lie in the ball, else the samples."""
    points = closest(oracle, x, y, ball.norm, ball.box, **options)
    inside = norm(points - x, ball.norm) <= ball.eps
    return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), points, x)


LADDERS: dict[str, dict[str, Attack]] = {
    "wda": {
        f"{steps} steps": partial(search, steps=steps, probe_steps=steps // 2, halving=True, stop_at_flip=True)
        for steps in (4, 8, 16, 32, 64)
    },
    "a3": {f"{levels} levels": partial(a3, levels=levels) for levels in (1, 2, 3, 4, 6)},
    "closest": {f"{restarts} restarts": partial(nearby, restarts=restarts) for restarts in (1, 2, 3, 6)},
}


def against_apgd(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Part 3, for one network: of each ladder the first rung that reaches the accuracy, or the last."""
    model, x, y = load(case)
    ball = Threat(case.norm, case.eps, math.inf)
    print(f"\n{case.model}, {case.n} images, {ball}\n{HEADER}")
    yardstick = partial(measure, apgd_dlr, model, x, y, ball)
    target = yardstick()["accuracy"]
    runs = {"apgd-dlr": yardstick}
    for name, rungs in LADDERS.items():
        tried = {rung: partial(measure, attack, model, x, y, ball) for rung, attack in rungs.items()}
        reached = next((rung for rung, run in tried.items() if run()["accuracy"] <= target), list(tried)[-1])
        runs[f"{name}, {reached}"] = tried[reached]
    return in_turn(runs, rounds, asdict(case))


class Block(nn.Module):
    """Two convolutions and a short cut, activations first."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)])
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The residual and the short cut."""
        active = self.norms[0](x).relu()
        short = self.short(x if isinstance(self.short, nn.Identity) else active)
        return short + self.second(self.norms[1](self.first(active)).relu())


def wide_resnet(depth: int, width: int) -> nn.Module:
    """WideResNet (Zagoruyko & Komodakis 2016) for (3, 32, 32) and ten classes, of random weights."""
    torch.manual_seed(0)
    widths = [16, 16 * width, 32 * width, 64 * width]
    blocks = [
        Block(widths[group - 1] if k == 0 else widths[group], widths[group], 2 if k == 0 and group > 1 else 1)
        for group in (1, 2, 3)
        for k in range((depth - 4) // 6)
    ]
    last = (nn.BatchNorm2d(widths[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[3], 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), *blocks, *last).requires_grad_(False)


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a product of two large matrices, in bfloat16 on a GPU and in float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        start = clock(device)
        a @ a
        best = min(best, clock(device) - start)
    return 2 * side**3 / best


def operations(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Of a forward pass of one image, and of the backward pass to it."""
    point = x[:1].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        logits = model(point)
        forward = counter.get_total_flops()
        logits.sum().backward()  # no parameter asks for a gradient
    return forward, counter.get_total_flops() - forward


def wide(rounds: int) -> list[dict[str, Any]]:
    """Part 4."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    depth, width, n = (28, 10, 256) if device.type == "cuda" else (10, 1, 8)
    model = wide_resnet(depth, width).to(device)
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        model.train()(x)  # so that the normalisations have seen images
        y = model.eval()(x).argmax(1)
    ball = Threat("Linf", 8 / 255, math.inf)
    print(f"\nWideResNet-{depth}-{width}, random weights, {n} images, {ball}, on {device}\n{HEADER}")
    forward, backward = operations(model, x)
    last = wide_resnet(depth, width).to(device, memory_format=torch.channels_last).eval()
    last.load_state_dict(model.state_dict())
    runs = {
        "algorithm 1, steps of 0.25 R": partial(measure, partial(literal, share=0.25), model, x, y, ball),
        **{name: partial(measure, partial(search, **VARIANTS[name]), model, x, y, ball) for name in VARIANTS},
        "wda, halving, channels last, bf16": partial(measure, partial(search, halving=True), last, x, y, ball, True),
    }
    for run in runs.values():  # the first calls load and choose kernels
        run()
    rows = in_turn(runs, rounds, {"model": f"WideResNet-{depth}-{width}", "n": n, "device": str(device)})
    rate = matrix_rate(device)
    for row in rows:
        row["share"] = (row["forward"] * forward + row["backward"] * backward) / row["seconds"] / rate
        print(
            f"{row['attack']:34}{100 * row['share']:7.1f} % of {rate / 1e12:.3g} TFLOP/s, the rate of matrix products"
        )
    return rows


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, the versions and the hardware")
    args = parser.parse_args()
    cases = BUNDLED + (REAL if os.environ.get("WDA_DATA") else [])
    record: dict[str, Any] = {
        "study": "benchmark",
        "algorithm 1": [
            row for case in cases for kappa in (1, 2) for row in against_algorithm_1(case, kappa, args.rounds)
        ],
        "scaling": scaling(args.rounds),
        "apgd-dlr": [row for case in cases for row in against_apgd(case, args.rounds)],
        "wide residual network": wide(args.rounds),
        "provenance": provenance(),
    }
    if args.output:
        with write_atomically(args.output) as file:
            file.write(json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
