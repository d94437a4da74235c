"""Train the models that come with the package, and write them to data/models.

    python workflow/train_models.py                    # train all, write weights and cards
    python workflow/train_models.py --check            # train again, compare accuracies with the cards, write nothing

Each is a small network on scikit-learn's digits, trained with a fixed seed. On another machine rounding differs, so
weights do too; accuracies are expected within half a point of the card's.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

import wda
from wda import data, models
from wda.files import write_atomically
from wda.losses import margin

FOLDER = Path(__file__).parents[1] / "data" / "models"
TOLERANCE = 0.5  # points


def multilayer(*widths: int, activation: type[nn.Module]) -> nn.Sequential:
    """A fully connected network on 8 by 8 images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), activation()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def transformer(*, norm_last: bool, width: int = 32, heads: int = 4) -> nn.Sequential:
    """A vision transformer (Dosovitskiy et al. 2021) on 16 patches of 2 by 2 pixels, with two pre-norm blocks.

    Pre-norm: the normalisation is in the branches, so what passes between the blocks is not bounded. `norm_last` puts
    one more before the head, and with it the logits are.
    """

    def block() -> list[nn.Module]:
        attend = models.Attention(nn.Linear(width, 3 * width), nn.Linear(width, width), heads)
        mlp = (nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        branches = nn.Sequential(nn.LayerNorm(width), attend), nn.Sequential(nn.LayerNorm(width), *mlp)
        return [models.Residual(branch, nn.Sequential()) for branch in branches]

    return nn.Sequential(
        *(nn.Conv2d(1, width, 2, stride=2), models.Tokens(), models.Position(0.02 * torch.randn(16, width))),
        *(*block(), *block(), models.TokenMean()),
        *([nn.LayerNorm(width)] if norm_last else []),
        nn.Linear(width, 10),
    )


NETWORKS = {
    "digits-mlp": lambda: multilayer(64, 48, 10, activation=nn.ReLU),
    "digits-cnn": convolutional,
    "digits-cnn-adv": convolutional,
    "digits-gelu": lambda: multilayer(64, 48, 48, 10, activation=nn.GELU),
    "digits-vit": lambda: transformer(norm_last=True),
    "digits-vit-nonorm": lambda: transformer(norm_last=False),
}
RECIPE = {
    "seed": 0,
    "epochs": 60,
    "batch": 64,
    "optimiser": "Adam",
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "weight_decay": 1e-4,
}
ADVERSARY = {"attack": "pgd", "norm": "Linf", "eps": 0.15, "steps": 10}
DIFFERENCES = {
    "digits-cnn-adv": {"epochs": 100, "adversary": ADVERSARY},
    "digits-vit": {"epochs": 100},
    "digits-vit-nonorm": {"epochs": 100},
}
OPS = {
    nn.Linear: "linear",
    nn.Conv2d: "conv2d",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.Flatten: "flatten",
    nn.LayerNorm: "layernorm",
    models.Attention: "attention",
    models.Position: "position",
    models.Residual: "residual",
    models.TokenMean: "meanpool",
    models.Tokens: "tokens",
}


def recipe(name: str) -> dict:
    """How a model is trained."""
    return RECIPE | DIFFERENCES.get(name, {})


def train(name: str) -> nn.Sequential:
    """A trained network."""
    how = recipe(name)
    torch.manual_seed(how["seed"])
    net = NETWORKS[name]()
    x, y = data.load("digits", "train")
    optimiser = torch.optim.Adam(net.parameters(), lr=how["learning_rate"], weight_decay=how["weight_decay"])
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how["epochs"])
    for epoch in range(how["epochs"]):
        for rows in torch.randperm(len(x)).split(how["batch"]):
            inputs = _attacked(net, x[rows], y[rows], how.get("adversary"), epoch)
            loss = nn.functional.cross_entropy(net(inputs), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        rate.step()
        if sys.stderr.isatty():
            print(
                f"\r{name}: epoch {epoch + 1}/{how['epochs']}, loss {loss.item():.4f}   ",
                end="",
                file=sys.stderr,
            )
    return net.eval()


def _attacked(net: nn.Module, x: Tensor, y: Tensor, adversary: dict | None, seed: int) -> Tensor:
    if adversary is None:
        return x
    threat = wda.Threat(adversary["norm"], adversary["eps"], order=float("inf"))
    return wda.attack(adversary["attack"], net, x, y, threat, steps=adversary["steps"], seed=seed, progress=False).x_adv


def accuracy(net: nn.Module, split: str) -> float:
    """Per cent of the images of a split that are classified correctly."""
    x, y = data.load("digits", split)
    with torch.no_grad():
        return round(100 * (margin(net(x), y) < 0).double().mean().item(), 2)


def layers(net: nn.Sequential, path: str = "") -> list[dict]:
    """The list of layers that `wda.models.build` reads; `path` is where the network is in a larger one."""
    return [{"op": OPS[type(module)], **options(module, f"{path}{position}.")} for position, module in enumerate(net)]


def options(module: nn.Module, path: str) -> dict:
    """What the list says of a layer beside its op; the names of its tensors in the weights begin with `path`."""
    affine = {"weight": f"{path}weight", "bias": f"{path}bias"}
    match module:
        case nn.Linear():
            return affine
        case nn.Conv2d():
            return {**affine, "stride": module.stride[0], "padding": module.padding[0]}
        case nn.LayerNorm():
            return {**affine, "eps": module.eps}
        case models.Attention():
            qkv = {"qkv": f"{path}qkv.weight", "qkv_bias": f"{path}qkv.bias"}
            output = {"output": f"{path}output.weight", "output_bias": f"{path}output.bias"}
            return {"heads": module.heads, **qkv, **output}
        case models.Position():
            return {"embedding": f"{path}embedding"}
        case models.Residual():
            return {part: layers(getattr(module, part), f"{path}{part}.") for part in ("branch", "shortcut")}
    return {}


def write(name: str, net: nn.Sequential, seconds: float) -> None:
    """Write the weights and, last, the card that states their checksum."""
    weights = save(net.state_dict())
    with write_atomically(FOLDER / f"{name}.safetensors") as file:
        file.write(weights)
    card = {
        "name": name,
        "data": "digits",
        "weights_file": f"{name}.safetensors",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "input": {"shape": [1, 8, 8], "range": [0, 1]},
        "layers": layers(net),
        "accuracy_percent": {split: accuracy(net, split) for split in ("train", "test")},
        "training": {
            "script": "workflow/train_models.py",
            **recipe(name),
            "seconds": round(seconds, 1),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "licence": "MIT, as the rest of this project",
    }
    with write_atomically(FOLDER / f"{name}.json") as file:
        file.write((json.dumps(card, indent=2) + "\n").encode())


def check(name: str, net: nn.Sequential) -> bool:
    """Whether the accuracies of a fresh training are those of the card, within the tolerance."""
    stated = models.card(name)["accuracy_percent"]
    found = {split: accuracy(net, split) for split in stated}
    fits = all(abs(found[split] - stated[split]) <= TOLERANCE for split in stated)
    print(
        f"{name}: card {stated}, trained again {found}: {'within' if fits else 'NOT within'} {TOLERANCE} points",
        flush=True,
    )
    return fits


def main() -> int:
    """Train, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NETWORKS), help=f"which; by default {', '.join(NETWORKS)}")
    parser.add_argument("--check", action="store_true", help="compare with the cards and write nothing")
    options = parser.parse_args()
    fits = True
    for name in options.names:
        start = time.monotonic()
        net = train(name)
        if options.check:
            fits &= check(name, net)
        else:
            write(name, net, time.monotonic() - start)
            print(name, models.card(name)["accuracy_percent"], flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
