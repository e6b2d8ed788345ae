# `make demo` runs the main job on the built-in sample, `make test` the linter and the tests, `make bench` all
# measurements of docs/performance.md. They set up .venv by themselves, once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench clean

demo: .venv/run
	$(BIN)/python main.py --pruner lamp --sparsity 0.65

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: .venv/run
	$(BIN)/python benchmarks/run.py

.venv/run: requirements.txt
	@echo "Setting up .venv with requirements.txt: the first time this takes some minutes and over 5 GB of disk."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	@echo "Adding requirements-dev.txt to .venv."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv output
