"""The trellis code's products where registers have eight lanes (AVX2): lanes are words as they lie in memory.

`numba_windows` lays 16 // R columns word by word, for which AVX2 has no instruction (docs/log/products_cpu.md). Here lane n of
a step is its n-th word, that of column n // R, and nothing is moved. What a window reaches over into is the word after, which
is loaded 4 bytes on; a column's last word reaches into the next segment, whose words are loaded in these lanes alone. Registers
whose lanes hold the same words of their columns are a *phase*: one at 1, 2, 4 and 8 bits, three at 3 and 6, five and seven at
5 and 7.
"""

import itertools
from collections.abc import Sequence
from math import lcm
from typing import Final

from llvmlite import ir
from numba.core import cgutils

from seedlm.codes.processor import byte_products, features
from seedlm.codes.trellis.format import MULTIPLIERS
from seedlm.codes.trellis.kernels.numba_windows import TAIL, Products, Slot, add_group, slots
from seedlm.codes.trellis.kernels.records import INTEGERS, PADDED
from seedlm.codes.vectors import I8, I32, I64, call, constant, load, pointer, shuffle

LANES: Final = 8
INTS: Final = ir.VectorType(I32, LANES)

AHEAD: Final = 4096
"""Bytes from the words that are multiplied to those that are asked for."""

_ROOM: Final = 8
"""Registers for sums, of 16. Rows that have no room are left to another walk through the words."""


def in_lanes() -> bool:
    """Whether this multiplies, if `numba_pairs` does not."""
    return "avx2" in features() and byte_products() in ("vnni", "pairs")


def columns(rate: int) -> int:
    """Columns of a step: whole registers, two at least."""
    return max(2 * LANES, lcm(LANES, rate)) // rate


def emit(builder, args: Sequence[ir.Value], rate: int, state_bits: int, exact: bool, tokens: int) -> None:
    """As `numba_product._multiply`, whose arguments these are."""
    words, after, record, steps, stride, sums, end, tail = args
    products, found = Products(exact, LANES), slots(rate, state_bits)
    records = [builder.add(record, builder.mul(stride, ir.Constant(I64, token))) for token in range(tokens)]
    phases, registers = lcm(LANES, rate) // LANES, rate * columns(rate) // LANES
    passes = -(-len(found) // max(1, _ROOM // (products.parts * tokens)))
    edges = [len(found) * i // passes for i in range(passes + 1)]
    size, integer = columns(rate), 1 if products.narrow else 2
    over_columns: dict[tuple[int, int], ir.Value] = {}
    for phase, (first, last) in itertools.product(range(phases), itertools.pairwise(edges)):
        some = found[first:last]
        totals = [[[cgutils.alloca_once(builder, INTS) for _ in range(products.parts)] for _ in records] for _ in some]
        for total in itertools.chain(*itertools.chain(*totals)):
            builder.store(constant([0] * LANES), total)
        with cgutils.for_range(builder, steps) as loop:
            step = _Step(builder, words, after, loop.index, end, tail, rate)
            if not phase and not first:
                step.ask_ahead()
            column = builder.add(builder.mul(loop.index, ir.Constant(I64, integer * size)), ir.Constant(I64, INTEGERS))
            places = [builder.add(place, column) for place in records]
            for register in range(phase, registers, phases):
                lanes = [(LANES * register + lane) // rate for lane in range(LANES)]
                given = [
                    products.activations(
                        builder,
                        builder.add(place, ir.Constant(I64, integer * lanes[0])),
                        [lane - lanes[0] for lane in lanes],
                        PADDED,
                    )
                    for place in places
                ]
                windows = _Windows(builder, *step.words(register), phase, rate, state_bits)
                for slot, of_slot in zip(some, totals, strict=True):
                    mixed = products.bytes(builder, windows.mixed(slot))
                    for of_token, activations in zip(of_slot, given, strict=True):
                        for total, activation in zip(of_token, activations, strict=True):
                            builder.store(products.add(builder, builder.load(total), mixed, activation), total)
        for (n, of_slot), token in itertools.product(enumerate(totals, first), range(tokens)):
            whole = products.whole(builder, [builder.load(part) for part in of_slot[token]])
            of_words = _of_words(builder, whole, phase, rate)
            if phase:
                of_words = builder.add(of_words, over_columns[token, n])
            over_columns[token, n] = of_words
    for token, place in enumerate(records):
        of_token = [over_columns[token, n] for n in range(len(found))]
        add_group(builder, of_token, place, sums, token * len(found))


class _Step:
    """The words of a step. Arguments as in `numba_windows.Windows.load_step`."""

    def __init__(self, builder, words, after, step, end, tail, rate: int) -> None:
        self._builder, self._rate = builder, rate
        at = builder.mul(step, ir.Constant(I64, 4 * rate * columns(rate)))
        ends = builder.icmp_signed("==", step, end)
        others = builder.add(tail, ir.Constant(I64, 4 * TAIL))
        self._own = builder.select(ends, tail, builder.add(words, at))
        self._ahead = builder.add(after, at)
        self._others = builder.select(ends, others, self._ahead)

    def ask_ahead(self) -> None:
        for first in range(0, 4 * self._rate * columns(self._rate), 64):
            place = pointer(self._builder, self._ahead, I8, AHEAD + first)
            call(self._builder, "llvm.prefetch.p0", ir.VoidType(), place, *(ir.Constant(I32, each) for each in (0, 3, 1)))

    def words(self, register: int) -> tuple[ir.Value, ir.Value]:
        """Of a register's lanes, and those that follow."""
        at, last = 4 * LANES * register, self._rate - 1
        own = load(self._builder, self._own, INTS, at)
        if not last:
            return own, load(self._builder, self._others, INTS, at)
        following = load(self._builder, self._own, INTS, at + 4)
        mask = constant([(LANES * register + lane) % self._rate == last for lane in range(LANES)], ir.IntType(1))
        place = pointer(self._builder, self._others, INTS, at - 4 * last)
        return own, call(self._builder, "llvm.masked.load.v8i32.p0", INTS, place, ir.Constant(I32, 1), mask, following)


class _Windows:
    """Windows of a register's lanes, slot by slot, in order."""

    def __init__(self, builder, low: ir.Value, high: ir.Value, phase: int, rate: int, state_bits: int) -> None:
        self._builder, self._low, self._high, self._state_bits = builder, low, high, state_bits
        self._words = [(LANES * phase + lane) % rate for lane in range(LANES)]
        self._base, self._shifted = 0, low

    def mixed(self, slot: Slot) -> ir.Value:
        """Products whose four bytes, less 510, are the weights; anything in lanes that have no row."""
        builder = self._builder
        if slot.base != self._base:
            self._base = slot.base
            up, down = (constant([bits] * LANES) for bits in (32 - slot.base, slot.base))
            self._shifted = builder.or_(builder.lshr(self._low, down), builder.shl(self._high, up))
        shifts = [min(slot.offsets[word] - slot.base, 31) for word in self._words]
        found = builder.lshr(self._shifted, constant(shifts)) if any(shifts) else self._shifted
        if min(shifts) < 32 - self._state_bits:
            found = builder.and_(found, constant([(1 << self._state_bits) - 1] * LANES))
        return builder.mul(found, constant([MULTIPLIERS[self._state_bits]] * LANES))


def _of_words(builder, total: ir.Value, phase: int, rate: int) -> ir.Value:
    """Add up the lanes that belong to the same word: int32 [R]."""
    words = [(LANES * phase + lane) % rate for lane in range(LANES)]
    lanes = [[lane for lane in range(LANES) if words[lane] == word] for word in range(rate)]
    nothing = constant([0] * LANES)
    found = None
    for n in range(max(map(len, lanes))):
        part = shuffle(builder, total, [of[n] if n < len(of) else LANES for of in lanes], nothing)
        found = part if found is None else builder.add(found, part)
    return found
