# The hardware: both targets need only packages (pip install -e '.[rtl,gguf]'), a C++ compiler and perl.
.PHONY: rtl-test rtl-report

# Every module and the whole designs, simulated: about 15 minutes on two cores, most of it the C++ compiler.
rtl-test:
	$(PY) -m pytest tests/test_rtl.py tests/rtl_system.py

# Clocks, area, longest path and energy, measured and written into the page: about 20 minutes on two cores.
rtl-report:
	$(PY) -m seedlm.rtl.report docs/hardware.md build/rtl
