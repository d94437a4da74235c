"""Certificates: certified radii, Lipschitz constants, slopes, and the exact value of the worst-case risk.

Slopes and risks are for balls of order 1, radii serve every order. Networks are given as `wda.nets.Net` or as
``nn.Module``; everything is computed in float64.
"""

from wda.certificates.lipschitz import lipschitz
from wda.certificates.nearest import Nearest, nearest
from wda.certificates.radius import radius, verified
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
    "Nearest",
    "Slope",
    "initial_slope",
    "lipschitz",
    "nearest",
    "radius",
    "recession_slope",
    "sample_slope",
    "verified",
    "worst_case_bracket",
    "worst_case_curve",
    "worst_case_distribution",
    "worst_case_risk",
]
