# Everything needs only make and python3.11 or python3.12: each target first sets up .venv if that is missing or
# older than requirements.lock or pyproject.toml. Inside the conda environment of environment.yml that one is used.
VENV := $(if $(filter wda,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)
BIN  := $(VENV)/bin
UV   := $(BIN)/uv pip

# The number of threads decides how torch splits a sum, and so its last bits: fixed, so that a run here is the same
# again. Nothing that is tested may hang on it.
# MKL_DYNAMIC would otherwise let MKL take fewer than asked for.
export OMP_NUM_THREADS ?= 2
export MKL_DYNAMIC ?= FALSE
# Threads that spin while they wait slow each other down beyond measure where other programs want the cores too.
export OMP_WAIT_POLICY ?= PASSIVE
# uv installs no bytecode; where this is set, every kernel and every test process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
# `wda` and `jupytext` in a cell or a recipe are those of the environment.
export PATH := $(abspath $(BIN)):$(PATH)

# The browser of the page tests; tests/test_browser.py reads the same two variables.
export CHROMIUM ?= $(shell for b in chromium chromium-browser google-chrome; do command -v $$b && break; done)
export CHROMEDRIVER ?= $(shell command -v chromedriver)

# Where notebooks run in place leave their records, and go on from them: new outputs must begin afresh.
RESUMED := notebooks/results/ablations notebooks/results/table1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test lint experiments theory recession hunt fuzz attacks finetune sweeps kills slurm cost machines benchmarks models notebooks readme lock env clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

book: env _build/inputs  ## run the chapters and write _build/html/index.html; a warning or a failing cell is an error
	$(BIN)/jupyter-book build -W --keep-going .

# Two processes, each file in one of them: what a file's tests share is made once.
# Without a browser nothing reads the built pages, and their tests skip with that reason.
test: env $(if $(and $(CHROMIUM),$(CHROMEDRIVER)),book)  ## unit tests, notebooks against their stored outputs, pages in Chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: env  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

experiments: env  ## rerun the recorded experiments (5 minutes, and 5 more where WDA_DATA is set), then the README
	@set -e; for model in digits-mlp digits-cnn digits-cnn-adv digits-gelu; do for ball in "Linf 0.1" "L2 0.5"; do \
	  set -- $$ball; echo "$$model $$ball"; $(BIN)/wda run notebooks/attack.ipynb -o _build/experiments/$$model-$$1.ipynb \
	    -p model $$model -p norm $$1 -p eps $$2 -p output data/results/digits; done; done
	@if [ -n "$(WDA_DATA)" ]; then $(BIN)/wda run notebooks/attack.ipynb -o _build/experiments/mnist.ipynb -p data mnist \
	  -p model mnist_trades_smallcnn -p n 1000 -p eps 0.3 -p kappas "[1, 2]" -p dtype float32 -p output data/results/mnist; \
	else echo "WDA_DATA is not set: the records in data/results/mnist stay as they are"; fi
	@$(MAKE) readme

theory: env  ## check the certificates on 300 random networks and record it (4 minutes)
	$(BIN)/python workflow/theory.py

recession: env  ## bound the slope l of every network at hand and record it (3 minutes, and 12 more where WDA_DATA is set)
	$(BIN)/python workflow/recession.py

hunt: env  ## look for errors in certified balls and record that none is found (5 minutes, and 5 more where WDA_DATA is set)
	$(BIN)/python workflow/hunt.py
	$(BIN)/python workflow/hunt.py --plant

fuzz: env  ## odd modules, damaged files, extreme numbers and thin cells: record that nothing is misread or believed (20 minutes)
	$(BIN)/python workflow/fuzz_modules.py
	$(BIN)/python workflow/fuzz_files.py --files 1200
	$(BIN)/python workflow/fuzz_inputs.py 500
	$(BIN)/python workflow/fuzz_calls.py
	$(BIN)/python workflow/thin.py

attacks: env  ## run every attack on the networks under WDA_DATA and record what is not yet recorded (hours)
	$(BIN)/python workflow/attacks.py

finetune: env  ## fine-tune the networks for the digits in every configuration and record what is not yet recorded (an hour, and more where WDA_DATA is set)
	$(BIN)/python workflow/finetune.py

# Cells that have a record are not run again. A sweep's seconds are worth something only where nothing else runs.
sweeps: env  ## run the sweeps that the book reads, on real networks, and keep their records (2 hours; needs WDA_DATA)
	@set -e; for name in table1-small kappa steps runtime scaling; do $(BIN)/wda sweep $$name; \
	  mkdir -p data/results/sweep/$$name; cp results/$$name/records/*.json data/results/sweep/$$name; done

kills: env  ## kill a sweep of 48 cells 22 times, send 50 signals to small ones, kill each of their processes, go on each time, and record that nothing is lost or run twice (30 minutes; needs WDA_DATA)
	$(BIN)/python workflow/kills.py local --kills 22

slurm: env  ## run a sweep here and through a Slurm of one node, as root, and record both (needs Debian or Ubuntu)
	workflow/slurm-node.sh
	$(BIN)/python workflow/slurm.py local

cost: env  ## count what Table 1 would cost on this device (2 minutes; with a GPU: workflow/cost.py --device cuda)
	$(BIN)/python workflow/cost.py

machines: env  ## run both README commands as on nine other machines, in fresh clones, and record how they end (hours)
	$(BIN)/python workflow/machines.py

benchmarks: env  ## time the package against yardsticks in the same run
	@set -e; for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script; done

models: env  ## train the bundled models again (4 minutes) and compare their accuracies with their cards
	$(BIN)/python workflow/train_models.py --check

notebooks: env  ## rerun notebooks/ in place: stored outputs and .py twins
	@rm -rf $(RESUMED)
	$(BIN)/jupytext --sync notebooks/*.ipynb
	$(BIN)/python workflow/notebooks.py notebooks/*.ipynb

readme: env  ## rewrite the README's table and picture from the records
	$(BIN)/python workflow/readme.py

lock: | $(BIN)/uv  ## resolve pyproject.toml into requirements.lock
	$(UV) compile -q --universal --python-version 3.11 --all-extras pyproject.toml -o requirements.lock

env: $(VENV)/.installed  ## only set up the environment

clean:  ## remove what was built; .venv and results/ stay
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A Debian python3.11 may lack ensurepip, and a pyenv shim may stand for a version that is not selected: ask each.
$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; \
	  then echo "$$python -m venv $(VENV)"; exec $$python -m venv --clear $(VENV); fi; \
	done; \
	echo "No usable Python found. Accepted: python3.11 or python3.12 with its venv module (on Debian and Ubuntu the" \
	     "package python3.11-venv or python3.12-venv), on PATH or as 'make PYTHON=/path/to/python3.11 ...'." >&2; exit 1

$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.8

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/uv
	$(UV) install -q -p $(BIN)/python -r requirements.lock
	$(UV) install -q -p $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

# Jupyter Book runs a chapter again when the chapter changes, not when what it imports or reads does; and it copies the
# static files only with a page. So when the contents of wda/, data/, book/_static/ or the lock differ from the last
# build's, forget the executed cells and the parsed pages.
_build/inputs: FORCE
	@mkdir -p _build
	@find wda data book/_static notebooks/example_model.* requirements.lock -type f ! -path '*/__pycache__/*' -exec cksum {} + | LC_ALL=C sort > $@.new
	@if cmp -s $@ $@.new; then rm $@.new; else rm -rf _build/.jupyter_cache _build/.doctrees && mv $@.new $@; fi
