# The first of these makes .venv, the others reuse it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
WORKERS ?= 2

# Two builds of one commit are the same, byte by byte.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)
WHEEL := $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: help demo test test-versions test-sanitizers test-packaging sanitize compile-matrix wheel wheel-cuda sdist lint format clean

help:
	@echo "make demo            pretrain, tune, judge and report, in minutes on two cores"
	@echo "make test            the test suite, no GPU needed"
	@echo "make test-versions   every kernel compiled by every supported version of Triton"
	@echo "make test-sanitizers the CUDA C++ kernels under the compiler's sanitizers, on the CPU"
	@echo "make sanitize        the kernels with all their options, executed on the CPU (an hour)"
	@echo "make compile-matrix  every kernel for every architecture, no GPU needed (half an hour)"
	@echo "make wheel           a wheel for this Python, with the library for CPUs, in dist"
	@echo "make wheel-cuda      the same with the CUDA C++ kernels"
	@echo "make sdist           the sources as a package, in dist"
	@echo "make test-packaging  builds, installs and removes what users install, in every way"
	@echo "make lint            ruff, mypy and clang-format, as in CI"
	@echo "make format          let ruff and clang-format rewrite the sources"
	@echo "make clean           remove .venv and everything built"

# The tests build the extension for themselves.
# ttsem's metadata asks for Python 3.12; it is known to work from 3.11 on, without dependencies.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	FUSEFORMER_BUILD=none $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[tune,bench,cuda,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

demo: $(READY)
	$(BIN)/fuseformer demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

test-versions: $(READY)
	$(BIN)/python -m bench versions $(if $(TRITON),--triton $(TRITON))

test-sanitizers: $(READY)
	FUSEFORMER_SANITIZERS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
		tests/test_emulated_sanitizers.py

test-packaging: $(READY)
	FUSEFORMER_PACKAGING=full $(BIN)/python -m pytest -q tests/test_packaging.py

wheel: $(READY)
	FUSEFORMER_BUILD=cpu $(WHEEL)

wheel-cuda: $(READY)
	FUSEFORMER_BUILD=cuda $(WHEEL)

sdist: $(READY)
	FUSEFORMER_BUILD=none $(BIN)/python -m build --no-isolation --sdist --outdir dist

sanitize: $(READY)
	FUSEFORMER_SANITIZE=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--dist worksteal -q tests/test_kernels_*.py tests/test_properties.py

compile-matrix: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench scores --workers $(WORKERS) \
		--output bench/results/compile_matrix.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@sources=$$(find csrc -name '*.h' -o -name '*.cu' -o -name '*.cpp' 2>/dev/null); \
	if [ -n "$$sources" ]; then $(BIN)/clang-format --dry-run --Werror $$sources; fi

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@sources=$$(find csrc -name '*.h' -o -name '*.cu' -o -name '*.cpp' 2>/dev/null); \
	if [ -n "$$sources" ]; then $(BIN)/clang-format -i $$sources; fi

clean:
	rm -rf $(VENV) build dist runs python/*.egg-info
