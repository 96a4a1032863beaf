# PYTHON=... picks the interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/tiny
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The compiler for TPUs that are not here, outside the environment: if JAX found it, JAX would look
# for a TPU at every start.
LIBTPU := $(VENV)/libtpu

.PHONY: setup train multiprocess soak test test-slow smoke lint docs

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml aoe_jax/commands.ini
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(LIBTPU): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ 'libtpu>=0.0.42,<0.0.53'
	touch $@

# glibc gives freed memory back to the system after every step; on CPU, getting it again costs more than a tenth of the time.
train: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1

# Trains a model, or resumes; then scores it, compares it with xz and prints a sample.
train: setup
	test -f $(WORKDIR)/summary.json || $(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --split=validation
	$(BIN)/python -m benchmarks.compression --workdir=$(WORKDIR)
	$(BIN)/python -m aoe_jax.generate --workdir=$(WORKDIR) --prompt='Fellow citizens of the Senate and House of Representatives:'

# The same on several processes of this machine, as on several machines:
# make multiprocess PROCESSES=2 WORKDIR=runs/two ARGS='--config.train.steps=100'
PROCESSES ?= 2
PORT ?= 12355
multiprocess: export JAX_NUM_CPU_DEVICES ?= 1
multiprocess: setup
	for i in $$(seq 0 $$(($(PROCESSES) - 1))); do \
	  $(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR) \
	    --coordinator=localhost:$(PORT) --processes=$(PROCESSES) --process=$$i $(ARGS) & pids="$$pids $$!"; \
	done; for pid in $$pids; do wait $$pid || status=$$?; done; exit $$status

# Kills training processes fifty times and asks them to stop twenty times, then disturbs two and four
# supervised processes a hundred times each, and two in an object store; every run must end as without
# a disturbance.
SOAK ?= runs/soak
soak: setup
	$(BIN)/python -m benchmarks.soak --workdir=$(SOAK) $(ARGS)
	$(BIN)/python -m benchmarks.pod_soak --workdir=$(SOAK)/two --events=100
	$(BIN)/python -m benchmarks.pod_soak --workdir=$(SOAK)/four --pod_size=4 --events=100
	$(BIN)/python -m benchmarks.pod_soak --workdir=$(SOAK)/store --store

# Two tiers: `test` needs no right that a plain container lacks, `test-slow` is the rest.
test: setup
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow"

test-slow: setup $(LIBTPU)
	PYTHONPATH=$(LIBTPU) $(BIN)/python -m pytest -n 2 --dist=worksteal -m slow

# The part of the tests that shows whether another version of JAX works.
smoke: setup $(LIBTPU)
	PYTHONPATH=$(LIBTPU) $(BIN)/python -m pytest -n 2 -m smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as a site, into site/. Without NO_MKDOCS_2_WARNING the theme advertises its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
