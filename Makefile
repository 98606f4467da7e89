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

# For a GPU machine without network that has torch, torchvision, accelerate and pytest, but not
# these: wheels for Python 3.12, 35 MB in .gpu/wheels and 60 MB in .gpu/llvmlite, which may have to
# be brought one after the other. `make gpu` there uses them.
GPU_WHEELS := defusedxml faster-coco-eval llvmlite numba nvidia-nvimgcodec-cu13 nvidia-nvjpeg \
  rich timm webdataset

gpu-bundle: $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  --constraint constraints.txt --dest .gpu/wheels $(GPU_WHEELS)
	mkdir -p .gpu/llvmlite && mv .gpu/wheels/llvmlite-*.whl .gpu/llvmlite

gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .gpu/site .gpu/wheels/*.whl .gpu/llvmlite/*.whl
	PYTHONPATH=.gpu/site:. $(PYTHON) -m pytest -m gpu

# After `make gpu`, most wanted first; each leaves NAME.json and NAME.md in RESULTS. Some 20 minutes,
# no call more than 10. One report of train_step is filled part by part, and saved after each section,
# so that what is cut off is only the rest; a call that fails does not take the next with it.
RESULTS ?= .gpu/results
GPU_PYTHON := PYTHONPATH=.gpu/site:. $(PYTHON)
TRAIN_STEP := timeout 560 $(GPU_PYTHON) benchmarks/train_step.py --add --json $(RESULTS)/train_step.json \
  --markdown $(RESULTS)/train_step.md --trace $(RESULTS)/trace.json.gz --rounds 7 --build-limit 90

gpu-benchmarks:
	mkdir -p $(RESULTS)
	-$(TRAIN_STEP) --parts classifiers --variants large --classifier-batch 512 --budget 240
	-$(TRAIN_STEP) --parts layers --classifier-batch 512
	-$(TRAIN_STEP) --parts classifiers --variants small --classifier-batch 512 --budget 120 --amp bf16,fp16 --compile default,reduce-overhead
	-$(TRAIN_STEP) --parts detectors,counts --budget 150 --compile default,reduce-overhead
	-timeout 300 $(GPU_PYTHON) benchmarks/nms.py --devices cuda --trace $(RESULTS)/trace-nms.json.gz --json $(RESULTS)/nms.json --markdown $(RESULTS)/nms.md
	-timeout 400 $(GPU_PYTHON) benchmarks/end_to_end.py --amp bf16 --rounds 3 --json $(RESULTS)/end_to_end.json --markdown $(RESULTS)/end_to_end.md
	-$(TRAIN_STEP) --parts inference --classifier-batch 512 --budget 90 --compile default,max-autotune-no-cudagraphs
	-timeout 300 $(GPU_PYTHON) benchmarks/gpu_pixels.py --json $(RESULTS)/gpu_pixels.json --markdown $(RESULTS)/gpu_pixels.md

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
