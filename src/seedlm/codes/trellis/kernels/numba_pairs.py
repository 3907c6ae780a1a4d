"""The trellis code's products where a processor has AVX-512 with VBMI and VNNI.

A lane of 32 bits is eight rows of a column, four lanes are a column, four columns a register. At 4 bits these are the words as
they lie in memory; at other rates bytes are permuted, those of the next segment that windows reach over into among them. One to
four such registers, which begin at different bytes of the rows' bits (`_sources`), hold all windows. Each is a shift and a mask
and waits for other units than products do; shuffles share one with these (docs/log/products_cpu.md). Then

    in pairs   `vdbpsadbw` adds up the bytes of a hash, in both halves of its lane. Half of that, and half of what another
               four columns left, are two int16, which `vpdpwssd` multiplies by a pair of activations and adds up. So a weight
               is formed once, and another token costs half an instruction for 16 weights.
    at once    int8 activations of one token or two: `vpdpbusd` multiplies the bytes and adds them up, for each token anew.

A *step* is two registers of columns, or four.
"""

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from seedlm.codes.trellis.format import MULTIPLIERS
from seedlm.codes.trellis.kernels.numba_windows import TAIL, add_group
from seedlm.codes.vectors import (
    BYTES,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    call,
    constant,
    load,
    pointer,
    shuffle,
)

COLUMNS: Final = 4
"""Of a register."""

ROWS: Final = 8
"""Of a lane."""

_ROOM: Final = 18
"""Registers for sums. Rows that have no room are left to another walk through the words."""

_AT_ONCE: Final = 2
"""Tokens whose int8 activations multiply a hash's bytes."""

_BY_BITS: Final = {3: (3, 7), 5: (1, 3, 5), 6: (1, 3, 5), 7: (1, 3, 5)}
"""By rate, of 16-bit states: rows whose windows `vpmultishiftqb` takes, an instruction instead of two. It waits for the units
that products wait for, so not all of them; where windows lie a byte apart a shuffle of bytes does as well.
"""

_AHEAD: Final = 4096
"""Bytes from the words that are multiplied to those that are asked for."""

_REGISTER: Final = 4 * LANES


def columns(rate: int) -> int:
    """Columns of a step: two registers, and 64 bytes at least."""
    return max(2 * COLUMNS, LANES // rate)


def activations() -> list[int]:
    """Which of 16 columns' int16 come first, second, ...: pair by pair."""
    pair = 2 * COLUMNS
    return [first + column + second for first in range(0, LANES, pair) for column in range(COLUMNS) for second in (0, COLUMNS)]


def rows() -> list[int]:
    """The row of a segment that each total of `emit` belongs to."""
    return [ROWS * lane + i for i in range(ROWS) for lane in range(LANES // COLUMNS)]


class _Source(NamedTuple):
    """Registers whose lanes begin at one byte of their rows' bits.

    rows   (0 to 7) whose windows they hold
    size   bytes of a lane that these need
    """

    byte: int
    rows: range
    size: int


@lru_cache(maxsize=32)
def _sources(rate: int, state_bits: int) -> list[_Source]:
    """The cheapest that hold all rows' windows."""

    def source(first: int, last: int) -> _Source | None:
        byte = rate * first // 8
        bits = rate * last - 8 * byte + state_bits
        return _Source(byte, range(first, last + 1), -(-bits // 8)) if bits <= 32 else None

    def cost(sources: Iterable[_Source]) -> int:
        """Shuffles: of two registers one."""
        each = [(1 if 4 * COLUMNS * rate <= _REGISTER else 2) * (1 + _reaches_over(rate, source)) for source in sources]
        return sum(max(1, registers - 1) for registers in each)

    def cuts(first: int) -> Iterable[list[_Source]]:
        if first == ROWS:
            yield []
        for last in range(first, ROWS):
            if found := source(first, last):
                yield from ([found, *others] for others in cuts(last + 1))

    return min(cuts(0), key=cost)


def _reaches_over(rate: int, source: _Source) -> bool:
    """Whether a column's last lane needs bytes of the next segment."""
    return source.byte + source.size > rate


def emit(builder, args: Sequence[ir.Value], integers: int, rate: int, state_bits: int, exact: bool, tokens: int) -> None:
    """As `numba_product._multiply`, whose arguments these are; `integers` is where in a record the activations begin."""
    words, after, record, steps, stride, sums, end, tail = args
    multiply = _AtOnce(builder) if not exact and tokens <= _AT_ONCE else _InPairs(builder, exact)
    places = [builder.add(record, builder.mul(stride, ir.Constant(I64, token))) for token in range(tokens)]
    room, whole, size = _ROOM // tokens, [], columns(rate) * (2 if exact else 1)
    for some in (range(first, min(first + room, ROWS)) for first in range(0, ROWS, room)):
        totals = [[cgutils.alloca_once(builder, INTS) for _ in places] for _ in some]
        for total in itertools.chain(*totals):
            builder.store(constant([0] * LANES), total)
        with cgutils.for_range(builder, steps) as loop:
            lanes = Lanes(builder, words, after, loop.index, end, tail, rate, state_bits)
            if some[0] == 0:
                lanes.ask_ahead()
            at = builder.add(builder.mul(loop.index, ir.Constant(I64, size)), ir.Constant(I64, integers))
            for pair in range(0, columns(rate) // COLUMNS, 2):
                given = [multiply.activations(builder.add(place, at), pair * COLUMNS) for place in places]
                for row, of_row in zip(some, totals, strict=True):
                    hashes = [lanes.hashes(register, row) for register in (pair, pair + 1)]
                    weights = multiply.weights(hashes)
                    for total, activation in zip(of_row, given, strict=True):
                        builder.store(multiply.add(builder.load(total), weights, activation), total)
        whole += totals
    for token, place in enumerate(places):
        found = _over_columns(builder, [builder.load(of_row[token]) for of_row in whole])
        add_group(builder, found, place, sums, len(found) * token)


class _InPairs:
    def __init__(self, builder, exact: bool) -> None:
        self._builder, self._exact = builder, exact

    def activations(self, address: ir.Value, first: int) -> ir.Value:
        """Of two registers of columns, the first-th on: int16 [32], two of them for each lane."""
        count = 2 * COLUMNS
        of, size = (I16, 2) if self._exact else (I8, 1)
        found = load(self._builder, address, ir.VectorType(of, count), size * first)
        if not self._exact:
            ordered = shuffle(self._builder, found, activations()[:count])
            found = self._builder.sext(ordered, ir.VectorType(I16, count))
        pairs = self._builder.bitcast(found, ir.VectorType(I32, COLUMNS))
        return shuffle(self._builder, pairs, [lane // COLUMNS for lane in range(LANES)])

    def weights(self, hashes: list[ir.Value]) -> ir.Value:
        """Of both registers: int16 [32], side by side."""
        nothing, of = constant([0] * _REGISTER, I8), ir.VectorType(I16, 2 * LANES)
        name, way = "llvm.x86.avx512.dbpsadbw.512", ir.Constant(I32, 0)
        first, second = (call(self._builder, name, of, self._builder.bitcast(each, BYTES), nothing, way) for each in hashes)
        found = shuffle(self._builder, first, [n + 2 * LANES * (n % 2) for n in range(2 * LANES)], second)
        return self._builder.bitcast(found, INTS)

    def add(self, total: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
        return call(self._builder, "llvm.x86.avx512.vpdpwssd.512", INTS, total, weights, activations)


class _AtOnce:
    def __init__(self, builder) -> None:
        self._builder = builder

    def activations(self, address: ir.Value, first: int) -> list[ir.Value]:
        """Of two registers of columns, the first-th on: int8 [64] each, a lane's four times the same."""
        found = []
        for start in (first, first + COLUMNS):
            four = load(self._builder, address, ir.VectorType(I8, COLUMNS), start)
            found.append(self._builder.bitcast(shuffle(self._builder, four, [n // LANES for n in range(_REGISTER)]), INTS))
        return found

    def weights(self, hashes: list[ir.Value]) -> list[ir.Value]:
        return hashes

    def add(self, total: ir.Value, weights: list[ir.Value], activations: list[ir.Value]) -> ir.Value:
        for hashes, activation in zip(weights, activations, strict=True):
            total = call(self._builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, hashes, activation)
        return total


class Lanes:
    """The words of a step.

    words, after   addresses of a group's first column in a segment and in the one that its windows reach over into
    end, tail      the step, or none, whose words are at `tail`, int32 [2, TAIL]: nothing is read past a weight's end
    """

    def __init__(
        self,
        builder,
        words: ir.Value,
        after: ir.Value,
        step: ir.Value,
        end: ir.Value,
        tail: ir.Value,
        rate: int,
        state_bits: int,
    ) -> None:
        self._builder, self._rate, self._state_bits = builder, rate, state_bits
        self._bytes = 4 * rate * columns(rate)
        at = builder.mul(step, ir.Constant(I64, self._bytes))
        ends = builder.icmp_signed("==", step, end)
        self._ahead = builder.add(after, at)
        others = builder.add(tail, ir.Constant(I64, 4 * TAIL))
        self._own = builder.select(ends, tail, builder.add(words, at))
        self._others = builder.select(ends, others, self._ahead)
        self._loaded: dict[tuple[bool, int], ir.Value] = {}
        self._made: dict[tuple[int, int, int], ir.Value] = {}
        # As a constant, LLVM would make an instruction of its own of it.
        opaque = builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [ir.Constant(I64, 0x3333333333333333)], False)
        self._lower = builder.bitcast(opaque, ir.VectorType(ir.IntType(1), _REGISTER))

    def ask_ahead(self) -> None:
        for first in range(0, self._bytes, _REGISTER):
            place = pointer(self._builder, self._ahead, I8, _AHEAD + first)
            call(self._builder, "llvm.prefetch.p0", ir.VoidType(), place, *(ir.Constant(I32, each) for each in (0, 3, 1)))

    def hashes(self, register: int, row: int) -> ir.Value:
        """A row (0 to 7) of each lane of a register, mixed: four bytes whose sum is the weight, and 510."""
        return self._builder.mul(self._states(register, row), constant([MULTIPLIERS[self._state_bits]] * LANES))

    def _states(self, register: int, row: int) -> ir.Value:
        source = next(each for each in _sources(self._rate, self._state_bits) if row in each.rows)
        shift, shifts = self._rate * row - 8 * source.byte, [self._rate * other - 8 * source.byte for other in source.rows]
        if self._state_bits == 16 and shift - 8 in shifts:
            found = self._builder.bitcast(self._shifted(register, source, shift - 8), BYTES)
            return self._builder.bitcast(self._upper_bytes(found), INTS)
        if self._state_bits == 16 and shift and row in _BY_BITS.get(self._rate, ()):
            bits = [(32 * lane + shift + 8 * byte) % 64 for lane in range(LANES) for byte in range(4)]
            found = self._builder.bitcast(self._shifted(register, source, 0), BYTES)
            found = call(self._builder, "llvm.x86.avx512.pmultishift.qb.512", BYTES, constant(bits, I8), found)
            return self._builder.bitcast(self._builder.select(self._lower, found, constant([0] * _REGISTER, I8)), INTS)
        found = self._shifted(register, source, shift)
        if shift + self._state_bits == 32:
            return found
        return self._builder.and_(found, constant([(1 << self._state_bits) - 1] * LANES))

    def _upper_bytes(self, lanes: ir.Value) -> ir.Value:
        """Bytes 1 and 2 of each lane, zeros above them: a shift by a byte and a mask."""
        places = [4 * lane + 1 + byte if byte < 2 else _REGISTER for lane in range(LANES) for byte in range(4)]
        return shuffle(self._builder, lanes, places, constant([0] * _REGISTER, I8))

    def _shifted(self, register: int, source: _Source, shift: int) -> ir.Value:
        key = register, source.byte, shift
        if key not in self._made:
            if shift:
                found = self._builder.lshr(self._shifted(register, source, 0), constant([shift] * LANES))
            else:
                found = self._builder.bitcast(self._lanes(register, source), INTS)
            self._made[key] = found
        return self._made[key]

    def _lanes(self, register: int, source: _Source) -> ir.Value:
        """Four columns' lanes, from a byte of theirs on."""
        size = 4 * self._rate
        places: list[tuple[bool, int]] = []  # whether of the next segment, and which byte of the step
        for lane in range(LANES):
            start = size * (COLUMNS * register + lane // COLUMNS)
            for byte in range(4):
                at = self._rate * (lane % COLUMNS) + source.byte + min(byte, source.size - 1)
                places.append((at >= size, start + at % size))
        if size == LANES:
            return self._as_they_lie(_REGISTER * register + source.byte, [over for over, _ in places])
        registers = [
            each for over in (False, True) for each in self._around([at for beyond, at in places if beyond == over], over)
        ]
        found: ir.Value | None = None
        lanes: list[int | None] = [None] * _REGISTER
        for (over, start), value in registers:
            there = [at - start if beyond == over and 0 <= at - start < _REGISTER else None for beyond, at in places]
            if found is None:
                found, lanes = value, there
                continue
            both = [
                old if old is not None else None if new is None else new + _REGISTER
                for old, new in zip(lanes, there, strict=True)
            ]
            found = shuffle(self._builder, found, [lane or 0 for lane in both], value)
            lanes = [None if lane is None else n for n, lane in enumerate(both)]
        assert found is not None
        assert None not in lanes
        return found if len(registers) > 1 else shuffle(self._builder, found, [lane or 0 for lane in lanes])

    def _around(self, places: list[int], over: bool) -> list[tuple[tuple[bool, int], ir.Value]]:
        """Registers that hold these bytes of the step's own words or of those after, and where they begin."""
        if not places:
            return []
        first, end = min(places), max(places) + 1
        starts = [min(first, self._bytes - _REGISTER)] if end - first <= _REGISTER else [first, end - _REGISTER]
        for start in starts:
            if (over, start) not in self._loaded:
                self._loaded[over, start] = load(self._builder, self._others if over else self._own, BYTES, start)
        return [((over, start), self._loaded[over, start]) for start in starts]

    def _as_they_lie(self, first: int, beyond: list[bool]) -> ir.Value:
        """64 bytes of the step's own words from a byte on, but for those that are beyond their column."""
        if not any(beyond):
            return load(self._builder, self._own, BYTES, first)
        nothing = constant([0] * _REGISTER, I8)
        own = self._some(self._own, first, [not each for each in beyond], nothing)
        return self._some(self._others, first - LANES, beyond, own)

    def _some(self, address: ir.Value, offset: int, wanted: list[bool], others: ir.Value) -> ir.Value:
        mask = constant([int(each) for each in wanted], ir.IntType(1))
        place = pointer(self._builder, address, BYTES, offset)
        return call(self._builder, "llvm.masked.load.v64i8.p0", BYTES, place, ir.Constant(I32, 1), mask, others)


def _over_columns(builder, totals: list[ir.Value]) -> list[ir.Value]:
    """Add up what belongs to the same row: parts of a column's lanes, of eight registers. What is left lies side by side."""
    part = LANES
    while part > LANES // COLUMNS:
        part //= 2
        lower = [start + n for start in range(0, 2 * LANES, 2 * part) for n in range(part)]
        upper = [n + part for n in lower]
        pairs = zip(totals[::2], totals[1::2], strict=True)
        totals = [builder.add(shuffle(builder, a, lower, b), shuffle(builder, a, upper, b)) for a, b in pairs]
    return totals
