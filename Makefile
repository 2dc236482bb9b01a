# make install    the virtual environment with all that commands need; the others call it
# make repro      everything for the data sets that params.yaml lists, with DVC
# make table      all variants with three seeds on the demo: mean and spread
# make test       the tests; make test-slow: the long ones; make check: ruff, mypy, import-linter
# make clean      remove what was made for the demo; other data sets are never touched
# make clean-venv remove the installed packages

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# For the commands of dvc.yaml, which call `gmpipe` by name.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install repro table test test-slow check clean clean-venv

install: $(VENV)/.base

repro: $(VENV)/.base
	$(BIN)/dvc repro
	@echo "Open in a browser:" && ls reports/*/index.html

table: $(VENV)/.base
	$(BIN)/gmpipe compare --dataset demo --seed 0 --seed 1 --seed 2

# Two processes: each test uses one core, and a file's tests share what they have made.
test: $(VENV)/.dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf data/demo cache/demo runs/demo reports/demo .state/times/demo.csv

clean-venv:
	rm -rf $(VENV)

# Markers of what is installed: a second call installs nothing unless pyproject.toml changed.
$(VENV)/.base: pyproject.toml
	@echo "installing packages into $(VENV); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install --editable '.[dev]'
	touch $@
