"""Random modules that are refused by name, or read as what they compute: from layers, torch functions and bad habits.

    python workflow/fuzz_modules.py            # 2,400 modules, a few minutes on one core

Each module is a chain of pieces; some pieces may be read, others not, and many are hidden: in a branch of weight 1e-6,
or in one that is off near the inputs and on elsewhere. A module that is read is compared with a copy of itself in
float64 at points near, far, at corners and along rays, alone and in a batch. Every tenth of those is certified and
attacked: an error of the module itself within a certified ball would be a false certificate. The counts go to
data/results/fuzz/modules.json.
"""

from __future__ import annotations

import copy
import json
import operator
import random
import re
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from wda import NotPiecewiseAffine, certificates, distances
from wda.experiment import provenance
from wda.files import write_atomically
from wda.losses import margin
from wda.nets import Net, from_module
from wda.norms import norm, project

FILE = Path(__file__).parents[1] / "data" / "results" / "fuzz" / "modules.json"
MODULES = 2400
HUNTED = 10
WIDTH = 6
NORMS = ("Linf", "L2", "L1")

Function = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A function of the value, with layers of its own if it needs some."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


class Doubled(nn.Linear):
    """A linear layer that is another one than its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x).abs()


class Shifted(nn.ReLU):
    """An activation that is another one than its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - 0.3).sin()


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of what does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Counting(nn.Module):
    """Behaves in another way from the third pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x if self.passes < 3 else -x


class Precise(nn.Module):
    """Behaves in another way in float64; in a module that is made in float64 that is the way it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sign", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * x if self.sign.dtype == torch.float32 else x.abs()


class Averaging(nn.Module):
    """Keeps a running mean of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1)
        return x - self.mean


def _linear(out: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, out)


def _normalised() -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(WIDTH)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return layer


def _patched() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = types.MethodType(lambda self, x: torch.relu(x) + (x > 3) * x, layer)
    return layer


def _hooked() -> nn.Module:
    layer = _linear()
    layer.register_forward_hook(lambda layer, given, result: result.clamp(max=4))
    return layer


def _twice() -> nn.Module:
    layer = _linear()
    return nn.Sequential(layer, nn.ReLU(), layer)


def _branching(x: Tensor) -> Tensor:
    try:
        return x if x.sum() < 30 else -x
    except Exception:  # what a stand-in for a tensor raises
        return x


def _viewed(x: Tensor, layer: nn.Module) -> Tensor:
    h = layer(x)
    functional.relu_(h.view(-1, 2, WIDTH // 2))
    return h


def _overwritten(x: Tensor, layer: nn.Module) -> Tensor:
    h = layer(x)
    same = h
    h += 1
    return same + functional.silu(functional.relu(h, inplace=True), inplace=True) + h


def _accumulated(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    h = torch.relu(first(x))
    h += second(x)
    h *= 0.5
    h -= x
    return h


def _filled(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0.5
    return x


def _gated(x: Tensor, layer: nn.Module) -> Tensor:
    a, b = layer(x).chunk(2, 1)
    return torch.cat([a * b.sigmoid(), b], 1)


def _pieces(x: Tensor, layer: nn.Module) -> Tensor:
    a, b = layer(x).chunk(2, 1)
    return torch.cat([torch.relu(b), a - torch.relu(b)], 1)


def _split(x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [1, 2, WIDTH - 3], dim=1)
    return torch.cat((c, a, torch.relu(b)), dim=1)


def _unbound(x: Tensor) -> Tensor:
    rows = x.view(x.shape[0], 2, WIDTH // 2).unbind(1)
    return torch.cat([rows[1], rows[0] + torch.relu(rows[1])], -1)


def _attend(x: Tensor, attention: nn.Module) -> Tensor:
    tokens = x.view(x.size(0), WIDTH // 2, 2)
    return x + attention(tokens, tokens, tokens)[0].flatten(1)


# what may be read; some of it need not be
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "linear": _linear,
    "without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu function": lambda: Apply(functional.relu),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: Apply(lambda x: functional.gelu(x, approximate="tanh")),
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(beta=random.choice([0.2, 1.0, 7.0])),
    "softplus function": lambda: Apply(lambda x: functional.softplus(x, 2, 25)),
    "sigmoid": nn.Sigmoid,
    "batch norm": _normalised,
    "dropout": nn.Dropout,
    "dropout off": lambda: Apply(lambda x: functional.dropout(x, 0.5, False)),
    "shift": lambda: Apply(partial(operator.add, torch.randn(WIDTH).double())),
    "shift behind": lambda: Apply(lambda x: 1 - x),
    "scale": lambda: Apply(partial(operator.mul, torch.randn(WIDTH).double())),
    "large and small": lambda: Apply(lambda x: (x * 1e10) / 1e10),
    "negative": lambda: Apply(lambda x: -x),
    "residual": lambda: Apply(lambda x, f: x + f(x), nn.Sequential(_linear(), nn.ReLU(), _linear())),
    "difference": lambda: Apply(lambda x, f, g: f(x) - g(x), _linear(), nn.Sequential(_linear(), nn.ReLU())),
    "chunk": lambda: Apply(_pieces, _linear()),
    "split": lambda: Apply(_split),
    "unbind": lambda: Apply(_unbound),
    "slices": lambda: Apply(lambda x: torch.cat([x[:, 2:], x[..., :2]], 1)),
    "concatenation": lambda: Apply(lambda x, f: torch.cat([x[:, :3], torch.relu(f(x))], dim=1), _linear(3)),
    "mean kept": lambda: Apply(lambda x: x - x.mean(1, True)),
    "mean of the last": lambda: Apply(lambda x: x + torch.mean(x, -1, keepdim=True)),
    "transposed": lambda: Apply(lambda x: x.view(-1, 2, WIDTH // 2).transpose(1, 2).flatten(1)),
    "reshaped": lambda: Apply(lambda x: x.unsqueeze(1).squeeze(1).reshape(x.size(0), -1)),
    "used twice": _twice,
    "weights by a parametrisation": lambda: parametrizations.weight_norm(_linear()),
    "in parallel": lambda: nn.DataParallel(nn.Sequential(_linear(), nn.ReLU())),
    "nested": lambda: nn.Sequential(nn.Sequential(_linear(), nn.Sequential(nn.ReLU())), nn.Identity()),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "overwritten": lambda: Apply(_overwritten, _linear()),
    "sum in place": lambda: Apply(_accumulated, _linear(), _linear()),
}

# what must be refused, or read as what it is
ODD: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: Apply(_gated, _linear()),
    "max": lambda: Apply(lambda x: x - x.max(1, keepdim=True).values),
    "max, by index": lambda: Apply(lambda x: x + x.max(1)[0].unsqueeze(1)),
    "top": lambda: Apply(lambda x: x.topk(WIDTH, 1)[0]),
    "sorted": lambda: Apply(lambda x: torch.sort(x, 1).values),
    "pooled with indices": lambda: Apply(
        lambda x: x + functional.max_pool1d(x[:, None], 3, 1, 1, return_indices=True)[0][:, 0]
    ),
    "attention": lambda: Apply(_attend, nn.MultiheadAttention(2, 1, batch_first=True)),
    "where": lambda: Apply(lambda x: torch.where(x > 2, x, -x)),
    "clamp": lambda: Apply(lambda x: x.clamp(-1, 3)),
    "leaky relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda: Apply(lambda x: functional.hardtanh(x, -2, 2)),
    "abs": lambda: Apply(lambda x: x.abs()),
    "root": lambda: Apply(lambda x: (x * x + 1).sqrt()),
    "square": lambda: Apply(lambda x: x * x),
    "square of a constant": lambda: Apply(lambda x: x * x.detach()),
    "data": lambda: Apply(lambda x: x + torch.relu(x.data)),
    "alpha": lambda: Apply(lambda x: torch.add(x, torch.relu(x), alpha=3)),
    "sign": lambda: Apply(lambda x: x + x.sign()),
    "softmax": lambda: nn.Softmax(1),
    "log-softmax within": lambda: nn.LogSoftmax(1),
    "low softplus": lambda: Apply(partial(functional.softplus, threshold=random.choice([1, 5, 19]))),
    "concave softplus": lambda: Apply(lambda x: functional.softplus(x, beta=-1)),
    "dropout on": lambda: Apply(partial(functional.dropout, p=random.choice([0.5, 1e-9, 1.0]))),
    "noise": lambda: Apply(lambda x: x + 1e-9 * torch.rand(WIDTH)),
    "noise like it": lambda: Apply(lambda x: x + torch.randn_like(x)),
    "batch mean": lambda: Apply(lambda x: x - x.mean(0)),
    "batch mean kept": lambda: Apply(lambda x: x - x.mean(0, keepdim=True)),
    "batch size": lambda: Apply(lambda x: x * x.size(0)),
    "batch size in a shape": lambda: Apply(lambda x: x + torch.relu(x - 20) * (x.shape[0] // 4)),
    "first samples": lambda: Apply(lambda x: x + x[:1]),
    "turned": lambda: Apply(lambda x: x + x.flip(0)),
    "filled": lambda: Apply(_filled),
    "added in place": lambda: Apply(lambda x: x.clone()[:, 0:1].add_(1) + x),
    "through a view": lambda: Apply(_viewed, _linear()),
    "branch": lambda: Apply(_branching),
    "branch by type": lambda: Apply(lambda x: torch.where(x > 9, -x, x) if isinstance(x, Tensor) else x),
    "branch by gradients": lambda: Apply(lambda x: x if torch.is_grad_enabled() else torch.relu(x)),
    "branch by precision": Precise,
    "counting": Counting,
    "averaging": Averaging,
    "another linear": lambda: Doubled(WIDTH, WIDTH),
    "another relu": Shifted,
    "patched": _patched,
    "hooked": _hooked,
    "straight through": lambda: Apply(Straight.apply),
    "single precision": lambda: Apply(lambda x: x.float().double()),
    "number taken": lambda: Apply(lambda x: x * float(x.sum() > 3)),
    "norm": lambda: Apply(lambda x: x / (1 + x.norm(dim=1, keepdim=True))),
    "sum of products": lambda: Apply(lambda x: torch.einsum("ni,nj->n", x, x)[:, None] + x),
    "running sum": lambda: Apply(lambda x: x.cumsum(1)),
    "batch statistics": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
}


def hidden(piece: nn.Module) -> nn.Module:
    """A piece as it is, at a weight of 1e-6, or where it is off near the inputs."""
    kind = random.randrange(4)
    if kind == 0:
        return piece
    if kind == 1:
        return Apply(lambda x, f: x + 1e-6 * f(x), piece)
    far = random.choice([3.0, 30.0])
    if kind == 2:
        return Apply(lambda x, f: x + torch.relu(f(torch.relu(x - far)) - 5), piece)
    return Apply(lambda x, f, g: x + g(torch.relu(f(x) - far)), piece, nn.Linear(WIDTH, WIDTH, bias=False))


def stem() -> tuple[nn.Module, tuple[int, ...]]:
    """The first layers, up to a vector of `WIDTH`, and the shape of an input."""
    if random.random() < 0.75:
        n = random.choice([2, 3, 5])
        return nn.Linear(n, WIDTH), (n,)
    pool = random.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Identity(), nn.AdaptiveAvgPool2d(2)])
    layers = [nn.Conv2d(1, 2, 3, padding=1, bias=random.random() < 0.5), nn.BatchNorm2d(2), nn.ReLU(), pool]
    if random.random() < 0.5:
        mean = Apply(lambda x: x.mean((2, 3), True))
        return nn.Sequential(*layers, mean, nn.Flatten(), nn.Linear(2, WIDTH)), (1, 4, 4)
    features = 2 * (16 if isinstance(pool, nn.Identity) else 4)
    return nn.Sequential(*layers, Apply(lambda x: x.view(x.size(0), -1)), nn.Linear(features, WIDTH)), (1, 4, 4)


def module(seed: int) -> tuple[nn.Module, tuple[int, ...], list[str]]:
    """A random module in evaluation mode, the shape of its inputs, and what it was made of."""
    torch.manual_seed(seed)
    random.seed(seed)
    first, shape = stem()
    names = random.choices(list(PLAIN), k=random.randint(1, 4))
    pieces = [PLAIN[name]() for name in names]
    if random.random() < 0.5:
        odd = random.choice(list(ODD))
        place = random.randint(0, len(pieces))
        pieces.insert(place, hidden(ODD[odd]()))
        names.insert(place, odd)
    elif random.random() < 0.5:
        place = random.randrange(len(pieces))
        pieces[place] = hidden(pieces[place])
    last: list[nn.Module] = [_linear(3)]
    if random.random() < 0.1:
        last.append(nn.LogSoftmax(random.choice([1, -1])))
    model = nn.Sequential(first, *pieces, *last)
    if random.random() < 0.1:
        for parameter in model.parameters():
            parameter.data *= random.choice([1e-5, 1e3, 1e10]) ** (parameter.ndim > 1)
    return model.double().eval(), shape, names


def points(shape: tuple[int, ...], seed: int) -> Tensor:
    """Near, far, at corners of the box, on a grid and along rays."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    near = torch.rand(60, *shape, **options)
    far = [scale * torch.randn(30, *shape, **options) for scale in (0.1, 1.0, 5.0, 30.0, 200.0, 5e3)]
    corners = torch.randint(0, 2, (20, *shape), generator=generator).double()
    directions = torch.randn(4, 1, *shape, **options)
    lengths = torch.logspace(-2, 4, 20, dtype=torch.float64).view(1, -1, *[1] * len(shape))
    return torch.cat([near, *far, corners, (0.5 + directions * lengths).flatten(0, 1)])


def alike(net: Net, model: nn.Module, x: Tensor) -> bool:
    """Whether the network read gives what the module gives, alone and in a batch."""
    reference = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        told = torch.cat([reference(part.clone()) for part in (x[:1], x[1:4], x[4:]) if len(part)])
        values = net.values(x)
    size = torch.stack([v.flatten(1).abs().amax(1) for v in values]).amax(0)
    read = values[-1].log_softmax(1) if net.normalised else values[-1]
    lost = ~read.isfinite() & ~told.isfinite()
    return bool((((read - told).abs() <= 1e-10 * size[:, None]) | lost).all())


def named(error: Exception) -> str:
    """The layer or function that a refusal names; empty if it names none."""
    found = re.match(r"(?:model: )?([\w.]+(?: '[\w.]*')?)(?::| has| is| jumps| stays| '|'s)", str(error))
    return re.sub(r" '.*", "", found[1]) if found else ""


def examine(seed: int) -> tuple[str, Net | None]:
    """What came of reading one module: "read", "misread", or "refused: NAME"; and the network read."""
    model, shape, _ = module(seed)
    x = points(shape, seed)
    try:
        net = from_module(model, shape, x[:4])
    except (NotPiecewiseAffine, ValueError) as error:
        return f"refused: {named(error)}", None
    return ("read" if alike(net, model, x) else "misread"), net


def hunt(net: Net, seed: int) -> dict[str, int]:
    """Certify some samples of a module that was read, and look for errors of the module in the certified balls."""
    model, shape, _ = module(seed)
    name, box = NORMS[seed % 3], (0.0, 1.0)
    x = points(shape, seed + 1)[:4]
    with torch.no_grad():
        y = model(x.clone()).argmax(1)
    method = ("linear", "interval", "lipschitz", "optimised")[seed // 3 % 4]
    try:
        certified = certificates.radius(net, x, y, name, box, method=method, tolerance=0.2)
    except NotPiecewiseAffine:
        return {}
    try:
        found = distances(model, x, y, name, box, steps=8, restarts=2, progress=False)
    except RuntimeError:  # changes in place may cost a module its gradients
        found = distances(net, x, y, name, box, steps=8, restarts=2, progress=False)
    with torch.no_grad():
        agrees = alike(net, model, found.x_adv)
        reach = certified.clamp(max=3.0)
        steps = torch.randn(60, *x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        steps[::2] = steps[::2].sign()
        inside = project((x + 9 * steps).flatten(0, 1), x.repeat(60, *[1] * len(shape)), reach.repeat(60), name, box)
        inside = inside[norm(inside - x.repeat(60, *[1] * len(shape)), name) <= reach.repeat(60)]
        labels = y.repeat(60)[: len(inside)] if len(inside) == 60 * len(x) else None
        if labels is None:  # rounding of a projection put some outside
            inside, labels = x, y
        logits = model(inside.clone())
    # within rounding of 0 a margin says nothing
    excess = margin(logits, labels) - 1e-12 * logits.abs().amax(1)
    return {
        "samples": len(x),
        "certified": int((certified > 1e-300).sum()),
        "errors within": int((found.distance < certified).sum()) + int((excess > 0).sum()) + int(not agrees),
    }


def main() -> int:
    """Fuzz, hunt and record; fail where a module was misread or a certificate false."""
    torch.set_num_threads(1)
    start = time.monotonic()
    count: Counter[str] = Counter()
    hunted: Counter[str] = Counter()
    wrong: list[int] = []
    for seed in range(MODULES):
        outcome, net = examine(seed)
        count[outcome] += 1
        if outcome in ("misread", "refused: "):
            wrong.append(seed)
        if net is not None and count["read"] % HUNTED == 0:
            hunted.update({"modules": 1, **hunt(net, seed)})
    record = {
        "study": "fuzz of modules",
        "modules": MODULES,
        "read": count.pop("read", 0),
        "misread": count.pop("misread", 0),
        "refused": {name.removeprefix("refused: "): n for name, n in sorted(count.items())},
        "seeds of misread or unnamed": wrong,
        "hunt": dict(hunted),
        "pieces": {"plain": len(PLAIN), "odd": len(ODD)},
        "seconds": round(time.monotonic() - start, 1),
        "provenance": provenance(),
    }
    with write_atomically(FILE) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps({k: v for k, v in record.items() if k != "provenance"}, indent=1))
    return int(bool(wrong) or hunted["errors within"] > 0)


if __name__ == "__main__":
    sys.exit(main())
