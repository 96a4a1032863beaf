# PYTHON is the interpreter that creates the virtual environment.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/tiny
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package
INSTALLED := $(VENV)/.installed
# libtpu compiles for TPUs that this machine lacks. It is installed outside the environment's packages,
# because JAX would look for a TPU at every start if it found libtpu there.
LIBTPU := $(VENV)/libtpu

.PHONY: setup train watch multiprocess soak test test-slow smoke lint docs

setup: $(INSTALLED)

# Training needs the package alone, without the tools of tests and pages.
$(PACKAGE): requirements.txt pyproject.toml aoe_jax/commands.ini
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable .
	touch $@

$(INSTALLED): $(PACKAGE)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(LIBTPU): $(PACKAGE)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ 'libtpu>=0.0.42,<0.0.53'
	touch $@

# By default glibc returns freed memory to the system after every step. On CPU, allocating it again costs more
# than a tenth of the step time, so these settings make glibc keep it.
train: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1

# Trains a model or resumes its training, evaluates it, compares it with xz and prints a sample.
train: $(PACKAGE)
	test -f $(WORKDIR)/summary.json || $(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --split=validation
	$(BIN)/python -m benchmarks.compression --workdir=$(WORKDIR)
	$(BIN)/python -m aoe_jax.generate --workdir=$(WORKDIR) --prompt='Fellow citizens of the Senate and House of Representatives:'

# Shows the metrics of all runs in a browser while they train.
watch: setup
	$(BIN)/tensorboard --logdir=runs

# Trains a model with several processes on this machine; they communicate as if each had its own machine:
# make multiprocess PROCESSES=2 WORKDIR=runs/two ARGS='--config.train.steps=100'
PROCESSES ?= 2
PORT ?= 12355
multiprocess: export JAX_NUM_CPU_DEVICES ?= 1
multiprocess: $(PACKAGE)
	for i in $$(seq 0 $$(($(PROCESSES) - 1))); do \
	  $(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR) \
	    --coordinator=localhost:$(PORT) --processes=$(PROCESSES) --process=$$i $(ARGS) & pids="$$pids $$!"; \
	done; for pid in $$pids; do wait $$pid || status=$$?; done; exit $$status

# Kills training processes fifty times and asks them to stop twenty times, then disturbs two supervised
# processes twenty times. Every run must end bit for bit in the state of an undisturbed run.
SOAK ?= runs/soak
soak: setup
	$(BIN)/python -m benchmarks.soak --workdir=$(SOAK)/one $(ARGS)
	$(BIN)/python -m benchmarks.soak --workdir=$(SOAK)/two --pod_size=2 $(ARGS)

# `test` runs in a plain container without special rights; `test-slow` runs all other tests.
test: setup
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m "not slow"

test-slow: setup $(LIBTPU)
	PYTHONPATH=$(LIBTPU) $(BIN)/python -m pytest -n 2 --dist=worksteal -m slow

# Runs the tests that show whether another version of JAX works.
smoke: setup $(LIBTPU)
	PYTHONPATH=$(LIBTPU) $(BIN)/python -m pytest -n 2 -m smoke

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Builds the documentation as a website in site/. NO_MKDOCS_2_WARNING hides the theme's advertisement of its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
