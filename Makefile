# Everything here works in the virtual environment .venv, which every target sets up for itself.
# ARGS go to the program: make train ARGS="granularity=block loss=kl alpha=0.5"

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
ARGS =
NAME = step
# Two at a time, each with one thread: threads that are crowded out of a core slow small models down tenfold.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Two makes at once take turns, where flock is to be had.
LOCK = $(if $(shell command -v flock),flock $(VENV)/.lock)

define CHECK_PYTHON
$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
"error: vitkd needs Python 3.11, 3.12 or 3.13 and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12 ..." % v)'
endef

.DEFAULT_GOAL := help
.PHONY: help install demo lint type test test-all train sweep tensorboard bench evidence clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv; the other targets do so by themselves
	@echo "$(VENV) is ready"

demo: $(STAMP) ## a teacher, a student distilled from it, and the student alone: two minutes, offline
	$(BIN)/python -m vitkd.train -m method=attention,none

train: $(STAMP) ## one run: make train ARGS="granularity=block loss=kl alpha=0.5"
	$(BIN)/python -m vitkd.train $(ARGS)

sweep: $(STAMP) ## a grid of runs: make sweep ARGS="loss=mse,ce,kl seed=0,1,2"
	$(BIN)/python -m vitkd.train -m $(ARGS)

tensorboard: $(STAMP) ## watch the runs in outputs/
	$(BIN)/tensorboard --logdir outputs $(ARGS)

bench: $(STAMP) ## one benchmark: make bench NAME=step ARGS=--quick
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

evidence: $(STAMP) ## the report's experiment with several seeds on CIFAR-100, for a GPU: make evidence ARGS="--minutes 9"
	$(BIN)/python -m benchmarks.evidence $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy
	$(BIN)/mypy

test: $(STAMP) ## the fast tests: make test ARGS="-k losses"
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP) ## every test, slow ones and those that need a GPU included
	$(PYTEST) $(ARGS)

clean: ## remove caches and build products; outputs/, data/ and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . \( -path ./$(VENV) -o -path ./data -o -path ./outputs \) -prune \
		-o -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp comes last, so an installation that was broken off is made good the next time.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(CHECK_PYTHON)
	@mkdir -p $(VENV)
	@$(LOCK) sh -ec ' \
		if [ $@ -nt $< ]; then exit; fi; \
		echo "Installing vitkd and what it needs into $(VENV); the first time takes some minutes."; \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); \
		$(BIN)/python -m pip install --disable-pip-version-check --editable ".[dev]"; \
		touch $@'
