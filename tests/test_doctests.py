"""The examples in the package's docstrings: they run, and nothing public is without one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import wda

FOLDER = Path(wda.__file__).parent
MODULES = [
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(FOLDER.rglob("*.py"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_show_what_happens(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert not result.failed


def unshown(name: str) -> list[str]:
    """The public functions, classes and methods of a module that no docstring shows in use.

    A method may be shown by its own docstring or by that of its class. Exceptions and properties need no example; the
    `forward` of a network is shown where the network is called.
    """
    module = importlib.import_module(name)
    lacking = []
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        is_class = inspect.isclass(value) and not issubclass(value, Exception)
        if not (is_class or inspect.isfunction(value)) or value.__module__ != name:
            continue
        about = value.__doc__ or ""
        if ">>> " not in about:
            lacking.append(public)
        for method, member in vars(value).items() if is_class else ():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and not method.startswith("_") and method != "forward":
                own = function.__doc__ or ""
                if not own or (">>> " not in own and f".{method}(" not in about):
                    lacking.append(f"{public}.{method}")
    return lacking


@pytest.mark.parametrize("name", [name for name in MODULES if "._" not in name])
def test_everything_public_has_an_example(name: str) -> None:
    assert not unshown(name)
