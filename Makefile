# `make` lists the commands; each sets up what it needs in .venv and runs.
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODELS ?= models
PYTHON ?= python3
# The two runtimes exclude each other, so one is chosen by whether an NVIDIA driver answers.
RUNTIME ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help serve test lint format demo demo-model constraints clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

install = .venv/bin/uv pip install --quiet --python .venv/bin/python --constraints constraints.txt --editable

.venv/runtime-$(RUNTIME): .venv/bin/uv pyproject.toml constraints.txt
	@echo "installing the service ($(RUNTIME) runtime) into .venv"
	$(install) '.[$(RUNTIME)]'
	@touch $@

.venv/development-$(RUNTIME): .venv/bin/uv pyproject.toml constraints.txt
	@echo "installing service, training and test tools ($(RUNTIME) runtime) into .venv: about 6 GB with torch"
	$(install) '.[$(RUNTIME),training,dev]'
	@touch $@ .venv/runtime-$(RUNTIME)

serve: .venv/runtime-$(RUNTIME)  ## start the service [HOST=127.0.0.1] [PORT=8000] [MODELS=models]
	.venv/bin/python -m service serve --host $(HOST) --port $(PORT) --models $(MODELS)

test: lint  ## install everything, check format, lint and types, run all tests
	.venv/bin/python -m pytest

lint: .venv/development-$(RUNTIME)  ## check format, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/development-$(RUNTIME)  ## format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

constraints: .venv/bin/uv  ## pin the newest versions that pyproject.toml allows
	.venv/bin/uv pip compile --quiet --universal --upgrade --no-header --no-annotate --no-emit-index-url \
	  --python-version 3.11 --extra cpu --extra gpu --extra training --extra dev pyproject.toml -o constraints.txt

clean:  ## remove .venv and what tests and demos left
	rm -rf .venv runs state .mypy_cache .pytest_cache .ruff_cache
