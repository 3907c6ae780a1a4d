"""What the trellis code's CPU kernels share: LLVM code for the windows of some columns, and for sums of bytes.

For one column, the R words of a segment are R lanes: lane k holds the windows of the rows whose own bits begin in word k. So 16
lanes are 16 // R columns at a time, each lane with the word that follows its own for what reaches over, and *slot* i of a lane
is its i-th row: a shift, a mask, the product that mixes, and one instruction that adds up its four bytes times something. Lanes
lie word by word, so that a slot's columns are neighbours.
"""

from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Final, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray

from seedlm.codes.processor import byte_products, features
from seedlm.codes.trellis.format import MULTIPLIERS, SEGMENT_ROWS
from seedlm.codes.vectors import (
    F32,
    I8,
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
    load,
    shuffle,
    splat,
    store,
)

TAIL: Final = 4 * LANES
"""Words of a step at most: of eight columns at 8 bits."""


class Slot(NamedTuple):
    """Rows that lanes hold at one time: row (32 k + offsets[k]) / R of word k, none where offsets[k] is 32 or more.

    base   where the 32 bits that its windows are shifted out of begin, from the start of a word
    """

    base: int
    offsets: tuple[int, ...]


@lru_cache(maxsize=32)
def slots(rate: int, state_bits: int) -> tuple[Slot, ...]:
    """All rows of a segment. Shifting words anew is put off until a window would not fit."""
    firsts = [-SEGMENT_ROWS * word % rate for word in range(rate)]
    found: list[Slot] = []
    base = 0
    for i in range(-(-SEGMENT_ROWS // rate)):
        offsets = tuple(first + rate * i for first in firsts)
        inside = [offset for offset in offsets if offset < 32]
        if max(inside) - base + state_bits > 32:
            base = min(inside)
        found.append(Slot(base, offsets))
    return tuple(found)


class Windows:
    """Emits the states of 16 // R columns, a slot at a time."""

    def __init__(self, rate: int, state_bits: int) -> None:
        self.rate, self.state_bits = rate, state_bits
        self.columns = LANES // rate
        self.slots = slots(rate, state_bits)
        self.word = [k for k in range(rate) for _ in range(self.columns)]
        self.word += [self.word[-1]] * (LANES - len(self.word))
        self.column = [*range(self.columns)] * rate
        self.column += [0] * (LANES - len(self.column))

    def load_step(self, builder, words: ir.Value, after: ir.Value, step: ir.Value, end: ir.Value, tail: ir.Value) -> None:
        """Take the words of 16 // R columns, the step-th ones.

        words, after   addresses of the first column in a segment and in the one that its windows reach over into
        end, tail      the step, or none, whose words are at `tail`, int32 [2, TAIL]: nothing is read past a weight's end
        """
        at = builder.mul(step, ir.Constant(I64, 4 * self.rate * self.columns))
        ends = builder.icmp_signed("==", step, end)
        places = ((words, tail), (after, builder.add(tail, ir.Constant(I64, 4 * TAIL))))
        own, others = (load(builder, builder.select(ends, last, builder.add(first, at)), INTS) for first, last in places)
        at = [column * self.rate + word for column, word in zip(self.column, self.word, strict=True)]
        following = [i + 1 if word + 1 < self.rate else LANES + i - word for i, word in zip(at, self.word, strict=True)]
        self._low, self._high = shuffle(builder, own, at, others), shuffle(builder, own, following, others)
        self._base, self._shifted = 0, self._low

    def states(self, builder, slot: Slot) -> ir.Value:
        if slot.base != self._base:
            self._base = slot.base
            up, down = (constant([bits] * LANES) for bits in (32 - slot.base, slot.base))
            if features() & {"avx512vbmi2"}:
                self._shifted = call(builder, "llvm.fshr.v16i32", INTS, self._high, self._low, down)
            else:
                self._shifted = builder.or_(builder.lshr(self._low, down), builder.shl(self._high, up))
        shifts = [min(slot.offsets[word] - slot.base, 31) for word in self.word]
        found = builder.lshr(self._shifted, constant(shifts)) if any(shifts) else self._shifted
        if min(shifts) < 32 - self.state_bits:
            found = builder.and_(found, constant([(1 << self.state_bits) - 1] * LANES))
        return found

    def over_columns(self, builder, total: ir.Value) -> ir.Value:
        """Add up what belongs to the same word: R of 16 lanes."""
        parts = [shuffle(builder, total, range(i, self.rate * self.columns, self.columns)) for i in range(self.columns)]
        return reduce(builder.add, parts)

    def mixed(self, builder, slot: Slot) -> ir.Value:
        """Products whose four bytes, less 510, are the weights."""
        return builder.mul(self.states(builder, slot), constant([MULTIPLIERS[self.state_bits]] * LANES))


class Products:
    """Emits sums of bytes times activations.

    lanes   of vectors
    parts   accumulators of a slot: 2 if activations are two int8, else 1
    excess  what a weight's four bytes are too large by
    """

    def __init__(self, exact: bool, lanes: int = LANES) -> None:
        self.way, self.lanes = byte_products(), lanes
        self.narrow = self.way in ("vnni512", "vnni", "dot")
        self.integer = I8 if self.narrow else I16
        self.parts = 2 if exact and self.narrow else 1
        self.excess = -2 if self.way == "dot" else 510
        self.room = 16 if self.way == "vnni512" else 4

    def activations(self, builder, address: ir.Value, columns: Sequence[int], distance: int) -> list[ir.Value]:
        """Each lane's activation, from the address of the first column's integer.

        columns    of the lanes
        distance   bytes from the first part of an activation to the second
        """
        if not self.narrow:
            some = load(builder, address, ir.VectorType(I16, self.lanes))
            if self.way == "plain":
                return [builder.sext(shuffle(builder, some, columns), ir.VectorType(I32, self.lanes))]
            return [shuffle(builder, some, [column for column in columns for _ in range(2)])]
        of, places = ir.VectorType(I8, self.lanes), [column for column in columns for _ in range(4)]
        return [shuffle(builder, load(builder, address, of, part * distance), places) for part in range(self.parts)]

    def ones(self, builder) -> ir.Value:
        """The activation 1."""
        if self.way == "plain":
            return constant([1] * self.lanes)
        return constant([1] * 4 * self.lanes, I8) if self.narrow else constant([1] * 2 * self.lanes, I16)

    def bytes(self, builder, mixed: ir.Value) -> ir.Value:
        """What is done to a slot's bytes once for all activations."""
        if self.way == "dot":
            return builder.xor(mixed, constant([0x80808080] * self.lanes))
        if self.way == "pairs":
            width, name = (
                (64, "avx512.pmaddubs.w.512")
                if "avx512bw" in features() and self.lanes == LANES
                else ((32, "avx2.pmadd.ub.sw") if "avx2" in features() else (16, "ssse3.pmadd.ub.sw.128"))
            )
            ones = constant([1] * 4 * self.lanes, I8)
            part = ir.VectorType(I16, width // 2)
            return in_parts(builder, f"llvm.x86.{name}", part, builder.bitcast(mixed, ones.type), ones)
        if self.way == "plain":
            low = constant([0x00FF00FF] * self.lanes)
            pairs = builder.add(builder.and_(mixed, low), builder.and_(builder.lshr(mixed, constant([8] * self.lanes)), low))
            both = builder.add(pairs, builder.lshr(pairs, constant([16] * self.lanes)))
            return builder.and_(both, constant([0xFFFF] * self.lanes))
        return mixed

    def add(self, builder, total: ir.Value, found: ir.Value, activation: ir.Value) -> ir.Value:
        """Total plus the activation times the sum of what `bytes` made."""
        if self.way == "plain":
            return builder.add(total, builder.mul(found, activation))
        if self.way == "pairs":
            width, name = (
                (32, "avx512.pmaddw.d.512")
                if "avx512bw" in features() and self.lanes == LANES
                else ((16, "avx2.pmadd.wd") if "avx2" in features() else (8, "sse2.pmadd.wd"))
            )
            part = ir.VectorType(I32, width // 2)
            return builder.add(total, in_parts(builder, f"llvm.x86.{name}", part, found, activation))
        if self.way == "dot":
            bytes_, part, name = ir.VectorType(I8, 4 * self.lanes), ir.VectorType(I32, 4), "aarch64.neon.sdot.v4i32.v16i8"
            found = builder.bitcast(found, bytes_)
        else:
            activation = builder.bitcast(activation, total.type)
            lanes = 16 if self.way == "vnni512" and self.lanes == LANES else 8
            part, name = ir.VectorType(I32, lanes), f"x86.avx512.vpdpbusd.{32 * lanes}"
        return in_parts(builder, f"llvm.{name}", part, total, found, activation)

    def whole(self, builder, parts: Sequence[ir.Value]) -> ir.Value:
        """A total of its parts."""
        return parts[0] if len(parts) == 1 else builder.add(builder.shl(parts[0], constant([8] * self.lanes)), parts[1])


def add_group(builder, totals: Sequence[ir.Value], record: ir.Value, sums: ir.Value, first: int) -> None:
    """Add a group's exact sums, int32 vectors, times its scale to the float32 at `sums` that come after `first` such vectors.

    record   its scale, and an integer that every sum is too small by
    """
    scale, offset = load(builder, record, F32), load(builder, record, I32, 4)
    for n, total in enumerate(totals, first):
        lanes = total.type.count
        whole = builder.add(total, splat(builder, offset, lanes))
        product = builder.fmul(builder.sitofp(whole, ir.VectorType(F32, lanes)), splat(builder, scale, lanes))
        so_far = load(builder, sums, product.type, 4 * lanes * n)
        store(builder, builder.fadd(so_far, product), sums, 4 * lanes * n)


@inner
def neighbours(words, segment, strip, total, bytes_of_row):
    """Addresses of a segment's words and of those that its windows reach into: after a strip's last come its first."""
    start = segment // strip * strip
    following = start + (segment - start + 1) % min(strip, total - start)
    return words + segment * bytes_of_row, words + following * bytes_of_row


@inner
def copy_end(own, after, at, count, tail):
    """The last words of a row of words and of its neighbour, to int32 [2, TAIL] at `tail` (`Windows.load_step`)."""
    ends = carray(as_pointer(tail), (2 * TAIL,), np.int32)
    last, others = carray(as_pointer(own + at), (count,), np.int32), carray(as_pointer(after + at), (count,), np.int32)
    for i in range(count):
        ends[i], ends[TAIL + i] = last[i], others[i]
