"""The engine of sweeps: Snakemake, on this machine or on a cluster, one notebook run for each cell."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from wda.checks import whole
from wda.experiment.cells import Cell, finished
from wda.experiment.inputs import Inputs
from wda.experiment.sweeps import Sweep, shipped, whole_record
from wda.files import check_writable, write_atomically

__all__ = ["Failure", "run_sweep"]


@dataclass(frozen=True)
class Failure:
    """A cell that has no record after a sweep, and why.

    Examples
    --------
    >>> Failure("cell", "ValueError: eps=-1", Path("cell.ipynb")).name
    'cell'
    """

    name: str
    error: str
    where: Path


def run_sweep(
    sweep: Sweep,
    folder: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    shards: int = 1,
    threads: int = 1,
    profile: str | None = None,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Run the cells of a sweep that have no record yet.

    A cell that fails stays without a record, its traceback in its notebook, and the others go on. However a sweep
    ends, the same call takes it up again: what has a record is not run anew.

    Parameters
    ----------
    sweep : Sweep
    folder : path
        Made if needed. In it: ``records``, ``log`` with each cell's notebook, and ``snakemake.log``.
    jobs : int, optional
        So many cells at once; by default one, or what the profile says.
    shards : int
        Into how many parts the sample is split; where an attack couples samples, it is not split.
    threads : int
        Of each cell. Their number decides the last bits of sums.
    profile : str, optional
        A Snakemake profile: "slurm", which comes with the package, or a folder.
    again : bool
        Run everything, and replace the records.
    say : callable
        Is told of the progress, a line at a time.

    Returns
    -------
    list of Failure

    Raises
    ------
    ValueError, OSError
        A bad argument, a folder that cannot be written, holds records of another version, or in which another sweep
        is at work.

    Examples
    --------
    >>> run_sweep(load_sweep("local"), "results/local", jobs=2)  # doctest: +SKIP
    """
    jobs = None if jobs is None else whole("jobs", jobs)
    shards, threads, where = whole("shards", shards), whole("threads", threads), _profile(profile)
    if importlib.util.find_spec("snakemake") is None:
        raise ModuleNotFoundError("Snakemake is needed: pip install 'wda[sweep]'")
    folder = Path(folder).resolve()
    records = folder / "records"
    check_writable(records)
    with _only_one(folder / ".lock") as lock:
        at_hand = Inputs(records)
        left = [_parts(task.cell, records, shards, again, at_hand) for task in sweep.tasks]
        at_hand.keep()
        cells = list(itertools.chain(*left))
        if together := sorted({t.cell.attack for t in sweep.tasks if t.cell.couples and shards > 1}):
            say(f"{', '.join(together)}: one shard, as samples are moved together")
        in_parts = f", in {len(cells)} parts" * (shards > 1)
        say(f"{sweep.name}: {sum(map(bool, left))} of {len(left)} cells to run{in_parts}")
        if not cells:
            return []
        _prepare(folder, cells, threads)
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(shipped() / "sweep.smk")]
        command += ["--directory", str(folder / ".state"), "--keep-going"]
        if where:
            command += ["--profile", str(where)] + ([] if jobs is None else ["--jobs", str(jobs)])
        else:
            command += ["--cores", str((jobs or 1) * threads)]
        with (folder / "snakemake.log").open("w") as log:
            # what Snakemake starts does not inherit the lock: it is free once both of us are gone
            engine = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[lock.fileno()])
            _follow(engine, records, cells, say)
    return [_failure(folder, cell) for cell in cells if not (records / f"{cell.name}.json").is_file()]


def _profile(name: str | None) -> Path | None:
    if name is None:
        return None
    for folder in (shipped() / "profiles" / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ValueError(f"profile={name!r}: 'slurm', or a folder with a config.yaml, is accepted")


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[IO[str]]:
    """Hold the lock of a sweep's folder; it ends with the process, however that ends."""
    with path.open("a") as file:
        patience = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > patience:
                    raise ValueError(f"output={str(path.parent)!r}: another sweep is at work in this folder") from error
                time.sleep(0.1)
        yield file


_PATIENCE = 5.0  # seconds that a sweep which was killed may take to die


def _parts(cell: Cell, records: Path, shards: int, again: bool, at_hand: Inputs) -> list[Cell]:
    """What is left to run of a cell: nothing, all of it, or some shards."""
    if again:
        for path in records.glob(f"{cell.name}_*of*.json"):
            path.unlink()
        (records / f"{cell.name}.json").unlink(missing_ok=True)
    elif whole_record(cell, records, at_hand):
        return []
    parts = [cell] if shards == 1 or cell.couples else cell.split(shards)
    return [part for part in parts if finished(part, records, at_hand) is None]


def _prepare(folder: Path, cells: list[Cell], threads: int) -> None:
    """Tell Snakemake what to run. Its own notes of an earlier run are forgotten: the records say what is done."""
    import yaml

    state = folder / ".state"
    shutil.rmtree(state, ignore_errors=True)
    about: dict[str, Any] = {
        "python": sys.executable,
        "notebook": str(shipped() / "cell.ipynb"),
        "cwd": str(Path.cwd()),
    }
    about |= {"log": str(folder / "log"), "threads": threads}
    files = {"config.yaml": about}
    for cell in cells:
        files[f"cells/{cell.name}.yaml"] = {"cell": asdict(cell), "folder": str(folder / "records")}
        for kept in ("ipynb", "log"):
            (folder / "log" / f"{cell.name}.{kept}").unlink(missing_ok=True)
    for name, content in files.items():
        with write_atomically(state / name) as file:
            file.write(yaml.safe_dump(content).encode())


def _follow(engine: subprocess.Popen[bytes], records: Path, cells: list[Cell], say: Callable[[str], None]) -> None:
    """Wait for Snakemake, and tell of each record that is there."""
    start, told = time.monotonic(), 0
    try:
        while True:
            ended = engine.poll() is not None
            done = sum((records / f"{cell.name}.json").is_file() for cell in cells)
            if done > told:
                passed = time.monotonic() - start
                left = passed * (len(cells) - done) / done
                say(f"{done}/{len(cells)} done, {passed:.0f} s, about {left:.0f} s left")
                told = done
            if ended:
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        try:  # in a terminal it has had the signal too
            engine.wait(timeout=10)
        except subprocess.TimeoutExpired:
            engine.terminate()  # it lets what runs now come to its end
            engine.wait()
        raise


def _failure(folder: Path, cell: Cell) -> Failure:
    """What the cell's notebook says, or else its log, or Snakemake's."""
    notebook, text = folder / "log" / f"{cell.name}.ipynb", folder / "log" / f"{cell.name}.log"
    with contextlib.suppress(OSError, ValueError, KeyError):
        outputs = [o for part in json.loads(notebook.read_text())["cells"] for o in part.get("outputs", [])]
        if errors := [o for o in outputs if o["output_type"] == "error"]:
            return Failure(cell.name, f"{errors[0]['ename']}: {errors[0]['evalue']}", notebook)
    if shutil.disk_usage(folder).free < _ROOM:
        return Failure(cell.name, f"no space is left on the disk of {folder}", folder)
    log = text if text.is_file() and text.stat().st_size else folder / "snakemake.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["it did not run"]
    return Failure(cell.name, lines[-1].strip(), log)


_ROOM = 2**16  # bytes; where there are fewer, neither notebook nor log is whole
