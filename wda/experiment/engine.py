"""The engine of sweeps: Snakemake, on this machine or on a cluster, one notebook run for each cell."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

    Cells end with the sweep. Where it is interrupted, or this process dies, what it runs here is ended, and jobs on a
    cluster are cancelled. Only where Snakemake dies too, as when the machine does, do jobs on a cluster go on; they
    write their records, and later jobs of the same cells wait for them.

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
        is at work; Snakemake was killed.
    KeyboardInterrupt
        As ever; SIGTERM and SIGHUP have their usual effect too, once what was started has ended.

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
    with _only_one(folder / ".lock", say) as lock:
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
        command = ["--snakefile", str(shipped() / "sweep.smk"), "--directory", str(folder / ".state"), "--keep-going"]
        if where:
            command += ["--profile", str(where)] + ([] if jobs is None else ["--jobs", str(jobs)])
        else:
            command += ["--cores", str((jobs or 1) * threads)]
        with _noted_signals() as noted, _snakemake(command, folder / "snakemake.log", lock, noted) as engine:
            _follow(engine, records, cells, say, noted)
        if engine.returncode < 0:
            raise ChildProcessError(
                f"Snakemake was ended by signal {-engine.returncode}; the same call goes on from here"
            )
    return [_failure(folder, cell) for cell in cells if not (records / f"{cell.name}.json").is_file()]


def _profile(name: str | None) -> Path | None:
    if name is None:
        return None
    for folder in (shipped() / "profiles" / name, Path(name)):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ValueError(f"profile={name!r}: 'slurm', or a folder with a config.yaml, is accepted")


@contextlib.contextmanager
def _only_one(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of a sweep's folder, which names who holds it; it ends with the process, however that ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        patience = None
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                holder = os.pread(handle, 2000, 0).decode(errors="replace") or "a process that is not known"
                if patience is None:
                    say(f"another sweep is at work in this folder: {holder}")
                    patience = time.monotonic() + _PATIENCE
                if time.monotonic() > patience:
                    said = f"output={str(path.parent)!r}: another sweep is at work in this folder: {holder}"
                    raise ValueError(said) from error
                time.sleep(0.1)
        _name_holder(handle)
        yield handle
    finally:
        os.close(handle)


def _name_holder(lock: int, engine: int | None = None) -> None:
    """Write into the file of the lock who holds it, and how it is ended."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = f"process {os.getpid()} on {socket.gethostname()}, since {since}: {shlex.join(sys.argv)}"
    text += f"; it ends by: kill {os.getpid()}"
    if engine is not None:
        text += f", and where only its Snakemake is left, by: kill -9 -- -{engine}"
    with contextlib.suppress(OSError):  # the disk may be full
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)


_GRACE = 10.0  # seconds that Snakemake has to end what it started, before all of it is killed
_PATIENCE = _GRACE + 5  # seconds to wait for a sweep that may be about to end


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Only note the signals that end a program, and let them have their effect at the end; what is ignored stays so."""
    noted: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(ending) not in (signal.SIG_IGN, None):
                before[ending] = signal.signal(ending, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])


@contextlib.contextmanager
def _snakemake(arguments: list[str], log: Path, lock: int, noted: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    """Snakemake in a process group of its own, which has ended afterwards, with all that it ran here."""
    theirs, ours = os.pipe()
    with open(theirs, "rb"), open(ours, "wb"), log.open("w") as out:
        words = [sys.executable, "-P", str(shipped() / "engine.py"), str(theirs), str(_GRACE), *arguments]
        # what Snakemake starts does not inherit the lock: it is free once both of us are gone
        engine = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[lock, theirs], start_new_session=True
        )
        try:
            _name_holder(lock, engine.pid)
            yield engine
        finally:
            _end(engine, noted)


def _end(engine: subprocess.Popen[bytes], noted: list[int]) -> None:
    """Interrupt Snakemake, if it runs, and kill what is left of its group after a while, or at a second signal."""
    if engine.poll() is None:
        os.killpg(engine.pid, signal.SIGINT)
        patience = time.monotonic() + _GRACE
        while engine.poll() is None and time.monotonic() < patience and len(noted) < 2:
            time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left
        os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()


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


def _follow(
    engine: subprocess.Popen[bytes], records: Path, cells: list[Cell], say: Callable[[str], None], noted: list[int]
) -> None:
    """Wait for the end of Snakemake, or a signal, and tell of each record that is there."""
    start, told = time.monotonic(), 0
    while not noted:
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
