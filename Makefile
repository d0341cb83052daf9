# Everything runs in .venv, made on first use. CPU only; a GPU is not needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build of torch; the package itself takes any torch >= 2.11.
TORCH ?= torch==2.13.0
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test lint format wheel clean

demo: $(VENV)/installed
	$(BIN)/cu-fast demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' | xargs $(BIN)/clang-format -i

wheel: $(VENV)/installed
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

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
	rm -rf $(VENV) build dist *.egg-info cu_fast/_C*.so
