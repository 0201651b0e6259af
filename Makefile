# fairseq_moe: from a fresh clone, `make demo` and `make test` set up all they need in .venv and run.
#
#   make demo     train a small MoE language model beside a dense one, evaluate, sample, draw (3 minutes)
#   make test     the test suite, but for tests that take more than about ten seconds each
#   make test-reliability   those slow tests
#   make test-parallel      wide mixes of layouts: every backend and number of ranks reads every other
#   make test-gpu           the tests that need a CUDA device; without one it says how many it skipped
#   make check    ruff and mypy
#   make bench    time of the MoE layer against its dense limit
#   make clean    remove .venv and everything that was built
#
# Variables:
#   PYTHON=python3.12            the interpreter that .venv is made from (default python3.11)
#   TORCH_SPEC='torch==2.13.0'   the torch to install; pip's own settings (PIP_INDEX_URL, ...) say from where
#   VENV=DIR                     where the environment is made (default .venv)
#   VENV= PYTHON=/path/python    make no environment: use that interpreter's as it is, and install nothing
#   TEXT=file                    make demo: train on your own text instead of Python's standard library
#   UPDATES=N                    make demo: training budget of each of the two models, in updates
#   PYTEST_ARGS='-k routing'     make test: further arguments of pytest

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
TORCH_SPEC ?= torch==2.13.0
VENV ?= .venv
TEXT ?=
UPDATES ?=
PYTEST_ARGS ?=

# One thread per process: two ranks on two cores get 5 to 50 times slower when each starts a thread per core.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
ready =
else
RUN := $(VENV)/bin/python
ready = $(VENV)/.ready-$(1)
endif

# Two files at a time: a test of several ranks waits for most of its time. More would crowd two cores.
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile

.PHONY: help demo test test-reliability test-parallel test-gpu check bench clean FORCE

help:
	@sed -n '2,/^$$/s/^#\( \|$$\)//p' Makefile

demo: $(call ready,demo)
	$(RUN) scripts/demo.py $(if $(TEXT),--text '$(TEXT)') $(if $(UPDATES),--updates '$(UPDATES)')

test: $(call ready,test)
	$(PYTEST) -m 'not slow and not slow_reliability and not gpu and not parallel' $(PYTEST_ARGS)

test-reliability: $(call ready,test)
	$(PYTEST) -m 'slow or slow_reliability' $(PYTEST_ARGS)

test-parallel: $(call ready,test)
	$(PYTEST) -m parallel $(PYTEST_ARGS)

test-gpu: $(call ready,test)
	$(RUN) -m pytest tests/gpu -q -r f $(PYTEST_ARGS)

check: $(call ready,dev)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -p fairseq_moe

bench: $(call ready,demo)
	$(RUN) scripts/bench_layer.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist demo fairseq_moe.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made again when it was made for another interpreter or another torch.
MADE_FOR := $(PYTHON) $(TORCH_SPEC)
ifneq ($(MADE_FOR),$(shell cat '$(VENV)/.made-for' 2>/dev/null))
$(VENV)/.made-for: FORCE
endif

$(VENV)/.made-for: requirements/fairseq.txt
	@if [ -e '$(VENV)' ] && [ ! -e '$(VENV)/.made-for' ] && [ ! -e '$(VENV)/.being-made' ]; then \
	  echo "$(VENV) exists and was not made by this Makefile; to use it as it is: make VENV= PYTHON=$(VENV)/bin/python"; \
	  exit 1; fi
	rm -rf '$(VENV)'
	mkdir -p '$(VENV)' && touch '$(VENV)/.being-made'
	$(PYTHON) -m venv '$(VENV)'
	$(RUN) -m pip install --quiet --no-compile --no-deps --require-hashes --only-binary :all: -r requirements/fairseq.txt
	echo '$(MADE_FOR)' > $@

# One call of pip for everything else. fairseq is there already, with its hash checked; naming it brings its
# dependencies. pip would compile all 11,000 files of them to bytecode, which takes longer than the rest; the
# import compiles those that are used, once, whatever PYTHONDONTWRITEBYTECODE says about later runs.
USED := fairseq_cli.train, fairseq_cli.interactive, fairseq_cli.eval_lm, matplotlib.pyplot, rich.table

$(VENV)/.ready-%: $(VENV)/.made-for setup.py
	$(RUN) -m pip install --quiet --no-compile '$(TORCH_SPEC)' -e '.[fairseq,$*]'
	env -u PYTHONDONTWRITEBYTECODE $(RUN) -W ignore -c 'import logging; logging.disable(logging.INFO); import $(USED)'
	touch $@
