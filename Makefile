# Everything happens in .venv, which is made on demand with `python3 -m venv` and pip, and remade when the pins change.
#   PYTHON=python3.12 make test    another interpreter
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test    a CPU build of torch, much smaller on Linux

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORLD := runs/world
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
# The oldest Triton the kernels have to compile with, beside the pinned one; a folder to put before the others, no environment.
OLDEST_TRITON := build/triton-3.6.0/.ready

.PHONY: help demo test test-slow soak check clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer; try: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; } || \
	  { rm -rf .venv; echo "error: $(PYTHON) -m venv failed (on Debian and Ubuntu: apt install python3-venv)"; exit 2; }
	@echo "installing into .venv, once: torch"
	@$(PIP) torch
	@echo "installing into .venv, once: everything else"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(OLDEST_TRITON): $(READY)
	@echo "installing into $(@D), once: $(notdir $(@D)), to compile with"
	@rm -rf $(@D)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) $(subst triton-,triton==,$(notdir $(@D)))
	@touch $@

$(WORLD)/train.jsonl: | $(READY)
	@echo "making the sample world"
	@start=$$(date +%s); $(BIN)/vatt data sample-world $(WORLD) --train 1600 --test 200 --seed 0 && \
	  echo "sample world: $$(( $$(date +%s) - start )) s"

demo: $(READY) $(WORLD)/train.jsonl ## pre-train a tiny VATT on real clips made here, evaluate it, write its report
	@rm -rf runs/demo
	@start=$$(date +%s); $(BIN)/vatt pretrain pretrain/tiny --output runs/demo && \
	  echo "vatt pretrain: $$(( $$(date +%s) - start )) s, start of the process included"

test: $(READY) $(OLDEST_TRITON) ## the tests a change has to pass (minutes)
	@$(PYTEST) -m "not slow and not soak"

test-slow: $(READY) $(OLDEST_TRITON) ## launchers, wheels, and samples of the long suites
	@$(PYTEST) -m "slow and not soak"

soak: $(READY) ## the long suites, with their figures; names them first
	@$(PYTEST) -m soak --collect-only
	@$(PYTEST) -m soak -s

check: $(READY) ## format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@mkdir -p build/typing/vatt
	@for folder in engine kernels configs; do ln -sfn ../../../$$folder build/typing/vatt/$$folder; done
	@$(BIN)/mypy build/typing/vatt/engine build/typing/vatt/kernels

clean: ## remove the environment and everything built (runs/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
