# make install     create .venv and install the package in it; the other targets call this
# make repro       run every stage for the data sets that params.yaml lists, with DVC
# make table       train all variants with three seeds on the demo: mean and spread
#
# make test        run the tests
# make test-slow   run the long tests: kills, damage, full disks, memory at scale
# make test-gpu    run the tests that need an NVIDIA GPU; where nothing may be installed, with another
#                  Python: `make test-gpu GPU_PYTHON=python3`
# make check       run ruff, mypy and import-linter
# make format      sort imports, fix what ruff can fix, format the code
# make coverage    run the tests and report which lines they do not reach
#
# make clean       remove what was made for the demo; other data sets are never touched
# make clean-venv  remove the virtual environment
#
# Packages are installed in the versions that constraints.txt pins. `make install CONSTRAINTS=`
# takes the newest versions that pyproject.toml allows instead.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable

# Two processes: each test uses one core, and the tests of a file share what they have made.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile

# Runs the tests on a GPU, in one process: several would share its time and memory.
GPU_PYTHON ?= $(BIN)/python

# The commands of dvc.yaml use this environment, also if another one is active.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install repro table test test-slow test-gpu check format coverage clean clean-venv

install: $(VENV)/.base

repro: $(VENV)/.base
	$(BIN)/dvc repro
	@echo "Open in a browser:" && ls reports/*/index.html

table: $(VENV)/.base
	$(BIN)/gmpipe compare --dataset demo --seed 0 --seed 1 --seed 2

test: $(VENV)/.dev
	$(PYTEST)

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

test-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(VENV)/.dev)
	$(GPU_PYTHON) -m pytest -m cuda -p no:xdist tests/gpu

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(VENV)/.dev
	$(PYTEST) --cov --cov-report term:skip-covered --cov-report html
	@echo "Open in a browser:" && ls htmlcov/index.html

# The error that nothing was made is none here.
clean: $(VENV)/.base
	-$(BIN)/gmpipe clean demo --yes

clean-venv:
	rm -rf $(VENV)

# These files mark what is installed: a second call installs nothing unless a list of packages
# changed.
$(VENV)/.base: pyproject.toml $(CONSTRAINTS)
	@echo "installing packages into $(VENV); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) '.[dev]'
	touch $@
