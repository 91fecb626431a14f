# make demo | test | check | bench | claims | asan | tsan | format | help. Each sets up what it needs, from an empty clone on.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
ASAN := build/asan
TSAN := build/tsan

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := CMakeLists.txt $(wildcard native/*.cpp native/include/*.hpp)

.DEFAULT_GOAL := test
.PHONY: demo test check bench claims asan tsan format help setup

demo: setup
	$(BIN)/fewfire demo

test: setup
	$(BIN)/pytest -n $(JOBS) tests

check: setup
	$(BIN)/ruff format --check --output-format concise .
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy
	$(BIN)/python tools/layers.py src/fewfire
	$(BIN)/python tools/agents.py AGENTS.md
	$(BIN)/python tools/symbols.py build
	$(BIN)/python tools/help.py --check

help: setup
	$(BIN)/python tools/help.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/run.py

claims: setup
	$(BIN)/python benchmarks/claims.py

asan: setup
	tools/asan $(BIN) $(ASAN)

tsan:
	tools/tsan $(TSAN)

setup: $(VENV)/.stamp-extension

# The extension is built with the tools of the venv (no isolation), so that building never fetches a second set.
$(VENV)/.stamp-extension: $(VENV)/.stamp-requirements $(NATIVE)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.stamp-requirements: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	$(PIP) scikit-build-core nanobind cmake ninja
	$(PIP) --no-build-isolation --editable '.[all,test,dev]'
	touch $@

$(VENV)/.stamp-venv:
	$(PYTHON) -c 'import sys; sys.exit("fewfire needs Python 3.11 or newer; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@
