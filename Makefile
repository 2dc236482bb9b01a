# make repro   everything for the data sets that params.yaml lists, with DVC
# make test    the tests; make test-slow: the long ones; make check: ruff, mypy, import-linter
# make table   variants x three seeds on the demo: mean and spread
# make clean   remove all that was made; make clean-venv: the packages too
#
# INSTALL_ARGS goes to pip, e.g. INSTALL_ARGS='--index-url URL' for another torch (see README.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL_ARGS ?=

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro table test test-slow check clean clean-venv

repro: $(VENV)/.base
	dvc repro

table: $(VENV)/.base
	gmpipe compare --seed 0 --seed 1 --seed 2

test: $(VENV)/.dev
	pytest

test-slow: $(VENV)/.dev
	pytest -m slow

check: $(VENV)/.dev
	ruff check .
	ruff format --check .
	mypy
	lint-imports

clean:
	rm -rf runs reports .state .dvc/cache .dvc/tmp
	find data cache -mindepth 1 -not -name README.md -delete

clean-venv:
	rm -rf $(VENV)

# A marker a set of packages: a second call installs nothing unless pyproject.toml changed.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(INSTALL_ARGS) --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
