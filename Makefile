# PYTHON=... picks the interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/tiny
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup train test smoke lint

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Trains (or goes on with) a model, unless it is trained already; then scores it and holds it against xz.
train: setup
	test -f $(WORKDIR)/summary.json || $(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --split=validation
	$(BIN)/python -m benchmarks.compression --workdir=$(WORKDIR)

test: setup
	$(BIN)/python -m pytest -n 2

# The part of the tests that shows whether another version of JAX works.
smoke: setup
	$(BIN)/python -m pytest -n 2 -m smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
