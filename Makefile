# `make demo` and `make test` set everything up on first use (a .venv, the install) and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS_VENV := .venv-docs

.PHONY: help demo test test-slow lint compare docs wheel release-check clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

compare: $(VENV)/.ready ## ART's defences and ours on digits: the table of the README
	$(BIN)/python benchmarks/compare_art_defences.py --out benchmarks/results/compare_art_defences_digits

$(DOCS_VENV)/.ready: docs/requirements.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	@touch $@

docs: $(DOCS_VENV)/.ready ## build the pages into build/site
	NO_MKDOCS_2_WARNING=1 PATH="$(DOCS_VENV)/bin:$$PATH" $(DOCS_VENV)/bin/python -m mkdocs build --strict

wheel: $(VENV)/.ready ## build the wheel into dist/
	$(BIN)/python -m build --wheel

release-check: $(VENV)/.ready ## build wheel and sdist, and look at their contents and metadata
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m pip install --quiet twine check-wheel-contents
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --toplevel rs_plugins,rs_plugins_art,rs_plugins_torchattacks dist/*.whl

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(DOCS_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis rs-plugins-demo
