# Everything lives in .venv and is installed on first use: Python 3.10 or newer, pip, gcc and make suffice.
# A stamp in .venv carries a checksum of what it was made from, so a target installs again only when that
# has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)/transformers-oldest
WORKERS ?= 2
# Which versions are installed; requirements/oldest.txt has the oldest that are supported.
CONSTRAINTS ?= constraints.txt

PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS)
# The tests run in $(WORKERS) processes; more threads in each would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS)

checksum = $(firstword $(shell cat $(1) | cksum))
CPP_SOURCES := $(sort $(shell find csrc python_bindings -name '*.h' -o -name '*.cpp' -o -name '*.cu*'))

BASE_STAMP := $(VENV)/stamp-base-$(call checksum,$(CONSTRAINTS) pyproject.toml setup.py)
TEST_STAMP := $(VENV)/stamp-test-$(call checksum,$(CONSTRAINTS) pyproject.toml setup.py requirements/*)
SERVING := .venv-serving
SERVING_STAMP := $(SERVING)/stamp-$(call checksum,requirements/serving.txt pyproject.toml setup.py)
NATIVE_STAMP := $(VENV)/stamp-native-$(call checksum,$(CONSTRAINTS) setup.py reft_kernels/build.py $(CPP_SOURCES))

.DEFAULT_GOAL := help
.PHONY: help setup native demo test test-slow lint format bench clean
.PHONY: test-serving demo-serving
.PHONY: gpu gpu-first gpu-test gpu-sanitize gpu-bench gpu-models gpu-sweeps gpu-presets gpu-dry

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 20

setup: $(NATIVE_STAMP) $(TEST_STAMP) ## make .venv with everything that the other targets need

demo: $(NATIVE_STAMP) ## run the main job on a small model (MODEL=path or hub name: on that one)
	$(BIN)/python -m reft_bench.commands.demo $(if $(MODEL),--model "$(MODEL)")

test: $(NATIVE_STAMP) $(TEST_STAMP) ## run the tests, then those of the patch with the oldest transformers
	$(PYTEST) -m "not gpu and not slow"
	PYTHONPATH=$(OLDEST) $(PYTEST) -m "models and not gpu and not slow"

test-slow: $(NATIVE_STAMP) $(TEST_STAMP) ## run the tests that take minutes or gigabytes
	$(PYTEST) -m "slow and not gpu"

test-serving: $(SERVING_STAMP) ## run the tests of the vLLM plugin, in an environment of its own (3.5 GB)
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -m serving tests/serving

demo-serving: $(SERVING_STAMP) ## four adapters in one batch of a vLLM server, checked against Hugging Face
	$(SERVING)/bin/python -m reft_bench.commands.demo_serving

lint: $(TEST_STAMP) ## check style (ruff, clang-format) and the types of the public API (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy

format: $(TEST_STAMP) ## let ruff and clang-format rewrite what lint would refuse
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(NATIVE_STAMP) $(TEST_STAMP) ## measure what the edit costs on this machine (tables and plots in results/)
	$(BIN)/reft-bench overhead --preset quick --out results/overhead --overwrite
	$(BIN)/reft-bench report results/overhead

# On a CUDA machine whose own Python has torch, Triton and pytest: in place, without .venv or network.
GPU_KIT := $(PYTHON) -m bench.gpu.kit

gpu: ## prove the kernels on this machine's GPU in under 9 minutes: build, tests, sanitizer, benchmarks
	$(GPU_KIT)

gpu-first: ## in under 4: whether the kernels are right (the tests that matter most, and memcheck)
	$(GPU_KIT) --parts build,first

gpu-test: ## the first part of make gpu: the tests that need a GPU
	$(GPU_KIT) --parts build,test

gpu-sanitize: ## the second: compute-sanitizer's four tools on a small set of calls
	$(GPU_KIT) --parts build,sanitize

gpu-bench: ## the third: what the kernels and the edit of a model cost on this GPU
	$(GPU_KIT) --parts build,bench

gpu-models: ## after `make gpu`, nine minutes more: compiled decode of 8B's shape, training of a 1B shape
	$(GPU_KIT) --parts build,models

gpu-sweeps: ## and nine more: eager 1B, all of 8B, other dtypes, ranks and peers of the op
	$(GPU_KIT) --parts build,sweeps

gpu-presets: ## and nine more: short forms of the presets paper and serving
	$(GPU_KIT) --parts build,presets

# Which parts make up a run of the kit.
GPU_RUNS := build,first build,test,sanitize,bench build,models build,sweeps build,presets

gpu-dry: $(NATIVE_STAMP) $(TEST_STAMP) ## rehearse all of these without a GPU: command lines, limits, results
	@for parts in $(GPU_RUNS); do \
	  OUT=build/gpu-dry/$$parts $(BIN)/python -m bench.gpu.kit --dry --parts $$parts || exit 1; done

native: $(BASE_STAMP) ## compile the native library in place
	$(BIN)/python setup.py build_ext --inplace

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) $(SERVING) build dist *.egg-info reft_kernels/lib .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find bench reft_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch and the tools of the build come first and by themselves. The native library has a stamp of its own.
$(BASE_STAMP): | $(BIN)/python
	rm -f $(VENV)/stamp-base-*
	$(INSTALL) torch 'setuptools>=77' ninja
	REFT_KERNELS_BUILD_NATIVE=0 $(INSTALL) --no-build-isolation --editable '.[bench,triton]'
	touch $@

$(TEST_STAMP): $(BASE_STAMP)
	rm -f $(VENV)/stamp-test-*
	$(INSTALL) -r requirements/test.txt -r requirements/lint.txt
	$(PIP) install --quiet --no-deps -r requirements/pyreft.txt
	rm -rf $(OLDEST)
	$(PIP) install --quiet --no-deps --target $(OLDEST) -r requirements/transformers-oldest.txt
	touch $@

# vLLM pins a torch of its own. Its torchvision, torchaudio and torchcodec don't fit that torch, and nothing
# here needs them. The package is built in place: with either torch it is the same library.
$(SERVING_STAMP): | $(NATIVE_STAMP)
	$(PYTHON) -m venv $(SERVING)
	rm -f $(SERVING)/stamp-*
	$(SERVING)/bin/python -m pip install --quiet -r requirements/serving.txt
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	REFT_KERNELS_BUILD_NATIVE=0 $(SERVING)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(NATIVE_STAMP): $(BASE_STAMP)
	rm -f $(VENV)/stamp-native-*
	$(BIN)/python setup.py build_ext --inplace
	touch $@
