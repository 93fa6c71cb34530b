# One word each, from a fresh clone: make demo, make test, make lint, make bench. `make help` lists all.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
# Test processes, each with one thread: as many as there are cores, but not more memory than a laptop has.
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
# CPU wheels of torch where there is no NVIDIA driver: 200 MB instead of several GB.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PY  := fastslim kernels tests benchmarks setup.py conftest.py

.PHONY: setup demo test test-install bench lint format clean help
.DELETE_ON_ERROR:

help: ## list these words
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-14s%s\n", $$1, $$2}'

$(VENV)/.tools: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastslim needs Python >= 3.10: make PYTHON=python3.11 ...")'
	@echo 'installing pinned packages into $(VENV), a minute or two the first time'
	$(PYTHON) -m venv $(VENV)
	@# The index may be out of reach; then the next line takes torch from the usual one.
	$(if $(TORCH_INDEX),-$(PIP) install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) -c constraints.txt torch 2>/dev/null)
	$(PIP) install -c constraints.txt torch setuptools wheel cmake ninja pybind11
	@touch $@

# Editable: Python edits count at once; only C++ edits need this step again.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation -e '.[cli,tensorboard,export,onnx,mmengine,lightning,test,lint]'
	@touch $@

setup: $(VENV)/.installed ## create .venv with pinned packages, build and install fastslim into it

demo: setup ## the whole way on handwritten digits: train, search two budgets, export, retrain, report (minutes)
	@# Each step that is finished is skipped, each that was interrupted goes on.
	$(BIN)/fastslim train --config digits --search-share 0.2 --run $(RUNS)/demo $(if $(wildcard $(RUNS)/demo/config.yaml),--resume)
	$(BIN)/fastslim search $(RUNS)/demo --budget flops=0.5,0.25 --score loss --resume
	$(BIN)/fastslim export $(RUNS)/demo --format subnet,pt2,onnx,slimmable
	$(BIN)/fastslim retrain $(RUNS)/demo --subnet flops-0.5 --epochs 20 --lr 0.02 --distill --eval-every 5 --resume
	$(BIN)/fastslim retrain $(RUNS)/demo --subnet flops-0.25 --epochs 20 --lr 0.02 --distill --eval-every 5 --resume
	$(BIN)/fastslim report $(RUNS)/demo

test: setup ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-install: setup ## install in every supported way into throw-away environments (minutes)
	$(BIN)/python -m pytest -m slow tests/build $(ARGS)

bench: setup ## run the benchmarks
	$(BIN)/python -m pytest benchmarks $(ARGS)

lint: setup ## check style and types
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

clean: ## remove everything built, .venv included
	rm -rf $(VENV) build dist *.egg-info fastslim/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
