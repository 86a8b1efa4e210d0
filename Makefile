# Two commands for a newcomer: `make demo` and `make test`. Each makes its own environment first.
# Every recipe line is one plain command that can be pasted into a shell.

PYTHON    ?= python3
# Which torch build. TORCH=torch takes the newest, TORCH=path/to/torch.whl a local file.
TORCH     ?= torch==2.13.0
# Further flags of pip. On Linux without a GPU this avoids the CUDA download (several GB):
# make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
VENV      ?= .venv
# Three builds that match, whatever is newest of each: ComfyUI imports all of them.
COMFY_TORCH ?= torch torchvision torchaudio
COMFYUI_PATH ?=
OUT       ?= demo-out
ARGS      ?=

BIN := $(VENV)/bin
# A process per core; a file's tests stay together, as they share what is slow to make.
PYTEST := $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile
# The stamps carry a checksum of the choices above, so another TORCH is another installation.
CHOICE      := $(firstword $(shell echo '$(PYTHON) $(TORCH) $(PIP_FLAGS)' | cksum))
TORCH_STAMP := $(VENV)/torch-$(CHOICE).stamp
RUN_STAMP   := $(VENV)/run-$(CHOICE).stamp
DEV_STAMP   := $(VENV)/dev-$(CHOICE).stamp

OLD_PYTHON := fewstep needs Python 3.11 or newer; name one: make PYTHON=python3.11
CHECK_PYTHON := import sys; sys.exit("$(OLD_PYTHON)" if sys.version_info < (3, 11) else 0)

.PHONY: help demo test check fix nightly gpu comfy interop triton tensorrt-surface wheel clean
.DEFAULT_GOAL := help

help:     ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'
	@echo "variables: PYTHON=$(PYTHON) TORCH=$(TORCH) PIP_FLAGS=$(PIP_FLAGS) OUT=$(OUT) ARGS=$(ARGS)"

demo: $(RUN_STAMP) ## distil the shipped digits teacher, draw with the result, score it (ARGS=--quick)
	$(BIN)/fewstep demo --out $(OUT) $(ARGS)

test: $(DEV_STAMP) ## the tests (ARGS="-k recipe" picks some)
	$(PYTEST) $(ARGS)

check: $(DEV_STAMP) ## everything to run before a push: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

fix: $(DEV_STAMP) ## format, and repair what the linter can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

nightly: $(DEV_STAMP) ## the tests with the slow ones
	$(PYTEST) -m "not gpu and not network" $(ARGS)

gpu: $(DEV_STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

comfy:    ## tests inside the ComfyUI at COMFYUI_PATH, in an environment of its own; writes the parity table
	test -f "$(COMFYUI_PATH)/comfy/sd.py" || { echo "say where ComfyUI is: make comfy COMFYUI_PATH=..."; exit 2; }
	$(PYTHON) -m venv build/comfy
	build/comfy/bin/python -m pip install $(PIP_FLAGS) $(COMFY_TORCH)
	build/comfy/bin/python -m pip install $(PIP_FLAGS) -r "$(COMFYUI_PATH)/requirements.txt" requests -e ".[train,dev]"
	COMFYUI_PATH="$(COMFYUI_PATH)" build/comfy/bin/python -m pytest -q -m comfy tests/comfy $(ARGS)
	COMFYUI_PATH="$(COMFYUI_PATH)" build/comfy/bin/python tests/comfy/table.py --write

interop: $(DEV_STAMP) ## Optimum loads our exports and draws our pictures, in an environment of its own
	$(BIN)/python -P tests/export/interop_reference.py build/interop
	$(PYTHON) -m venv build/optimum
	build/optimum/bin/python -m pip install $(PIP_FLAGS) "$(TORCH)" "diffusers==0.37.1" "transformers==4.57.6" "huggingface-hub==0.36.2" onnx onnxruntime
	build/optimum/bin/python -m pip install $(PIP_FLAGS) --no-deps "optimum==2.3.0" "optimum-onnx==0.1.0"
	for name in sd15 sdxl sd3 flux-schnell; do build/optimum/bin/python -P tests/export/interop.py build/interop/$$name build/interop/$$name.npz || exit 1; done

triton: $(DEV_STAMP) ## a real tritonserver draws from generated repositories, in its own environment
	$(PYTHON) -m venv build/triton
	build/triton/bin/python -m pip install "nvidia-pytriton==0.7.0" "numpy<2" "onnxruntime>=1.23,<2" -e .
	$(BIN)/python -m pytest -q -m slow tests/export/triton

tensorrt-surface: $(DEV_STAMP) ## names of TensorRT's API from NVIDIA's wheels (needs gcc)
	$(BIN)/python tests/export/tensorrt/surface.py

wheel: $(DEV_STAMP) ## build sdist and wheel, install the wheel in a clean environment, import all of it
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python tests/try_wheel.py dist $(PIP_FLAGS) "$(TORCH)"

clean:    ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info

$(TORCH_STAMP):
	$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) "$(TORCH)"
	touch $@

$(RUN_STAMP): $(TORCH_STAMP) pyproject.toml
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[train]"
	touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) -e ".[train,dev]"
	touch $@
