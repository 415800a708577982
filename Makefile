# make test    sets everything up and runs the core tests        make demo    sets everything up and runs the demonstration
# make lint    what CI checks besides                            make bench   the benchmarks on a CPU
# make docs    the documentation as a site in build/site, without a warning
# make gpu     tests and benchmarks on one CUDA GPU              make aot     compiles the Triton kernels for GPUs that are not here
# All but make gpu set themselves up from nothing: a virtual environment in .venv, PyTorch, the requirements, the compiled kernels.
# Later calls reuse all that and rebuild the kernels only when their sources have changed.
#
#   PYTHON=python3.12            which Python the virtual environment is made with (3.10 to 3.13)
#   TORCH_ARGS="--index-url U"   more arguments to pip for PyTorch alone, for example an index of CPU-only builds
#   TRITON="triton==3.7.1"       the Triton that is installed where PyTorch brings none (its CUDA builds do); Linux only
#   PYTEST_ARGS="-k perturbed"   more arguments to pytest
#   GPU_PYTHON=python3           which Python runs make gpu: one that has torch and triton; nothing is installed into it
#   GPU_ARGS="--quick"           more arguments to benchmarks/gpu.py
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
TRITON ?= triton==3.7.1
GPU_PYTHON ?= python3
GPU_ARGS ?=
PYTEST_ARGS ?=
VCORE_BUILD_CPP ?= auto
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NATIVE := CMakeLists.txt setup.py $(wildcard csrc/*)
CPP := $(filter %.h %.cpp %.cu,$(wildcard csrc/* tests/kernels/*.cpp))
# Tests that need a device, other tools or much time; .ci/run runs them where it can.
CORE := not gpu and not interpreter and not aot and not distributed and not slow

.DELETE_ON_ERROR:
.PHONY: help setup test demo lint format bench docs aot gpu clean

help:
	@sed -n 's/^# \{0,1\}//p;/^PYTHON/q' Makefile

$(VENV)/torch.stamp:
	@echo "[1/3] virtual environment and $(TORCH)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d. Use make PYTHON=..." % v)'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)."; exit 1; }
	@# PyTorch alone and first, by its exact version: whatever asks for torch later finds it satisfied.
	@$(BIN)/python -m pip install -q "$(TORCH)" $(TORCH_ARGS)
	@touch $@

# The compiled kernels are left to the next step, so that a change of requirements does not rebuild them.
$(VENV)/packages.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "[2/3] requirements"
	@$(BIN)/python -m pip install -q "setuptools>=77" "cmake>=3.20" ninja
	@# A CUDA build of PyTorch has brought the Triton that it was tested with, which stays. There are builds for Linux alone.
	@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then $(BIN)/python -m pip install -q --no-deps "$(TRITON)"; fi
	@VCORE_BUILD_CPP=0 $(BIN)/python -m pip install -q --no-build-isolation -e ".[train,dev]"
	@touch $@

$(VENV)/kernels.stamp: $(VENV)/packages.stamp $(NATIVE)
	@echo "[3/3] compiled kernels"
	@PATH="$(CURDIR)/$(BIN):$$PATH" VCORE_BUILD_CPP=$(VCORE_BUILD_CPP) $(BIN)/python setup.py -q build_ext --inplace >$(VENV)/kernels.log 2>&1 \
	  || { cat $(VENV)/kernels.log; exit 1; }
	@grep -h "were not built" $(VENV)/kernels.log || true
	@touch $@

setup: $(VENV)/kernels.stamp

# Two workers with one thread each: the tensors are tiny, and threads that wait for each other cost more than they save.
# One worker, as a debugger needs: PYTEST_ARGS=-n0.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "$(CORE)" -n2 --dist loadfile -p no:benchmark $(PYTEST_ARGS)

demo: setup
	$(BIN)/vcore demo --out runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

# The committed report of the compilers on the Triton kernels; CI fails when it is stale.
aot: setup
	$(BIN)/python benchmarks/aot.py --write

# One command without a network, for a machine whose Python has torch and triton already.
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out benchmarks/results $(GPU_ARGS)

bench: setup
	$(BIN)/python -m pytest -q benchmarks/ --benchmark-only --bench-out benchmarks/results $(PYTEST_ARGS)

# What the site is made with is no part of setup: nothing else needs it.
$(VENV)/docs.stamp: $(VENV)/packages.stamp pyproject.toml
	@VCORE_BUILD_CPP=0 $(BIN)/python -m pip install -q --no-build-isolation -e ".[docs]"
	@touch $@

docs: setup $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info vcore_kernels/_C.so vcore_kernels/_C_cuda.so .pytest_cache .mypy_cache .ruff_cache
