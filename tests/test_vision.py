"""torchvision's data sets: what its readers are given here, and what is said where they refuse it."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from wda import DataUnavailable, cli, data, vision

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'wda[zoo]'")

CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torchvision's data sets under WDA_DATA, not there yet."""
    monkeypatch.setenv("WDA_DATA", str(tmp_path))
    return tmp_path / "torchvision"


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def write_cifar(name: str, root: Path, pixels: np.ndarray) -> None:
    """Every file of the data set in its own format, with the same images in each."""
    reader = getattr(torchvision.datasets, CIFAR[name])
    place = root / reader.base_folder
    place.mkdir(parents=True)
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    key = "labels" if name == "cifar10" else "fine_labels"
    for file, _ in reader.train_list + reader.test_list:
        (place / file).write_bytes(pickle.dumps({"data": rows, key: list(range(len(rows)))}))
    (place / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: ["a"] * 100}))


def accept(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision's checksums be those of the files made up here."""
    reader = getattr(torchvision.datasets, CIFAR[name])

    def md5(file: str) -> str:
        return hashlib.md5((root / reader.base_folder / file).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        monkeypatch.setattr(reader, files, [[file, md5(file)] for file, _ in getattr(reader, files)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(reader.meta["filename"])})


def write_mnist(root: Path, pixels: np.ndarray) -> None:
    """The four files in the IDX format, unpacked."""
    place = root / "MNIST" / "raw"
    place.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = b"\x00\x00\x08\x03" + b"".join(size.to_bytes(4, "big") for size in pixels.shape)
        (place / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = b"\x00\x00\x08\x01" + len(pixels).to_bytes(4, "big") + bytes(range(len(pixels)))
        (place / f"{split}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("split", ["test", "train"])
def test_cifar_is_read_as_images_in_the_unit_box(
    name: str, split: str, folder: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(name, folder, pixels)
    accept(name, folder, monkeypatch)
    x, y = data.load(name, split)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert len(x) == 6 * (5 if name == "cifar10" and split == "train" else 1)
    np.testing.assert_allclose(x[:6].permute(0, 2, 3, 1) * 255, pixels, atol=1e-4)
    assert y[:6].tolist() == list(range(6))
    assert torch.equal(data.load(name, split, n=4)[0], x[:4])


@pytest.mark.parametrize("name", CIFAR)
def test_made_up_files_are_refused_by_their_checksum(
    name: str, folder: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(name, folder, pixels)
    place = vision.folder_of(name, folder)
    said = (
        rf"data='{name}': torchvision refuses the files in {place}, by their checksums .*; remove the folder, and `wda"
    )
    with pytest.raises(ValueError, match=said):
        data.load(name)
    with pytest.raises(ValueError, match=said):
        data.fetch(name)
    assert cli.main(["fetch", name]) == 1
    assert "refuses the files" in capsys.readouterr().err
    assert place.is_dir()


@pytest.mark.parametrize("name", [*CIFAR, "mnist", "imagenet"])
def test_missing_files_are_named_with_the_command_that_fetches_them(name: str, folder: Path) -> None:
    with pytest.raises(DataUnavailable, match=rf"data='{name}': neither .*{name}_test.npz .*, or `wda fetch {name}`"):
        data.load(name)


def test_mnist_is_read_and_a_damaged_file_is_refused(folder: Path, pixels: np.ndarray) -> None:
    grey = pixels[:, :28, :28, 0]
    write_mnist(folder, grey)
    x, y = data.load("mnist", n=5)
    assert x.shape == (5, 1, 28, 28)
    np.testing.assert_allclose(x[:, 0] * 255, grey[:5], atol=1e-4)
    assert y.tolist() == list(range(5))
    images = folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(ValueError, match="data='mnist': torchvision refuses the files"):
        data.load("mnist")


def test_a_file_of_the_whole_split_comes_first_and_one_of_its_beginning_last(
    folder: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = folder.parent / "data"
    arrays.mkdir()
    np.savez(arrays / "mnist_test_first3.npz", x=np.zeros((3, 2)), y=np.zeros(3, dtype=int))
    assert len(data.load("mnist")[0]) == 3
    write_mnist(folder, pixels[:, :28, :28, 0])
    assert len(data.load("mnist")[0]) == 6
    np.savez(arrays / "mnist_test.npz", x=np.zeros((9, 2)), y=np.zeros(9, dtype=int))
    assert len(data.load("mnist")[0]) == 9


# -- ImageNet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed() -> list[str]:
    """The images that RobustBench evaluates on."""
    found = importlib.util.find_spec("robustbench")
    if found is None:
        pytest.skip("RobustBench is not installed: pip install 'wda[zoo]'")
    return (Path(found.origin).parent / "helper_files" / "imagenet_test_image_ids.txt").read_text().splitlines()


def classes() -> list[str]:
    """The classes of ImageNet in the order of their numbers."""
    found = importlib.util.find_spec("robustbench")
    numbers = json.loads((Path(found.origin).parent / "helper_files" / "imagenet_class_to_id_map.json").read_text())
    assert sorted(numbers.values()) == list(range(len(numbers)))
    return sorted(numbers, key=numbers.get)


def write_images(folder: Path, names: list[str]) -> None:
    from PIL import Image

    for row, name in enumerate(names):
        path = folder / "imagenet" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.zeros((300, 400, 3), dtype=np.uint8)
        image[:, 200:] = 50 * (row + 1)
        Image.fromarray(image[..., 0] if row == 1 else image).save(path, quality=95)  # some are grey


def test_imagenet_is_robustbenchs_images_resized_and_cropped(folder: Path, listed: list[str]) -> None:
    assert len(listed) == len(set(listed)) == 5000
    write_images(folder, listed[:3])
    x, y = data.load("imagenet", n=3)
    assert x.shape == (3, 3, 224, 224)
    assert x.min() >= 0
    for row in range(3):
        torch.testing.assert_close(
            x[row, :, :, 130:], torch.full((3, 224, 94), 50 * (row + 1) / 255), atol=0.02, rtol=0
        )
        torch.testing.assert_close(x[row, :, :, :94], torch.zeros(3, 224, 94), atol=0.02, rtol=0)
    # RobustBench itself numbers the folders that it finds: with three of them it would say 0, 1 and 2
    assert y.tolist() == [classes().index(name.partition("/")[0]) for name in listed[:3]]
    assert y.min() > 100
    with pytest.raises(DataUnavailable, match=rf"{listed[3]} is not there, of the 4 images asked for; .*image-net.org"):
        data.load("imagenet", n=4)
    (folder / "imagenet" / "val" / listed[2]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{listed[2]} is no image"):
        data.load("imagenet", n=3)
    with pytest.raises(ValueError, match="split='train': 'imagenet' has 'test' only"):
        data.load("imagenet", "train")


# -- fetching --------------------------------------------------------------------------------------------------------


def test_what_is_fetched_comes_into_place_when_it_is_whole(
    folder: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(self: object) -> None:
        assert not vision.folder_of("mnist", folder).exists()
        write_mnist(Path(self.root), pixels[:, :28, :28, 0])

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert cli.main(["fetch", "mnist"]) == 0
    assert capsys.readouterr().out == f"{folder / 'MNIST'}\n"
    assert [path.name for path in folder.iterdir()] == ["MNIST"]
    assert len(data.load("mnist", "train")[0]) == 6
    assert data.fetch("mnist") == folder / "MNIST"  # checked and kept: another download would fail


FAILURES: dict[str, Callable[[], Exception]] = {
    "no network": lambda: OSError("Name or service not known"),
    "gave up": lambda: RuntimeError("Error downloading train-images-idx3-ubyte.gz"),
    "not gzip": lambda: gzip.BadGzipFile("Not a gzipped file"),
}


@pytest.mark.parametrize("why", FAILURES)
def test_a_failed_download_leaves_nothing(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: object) -> None:
        (Path(self.root) / "MNIST").mkdir()
        raise FAILURES[why]()

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(
        DataUnavailable, match=rf"data='mnist': it cannot be fetched: .*copy the folder to {folder}/MNIST"
    ):
        data.fetch("mnist")
    assert not folder.exists()


def test_imagenet_can_be_asked_for_by_the_user_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "imagenet"]) == 1
    assert f"the folder {folder}/imagenet/val is not there; its images are given out at image-net.org" in (
        capsys.readouterr().err
    )


def test_what_cannot_be_fetched_is_told_what_can(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "digits-mlp", "svhn"]) == 1
    assert capsys.readouterr().err.count("cifar10, cifar100, mnist, imagenet can be fetched, and models as") == 2


def test_without_wda_data_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WDA_DATA", raising=False)
    with pytest.raises(DataUnavailable, match="data='cifar10': set the variable WDA_DATA to the folder"):
        data.fetch("cifar10")


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(OSError, match=rf"the folder {folder} cannot be written"):
        data.fetch("cifar10")


def test_without_torchvision_the_extra_is_named(
    folder: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(folder, pixels[:, :28, :28, 0])
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataUnavailable, match=r"pip install 'wda\[zoo\]'"):
        data.load("mnist")


def test_robustbenchs_classes_are_numbered_in_the_order_of_their_names(listed: list[str]) -> None:
    assert classes() == sorted(classes())
    assert len(classes()) == 1000
    assert {name.partition("/")[0] for name in listed} < set(classes())  # a few have no image among the 5,000
