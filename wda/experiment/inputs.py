"""What cells run on: data and models, loaded by their names, and the checksums that tell whether they are the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wda import models
from wda.checks import choice
from wda.data import data_folder, find
from wda.data import load as load_data
from wda.errors import DataUnavailable
from wda.files import read_json, write_json
from wda.losses import ce
from wda.passes import Oracle, check_sample
from wda.zoo import PREFIX, weight_files

__all__ = ["Inputs", "agree", "checksum", "load_inputs"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

Stamp = list[list[Any]]


def load_inputs(
    data: str, model: str, n: int | None, dtype: str, device: str
) -> tuple[Tensor, Tensor, nn.Module, dict[str, str]]:
    """The sample in that precision, the model on its device, and the checksums of what they were loaded as.

    The model is converted to the precision too, if it then runs. One that casts inside, as a network in float16 behind
    an interface of float32 does, would not: it keeps its own dtypes.

    Parameters
    ----------
    data, model : str
        Names for `wda.data.load` and `wda.models.load`.
    n : int or None
        Only the first n samples.
    dtype : {"float32", "float64"}
    device : str

    Returns
    -------
    x, y : Tensor
        On the CPU; batches of them go to the model's device.
    model : nn.Module
    sums : dict
        ``data_sha256`` and ``model_sha256``.

    Raises
    ------
    ValueError, TypeError, DataUnavailable
        The message names the argument, its value and what is accepted.

    Examples
    --------
    >>> x, y, net, sums = load_inputs("digits", "digits-mlp", 5, "float64", "cpu")
    >>> net(x).dtype
    torch.float64
    """
    precision = _DTYPES[choice("dtype", dtype, _DTYPES)]
    x, y = _sample(data, n)
    net = models.load(model)
    sums = {"data_sha256": checksum([x, y]), "model_sha256": checksum(net.state_dict().values())}
    x, own = x.to(precision), {weight.dtype for weight in net.parameters() if weight.is_floating_point()}
    net = _on_device(net.to(precision), device)
    if own - {precision} and not _runs(net, x):
        net = _on_device(models.load(model), device)
    return x, y, net, sums


def _runs(net: nn.Module, x: Tensor) -> bool:
    """Whether the model takes such inputs. One whose failure has another cause is refused where it is used."""
    try:
        with Oracle(net, 1) as oracle:
            oracle.logits(oracle.to_model(x[:1]))
    except (RuntimeError, TypeError):
        return False
    return True


def _sample(data: str, n: int | None) -> tuple[Tensor, Tensor]:
    x, y = load_data(data, n=n)
    return x, check_sample(x, y, (0.0, 1.0))


def _on_device(net: nn.Module, device: str) -> nn.Module:
    try:
        return net.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: {error}") from error


def checksum(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 checksum of the values of some tensors, one after the other.

    Examples
    --------
    >>> checksum([torch.zeros(2)]) == checksum([torch.zeros(1), torch.zeros(1)])
    True
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Inputs:
    """What names of data and models stand for now: checksums of the values, and what a model says of a few samples.

    Each is loaded once, and again only where a file of it has another size, time or inode than it had then; `keep`
    makes this outlast the process. A function of one's own may read what it likes, so it is called anew in the life of
    each of these objects.

    Parameters
    ----------
    folder : path, optional
        Of records: what is kept is in its file ``.inputs.json``.

    Examples
    --------
    >>> Inputs().model("nobody") is None
    True
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._path = None if folder is None else Path(folder) / ".inputs.json"
        self._known: dict[str, Any] = {}
        self._called: dict[str, Any] = {}
        self._new = False
        if self._path is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it, it only saves time
                self._known = read_json(self._path)

    def data(self, name: str, n: int | None) -> str | None:
        """The checksum of the first n samples; None where they are not at hand.

        Raises
        ------
        ValueError
            They are, but cannot be loaded.

        Examples
        --------
        >>> Inputs().data("digits", 5) == Inputs().data("digits", 5) != Inputs().data("digits", 6)
        True
        """
        found: str | None = self._looked_up(
            f"data {n} {name}", lambda: _data_files(name), lambda: checksum(_sample(name, n))
        )
        return found

    def model(self, name: str) -> str | None:
        """The checksum of a model's weights; None where it is not at hand.

        Raises
        ------
        ValueError
            It is, but cannot be loaded.

        Examples
        --------
        >>> Inputs().model("digits-mlp") != Inputs().model("digits-cnn")
        True
        """
        found: str | None = self._looked_up(
            f"model {name}", lambda: _model_files(name), lambda: checksum(models.load(name).state_dict().values())
        )
        return found

    def losses(self, data: str, model: str, n: int | None) -> list[float] | None:
        """The cross-entropy of a model at the first few samples: of the same weights, another network has another.

        None where it cannot be said: they are not at hand, the model does not run here, or it is random or looks at
        the batch.

        Examples
        --------
        >>> len(Inputs().losses("digits", "digits-mlp", 5))
        5
        """
        found: list[float] | None = self._looked_up(
            f"losses {n} {data} {model}",
            lambda: None if (own := _model_files(model)) is None else own + (_data_files(data) or []),
            lambda: _losses(data, model, n),
        )
        return found

    def keep(self) -> None:
        """Write what was found to the folder, for those who come after.

        Examples
        --------
        >>> Inputs().keep()  # there is no folder
        """
        if self._path is not None and self._new:
            with contextlib.suppress(OSError):
                write_json(self._path, self._known)

    def _looked_up(self, key: str, files: Callable[[], list[Path] | None], load: Callable[[], Any]) -> Any:
        if key in self._called:
            return self._called[key]
        try:
            stamp = _stamp(files())
            kept = self._known.get(key)
            if stamp and isinstance(kept, dict) and kept.get("files") == stamp and "found" in kept:
                return kept["found"]
            found = load()
        except DataUnavailable:
            return None
        if not stamp:
            self._called[key] = found
        elif _settled(stamp) and _stamp(files()) == stamp:
            self._known[key], self._new = {"files": stamp, "found": found}, True
        return found


def _losses(data: str, model: str, n: int | None) -> list[float] | None:
    x, y = _sample(data, n)
    try:
        with Oracle(models.load(model).double()) as oracle:
            x = oracle.to_model(x[:_FEW].double())
            few = [ce(oracle.logits(x[:count]).cpu(), y[:count]) for count in (len(x), (len(x) + 1) // 2)]
    except Exception:  # whatever a model of one's own may raise
        return None
    return few[0].tolist() if agree(few[0][: len(few[1])].tolist(), few[1].tolist()) else None


_FEW = 16  # samples


def agree(losses: Sequence[float | None], others: Sequence[float | None], device: str = "cpu") -> bool:
    """Whether two lists of cross-entropies are those of one model in single or double precision; None goes with all.

    Parameters
    ----------
    losses, others : sequence of float or None
    device : str
        Where one of them was computed: accelerators round single precision more coarsely.

    Examples
    --------
    >>> agree([0.001, 2.0], [0.0010001, 2.0001]), agree([0.001, 2.0], [0.002, 2.0])
    (True, False)
    """
    relative = 1e-3 if device == "cpu" else 0.05
    pairs = zip(losses, others, strict=True)
    return all(a is None or b is None or abs(a - b) <= 1e-4 + relative * min(a, b) for a, b in pairs)


def _data_files(name: str) -> list[Path] | None:
    """The files of a data set; None where it comes with a package."""
    if name == "digits":
        return None
    place = find(name)
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def _model_files(name: str) -> list[Path] | None:
    """The files that decide a model's weights; None where a function of one's own does."""
    name, _, weights = name.partition("@")
    more = [Path(weights)] if weights else []
    if name.startswith(PREFIX):
        return weight_files(name) + more
    if ":" in name:
        return None
    folders, stored = [models.bundled()], models.card(name).get("weights_file")
    if (folder := data_folder()) is not None:
        folders.append(folder / "models")
    return [path for at in folders for file in (f"{name}.json", str(stored)) if (path := at / file).is_file()] + more


def _stamp(files: list[Path] | None) -> Stamp:
    """Path, size, times and inode of each file."""
    stats = [(path.absolute(), path.stat()) for path in files or () if path.exists()]
    return [[str(path), of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino] for path, of in stats]


def _settled(stamp: Stamp) -> bool:
    """Whether the files were left alone for a while: within a tick of the clock one may change and keep its time."""
    return all(time.time_ns() - changed > _TICK for _, _, *times, _ in stamp for changed in times)


_TICK = 2 * 10**9  # nanoseconds, the coarsest of file systems
