"""What all tests share."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import matplotlib
import pytest

import wda

# Here and not as MPLBACKEND: a variable would reach the notebooks' kernels too and keep figures out of them.
matplotlib.use("Agg")


@pytest.fixture(scope="session")
def wda_data() -> Path:
    """The folder of real data sets and published models, for tests that need more than the bundled ones."""
    folder = os.environ.get("WDA_DATA")
    if not folder:
        pytest.skip("needs real data: set WDA_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.fail(f"WDA_DATA={folder} is not a folder")
    return Path(folder)


def _timed() -> Iterator[FunctionType]:
    """Every function of the package that has a `time_limit` with a default."""
    for module in pkgutil.walk_packages(wda.__path__, "wda."):
        for _, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            limit = inspect.signature(function).parameters.get("time_limit")
            if function.__module__ == module.name and limit is not None and limit.default is not limit.empty:
                yield function


@pytest.fixture(scope="session", autouse=True)
def patience() -> None:
    """A solver is cut off by the clock only where a test says so: what it finds in time hangs on the machine's load."""
    endless = 1e9
    for function in _timed():
        if function.__kwdefaults__ and "time_limit" in function.__kwdefaults__:
            function.__kwdefaults__["time_limit"] = endless
        else:
            names = function.__code__.co_varnames[: function.__code__.co_argcount]
            given = function.__defaults__ or ()
            defaults = dict(zip(names[-len(given) :], given, strict=True)) | {"time_limit": endless}
            function.__defaults__ = tuple(defaults.values())
