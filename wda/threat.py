"""The threat model: which distributions the adversary may choose."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wda.checks import interval, number
from wda.norms import exponent

__all__ = ["Threat", "radius_text"]


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
        0 is allowed: nothing moves. A warning says where the whole box is within reach, as with 8 for ``"8/255"``.
    order : float
        The order p of the Wasserstein distance, from 1 to ``math.inf`` (also ``"inf"``).
    box : (float, float) or None
        Every coordinate of every point stays within these bounds, rounded to the dtype of the points; ``None`` for no
        bounds.

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

    if TYPE_CHECKING:  # what may be given is more than what is kept

        def __init__(
            self,
            norm: str = "Linf",
            eps: float | str = 8 / 255,
            order: float | str = 1.0,
            box: tuple[float, float] | None = (0.0, 1.0),
        ) -> None: ...

    def __post_init__(self) -> None:
        exponent(self.norm)
        accepted = f'0, a finite number from {sys.float_info.min:.3g} on, or a fraction such as "8/255",'
        eps = number("eps", self.eps, accepted, 0, sys.float_info.max)
        if 0 < eps < sys.float_info.min:  # such numbers have few digits left, or one
            raise ValueError(f"eps={self.eps!r}: {accepted} is accepted")
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "order", number("order", self.order, "a number >= 1, or math.inf,", 1, math.inf))
        object.__setattr__(self, "box", interval("box", self.box))
        if self.norm == "Linf" and self.box is not None and self.eps > self.box[1] - self.box[0]:
            warnings.warn(
                f"eps={self.eps!r} is more than the width of box={self.box}, so all of it is within reach: "
                "did you mean '8/255' or the like?",
                stacklevel=3,
            )

    def stored(self) -> dict[str, object]:
        """As files hold it, see `of_stored`; JSON has no infinity, so the order is text.

        Examples
        --------
        >>> Threat("L2", 0.5, "inf").stored()
        {'norm': 'L2', 'eps': 0.5, 'order': 'inf', 'box': (0.0, 1.0)}
        """
        return {"norm": self.norm, "eps": self.eps, "order": str(self.order), "box": self.box}

    @classmethod
    def of_stored(cls, held: Mapping[str, Any]) -> Threat:
        """The threat that a file holds.

        Raises
        ------
        ValueError, TypeError
            It holds something else than `stored` gave.

        Examples
        --------
        >>> Threat.of_stored(Threat("L2", 0.5, "inf").stored())
        Threat(norm='L2', eps=0.5, order=inf, box=(0.0, 1.0))
        """
        threat = cls(**held)
        given = {**held, "box": None if held["box"] is None else tuple(held["box"])}
        if threat.stored() != given:
            raise ValueError(f"threat={held}: {threat.stored()} is accepted")
        return threat

    def __str__(self) -> str:
        order = "inf" if math.isinf(self.order) else f"{self.order:g}"
        return f"W_{order} {self.norm} {radius_text(self.eps)}"


def radius_text(eps: float) -> str:
    """How a radius is written: ``8/255`` where it is that many 255ths and no short decimal, all its digits elsewhere.

    Examples
    --------
    >>> radius_text(8 / 255), radius_text(0.2), radius_text(2.0)
    ('8/255', '0.2', '2')
    """
    digits = repr(eps).removesuffix(".0")
    steps = round(255 * min(eps, 255.0))  # beyond, no image is measured in such steps
    return f"{steps}/255" if steps / 255 == eps and len(digits) > len("0.255") else digits
