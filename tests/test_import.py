"""What `import wda` brings in: it must stay about as quick as `import torch`."""

from __future__ import annotations

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
