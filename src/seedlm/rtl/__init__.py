"""SeedLM's matrix-vector product in hardware: written in Amaranth, handed out as Verilog.

    memory 64 B/clock -> aligner -> decoders -> lanes -> shifters, adder tree -> row accumulator -> float32
                                                  ^
    activations (FP16) -> aligner -> block floating point -> on-chip memory

`design` has the parameters and the command word, `twin` the same product in integers. Neither needs Amaranth; all other
modules do (``pip install '.[rtl]'``), and only `seedlm rtl`, the tests and the report import them. docs/hardware.md
draws the whole.
"""
