# Everything here works in the virtual environment .venv, which every target sets up for itself.
# ARGS go to the program: make train ARGS="granularity=block loss=kl alpha=0.5"

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# uv resolves versions; pip installs them. It has an environment of its own, so that `make lock` needs no other.
UV = .uv/bin/uv
UV_VERSION = 0.13.9
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
.PHONY: help install lock demo lint type test test-all test-lowest train sweep tensorboard bench evidence clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv with the versions in requirements.lock; the other targets do so by themselves
	@echo "$(VENV) is ready"

# Versions that the file has stay unless pyproject.toml or ARGS say otherwise.
lock: $(UV) ## write requirements.lock; ARGS=--upgrade takes the newest versions
	$(UV) pip compile --universal --python-version 3.11 --extra dev --custom-compile-command "make lock" \
		--no-annotate --output-file requirements.lock $(ARGS) pyproject.toml >/dev/null

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

evidence: $(STAMP) ## make RESULTS.md and the answer in README.md of benchmarks/evidence
	$(BIN)/python -m benchmarks.results_page $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy
	$(BIN)/mypy

test: $(STAMP) ## the fast tests: make test ARGS="-k losses"
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP) ## every test, slow ones and those that need a GPU included
	$(PYTEST) $(ARGS)

# Bytecode is compiled beforehand, as pip does: warnings of old packages' syntax are no errors of the tests.
test-lowest: VENV = .venv-lowest
test-lowest: $(UV) ## the fast tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
	$(UV) pip install --python $(VENV) --resolution lowest-direct --compile-bytecode --editable ".[dev]"
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

clean: ## remove caches and build products; outputs/, data/ and the environments stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . \( -path './.venv*' -o -path ./.uv -o -path ./data -o -path ./outputs \) -prune \
		-o -type d -name __pycache__ -prune -exec rm -rf {} +

$(UV):
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --disable-pip-version-check --quiet uv==$(UV_VERSION)

# Exactly what the lock names is installed, and nothing is resolved: pyproject.toml's ranges are for others. What comes
# as source is built with the locked hatchling and setuptools, not with whatever is newest in a build environment.
# The stamp comes last, so an installation that was broken off is made good the next time.
$(STAMP): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(CHECK_PYTHON)
	@mkdir -p $(VENV)
	@$(LOCK) sh -ec ' \
		if [ $@ -nt pyproject.toml ] && [ $@ -nt requirements.lock ]; then exit; fi; \
		echo "Installing vitkd and what it needs into $(VENV); the first time takes some minutes."; \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); \
		pip="$(BIN)/python -m pip install --disable-pip-version-check"; \
		$$pip --constraint requirements.lock hatchling editables setuptools; \
		$$pip --no-deps --no-build-isolation --requirement requirements.lock --editable .; \
		touch $@'
