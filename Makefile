# Every target makes what it needs; none needs another to be run before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo install check test bench soak clean

demo: $(VENV)/.node ## A runtime in a throw-away home, a real job on it, and nothing left behind.
	@$(BIN)/python -P examples/demo.py

install: $(VENV)/.dev ## The development environment.

check: $(VENV)/.dev ## Format, lint, types, layers.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.dev ## Every test.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.dev ## The published figures, measured here; all four run, and one missed bound fails the target.
	@missed=0; for command in warm map cold footprint; do \
	  $(BIN)/python -m loadtest $$command || { [ $$? -ne 130 ] || exit 130; missed=1; }; \
	done; exit $$missed

soak: $(VENV)/.dev ## Tests that look for rare faults, many times over.
	$(BIN)/python -m pytest --timeout=0 -m soak --rounds $(or $(ROUNDS),50)

clean: ## Remove the environment and what tools cached.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build

# A client's venv alone would do for neither: both stamps name the extras that they bring.
$(VENV)/.node: pyproject.toml | $(BIN)/python
	@echo "installing (the first time takes a minute) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[node]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[node,dev]'
	@touch $@ $(VENV)/.node

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: Python 3.11 or newer is needed: sudo apt-get install -y python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: Debian keeps venv in a package of its own: sudo apt-get install -y python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
