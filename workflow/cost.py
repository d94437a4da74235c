"""What Table 1 and the second paper's study would cost: how large the networks are, and how fast this device works.

    python workflow/cost.py                    # 2 images and 2 steps, three minutes on one core
    python workflow/cost.py --device cuda      # 200 images and the steps of Table 1

For each network, of RobustBench's own definition and without weights: floating-point operations of a pass and of a
gradient with respect to one image, and parameters. For each number of classes: the passes of `wda`, which probes every
class but one. And for WideResNet-28-10 of random weights the attack, and an epoch of fine-tuning on few images:
seconds, memory, operations. The book multiplies these with the passes that the other attacks were seen to take, and
with the batches of the second paper. Needs the extra `zoo`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import wda
from wda import zoo
from wda.experiment import beside_published, provenance
from wda.experiment.records import save
from wda.training import finetune

RECORD = Path(__file__).parents[1] / "data" / "results" / "cost.json"
MEASURED = "robustbench:cifar10/Linf/Wang2023Better_WRN-28-10"
SIDE = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
FEW = {"steps": 2, "probe_steps": 1}  # where there is no GPU


def built(name: str, device: str) -> nn.Module:
    """The network of that name, with the weights that its constructor draws."""
    zoo.package()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    dataset, threat, identifier = zoo.parts(name)
    with torch.device(device):
        net: nn.Module = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat)][identifier]["model"]()
    return net.eval().requires_grad_(False)


def size(name: str) -> dict[str, Any]:
    """Operations for one image, and parameters."""
    dataset = zoo.parts(name)[0]
    # a network on "meta" has no values, and takes no memory; timm's constructors need some
    device = "cpu" if dataset == "imagenet" else "meta"
    net = built(name, device)
    x = torch.rand(1, 3, SIDE[dataset], SIDE[dataset], device=device, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        logits = net(x)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    about = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    return {**about, "parameters": sum(p.numel() for p in net.parameters()), "classes": logits.shape[1]}


def passes(classes: int) -> dict[str, float]:
    """Those of `wda` for one image: the same for every network."""
    n = 50  # two of the passes are there once, however many images there are
    x, y = torch.rand(n, 3), torch.zeros(n, dtype=torch.int64)
    counts = wda.attack("wda", nn.Linear(3, classes), x, y, wda.Threat("Linf", 0.1)).counts
    return {"forward": counts.forward, "backward": counts.backward}


def speed(device: str, images: int, options: dict[str, Any]) -> dict[str, Any]:
    """`wda` on WideResNet-28-10, in single precision."""
    net, on_gpu = built(MEASURED, "cpu").to(device), device.startswith("cuda")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, 3, 32, 32, generator=generator)
    with torch.no_grad():
        y = torch.cat([net(part.to(device)).argmax(1).cpu() for part in x.split(200)])
    clock = time.perf_counter if on_gpu else time.process_time  # other programs on the same cores do not count
    start = clock()
    adv = wda.attack("wda", net, x, y, wda.Threat("Linf", "8/255"), kappa=2, batch_size=200, **options)
    seconds = clock() - start
    # ru_maxrss is in KiB on Linux
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"model": MEASURED, "device": device, "images": images, "options": options, "seconds": seconds} | {
        "memory": memory, "passes": asdict(adv.counts)
    }  # fmt: skip


def tuning(device: str) -> dict[str, Any]:
    """An epoch of fine-tuning the same network: 8 batches as the second paper's on a GPU, else 2 of 2 images."""
    net, on_gpu = built(MEASURED, "cpu").to(device).requires_grad_(True), device.startswith("cuda")
    images, batch_size, estimated, steps = (4096, 512, 4000, 20) if on_gpu else (4, 2, 2, 2)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(images, 3, 32, 32, generator=generator), torch.arange(images) % 10
    settings = {"batch_size": batch_size, "share": estimated / images, "attack_options": {"steps": steps}}
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    with FlopCounterMode(display=False) as counter:
        finetune(net, (x, y), (x[:1], y[:1]), wda.Threat("Linf", "8/255", 2), epochs=1, **settings)
    about = {"device": device, "images": images, "batch_size": batch_size, "estimated": estimated, "steps": steps}
    return {"model": MEASURED, **about, "seconds": clock() - start, "operations": counter.get_total_flops()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, help="of the attack that is timed (default: 200 on a GPU, else 2)")
    parser.add_argument("--output", default=RECORD, type=Path)
    given = parser.parse_args()
    on_gpu = given.device.startswith("cuda")
    measured = speed(given.device, given.images or (200 if on_gpu else 2), {} if on_gpu else FEW)
    print(
        f"{measured['images']} images in {measured['seconds']:.1f} s, {measured['memory'] / 2**30:.2f} GiB", flush=True
    )
    networks = {}
    for name in beside_published().model.unique():
        networks[name] = size(name)
        print(
            f"{name}: {networks[name]['forward'] / 1e9:.1f} GFLOP, {networks[name]['parameters'] / 1e6:.1f} M",
            flush=True,
        )
    classes = sorted({network["classes"] for network in networks.values()})
    record: dict[str, Any] = {"networks": networks, "wda": {str(k): passes(k) for k in classes}, "measured": measured}
    record["finetune"] = tuning(given.device)
    save({**record, "provenance": provenance(given.device)}, given.output)


if __name__ == "__main__":
    main()
