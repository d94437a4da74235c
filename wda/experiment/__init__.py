"""Experiments: attacks run on named models and data sets, a record of each, sweeps of them, and tables.

Needs the extra ``wda[notebooks]``, and ``wda[sweep]`` for sweeps.
"""

from wda.experiment.ablations import ablations
from wda.experiment.brackets import bracket_table, run_bracket
from wda.experiment.cells import Cell, finished, run, run_cell
from wda.experiment.doubts import doubts
from wda.experiment.engine import Failure, run_sweep
from wda.experiment.inputs import load_inputs
from wda.experiment.notebooks import check_parameters, partial, run_notebook
from wda.experiment.published import Failed, beside_published, run_table1, table1
from wda.experiment.records import frame, interval, merge, provenance, read, within
from wda.experiment.sweeps import Sweep, Task, load_sweep, results, sweeps, write_tables
from wda.experiment.tables import costs, table
from wda.experiment.tuning import read_finetune, run_finetune, tuning_table

__all__ = [
    "Cell",
    "Failed",
    "Failure",
    "Sweep",
    "Task",
    "ablations",
    "beside_published",
    "bracket_table",
    "check_parameters",
    "costs",
    "doubts",
    "finished",
    "frame",
    "interval",
    "load_inputs",
    "load_sweep",
    "merge",
    "partial",
    "provenance",
    "read",
    "read_finetune",
    "results",
    "run",
    "run_bracket",
    "run_cell",
    "run_finetune",
    "run_notebook",
    "run_sweep",
    "run_table1",
    "sweeps",
    "table",
    "table1",
    "tuning_table",
    "within",
    "write_tables",
]
