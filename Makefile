# One environment in .venv and the few commands a developer needs. Wants Python 3.11 or newer, make, g++.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The version the numbers in docs/ come from. Where pip's default torch brings CUDA (gigabytes) and a CPU
# build is wanted, install that into .venv beforehand: one that is there is never touched. Or pass pip's
# arguments, as in `make install TORCH="torch==2.13.0 --index-url ..."`.
TORCH ?= torch==2.13.0

# Extra arguments for pytest, e.g. make test ARGS="-k progress -x". Torch runs one thread per worker:
# two workers with two threads each on two cores lose more than they gain.
ARGS ?=
JOBS ?= 2

# Containers like to set it. Without bytecode every process compiles the package anew, and every worker rewrites all tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test check quick lint gpu core native browser test-native test-arm wheels format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: core  ## create .venv and install the package with its development tools

demo: core  ## calibrate, quantize, sample and compare on a small model; results in out/demo
	$(BIN)/varptq demo --out out/demo

test: core browser  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# At the same time: types take one core for a minute.
check: $(STAMP)  ## the inner loop, about three minutes: lint, types and the quick tests
	@$(MAKE) --no-print-directory --jobs 2 lint quick

quick: core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow and not web" $(ARGS)

lint: $(STAMP)  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

gpu: $(STAMP)  ## tests, kernels and images on a GPU, at most eight minutes; results in docs/tables/gpu.md
	$(BIN)/python -m benchmarks.speed.gpu

# After a pull that changed it as well. Without a compiler the tests of the native core are skipped.
core: $(STAMP)
	@$(BIN)/python -m varptq.native.build > /dev/null || echo "make native builds it once a compiler is there"

native: $(STAMP)  ## build the native core of the runtime "cpu" (needs g++ or clang++)
	$(BIN)/python -m varptq.native.build

test-native: $(STAMP)  ## the native core's own tests under the address sanitizer
	$(BIN)/python -m varptq.native.build --sanitize

# Under the emulator qemu-user, whose processor "max" has every instruction set. The leak check of the address sanitizer needs
# what an emulator has not.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu
test-arm: $(STAMP)  ## the same for 64-bit ARM (needs g++-aarch64-linux-gnu, qemu-user-static)
	ASAN_OPTIONS=detect_leaks=0 CXX="$(ARM_CXX)" $(BIN)/python -m varptq.native.build --sanitize --emulator "$(ARM_RUN)"

# The compiler zig has the C libraries of both machines, from glibc 2.17 on.
GLIBC ?= 2.28
wheels: $(STAMP)  ## the sdist and the wheels of Linux, x86-64 and 64-bit ARM, in dist/
	rm -rf dist
	$(BIN)/python -m pip install --quiet -e '.[wheels]'
	$(BIN)/python -m build --no-isolation --sdist
	for machine in x86_64 aarch64; do CXX="$(CURDIR)/$(BIN)/python -m ziglang c++ -target $$machine-linux-gnu.$(GLIBC)" \
	  $(BIN)/python -m build --no-isolation --wheel || exit 1; done
	$(BIN)/python tests/helpers/wheel_audit.py dist/*.whl

# The tests of pages drive Debian's chromium. Without it, and without the rights to install it, they skip and say so.
browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	  && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium > /dev/null; } \
	  || echo "no chromium: the tests of pages are skipped"

format: $(STAMP)  ## format the code and apply safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and builds; .venv and out/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch goes in first and alone, so that the package's "torch>=2.6" never fetches a second one.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than 3.11; give a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || \
	  $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
