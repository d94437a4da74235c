"""A slope of the worst-case risk, or a Lipschitz constant: known exactly, or between two bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from wda.nets import Array

__all__ = ["Slope"]

_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Slope:
    """A number known exactly, or between two bounds.

    Attributes
    ----------
    lower, upper : float
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
        """Whether the bounds agree to a millionth."""
        return self.upper - self.lower <= _ROUNDING * abs(self.upper)

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
