"""What is here and whether it works: versions, devices, data, weights, what each notebook needs, and the numerics."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wda import __version__, data, models, vision, weights, zoo
from wda.attacks import attack, distances
from wda.budget import robust_accuracy
from wda.errors import DataUnavailable
from wda.threat import Threat

__all__ = ["Finding", "examine", "numerics"]

# what it takes to build and to test the book concerns nobody else
_EXTRAS = ("data", "transport", "certificates", "attacks", "zoo", "notebooks")

# an attack's distance may be above the exact one by what its bisection leaves
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes
    ----------
    section : str
    name : str
    state : {"ok", "missing", "WRONG"}
        Missing is what could be here and need not.
    detail : str

    Examples
    --------
    >>> Finding("devices", "cpu", "ok", "2 cores").state
    'ok'
    """

    section: str
    name: str
    state: str
    detail: str


def examine() -> Iterator[Finding]:
    """Look at everything, and tell of each thing as soon as it is seen.

    What is here but damaged, refused or of another version is wrong, and so is a notebook that cannot run with its
    defaults. Nothing is downloaded or written.

    Examples
    --------
    >>> next(examine()).name
    'wda'
    """
    yield from _versions()
    yield from _devices()
    yield from _data()
    yield from _models()
    yield from _notebooks()
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        yield _found("numerics", device, lambda device=device: _numerics_told(device))  # type: ignore[misc]


def numerics(device: str = "cpu", seed: int = 0) -> dict[str, float]:
    r"""How far attack, certificate and budget are from the closed form of an affine model.

    The nearest error of :math:`z = Wx + b` without a box is at
    :math:`\min_{j \ne y} (z_y - z_j) / \|w_y - w_j\|_{s}`, s the dual exponent. The robust accuracy over the W_1 ball
    is a linear program, which SciPy solves here.

    Returns
    -------
    dict
        The largest relative deviation of ``attack`` and ``certificate`` from that distance, over three norms, and the
        deviation of the accuracy left by ``budget`` from the linear program's.

    Raises
    ------
    BudgetExceeded
        The attack's distribution leaves the ball.

    Examples
    --------
    >>> max(numerics().values()) < 1e-5
    True
    """
    from scipy.optimize import linprog

    from wda.certificates.radius import radius

    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Linear(6, 4, dtype=torch.float64)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    net = net.to(device).eval()
    x = torch.rand(24, 6, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        y = net(x).argmax(1)
    apart = {"attack": 0.0, "certificate": 0.0, "budget": 0.0}
    for norm, dual in (("Linf", 1), ("L2", 2), ("L1", torch.inf)):
        exact = _exact_distance(net, x, y, dual)
        threat = Threat(norm, eps=exact.mean().item() / 2, box=None)
        adv = attack("closest", net, x, y, threat)
        adv.audit(threat)
        reached = distances(net, x, y, norm, box=None).distance
        apart["attack"] = max(apart["attack"], _relative(reached, exact))
        certified = radius(net, x, y, norm, box=None, tolerance=_TOLERANCE / 10)
        apart["certificate"] = max(apart["certificate"], _relative(certified, exact))
        d = exact.cpu().numpy()
        solved = linprog(-np.ones_like(d), A_ub=d[None], b_ub=[threat.eps * len(d)], bounds=(0, 1))
        left = robust_accuracy(exact, threat.eps).item()
        apart["budget"] = max(apart["budget"], abs(left - (1 + solved.fun / len(d))), abs(left - adv.accuracy(net)))
    return apart


def _exact_distance(net: torch.nn.Linear, x: Tensor, y: Tensor, dual: float) -> Tensor:
    with torch.no_grad():
        z = net(x)
        slopes = torch.linalg.vector_norm(net.weight[y][:, None] - net.weight, ord=dual, dim=2)
        gaps = (z.gather(1, y[:, None]) - z) / slopes
        exact: Tensor = gaps.scatter(1, y[:, None], torch.inf).amin(1)
    return exact


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value / exact - 1).abs().max())


def _numerics_told(device: str) -> str:
    apart = numerics(device)
    told = ", ".join(f"{name} {value:.0e}" for name, value in apart.items())
    if not max(apart.values()) < _TOLERANCE:
        raise ValueError(f"off the closed form of an affine model by more than {_TOLERANCE:.0e}: {told}")
    return f"off the closed form of an affine model by: {told}"


def _found(section: str, name: str, look: Callable[[], str]) -> Finding:
    """What `look` tells, or the error that it ends in."""
    try:
        return Finding(section, name, "ok", look())
    except DataUnavailable as error:
        return Finding(section, name, "missing", str(error))
    except Exception as error:  # whatever it is, the others are looked at too
        return Finding(section, name, "WRONG", f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "wda", "ok", f"{__version__}, in {Path(__file__).parent}")
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    python = f"{platform.python_version()}, {platform.platform()}"
    yield Finding("versions", "python", "ok" if right else "WRONG", python + "; 3.11 or 3.12 is needed" * (not right))
    for package, wanted, extra in _requirements():
        try:
            have = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            advice = f"pip install 'wda[{extra}]'" if extra else f"pip install '{package}{wanted}'"
            yield Finding("versions", package, "missing" if extra else "WRONG", advice)
            continue
        fits = _fits(have, wanted)
        yield Finding("versions", package, "ok" if fits else "WRONG", have + f"; {wanted} is needed" * (not fits))
    if importlib.util.find_spec("robustbench") is not None:
        yield _found("versions", "robustbench's import", lambda: f"works: {zoo.package().__name__}")


def _requirements() -> Iterator[tuple[str, str, str]]:
    """(package, versions, extra) for each package that the installed wda asks for."""
    try:
        asked = importlib.metadata.requires("wda") or []
    except importlib.metadata.PackageNotFoundError:
        return
    seen = {"wda"}
    for line in asked:
        requirement, _, marker = line.partition(";")
        package, wanted = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(.*)", requirement.strip()).groups()  # type: ignore[union-attr]
        extra = match[1] if (match := re.search(r"extra == ['\"](.*)['\"]", marker)) else ""
        if package not in seen and (not extra or extra in _EXTRAS):
            seen.add(package)
            yield package, wanted.strip(), extra


def _fits(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("devices", "cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads of torch")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Finding("devices", f"cuda:{i}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("devices", "cuda", "missing", f"{built}; no GPU is seen")


def _data() -> Iterator[Finding]:
    folder = data.data_folder()
    if folder is None:
        yield Finding("data", "WDA_DATA", "missing", "the variable is not set; the digits need none")
    elif not folder.is_dir():
        yield Finding("data", "WDA_DATA", "WRONG", f"{folder} is no folder")
    else:
        yield Finding("data", "WDA_DATA", "ok", str(folder))
    yield _found("data", "digits", lambda: f"{len(data.load('digits')[0])} test images")
    own = {
        match[1] for path in _files("data/*.npz") if (match := re.fullmatch(r"(.+)_test(_first\d+)?\.npz", path.name))
    }
    for name in sorted(own | set(vision.NAMES)):
        yield _found("data", name, lambda name=name: _data_told(name))  # type: ignore[misc]


def _data_told(name: str) -> str:
    places = {}
    for split in ("test", "train"):
        with contextlib.suppress(DataUnavailable):
            places[split] = data.find(name, split)
    if "test" not in places:
        raise DataUnavailable(f"`wda fetch {name}` {'says how to get' if name == 'imagenet' else 'fetches'} it")
    data.load(name, n=1)
    return ", ".join(f"{split} in {place}" for split, place in places.items())


def _models() -> Iterator[Finding]:
    for name in models.available():
        yield _found("models", name, lambda name=name: _model_told(name))  # type: ignore[misc]
    here = (path.with_suffix("").relative_to(data.data_folder() or ".") for path in _files("robustbench/*/*/*.pt"))
    others = [f"{zoo.PREFIX}{path.as_posix().removeprefix('robustbench/')}" for path in sorted(here)]
    for name in dict.fromkeys([*zoo.published(), *others]):
        yield _found("models", name, lambda name=name: _weights_told(name))  # type: ignore[misc]


def _model_told(name: str) -> str:
    count = sum(parameter.numel() for parameter in models.load(name).parameters())
    return f"{count:,} parameters"


def _weights_told(name: str) -> str:
    paths = zoo.weight_files(name)
    if not paths:
        raise DataUnavailable("`wda fetch` of that name fetches it")
    for path in paths:
        weights.check(path)
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.0f} MB"


def _files(pattern: str) -> list[Path]:
    folder = data.data_folder()
    return [] if folder is None else sorted(folder.glob(pattern))


def _notebooks() -> Iterator[Finding]:
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")):
        finding = _found("notebooks", path.name, lambda path=path: _notebook_told(path))  # type: ignore[misc]
        yield replace(finding, state="WRONG") if finding.state == "missing" else finding


def _notebook_told(path: Path) -> str:
    """What a notebook imports, and the data and models that are the defaults of its parameters."""
    imported, defaults = set(), {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = _parsed("".join(cell["source"]))
        imported |= _imports(tree)
        if "parameters" in cell["metadata"].get("tags", ()):
            defaults = _literals(tree)
    lacking = sorted(name for name in imported if importlib.util.find_spec(name) is None)
    if lacking:
        raise DataUnavailable(f"needs {', '.join(lacking)}: pip install 'wda[notebooks]'")
    needs = []
    with _modules_of(path.parent):
        for parameter, load in (("data", data.load), ("model", models.load)):
            for name in dict.fromkeys([*_texts(defaults.get(parameter)), *_texts(defaults.get(f"{parameter}s"))]):
                load(name)
                needs.append(name)
    return f"can run; its defaults need {', '.join(needs) or 'nothing'}"


@contextlib.contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Import modules from a folder too, as a notebook in it does."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _parsed(source: str) -> ast.Module:
    """The Python of a cell; lines that are IPython's own, and cells in another language, are none."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse("" if source.startswith("%%") else re.sub(r"(?m)^\s*[%!].*$", "", source))


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _literals(tree: ast.Module) -> dict[str, Any]:
    """The assignments of literals; what is computed is left out."""
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    with contextlib.suppress(ValueError):
                        values[target.id] = ast.literal_eval(node.value)
    return values


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []
