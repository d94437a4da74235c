"""The threat model: which values it takes, and what its errors say."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from wda import Threat


@pytest.mark.parametrize(
    ("given", "eps"),
    [
        ("8/255", 8 / 255),
        (" 8/255 ", 8 / 255),
        ("0.3", 0.3),
        (0, 0.0),
        (2, 2.0),
        (Fraction(1, 3), 1 / 3),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
    ],
)
def test_eps_becomes_a_float(given: object, eps: float) -> None:
    parsed = Threat("L2", eps=given).eps
    assert type(parsed) is float
    assert parsed == eps


@pytest.mark.parametrize(
    ("given", "order"),
    [(1, 1.0), ("2", 2.0), ("3/2", 1.5), ("inf", math.inf), (" INF ", math.inf), (math.inf, math.inf)],
)
def test_order_becomes_a_float(given: object, order: float) -> None:
    assert Threat(order=given).order == order


@pytest.mark.parametrize(("given", "box"), [(None, None), ((0, 1), (0.0, 1.0)), ([-1, "1/2"], (-1.0, 0.5))])
def test_box_becomes_a_pair_of_floats(given: object, box: object) -> None:
    assert Threat(box=given).box == box


BAD = {
    "norm": ["linf", "L3", "", None, 2, math.inf, ["Linf"]],
    "eps": [-1e-9, "-8/255", math.nan, "nan", math.inf, "inf", "8/0", "abc", "", "1e400", 10**400, True, None, [1], 1j],
    "order": [0.999, 0, -1, math.nan, "nan", -math.inf, "abc", "2/0", "1e400", True, None, (1,)],
    "box": [(1, 0), (0, 0), (0, math.nan), (math.nan, 1), (0, math.inf), (-math.inf, 0), (0, "a"),
            (0, None), (0,), (0, 1, 2), 1.0, "01", (False, True)],
}  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), [(argument, value) for argument in BAD for value in BAD[argument]])
def test_an_error_names_argument_value_and_what_is_accepted(argument: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Threat(**{argument: value})
    shown = [value, *value] if isinstance(value, tuple) else [value]  # of a box, the side that is no number
    message = str(error.value)
    assert message.startswith(tuple(f"{argument}={part!r}: " for part in shown))
    assert message.endswith("accepted")


def test_a_threat_is_frozen_and_compares_by_value() -> None:
    threat = Threat("L2", eps="1/2", order="inf")
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 1.0
    assert threat == Threat("L2", eps=0.5, order=math.inf)
    assert len({threat, Threat("L2", 0.5, math.inf), Threat("L1", 0.5, math.inf)}) == 2


def test_the_defaults_are_those_of_the_design() -> None:
    assert Threat() == Threat(norm="Linf", eps="8/255", order=1, box=(0, 1))


@pytest.mark.parametrize(
    ("threat", "text"),
    [
        (Threat("L1", 0.25, 1.5), "W_1.5 L1 0.25"),
        (Threat(order="inf"), "W_inf Linf 8/255"),
        (Threat("L2", "128/255"), "W_1 L2 128/255"),
        (Threat("L2", 0.2), "W_1 L2 0.2"),  # 51/255 too, but shorter so
        (Threat("L2", 3), "W_1 L2 3"),
        (Threat("L2", 0.031372549), "W_1 L2 0.031372549"),
        (Threat(eps=0), "W_1 Linf 0"),
    ],
)
def test_a_threat_shows_order_norm_and_radius(threat: Threat, text: str) -> None:
    assert str(threat) == text
    assert Threat(threat.norm, text.split()[2], threat.order) == threat


@pytest.mark.parametrize(("eps", "box"), [(8, (0, 1)), (1.1, (0, 1)), (0.5, (0, 0.4)), (2.5, (-1, 1))])
def test_a_linf_radius_beyond_the_box_is_warned_of(eps: float, box: tuple[float, float]) -> None:
    with pytest.warns(UserWarning, match=r"eps=.* is more than the width of box=.*did you mean '8/255'") as warned:
        Threat("Linf", eps, box=box)
    assert warned[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_radius_that_the_box_may_need_is_not_warned_of() -> None:
    Threat("Linf", 1), Threat("L2", 8), Threat("L1", 64), Threat("Linf", 8, box=None), Threat("Linf", 2, box=(-1, 1))
