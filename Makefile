# make quickstart | test | lint | setup. Each sets up .venv by itself the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Caches and temporary files stay inside the clone.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export XDG_CONFIG_HOME := $(CURDIR)/.cache/config
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TMPDIR := $(CURDIR)/.cache/tmp
_ := $(shell mkdir -p $(CURDIR)/.cache/tmp)

.PHONY: setup quickstart test test-fast lint format clean

setup: $(STAMP)

# Installed again only when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python -m mbv3dist quickstart

test: lint
	$(BIN)/python -m pytest

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache runs *.egg-info
