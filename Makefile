# `make help` lists the targets. Everything happens in .venv (`make cuda-build`: in .venv-cuda); stamps there keep
# a second run short.
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= 2
DEMO_FLAGS ?=
BENCH_FLAGS ?=
EXAMPLE_FLAGS ?=
EVIDENCE_FLAGS ?=
GATE_FLAGS ?=
GPU_FLAGS ?=
CUDA_TORCH ?= 2.12.0
CL_KERNELS_SKIP_BUILD ?=
CL_KERNELS_FORCE_CUDA_BUILD ?=
# Where there is no GPU, nothing here would run CUDA kernels: they would be minutes of compilation for nothing.
GPUS := $(wildcard /dev/nvidia[0-9]* /dev/dxg)
CL_KERNELS_SKIP_CUDA_BUILD ?= $(if $(GPUS)$(filter-out 0,$(CL_KERNELS_FORCE_CUDA_BUILD)),,1)
# Here a build that fails is an error; without a compiler: make demo CL_KERNELS_SKIP_BUILD=1
CL_KERNELS_FORCE_BUILD ?= $(if $(filter-out 0,$(CL_KERNELS_SKIP_BUILD)),,1)
export CL_KERNELS_SKIP_BUILD CL_KERNELS_FORCE_BUILD CL_KERNELS_SKIP_CUDA_BUILD CL_KERNELS_FORCE_CUDA_BUILD

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.h %.inl %.cpp %.cuh %.cu,$(SOURCES))
# A stamp for each kind of install, so that changing a switch installs again.
KIND := $(if $(filter-out 0,$(CL_KERNELS_SKIP_CUDA_BUILD)),-cpu)
EXAMPLES := $(addprefix example-,supcon selfcon sce dimcl multilevel towers)
BUILT := $(VENV)/.built$(if $(filter-out 0,$(CL_KERNELS_SKIP_BUILD)),-pure,$(KIND))

.PHONY: help demo test test-full test-peers lint format bench bench-report acceptance regression figures compile-gate gpu-check
.PHONY: build cuda-build clean distclean evidence $(EXAMPLES)
.DEFAULT_GOAL := help

help:  ## show this list
	@awk 'BEGIN {FS = ":.*##"} /^[a-z-]+:.*##/ {printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make example-SYSTEM  train a system: $(EXAMPLES:example-%=%)"
	@echo
	@echo "  PYTHON=python3.12          the interpreter that .venv is made with"
	@echo "  PIP_FLAGS=...              passed to every pip install"
	@echo "  PYTEST_FLAGS='-k supcon'   passed to pytest; likewise DEMO_, EXAMPLE_, EVIDENCE_, BENCH_, GATE_, GPU_FLAGS"
	@echo "  CUDA_TORCH=2.11.0          the torch of cuda-build, each in an environment of its own"
	@echo "  CL_KERNELS_SKIP_BUILD=1    do without a C++ compiler"
	@echo "  CL_KERNELS_SKIP_CUDA_BUILD=0    compile the CUDA kernels for torch with CUDA on a machine without a GPU"

demo: $(BUILT)  ## train on handwritten digits, eager against ours; plot time and memory
	$(BIN)/python examples/digits.py $(DEMO_FLAGS)

$(EXAMPLES): example-%: $(BUILT) $(VENV)/.examples
	$(BIN)/python -m examples.$* $(EXAMPLE_FLAGS)

evidence: $(BUILT) $(VENV)/.examples  ## all systems, five seeds, ours and eager in turn: docs/evidence.md
	$(BIN)/python -m examples.evidence $(EVIDENCE_FLAGS)

PYTEST = $(if $(findstring -pure,$(BUILT)),,CL_KERNELS_REQUIRE_EXTENSION=1) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

test: $(BUILT) $(VENV)/.dev  ## the test suite as a push runs it
	$(PYTEST) $(PYTEST_FLAGS)

test-peers: $(BUILT) $(VENV)/.peers  ## the losses of other libraries beside ours: values, gradients
	$(PYTEST) tests/peers $(PYTEST_FLAGS)

test-full: $(BUILT) $(VENV)/.dev  ## the whole of it: every dtype and temperature
	$(PYTEST) -m full $(PYTEST_FLAGS)
	$(if $(PYTEST_FLAGS),,PYTHONPATH=gates $(BIN)/python tests/matrix.py)

lint: $(VENV)/.dev  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cl_kernels
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

format: $(VENV)/.dev  ## rewrite the sources to the style that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: $(BUILT) $(VENV)/.dev  ## microbenchmarks of every loss, variant and phase (pytest-benchmark)
	$(BIN)/python -m pytest bench -q --benchmark-columns=min,median,rounds --benchmark-sort=fullname $(BENCH_FLAGS)

bench-report: $(BUILT) $(VENV)/.bench  ## ours beside other implementations: bench_output/report.html
	$(BIN)/python -m cl_kernels bench $(BENCH_FLAGS)

regression: $(BUILT) $(VENV)/.bench  ## what became slower since the stored results of this kind of machine
	$(BIN)/python bench/regression.py

figures: $(BUILT) $(VENV)/.bench  ## the documents' figures from the stored results
	$(BIN)/python bench/docs.py

acceptance: $(BUILT) $(VENV)/.bench  ## speed and memory measures against their targets
	$(BIN)/python bench/acceptance.py $(BENCH_FLAGS)

compile-gate: $(BUILT)  ## GPU kernels without a GPU: compile what is not recorded; GATE_FLAGS=--all, --update
	$(BIN)/python gates/triton_gate.py $(GATE_FLAGS)
	$(BIN)/python gates/cuda_gate.py $(filter --all --update,$(GATE_FLAGS))

# On a machine with a GPU and no network: $(PYTHON) as it is, with torch, triton, pytest and the libraries of the
# extra bench, and no .venv.
gpu-check:  ## tests, memory checkers and timings on this machine's GPU
	$(PYTHON) bench/gpu_check.py $(GPU_FLAGS)

build: $(BUILT)  ## install the package in .venv and compile its extensions

# python setup.py build_ext keeps its objects in build/, so that only changed files are compiled again.
$(VENV)/.built $(VENV)/.built-cpu: $(VENV)/.installed setup.py cl_kernels/cuda_build.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@rm -f $(VENV)/.built* && touch $@

$(VENV)/.built-pure: $(VENV)/.installed
	CL_KERNELS_FORCE_BUILD= $(BIN)/python setup.py --quiet build_ext --inplace
	@rm -f $(VENV)/.built* && touch $@

$(VENV)/.installed: $(VENV)/.demo pyproject.toml
	CL_KERNELS_SKIP_BUILD=1 CL_KERNELS_FORCE_BUILD= $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.examples requirements/dev.txt
	$(PIP) --requirement requirements/dev.txt
	@touch $@

$(VENV)/.peers: $(VENV)/.dev requirements/peers.txt
	$(PIP) --requirement requirements/peers.txt
	@touch $@

$(VENV)/.examples: $(VENV)/.bench requirements/examples.txt
	$(PIP) --requirement requirements/examples.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.demo requirements/bench.txt
	$(PIP) --requirement requirements/bench.txt
	@touch $@

$(VENV)/.demo: $(BIN)/python requirements/demo.txt
	$(PIP) --requirement requirements/demo.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cl_kernels needs Python 3.10 or later; PYTHON= names another")'
	$(PYTHON) -m venv $(VENV)

# A wheel is built away from the checkout, as for its users, and imported from outside.
CUDA_VENV := $(abspath .venv-cuda/$(CUDA_TORCH))
CUDA_PIP := $(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
CUDA_ARCHITECTURES := $(or $(TORCH_CUDA_ARCH_LIST),8.0;9.0)

cuda-build: $(CUDA_VENV)/.torch  ## compile the CUDA kernels for a CUDA build of torch, install and check them; no GPU
	rm -rf $(CUDA_VENV)/build/lib* $(CUDA_VENV)/build/bdist*
	printf '[build]\nbuild_base = %s\n' $(CUDA_VENV)/build > $(CUDA_VENV)/build.cfg
	CL_KERNELS_SKIP_BUILD= CL_KERNELS_SKIP_CUDA_BUILD= CL_KERNELS_FORCE_BUILD=1 CL_KERNELS_FORCE_CUDA_BUILD=1 \
		TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHITECTURES)' MAX_JOBS=$(or $(MAX_JOBS),$(JOBS)) \
		DIST_EXTRA_CONFIG=$(CUDA_VENV)/build.cfg PATH="$(CUDA_VENV)/bin:$$PATH" \
		$(CUDA_PIP) --no-build-isolation --no-deps --force-reinstall $(CURDIR)
	cd $(CUDA_VENV) && bin/python $(CURDIR)/gates/installed_cuda.py --architectures '$(CUDA_ARCHITECTURES)'

$(CUDA_VENV)/.torch:
	@command -v nvcc >/dev/null || test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" \
		|| { echo "cuda-build needs nvcc of the CUDA toolkit; CUDA_HOME names it" >&2; exit 1; }
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PIP) torch==$(CUDA_TORCH) numpy ninja 'setuptools>=77.0.3,<82'
	@touch $@

clean:  ## remove build products
	rm -rf build dist demo_output example_output bench_output gpu_check_output .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	rm -f cl_kernels/_C.*so cl_kernels/_cuda.*so cl_kernels/_not_built.json $(VENV)/.built* $(VENV)/.installed
	rm -rf .venv-cuda/*/build
	find cl_kernels tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv and .venv-cuda as well
	rm -rf $(VENV) .venv-cuda
