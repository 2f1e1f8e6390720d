# Everything a person or a machine types. Each target sets up what it needs; `make help` lists them.
# PYTHON=/path/to/python3.11 chooses the interpreter, PYTEST="-k commit" adds arguments for pytest, BENCH="topic ..."
# chooses what to measure.

PYTHON ?= python3
PYTEST ?=
FUZZ   ?= --seed 1 --count 1000000
BENCH  ?=
JOBS   ?= 2
BIN    := .venv/bin
SHELL  := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-crash test-fuzz bench bench-quick lint format types check-generated schema docs peers peers-long clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 26

demo: .venv/.demo  ## watch a live block commit on three real images (needs Python and pip only)
	@$(BIN)/python demo/commit.py

test: lint types check-generated peers  ## everything that must hold before a change is done
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not long and not bench" $(PYTEST)

test-long: .venv/.dev peers-long  ## the long forms of the randomised tests
	$(BIN)/python -m pytest -q -n $(JOBS) -m long --timeout 1800 --ignore tests/crash $(PYTEST)

test-crash: .venv/.dev peers  ## kill and cut the power of commits, everywhere; CRASH_SEED=2 for other random choices
	$(BIN)/python -m pytest -q -n $(JOBS) -m long --timeout 3600 $(PYTEST) tests/crash

test-fuzz: .venv/.dev  ## a million damaged images; FUZZ="--seed 2 --count 5000" for others
	$(BIN)/python -m tests.fuzz $(FUZZ)

bench: .venv/.dev peers  ## measure against qemu-storage-daemon, as ratios
	$(BIN)/python -m tests.bench $(BENCH)

bench-quick: .venv/.dev peers  ## the same on small images, once: do the measurements still work?
	BENCH_SCALE=0.02 BENCH_RUNS=1 $(BIN)/python -m tests.bench $(BENCH)

lint: .venv/.dev  ## ruff, both halves
	$(BIN)/ruff check qmpd tests demo tools
	$(BIN)/ruff format --check qmpd tests demo tools

types: .venv/.dev  ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy --strict demo/*.py tools/*.py

check-generated: .venv/.dev  ## are schema/ and docs/compatibility.md what the code says?
	$(BIN)/python tools/schema.py --check
	$(BIN)/python tools/compat.py --check

format: .venv/.dev  ## let ruff put things in order
	$(BIN)/ruff check --fix qmpd tests demo tools
	$(BIN)/ruff format qmpd tests demo tools

schema: .venv/.dev  ## write schema/ anew from the command registry
	$(BIN)/python tools/schema.py

docs: .venv/.dev  ## write docs/compatibility.md anew from docs/deviations.toml
	$(BIN)/python tools/compat.py

peers:
	@tools/peers.sh

peers-long:
	@tools/peers.sh long

clean:  ## back to a fresh clone
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qmpd tests demo tools -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml exactly when the environment holds what pyproject.toml asks for.
.venv/.demo: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" tools/setup.sh
	@touch $@

.venv/.dev: pyproject.toml tools/setup.sh
	@PYTHON="$(PYTHON)" tools/setup.sh dev
	@touch .venv/.demo $@
