# PYTHON=  the interpreter a new environment is made from; one inside an environment means that environment.
# VENV=    the environment. One that you name and that is there is used as it is: nothing is downloaded,
#          only the extension is built. Without a name, .venv is made from requirements.txt.
PYTHON ?= python3
.DEFAULT_GOAL := help

inside := $(shell "$(PYTHON)" -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")')
ifneq ($(origin VENV),undefined)
  # One that this file made itself, perhaps not to its end, is still its own.
  given := $(shell test -x "$(VENV)/bin/python" && ! test -e "$(VENV)/made-by-make" && echo yes)
else ifneq ($(and $(inside),$(filter-out default file,$(origin PYTHON))),)
  VENV := $(inside)
  given := yes
else
  VENV := .venv
endif

PY := "$(VENV)/bin/python"
# One folder of stamps for each environment, so that changing between two does not mix them up.
stamps := build/stamps/$(shell printf %s "$(abspath $(VENV))" | cksum | cut -d' ' -f1)
native := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help env build demo test test-faults lint bench bench-quick gpu gpu-test gpu-bench gpu-sanitize clean

help:
	@echo 'make demo | test | test-faults | lint | bench | bench-quick | gpu | gpu-test | gpu-bench | gpu-sanitize | clean    [PYTHON=python3] [VENV=.venv]'

$(stamps)/env: requirements.txt requirements-tools.txt
	@mkdir -p $(@D)
ifeq ($(given),)
	test -x $(PY) || { "$(PYTHON)" -m venv "$(VENV)" && touch "$(VENV)/made-by-make"; }
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-tools.txt
endif
	@touch $@

$(stamps)/build: $(stamps)/env $(native)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

env: $(stamps)/env
build: $(stamps)/build

demo: build
	$(PY) examples/demo.py

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Files side by side, for most of the time one waits for another process or for a clock.
test: build lint
	$(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Minutes of it: processes killed at random and at every write.
test-faults: build
	$(PY) -m pytest -q tests/faults_kill.py

bench: build
	$(PY) -m pytest benchmarks -q -s --benchmark-only

bench-quick: build
	$(PY) -m pytest benchmarks -q -s --benchmark-only --quick

# On a machine with a GPU: its tests, none of them skipped, and then its figures, which go to
# benchmarks/results. Nothing is downloaded; `make gpu PYTHON=python3` takes the environment of that python.
gpu: gpu-test
	$(MAKE) gpu-bench

gpu-test gpu-bench: export FAIL_WITHOUT_CUDA := 1
gpu-test: build
	$(PY) -m pytest -q tests/test_gpu_ops.py tests/test_gpu_parity.py tests/test_gpu.py tests/test_triton_ops.py

gpu-bench: build
	$(PY) -m pytest -q -s benchmarks/bench_gpu.py benchmarks/bench_gpu_ops.py

# Slow: every access to memory watched, and every pair of accesses to shared memory.
gpu-sanitize: build
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) -m pytest -q tests/test_gpu_ops.py -k "CUDA and near_to_float64 and not emulated" || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info blip_trace/_C.*.so blip_trace/_cuda.so
