"""Wasserstein distributional attacks and certificates for neural networks."""

import importlib
from typing import TYPE_CHECKING, Any

from wda import attacks, data, losses, models, nets, norms, training
from wda.attacks import Distances, attack, distances
from wda.budget import allocate, robust_accuracy
from wda.distribution import AdversarialDistribution
from wda.errors import BudgetExceeded, DataUnavailable, NotPiecewiseAffine, Untrustworthy
from wda.threat import Threat

if TYPE_CHECKING:
    from wda import cells, certificates
    from wda.evaluate import Bracket, bracket

__version__ = "0.1.0"

__all__ = [
    "AdversarialDistribution",
    "Bracket",
    "BudgetExceeded",
    "DataUnavailable",
    "Distances",
    "NotPiecewiseAffine",
    "Threat",
    "Untrustworthy",
    "allocate",
    "attack",
    "attacks",
    "bracket",
    "cells",
    "certificates",
    "data",
    "distances",
    "losses",
    "models",
    "nets",
    "norms",
    "robust_accuracy",
    "training",
]


def __getattr__(name: str) -> Any:
    """Import what needs SciPy's solvers when it is first used: they would make `import wda` slow."""
    if name in ("cells", "certificates"):
        return importlib.import_module(f"wda.{name}")
    if name in ("bracket", "Bracket"):
        return getattr(importlib.import_module("wda.evaluate"), name)
    raise AttributeError(f"module 'wda' has no attribute {name!r}")
