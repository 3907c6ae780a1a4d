"""A few tokens times the trellis code's weights on a CPU, without a weight in memory.

Activations are integers: the inputs are rotated, and each group of 256 columns has a scale such that its largest is 32,639 (or
127, "int8"). Within a group sums are exact in int32, so that every processor finds the same; groups are added up in float32 in
their order. A sum of bytes is 510 too large for each column, which is taken off by what the sums start from.

How weights are made is in `numba_windows`. What a processor adds products of bytes with (`vectors.byte_products`) decides how
activations lie in memory:

    vnni, dot       two int8 parts, of which the first counts 256 (int8: one)
    pairs, plain    int16
"""

import itertools
from functools import lru_cache
from typing import Final

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils

from seedlm.codes.hadamard_numba import largest_bits, rotate_row
from seedlm.codes.threads import Kernel
from seedlm.codes.trellis.kernels.numba_windows import Products, Windows, copy_end, neighbours, slots
from seedlm.codes.vectors import (
    F32,
    FLOATS,
    I8,
    I16,
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
    put,
    scratch,
    splat,
    store,
    take,
)

GROUP: Final = 256
"""Columns that share a scale: as many as int32 sums of 16-bit activations have room for, at 8 bits a weight."""

LEVELS: Final = 127 * 256 + 127

_PADDED: Final = GROUP + LANES
_STARTS, _INTEGERS = 64, 64 + 2 * 4 * LANES
RECORD: Final = _INTEGERS + 2 * _PADDED + 32
"""Bytes of a group's activations: its scale, 2 x 16 sums to start from at byte 64, then its integers and zeros behind them."""

HEADER: Final = 64
"""Bytes before a token's records: a power of two that its products are multiplied by."""


def groups(width: int) -> int:
    return -(-width // GROUP)


def records(width: int) -> int:
    """Bytes of a token's activations."""
    return HEADER + groups(width) * RECORD


def workspace(width: int) -> int:
    """Bytes for a token's activations, and for the floats that they are made from, which lie behind those of all tokens."""
    return records(width) + 4 * GROUP * groups(width)


@intrinsic(prefer_literal=True)
def _multiply(typingctx, words, after, record, steps, stride, sums, end, tail, rate, state_bits, exact, tokens):
    """Add a group's products to float32 [tokens, slots, 16] at `sums`.

    words, after   addresses of the group's first column in a segment and in the one after it
    record         address of the group's record for the first token; the next token's is `stride` bytes on
    steps          how many times 16 // rate columns
    end, tail      the step, or none, whose words lie in int32 [2, 32] at `tail`: nothing is read past a weight's end
    """
    numbers = literal(rate, state_bits, exact, tokens)

    def codegen(context, builder, sig, args):
        _emit(builder, args[:8], *numbers)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, rate, state_bits, exact, tokens), codegen


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
        for of_slot in totals:
            for place, of_token in zip(records, of_slot, strict=True):
                for part, total in enumerate(of_token):
                    builder.store(load(builder, place, INTS, _STARTS + 4 * LANES * part), total)
        with cgutils.for_range(builder, steps) as loop:
            windows.load_step(builder, words, after, loop.index, end, tail)
            size = windows.columns * (1 if products.narrow else 2)
            column = builder.add(builder.mul(loop.index, ir.Constant(I64, size)), ir.Constant(I64, _INTEGERS))
            activations = [products.activations(builder, builder.add(place, column), windows, _PADDED) for place in records]
            for slot, of_slot in zip(windows.slots[first:last], totals, strict=True):
                found = products.bytes(builder, windows.mixed(builder, slot))
                for of_token, given in zip(of_slot, activations, strict=True):
                    for total, activation in zip(of_token, given, strict=True):
                        builder.store(products.add(builder, builder.load(total), found, activation), total)
        for token, place in enumerate(records):
            scale = splat(builder, load(builder, place, F32))
            for n, of_slot in enumerate(totals):
                parts = [builder.load(total) for total in of_slot[token]]
                whole = builder.shl(parts[0], constant([8] * LANES)) if len(parts) == 2 else parts[0]
                whole = builder.add(whole, parts[1]) if len(parts) == 2 else whole
                offset = 4 * LANES * (token * count + first + n)
                so_far = load(builder, sums, FLOATS, offset)
                product = builder.fmul(builder.sitofp(whole, FLOATS), scale)
                store(builder, builder.fadd(so_far, product), sums, offset)


@intrinsic(prefer_literal=True)
def _quantize(typingctx, row, inverse, record, steps, rate, exact):
    """Fill a record but for its scale: float32 [256] at `row`, multiplied and rounded to integers; sums to start from."""
    per, whole = literal(rate, exact)

    def codegen(context, builder, sig, args):
        row, inverse, record, steps = args[:4]
        windows, products = Windows(per, 16), Products(whole)
        factor = splat(builder, inverse)
        for first in range(0, GROUP, LANES):
            scaled = builder.fmul(load(builder, row, FLOATS, 4 * first), factor)
            integers = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", FLOATS, scaled), INTS)
            if not products.narrow:
                store(builder, builder.trunc(integers, ir.VectorType(I16, LANES)), record, _INTEGERS + 2 * first)
                continue
            upper = builder.ashr(builder.add(integers, constant([128] * LANES)), constant([8] * LANES))
            for part, value in enumerate((upper, integers) if whole else (integers,)):
                store(builder, builder.trunc(value, ir.VectorType(I8, LANES)), record, _INTEGERS + part * _PADDED + first)
        size = 1 if products.narrow else 2
        for part in range(products.parts):
            zeros = constant([0] * LANES, products.integer)
            store(builder, zeros, record, _INTEGERS + part * _PADDED + size * GROUP)
        totals = [cgutils.alloca_once(builder, INTS) for _ in range(products.parts)]
        for total in totals:
            builder.store(constant([0] * LANES), total)
        one = constant([1] * LANES) if products.narrow else products.bytes(builder, constant([1] * LANES))
        with cgutils.for_range(builder, steps) as loop:
            column = builder.mul(loop.index, ir.Constant(I64, size * windows.columns))
            column = builder.add(column, ir.Constant(I64, _INTEGERS))
            given = products.activations(builder, builder.add(record, column), windows, _PADDED)
            for total, activation in zip(totals, given, strict=True):
                builder.store(products.add(builder, builder.load(total), one, activation), total)
        for part, total in enumerate(totals):
            start = builder.mul(builder.load(total), constant([-products.excess] * LANES))
            store(builder, start, record, _STARTS + 4 * LANES * part)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp, rate, exact), codegen


@lru_cache(maxsize=64)
def rotation(rate: int, exact: bool) -> Kernel:
    """Rotates and rounds the activations of one token after another.

    Its job: tokens, x, kind of x (`on_cpu.KINDS`), width, block of the transform, signs float32 [block], y (tokens times
    `workspace` bytes). x, signs and y are addresses.
    """
    columns, levels = LANES // rate, LEVELS if exact else 127

    @cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
    def rotate(job):
        tokens, x, kind, width, block = job[1], job[2], job[3], job[4], job[5]
        signs = carray(as_pointer(job[6]), (block,), np.float32)
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
                used = min(256, width - 256 * group)
                _quantize(row + 1024 * group, inverse, record, -(-used // columns), rate, exact)

    return Kernel(rotate)


@lru_cache(maxsize=64)
def product(rate: int, state_bits: int, exact: bool, tokens: int) -> Kernel:
    """Multiplies records of so many tokens by the segments of a weight.

    Its job: pieces, segments of a piece, segments in all, words of a strip's segments, width, rows, addresses of words, factors
    float32 [rows], bias or 0, records, y, y's kind (`on_cpu.KINDS`).
    """
    columns, count = LANES // rate, len(slots(rate, state_bits))
    size, room = tokens * count * LANES, 4 * tokens * count * LANES

    @cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
    def multiply(job):
        pieces, length, total, strip, width, rows = job[1], job[2], job[3], job[4], job[5], job[6]
        words, bias, records, y, kind = job[7], job[9], job[10], job[11], job[12]
        factors = carray(as_pointer(job[8]), (rows,), np.float32)
        groups = -(-width // 256)
        stride = 64 + groups * RECORD
        place, tail = scratch(room), scratch(256)
        sums = carray(as_pointer(place), (size,), np.float32)
        while True:
            piece = take(job_address(job))
            if piece >= pieces:
                break
            for segment in range(piece * length, min(total, (piece + 1) * length)):
                own, after = neighbours(words, segment, strip, total, 4 * rate * width)
                for i in range(size):
                    sums[i] = np.float32(0)
                for group in range(groups):
                    used, at = min(256, width - 256 * group), 1024 * rate * group
                    steps, end, record = -(-used // columns), -1, records + 64 + group * RECORD
                    if group == groups - 1:
                        end = steps - 1
                        copy_end(own + at, after + at, 4 * rate * columns * end, rate * (used - columns * end), tail)
                    _multiply(own + at, after + at, record, steps, stride, place, end, tail, rate, state_bits, exact, tokens)
                for token in range(tokens):
                    lift = np.float64(carray(as_pointer(records + stride * token), (1,), np.float32)[0])
                    for word in range(rate):
                        first = -32 * word % rate
                        for n in range(count):
                            row = 32 * segment + (32 * word + first + rate * n) // rate
                            if first + rate * n < 32 and row < rows:
                                found = np.float32(0)
                                for i in range(columns):
                                    found += sums[(token * count + n) * 16 + word * columns + i]
                                value = np.float32(np.float64(found) * np.float64(factors[row]) * lift)
                                put(y, kind, rows * token + row, value, bias, row)

    return Kernel(multiply)
