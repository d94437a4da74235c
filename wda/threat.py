"""The threat model: which distributions the adversary may choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from wda.norms import exponent

__all__ = ["Threat"]


@dataclass(frozen=True)
class Threat:
    r"""A Wasserstein ball :math:`\Omega_p` around the empirical distribution (eq. 3 of the first paper).

    The ball holds every distribution whose :math:`W_p` distance from the sample is at most ``eps``, for the
    ground cost :math:`\|x'-x\|_r`, infinite where the labels differ. ``order=math.inf`` is the usual
    point-wise threat model.

    Parameters
    ----------
    norm : {"Linf", "L2", "L1"}
        Norm of the ground cost, named as RobustBench names it.
    eps : float or str
        Radius of the ball, in units of the input (pixels in [0, 1]). A string may be a fraction, ``"8/255"``.
        0 is allowed: nothing moves.
    order : float
        The order p of the Wasserstein distance, from 1 to ``math.inf`` (also ``"inf"``).
    box : (float, float) or None
        Every coordinate of every point stays within these bounds; ``None`` for no bounds.

    Raises
    ------
    ValueError, TypeError
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> Threat("Linf", eps="8/255", order=2).eps
    0.03137254901960784
    """

    norm: str = "Linf"
    eps: float = 8 / 255
    order: float = 1.0
    box: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        exponent(self.norm)
        object.__setattr__(self, "eps", _radius(self.eps))
        object.__setattr__(self, "order", _order(self.order))
        object.__setattr__(self, "box", _box(self.box))

    def __str__(self) -> str:
        order = "inf" if math.isinf(self.order) else f"{self.order:g}"
        return f"W_{order} {self.norm} {self.eps:.4g}"


def _number(name: str, value: object, accepted: str) -> float:
    """`value` as a float; strings may be fractions."""
    try:
        if isinstance(value, str):
            return math.inf if value.strip().lower() == "inf" else float(Fraction(value.strip()))
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{name}={value!r}: {accepted} is accepted") from error
    raise TypeError(f"{name}={value!r}: {accepted} is accepted")


def _radius(eps: object) -> float:
    accepted = 'a finite number >= 0, or a fraction such as "8/255",'
    value = _number("eps", eps, accepted)
    if not 0 <= value < math.inf:
        raise ValueError(f"eps={eps!r}: {accepted} is accepted")
    return value


def _order(order: object) -> float:
    accepted = "a number >= 1, or math.inf,"
    value = _number("order", order, accepted)
    if not value >= 1:
        raise ValueError(f"order={order!r}: {accepted} is accepted")
    return value


def _box(box: object) -> tuple[float, float] | None:
    if box is None:
        return None
    accepted = "a pair (low, high) of finite numbers with low < high, or None,"
    if not isinstance(box, tuple | list) or len(box) != 2:
        raise TypeError(f"box={box!r}: {accepted} is accepted")
    low, high = (_number("box", side, accepted) for side in box)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"box={box!r}: {accepted} is accepted")
    return low, high
