# Every target does its own set-up: a virtual environment in .venv, and the package installed into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: sample test bench bench-smoke lint docs clean

sample: $(VENV)/.core
	$(BIN)/fastddpm sample --model digits --seeds 0-15 --guidance 2 --grid --scale 4 --outdir samples --overwrite

# The workers share the cores, and threads beyond these wait for each other.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests --ignore tests/kernels/interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/kernels/interpreter

bench: $(VENV)/.bench $(VENV)/.peers
	$(BIN)/fastddpm bench

bench-smoke: $(VENV)/.test
	$(BIN)/python -m pytest --smoke --benchmark-disable benchmarks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

# Material's advertisement of another generator is no warning.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(BIN)/mkdocs build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --editable ".[$*]"
	touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
