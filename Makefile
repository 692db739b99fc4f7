# Two commands are enough on a fresh clone: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# both cores for the tests, one thread each
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit format bench layers crafting collisions labelling kills overhead mutants fuzz pins wheel clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

# Installed by uv, whatever pip's configuration offers: with pip alone, a CPU build of torch may come that torchvision does not load with.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(BIN)/.installed ## make the virtual environment with the pinned versions

demo: $(BIN)/.installed ## set up, then backdoor a classifier of the embedded digits (under a minute)
	$(BIN)/lightning fit --config badnets_digits

test: lint types unit ## set up, then lint, types and tests: what CI runs

lint: $(BIN)/.installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed ## mypy, strict
	$(BIN)/mypy

unit: $(BIN)/.installed ## the tests alone
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

format: $(BIN)/.installed ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BIN)/.installed ## speed against plain torchvision and bare Lightning, in one run
	$(BIN)/python -m tests.benchmarks

layers: $(BIN)/.installed ## many last layers trained together against one by one (minutes)
	$(BIN)/python -m tests.benchmarks.last_layers --trials 634

labelling: $(BIN)/.installed ## an oracle's labels in batches against one by one
	$(BIN)/python -m tests.benchmarks.labelling

crafting: $(BIN)/.installed ## feature collisions crafted together against one by one in ART, if it is installed (minutes)
	$(BIN)/python -m tests.benchmarks.crafting

collisions: $(BIN)/.installed ## how near each rule brings feature collisions on ImageNet features, against evaluations (many minutes)
	$(BIN)/python -m tests.benchmarks.collisions

kills: $(BIN)/.installed ## kill a small study ten times, and compare it with an undisturbed one (minutes)
	$(BIN)/python -m tests.benchmarks.studies kills

overhead: $(BIN)/.installed ## what the pool of processes costs on 100 small cells (minutes)
	$(BIN)/python -m tests.benchmarks.studies overhead

mutants: $(BIN)/.installed ## put faults of one line in, one at a time, and demand that the tests named beside them fail (minutes)
	$(BIN)/python -m tests.mutants

fuzz: $(BIN)/.installed ## give every key of some configs values that nobody would write: a run, or one line (an hour)
	$(BIN)/python -m tests.fuzz

pins: $(BIN)/.installed ## resolve the newest versions into constraints.txt (names no host)
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file constraints.txt pyproject.toml

wheel: $(BIN)/.installed ## build the wheel into dist/
	$(BIN)/uv build --quiet --wheel --out-dir dist .

clean: ## remove the environment and everything built or cached here
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
