# `make demo` and `make test` need Python >= 3.11 and pip's usual access to packages, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file of tests is one worker's, as it shares what it makes; a worker has one thread, and so has what it starts.
WORKERS := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
test test-all notebooks: export OMP_NUM_THREADS = 1

.PHONY: help demo test test-all notebooks lint docs wheel clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo  ## Erase a concept from the embedded model on the CPU and write demo/report.html
	$(BIN)/sfumato demo --output demo

test: $(VENV)/.test  ## Run the tests, except the slow ones
	$(BIN)/python -m pytest -m "not slow" --timeout=1200 $(WORKERS)

test-all: $(VENV)/.test  ## Run all the tests
	$(BIN)/python -m pytest --timeout=3600 $(WORKERS)

notebooks: $(VENV)/.test  ## Execute every notebook from top to bottom
	$(BIN)/python -m pytest -m slow tests/test_notebooks.py --timeout=600 $(subst loadfile,load,$(WORKERS))

lint: $(VENV)/.test  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## Build the documentation into build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going -q -d build/doctrees docs build/docs

wheel: $(VENV)/.test  ## Build the distributions into dist/ and check the wheel in a bare environment
	.ci/check_wheel.sh $(BIN)/python

clean:  ## Remove the environment and everything built, cached or generated
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find src schedulers pipelines training tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment; a stamp for each set of extras, renewed when the requirements change. The test's
# includes the demo's.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(call install,test)
	@touch $(VENV)/.demo $@

$(VENV)/.docs: pyproject.toml constraints.txt
	$(call install,docs)
	@touch $@

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "sfumato needs Python >= 3.11 and $(PYTHON) is not; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
@echo "Installing sfumato[$(1)] into $(VENV): a minute or two, once"
@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(1)]"
endef
