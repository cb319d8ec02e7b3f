# `make` alone lists what there is.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install smoke test test-fast certify drill lint slurm slurm-stop bench bench-data bench-checkpoint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)  ## .venv with bigtrain and everything it needs

# The stamp makes it idempotent: it runs again only when the dependencies change.
$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is missing or older than Python 3.11; name a newer one: make install PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv \
	  || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into .venv; the first time takes minutes"
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints-cpu.txt
	@touch $@

smoke: install  ## train a small model on this machine's Python sources: 4 CPU ranks, under 10 minutes
	$(BIN)/python -m bigtrain.launch +experiment=smoke

test: install  ## the whole test suite
	@sh tests/install_system_packages.sh
	$(BIN)/pytest -n 2 --no-loadscope-reorder

test-fast: install  ## the quick tests, under 2 minutes
	$(BIN)/pytest -m "not slow" tests/unit

certify: install  ## every layout on up to 8 CPU ranks against Transformers: up to 40 minutes
	$(BIN)/python tools/layouts.py --all --json runs/layouts.json --page runs/layouts.html

drill: install  ## make a small run fail in every way, in every phase: up to 40 minutes
	$(BIN)/python tools/drill.py --json runs/drill.json --page runs/drill.html

lint: install  ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

slurm:  ## a real two-node Slurm cluster on this machine, to try +cluster=slurm
	@sh tests/install_system_packages.sh
	@launchers/localslurm/localslurm start

slurm-stop:  ## end it, and what runs there
	@launchers/localslurm/localslurm stop

bench: install  ## speed of a training step against plain PyTorch and Transformers
	$(BIN)/python tools/bench/step.py

bench-data: install .venv/bench/.installed  ## speed of reading data against webdataset, streaming, litdata, megatron-core
	$(BIN)/python tools/bench/data.py

bench-checkpoint: install  ## speed of checkpoints against torch.save, safetensors, dcp and the disk: 25 minutes, 15 GB
	$(BIN)/python tools/bench/checkpoint.py

# Beside the packages of .venv and behind them: none of those changes.
.venv/bench/.installed: tools/bench/data-requirements.txt
	rm -rf .venv/bench
	$(BIN)/pip install --quiet --no-deps --target .venv/bench -r $<
	@touch $@

clean:  ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
