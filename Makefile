# `make demo` and `make test` set everything up on first use (a .venv, the install) and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-slow lint wheel clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "rs-plugins needs Python >= 3.10; name one with: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]' --constraint .ci/constraints.txt
	@touch $@

demo: $(VENV)/.ready ## train, attack and certify on handwritten digits: a table, a plot, a report
	$(BIN)/rs-plugins demo

test: $(VENV)/.ready ## the tests that take minutes, not hours
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.ready ## the tests marked slow
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready ## formatting, lint, types, layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/.ready ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis rs-plugins-demo
