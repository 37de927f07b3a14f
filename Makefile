# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
MODEL ?= digits@best
PORT ?= 8000
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
TARGETS := help install quickstart serve api-key token test test-api test-benchmarks test-browser test-load \
  test-faults test-cluster soak lint format clean
.PHONY: $(TARGETS)

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(INSTALLED)  ## make .venv with the pinned set of packages

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit((3, 11) > v or v > (3, 13))' || \
	  { echo "needs Python 3.11 to 3.13; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install  ## train digits on this machine, in about 3 minutes, and look at them
	$(BIN)/python jobs/quickstart.py
	@$(BIN)/python tests/readability.py

serve: install  ## serve MODEL (digits@best) on PORT (8000) to this machine alone, without keys
	$(BIN)/python -m serving --models $(MODEL) --port $(PORT) --no-auth

# In `make api-key alice`, alice is a name and no target.
ifeq ($(firstword $(MAKECMDGOALS)),api-key)
GOALS := $(filter-out api-key,$(MAKECMDGOALS))
ifneq ($(filter $(GOALS),$(TARGETS)),)
$(error $(GOALS) is a target: say make api-key NAME=$(GOALS))
endif
NAME := $(GOALS)
.PHONY: $(GOALS)
$(GOALS): api-key ; @:
endif

api-key: install  ## make a key to the endpoint, for 600 images a minute, and show it once: make api-key NAME
	@$(BIN)/python -m serving.keys make -- '$(NAME)'

token: install  ## make the key to your clusters, ~/.ray/auth_token, if there is none
	@env -u RAY_AUTH_TOKEN -u RAY_AUTH_TOKEN_PATH $(BIN)/ray get-auth-token --generate > /dev/null 2>&1 && chmod 600 ~/.ray/auth_token
	@echo "the key to your clusters: $$HOME/.ray/auth_token; with RAY_AUTH_MODE=token Ray uses it"

test: install lint  ## lint, format check, types, and the tests that need one machine; test-... are the others
	$(BIN)/python -m pytest

test-api: install  ## thousands of requests made up from the OpenAPI document
	BIGGAN_API_EXAMPLES=460 $(BIN)/python -m pytest -n 0 tests/serving/test_schema.py

test-benchmarks: install  ## the benchmarks, as they are run, on networks of seconds
	$(BIN)/python -m pytest -n 0 tests/benchmarks

test-browser: install  ## the endpoint's page in Chromium
	$(BIN)/python -m pytest -n 0 tests/browser

test-faults: install  ## training whose machines, processes and storage fail
	$(BIN)/python -m pytest -n 0 tests/faults

test-load: install  ## the endpoint under load: replicas killed, updated, scaled, overloaded
	$(BIN)/python -m pytest -n 0 -s tests/load

soak: install  ## an hour of training with a fault every two minutes
	PYTHONPATH=tests $(BIN)/python -m faults.soak

test-cluster: install  ## three hosts on this machine: the whole path, and what may befall it, as root
	$(BIN)/python -m pytest -n 0 tests/cluster

lint: install  ## lint, format check and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install  ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## delete .venv and caches; storage/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache platform/*.egg-info
