# Each target is one command on a fresh machine (Debian-like: python3.11 with venv, g++, make).
# Stamps in build/stamps make every step run once until its inputs change.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps
RUNS := runs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One architecture builds in seconds: this machine's GPU's, an H100's where there is none. `make wheels`
# builds all that nvcc knows.
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1 | tr -d .)
export FASTCOV_CUDA_ARCHS ?= $(or $(GPU_ARCH),90)

NATIVE_SOURCES := CMakeLists.txt $(wildcard cmake/* csrc/*)
PACKAGE_SOURCES := pyproject.toml README.md LICENSE fastcov/py.typed \
	$(shell find fastcov -name '*.py' -o -name '*.html')
DETECTION_SOURCES := $(shell find detection -name '*.py' -not -path '*/build/*') \
	$(wildcard detection/pyproject.toml detection/README.md detection/fastcov_detection/report/page.html)

# Tests and benchmarks run against the installed wheel: with PYTHONSAFEPATH, and through the scripts
# in .venv/bin, the checkout's fastcov/ is never on sys.path, in child processes neither.
INSTALLED := PYTHONSAFEPATH=1
CHECK_INSTALLED := $(INSTALLED) $(BIN)/python tools/check_installed.py

.PHONY: help setup dev demo docs pictures test test-quick test-matrix bench bench-full bench-gpu gpu-session sanitize-gpu wheels lint readme-tables clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | \
		expand -t 22

$(BIN)/python:
	@echo "fastcov: creating $(VENV) with $(PYTHON)"
	@command -v $(PYTHON) > /dev/null || { echo "fastcov: $(PYTHON) not found;" \
		"install Python 3.11 or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(STAMPS)/environment: constraints.txt | $(BIN)/python
	@echo "fastcov: installing the pinned packages of constraints.txt (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq -r constraints.txt
	@mkdir -p $(@D) && touch $@

$(STAMPS)/wheel: $(STAMPS)/environment $(NATIVE_SOURCES) $(PACKAGE_SOURCES)
	@echo "fastcov: building the wheel (CUDA architectures: $(FASTCOV_CUDA_ARCHS))"
	@rm -f dist/fastcov_torch-*.whl
	@$(BIN)/python -m pip wheel -qq . --no-deps --no-build-isolation -w dist
	@mkdir -p $(@D) && touch $@

$(STAMPS)/installed: $(STAMPS)/wheel $(DETECTION_SOURCES)
	@echo "fastcov: installing $$(ls dist/fastcov_torch-*.whl) and detection/"
	@$(BIN)/python -m pip install -qq --no-deps --force-reinstall dist/fastcov_torch-*.whl ./detection
	@$(CHECK_INSTALLED)
	@touch $@

setup: $(STAMPS)/installed  ## virtual environment, pinned packages, wheel built and installed

dev: | $(BIN)/python  ## compiled libraries into fastcov/lib, to work from the checkout
	@$(BIN)/cmake -S . -B build/dev -G Ninja -DPython3_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) --log-level=WARNING
	@$(BIN)/cmake --build build/dev -- --quiet
	@$(BIN)/cmake --install build/dev --prefix $(CURDIR) > build/dev/install.log
	@ls -l fastcov/lib

demo: setup  ## the main job: data, search, retraining, table and report in runs/demo (5 minutes)
	@$(INSTALLED) $(BIN)/fastcov-detection demo --out $(RUNS)/demo

# Workers share the cores: threads that wait must not spin. Tests marked `alone` measure time; all lie in
# tests/bench, so that the others need not be collected again.
WORKERS ?= 2
PARALLEL := $(INSTALLED) OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup  ## every test, against the installed wheel
	@status=0; $(PARALLEL) -m "not alone" || status=$$?; \
		$(INSTALLED) $(BIN)/pytest -m alone tests/bench || status=$$?; exit $$status

test-quick: setup  ## a contributor's loop, below 3 minutes: what needs no compiler, training or process
	@$(PARALLEL) -m "not alone and not slow and not dist and not wheel" \
		--ignore tests/csrc --ignore tests/detection --ignore tests/integrations --ignore tests/training

docs: setup  ## the site in docs/_build/html; a warning or a broken link inside is an error
	@$(INSTALLED) $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

pictures: setup  ## pictures of docs/pictures.md and README, from a training of half a minute
	@$(INSTALLED) $(BIN)/python docs/pictures/make.py

bench: setup  ## benchmarks of this machine's CPU beside its peers, at most 25 minutes
	@$(INSTALLED) $(BIN)/fastcov bench

bench-full: setup  ## the same over the whole grid
	@$(INSTALLED) $(BIN)/fastcov bench --full

bench-gpu: setup  ## the GPU's target table, at most 9 minutes
	@$(INSTALLED) $(BIN)/fastcov bench --gpu

sanitize-gpu: setup  ## TOOL=memcheck|racecheck|synccheck over the eigenvalue kernels on a GPU
	@$(INSTALLED) $(BIN)/python tools/sanitize_gpu.py $(or $(TOOL),memcheck)

gpu-session:  ## PART="build kernels test ..." (`list` shows all) on a GPU with the python3 there
	@tools/gpu_session.sh $(or $(PART),$(shell tools/gpu_session.sh list))

wheels: $(STAMPS)/environment  ## release wheel and Triton's resources, for the GPUs that torch serves; tagged honestly
	@$(BIN)/python tools/build_release.py dist/release
	@$(BIN)/python -m tests.kernels.aot --check 80 90 100 120
	@$(BIN)/python tests/csrc/cuda_resources.py --spills

test-matrix: $(STAMPS)/wheel  ## the wheel under further Pythons and torch versions
	@$(BIN)/python tools/test_matrix.py dist

lint: $(STAMPS)/environment  ## ruff, mypy, import-linter, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=.:detection $(BIN)/lint-imports
	@$(BIN)/clang-format --dry-run -Werror csrc/*

readme-tables: setup  ## tables and figures of README.md, docs and benchmarks/README.md from benchmarks/results
	@$(INSTALLED) $(BIN)/python benchmarks/plot.py

clean:  ## what was built; the virtual environment and runs stay
	rm -rf build dist fastcov/lib
