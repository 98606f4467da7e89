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

.PHONY: setup quickstart test test-fast test-floor lint format report bench gpu-bundle gpu gpu-benchmarks bench-peers clean

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

# The same tests with the oldest versions that pyproject.toml admits, in an environment of their own
# (6 GB). Python 3.12, because that is what the GPU machine has beside torch 2.11 and Triton 3.6.
FLOOR_PYTHON ?= python3.12
FLOOR := .venv-floor

test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest -n 2 --dist worksteal

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	@$(FLOOR_PYTHON) -c '' 2>/dev/null || { echo "make: $(FLOOR_PYTHON) does not start:" \
	  "test-floor needs Python 3.12; say where it is with FLOOR_PYTHON=..." >&2; exit 1; }
	$(FLOOR_PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-floor.txt --editable '.[dev]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python benchmarks/report.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For a GPU machine without network that has torch, torchvision, accelerate, timm, numba and pytest,
# but not these: wheels for Python 3.12, 30 MB in .gpu/wheels, which has to be brought there.
GPU_WHEELS := braceexpand defusedxml faster-coco-eval nvidia-nvimgcodec-cu13 nvidia-nvjpeg webdataset

gpu-bundle: $(STAMP)
	rm -rf .gpu/wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  --constraint constraints.txt --dest .gpu/wheels $(GPU_WHEELS)

# There, or without make: python3 benchmarks/gpu_session.py --list
gpu:
	$(PYTHON) benchmarks/gpu_session.py install tests

gpu-benchmarks:
	$(PYTHON) benchmarks/gpu_session.py nms large detectors end_to_end layers small inference gpu_pixels

# Every benchmark that this machine can run, shortened to less than 20 minutes on two cores.
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py

# benchmarks/RESULTS.md, benchmarks/plots and the README's tables, from benchmarks/results.
report: $(STAMP)
	$(BIN)/python benchmarks/report.py

# The systems that benchmarks/ measures beside ours, in an environment of their own (7 GB). Where
# FFCV cannot be compiled the rest is there, and the benchmarks say so.
PEERS := .venv-peers
PEERS_FILES := benchmarks/requirements-peers.txt benchmarks/requirements-pixels.txt
FFCV_FILE := benchmarks/requirements-ffcv.txt

bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: $(PEERS_FILES) $(FFCV_FILE)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_FILES:%=--requirement %)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  --no-deps --requirement $(FFCV_FILE) || echo "make: FFCV could not be compiled: it needs a" \
	  "C++ compiler, pkg-config, libopencv-dev and libturbojpeg0-dev; the others are installed"
	@touch $@

clean:
	rm -rf $(PEERS) $(FLOOR) $(VENV) .cache *.egg-info
