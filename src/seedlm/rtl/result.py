"""From the blocks' terms to one float32 per row (software twin: `twin.to_float32`).

The terms are integers in one unit, so the tree and the running sum of a row are exact. The only division of the whole product
is by 2^n - 1, once a row: 1 / (2^n - 1) = 2^-n (1 + 2^-n)(1 + 2^-2n)(1 + 2^-4n)..., a few shifted additions on 33 bits.
"""

from amaranth.hdl import Cat, Const, Mux, Signal, Value, signed
from amaranth.lib.wiring import In, Out

from seedlm.rtl.design import COMMAND_BITS, Design
from seedlm.rtl.parts import Leaf
from seedlm.rtl.pipeline import Operand, Pipeline, Staged, carry_add

FRACTION_BITS = 32
"""Leading bits of a row's sum that its float is made from."""
NAN = 0x7FC00000
INFINITY = 0x7F800000


def reciprocal_shifts(divisor_bits: int) -> list[int]:
    """Shifts n, 2n, 4n.. of the reciprocal's product that still move a fraction; none where the divisor is 1."""
    shifts, shift = [], divisor_bits
    while divisor_bits > 1 and shift < FRACTION_BITS:
        shifts.append(shift)
        shift *= 2
    return shifts


class RowSum(Leaf):
    """Ports: terms In, `blocks` signed fields; enable In: there is a chunk; first In: it starts a row; total Out.

    invalid In and total_invalid Out: whether this chunk, and any chunk of the row so far, had an operand that is no number.
    """

    def __init__(self, design: Design):
        self.module_name = f"{design.prefix}_row_sum"
        super().__init__(
            {
                "terms": In(design.blocks * design.term_bits),
                "first": In(1),
                "enable": In(1),
                "invalid": In(1),
                "total": Out(signed(design.total_bits)),
                "total_invalid": Out(1),
            }
        )
        self.pipe = pipe = Pipeline(self.m)
        terms = [Staged(self.terms.word_select(i, design.term_bits).as_signed()) for i in range(design.blocks)]
        chunk = pipe.sum_pieces("tree", [pipe.split(term, design.total_bits) for term in terms])
        total = self.accumulate(chunk)
        first, enable, invalid = (pipe.at(Staged(s), total.time - 1) for s in (self.first, self.enable, self.invalid))
        with self.m.If(enable):
            self.m.d.sync += self.total_invalid.eq((self.total_invalid & ~first) | invalid)
        self.latency = total.time
        self.m.d.comb += self.total.eq(total.value)

    def accumulate(self, chunk: list[Operand]) -> Staged:
        """The running sum, in the chunk's pieces; each has its own clock of `first` and `enable`."""
        # `reset` keeps these two out of shift-register LUTs, whose slow output would start the longest path.
        first, enable = Staged(self.first, reset=True), Staged(self.enable, reset=True)
        carry: Operand = Staged(Const(0, 1), chunk[0].time)
        pieces: list[Operand] = []
        for i, operand in enumerate(chunk):
            value = self.pipe.at(operand, operand.time)
            running = Signal(len(value) + 1, name=f"running{i}", reset_less=True)
            before = Mux(self.pipe.at(first, operand.time), 0, running[: len(value)])
            with self.m.If(self.pipe.at(enable, operand.time)):
                self.m.d.sync += running.eq(carry_add(value, before, self.pipe.at(carry, operand.time)))
            whole = Staged(running, operand.time + 1)
            carry = whole.part(len(value), len(value) + 1)
            pieces.append(whole.part(0, len(value)))
        return self.pipe.join(pieces)


class ToFloat(Leaf):
    """Ports: total In, signed; invalid In; result Out: float32 bits of total * 2^(bias + offset) / divisor.

    bias In, signed: held while totals are in flight.
    """

    def __init__(self, design: Design):
        self.module_name = f"{design.prefix}_to_float"
        super().__init__(
            {
                "total": In(signed(design.total_bits)),
                "bias": In(signed(COMMAND_BITS.bias)),
                "invalid": In(1),
                "result": Out(32),
            }
        )
        self.pipe = pipe = Pipeline(self.m)
        total = Staged(self.total)
        sign = pipe.stage("sign", lambda t: t[-1], total)
        width = len(self.total)
        flipped = Staged(self.total.as_unsigned() ^ self.total[-1].replicate(width))
        one = Staged(Cat(self.total[-1], Const(0, width - 1)))
        fraction = pipe.join(pipe.add_pieces("magnitude", pipe.split(flipped, width), pipe.split(one, width)))
        # Where the leading one stands, most significant bit first; `zeros` counts the places shifted.
        zeros = []
        for power in reversed(range((width - 1).bit_length())):
            places = 1 << power
            empty = pipe.stage("empty", lambda v, n=places: ~v[-n:].any(), fraction)
            fraction = pipe.stage("normal", lambda v, e, n=places: Mux(e, v << n, v)[: len(v)], fraction, empty)
            zeros.append(empty)
        lead = pipe.stage("zeros", lambda *z: Cat(reversed(z)), *zeros)
        fraction = pipe.stage("fraction", lambda v: _top(v, FRACTION_BITS), fraction)
        zero = pipe.stage("zero", lambda v: ~v[-1], fraction)
        for shift in reciprocal_shifts(design.divisor_bits):
            fraction = pipe.stage("divided", lambda v, n=shift: (v + (v >> n))[: FRACTION_BITS + 1], fraction)
        carry = pipe.stage("carry", lambda v: v[FRACTION_BITS:].any(), fraction)
        normal = pipe.stage("renormal", lambda v: Mux(v[FRACTION_BITS:].any(), v >> 1, v)[:FRACTION_BITS], fraction)
        drop = FRACTION_BITS - 24
        rounded = pipe.stage("rounded", lambda v: (v + (1 << (drop - 1))) >> drop, normal)  # 24 bits, or 2^24
        constant = width - 1 + 127 + design.exponent_offset - (design.divisor_bits if design.divisor_bits > 1 else 0)
        unbiased = pipe.stage("unbiased", lambda z: Const(constant, signed(12)) - z, lead)
        scale = pipe.stage("scale", lambda u: self.bias + u, unbiased)
        exponent = pipe.stage("exponent", lambda s, c, r: s + c + r[24], scale, carry, rounded)
        result = pipe.stage("result_word", _pack, sign, exponent, rounded, zero, Staged(self.invalid))
        self.latency = result.time
        self.m.d.comb += self.result.eq(result.value)


def _top(value: Value, bits: int) -> Value:
    """The leading bits of a value, zeros below if it is shorter."""
    return value[-bits:] if len(value) >= bits else Cat(Const(0, bits - len(value)), value)


def _pack(sign: Value, exponent: Value, rounded: Value, zero: Value, invalid: Value) -> Value:
    """float32 bits: subnormal results become zero, results past the range infinity, an invalid operand NaN."""
    number = Cat(rounded[:23], exponent[:8])
    finite = Mux(zero | (exponent < 1), 0, Mux(exponent > 254, INFINITY, number))
    return Mux(invalid, NAN, Cat(finite[:31], sign))
