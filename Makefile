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
_ := $(shell mkdir -p .cache/tmp)

.PHONY: setup quickstart test test-fast lint format gpu-bundle gpu bench-peers clean

setup: $(STAMP)

# Installed again only when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python -m mbv3dist quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For a GPU machine without network that has torch, torchvision, accelerate and pytest, but not
# these: wheels for Python 3.12 in .gpu/wheels (4 MB). `make gpu` there uses them.
GPU_WHEELS := defusedxml faster-coco-eval rich timm webdataset

gpu-bundle: $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  --constraint constraints.txt --dest .gpu/wheels $(GPU_WHEELS)

gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .gpu/site .gpu/wheels/*.whl
	PYTHONPATH=.gpu/site:. $(PYTHON) -m pytest -m gpu

# The systems that benchmarks/ measures beside ours, in an environment of their own (5 GB).
PEERS := .venv-peers

bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

clean:
	rm -rf $(PEERS) $(VENV) .cache *.egg-info
