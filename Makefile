# Everything from a fresh clone: needs Python 3.11 or newer and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# An extra package index, for example the one with the CPU builds of torch. Empty: whatever pip is configured to use.
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
# Processes that the tests run in; each works on one thread.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.PHONY: help demo test long check lint types build format clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed  ## Distil the embedded teacher of scenes and write a report to demo-output/
	$(BIN)/rdm-rl demo --output_dir demo-output

test: $(VENV)/.installed-dev  ## Run the tests and the docstring examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

long: $(VENV)/.installed-dev  ## Run the tests that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m long $(PYTEST_ARGS)

check: lint types test build  ## Run everything that continuous integration runs

lint: $(VENV)/.installed-dev  ## Check formatting and lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.installed-dev  ## Check types
	$(BIN)/mypy

# Leftovers of an earlier build would end up in the wheel. The wheel is built from the sdist, so both are tested.
build: $(VENV)/.installed-dev  ## Build the sdist, and from it the wheel, into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

format: $(VENV)/.installed-dev  ## Format the code and apply safe lint fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## Remove the environment, builds, caches and the demo's output
	rm -rf $(VENV) build dist demo-output *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: installation runs once, and again when the dependencies change. The demo does without the development tools.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"rdm-rl needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	@touch $@
