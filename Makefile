# make demo and make test work from a fresh clone with python3, make and g++; the rest builds on the same .venv.

VENV := .venv
PY := $(VENV)/bin/python
# One torch for everybody, so that a measured tolerance or speed can be repeated; the package itself takes >= 2.10.
TORCH ?= torch==2.13.0
# The version whose compiled figures are stored and gated; the package itself takes >= 3.5. torch for CUDA brings a Triton
# of its own, and make test, test-gpu and bench-gpu use that one; test-ptx and gpu-report put this one in its place.
TRITON ?= triton==3.9.0
HAS_TRITON = $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)'
# The CPU alone unless a GPU is visible; set the variable to decide yourself.
ifndef DIEN_KERNELS_BUILD
DIEN_KERNELS_BUILD := $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo cpu)
endif
export DIEN_KERNELS_BUILD
# The tests' tensors are small: with many threads they would wait for one another, so tests go to processes instead. Each
# process begins with a run of neighbouring tests, and one that is done takes over some of another's.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

# The interpreter computes in NumPy, whose exp and tanh on AVX-512 are some units in the last place worse than elsewhere, and
# than a GPU's: the tolerance rule holds for the others. The names are those of older and of newer versions of NumPy.
TRITON_ENV := TRITON_INTERPRET=1 NPY_DISABLE_CPU_FEATURES='AVX512F AVX512CD AVX512_SKX AVX512_ICL AVX512_SPR X86_V4'
TEST_TRITON = if $(HAS_TRITON); \
    then $(TEST_ENV) $(TRITON_ENV) $(PY) -m pytest tests -m interpreter $(PARALLEL); \
    else echo "make $@: triton is not installed, so its kernels were not run" >&2; fi

# Bochs, an emulator of a processor with AVX-512.
BOCHS ?= bochscpu-python==0.4.0
HAS_AVX512 = $(PY) -c 'import dien_kernels, torch; torch.ops.dien_kernels._set_cpu_isa("avx512")' 2>/dev/null

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILT := dien_kernels/_build.json
READY := $(VENV)/.ready

ASAN_DIR := build/asan
ASAN_BUILT := $(ASAN_DIR)/dien_kernels/_build.json
# No leak check: Python and torch keep much until the process ends.
ASAN_ENV := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

.PHONY: demo test test-fast test-triton test-avx512 test-asan test-ptx test-gpu bench bench-check bench-peers bench-gpu
.PHONY: gpu-report lint cuda build info wheel-test clean test-integrations

# Every test, in two runs: Triton's interpreter must be on before Triton is imported, so its tests take other processes.
# The second run comes whether or not the first one passes; each ends with its table of combinations.
test: $(BUILT)
	@failed=0; \
	$(TEST_ENV) $(PY) -m pytest tests $(PARALLEL) || failed=1; \
	$(TEST_TRITON) || failed=1; \
	exit $$failed

# Without what compiles, kills processes or takes more than about two seconds, and without Triton's interpreter.
test-fast: $(BUILT)
	$(TEST_ENV) $(PY) -m pytest tests -m 'not slow' $(PARALLEL)

# The Triton kernels in Triton's interpreter.
test-triton: $(BUILT)
	@$(TEST_TRITON)

# DATA=path: your own logs (Parquet or CSV with the usual column names) instead of synthetic ones.
demo: $(BUILT)
	$(PY) examples/demo.py $(if $(DATA),--data '$(DATA)')

build: $(BUILT)
	@$(PY) -c 'import json; print("Built, and installed in $(VENV):", *json.load(open("$(BUILT)"))["backends"] or ["no native code"])'
	@echo 'Try: make demo, make info, or $(VENV)/bin/dien-kernels train --help'

info: $(BUILT)
	$(PY) -m dien_kernels info

# Uses the environment of make bench-peers if that was called; without it, the rows of the peers say that they are absent.
PEERS_VENV := .venv-peers
PEERS_READY := $(PEERS_VENV)/.ready
bench: $(BUILT)
	$(if $(wildcard $(PEERS_READY)),$(PEERS_VENV)/bin/python,$(PY)) -m benchmarks

# Every target of benchmarks/check.py with its figure in results/cpu.csv. Fails if more of them are missed or not
# measured than when this number was last lowered.
BENCH_MISSED ?= 35
bench-check: $(READY)
	$(PY) -m benchmarks check --allow $(BENCH_MISSED)

# One environment for all peers, beside the usual one; over 3 GB.
bench-peers: $(PEERS_READY)

$(PEERS_READY): $(wildcard benchmarks/peers/requirements*.txt)
	test -x $(PEERS_VENV)/bin/python || python3 -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install -q '$(TORCH)' 'setuptools>=77' wheel
	$(PEERS_VENV)/bin/python -m pip install -q -r benchmarks/peers/requirements.txt
	$(PEERS_VENV)/bin/python -m pip install -q --no-deps -r benchmarks/peers/requirements-alone.txt
	touch $@

# The AVX-512 kernels, as they stand in the built library, on an emulated processor. EMULATE=1: even on a processor that has
# AVX-512, where they must agree to the bit. AVX512_CASES: how many random cases of each op.
AVX512_CASES ?= 1000
test-avx512: $(BUILT)
	@if [ -z '$(EMULATE)' ] && $(HAS_AVX512); then \
	    echo 'This processor has AVX-512, so make test runs the kernels on it; EMULATE=1 runs them in the emulator, too.'; \
	else \
	    $(PY) -m pip install -q '$(BOCHS)' && \
	    $(TEST_ENV) $(PY) -m pytest tests/avx512 -m avx512 --no-skip --avx512-cases $(AVX512_CASES) $(PARALLEL); \
	fi

# The Triton and CUDA kernels (with nvcc) as PTX in a simulator: PTXSIM names its folder. Nothing may be skipped.
PTXSIM ?= ../shared/ptxsim
test-ptx: $(READY)
	@test -f '$(PTXSIM)/__init__.py' || { echo "make test-ptx: no ptxsim in $(PTXSIM); set PTXSIM to its folder" >&2; exit 1; }
	$(PY) -m pip install -q '$(TRITON)'
	PTXSIM='$(abspath $(PTXSIM))' $(TEST_ENV) $(PY) -m pytest tests -m ptx --no-skip -n auto --maxprocesses 8

# On a machine with a GPU: the grid on the device, most of which is compiling (in eight processes, meant to be under eight
# minutes), and timings into results/gpu.csv.
NEEDS_GPU = @$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make $@: this needs a GPU, and torch sees none")'
test-gpu: $(BUILT)
	$(NEEDS_GPU)
	$(PY) -m pytest tests -m gpu --no-skip -n auto --maxprocesses 8

bench-gpu: $(BUILT)
	$(NEEDS_GPU)
	$(PY) -m benchmarks.gpu.timings
	DIEN_KERNELS_FAST=1 $(PY) -m benchmarks.gpu.timings --hidden 64 --ops gru --dtypes bfloat16 --out benchmarks/results/gpu_fast.csv

# What Triton's compiler and nvcc make of the kernels for each architecture, and what the CUDA ones ask of memory in the
# simulator; no GPU is needed (over half an hour).
gpu-report: $(READY)
	$(PY) -m pip install -q '$(TRITON)'
	$(PY) -m benchmarks.gpu.compiled_triton
	$(PY) -m benchmarks.gpu.compiled_cuda
	PTXSIM='$(abspath $(PTXSIM))' $(PY) -m benchmarks.gpu.memory_cuda

cuda: $(READY)
	DIEN_KERNELS_BUILD=cuda $(PY) setup.py -q build_ext --inplace

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy dien_kernels
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

# The sanitizers' runtimes come before everything else in the process; libstdc++ too, as they wrap its throw.
test-asan: $(BUILT) $(ASAN_BUILT)
	cxx="$${CXX:-g++}"; \
	preload="$$($$cxx -print-file-name=libasan.so):$$($$cxx -print-file-name=libubsan.so):$$($$cxx -print-file-name=libstdc++.so)"; \
	$(TEST_ENV) $(ASAN_ENV) DIEN_KERNELS_LIB=$(ASAN_DIR)/dien_kernels/_C.so LD_PRELOAD="$$preload" \
	    $(PY) -m pytest tests -m native -p no:cacheprovider

# Other libraries' own classes, original and patched. Each library is put into a folder of its own, in the release that
# docs/integrations.md names, beside the torch of the environment.
HOSTS := build/hosts
test-integrations: $(BUILT)
	test -e $(HOSTS)/deepctr-torch-0.3.0 || { $(PY) -m pip install -q --no-deps --target $(HOSTS)/deepctr_torch \
	    deepctr-torch==0.3.0 && $(PY) -m pip install -q --target $(HOSTS)/deepctr_torch requests && \
	    touch $(HOSTS)/deepctr-torch-0.3.0; }
	$(TEST_ENV) PYTHONPATH=$(HOSTS)/deepctr_torch $(PY) -m pytest tests/integrations/host_deepctr_torch.py $(PARALLEL)

# An sdist, the wheel made from it, and the smoke tests of both in clean environments away from the checkout.
wheel-test: $(READY)
	rm -rf build/dist
	$(PY) -m build --no-isolation --outdir build/dist .
	set -e; room="$$(mktemp -d)"; trap 'rm -rf "$$room"' EXIT; cp tests/smoke.py "$$room"; \
	for package in $(CURDIR)/build/dist/*; do \
	    (cd "$$room" && python3 -m venv --clear env && \
	    env/bin/python -m pip install -q '$(TORCH)' 'setuptools>=77' wheel && \
	    env/bin/python -m pip install -q --no-build-isolation "$$package" && \
	    env/bin/python smoke.py); \
	done

clean:
	rm -rf build dist *.egg-info dien_kernels/_C.so $(BUILT)

# Objects are kept between builds: only what changed, or includes what changed, is compiled again.
$(BUILT): $(SOURCES) setup.py | $(READY)
	$(PY) setup.py -q build_ext --inplace

$(ASAN_BUILT): $(SOURCES) setup.py | $(READY)
	DIEN_KERNELS_SANITIZE=address,undefined DIEN_KERNELS_BUILD=cpu $(PY) setup.py -q build_ext --build-lib $(ASAN_DIR)

# Type checkers find an editable package only in the mode compat; in the usual one an import hook of setuptools finds it,
# which they do not run. pip before 22.1 does not pass the mode on.
$(READY): pyproject.toml Makefile
	@python3 -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@python3 -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "python3 has no ensurepip: install the package python3-venv (Debian, Ubuntu) or its like" >&2; exit 1; }
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q 'pip>=22.1' '$(TORCH)' 'setuptools>=77' wheel
	$(HAS_TRITON) || $(PY) -m pip install -q '$(TRITON)' || echo "$(TRITON) is not to be had: its tests will be skipped" >&2
	$(PY) -m pip install -q --no-build-isolation --config-settings editable_mode=compat -e '.[dev,train]'
	touch $@
