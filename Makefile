# `make setup` makes the .venv; everything else runs in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
DOCS_STAMP := $(VENV)/.docs-up-to-date
JOBS ?= auto

# The .venv keeps its Python until another one is named: make test PYTHON=python3.13 replaces it.
IDENTITY := -c 'import sys; print(sys.version, sys.base_prefix)'
THERE := $(shell $(BIN)/python $(IDENTITY) 2>/dev/null)
ifneq ($(if $(filter file,$(origin PYTHON)),$(THERE)),)
PYTHON := $(BIN)/python
else ifneq ($(or $(shell $(PYTHON) $(IDENTITY) 2>/dev/null),none),$(THERE))
.PHONY: $(STAMP)
MAKE_VENV := $(PYTHON) -m venv --clear $(VENV)
endif

.PHONY: help setup test test-slow lint demo docs wheel-check compat clean

help:
	@echo "make setup        the .venv with everything pinned (about 2 minutes, once)"
	@echo "make demo         momentum against plain meta-SGD where it gains and where it does not (2 minutes); report in runs/demo/"
	@echo "make test         ruff, mypy and the test suite"
	@echo "make test-slow    the tests that take minutes: all of the paper's MNIST runs"
	@echo "make docs         the documentation, in site/index.html (needs Python >= 3.11)"
	@echo "make wheel-check  build the wheel, install it in an empty environment, import every module"
	@echo "make compat       the core tests on every supported Python, oldest to newest torch and NumPy (hours, 5 GB at a time)"
	@echo
	@echo "PYTHON=python3.12 with any of them: in a .venv of that Python, replaced if it is of another"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements-dev.txt
	@$(PYTHON) --version >/dev/null || { echo "make setup needs Python >= 3.10; $(PYTHON) does not run. Name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) .ci/prerequisites.py
	@rm -f $(STAMP)
	@echo "making $(VENV) (a few minutes, once; seconds to bring it up to date)"
	@$(MAKE_VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=23.2,<27"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@# a path to the checkout, which type checkers follow, and not a finder
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e .
	@touch $(STAMP)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread for each test process: the processes share the cores, and take the tests in the order of tests/conftest.py.
# Bytecode is kept even where the environment says not to: without it, each process compiles all test files again.
test test-slow: export PYTHONDONTWRITEBYTECODE =
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder --durations=10

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder -m slow

demo: setup
	$(BIN)/python -m metamom.experiments.demo --run-dir runs/demo --resume

docs: $(DOCS_STAMP)
	$(BIN)/python .ci/docs/build.py

$(DOCS_STAMP): requirements-docs.txt $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $(DOCS_STAMP)

wheel-check: setup
	$(BIN)/python .ci/wheel_check.py

compat:
	$(PYTHON) .ci/compat.py

clean:
	rm -rf $(VENV) .compat build dist site *.egg-info
