# Everything sets itself up: the first run makes .venv and installs into it; later runs need no network.
#   make demo     three questions to calf, the model that ships with the package
#   make test     the tests
#   make check    linters, types, and the long tests (planted bugs, fuzzing)
#   make lint     linters and types alone
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test check lint
help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/installed
	$(BIN)/finback ask "What is 347 + 82 * 15?"
	$(BIN)/finback ask "How many times does the letter r occur in strawberry?"
	$(BIN)/finback ask "Which is larger, 9.9 or 9.11?"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not check" $(ARGS)

check: lint
	$(BIN)/python -m pytest -m check $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamps are newer than these exactly when what they ask for is installed and built.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard finback/kernels/cpu/*)
$(VENV)/installed: $(SOURCES) | $(BIN)/pip
	@echo "Installing Finback into $(VENV) (once; a few minutes, most of them for PyTorch)" >&2
	$(PIP) -e .
	@touch $@

$(VENV)/installed-test: $(SOURCES) | $(BIN)/pip
	@echo "Installing Finback and its test tools into $(VENV) (once; a few minutes, most of them for PyTorch)" >&2
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/installed

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Finback needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
