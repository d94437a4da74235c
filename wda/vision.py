"""torchvision's data sets, from files at hand: CIFAR-10 and -100, MNIST, and images of ImageNet's validation set.

torchvision checks the files of CIFAR by their checksums. Nothing is downloaded but by `fetch`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wda.errors import DataUnavailable
from wda.files import workplace

__all__ = ["NAMES", "count", "fetch", "folder_of", "load"]

# the class in torchvision.datasets, and the folder that its files make
_CLASSES = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST"),
}

_IMAGENET = (
    "its images are given out at image-net.org for research: put the validation set there, in a folder for each of its "
    "1,000 classes (n01440764/ILSVRC2012_val_00000293.JPEG)"
)

NAMES = (*_CLASSES, "imagenet")


def folder_of(name: str, root: Path) -> Path:
    """Where a data set's files are, under the folder `root` of torchvision's data sets.

    Examples
    --------
    >>> folder_of("imagenet", Path("torchvision")).as_posix()
    'torchvision/imagenet/val'
    """
    return root / "imagenet" / "val" if name == "imagenet" else root / _CLASSES[name][1]


def load(name: str, split: str, n: int | None, folder: Path) -> tuple[Tensor, Tensor]:
    """A labelled sample from the files of a data set; the first n samples of the split.

    "imagenet" has test images only: the 5,000 of the validation set that RobustBench evaluates on, in its order, each
    resized to 256 (bicubic) and cropped to the 224 x 224 in its middle, as the models of Table 1 want it. Labels number
    the 1,000 classes, whichever of their folders are there.

    Parameters
    ----------
    name : one of `NAMES`
    split : {"test", "train"}
    n : int, optional
        By default all.
    folder : Path
        The data set's own, see `folder_of`.

    Returns
    -------
    x : float32 Tensor, shape (N, C, H, W), in [0, 1]
    y : int64 Tensor, shape (N,)

    Raises
    ------
    DataUnavailable
        An image, torchvision or RobustBench's list of images is not here.
    ValueError
        torchvision refuses the files; or a split that the data set does not have.

    Examples
    --------
    >>> x, y = load("cifar10", "test", 100, Path("/data/cifar-10-batches-py"))  # doctest: +SKIP
    >>> x.shape  # doctest: +SKIP
    torch.Size([100, 3, 32, 32])
    """
    if name == "imagenet":
        return _imagenet(split, n, folder)
    stored = _open(name, split, folder)
    x = torch.as_tensor(stored.data)[:n]
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.contiguous().float() / 255, torch.as_tensor(stored.targets, dtype=torch.int64)[:n]


def count(name: str, split: str, folder: Path) -> int:
    """How many samples a split has; see `load`.

    Examples
    --------
    >>> count("cifar10", "test", Path("/data/cifar-10-batches-py"))  # doctest: +SKIP
    10000
    """
    return len(_listed(None)[0]) if name == "imagenet" else len(_open(name, split, folder).targets)


def fetch(name: str, root: Path) -> Path:
    """Download a data set, both splits, by torchvision's own means; it comes into place when it is whole.

    Returns
    -------
    Path
        The folder. What is there already is checked and kept.

    Raises
    ------
    DataUnavailable
        The download failed, or nobody but the user can ask for the data set.
    ValueError
        torchvision refuses the files that are there.
    OSError
        The folder cannot be written.

    Examples
    --------
    >>> fetch("cifar10", Path("/data/torchvision"))  # doctest: +SKIP
    PosixPath('/data/torchvision/cifar-10-batches-py')
    """
    folder = folder_of(name, root)
    if folder.is_dir():
        load(name, "test", 1, folder)
        return folder
    if name == "imagenet":
        raise DataUnavailable(f"data='imagenet': the folder {folder} is not there; {_IMAGENET}")
    make = _class(name)
    with workplace(root) as part:
        try:
            make(part, download=True)
        except (OSError, RuntimeError) as error:
            raise DataUnavailable(
                f"data={name!r}: it cannot be fetched: {type(error).__name__}: {error}; run `wda fetch {name}` on a "
                f"machine that can, and copy the folder to {folder}"
            ) from error
        os.replace(folder_of(name, part), folder)
    return folder


def _torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise DataUnavailable(f"torchvision's data sets need its package: pip install 'wda[zoo]' ({error})") from error


def _class(name: str) -> Any:
    return getattr(_torchvision().datasets, _CLASSES[name][0])


def _open(name: str, split: str, folder: Path) -> Any:
    make = _class(name)
    try:
        return make(folder.parent, train=split == "train", download=False)
    except Exception as error:  # whatever its reader stumbles over
        raise ValueError(
            f"data={name!r}: torchvision refuses the files in {folder}, by their checksums where it has them: "
            f"{type(error).__name__}: {error}; remove the folder, and `wda fetch {name}` fetches them anew"
        ) from error


def _imagenet(split: str, n: int | None, folder: Path) -> tuple[Tensor, Tensor]:
    if split != "test":
        raise ValueError(f"split={split!r}: 'imagenet' has 'test' only, from its validation set")
    vision = _torchvision()
    transforms = vision.transforms
    view = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
        ]
    )
    names, labels = _listed(n)
    images = []
    for name in names:
        try:
            images.append(view(vision.datasets.folder.default_loader(folder / name)))
        except FileNotFoundError as error:
            raise DataUnavailable(
                f"data='imagenet': {folder / name} is not there, of the {len(names)} images asked for; {_IMAGENET}"
            ) from error
        except OSError as error:
            raise ValueError(f"data='imagenet': {folder / name} is no image: {error}") from error
    return torch.stack(images), torch.tensor(labels)


def _listed(n: int | None) -> tuple[list[str], list[int]]:
    """The images RobustBench evaluates on, from the lists in its package, which is not imported for that."""
    found = importlib.util.find_spec("robustbench")
    if found is None or found.origin is None:
        raise DataUnavailable("data='imagenet': RobustBench's package lists the images: pip install 'wda[zoo]'")
    lists = Path(found.origin).parent / "helper_files"
    classes = json.loads((lists / "imagenet_class_to_id_map.json").read_text(encoding="utf-8"))
    with (lists / "imagenet_test_image_ids.txt").open(encoding="utf-8") as file:
        names = [line.strip() for line in itertools.islice(file, n)]
    return names, [classes[name.partition("/")[0]] for name in names]
