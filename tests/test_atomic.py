"""Files are written whole or not at all: full disks, writers that die, and what they leave behind."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import matplotlib.figure
import numpy as np
import pytest
import torch

from wda import files
from wda.files import write_atomically
from wda.training.checkpoint import restore, store

NOISE = np.random.default_rng(0).random(100_000)
WRITERS: dict[str, Callable[[BinaryIO], Any]] = {
    "bytes": lambda file: file.write(NOISE.tobytes()),
    "small writes": lambda file: [file.write(b"abcdefgh") for _ in range(100_000)],
    "torch": lambda file: torch.save({"x": torch.from_numpy(NOISE)}, file),
    "torch, the former format": lambda file: torch.save(
        torch.from_numpy(NOISE), file, _use_new_zipfile_serialization=False
    ),
    "savez": lambda file: np.savez(file, x=NOISE),
    "savez_compressed": lambda file: np.savez_compressed(file, x=NOISE),
    "json": lambda file: file.write(json.dumps(NOISE.tolist()).encode()),
    "text": lambda file: io.TextIOWrapper(file, write_through=True).write(str(NOISE.tolist())),
    "figure": lambda file: matplotlib.figure.Figure(figsize=(9, 9)).savefig(file, format="png", dpi=400),
}


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file may become longer than 4000 bytes: the system refuses the rest, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("before", [None, b"the last whole one"])
@pytest.mark.usefixtures("short_files")
def test_a_write_that_fails_names_the_file_and_keeps_what_was_there(
    writer: str, before: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    kept = "; what it held before is kept" if before is not None else ""
    with (
        pytest.raises(OSError, match=rf"{re.escape(str(path))} cannot be written: File too large{kept}$") as caught,
        write_atomically(path) as file,
    ):
        WRITERS[writer](file)
    assert caught.value.errno == errno.EFBIG
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before] * (before is not None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is one of Linux")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_device_is_named(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "part")))
    path = tmp_path / "file"
    path.write_bytes(b"before")
    words = rf"{re.escape(str(path))} cannot be written: No space left on device; what it held before is kept"
    with pytest.raises(OSError, match=words), write_atomically(path) as file:
        WRITERS[writer](file)
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("raised", [ValueError("of its own"), KeyboardInterrupt(), OSError(errno.EPERM, "no")])
def test_errors_of_the_writer_itself_are_its_own(raised: BaseException, tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise raised

    with pytest.raises(type(raised)) as caught, write_atomically(tmp_path / "file") as file:
        fail(file)
    assert caught.value is raised
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("short_files")
def test_the_last_whole_checkpoint_remains_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    store(path, {"seed": 0}, {"epoch": 1})
    with pytest.raises(OSError, match=rf"{re.escape(str(path))} cannot be written: .*; what it held before is kept"):
        store(path, {"seed": 0}, {"epoch": 2, "x": torch.zeros(10_000)})
    assert restore(path, {"seed": 0}) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


WRITER = """
import runpy, sys
write_atomically = runpy.run_path(FILES)["write_atomically"]
kept = [write_atomically(name) for name in sys.argv[1:]]
for writing in kept:
    file = writing.__enter__()
    file.write(b"half"); file.flush()
print("open", flush=True)
sys.stdin.read()
"""


def writing(*paths: Path) -> subprocess.Popen[str]:
    """A process that is writing these files, and does not come to the end of it."""
    words = [sys.executable, "-c", WRITER.replace("FILES", repr(files.__file__)), *map(str, paths)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out: IO[str] | None = process.stdout
    assert out is not None
    assert out.readline() == "open\n"
    return process


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    names = ["a", "a.json", "a.json.abcdefgh", "*?[a]", "ä" * 100, "b" * 240]
    paths = [tmp_path / name for name in names]
    mine = [".a.settings", ".a.12345678", ".a.json.part.txt"]
    for name in mine:
        (tmp_path / name).write_text("of the user")
    for path in paths:
        path.write_bytes(b"before")
    dead, living = writing(*paths), writing(*paths)
    dead.kill()
    dead.communicate()
    assert len(hidden(tmp_path)) == len(mine) + 2 * len(paths)
    for path in paths:
        with write_atomically(path) as file:
            file.write(b"new")
    assert len(hidden(tmp_path)) == len(mine) + len(paths), "one each is alive"
    living.kill()
    living.communicate()
    for path in paths:
        with write_atomically(path) as file:
            file.write(b"newer")
    assert hidden(tmp_path) == sorted(mine)
    assert all(path.read_bytes() == b"newer" for path in paths)


MANY = """
import runpy, sys
write_atomically = runpy.run_path(FILES)["write_atomically"]
for k in range(50):
    with write_atomically(sys.argv[1]) as file:
        for _ in range(5):
            file.write(bytes([k]) * 1000); file.flush()
"""


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each removes what looks abandoned, all the time; none of it is another's."""
    path = tmp_path / "file"
    script = MANY.replace("FILES", repr(files.__file__))
    all_of_them = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
    assert [process.wait() for process in all_of_them] == [0] * 3
    assert path.read_bytes() == bytes([49]) * 5_000
    assert not hidden(tmp_path)
