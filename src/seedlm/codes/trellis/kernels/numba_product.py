"""A few tokens times the trellis code's weights on a CPU, without a weight in memory.

Activations are integers: the inputs are rotated, and each group of 256 columns has a scale such that its largest is 16,383 (or
127, "int8"). Within a group sums are exact in int32, so that every processor finds the same; groups are added up in float32 in
their order. A weight's bytes are 510 too large, which is taken off a group's sum.

How weights are made is in `numba_windows`, in `numba_lanes` for AVX2, and in `numba_pairs` for AVX-512 that has what it takes.
What a processor adds products of bytes with (`processor.byte_products`) decides how activations lie in memory:

    numba_pairs     int16, of two columns side by side (int8: one int8, in order)
    vnni, dot       two int8 parts, of which the first counts 256 (int8: one)
    pairs, plain    int16
"""

import itertools
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from seedlm.codes.compiled import to_machine_code
from seedlm.codes.hadamard_numba import largest_bits, rotate_row
from seedlm.codes.trellis.format import SEGMENT_ROWS
from seedlm.codes.trellis.kernels import numba_lanes, numba_pairs
from seedlm.codes.trellis.kernels.numba_windows import TAIL, Products, Windows, add_group, copy_end, neighbours, slots
from seedlm.codes.trellis.kernels.records import GROUP, INTEGERS, LEVELS, PADDED, RECORD, in_pairs
from seedlm.codes.vectors import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    as_pointer,
    call,
    constant,
    intrinsic,
    job_address,
    literal,
    load,
    scratch,
    shuffle,
    splat,
    store,
    take,
    write,
)

_TAIL_BYTES: Final = 8 * TAIL
_VALUE_BYTES: Final = 4 * SEGMENT_ROWS


@intrinsic(prefer_literal=True)
def _multiply(typingctx, words, after, record, steps, stride, sums, end, tail, rate, state_bits, exact, tokens):
    """Add a group's products to float32 [tokens, `rows`] at `sums`.

    words, after   addresses of the group's first column in a segment and in the one after it
    record         address of the group's record for the first token; the next token's is `stride` bytes on
    steps          how many times `columns`
    end, tail      the step, or none, whose words lie in int32 [2, TAIL] at `tail`: nothing is read past a weight's end
    """
    numbers = literal(rate, state_bits, exact, tokens)

    def codegen(context, builder, sig, args):
        # A function of its own: LLVM gives a loop registers that what is around it has no use for.
        kind = ir.FunctionType(ir.VoidType(), [I64] * 8)
        function = ir.Function(builder.module, kind, builder.module.get_unique_name("multiply"))
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block())
        if in_pairs():
            numba_pairs.emit(inside, function.args, INTEGERS, *numbers)
        elif numba_lanes.in_lanes():
            numba_lanes.emit(inside, function.args, *numbers)
        else:
            _emit(inside, function.args, *numbers)
        inside.ret_void()
        builder.call(function, args[:8])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, rate, state_bits, exact, tokens), codegen


def _columns(rate: int) -> int:
    """Columns that are multiplied at a time."""
    if in_pairs():
        return numba_pairs.columns(rate)
    return numba_lanes.columns(rate) if numba_lanes.in_lanes() else LANES // rate


def _rows(rate: int, state_bits: int) -> list[int]:
    """The row of a segment that each of a token's sums belongs to, -1 where it is none's."""
    if in_pairs():
        return numba_pairs.rows()
    bits = [(word, offset) for slot in slots(rate, state_bits) for word, offset in enumerate(slot.offsets)]
    return [(32 * word + offset) // rate if offset < 32 else -1 for word, offset in bits]


@intrinsic(prefer_literal=True)
def _in_order(typingctx, sums, target, rate, state_bits):
    """Write a token's sums to float32 [32] by rows."""
    rows = _rows(*literal(rate, state_bits))

    def codegen(context, builder, sig, args):
        some = load(builder, args[0], ir.VectorType(F32, len(rows)))
        store(builder, shuffle(builder, some, [rows.index(row) for row in range(SEGMENT_ROWS)]), args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, rate, state_bits), codegen


def _emit(builder, args, rate: int, state_bits: int, exact: bool, tokens: int) -> None:
    words, after, record, steps, stride, sums, end, tail = args
    windows, products = Windows(rate, state_bits), Products(exact)
    records = [builder.add(record, builder.mul(stride, ir.Constant(I64, token))) for token in range(tokens)]
    count, room = len(windows.slots), max(1, products.room // (products.parts * tokens))
    passes = -(-count // room)
    edges = [count * i // passes for i in range(passes + 1)]
    for first, last in itertools.pairwise(edges):
        totals = [
            [[cgutils.alloca_once(builder, INTS) for _ in range(products.parts)] for _ in records] for _ in range(first, last)
        ]
        for total in itertools.chain(*itertools.chain(*totals)):
            builder.store(constant([0] * LANES), total)
        with cgutils.for_range(builder, steps) as loop:
            windows.load_step(builder, words, after, loop.index, end, tail)
            size = windows.columns * (1 if products.narrow else 2)
            column = builder.add(builder.mul(loop.index, ir.Constant(I64, size)), ir.Constant(I64, INTEGERS))
            activations = [
                products.activations(builder, builder.add(place, column), windows.column, PADDED) for place in records
            ]
            for slot, of_slot in zip(windows.slots[first:last], totals, strict=True):
                found = products.bytes(builder, windows.mixed(builder, slot))
                for of_token, given in zip(of_slot, activations, strict=True):
                    for total, activation in zip(of_token, given, strict=True):
                        builder.store(products.add(builder, builder.load(total), found, activation), total)
        for token, place in enumerate(records):
            whole = [products.whole(builder, [builder.load(part) for part in of_slot[token]]) for of_slot in totals]
            add_group(builder, [windows.over_columns(builder, each) for each in whole], place, sums, token * count + first)


@intrinsic(prefer_literal=True)
def _quantize(typingctx, row, inverse, record, exact):
    """Fill a record but for its scale: float32 [256] at `row`, multiplied and rounded to integers."""
    (whole,) = literal(exact)

    def codegen(context, builder, sig, args):
        row, inverse, record = args[:3]
        products, paired = Products(whole), in_pairs()
        size = 1 if products.narrow and not (paired and whole) else 2
        factor, total = splat(builder, inverse), constant([0] * LANES)
        for first in range(0, GROUP, LANES):
            scaled = builder.fmul(load(builder, row, FLOATS, 4 * first), factor)
            integers = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", FLOATS, scaled), INTS)
            total = builder.add(total, integers)
            if paired or not products.narrow:
                some = builder.trunc(integers, ir.VectorType(I16 if size == 2 else I8, LANES))
                some = shuffle(builder, some, numba_pairs.activations()) if paired and size == 2 else some
                store(builder, some, record, INTEGERS + size * first)
                continue
            upper = builder.ashr(builder.add(integers, constant([128] * LANES)), constant([8] * LANES))
            for part, value in enumerate((upper, integers) if whole else (integers,)):
                store(builder, builder.trunc(value, ir.VectorType(I8, LANES)), record, INTEGERS + part * PADDED + first)
        for part in range(1 if paired else products.parts):
            zeros = constant([0] * LANES, I16 if size == 2 else I8)
            store(builder, zeros, record, INTEGERS + part * PADDED + size * GROUP)
        total = call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, total)
        store(builder, builder.mul(total, ir.Constant(I32, -510 if paired else -products.excess)), record, 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, exact), codegen


def rotation(exact: bool) -> Any:
    """Rotates and rounds the activations of one token after another.

    Its job: tokens, width, block of the transform, signs float32 [block], x, kind of x (`on_cpu.KINDS`), y (tokens times
    `workspace` bytes). signs, x and y are addresses.
    """
    levels = LEVELS if exact else 127

    @to_machine_code()
    def rotate(job):
        tokens, width, block, x, kind = job[1], job[2], job[3], job[5], job[6]
        signs = carray(as_pointer(job[4]), (block,), np.float32)
        count = -(-width // 256)
        stride = 64 + count * RECORD
        while True:
            token = take(job_address(job))
            if token >= tokens:
                break
            work = job[7] + stride * token
            row = job[7] + stride * tokens + 4 * 256 * count * token
            carray(as_pointer(work), (1,), np.float32)[0] = rotate_row(x, kind, token, width, 256 * count, block, signs, row)
            for group in range(count):
                largest = largest_bits(row + 1024 * group, 256)
                record = work + 64 + group * RECORD
                scale, sized = carray(as_pointer(record), (1,), np.float32), carray(as_pointer(record), (1,), np.int32)
                sized[0] = largest
                finite = largest < np.int32(0x7F800000)
                inverse = np.float32(0)
                if finite and largest >= np.int32(27 << 23):
                    inverse = np.float32(levels) / scale[0]
                    scale[0] = scale[0] / np.float32(levels)
                else:
                    scale[0] = np.float32(0) if finite else np.float32(np.nan)
                _quantize(row + 1024 * group, inverse, record, exact)

    return rotate


def product(rate: int, state_bits: int, exact: bool, tokens: int) -> Any:
    """Multiplies records of so many tokens by the segments of a weight.

    Its job: pieces, how many of them are large, segments of these, of the others, in all, of a strip, width, rows, addresses
    of words, factors float32 [rows], bias or 0, records, y, y's kind (`on_cpu.KINDS`).
    """
    columns, count = _columns(rate), len(_rows(rate, state_bits))
    size, room = tokens * count, 4 * tokens * count

    @to_machine_code()
    def multiply(job):
        pieces, large, larger, length = job[1], job[2], job[3], job[4]
        total, strip, width, rows = job[5], job[6], job[7], job[8]
        words, bias, records, y, kind = job[9], job[11], job[12], job[13], job[14]
        factors = carray(as_pointer(job[10]), (rows,), np.float32)
        groups = -(-width // 256)
        stride = 64 + groups * RECORD
        place, found, tail = scratch(room), scratch(_VALUE_BYTES), scratch(_TAIL_BYTES)
        sums, values = carray(as_pointer(place), (size,), np.float32), carray(as_pointer(found), (32,), np.float32)
        while True:
            piece = take(job_address(job))
            if piece >= pieces:
                break
            first = min(piece, large) * larger + max(piece - large, 0) * length
            for segment in range(first, min(total, first + (larger if piece < large else length))):
                own, after = neighbours(words, segment, strip, total, 4 * rate * width)
                for i in range(size):
                    sums[i] = np.float32(0)
                for group in range(groups):
                    used, at = min(256, width - 256 * group), 1024 * rate * group
                    steps, end, record = -(-used // columns), -1, records + 64 + group * RECORD
                    if group >= groups - 2:  # a step of the last but one may reach past a short last one
                        end = steps - 1
                        copy_end(own + at, after + at, 4 * rate * columns * end, rate * (used - columns * end), tail)
                    _multiply(own + at, after + at, record, steps, stride, place, end, tail, rate, state_bits, exact, tokens)
                used = min(32, rows - 32 * segment)
                for token in range(tokens):
                    lift = np.float64(carray(as_pointer(records + stride * token), (1,), np.float32)[0])
                    _in_order(place + 4 * count * token, found, rate, state_bits)
                    for r in range(used):
                        values[r] = np.float32(np.float64(values[r]) * np.float64(factors[32 * segment + r]) * lift)
                    write(found, y, kind, rows * token + 32 * segment, bias, 32 * segment, used)

    return multiply
