"""Experiments: attacks run on named models and data sets, a record of each, sweeps of them, and tables.

Needs the extra ``wda[notebooks]``, and ``wda[sweep]`` for sweeps.
"""

from wda.experiment.cells import Cell, finished, run, run_cell
from wda.experiment.notebooks import check_parameters, partial, run_notebook
from wda.experiment.records import frame, interval, merge, provenance, read, within
from wda.experiment.tables import costs, table

__all__ = [
    "Cell",
    "check_parameters",
    "costs",
    "finished",
    "frame",
    "interval",
    "merge",
    "partial",
    "provenance",
    "read",
    "run",
    "run_cell",
    "run_notebook",
    "table",
    "within",
]
