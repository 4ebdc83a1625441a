# distfit in a fresh clone. Needed: Python 3.11 to 3.13, a C++ compiler, make. No root, no system MPI.
#
#   make demo           .venv with distfit and TensorFlow; trains the digits on every GPU, or on two CPU devices
#   make demo-horovod   adds MPI and Horovod; trains the digits as one process and as two MPI ranks
#   make test           adds the test tools; the suite, real ranks included
#   make test-thorough  and what shows the same on more engines, precisions and models
#   make test-fast      what needs no MPI, no Horovod and no patience
#   make test-oldest    what depends on versions, with the oldest ones that pyproject.toml allows
#   make install        distfit, MPI and Horovod in .venv, nothing else
#   make lint           ruff and mypy
#   make docs           the documentation as a site in build/docs
#   make clean          removes what these made
#
# Variables: make test PYTHON=python3.12 VENV=/tmp/venv PYTEST_ARGS="-k plan"

VENV ?= .venv
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.11
PYTEST_ARGS ?=
DATA := data/digits
CONFIG := configs/digits.yaml

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first one that *runs* and can make an environment: a pyenv shim exists even where its Python does not.
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	if $$p -c '$(USABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)
endif

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export TF_CPP_MIN_LOG_LEVEL ?= 2

# TensorFlow brings CUDA where there is a GPU; elsewhere the demonstration runs on two logical CPU devices.
GPUS := $(wildcard /dev/nvidia[0-9]*)
EXTRA := $(if $(GPUS),[cuda])
DEVICES := $(if $(GPUS),,devices=2)

# Two ranks on two cores: without yielding, Open MPI's polling takes the cores from the compute.
MPIRUN ?= mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help demo demo-horovod test test-thorough test-fast test-oldest install lint docs clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.distfit $(DATA)/dataset.json
	rm -rf runs/demo
	distfit train $(CONFIG) strategy=mirrored $(DEVICES) run_dir=runs/demo

demo-horovod: $(VENV)/.horovod $(DATA)/dataset.json
	rm -rf runs/demo-one runs/demo-two
	distfit train $(CONFIG) strategy=single run_dir=runs/demo-one
	$(MPIRUN) -np 2 distfit train $(CONFIG) strategy=horovod run_dir=runs/demo-two
	python benchmarks/final_losses.py runs/demo-one runs/demo-two

test: $(VENV)/.dev $(VENV)/.horovod
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-thorough: $(VENV)/.dev $(VENV)/.horovod
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --thorough $(PYTEST_ARGS)

test-fast: $(VENV)/.dev
	python -m pytest -m "not mpi and not slow" $(PYTEST_ARGS)

# A fresh environment gets the newest versions, this one the oldest; `make test VENV=.venv-oldest` then runs all.
test-oldest: $(OLDEST)/.oldest
	$(OLDEST)/bin/python -m pytest -m "not mpi" tests/test_seams.py tests/test_engines.py $(PYTEST_ARGS)

install: $(VENV)/.distfit $(VENV)/.horovod

lint: $(VENV)/.dev
	ruff check .
	ruff format --check .
	mypy

docs: $(VENV)/.dev
	python -m sphinx -W --keep-going -n -q docs build/docs

clean:
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache runs/demo* $(DATA)

$(DATA)/dataset.json: | $(VENV)/.distfit
	distfit data build --from digits $(DATA)

# One empty file for each thing installed, so that the second call is quick; each is made again when the
# dependencies change.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 (with venv) runs here: make demo PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.distfit: pyproject.toml | $(VENV)/.made
	python -m pip install --disable-pip-version-check --quiet --editable .$(EXTRA)
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.distfit
	python -m pip install --disable-pip-version-check --quiet --editable .[dev]
	touch $@

$(OLDEST)/.oldest: pyproject.toml tests/oldest.py
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $(OLDEST)/oldest.txt \
		--editable . pytest pytest-timeout
	touch $@

# Built once, then taken from the user's cache; PyPI's MPI comes along where PATH has none.
$(VENV)/.horovod: pyproject.toml distfit/install/recipe.py | $(VENV)/.distfit
	distfit horovod install
	touch $@
