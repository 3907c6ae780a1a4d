"""Products with the block code's weights on a CPU, without the weight in memory, or with a tile of it for many tokens.

Sixteen neighbouring blocks of a row are 16 lanes. A register's bit string is linear over GF(2) in its seed: each of its words
is the exclusive or of what the seed's four-bit digits add to it, four looks into tables of 16 words that lie in a register.
Weight c of every block then is a shift of that string, states by pairs times pairs of coefficients, and a product with the
activation. Nothing is gathered from memory.

The inputs are arranged to fit, [groups of 16 blocks, C, 16]: the column (16 group + lane) * C + c stands at [group, c, lane],
and zeros past the end. A tile has its columns in that order too, so that it is written without shuffling.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from seedlm.codes.block.kernels.lanes import DIGIT, string_words
from seedlm.codes.compiled import to_machine_code
from seedlm.codes.processor import features
from seedlm.codes.vectors import (
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    as_pointer,
    call,
    constant,
    in_parts,
    inner,
    intrinsic,
    job_address,
    literal,
    load,
    put,
    scratch,
    shuffle,
    store,
    take,
    write_bfloat16,
)


def _look_up(builder, table: ir.Value, table_address: ir.Value, index: ir.Value) -> ir.Value:
    """Entries of 16 words by the lowest four bits of each lane."""
    if "avx512f" in features():
        return call(builder, "llvm.x86.avx512.permvar.si.512", INTS, table, index)
    if "avx2" in features():
        part, halves = ir.VectorType(I32, 8), []
        for first in (0, 8):
            some = shuffle(builder, index, range(first, first + 8))
            low, high = (
                call(builder, "llvm.x86.avx2.permd", part, shuffle(builder, table, range(half, half + 8)), some)
                for half in (0, 8)
            )
            upper = builder.icmp_signed("!=", builder.and_(some, constant([8] * 8)), constant([0] * 8))
            halves.append(builder.select(upper, high, low))
        return shuffle(builder, halves[0], range(LANES), halves[1])
    found: Any = ir.Constant(INTS, ir.Undefined)
    index = builder.and_(index, constant([15] * LANES))
    for lane in range(LANES):
        at = builder.zext(builder.extract_element(index, ir.Constant(I32, lane)), I64)
        word = load(builder, builder.add(table_address, builder.mul(at, ir.Constant(I64, 4))), I32)
        found = builder.insert_element(found, word, ir.Constant(I32, lane))
    return found


def _multiply_pairs(builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products of the two int16 of each lane, added."""
    halves = ir.VectorType(I16, 2 * LANES)
    for feature, name, lanes in (
        ("avx512bw", "avx512.pmaddw.d.512", 16),
        ("avx2", "avx2.pmadd.wd", 8),
        ("sse2", "sse2.pmadd.wd", 4),
    ):
        if feature in features():
            a, b = builder.bitcast(a, halves), builder.bitcast(b, halves)
            return in_parts(builder, f"llvm.x86.{name}", ir.VectorType(I32, lanes), a, b)
    sixteen = constant([16] * LANES)
    low = builder.mul(*(builder.ashr(builder.shl(x, sixteen), sixteen) for x in (a, b)))
    return builder.add(low, builder.mul(*(builder.ashr(x, sixteen) for x in (a, b))))


class _Blocks:
    """Emits the weights of 16 blocks: `load` them, then integers `weight` by `weight`, times `scale`."""

    def __init__(self, seed_bits: int, size: int, coefficients: int, coefficient_bits: int, exponent_bits: int) -> None:
        self.seed_bits, self.size, self.coefficients = seed_bits, size, coefficients
        self.coefficient_bits, self.exponent_bits = coefficient_bits, exponent_bits
        self.bits = seed_bits + exponent_bits + coefficients * coefficient_bits
        self.words = self.bits // 2
        self.loaded = LANES if self.words <= LANES else 2 * LANES

    def start(self, builder, scales: ir.Value, tables: ir.Value) -> None:
        """Keep the addresses of float32 [16] and of `tables`."""
        self._scales, self._tables = scales, tables

    def load(self, builder, address: ir.Value) -> None:
        own = load(builder, address, INTS)
        more = load(builder, address, INTS, 4 * LANES) if self.loaded > LANES else None
        begins = [lane * self.bits for lane in range(LANES)]
        parts = [shuffle(builder, own, [min((b >> 5) + n, self.words - 1) for b in begins], more) for n in range(3)]
        shifts = [b & 31 for b in begins]
        self._low = self._cut(builder, parts[1], parts[0], shifts)
        self._high = self._cut(builder, parts[2], parts[1], shifts) if self.bits > 32 else constant([0] * LANES)
        seeds = self._low
        digits = -(-self.seed_bits // DIGIT)
        if self.seed_bits < DIGIT * digits:
            seeds = builder.and_(seeds, constant([(1 << self.seed_bits) - 1] * LANES))
        self._string = []
        for word in range(string_words(self.seed_bits, self.size, self.coefficients)):
            found = None
            for digit in range(digits):
                place = 64 * (word * digits + digit)
                index = builder.lshr(seeds, constant([DIGIT * digit] * LANES))
                table = load(builder, self._tables, INTS, place)
                image = _look_up(builder, table, builder.add(self._tables, ir.Constant(I64, place)), index)
                found = image if found is None else builder.xor(found, image)
            self._string.append(found)
        exponents = self._field(builder, self.seed_bits)
        exponents = builder.and_(exponents, constant([(1 << self.exponent_bits) - 1] * LANES))
        scales = _look_up(builder, load(builder, self._scales, INTS), self._scales, exponents)
        self.scale = builder.bitcast(scales, FLOATS)
        self._pairs = []
        for p in range(0, self.coefficients, 2):
            low = builder.and_(self._signed(builder, p), constant([0xFFFF] * LANES))
            if p + 1 < self.coefficients:
                low = builder.or_(low, builder.shl(self._signed(builder, p + 1), constant([16] * LANES)))
            self._pairs.append(low)

    def weight(self, builder, c: int) -> ir.Value:
        """The integer sums of weight c of each block, as float32."""
        first = c * self.coefficients
        word, shift = first >> 5, first & 31
        window = self._string[word]
        if shift + self.seed_bits + self.coefficients - 1 > 32:
            window = self._funnel(builder, self._string[word + 1], window, constant([shift] * LANES))
        elif shift:
            window = builder.lshr(window, constant([shift] * LANES))
        mask, total = (1 << self.seed_bits) - 1, None
        for n, pair in enumerate(self._pairs):
            some = builder.lshr(window, constant([2 * n] * LANES)) if n else window
            low = builder.and_(some, constant([mask] * LANES))
            high = builder.and_(builder.shl(some, constant([15] * LANES)), constant([mask << 16] * LANES))
            states = builder.bitcast(builder.or_(low, high), ir.VectorType(I16, 2 * LANES))
            centred = builder.sub(states, constant([1 << self.seed_bits - 1] * 2 * LANES, I16))
            product = _multiply_pairs(builder, builder.bitcast(centred, INTS), pair)
            total = product if total is None else builder.add(total, product)
        return builder.sitofp(total, FLOATS)

    def _cut(self, builder, high: ir.Value, low: ir.Value, shifts: list[int]) -> ir.Value:
        """32 bits from each lane's own place on. LLVM 15 makes something else of funnels where only some lanes stay."""
        if not any(shifts):
            return low
        moved = self._funnel(builder, high, low, constant([shift or 16 for shift in shifts]))
        return shuffle(builder, moved, [lane if shift else LANES + lane for lane, shift in enumerate(shifts)], low)

    def _funnel(self, builder, high: ir.Value, low: ir.Value, shifts: ir.Value) -> ir.Value:
        return call(builder, f"llvm.fshr.v{LANES}i32", INTS, high, low, shifts)

    def _field(self, builder, at: int) -> ir.Value:
        """The code's bits from `at` on."""
        if at >= 32:
            return builder.lshr(self._high, constant([at - 32] * LANES))
        return self._funnel(builder, self._high, self._low, constant([at] * LANES)) if at else self._low

    def _signed(self, builder, p: int) -> ir.Value:
        """Coefficient p, sign extended."""
        up = constant([32 - self.coefficient_bits] * LANES)
        at = self.seed_bits + self.exponent_bits + p * self.coefficient_bits
        return builder.ashr(builder.shl(self._field(builder, at), up), up)


def _loop(builder, blocks: _Blocks, words, count, end, tail):
    """Loop over groups, which from `end` on lie at `tail`; yields the loop with blocks loaded."""
    size = ir.Constant(I64, 4 * blocks.words)

    def place(index):
        there = builder.add(tail, builder.mul(builder.sub(index, end), size))
        return builder.select(builder.icmp_signed(">=", index, end), there, builder.add(words, builder.mul(index, size)))

    return cgutils.for_range(builder, count), place


@intrinsic(prefer_literal=True)
def _multiply(typingctx, words, count, end, tail, x, stride, scales, tables, sums, k, c, p, q, e, tokens):
    """Write the products of a row with float32 [tokens, count, C, 16] at `x` to float32 [tokens] at `sums`.

    words       address of the row; groups from `end` on are read from `tail`
    stride      bytes from a token's inputs to the next one's
    """
    numbers = literal(k, c, p, q, e, tokens)

    def codegen(context, builder, sig, args):
        words, count, end, tail, x, stride, scales, tables, sums = args[:9]
        blocks, several = _Blocks(*numbers[:5]), numbers[5]
        blocks.start(builder, scales, tables)
        totals = [cgutils.alloca_once(builder, FLOATS) for _ in range(several)]
        for total in totals:
            builder.store(constant([0.0] * LANES, F32), total)
        loop, place = _loop(builder, blocks, words, count, end, tail)
        with loop as at:
            blocks.load(builder, place(at.index))
            inputs = [builder.add(x, builder.mul(stride, ir.Constant(I64, token))) for token in range(several)]
            inputs = [builder.add(each, builder.mul(at.index, ir.Constant(I64, 64 * blocks.size))) for each in inputs]
            found: list[Any] = [constant([0.0] * LANES, F32)] * several
            for n in range(blocks.size):
                weight = blocks.weight(builder, n)
                for token, each in enumerate(inputs):
                    found[token] = call(
                        builder, f"llvm.fmuladd.v{LANES}f32", FLOATS, weight, load(builder, each, FLOATS, 64 * n), found[token]
                    )
            for total, some in zip(totals, found, strict=True):
                sum = call(builder, f"llvm.fmuladd.v{LANES}f32", FLOATS, some, blocks.scale, builder.load(total))
                builder.store(sum, total)
        for token, total in enumerate(totals):
            sum = builder.load(total)
            for half in (8, 4, 2, 1):
                sum = builder.fadd(sum, shuffle(builder, sum, [lane ^ half for lane in range(LANES)]))
            store(builder, builder.extract_element(sum, ir.Constant(I32, 0)), sums, 4 * token)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, k, c, p, q, e, tokens), codegen


@intrinsic(prefer_literal=True)
def _form(typingctx, words, count, end, tail, scales, tables, y, k, c, p, q, e):
    """Write a row of weights to float32 [count, C, 16] at `y`. Arguments as for `_multiply`."""
    numbers = literal(k, c, p, q, e)

    def codegen(context, builder, sig, args):
        words, count, end, tail, scales, tables, y = args[:7]
        blocks = _Blocks(*numbers)
        blocks.start(builder, scales, tables)
        loop, place = _loop(builder, blocks, words, count, end, tail)
        with loop as at:
            blocks.load(builder, place(at.index))
            row = builder.add(y, builder.mul(at.index, ir.Constant(I64, 64 * blocks.size)))
            for n in range(blocks.size):
                store(builder, builder.fmul(blocks.weight(builder, n), blocks.scale), row, 64 * n)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7, k, c, p, q, e), codegen


def product(k: int, c: int, p: int, q: int, e: int, tokens: int) -> Any:
    """Multiplies so many tokens by rows of a weight; 0 tokens: forms the rows. q, e: bits of a coefficient and of an exponent.

    Its job: pieces, rows, words of a row, groups, addresses of words, scales float32 [16], tables, bias or 0, x, y, y's kind
    (`on_cpu.KINDS`). x is float32 [tokens, groups, C, 16], y [tokens, rows]. For 0 tokens y is [rows, groups, C, 16], and x
    float32 [pieces, groups, C, 16] to work in.
    """
    words_of_group = (k + e + p * q) // 2
    loaded = LANES if words_of_group <= LANES else 2 * LANES

    @to_machine_code()
    def multiply(job):
        pieces, rows, length, count, words = job[1], job[2], job[3], job[4], job[5]
        scales, tables, bias, x, y, kind = job[6], job[7], job[8], job[9], job[10], job[11]
        stride = 64 * c * count
        end = max(0, min(count, (length - loaded) // words_of_group + 1)) if length >= loaded else 0
        left = length - words_of_group * end
        tail, place = scratch(1024), scratch(64)
        ends, sums = carray(as_pointer(tail), (256,), np.int32), carray(as_pointer(place), (16,), np.float32)
        for i in range(256):
            ends[i] = 0
        while True:
            piece = take(job_address(job))
            if piece >= pieces:
                break
            for row in range(rows * piece // pieces, rows * (piece + 1) // pieces):
                at = words + 4 * length * row
                last = carray(as_pointer(at + 4 * words_of_group * end), (left,), np.int32)
                for i in range(left):
                    ends[i] = last[i]
                if tokens:
                    _multiply(at, count, end, tail, x, stride, scales, tables, place, k, c, p, q, e, tokens)
                    for token in range(tokens):
                        put(y, kind, rows * token + row, sums[token], bias, row)
                elif kind == 0:
                    _form(at, count, end, tail, scales, tables, y + stride * row, k, c, p, q, e)
                else:
                    _form(at, count, end, tail, scales, tables, x + stride * piece, k, c, p, q, e)
                    write_bfloat16(x + stride * piece, y + stride // 2 * row, stride // 4, np.float32(1))

    return multiply


@inner
def _fill(made, given, up):
    """Arrange a token's elements, as bits that go `up` where bfloat16 becomes float32."""
    count, c, lanes = made.shape
    whole = len(given) // (c * lanes)
    for group in range(whole):
        for lane in range(lanes):
            first = (group * lanes + lane) * c
            for i in range(c):
                made[group, i, lane] = np.uint32(given[first + i]) << up
    for group in range(whole, count):
        for lane in range(lanes):
            for i in range(c):
                at = (group * lanes + lane) * c + i
                made[group, i, lane] = np.uint32(given[at]) << up if at < len(given) else np.uint32(0)


def arrangement() -> Any:
    """Arranges inputs for `product`.

    Its job: tokens, x [tokens, width], its kind, width, groups, C, y [tokens, groups, C, 16], its kind: that of x, or float32.
    """

    @to_machine_code()
    def arrange(job):
        tokens, x, kind, width, count, c, y, y_kind = job[1], job[2], job[3], job[4], job[5], job[6], job[7], job[8]
        length = 16 * c * count
        while True:
            token = take(job_address(job))
            if token >= tokens:
                break
            if y_kind:
                halves = carray(as_pointer(y + 2 * length * token), (count, c, 16), np.uint16)
                _fill(halves, carray(as_pointer(x + 2 * width * token), (width,), np.uint16), np.uint32(0))
                continue
            words = carray(as_pointer(y + 4 * length * token), (count, c, 16), np.uint32)
            if kind:
                _fill(words, carray(as_pointer(x + 2 * width * token), (width,), np.uint16), np.uint32(16))
            else:
                _fill(words, carray(as_pointer(x + 4 * width * token), (width,), np.uint32), np.uint32(0))

    return arrange
