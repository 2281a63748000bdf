# make demo [SEED=n]   train, evaluate and draw on generated pictures; minutes on two CPU cores
# make test            the fast tests
# make test-all        the slow ones, too
# make test-pods       of those: runs of one and two processes stopped and hung in every phase
# make test-kills [SEED=n]  kills a run on two processes 20 times, anywhere, and compares its end
# Each sets up what it needs in .venv, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
SEED ?= 0
# Test files that run side by side.
JOBS ?= 2
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-pods test-kills lint clean

# By default glibc returns a step's memory to the system and takes it back for the next one.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

demo: $(VENV)/train.stamp
	@$(KEEP_MEMORY) $(PY) -m yolos_jax.demo --seed=$(SEED) --out=runs/demo-$(SEED)

test: $(VENV)/test.stamp lint
	$(PYTEST) -m "not slow and not kills"

test-all: $(VENV)/test.stamp lint
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "not kills"

test-pods: $(VENV)/test.stamp
	$(PY) -m pytest -s -n 0 tests/test_stops.py

test-kills: $(VENV)/test.stamp
	KILLS=20 SEED=$(SEED) $(PY) -m pytest -s -n 0 tests/test_kills.py -k two_processes

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "yolos_jax needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/train.stamp: setup.py constraints.txt | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/test.stamp: setup.py constraints.txt | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[train,convert,test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
