"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pytest

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
