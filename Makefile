# Two commands set everything up: `make demo` and `make test`. `make help` lists the rest.
#
#   PYTHON=python3.12 make demo      another interpreter
#   TORCH_INDEX=URL make demo        another build of torch (CPU only, another CUDA), from that package index

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
PYTEST_OPTIONS ?=
# one more than there are cores: many tests wait for processes of their own
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1) + 1)')
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help setup demo test e2e federation lint format types bench clean

help:  ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch,@true)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(INPUTS)
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(INPUTS)
	$(PIP) --editable '.[demo,ray,privacy,dev]'
	@touch $@

setup: $(VENV)/.dev  ## Make the environment for development

demo: $(VENV)/.demo  ## Install, and run the demo: four companies, one search for similar clauses
	$(BIN)/tsugiki demo

test: $(VENV)/.dev  ## Install, and run all tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_OPTIONS)

federation:  ## Run the demo as a server and three sites in containers; needs Docker and Compose
	docker/federation.sh

e2e: $(VENV)/.dev  ## Only the tests with real servers and clients; all of them need root, iproute2, iptables, Docker
	$(BIN)/python -m pytest -m e2e --numprocesses 3 --dist loadfile --durations 10

lint: $(VENV)/.dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## Mend style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev .typing  ## Check types
	$(BIN)/mypy

.typing:  # the folders as the one package that a wheel makes of them, for mypy and pyright
	mkdir -p .typing/tsugiki
	ln -sfn $(addprefix ../../,$(wildcard tsugiki/*.py tsugiki/py.typed) common client server) .typing/tsugiki/

bench: $(VENV)/.dev  ## Measure start-up and simulation
	$(BIN)/python scripts/bench/startup.py
	$(BIN)/python scripts/bench/simulation.py

clean:  ## Remove the environment and what builds and checks left
	rm -rf $(VENV) .typing build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage*
