# The rule of a sweep: each cell is a notebook run. `wda sweep NAME` starts Snakemake on this file, here or on a cluster,
# with the cells that have no record yet as files cells/NAME.yaml in the working folder.
#
# The record is no `output:`, as Snakemake removes those of a job that it takes for unfinished, and a record is written
# whole or not at all: one that is there is finished, whatever became of the job. The executed notebook is a `log:`, so
# that it is kept, with the traceback in it, where a cell fails.
configfile: "config.yaml"


CELLS = glob_wildcards("cells/{cell}.yaml").cell


rule all:
    input:
        expand("done/{cell}", cell=CELLS),


rule cell:
    input:
        "cells/{cell}.yaml",
    output:
        touch("done/{cell}"),
    log:
        notebook=config["log"] + "/{cell}.ipynb",
        text=config["log"] + "/{cell}.log",
    params:
        python=config["python"],
        notebook=config["notebook"],
        cwd=config["cwd"],
    threads: config["threads"]
    resources:
        mem_mb=4000,
        runtime=720,  # minutes
    shell:
        "unset PYTHONDONTWRITEBYTECODE;"
        " export OMP_NUM_THREADS={threads} MKL_DYNAMIC=FALSE OMP_WAIT_POLICY=PASSIVE;"
        " exec {params.python:q} -m papermill {params.notebook:q} {log.notebook:q} --no-progress-bar"
        " -f {input:q} --cwd {params.cwd:q} > {log.text:q} 2>&1"
