# Everything goes through a virtual environment of this folder, made from the exact versions in requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check bench up down lock clean

# The first interpreter that is there, works, and is of a version that pyproject.toml admits.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
UV_VERSION := $(shell sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements.lock)
VENV := .venv
RUN := $(VENV)/bin/python

help:
	@echo 'make demo    stage, search, evaluate, promote, sample and report on local Ray, S3 and MLflow; look into demo/'
	@echo 'make test    run the tests'
	@echo 'make check   lint, format, types, import contract'
	@echo 'make bench   measure this machine; writes benchmarks/results.json'
	@echo 'make up      start the local S3 server, MLflow server and Ray head; make down ends them'
	@echo 'make lock    resolve the ranges of pyproject.toml into requirements.lock anew'
	@echo 'make clean   make down, then delete the virtual environment and what the services stored'

$(VENV)/.installed: requirements.lock
	@test -n "$(PYTHON)" || { echo 'no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=...' >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version): some 6 GB, GPU-capable torch included; a few minutes at first"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	@touch $@

demo: $(VENV)/.installed
	@$(RUN) -m jobs.demo

test: $(VENV)/.installed
	@$(RUN) -m pytest

check: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.installed
	@$(RUN) -m benchmarks.run

up: $(VENV)/.installed
	@$(RUN) -m jobs.services up

down: $(VENV)/.installed
	@$(RUN) -m jobs.services down

lock: $(VENV)/.installed
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 --group dev --generate-hashes --upgrade \
		--no-annotate --no-header --quiet pyproject.toml -o requirements.lock

clean: down
	rm -rf $(VENV) .local demo
