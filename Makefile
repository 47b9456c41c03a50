# One command each. Everything is installed into .venv; nothing needs root.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
export PYTHON ?= python3

.PHONY: help demo test test-slow test-train lint bench demo-model reference images proto proto-check wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp is renewed when what is installed may have changed.
$(VENV)/.installed: pyproject.toml deploy/prepare.sh
	@deploy/prepare.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@deploy/prepare.sh $(VENV) dev
	@touch $@

$(VENV)/.installed-train: $(VENV)/.installed-dev
	@deploy/prepare.sh $(VENV) dev,train
	@touch $@

demo: $(VENV)/.installed ## set up, then show the main job on the demo model
	@PATH="$(abspath $(BIN)):$$PATH" deploy/demo.sh

test: $(VENV)/.installed-dev ## what every change must pass
	$(BIN)/python -m pytest -m "not slow and not train"

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not train"

test-train: $(VENV)/.installed-train ## the tests that need torch
	$(BIN)/python -m pytest -m train

lint: $(VENV)/.installed-train ## ruff and mypy --strict; the training code needs its extra for that
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev ## quick measurements; the full ones: docs/benchmarks.md
	$(BIN)/python -m benchmarks.startup --quick
	$(BIN)/python -m benchmarks.engine --quick

demo-model: $(VENV)/.installed-train ## train the demo model anew (about an hour on two cores)
	$(BIN)/python -m models.demo.write_facts
	$(BIN)/python -m models.demo.train
	$(BIN)/python -m models.demo.export
	$(BIN)/python -m models.demo.write_calibration

reference: $(VENV)/.installed ## write docs/reference.md and docs/api.md from the code itself
	$(BIN)/python docs/write_reference.py
	$(BIN)/python docs/write_api_reference.py

images: $(VENV)/.installed ## draw docs/images from real output
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python docs/images/render.py

proto: ## generate edge_runtime/v1 from proto/ (in a virtual environment of its own)
	@deploy/generate_proto.sh

proto-check: ## fail where edge_runtime/v1 is not what proto/ gives
	@deploy/generate_proto.sh --check

wheel: $(VENV)/.installed ## a wheel with the demo model in it, in dist/
	@test -f models/demo/edge-demo-q8_0.gguf || { echo "no demo model: make demo-model" >&2; exit 1; }
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## remove what was built; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
