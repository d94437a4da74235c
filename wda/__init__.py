"""Wasserstein distributional attacks and certificates for neural networks."""

from wda import attacks, data, losses, models, norms
from wda.attacks import attack
from wda.distribution import AdversarialDistribution
from wda.errors import BudgetExceeded, DataUnavailable
from wda.threat import Threat

__version__ = "0.1.0"

__all__ = [
    "AdversarialDistribution",
    "BudgetExceeded",
    "DataUnavailable",
    "Threat",
    "attack",
    "attacks",
    "data",
    "losses",
    "models",
    "norms",
]
