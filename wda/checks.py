"""Checks of arguments: each returns the value in the type it is used in, or names it and says what is accepted."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from fractions import Fraction
from numbers import Integral, Real

__all__ = ["choice", "flag", "interval", "number", "stored_number", "stored_numbers", "whole"]


def whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`.

    Examples
    --------
    >>> whole("steps", 3)
    3
    """
    if (
        not isinstance(value, Integral)
        or isinstance(value, bool)
        or int(value) < least
        or (most is not None and int(value) > most)
    ):
        limits = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r}: a whole number {limits} is accepted")
    return int(value)


def number(name: str, value: object, accepted: str, least: float, most: float) -> float:
    """A number from `least` to `most`; a string may be a fraction, as "8/255", or "inf".

    Examples
    --------
    >>> number("eps", "1/4", "a number from 0 to 1", 0, 1)
    0.25
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a tensor or an array of one number
        value = value.item()
    try:
        if isinstance(value, str):
            result = math.inf if value.strip().lower() == "inf" else float(Fraction(value.strip()))
        elif isinstance(value, Real) and not isinstance(value, bool):
            result = float(value)
        else:
            raise TypeError(f"{name}={value!r}: {accepted} is accepted")
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{name}={value!r}: {accepted} is accepted") from error
    if not least <= result <= most:
        raise ValueError(f"{name}={value!r}: {accepted} is accepted")
    return result


def interval(name: str, value: object) -> tuple[float, float] | None:
    """A pair (low, high) of finite numbers with low < high and a finite width, or None.

    Examples
    --------
    >>> interval("box", [0, 1])
    (0.0, 1.0)
    """
    if value is None:
        return None
    accepted = "a pair (low, high) of finite numbers with low < high and a finite width, or None,"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}={value!r}: {accepted} is accepted")
    low, high = (number(name, side, accepted, -sys.float_info.max, sys.float_info.max) for side in value)
    if not 0 < high - low < math.inf:
        raise ValueError(f"{name}={value!r}: {accepted} is accepted")
    return low, high


def choice(name: str, value: object, accepted: Iterable[str]) -> str:
    """One of the strings `accepted`.

    Examples
    --------
    >>> choice("rule", "margin", ("margin", "logit"))
    'margin'
    """
    accepted = list(accepted)
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, accepted))} is accepted")
    return value


def flag(name: str, value: object) -> bool:
    """True or False.

    Examples
    --------
    >>> flag("random_start", True)
    True
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: True or False is accepted")
    return value


def stored_number(name: str, value: object, least: float = 0.0, most: float = sys.float_info.max) -> None:
    """Nothing, where what a file holds is a number in a range: no truth value, no text, nothing that is not finite.

    Examples
    --------
    >>> stored_number("share", True, 0, 1)
    Traceback (most recent call last):
        ...
    ValueError: share=True: a number from 0 to 1 is accepted
    """
    stored_numbers(name, [value], 1, least, most)


def stored_numbers(
    name: str,
    values: object,
    n: int,
    least: float = 0.0,
    most: float = sys.float_info.max,
    of: type = float,
    *,
    missing: bool = False,
) -> None:
    """Nothing, where what a file holds is a list of n numbers in a range.

    Parameters
    ----------
    name : str
    values
    n : int
    least, most : float
    of : {float, int}
        Whole numbers count as floating-point numbers, not the other way round.
    missing : bool
        Whether None may stand in the place of a number.

    Examples
    --------
    >>> stored_numbers("distance", [0.5, None], 2, 0, 1, missing=True)
    """
    if not isinstance(values, list | tuple) or len(values) != n:
        held = f"a list of {len(values)}" if isinstance(values, list | tuple) else f"{type(values).__name__}"
        raise ValueError(f"{name} is {held}: a list of {n} is accepted")
    kinds = (int,) if of is int else (int, float)
    for place, value in enumerate(values):
        if value is None and missing:
            continue
        if type(value) not in kinds or not least <= value <= most:
            called = "whole number" if of is int else "number"
            limits = f" from {least:.6g} to {most:.6g}" if most < sys.maxsize else f" >= {least:.6g}"
            raise ValueError(f"{name}{f'[{place}]' * (n > 1)}={value!r}: a {called}{limits} is accepted")
