"""The multipliers of one block: its weights times its activations, summed and shifted to the common unit.

Two multipliers share one addition inside the DSP slices: the second one's operands pass one more register, and its slice adds
the first one's product. What is left for LUTs is a tree over half as many values and the shift.
"""

from amaranth.hdl import Cat, Const, Mux, Value, signed
from amaranth.lib.wiring import In, Out

from seedlm.rtl.design import HALF_BITS, MANTISSA_BITS, SHARED_BITS, Design
from seedlm.rtl.parts import Leaf
from seedlm.rtl.pipeline import Pipeline, Staged


class SeedLanes(Leaf):
    """Ports: sums, exponent In from `Decoder`; mantissas, shared In from `Activations`; term Out, signed; invalid Out: 0."""

    module_name = "seedlm_lanes"

    def __init__(self, design: Design, sum_bits: int, exponent_bits: int):
        size = design.block_size
        super().__init__(
            {
                "sums": In(size * sum_bits),
                "exponent": In(exponent_bits),
                "mantissas": In(size * MANTISSA_BITS),
                "shared": In(SHARED_BITS),
                "term": Out(signed(design.term_bits)),
                "invalid": Out(1),
            }
        )
        pipe = Pipeline(self.m)
        sums = [self.sums.word_select(c, sum_bits).as_signed() for c in range(size)]
        mantissas = [self.mantissas.word_select(c, MANTISSA_BITS).as_signed() for c in range(size)]
        total = pipe.sum("tree", [_pair(pipe, sums[c : c + 2], mantissas[c : c + 2]) for c in range(0, size, 2)])
        amount = pipe.stage("amount", lambda a, b: a + b, Staged(self.exponent), Staged(self.shared))
        term = pipe.shift_left("shifted", total, amount, design.max_shift)
        self.latency = term.time
        self.m.d.comb += [self.term.eq(term.value), self.invalid.eq(0)]


class HalfLanes(Leaf):
    """The reference's: FP16 weights. Every product has its own shift before the tree, the block's comes after.

    Ports: code In, C FP16 weights; mantissas, shared In; term Out, signed; invalid Out: a weight is Inf or NaN.
    """

    module_name = "fp16_lanes"

    def __init__(self, design: Design):
        size = design.block_size
        super().__init__(
            {
                "code": In(size * HALF_BITS),
                "mantissas": In(size * MANTISSA_BITS),
                "shared": In(SHARED_BITS),
                "term": Out(signed(design.term_bits)),
                "invalid": Out(1),
            }
        )
        pipe = Pipeline(self.m)
        weights = [Staged(self.code.word_select(c, HALF_BITS)) for c in range(size)]
        invalid = pipe.stage("invalid", lambda *w: Cat(x[10:15].all() for x in w).any(), *weights)
        products = []
        for c, weight in enumerate(weights):
            mantissa = Staged(self.mantissas.word_select(c, MANTISSA_BITS).as_signed())
            value = pipe.stage("weight", lambda w: _signed_significand(w), weight)
            exponent = pipe.stage("weight_shift", lambda w: Mux(w[10:15] == 0, 0, w[10:15] - 1)[:SHARED_BITS], weight)
            registered = pipe.stage("activation", lambda x: x, mantissa)
            multiplied = pipe.stage("multiplied", lambda a, b: a * b, value, registered)
            product = pipe.stage("product", lambda p: p, multiplied)
            products.append(pipe.shift_left("aligned", product, exponent, design.max_weight_shift))
        width = design.term_bits - (design.max_shift - design.max_weight_shift)
        total = pipe.join(pipe.sum_pieces("tree", [pipe.split(product, width) for product in products]))
        term = pipe.shift_left("shifted", total, Staged(self.shared), design.max_shift - design.max_weight_shift)
        self.latency = term.time
        self.m.d.comb += [self.term.eq(term.value), self.invalid.eq(pipe.at(invalid, self.latency))]


def _pair(pipe: Pipeline, weights: list[Value], activations: list[Value]) -> Staged:
    """w0 * x0 + w1 * x1 in two DSP slices (yosys packs every register of it); one product where there is no second."""
    w0, x0 = (pipe.stage(name, lambda v: v, Staged(v)) for name, v in (("w0", weights[0]), ("x0", activations[0])))
    first = pipe.stage("p0", lambda p: p, pipe.stage("m0", lambda a, b: a * b, w0, x0))
    if len(weights) == 1:
        return first
    w1, x1 = (
        pipe.stage(name, lambda v: v, pipe.stage(name, lambda v: v, Staged(v)))
        for name, v in (("w1", weights[1]), ("x1", activations[1]))
    )
    second = pipe.stage("m1", lambda a, b: a * b, w1, x1)
    return pipe.stage("pair", lambda a, b: a + b, second, first)


def _signed_significand(half: Value) -> Value:
    """The FP16 number's significand with its sign, signed 12 bits."""
    magnitude = Cat(half[:10], half[10:15].any(), Const(0, 1))
    return Mux(half[15], -magnitude, magnitude)[:12].as_signed()
