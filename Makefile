# `make demo` and `make test` need nothing but make and a Python >= 3.12: they build .venv first.
# WORKERS: test processes at a time. JAX=0.12.0.1: another jax than the pinned one, in a .venv of its own.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-gpu lint format venv clean

WORKERS ?= 2
RESULTS := .cache
VENV := .venv$(if $(JAX),-jax-$(JAX))
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The fast tests run on the CPU, also where there is a GPU; `make test-gpu` is for that.
PYTEST := JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

help:
	@echo "make demo       generate text with a real model, plainly and speculatively, and compare"
	@echo "make test       the fast tests"
	@echo "make test-full  all tests, slow ones too; an interrupted run goes on where it stopped"
	@echo "make test-gpu   the tests that need an NVIDIA GPU"
	@echo "make lint       ruff: rules and format (make format: apply them)"

demo: $(INSTALLED)
	@$(PYTHON) -m experiments.demo

test: $(INSTALLED)
	@$(PYTHON) -m tests.fetch
	$(PYTEST)

test-full: $(INSTALLED)
	@mkdir -p $(RESULTS)
	@$(PYTHON) -m tests.fetch
	$(PYTEST) -m "" -p tests.resume --durations=20 2>&1 | tee -a $(RESULTS)/test-full.log

test-gpu: $(INSTALLED)
	$(PYTHON) -m pytest -m gpu

lint: $(INSTALLED)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

format: $(INSTALLED)
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

venv: $(INSTALLED)

# The stamp is written last: an interrupted installation starts again.
$(INSTALLED): pyproject.toml requirements-dev.txt
	@rm -f $@
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  python=$$(bash .ci/find-python) && \
	  echo "creating $(VENV) with $$python" && \
	  "$$python" -m venv --clear $(VENV); }
	@echo "installing the packages of requirements-dev.txt into $(VENV) (the first time about 1 GB: a minute or two)"
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(if $(JAX),$(PYTHON) -m pip install -qq --disable-pip-version-check --upgrade jax==$(JAX) jaxlib)
	@touch $@

clean:
	rm -rf .venv .venv-jax-* $(RESULTS) build *.egg-info .pytest_cache .ruff_cache .hypothesis
