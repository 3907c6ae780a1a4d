"""The trellis code's products where a processor has AVX-512 with VBMI and VNNI: windows two at a time, columns in pairs.

A register holds eight lanes of 64 bits: a word of a column, and above it the word that its windows reach over into. One
instruction takes two windows out of every lane, which then lie side by side as lanes of 32 bits: a shuffle of bytes, after a
shift that serves several, or `vpmultishiftqb` where no one shift aligns both. They are mixed by a product, and `vdbpsadbw`
leaves the sum of a lane's four bytes in both of its halves. Half of that, and half of what a second column left,
are two int16, which `vpdpwssd` multiplies by a pair of activations and adds up. So a weight is formed once, and another token
costs half an instruction for 16 weights.

A *step* is 16 / w columns: the first half of them, and those that they are paired with. w words of a column lie in one register
(`_together`); so many registers as hold all R words follow one another. Of two words with an odd number of rows each one row is
taken out of lanes that begin between them (`_registers`).
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from seedlm.codes.trellis.format import MULTIPLIERS, SEGMENT_ROWS, STATE_BITS
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
    splat,
)

_ROOM: Final = 18
"""Registers for sums: more steps through the words if there are more of them."""

_MANY_CONSTANTS: Final = 3, 5, 6
"""Rates whose constants have no room in registers (`_Constants`). At 7 bits the words have none either: that is slower so."""

_CONSTANT_BYTES: Final = 4096

_AHEAD: Final = 4096
"""Bytes from the words that are multiplied to those that are asked for."""


def columns(rate: int) -> int:
    """Columns of a step."""
    return LANES // _together(rate)


def activations(rate: int) -> list[int]:
    """Which of 16 columns' int16 come first, second, ...: pair by pair."""
    half = columns(rate) // 2
    return [step + i + second for step in range(0, LANES, 2 * half) for i in range(half) for second in (0, half)]


def rows(rate: int) -> list[int]:
    """The row of a segment that each total of `emit` belongs to, -1 where it is none's."""
    found = [row for register, pair in _sums(rate) for lane in _registers(rate)[register] for row in lane.rows(pair)]
    return found + [-1] * (-len(found) % LANES)


def _together(rate: int) -> int:
    return math.gcd(rate, 8)


class _Lane(NamedTuple):
    """64 bits of a column, from a byte of its segment on, and the rows whose windows are taken out of them two by two."""

    first: int
    pairs: list[tuple[int, int]]

    def rows(self, pair: int) -> tuple[int, int]:
        """The pair-th two rows, -1 where there are none."""
        return self.pairs[pair] if pair < len(self.pairs) else (-1, -1)


@lru_cache(maxsize=8)
def _registers(rate: int) -> list[list[_Lane]]:
    """The lanes that each register has of a column.

    They begin where words do. Of two words that have an odd number of rows each one row goes to a lane that begins between
    them, so that no half of a register is idle.
    """
    words = [[row for row in range(SEGMENT_ROWS) if 32 * word <= rate * row < 32 * (word + 1)] for word in range(rate)]
    odd, between = [word for word in words if len(word) % 2] if _together(rate) == 1 else [], []
    for some, others in zip(odd[::2], odd[1::2], strict=False):
        near = [(a, b) for a in some for b in others if rate * b + max(STATE_BITS) <= rate * a // 8 * 8 + 64]
        if near:

            def apart(pair: tuple[int, int], some: list[int] = some, others: list[int] = others) -> int:
                left = [_pairs(rate, [row for row in rows if row not in pair]) for rows in (some, others)]
                return sum(rate * (second - first) % 8 > 0 for first, second in (pair, *itertools.chain(*left)))

            a, b = min(near, key=apart)
            some.remove(a)
            others.remove(b)
            between.append([_Lane(rate * a // 8, [(a, b)])])
    lanes = [_Lane(4 * word, _pairs(rate, rows)) for word, rows in enumerate(words)]
    return [lanes[first : first + _together(rate)] for first in range(0, rate, _together(rate))] + between


def _pairs(rate: int, rows: list[int]) -> list[tuple[int, int]]:
    """Rows two by two, -1 where there is no second.

    Rather two whose windows begin at the same bit of a byte, since one shift aligns both.
    """
    apart = 8 // math.gcd(rate, 8)
    rows, found, single = rows.copy(), [], []
    while rows:
        first = rows.pop(0)
        if first + apart in rows:
            rows.remove(first + apart)
            found.append((first, first + apart))
        else:
            single.append(first)
    single += [-1] * (len(single) % 2)
    return found + list(zip(single[::2], single[1::2], strict=True))


def _sums(rate: int) -> list[tuple[int, int]]:
    """All that there is to sum up, (register, pair): two rows of each lane in a register."""
    return [
        (register, pair)
        for register, lanes in enumerate(_registers(rate))
        for pair in range(max(len(lane.pairs) for lane in lanes))
    ]


def emit(builder, args: Sequence[ir.Value], integers: int, rate: int, state_bits: int, tokens: int) -> None:
    """As `numba_product._multiply`, whose arguments these are; `integers` is where in a record the activations begin."""
    words, after, record, steps, stride, sums, end, tail = args
    together, every = _together(rate), _sums(rate)
    places = [builder.add(record, builder.mul(stride, ir.Constant(I64, token))) for token in range(tokens)]
    # As a constant, LLVM would make an instruction of its own of it.
    opaque = builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [ir.Constant(I64, 0x3333333333333333)], False)
    two_bytes = builder.bitcast(opaque, ir.VectorType(ir.IntType(1), 4 * LANES))
    constants = _Constants(builder) if rate in _MANY_CONSTANTS else None
    room, whole = max(1, _ROOM // tokens), []
    for some in (every[first : first + room] for first in range(0, len(every), room)):
        totals = [[cgutils.alloca_once(builder, INTS) for _ in places] for _ in some]
        for total in itertools.chain(*totals):
            builder.store(constant([0] * LANES), total)
        with cgutils.for_range(builder, steps) as loop:
            if constants:
                constants.read_here()
            lanes = _Lanes(builder, words, after, loop.index, end, tail, rate, constants)
            if some[0] == every[0]:
                lanes.ask_ahead()
            at = builder.add(builder.mul(loop.index, ir.Constant(I64, 2 * columns(rate))), ir.Constant(I64, integers))
            given = [load(builder, builder.add(place, at), ir.VectorType(I32, columns(rate) // 2)) for place in places]
            given = [shuffle(builder, each, [n // (2 * together) for n in range(LANES)]) for each in given]
            for (register, pair), of_sum in zip(some, totals, strict=True):
                starts = _starts(rate, register, pair)
                states = [_states(builder, each, starts, two_bytes, state_bits, constants) for each in lanes.of(register)]
                halves = [_byte_sums(builder, each, state_bits) for each in states]
                weights = shuffle(builder, halves[0], [n + 2 * LANES * (n % 2) for n in range(2 * LANES)], halves[1])
                weights = builder.bitcast(weights, INTS)
                for total, activation in zip(of_sum, given, strict=True):
                    added = call(builder, "llvm.x86.avx512.vpdpwssd.512", INTS, builder.load(total), weights, activation)
                    builder.store(added, total)
        whole += totals
    for token, place in enumerate(places):
        found = _over_columns(builder, [builder.load(of_sum[token]) for of_sum in whole], 2 * together)
        add_group(builder, found, place, sums, len(found) * token)


class _Constants:
    """Vectors that are read from memory where they are used.

    Some rates have more of them than there are registers. LLVM would read all of them once a group, write them to the stack and
    read them there: a hundred clocks a group, of 1,800.
    """

    def __init__(self, builder) -> None:
        self._builder, self._bytes = builder, b""
        kind, name = ir.ArrayType(I8, _CONSTANT_BYTES), builder.module.get_unique_name("constants")
        self._place = ir.GlobalVariable(builder.module, kind, name)
        self._place.linkage, self._place.global_constant, self._place.align = "internal", True, 64

    def read_here(self) -> None:
        """Read all vectors anew from here on: LLVM is not told that these are the same bytes as before."""
        address = self._builder.ptrtoint(self._place, I64)
        self._address = self._builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [address], True)

    def vector(self, lanes: Sequence[int]) -> ir.Value:
        """Int32 [16]."""
        return load(self._builder, self._address, INTS, self._at(b"".join(lane.to_bytes(4, "little") for lane in lanes)))

    def repeated(self, eight: Sequence[int]) -> ir.Value:
        """Eight bytes, eight times."""
        value = load(self._builder, self._address, I64, self._at(bytes(eight)))
        return self._builder.bitcast(splat(self._builder, value, LANES // 2), BYTES)

    def _at(self, wanted: bytes) -> int:
        places = range(0, len(self._bytes), len(wanted))
        place = next((place for place in places if self._bytes[place:].startswith(wanted)), None)
        if place is None:
            place = places[-1] + len(wanted) if places else 0
            self._bytes = self._bytes.ljust(place, b"\0") + wanted
            assert len(self._bytes) <= _CONSTANT_BYTES
            self._place.initializer = ir.Constant(
                self._place.type.pointee, bytearray(self._bytes.ljust(_CONSTANT_BYTES, b"\0"))
            )
        return place


class _Lanes:
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
        constants: _Constants | None,
    ) -> None:
        self._constants = constants
        self._builder, self._rate, self._count = builder, rate, rate // _together(rate)
        at = builder.mul(step, ir.Constant(I64, 4 * LANES * self._count))
        ends = builder.icmp_signed("==", step, end)
        self._after = builder.add(after, at)
        others = builder.add(tail, ir.Constant(I64, 4 * TAIL))
        starts = [builder.select(ends, *each) for each in ((tail, builder.add(words, at)), (others, self._after))]
        self._loaded = [load(builder, start, INTS, 4 * LANES * n) for start in starts for n in range(self._count)]

    def ask_ahead(self) -> None:
        for n in range(self._count):
            place = pointer(self._builder, self._after, I8, _AHEAD + 4 * LANES * n)
            call(self._builder, "llvm.prefetch.p0", ir.VoidType(), place, *(ir.Constant(I32, each) for each in (0, 3, 1)))

    def of(self, register: int) -> list[ir.Value]:
        """A register's lanes of the first half of the columns, and of the second."""
        half, found, size = columns(self._rate) // 2, [], 4 * self._rate
        for first in (0, half):
            places = []
            for column in range(first, first + half):
                for lane in _registers(self._rate)[register]:
                    bytes = range(lane.first, lane.first + 8)
                    places += [size * column + (at if at < size else at - size + 4 * LANES * self._count) for at in bytes]
            found.append(self._pick(places))
        return found

    def _pick(self, places: list[int]) -> ir.Value:
        """The bytes that lie at these places of all that was loaded, by int32 where possible."""
        if all(place % 4 == n % 4 for n, place in enumerate(places)):
            loaded, lanes, places = self._loaded, LANES, [place // 4 for place in places[::4]]
        else:
            loaded, lanes = [self._builder.bitcast(each, BYTES) for each in self._loaded], 4 * LANES
        first, *others = sorted({place // lanes for place in places})
        found, at = loaded[first], [place % lanes for place in places]
        for number in others:
            taken = [
                lanes + place % lanes if place // lanes == number else lane for place, lane in zip(places, at, strict=True)
            ]
            found, at = self._shuffle(found, taken, loaded[number]), [*range(lanes)]
        return self._builder.bitcast(found if others else shuffle(self._builder, found, at), INTS)

    def _shuffle(self, value: ir.Value, lanes: list[int], other: ir.Value) -> ir.Value:
        if self._constants is None or value.type != INTS:
            return shuffle(self._builder, value, lanes, other)
        name, places = "llvm.x86.avx512.vpermi2var.d.512", self._constants.vector(lanes)
        return call(self._builder, name, INTS, value, places, other)


def _starts(rate: int, register: int, pair: int) -> list[int]:
    """For each half of a 64-bit lane the bit of the lane that its window begins with, 0 where it is no row's."""
    rows = [(lane.first, row) for lane in _registers(rate)[register] for row in lane.rows(pair)]
    return [rate * row - 8 * first if row >= 0 else 0 for first, row in rows] * (columns(rate) // 2)


def _states(
    builder, lanes: ir.Value, starts: list[int], two_bytes: ir.Value, state_bits: int, constants: _Constants | None
) -> ir.Value:
    """Two windows of each lane.

    Bytes are shuffled where all windows begin at the same bit of one: `vpmultishiftqb` waits for the units that multiply.
    """
    nothing, shifts = constant([0] * 4 * LANES, I8), {start % 8 for start in starts}
    found, mask = builder.bitcast(lanes, BYTES), constant([(1 << state_bits) - 1] * LANES)
    if len(shifts) > 1:
        bits = [(start + 8 * byte) % 64 for start in starts for byte in range(4)]
        windows = constants.repeated(bits[:8]) if constants and bits[:8] * 8 == bits else constant(bits, I8)
        found = call(builder, "llvm.x86.avx512.pmultishift.qb.512", BYTES, windows, found)
        if state_bits == 16:
            return builder.bitcast(builder.select(two_bytes, found, nothing), INTS)
        return builder.and_(builder.bitcast(found, INTS), mask)
    shift = shifts.pop()
    if shift and state_bits == 16:  # a shift for several pairs, after which a window is two bytes
        words = builder.bitcast(lanes, ir.VectorType(I64, LANES // 2))
        found, shift = builder.bitcast(builder.lshr(words, constant([shift] * (LANES // 2), I64)), BYTES), 0
    size = -(-(shift + state_bits) // 8)
    firsts = [8 * (lane // 2) + start // 8 for lane, start in enumerate(starts)]
    places = [first + byte if byte < size else 4 * LANES for first in firsts for byte in range(4)]
    found = builder.bitcast(shuffle(builder, found, places, nothing), INTS)
    if shift:
        found = builder.lshr(found, constant([shift] * LANES))
    return builder.and_(found, mask) if (shift + state_bits) % 8 else found


def _byte_sums(builder, states: ir.Value, state_bits: int) -> ir.Value:
    """The sums of their mixed bytes, each of them twice: int16 [32]."""
    nothing = constant([0] * 4 * LANES, I8)
    mixed = builder.bitcast(builder.mul(states, constant([MULTIPLIERS[state_bits]] * LANES)), BYTES)
    return call(builder, "llvm.x86.avx512.dbpsadbw.512", ir.VectorType(I16, 2 * LANES), mixed, nothing, ir.Constant(I32, 0))


def _over_columns(builder, totals: list[ir.Value], size: int) -> list[ir.Value]:
    """Add up what belongs to the same row: each register's parts of `size` lanes. What is left lies side by side."""
    part = LANES
    while part > size:
        part //= 2
        lower = [start + n for start in range(0, 2 * LANES, 2 * part) for n in range(part)]
        paired = [totals[n : n + 2] if n + 1 < len(totals) else [totals[n]] * 2 for n in range(0, len(totals), 2)]
        totals = [
            builder.add(shuffle(builder, a, lower, b), shuffle(builder, a, [n + part for n in lower], b)) for a, b in paired
        ]
    return totals
