"""FP16 activations to block floating point, and the memory that holds them (software twin: `twin.align`).

A block keeps the largest of its FP16 exponents; each significand gets six bits below and is shifted right by how far its own
exponent lies under that, rounded half away from zero. Elements within a factor 64 of the block's largest are exact; no
element is off by more than 2^-17 of the largest.
"""

from amaranth.hdl import Cat, Module, Mux, Value
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from seedlm.rtl.design import HALF_BITS, MANTISSA_BITS, SHARED_BITS
from seedlm.rtl.parts import Leaf, Part
from seedlm.rtl.pipeline import Pipeline, Staged


class Activations(Leaf):
    """Ports: halves In, C FP16 numbers; mantissas Out, C fields; shared Out, their exponent; invalid Out: an Inf or NaN."""

    module_name = "seedlm_activations"

    def __init__(self, block_size: int):
        super().__init__(
            {
                "halves": In(block_size * HALF_BITS),
                "mantissas": Out(block_size * MANTISSA_BITS),
                "shared": Out(SHARED_BITS),
                "invalid": Out(1),
            }
        )
        self.pipe = pipe = Pipeline(self.m)
        halves = [Staged(self.halves.word_select(i, HALF_BITS)) for i in range(block_size)]
        exponents = [pipe.stage("exponent", lambda h: Mux(h[10:15] == 0, 0, h[10:15] - 1)[:SHARED_BITS], h) for h in halves]
        invalid = pipe.stage("invalid", lambda *h: Cat(x[10:15].all() for x in h).any(), *halves)
        level = exponents
        while len(level) > 1:
            pairs = [
                pipe.stage("largest", lambda a, b: Mux(a > b, a, b), *level[i : i + 2]) for i in range(0, len(level) - 1, 2)
            ]
            level = pairs + level[2 * len(pairs) :]
        shared = level[0]
        mantissas = [self.mantissa(h, e, shared) for h, e in zip(halves, exponents, strict=True)]
        self.latency = mantissas[0].time
        self.m.d.comb += [
            self.mantissas.eq(Cat(v.value for v in mantissas)),
            self.shared.eq(pipe.at(shared, self.latency)),
            self.invalid.eq(pipe.at(invalid, self.latency)),
        ]

    def mantissa(self, half: Staged, exponent: Staged, shared: Staged) -> Staged:
        """One element's signed mantissa at the block's exponent."""
        pipe = self.pipe
        distance = pipe.stage("distance", lambda s, e: (s - e)[:SHARED_BITS], shared, exponent)
        # Seven bits below the significand: six to keep and one to round with.
        shifted: Staged = pipe.stage("significand", lambda h: Cat(h[:10], h[10:15].any()) << 7, half)
        for low, high in ((0, 2), (2, 4), (4, 5)):
            shifted = pipe.stage(
                "shifted", lambda v, n, low=low, high=high: (v >> (n[low:high] << low))[: len(v)], shifted, distance
            )
        rounded = pipe.stage("rounded", lambda v: ((v + 1) >> 1)[: MANTISSA_BITS - 1], shifted)
        return pipe.stage("mantissa", lambda v, h: _signed(v, h[15]), rounded, half)


def _signed(magnitude: Value, negative: Value) -> Value:
    return Mux(negative, -magnitude, magnitude)[:MANTISSA_BITS]


class ActivationMemory(Part):
    """A chunk's activations per row, read two clocks after `address` (block RAM with its output register).

    Ports: write_enable In, one bit a bank; write_address, write_data (one bank wide) In; address In; data Out.
    """

    def __init__(self, module_name: str, *, banks: int, bank_bits: int, depth: int):
        self.module_name = module_name
        self.banks, self.bank_bits, self.depth = banks, bank_bits, depth
        self.latency = 2
        super().__init__(
            {
                "write_enable": In(banks),
                "write_address": In(range(depth)),
                "write_data": In(bank_bits),
                "address": In(range(depth)),
                "data": Out(banks * bank_bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        pipe = Pipeline(m)
        words = []
        for bank in range(self.banks):
            m.submodules[f"bank{bank}"] = memory = Memory(shape=self.bank_bits, depth=self.depth, init=[])
            write, read = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.addr.eq(self.write_address),
                write.data.eq(self.write_data),
                write.en.eq(self.write_enable[bank]),
                read.addr.eq(self.address),
            ]
            words.append(Staged(read.data, 1))
        m.d.comb += self.data.eq(pipe.stage("data_out", lambda *w: Cat(w), *words).value)
        return m
