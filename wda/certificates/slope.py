"""A slope of the worst-case risk, or a Lipschitz constant: known exactly, or between two bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wda.nets import Array

__all__ = ["TOLERANCE", "Slope", "agree"]

# relative gap of a lower and an upper bound that count as one number; everything that is called exact means this
TOLERANCE = 1e-5


def agree(lower: Any, upper: Any) -> Any:
    """Whether two bounds of a number of 0 or more are equal up to a relative 1e-5, or both 0, or both infinite.

    This is what `Slope.exact`, `Nearest.exact` and `Bracket.exact` say: both bounds are known to hold, and they meet.

    Examples
    --------
    >>> agree(1.0, 1.000001), agree(0.0, 1e-300), agree(2.0, 1.0)
    (True, False, False)
    """
    return (upper <= (1 + TOLERANCE) * lower) & (lower <= (1 + TOLERANCE) * upper)


@dataclass(frozen=True, eq=False)
class Slope:
    """A number of 0 or more, known exactly, or between two bounds.

    Attributes
    ----------
    lower, upper : float
        Bounds that hold up to rounding, a relative 1e-9; by "perspective", up to a solver's accuracy, 1e-6.
    method : str
        How they were found.
    direction : float64 array (n,), optional
        Of unit norm, in which the lower bound is had.
    label, rival : int, optional
        The pair that has the lower bound.

    Examples
    --------
    >>> float(Slope(2.0, 2.0, "cells")), Slope(1.0, 2.0, "bounds").exact
    (2.0, False)
    """

    lower: float
    upper: float
    method: str
    direction: Array | None = field(default=None, repr=False)
    label: int | None = None
    rival: int | None = None

    @property
    def exact(self) -> bool:
        """Whether the bounds agree, to a relative 1e-5; as for `Nearest` and `wda.Bracket`."""
        return bool(agree(self.lower, self.upper))

    @property
    def value(self) -> float:
        """The number.

        Raises
        ------
        ValueError
            It is only known between two bounds.
        """
        if not self.exact:
            raise ValueError(f"the slope is only known to lie in [{self.lower}, {self.upper}]: use lower or upper")
        return self.lower

    def __float__(self) -> float:
        return self.value
