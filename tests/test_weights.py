"""Files of weights: what is read, and what each kind of bad file is told."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wda import DataUnavailable, weights

TENSORS = {"a": torch.arange(6000.0).reshape(60, 100), "b": torch.tensor([1.0, -2.0])}
OLD = {"_use_new_zipfile_serialization": False}


class Touches:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["pt", "old.pt", "npz", "safetensors"])
def test_every_format_gives_its_tensors(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{kind}"
    if kind == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in TENSORS.items()})
    elif kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, **(OLD if kind == "old.pt" else {}))
    held = weights.state_dict(path)
    assert held.keys() == TENSORS.keys()
    assert all(torch.equal(held[name], TENSORS[name]) for name in TENSORS)


def test_a_checkpoint_of_training_holds_harmless_things_too(tmp_path: Path) -> None:
    inner = {f"module.{name}": tensor for name, tensor in TENSORS.items()}
    extra = {"best": np.float64(3.5), "seen": np.int64(4), "args": argparse.Namespace(lr=0.1), "epoch": 7}
    torch.save({"state_dict": inner, **extra}, tmp_path / "net.pt")
    assert weights.state_dict(tmp_path / "net.pt").keys() == TENSORS.keys()
    held = weights.read(tmp_path / "net.pt")
    assert (held["best"], held["seen"], held["args"].lr) == (3.5, 4, 0.1)


@pytest.mark.parametrize("options", [{}, OLD])
def test_code_is_refused_and_does_not_run(
    options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # would turn a mere default off
    torch.save({**TENSORS, "x": Touches(tmp_path / "ran")}, tmp_path / "net.pt", **options)
    with pytest.raises(ValueError, match=r"net.pt holds more than tensors: posix.system; loading that would run code"):
        weights.read(tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_another_kind_does_not_run_either(protocol: int, tmp_path: Path) -> None:
    with (tmp_path / "net.pt").open("wb") as file:
        pickle.dump({"x": Touches(tmp_path / "ran")}, file, protocol=protocol)
    with pytest.raises(ValueError, match=r"net.pt (is no file of weights|holds more than tensors)"):
        weights.read(tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"torch.nn.modules.linear.Linear; .*save its state_dict\(\)"):
        weights.read(tmp_path / "net.pt")


@pytest.mark.parametrize("kind", ["pt", "old.pt", "npz", "safetensors"])
def test_a_file_cut_short_is_named(kind: str, tmp_path: Path) -> None:
    test_every_format_gives_its_tensors(kind, tmp_path)
    half(tmp_path / f"net.{kind}")
    with pytest.raises(ValueError, match=rf"net.{kind} is .*cut short"):
        weights.read(tmp_path / f"net.{kind}")


def test_one_wrong_bit_is_found(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "net.pt")
    content = bytearray((tmp_path / "net.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"net.pt is damaged: the checksum of its part 'net/data/0' is wrong"):
        weights.read(tmp_path / "net.pt")


def test_the_checksum_beside_a_file_must_be_its_own(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(TENSORS, path)
    assert weights.write_checksum(path) == tmp_path / "net.pt.sha256"
    weights.check(path)
    torch.save({"a": torch.zeros(3)}, path)  # whole, but another one
    with pytest.raises(ValueError, match=r"net.pt has the SHA-256 checksum \w{64}, and net.pt.sha256 .* another one"):
        weights.check(path)


BAD = {
    "": "is empty",
    "\n  <!DOCTYPE html><html>Google Drive - Quota exceeded</html>": "is a web page of 60 bytes, saved in the place of",
    "<html>Sorry</html>": "is a web page",
    "not weights at all": "is no ",
}


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_what_is_no_weights_is_told_apart(content: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{kind}"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"net.{kind} {BAD[content]}"):
        weights.read(path)


def test_objects_in_an_array_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", x=np.array([Touches(tmp_path / "ran")]))
    with pytest.raises(ValueError, match=r"net.npz is no .npz file of numbers"):
        weights.read(tmp_path / "net.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("held", [[1.0], {"state_dict": {"lr": 0.1}}, {"a": 1}])
def test_tensors_by_name_are_needed(held: object, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt holds .*tensors by name"):
        weights.state_dict(tmp_path / "net.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"the weights .*net.pt are not there"):
        weights.read(tmp_path / "net.pt")
