"""Damaged weights, model cards and data files are refused by name, or are what they were."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import fuzz_inputs
import numpy as np
import pytest
import torch
from torch import nn

from wda import DataUnavailable, archives, data, models, weights

each_kind = pytest.mark.parametrize("kind", fuzz_inputs.KINDS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives may unpack to 4 MB, so that one which does not is soon made."""
    monkeypatch.setattr(archives, "_UNPACKED", 2**22)


@each_kind
def test_changed_bytes_are_named_or_harmless(kind: str) -> None:
    outcomes = fuzz_inputs.hunt(kind, 60)
    assert outcomes["named"] + outcomes["harmless"] == 60, outcomes
    assert outcomes["named"] > 30


@pytest.mark.parametrize("kind", fuzz_inputs.EDITS)
def test_what_a_file_may_not_say_is_named(kind: str, small: None) -> None:
    outcomes = fuzz_inputs.edited(kind)
    assert outcomes == ["named"] * len(fuzz_inputs.EDITS[kind])


@each_kind
def test_what_is_not_damaged_is_read(kind: str, tmp_path: Path) -> None:
    make, read, equal = fuzz_inputs.KINDS[kind]
    path = make(tmp_path, random.Random(0))
    assert equal(read(path), read(path))
    assert fuzz_inputs.outcome(kind, path, read(path)) == "harmless"


def test_the_hunt_sees_a_file_that_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's own reader, which stops before the checksum, reads other numbers or ends in its own errors."""

    def careless(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(path) as held:
            return torch.from_numpy(held["x"]), torch.from_numpy(held["y"])

    make, _, equal = fuzz_inputs.KINDS["data .npz"]
    monkeypatch.setitem(fuzz_inputs.KINDS, "data .npz", (make, careless, equal))
    outcomes = fuzz_inputs.hunt("data .npz", 200)
    assert outcomes["named"] + outcomes["harmless"] < 200


def test_what_an_archive_unpacks_to_is_bounded_before_it_is(tmp_path: Path, small: None) -> None:
    path = tmp_path / "big.npz"
    fuzz_inputs.inflated(path, random.Random(0))
    assert path.stat().st_size < 2**15
    for read in (weights.read, data.load, weights.check):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"big.npz is an archive of \d+ bytes that unpacks to 5242880: at most"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
        tracemalloc.stop()


def test_a_large_file_of_numbers_is_no_bomb(tmp_path: Path, small: None) -> None:
    numbers = np.random.default_rng(0).random((1000, 1000))
    np.savez_compressed(tmp_path / "net.npz", a=numbers)
    assert torch.equal(weights.read(tmp_path / "net.npz")["a"], torch.from_numpy(numbers))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [">f4", "<f8", "f2", "i1", "u4", "?"])
def test_arrays_of_every_layout_are_read(kind: str, order: str, tmp_path: Path) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 2, dtype=kind, order=order)  # type: ignore[call-overload]
    np.savez(tmp_path / "a.npz", x=array, y=np.arange(2))
    assert np.array_equal(archives.read_npz(tmp_path / "a.npz")["x"], array)
    assert np.array_equal(weights.read(tmp_path / "a.npz")["x"].numpy(), array)
    assert np.array_equal(data.load(tmp_path / "a.npz")[0].numpy(), array.astype(np.float32))


# -- weights and models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-mlp@", "json:loads@", "robustbench:c/L/X@", "digits-mlp@ ", "@", "a:b@\t"])
def test_an_empty_name_of_weights_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"model='.*@\s*': a file of weights is accepted after the @"):
        models.load(name)


def test_a_checksum_may_have_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fuzz_inputs.save(tmp_path / "net.pt", fuzz_inputs.tensors())
    stated = weights.write_checksum(path)
    stated.write_text(stated.read_text().upper())
    weights.check(path)
    stated.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"net.pt has the SHA-256 checksum"):
        weights.check(path)
    card = fuzz_inputs.make_card(tmp_path, random.Random(0))
    said, logits = fuzz_inputs.read_card(card)
    digest = models._read_card(card)["weights_sha256"]
    card.write_text(card.read_text().replace(digest, digest.upper()))
    assert fuzz_inputs.same_card(fuzz_inputs.read_card(card), (said, logits))


OWN = """
import torch
def whole(): return torch.nn.Embedding(2, 2, _weight=torch.zeros(2, 2))
def scaled():
    net = torch.nn.Linear(2, 2)
    net.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    return net
"""


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        ("whole", {"weight": torch.zeros(2, 2, dtype=torch.complex64)}),
        ("whole", {"weight": torch.zeros(2, 2, dtype=torch.int64)}),
        ("scaled", {"weight": torch.zeros(2, 2, dtype=torch.bool)}),
        ("scaled", {"steps": torch.full((2,), 0.5)}),
        ("scaled", {"bias": torch.zeros(2, dtype=torch.complex128)}),
    ],
)
def test_weights_of_another_kind_do_not_fill_a_model(
    function: str, changed: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kinds_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    held = models.load(f"kinds_networks:{function}").state_dict()
    torch.save({**held, **changed}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=rf"net.pt has torch.\w+ for {next(iter(changed))}, which is torch.\w+ in"):
        models.load(f"kinds_networks:{function}@{tmp_path / 'net.pt'}")


def test_a_card_is_read_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`card` and `load` refuse alike, and `build` refuses the same layers without a card."""
    card = fuzz_inputs.make_card(tmp_path, random.Random(0))
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    fuzz_inputs.said(layers__3__size=0)(card, random.Random(0))
    for read in (models.card, models.load):
        with pytest.raises(ValueError, match=rf"the model's card {card}: layers\[3\].size=0: a whole number >= 1"):
            read("mine")
    layers = [*fuzz_inputs.LAYERS[:3], {"op": "maxpool2d", "size": 0}]
    with pytest.raises(ValueError, match=r"^layers\[3\].size=0: a whole number >= 1"):
        models.build(layers, fuzz_inputs.tensors())


def test_sizes_of_height_and_width_are_accepted() -> None:
    layers = [{"op": "conv2d", "weight": "c", "stride": [1, 2], "padding": [0, 1]}, {"op": "avgpool2d", "size": [2, 1]}]
    net = models.build(layers, fuzz_inputs.tensors())
    assert isinstance(net, nn.Sequential)
    assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 3, 3, 4)


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((2, 5, 6), (2, 1, 5, 6)),
        ((2, 5, 6, 3), (2, 3, 5, 6)),
        ((2, 5, 6, 1), (2, 1, 5, 6)),
        ((2, 3, 5, 6), (2, 3, 5, 6)),
        ((2, 1, 28, 28), (2, 1, 28, 28)),
        ((2, 4, 3, 8), (2, 4, 3, 8)),
        ((2, 32, 4, 3), (2, 3, 32, 4)),
    ],
)
def test_bytes_of_one_meaning_are_images(shape: tuple[int, ...], seen: tuple[int, ...], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=pixels, y=[0, 1])
    x, _ = data.load(tmp_path / "mine.npz")
    assert x.shape == seen
    back = (x * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(
        back.reshape(shape) if shape[1:] != (*seen[2:], seen[1]) else np.moveaxis(back, 1, -1), pixels
    )


def test_bytes_of_two_meanings_are_refused_with_what_to_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.zeros((2, 3, 32, 4), np.uint8), y=[0, 1])
    with pytest.raises(
        ValueError, match=r"mine.npz': x of bytes is of shape \(2, 3, 32, 4\), and may be .*; store it as"
    ):
        data.load(tmp_path / "mine.npz")


def test_a_path_is_a_name(tmp_path: Path) -> None:
    path = fuzz_inputs.make_data(tmp_path, random.Random(0))
    assert fuzz_inputs.same_sample(data.load(path, n=2), data.load(str(path), n=2))
    assert data.count(path) == 5
    assert data.find(path) == path


@pytest.mark.parametrize("name", [b"mine.npz", 3, None, ["digits"]])
def test_a_name_of_another_type_is_named(name: object) -> None:
    with pytest.raises(TypeError, match=r"data=.*: a name, or a path that ends in .npz, is accepted"):
        data.load(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".csv", ".NPZ"])
def test_a_file_of_another_format_is_told_the_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(b"numbers")
    with pytest.raises(ValueError, match=r"mine\.\w+': a path that ends in .npz is accepted, with arrays x and y"):
        data.load(path)
    with pytest.raises(DataUnavailable):
        data.load(tmp_path / f"other{suffix}")


@pytest.mark.parametrize("split", ["test", "train"])
def test_as_many_are_counted_as_are_loaded(split: str) -> None:
    assert data.count("digits", split) == len(data.load("digits", split)[0])
