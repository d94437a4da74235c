"""The chain of certificates on random networks: 18 of those that `make theory` records, and the record itself."""

from __future__ import annotations

import copy
import json

import pytest
import theory


@pytest.mark.parametrize("norm", theory.NORMS)
@pytest.mark.parametrize("seed", range(6))
def test_the_chain_holds(seed: int, norm: str) -> None:
    """Both depths and all three numbers of classes come up among six seeds."""
    assert theory.broken(theory.measure(seed, norm)) == []


@pytest.mark.parametrize("norm", theory.NORMS)
def test_the_record_is_of_this_code(norm: str) -> None:
    record = json.loads((theory.FOLDER / f"{norm}.json").read_text())
    networks = record["networks"]
    assert len(networks) == 100
    assert not any(found["broken"] for found in networks)
    assert {(len(found["hidden"]), found["classes"]) for found in networks} == {
        (h, k) for h in (1, 2) for k in (2, 3, 5)
    }
    again = theory.measure(7, norm)
    for key in ("l_N", "l", "L_margin", "L_corrected", "L_paper", "L_product"):
        assert networks[7][key] == pytest.approx(again[key], abs=1e-7)
    assert networks[7]["margin"]["V"] == pytest.approx(again["margin"]["V"], abs=1e-7)


def test_a_broken_chain_is_seen() -> None:
    found = theory.measure(3, "Linf")
    for key, factor in (("l", 1.5), ("L_margin", 0.3), ("l_cells", 0.9), ("V_program", 1.01)):
        wrong = copy.deepcopy(found)
        wrong[key] *= factor
        assert theory.broken(wrong), key
    for loss in ("margin", "ce"):
        wrong = copy.deepcopy(found)
        wrong[loss]["V"][2] += 10
        assert theory.broken(wrong), loss
