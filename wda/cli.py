"""The command ``wda``."""

from __future__ import annotations

import argparse
import ast
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from wda import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the exit status.

    Examples
    --------
    >>> main(["run", "missing.ipynb"])
    2
    """
    parser = argparse.ArgumentParser(prog="wda", description="Wasserstein distributional attacks, from notebooks.")
    parser.add_argument("--version", action="version", version=f"wda {__version__}")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser(
        "run",
        help="run a notebook with parameters",
        description="Run a notebook with papermill. A parameter that the notebook does not declare is an error.",
    )
    run.add_argument("notebook", help="the .ipynb file")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter; VALUE is read as Python where it can be, otherwise as text: 0.1, 8/255, \"['pgd', 'wda']\"",
    )
    run.add_argument(
        "-o",
        "--output",
        help="the notebook with its outputs (default: results/NOTEBOOK); NAME.partial.ipynb until the run is complete",
    )
    run.set_defaults(command=_run)
    sweep = commands.add_parser(
        "sweep",
        help="run the cells of a sweep that have no record yet",
        description="Run a sweep, or go on with one. Cells that have a record are not run again; one that fails leaves "
        "its traceback in its notebook, and the others go on.",
    )
    sweep.add_argument("name", help="of a sweep that comes with wda, or a file that ends in .toml")
    sweep.add_argument("-o", "--output", help="the folder of records, logs and tables (default: results/NAME)")
    sweep.add_argument("--jobs", type=int, help="so many cells at once (default: 1, or what the profile says)")
    sweep.add_argument("--shards", type=int, default=1, help="into how many parts to split each sample (default: 1)")
    sweep.add_argument("--threads", type=int, default=1, help="of each cell (default: 1)")
    sweep.add_argument("--profile", help='where cells run: "slurm", or the folder of a Snakemake profile')
    sweep.add_argument("--again", action="store_true", help="run everything anew, and replace the records")
    sweep.set_defaults(command=_sweep)
    table = commands.add_parser(
        "table",
        help="rebuild the tables and figures of a sweep from its records",
        description="Rebuild the tables and figures of a sweep from its records.",
    )
    table.add_argument("name", help="of the sweep")
    table.add_argument("-o", "--output", help="the folder of the sweep (default: results/NAME)")
    table.set_defaults(command=_table)
    fetch = commands.add_parser(
        "fetch",
        help="download a model or a data set",
        description="Download to the folder that WDA_DATA names, check, and only then put in place. What is there "
        "already is checked and kept.",
    )
    fetch.add_argument(
        "names", nargs="+", metavar="NAME", help="cifar10, cifar100, mnist, or a model as robustbench:cifar10/Linf/ID"
    )
    fetch.set_defaults(command=_fetch)
    doctor = commands.add_parser(
        "doctor",
        help="what is here, and whether it works",
        description="Versions, devices, data, weights, what each notebook needs, and a check of the numerics. The exit "
        "status is 1 where something is wrong; what is merely missing can be fetched or done without.",
    )
    doctor.set_defaults(command=_doctor)
    options = parser.parse_args(arguments)
    try:
        status = int(options.command(options))
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        print(f"wda {options.command.__name__[1:]}: {_lacking(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `wda ... | head -1`: what else it has to say goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of a command that SIGPIPE ends
    return status


def _lacking(error: ModuleNotFoundError) -> str:
    """What to do where a module cannot be imported: not every one is in a package that can be installed."""
    if error.name == "fcntl":
        return "records are locked with fcntl, which Linux and macOS have, and Windows has in WSL only"
    if error.name is None or error.name.partition(".")[0] == "wda":
        return str(error)
    return f"{error}; pip install 'wda[notebooks]', or 'wda[sweep]' for sweeps"


def _run(options: argparse.Namespace) -> int:
    from papermill.exceptions import PapermillExecutionError

    from wda.experiment import partial, run_notebook

    out = options.output or str(Path("results") / Path(options.notebook).name)
    try:
        parameters = {name: _value(text) for name, text in options.p}
        run_notebook(options.notebook, out, **parameters)
    except PapermillExecutionError as error:
        print(f"wda run: {error.ename}: {error.evalue}\nThe notebook as far as it ran: {partial(out)}", file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.filename is None else None
        print(f"wda run: {said or error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of Jupyter: the kernel does not start, or died
        print(f"wda run: {error}\nThe notebook as far as it ran: {partial(out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what waits for the kernel would tell of its end
        print(
            f"wda run: interrupted; records of finished attacks are kept\nThe notebook so far: {partial(out)}",
            file=sys.stderr,
        )
        return 130
    print(out)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from wda.experiment import load_sweep, run_sweep

    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does; what nohup has told to ignore stays ignored
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        sweep = load_sweep(options.name)
        folder = Path(options.output or f"results/{sweep.name}")
        failures = run_sweep(
            sweep,
            folder,
            jobs=options.jobs,
            shards=options.shards,
            threads=options.threads,
            profile=options.profile,
            again=options.again,
            say=lambda line: print(line, flush=True),
        )
        for failure in failures:
            print(f"failed: {failure.name}\n  {failure.error}\n  {failure.where}", file=sys.stderr)
        if failures:
            print(f"{len(failures)} cells failed; the same command runs these again", file=sys.stderr)
        return max(_table(options), int(bool(failures)))
    except BrokenPipeError:
        print("wda sweep: nobody reads what it prints: ended; the same command goes on from here", file=sys.stderr)
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"wda sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wda sweep: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _table(options: argparse.Namespace) -> int:
    from wda.experiment import load_sweep, write_tables

    try:
        sweep = load_sweep(options.name)
        folder = Path(options.output or f"results/{sweep.name}")
        paths, missing = write_tables(
            sweep,
            folder / "records",
            folder / "tables",
            say=lambda line: print(f"wda table: {line}", file=sys.stderr),
        )
    except (OSError, TypeError, ValueError) as error:
        print(f"wda table: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    if missing:
        print(f"{len(missing)} of {len(sweep.tasks)} cells have no record that can be used", file=sys.stderr)
    return int(bool(missing))


def _fetch(options: argparse.Namespace) -> int:
    from wda import data, zoo

    status = 0
    for name in options.names:
        try:
            for path in zoo.fetch(name) if name.startswith(zoo.PREFIX) else [data.fetch(name)]:
                print(path)
        except (OSError, ValueError) as error:
            print(f"wda fetch: {error}", file=sys.stderr)
            status = 1
    return status


def _doctor(_: argparse.Namespace) -> int:
    from wda.doctor import examine

    section, wrong, missing = "", 0, 0
    for finding in examine():
        if finding.section != section:
            section = finding.section
            print(section)
        print(f"  {finding.state:7} {finding.name:22} {finding.detail}", flush=True)
        wrong += finding.state == "WRONG"
        missing += finding.state == "missing"
    print(f"{wrong or 'nothing'} wrong, {missing or 'nothing'} missing")
    return int(wrong > 0)


def _value(text: str) -> object:
    """The Python literal that `text` spells, or the text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # text need not be Python
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


if __name__ == "__main__":
    sys.exit(main())
