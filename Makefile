# `make demo` and `make test` do their own set-up. Stamp files in the virtual environment record each step,
# so that a step is redone only when its inputs change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built

.PHONY: help demo test bench gpu lint build clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BUILT) ## Train, sample and evaluate a small model on handwritten digits; results in runs/demo
	@$(BIN)/vaebm-fast demo

test: $(BUILT) ## Run the tests
	@$(BIN)/python -m pytest

# CASES: PRESET:N of the whole pair, instead of the default ones. COMPILE: cases that include torch.compile.
bench: $(BUILT) ## Measure the ops and the whole pair on this machine; results in benchmarks/results
	@$(BIN)/python -m benchmarks ops
	@$(BIN)/python -m benchmarks pair $(addprefix --compile ,$(COMPILE)) $(addprefix --case ,$(CASES))
	@$(BIN)/python -m benchmarks report

# Installs nothing: GPU_PYTHON brings torch for CUDA, Triton, pytest and pytest-benchmark. GPU_OPTIONS: such as
# --stage tune, for stages that ran out of time.
GPU_PYTHON ?= python3
gpu: ## On a GPU machine: build in place, tests, sanitisers and benchmarks within nine minutes
	@$(GPU_PYTHON) -m benchmarks gpu $(GPU_OPTIONS)

lint: $(INSTALLED) ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

build: $(BUILT) ## Set up the virtual environment and compile the extension

clean: ## Remove build products; keep the virtual environment and runs/
	rm -rf build *.egg-info vaebm_fast/*.so $(BUILT)
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "vaebm-fast needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(INSTALLED): requirements.txt $(CREATED)
	@echo "Installing the pinned dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

# Includes directories: removing a source changes its directory's time stamp.
$(BUILT): pyproject.toml setup.py $(shell find csrc) $(INSTALLED)
	@echo "Compiling the extension"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
