# `make demo` and `make test` do their own set-up. Stamp files in the virtual environment record each step,
# so that a step is redone only when its inputs change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built

.PHONY: help demo test bench gpu gpu-kit lint build clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BUILT) ## Train, sample and evaluate a small model on handwritten digits; results in runs/demo
	@$(BIN)/vaebm-fast demo

test: $(BUILT) ## Run the tests
	@$(BIN)/python -m pytest

# CASES: PRESET:N of the whole pair, instead of the default ones. COMPILE: cases that include torch.compile.
bench: $(BUILT) ## Measure the ops and the whole pair on this machine; results in benchmarks/results
	@$(BIN)/python -m benchmarks ops
	@$(BIN)/python -m benchmarks pair $(addprefix --compile ,$(COMPILE)) $(addprefix --case ,$(CASES))
	@$(BIN)/python -m benchmarks report

# Installs nothing; docs/gpu.md says what GPU_PYTHON has to bring. GPU_OPTIONS: such as --stage tune, for stages that ran
# out of time.
GPU_PYTHON ?= python3
gpu: ## On a GPU machine: build in place, tests, sanitisers and benchmarks within nine minutes
	@$(GPU_PYTHON) -c 'import torch' || { echo "Name the Python that has torch for CUDA: make gpu GPU_PYTHON=..."; exit 1; }
	@$(GPU_PYTHON) -m benchmarks gpu $(GPU_OPTIONS)

# What `make gpu` would take long to build, made where there is no GPU; needs nvcc and the GPU machine's Python version.
# Downloads a CUDA build of torch (3 GB) into build/kit. Carry build/gpu_kit.tar along: `make gpu` uses it if it fits.
KIT_PYTHON ?= python3.12
KIT_TORCH ?= 2.11.0
KIT_CAPABILITY ?= 9.0
KIT := build/kit
gpu-kit: ## Without a GPU: compile for one, so that `make gpu` there need not; result in build/gpu_kit.tar
	@$(KIT_PYTHON) --version >/dev/null 2>&1 || { \
		echo "$(KIT_PYTHON) does not run here. Name one of the GPU machine's version: make gpu-kit KIT_PYTHON=..."; exit 1; }
	@command -v nvcc >/dev/null || test -x "$(CUDA_HOME)/bin/nvcc" || { \
		echo "There is no nvcc. Install the CUDA toolkit of the GPU machine's torch, and set CUDA_HOME to its path."; exit 1; }
	@echo "Installing torch $(KIT_TORCH) into $(KIT)/venv; the first time this downloads 3 GB"
	@test "$$($(KIT)/venv/bin/python --version 2>&1)" = "$$($(KIT_PYTHON) --version)" || \
		$(KIT_PYTHON) -m venv --clear $(KIT)/venv
	@$(KIT)/venv/bin/python -m pip install --quiet torch==$(KIT_TORCH) "setuptools>=77.0.3" ninja numpy safetensors pillow tqdm
	@rm -rf $(KIT)/source && mkdir $(KIT)/source
	@cp -rp csrc vaebm_fast benchmarks setup.py pyproject.toml README.md LICENSE $(KIT)/source
	@rm -f $(KIT)/source/vaebm_fast/*.so
	@echo "Compiling the extension; $(KIT)/build.log has the compilers' output"
	@cd $(KIT)/source && VAEBM_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" ../venv/bin/python setup.py build_ext \
		--inplace --build-temp ../objects > ../build.log 2>&1 || { tail -n 5 ../build.log; exit 1; }
	@echo "Compiling the Triton kernels"
	@cd $(KIT)/source && ../venv/bin/python -m benchmarks kit make --kit $(CURDIR)/build/gpu_kit.tar \
		--capability $(KIT_CAPABILITY)

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
