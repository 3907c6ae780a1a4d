"""The trellis code's weights on a CPU, to the bit those of `codec`: in the transformed basis, or in the model's."""

import itertools
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from seedlm.codes.compiled import to_machine_code
from seedlm.codes.hadamard_numba import inverse
from seedlm.codes.trellis.format import SEGMENT_ROWS
from seedlm.codes.trellis.kernels import numba_pairs
from seedlm.codes.trellis.kernels.numba_pairs import COLUMNS, ROWS
from seedlm.codes.trellis.kernels.numba_windows import TAIL, Products, Windows, copy_end, neighbours
from seedlm.codes.trellis.kernels.records import in_pairs
from seedlm.codes.vectors import (
    FLOATS,
    I64,
    LANES,
    as_pointer,
    constant,
    intrinsic,
    job_address,
    literal,
    scratch,
    shuffle,
    store,
    take,
    write_bfloat16,
)

_TILE: Final = 256 + LANES
"""Columns of a tile of values, and room for the last step."""

_TILE_BYTES: Final = 4 * 32 * _TILE
_TAIL_BYTES: Final = 8 * TAIL


@intrinsic(prefer_literal=True)
def _values(typingctx, words, after, steps, tile, end, tail, rate, state_bits):
    """Write a segment's values, some columns times `steps`, to float32 [32, _TILE]. Arguments as in `numba_product`."""
    numbers = literal(rate, state_bits)

    def codegen(context, builder, sig, args):
        words, after, steps, tile, end, tail = args[:6]
        if in_pairs():
            _of_lanes(builder, *args[:6], *numbers)
            return context.get_dummy_value()
        windows, products = Windows(*numbers), Products(exact=False)
        with cgutils.for_range(builder, steps) as loop:
            windows.load_step(builder, words, after, loop.index, end, tail)
            place = builder.add(tile, builder.mul(loop.index, ir.Constant(I64, 4 * windows.columns)))
            for slot in windows.slots:
                found = products.bytes(builder, windows.mixed(builder, slot))
                total = products.add(builder, constant([-products.excess] * LANES), found, products.ones(builder))
                values = builder.sitofp(total, FLOATS)
                for word, offset in enumerate(slot.offsets):
                    if offset < SEGMENT_ROWS:
                        row, first = (SEGMENT_ROWS * word + offset) // windows.rate, word * windows.columns
                        some = shuffle(builder, values, range(first, first + windows.columns))
                        store(builder, some, place, 4 * _TILE * row)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, rate, state_bits), codegen


def _of_lanes(builder, words, after, steps, tile, end, tail, rate: int, state_bits: int) -> None:
    """`_values` by `numba_pairs.Lanes`: of two registers, two rows of eight columns at a time."""
    columns, products = numba_pairs.columns(rate), Products(exact=False)
    with cgutils.for_range(builder, steps) as loop:
        lanes = numba_pairs.Lanes(builder, words, after, loop.index, end, tail, rate, state_bits)
        place = builder.add(tile, builder.mul(loop.index, ir.Constant(I64, 4 * columns)))
        for pair, i in itertools.product(range(0, columns // COLUMNS, 2), range(ROWS)):
            both = []
            for register in (pair, pair + 1):
                hashes = lanes.hashes(register, i)
                total = products.add(builder, constant([-products.excess] * LANES), hashes, products.ones(builder))
                both.append(builder.sitofp(total, FLOATS))
            for lane in range(0, LANES // COLUMNS, 2):
                at = [COLUMNS * column + lane + second for second in (0, 1) for column in range(2 * COLUMNS)]
                rows = shuffle(builder, both[0], at, both[1])
                for second in (0, 1):
                    some = shuffle(builder, rows, range(8 * second, 8 * second + 8))
                    store(builder, some, place, 4 * (_TILE * (ROWS * (lane + second) + i) + COLUMNS * pair))


def weights(rate: int, state_bits: int) -> Any:
    """Forms the rows of some segments.

    Its job: segments, the first of them, segments in all, words of a strip's segments, width, rows in all, addresses of words,
    factors float32 [rows], y [rows of these segments, width], y's kind (`on_cpu.KINDS`), block of the transform or 0 for
    weights in the transformed basis (else y is float32), signs float32 [block].
    """
    columns = numba_pairs.columns(rate) if in_pairs() else LANES // rate

    @to_machine_code()
    def form(job):
        count, first, total, strip, width, rows = job[1], job[2], job[3], job[4], job[5], job[6]
        words, y, kind, block = job[7], job[9], job[10], job[11]
        factors, signs = carray(as_pointer(job[8]), (rows,), np.float32), carray(as_pointer(job[12]), (block,), np.float32)
        place, tail = scratch(_TILE_BYTES), scratch(_TAIL_BYTES)
        tile = carray(as_pointer(place), (32, _TILE), np.float32)
        groups = -(-width // 256)
        while True:
            segment = first + take(job_address(job))
            if segment >= first + count:
                break
            own, after = neighbours(words, segment, strip, total, 4 * rate * width)
            for group in range(groups):
                used, at = min(256, width - 256 * group), 1024 * rate * group
                steps, end = -(-used // columns), -1
                if group >= groups - 2:  # a step of the last but one may reach past a short last one
                    end = steps - 1
                    copy_end(own + at, after + at, 4 * rate * columns * end, rate * (used - columns * end), tail)
                _values(own + at, after + at, steps, place, end, tail, rate, state_bits)
                for r in range(min(32, rows - 32 * segment)):
                    row, begin = 32 * segment + r, width * (32 * (segment - first) + r) + 256 * group
                    factor = factors[row]
                    if kind == 0:
                        floats = carray(as_pointer(y + 4 * begin), (used,), np.float32)
                        for c in range(used):
                            floats[c] = tile[r, c] * factor
                    else:
                        write_bfloat16(place + 4 * _TILE * r, y + 2 * begin, used, factor)
            if block:
                for r in range(min(32, rows - 32 * segment)):
                    inverse(y + 4 * width * (32 * (segment - first) + r), width, block, signs)

    return form
