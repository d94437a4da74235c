"""What `import wda` brings in: it must stay about as quick as `import torch`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import wda

HEAVY = "robustbench torchvision cvxpy ot matplotlib autoattack pyautoattack sklearn pandas papermill safetensors"


def test_import_brings_in_no_optional_package() -> None:
    script = f"import sys, wda; print(*sys.modules.keys() & set({HEAVY.split()!r}))"
    folder = Path(wda.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


LAYERS = [
    {"archives", "checks", "errors", "rational"},
    {"files"},
    {"norms", "losses"},
    {"threat", "passes"},
    {"inspection", "vision", "weights"},
    {"data"},
    {"zoo"},
    {"models", "_transport"},
    {"tracing"},
    {"nets"},
    {"distribution", "budget", "cells"},
    {"certificates"},
    {"attacks"},
    {"evaluate", "training"},
    {"figures"},
    {"experiment"},
    {"doctor"},
    {"cli"},
]


def test_imports_go_one_way() -> None:
    """A module imports only what stands on a line above its own in `LAYERS`, or within its own package."""
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    root = Path(wda.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path == root / "__init__.py":
            continue
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "wda" for alias in node.names), path.name
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("wda"):
                continue
            modules = [alias.name for alias in node.names] if node.module == "wda" else [node.module.split(".")[1]]
            modules = [module for module in modules if module != "__version__"]
            for module in modules:
                assert module == own or level[module] < level[own], f"{path.name} imports {module}"
