# make train | test | test-long | lint | bench | rehearse: each sets everything up by itself and needs only Python (3.11 to 3.14, not 3.14.1) and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOCK   := $(shell sha256sum requirements.lock | cut -c1-16)
DEPS   := $(VENV)/.installed-$(LOCK)
CODE   := eat_dist tests benchmarks jobs deploy
RIVALS := $(VENV)/.rivals
HERE   := $(VENV)/.package-$(shell pwd | sha256sum | cut -c1-16)
# Threads of several processes on a few cores wait for each other by spinning; the members set their own number.
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-long lint format bench rehearse dist clean

train: $(HERE)
	$(BIN)/eat-dist train $(ARGS)

test: $(HERE)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

# Clusters of several nodes, sweeps and their deaths: tens of minutes.
test-long: $(HERE)
	$(BIN)/python -m pytest -m long --timeout 1800 $(ARGS)

lint: $(HERE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(HERE)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(HERE) $(RIVALS)
	$(BIN)/python benchmarks/speed.py $(ARGS)
	$(BIN)/python benchmarks/loading.py --size 96 --repeats 3
	$(BIN)/python benchmarks/attacks.py
	$(BIN)/python benchmarks/evaluation_scale.py

# What the nodes of a cluster install: cluster.yaml copies this folder to them, deploy/Dockerfile into an image.
dist: $(HERE)
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	cp requirements.lock dist/

# A day on a cluster, on this machine: a job, a death, a sweep, the comparison.
rehearse: $(HERE)
	$(BIN)/python deploy/rehearse.py $(ARGS)

# The stamp is written last, so an installation that was interrupted is done again; its name says for which lock it is. A link to a folder that is gone makes way.
$(DEPS): | requirements.lock
	$(PYTHON) -c "import sys; v = sys.version_info[:3]; sys.exit((not (3, 11) <= v < (3, 15) or v == (3, 14, 1)) and 'Python 3.11 to 3.14 is needed, but not 3.14.1')"
	test -d $(VENV) || rm -f $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $@

# Other attack libraries, for comparison. Without their dependencies: torchattacks pins a version of requests that MLflow cannot use.
$(RIVALS): $(DEPS) benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	touch $@

# An environment may be shared by several checkouts; the package is the one used last.
$(HERE): $(DEPS) pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.package-*
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
