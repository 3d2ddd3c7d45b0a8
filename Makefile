# `make demo` and `make test` need nothing but make and a Python >= 3.12: they build .venv first.
# GPU_PYTHON=python3: `make test-gpu` with that interpreter and the packages it has; nothing is installed. That is the
# default where there is no .venv yet and python3 has JAX for CUDA and pytest.
# WORKERS: test processes at a time. JAX=0.12.0.1: another jax than the pinned one, in a .venv of its own.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-gpu lint format venv aot aot-check clean

WORKERS ?= 2
RESULTS := .cache
VENV := .venv$(if $(JAX),-jax-$(JAX))
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
AOT_VENV := .venv-aot
AOT_PYTHON := $(AOT_VENV)/bin/python
AOT_INSTALLED := $(AOT_VENV)/.installed
HAS_JAX_CUDA := import sys; from importlib.util import find_spec as f; \
  sys.exit(not (all(map(f, ("jax", "flax", "pytest"))) and any(map(f, ("jax_cuda13_plugin", "jax_cuda12_plugin")))))
GPU_PYTHON ?= $(if $(wildcard $(INSTALLED)),,$(shell python3 -c '$(HAS_JAX_CUDA)' 2>/dev/null && echo python3))
# The fast tests run on the CPU, also where there is a GPU; `make test-gpu` is for that.
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests)
PYTEST := JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

help:
	@echo "make demo       generate text with a real model, plainly and speculatively, and compare"
	@echo "make test       the fast tests"
	@echo "make test-full  all tests, slow ones too; an interrupted run goes on where it stopped"
	@echo "make test-gpu   the tests that need an NVIDIA GPU (GPU_PYTHON=python3: offline, with that interpreter)"
	@echo "make aot        a virtual environment that compiles for NVIDIA GPUs on a machine without one (experiments.aot_compile)"
	@echo "make aot-check  compile the kernels for sm_80 and sm_90: no spill, no missing matrix instruction; run their PTX in an emulator"
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

# Only the files that have such tests are read, with settings that any pytest knows: what runs elsewhere may need packages
# that a machine with a GPU has not.
test-gpu: $(if $(GPU_PYTHON),,$(INSTALLED))
	$(or $(GPU_PYTHON),$(PYTHON)) -m pytest -m gpu -o addopts= -o minversion=7 --import-mode=importlib -ra \
	  -W ignore::pytest.PytestConfigWarning $(GPU_TESTS)

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

aot: $(AOT_INSTALLED)

# .venv-aot sees the packages of .venv and adds the CUDA plugin, which does not belong where tests run on CPUs.
$(AOT_INSTALLED): $(INSTALLED) requirements-aot.txt
	@rm -f $@
	@$(AOT_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(AOT_VENV)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	  base=$$($(PYTHON) -c "$$site") && \
	  echo "import site; site.addsitedir('$$base')" > "$$($(AOT_PYTHON) -c "$$site")/specjax-base.pth"
	@echo "installing the packages of requirements-aot.txt into $(AOT_VENV) (the first time about 500 MB)"
	@$(AOT_PYTHON) -m pip install -qq --disable-pip-version-check --no-deps -r requirements-aot.txt
	@touch $@

aot-check: $(AOT_INSTALLED)
	@rm -rf $(RESULTS)/aot
	$(AOT_PYTHON) -m experiments.aot_compile --kernels_only --target=h200,a100 --model_shape=llama3-8b --only=llama3-8b/o \
	  --m=8 --output=$(RESULTS)/aot
	$(AOT_PYTHON) -m tests.ptx.check --target=h200,a100 --output=$(RESULTS)/ptx

clean:
	rm -rf .venv .venv-jax-* .venv-aot $(RESULTS) build *.egg-info .pytest_cache .ruff_cache .hypothesis
