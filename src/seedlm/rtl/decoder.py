"""One block code in, its C integer sums out, every clock.

`codec.dequantize` defines the sum of weight c as S_c = sum over p of q_p * (V[c,p] - center). The states V are K-bit windows of
one bit stream d (seed bits first), each window one bit further. So S_c is a sum over the K + P - 1 stream bits from
d[c*P + 1] on, where bit j counts g_j = sum over p of q_p * 2^(j - p), p such that 0 <= j - p < K:

    low edge     j < P - 1         not yet in all P windows
    middle       P - 1 <= j < K    g_j = G * 2^(j - P + 1) with one G for the block
    high edge    the rest          no longer in all windows; takes the constant -center * sum(q) along

Windows of neighbouring weights lie P bits apart, so the middle is a number in base 2^P whose digits they share: G * digit is
made once for each digit, then pairs of digits, then pairs of pairs. Two bits of an edge choose one of four sums made once
for the block. At the 4-bit preset that is 100 bits of addition a weight and no multiplier.
"""

from collections.abc import Iterable

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Value, signed
from amaranth.lib.wiring import In, Out

from seedlm.codes.block import lfsr
from seedlm.codes.block.format import BlockFormat
from seedlm.rtl.design import signed_bits
from seedlm.rtl.parts import Leaf, Part
from seedlm.rtl.pipeline import Pipeline, Staged, StagedPart, shape_of


def stream_masks(format: BlockFormat) -> list[int]:
    """For each bit of a block's stream, the seed bits whose XOR it is: K + C * P masks, the seed's own bits first.

    Stream bit K - 1 + n is the top bit of the state n steps on, so its mask is that row of `lfsr.advance_matrix`.
    """
    bits = format.seed_bits
    masks = [1 << i for i in range(bits)]
    for steps in range(1, format.block_size * format.num_coefficients + 1):
        columns = lfsr.advance_matrix(steps, bits)
        masks.append(sum((column >> (bits - 1) & 1) << i for i, column in enumerate(columns)))
    return masks


def stream_of(seed: Value, format: BlockFormat) -> Value:
    """The stream that a seed starts: every bit an XOR of seed bits, all at once."""
    return Cat(Cat(seed[i] for i in range(format.seed_bits) if mask >> i & 1).xor() for mask in stream_masks(format))


class StreamNetwork(Part):
    """The XOR network on its own: seed in, stream out, no clock. For the exhaustive test."""

    def __init__(self, format: BlockFormat):
        self.format = format
        length = format.seed_bits + format.block_size * format.num_coefficients
        super().__init__({"seed": In(format.seed_bits), "stream": Out(length)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.stream.eq(stream_of(self.seed, self.format))
        return m


class Decoder(Leaf):
    """Ports: code In(block_bits); sums Out, C signed fields of `sum_bits`; exponent Out, the stored field less its minimum."""

    module_name = "seedlm_decoder"

    def __init__(self, format: BlockFormat):
        self.format = f = format
        self.sum_bits = signed_bits(f.num_coefficients * -f.coefficient_range[0] * f.divisor)
        super().__init__(
            {"code": In(f.block_bits), "sums": Out(f.block_size * self.sum_bits), "exponent": Out(f.exponent_bits)}
        )
        self.pipe = Pipeline(self.m)
        self.window = f.seed_bits + f.num_coefficients - 1
        self.first_middle = f.num_coefficients - 1
        self.digits = max(0, (f.seed_bits - self.first_middle) // f.num_coefficients)
        if self.first_middle + self.digits * f.num_coefficients == self.window:
            self.digits -= 1  # the constant needs a high edge
        self.first_high = self.first_middle + self.digits * f.num_coefficients

        seed, exponent, coefficients = self.fields(self.code)
        self.stream = self.pipe.stage("stream", lambda s: stream_of(s, f), Staged(seed))
        self.coefficients = [Staged(q) for q in coefficients]
        self.multiples = self.multiples_of_g() if self.digits else []
        self.nodes: dict[tuple[int, int], tuple[Staged, int, int]] = {}
        sums = self.sums_of_weights()
        self.latency = max(s.time for s in sums)
        self.m.d.comb += self.sums.eq(Cat(self.pipe.at(s, self.latency)[: self.sum_bits] for s in sums))
        self.m.d.comb += self.exponent.eq(self.pipe.at(Staged(exponent), self.latency))

    def sums_of_weights(self) -> list[Staged]:
        """S_c for every c: middle and high edge, then the low edge's bits."""
        f = self.format
        low = [self.table(j, min(j + 2, self.first_middle), 0) for j in range(0, self.first_middle, 2)]
        unit = self.first_high - self.first_middle
        high = [
            self.table(j, min(j + 2, self.window), unit, j == self.first_high) for j in range(self.first_high, self.window, 2)
        ]
        shape = signed(self.sum_bits)  # S_c fits, and all that still follows are additions: what wraps on the way wraps back
        sums = []
        for c in range(f.block_size):
            total = self.edge("high", c, high)
            if self.digits:
                middle, _, _ = self.node(c + 1, self.digits)
                total = self.pipe.stage("upper", lambda a, b: _add_above(a, b, unit), middle, total, shape=shape)
            for start, stop, values in low:
                total = self.choose("sum", total, self.bits(c, start, stop), values, shape=shape)
            sums.append(total)
        return sums

    def fields(self, code: Value) -> tuple[Value, Value, list[Value]]:
        """Seed, exponent less its minimum (the top bit flipped), and coefficients of a code, as `packing` lays them."""
        f = self.format
        start = f.seed_bits + f.exponent_bits
        exponent = code[f.seed_bits : start] ^ (1 << (f.exponent_bits - 1))
        width = f.coefficient_bits
        return (
            code[: f.seed_bits],
            exponent,
            [code[start + p * width : start + (p + 1) * width].as_signed() for p in range(f.num_coefficients)],
        )

    def bits(self, c: int, start: int, stop: int) -> StagedPart:
        """Bits start .. stop - 1 of weight c's stretch of the stream."""
        first = c * self.format.num_coefficients + 1
        return self.stream.part(first + start, first + stop)

    def weight(self, q: tuple[Value, ...], j: int, unit: int) -> Value:
        """g_j / 2^unit from the coefficients."""
        f = self.format
        return _sum(q[p].shift_left(j - p - unit) for p in range(f.num_coefficients) if 0 <= j - p < f.seed_bits)

    def multiples_of_g(self) -> list[Staged]:
        """G, 2G and 3G: what two bits of a digit choose from."""
        g = self.pipe.stage("g", lambda *q: self.weight(q, self.first_middle, 0), *self.coefficients, shape=self.g_shape(1))
        pipe = self.pipe
        return [
            g,
            pipe.stage("g2", lambda a: a << 1, g, shape=self.g_shape(2)),
            pipe.stage("g3", lambda a: a + (a << 1), g, shape=self.g_shape(3)),
        ]

    def g_shape(self, times: int) -> Shape:
        low, high = (bound * ((1 << self.format.num_coefficients) - 1) * times for bound in self.format.coefficient_range)
        return shape_of(low, high)

    def table(self, start: int, stop: int, unit: int, constant: bool = False) -> tuple[int, int, list[Staged]]:
        """What stream bits start .. stop - 1 (two, or one) choose from, in units of 2^unit: [constant,] first, second, both."""
        f, pipe = self.format, self.pipe
        name = f"edge{start}"
        values = [pipe.stage(name, lambda *q, j=j: self.weight(q, j, unit), *self.coefficients) for j in range(start, stop)]
        if len(values) == 2:
            values.append(pipe.stage(name, lambda a, b: a + b, *values))
        if not constant:
            return start, stop, values
        offset = pipe.stage("offset", lambda *q: -_sum(q).shift_left(f.seed_bits - 1 - unit), *self.coefficients)
        return start, stop, [offset, *(pipe.stage(name, lambda a, b: a + b, v, offset) for v in values)]

    def edge(self, name: str, c: int, tables: list[tuple[int, int, list[Staged]]]) -> Staged:
        """The sum of an edge's choices for weight c; the first table carries the constant."""
        (start, stop, values), *others = tables
        room = self.sum_bits - (self.first_high - self.first_middle)
        total = self.pipe.stage(name, lambda s, *v: _pick(s, v), self.bits(c, start, stop), *values, shape=signed(room))
        for start, stop, values in others:
            total = self.choose(name, total, self.bits(c, start, stop), values, shape=signed(room))
        return total

    def choose(self, name: str, total: Staged, select: StagedPart, values: list[Staged], shape: Shape | None = None) -> Staged:
        """Adds the choice to `total`; it folds into the adder's LUT (`_add_choice`)."""
        return self.pipe.stage(
            name, lambda t, s, *v: _add_choice(t, _pick(s, (Const(0), *v)), 0), total, select, *values, shape=shape
        )

    def node(self, first: int, count: int) -> tuple[Staged, int, int]:
        """G times the number that `count` digits from digit `first` on make, with its range. Made once for all weights."""
        key = first, count
        if key not in self.nodes:
            self.nodes[key] = self.digit(first) if count == 1 else self.join(first, count)
        return self.nodes[key]

    def digit(self, n: int) -> tuple[Staged, int, int]:
        width = self.format.num_coefficients
        low, high = (bound * ((1 << width) - 1) ** 2 for bound in self.format.coefficient_range)
        digit = self.stream.part(n * width, (n + 1) * width)

        shape = shape_of(low, high)

        def product(bits: Value, *multiples: Value) -> Value:
            first, *others = (_pick(bits[i : i + 2], (Const(0), *multiples)) for i in range(0, width, 2))
            total = Cat(first, first[-1].replicate(shape.width - len(first))).as_signed()
            for row, choice in enumerate(others, 1):
                total = _add_choice(total, choice, 2 * row)
            return total

        return self.pipe.stage(f"digit{n}", product, digit, *self.multiples, shape=shape), low, high

    def join(self, first: int, count: int) -> tuple[Staged, int, int]:
        lower = 1 << (count - 1).bit_length() - 1
        shift = lower * self.format.num_coefficients
        a, a_low, a_high = self.node(first, lower)
        b, b_low, b_high = self.node(first + lower, count - lower)
        low, high = a_low + (b_low << shift), a_high + (b_high << shift)
        name = f"digits{first}_{first + count - 1}"
        return self.pipe.stage(name, lambda x, y: _add_above(x, y, shift), a, b, shape=shape_of(low, high)), low, high


def _pick(select: Value, values: tuple[Value, ...]) -> Value:
    """values[select] for one or two bits of select."""
    if len(select) == 1:
        return Mux(select[0], values[1], values[0])
    return Mux(select[1], Mux(select[0], values[3], values[2]), Mux(select[0], values[1], values[0]))


def _add_above(a: Value, b: Value, shift: int) -> Value:
    """Sum a + b * 2^shift; the low bits of `a` pass by the adder."""
    upper = (a >> shift) + b
    return Cat(a[:shift], upper).as_signed() if shift else upper


def _add_choice(total: Value, choice: Value, shift: int) -> Value:
    """Sum total + choice * 2^shift, no wider than total.

    The choice is extended to the other operand's width by hand: yosys feeds the narrower operand to the carry chain's own
    input, where it would need LUTs of its own. As the other one, its five inputs and one bit of the total make one LUT6.
    """
    upper = total[shift:].as_signed()
    extended = Cat(choice, choice[-1].replicate(max(0, len(upper) - len(choice))))[: len(upper)].as_signed()
    return Cat(total[:shift], (upper + extended)[: len(upper)]).as_signed()


def _sum(values: Iterable[Value]) -> Value:
    first, *others = values
    for value in others:
        first = first + value
    return first
