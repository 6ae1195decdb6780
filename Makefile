# `make setup` makes the .venv; everything else runs in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
JOBS ?= auto

.PHONY: help setup test test-slow lint demo wheel-check clean

help:
	@echo "make setup        the .venv with everything pinned (about 2 minutes, once)"
	@echo "make demo         train on sinusoids, momentum and plain meta-SGD; report in runs/demo/report.md"
	@echo "make test         ruff, mypy and the test suite"
	@echo "make test-slow    the tests that take minutes: all of the paper's MNIST runs"
	@echo "make wheel-check  build the wheel, install it in an empty environment, import every module"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "make setup needs Python >= 3.10; no $(PYTHON) found. Name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) .ci/prerequisites.py
	@rm -f $(STAMP)
	@echo "making $(VENV) (a few minutes, once; seconds to bring it up to date)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=23.2,<27"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e .
	@touch $(STAMP)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread for each test process: the processes share the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m slow

demo: setup
	$(BIN)/metamom compare sinusoid --seeds 3 --betas 1,0.1 --lrs 0.03 --iterations 2000 --jobs 2 --run-dir runs/demo --resume

wheel-check: setup
	$(BIN)/python .ci/wheel_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info
