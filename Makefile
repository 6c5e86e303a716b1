# Everything runs in .venv, which is made on first use and installed again only when the two files below change.
# constraints.txt pins every version: a free choice of torch would fetch gigabytes nobody asked for.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help run test lint format types wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18
	@echo "  variables:      PYTHON=$(PYTHON) (3.11 to 3.13)  WORKERS=$(WORKERS)  ARGS='extra arguments'"

run: $(VENV)/.installed  ## decompose the smallest toy: experiment=tms_5-2 (ARGS='seed=1 steps=1000')
	$(BIN)/python -m pdlightning experiment=tms_5-2 $(ARGS)

test: $(VENV)/.installed-dev  ## the tests (ARGS='-m slow' for the slow ones)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## ruff: apply fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## basedpyright on the package
	$(BIN)/basedpyright --pythonpath $(BIN)/python

wheel: $(VENV)/.installed-dev  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove .venv, builds and caches (never outputs/)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
	    f"pdlightning needs Python 3.11 to 3.13, but $(PYTHON) is {v}: run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@
