"""Certificates: Lipschitz constants, slopes, and the exact value of the worst-case risk.

The order of the ball is 1. Networks are given as `wda.nets.Net` or as ``nn.Module``; everything is computed in float64.
"""

from wda.certificates.lipschitz import lipschitz
from wda.certificates.recession import recession_slope, sample_slope
from wda.certificates.slope import Slope
from wda.certificates.worst_case import (
    initial_slope,
    worst_case_bracket,
    worst_case_curve,
    worst_case_distribution,
    worst_case_risk,
)

__all__ = [
    "Slope",
    "initial_slope",
    "lipschitz",
    "recession_slope",
    "sample_slope",
    "worst_case_bracket",
    "worst_case_curve",
    "worst_case_distribution",
    "worst_case_risk",
]
