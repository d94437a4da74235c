"""Random numbers that can be drawn again: each draw belongs to a place in a run, and depends on nothing else.

So there is no state of a generator to keep. A run that was killed goes on as if it had not been, and no other code that
draws numbers, before or meanwhile, changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["generator", "permutation", "seed_of", "seeded"]


def seed_of(*place: int | str) -> int:
    """A seed of 63 bits for a place, such as a run's seed, an epoch and a batch.

    Examples
    --------
    >>> seed_of(0, "batch", 3) == seed_of(0, "batch", 3) != seed_of(0, "batch", 4)
    True
    """
    digest = hashlib.sha256(json.dumps(place).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*place: int | str) -> torch.Generator:
    """A generator on the CPU that begins at the seed of a place.

    Examples
    --------
    >>> torch.equal(torch.rand(2, generator=generator(0, 1)), torch.rand(2, generator=generator(0, 1)))
    True
    """
    return torch.Generator().manual_seed(seed_of(*place))


@contextmanager
def seeded(device: torch.device, *place: int | str) -> Iterator[None]:
    """Within it what layers draw, as dropout does, belongs to a place; torch's own generators are as before afterwards.

    Examples
    --------
    >>> with seeded(torch.device("cpu"), 0, 1):
    ...     first = torch.rand(2)
    >>> with seeded(torch.device("cpu"), 0, 1):
    ...     torch.equal(first, torch.rand(2))
    True
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_accelerator(device)):
        torch.manual_seed(seed_of(*place))
        yield


def _accelerator(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch goes through n samples.

    Examples
    --------
    >>> permutation(5, seed=0, epoch=1).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    return torch.randperm(n, generator=generator(seed, "order", epoch))
