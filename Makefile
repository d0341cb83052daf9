# Everything runs in .venv, made on first use. CPU only; a GPU is not needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build of torch; the package itself takes any torch >= 2.11.
TORCH ?= torch==2.13.0
# Where gpu-check leaves its logs and figures.
OUTPUT ?= runs/gpu-check
SOURCES := pyproject.toml setup.py sources.py $(shell find csrc -type f)

.PHONY: demo test test-all lint format wheel wheel-check machine-code gpu-check clean

demo: $(VENV)/installed
	$(BIN)/cu-fast demo

# A worker per core, with one thread each. What takes tens of seconds runs beside them (tests/helpers/background.py).
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --durations=15

test: $(VENV)/installed
	$(PYTEST)

# Also what is too heavy for every check: tests/helpers/tiers.py.
test-all: $(VENV)/installed
	CU_FAST_TEST_ALL=1 $(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' | xargs $(BIN)/clang-format -i

# CPU and, if there is an nvcc, CUDA.
wheel: $(VENV)/installed
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

# Installs it into a new environment, away from the sources.
wheel-check: wheel
	$(BIN)/python tests/wheel_check.py "$(TORCH)"

# After a change of a kernel that is meant to change these.
machine-code: $(VENV)/installed
	$(BIN)/python tests/kernels/test_machine_code.py --write

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

clean:
	rm -rf $(VENV) build dist *.egg-info cu_fast/_C*.so compile_commands.json
