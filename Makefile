# `make demo` runs the main job from pictures to scores; `make test` checks everything. Each installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= demo_run

.PHONY: demo test test-slow test-newest lint install format clean

demo: $(VENV)/.installed
	$(BIN)/multitap demo --workdir=$(DEMO)

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n 2

# More of what the others test.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

# The suite on the newest releases of everything, which need a newer Python; without torch, so on the goldens.
NEWEST ?= python3.13
test-newest:
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[check]'
	.venv-newest/bin/python -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)'
	.venv-newest/bin/python -m pytest -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins what the suite was run with; it applies to the Python it was made for and is a guide for newer ones.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-newest $(DEMO) build *.egg-info
