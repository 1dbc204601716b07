# Every target makes the environment it needs by itself: on first use, and again when its list of packages changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TESTS := $(BIN)/python -m pytest -n auto

.PHONY: train test test-slow check smoke bench clean

train: $(VENV)/.user
	$(BIN)/python train.py

test: $(VENV)/.dev
	$(TESTS) -m "not slow and not gpu"

test-slow: $(VENV)/.dev
	$(TESTS) -m "slow and not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

smoke: $(VENV)/.user
	sh tests/smoke.sh $(BIN)/python

bench: $(VENV)/.user
	$(BIN)/python bench.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info __pycache__ tests/__pycache__

# What the scripts need.
$(VENV)/.user: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# And what the tests need beside it.
$(VENV)/.dev: $(VENV)/.user
	$(PIP) --editable ".[dev]"
	touch $@
