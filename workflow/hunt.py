"""Try to beat the certificates: look for an error inside every certified ball, and record that none was found.

    python workflow/hunt.py                    # the bundled models, and those under WDA_DATA
    python workflow/hunt.py digits-mlp         # this one only
    python workflow/hunt.py --plant            # with a wrong sign in the bounds, which must be caught

For each network, norm and image the certified radius is searched, not knowing where errors are. Within 0.9, 0.94, 0.97
and all of it, the margin is attacked in float64 from the image, from the point towards the nearest error known, and
from 20 random starts, half of them at corners of the ball. A margin of 0 or more is a violation, and so is a known
error within the radius. One record for each network is written to data/results/hunt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wda import data, distances, models, nets
from wda.attacks.search import free
from wda.certificates import propagation
from wda.certificates.activations import Lines, relu_lines
from wda.certificates.radius import radius
from wda.errors import DataUnavailable
from wda.experiment import provenance
from wda.files import write_atomically
from wda.losses import margin, rival_logits
from wda.nets import Net
from wda.norms import clamp, dual_maximiser, norm, project

FOLDER = Path(__file__).parents[1] / "data" / "results" / "hunt"
NORMS = ("Linf", "L2", "L1")
SHARES = (0.9, 0.94, 0.97, 1.0)
STARTS, STEPS = 20, 20
TOLERANCE = 0.05
# one image in so many has the slopes of its certificate optimised
OPTIMISED = 5
# how many images of each network's test set; what a certificate costs decides
IMAGES = {
    "digits-mlp": 560, "digits-gelu": 150, "digits-cnn": 24, "digits-cnn-adv": 24, "mnist_tiny_mlp_20": 70,
    "mnist_lipsdp_50": 70, "mnist_lirpa_fc_128_64": 40, "mnist_kw_small_eps0.1": 12, "cifar10_oval_base_kw_eps2": 8,
}  # fmt: skip
# in L2 and L1 a certificate of these takes many seconds: so few images
SLOW, FEW = ("mnist_kw_small_eps0.1", "cifar10_oval_base_kw_eps2"), 3
PLANTED = ("digits-mlp", "digits-cnn-adv")
BATCH = 8


def load(name: str) -> tuple[Net, Tensor, Tensor]:
    """A network in float64, and as many images of its test set as are hunted."""
    x, y = data.load(name.replace("-", "_").split("_")[0], n=IMAGES[name])
    return nets.from_module(models.load(name), tuple(x.shape[1:])), x.double(), y


def certify(net: Net, x: Tensor, y: Tensor, name: str) -> Tensor:
    """A certified radius for each image; the slopes of every fifth are optimised."""
    options = {"tolerance": TOLERANCE, "batch_size": BATCH, "progress": False}
    certified = radius(net, x, y, name, method="linear", **options)
    certified[::OPTIMISED] = radius(net, x[::OPTIMISED], y[::OPTIMISED], name, method="optimised", **options)
    return certified


def starts(x: Tensor, reach: Tensor, name: str, flips: Tensor, generator: torch.Generator) -> Tensor:
    """Where attacks begin, (STARTS + 2, N, ...): the image, towards a known error, corners, and random points."""
    like = {"generator": generator, "dtype": torch.float64}
    steps = torch.randn(STARTS, *x.shape, **like)
    corners = steps[::2]
    if name == "Linf":
        corners.copy_(corners.sign())
    elif name == "L1":
        flat = corners.flatten(2)
        at = torch.randint(flat.shape[2], (*flat.shape[:2], 1), generator=generator)
        corners.copy_(torch.zeros_like(flat).scatter(2, at, flat.gather(2, at).sign()).view_as(corners))
    length = reach.repeat(STARTS) / norm(steps.flatten(0, 1), name)
    inner = torch.rand(STARTS // 2, len(x), **like)
    length.view(STARTS, -1)[1::2] *= inner
    steps = torch.cat([torch.zeros_like(x)[None], (flips - x)[None], steps * _each(length, steps)])
    away = norm(flips - x, name).clamp(min=1e-300)
    steps[1] *= _each(reach / away, x)
    return x + steps


def _each(factor: Tensor, like: Tensor) -> Tensor:
    """One factor for each sample, in the shape that multiplies them."""
    shape = (STARTS, -1) if len(factor) == STARTS * like.shape[1] and like.shape[0] == STARTS else (-1,)
    return factor.view(*shape, *[1] * (like.ndim - len(shape)))


def climb(net: Net, x: Tensor, y: Tensor, reach: Tensor, name: str, start: Tensor, box: tuple[float, float]) -> Tensor:
    """The largest margin that projected ascents find within each ball, (N,).

    The first half of the starts climb the margin, the others that of one rival each, the likeliest first.
    """
    count = len(start)
    around, labels, limit = x.repeat(count, *[1] * (x.ndim - 1)), y.repeat(count), reach.repeat(count)
    rivals = rival_logits(net(x).detach(), y).argsort(1, descending=True)[:, :-1]
    pursued = torch.stack([rivals[:, k % rivals.shape[1]] for k in range(count)]).flatten()
    all_rivals = (torch.arange(count) < count // 2).repeat_interleave(len(x))
    within = limit * (1 - 1e-12)  # rounding of the projection
    point = project(start.flatten(0, 1), around, within, name, box)
    largest = torch.full((count * len(x),), -math.inf, dtype=torch.float64)
    for step in range(STEPS + 1):
        point = point.detach().requires_grad_()
        logits = net(point)
        value = margin(logits, labels)
        inside = (norm(point.detach() - around, name) <= limit) & (clamp(point.detach(), box) == point).flatten(1).all(
            1
        )
        largest = largest.maximum(value.detach().where(inside, -math.inf))
        one = logits.gather(1, pursued[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
        (slope,) = torch.autograd.grad(torch.where(all_rivals, value, one).sum(), point)
        slope = free(slope, point.detach(), box)
        if name == "L1":  # the projection thins the step out
            direction = slope / norm(slope, "Linf").clamp(min=1e-300).view(-1, *[1] * (x.ndim - 1)) / 4
        else:
            direction = dual_maximiser(slope, name)
        length = limit * math.cos(math.pi / 2 * step / (STEPS + 1))
        point = project(point.detach() + length.view(-1, *[1] * (x.ndim - 1)) * direction, around, within, name, box)
    return largest.view(count, -1).amax(0)


def hunt(net: Net, x: Tensor, y: Tensor, name: str, seed: int = 0) -> dict[str, Any]:
    """Certify and attack some images in one norm; what came of it."""
    box, generator = (0.0, 1.0), torch.Generator().manual_seed(seed)
    begin = time.monotonic()
    certified = certify(net, x, y, name)
    middle = time.monotonic()
    known = distances(net, x, y, name, box, progress=False)
    rows = (certified > 1e-300).nonzero()[:, 0]
    farthest = norm(torch.ones_like(x[:1]), name)
    largest = []
    for part in rows.split(BATCH):
        at = part.repeat(len(SHARES))
        reach = torch.cat([share * certified[part].minimum(farthest) for share in SHARES])
        start = starts(x[at], reach, name, known.x_adv.double()[at], generator)
        largest.append(climb(net, x[at], y[at], reach, name, start, box))
    found = torch.cat([part.view(len(SHARES), -1) for part in largest], 1)
    clean = margin(net(x[rows]), y[rows]).detach()
    near = (certified / known.distance)[rows].sort().values
    return {
        "images": len(rows),
        "optimised": int((rows % OPTIMISED == 0).sum()),
        "tuples": found.numel(),
        "violations": int((found >= 0).sum()),
        "known_errors_within": int((known.distance <= certified)[rows].sum()),
        # how much of the margin the best attack left, at the worst image: 0 is an error
        "least_margin_left": float((found / clean).min()),
        "radius_over_distance": {"median": float(near[len(near) // 2]), "largest": float(near[near.isfinite()][-1])},
        "seconds": {"certificates": round(middle - begin, 1), "attacks": round(time.monotonic() - middle, 1)},
    }


def study(name: str, images: int | None = None) -> dict[str, Any]:
    """Hunt one network in all norms."""
    net, x, y = load(name)
    found = {}
    for norm_name in NORMS:
        count = FEW if name in SLOW and norm_name != "Linf" else images
        found[norm_name] = hunt(net, x[:count], y[:count], norm_name)
        print(name, norm_name, json.dumps(found[norm_name]), flush=True)
    return found


@contextlib.contextmanager
def planted() -> Iterator[None]:
    """An unsound certificate: the offsets of the lines above ReLU have the wrong sign."""

    def wrong(low: Tensor, high: Tensor) -> Lines:
        lines = relu_lines(low, high)
        return lines._replace(upper_offset=-lines.upper_offset)

    sound, propagation.relu_lines = propagation.relu_lines, wrong
    try:
        yield
    finally:
        propagation.relu_lines = sound


def write(name: str, networks: dict[str, Any], plant: bool) -> None:
    """A record of what was found."""
    record = {
        "study": "hunt", "planted": plant, "shares": SHARES, "starts": STARTS, "steps": STEPS, "networks": networks,
        "provenance": provenance(),
    }  # fmt: skip
    with write_atomically(FOLDER / f"{name}.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def main() -> int:
    """Hunt the networks named, by default all at hand; fail where a certificate was beaten and none was planted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="which; by default all")
    parser.add_argument("--plant", action="store_true", help="break the bounds first")
    args = parser.parse_args()
    if args.plant:
        with planted():
            write("planted", {name: study(name, 20) for name in args.names or PLANTED}, True)
        return 0
    beaten = 0
    for name in args.names or IMAGES:
        try:
            found = study(name)
        except DataUnavailable as error:
            print(f"{name}: left out. {error}", flush=True)
            continue
        write(name, {name: found}, False)
        beaten += sum(v["violations"] + v["known_errors_within"] for v in found.values())
    print(f"{beaten} violations")
    return int(beaten > 0)


if __name__ == "__main__":
    sys.exit(main())
