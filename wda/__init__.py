"""Wasserstein distributional attacks and certificates for neural networks."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from wda import attacks, data, losses, models, nets, norms
from wda.attacks import Distances, attack, distances
from wda.budget import allocate
from wda.distribution import AdversarialDistribution
from wda.errors import BudgetExceeded, DataUnavailable, NotPiecewiseAffine, Untrustworthy
from wda.threat import Threat

if TYPE_CHECKING:
    from wda import cells, certificates

__version__ = "0.1.0"

__all__ = [
    "AdversarialDistribution",
    "BudgetExceeded",
    "DataUnavailable",
    "Distances",
    "NotPiecewiseAffine",
    "Threat",
    "Untrustworthy",
    "allocate",
    "attack",
    "attacks",
    "cells",
    "certificates",
    "data",
    "distances",
    "losses",
    "models",
    "nets",
    "norms",
]


def __getattr__(name: str) -> ModuleType:
    """Import what needs SciPy's solvers when it is first used: they would make `import wda` slow."""
    if name in ("cells", "certificates"):
        return importlib.import_module(f"wda.{name}")
    raise AttributeError(f"module 'wda' has no attribute {name!r}")
