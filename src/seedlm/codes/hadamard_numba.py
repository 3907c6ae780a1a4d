"""`codes.hadamard` compiled, for rows in memory; the same operations in the same order as there, so the same bits."""

from typing import Any

import numpy as np
from numba import carray, types

from seedlm.codes.compiled import to_machine_code
from seedlm.codes.processor import features
from seedlm.codes.vectors import (
    F32,
    FLOATS,
    LANES,
    as_pointer,
    call,
    constant,
    inner,
    intrinsic,
    job_address,
    literal,
    load,
    read,
    shuffle,
    store,
    take,
    write_bfloat16,
)


@intrinsic(prefer_literal=True)
def _chunk(typingctx, address, size):
    """All strides below a size, which is a constant from 16 to 256, on so many floats, in registers."""
    (count,) = literal(size)

    def codegen(context, builder, sig, args):
        places, fused = range(0, count, LANES), features() & {"fma", "neon"}
        x = [load(builder, args[0], FLOATS, 4 * place) for place in places]
        for stride in (1, 2, 4, 8):
            signs = constant([-1.0 if lane & stride else 1.0 for lane in range(LANES)], F32)
            others = [shuffle(builder, each, [lane ^ stride for lane in range(LANES)]) for each in x]
            if fused:  # to the same bits: a product with 1 or -1 is exact
                x = [call(builder, f"llvm.fma.v{LANES}f32", FLOATS, a, signs, b) for a, b in zip(x, others, strict=True)]
            else:
                x = [builder.fadd(b, builder.fmul(a, signs)) for a, b in zip(x, others, strict=True)]
        stride = 1
        while stride < len(x):
            for i in (i for i in range(len(x)) if not i & stride):
                a, b = x[i], x[i + stride]
                x[i], x[i + stride] = builder.fadd(a, b), builder.fsub(a, b)
            stride *= 2
        for place, each in zip(places, x, strict=True):
            store(builder, each, args[0], 4 * place)
        return context.get_dummy_value()

    return types.void(types.intp, size), codegen


@intrinsic
def _between(typingctx, low, high):
    """One stride on 16 floats and the 16 that they are paired with."""

    def codegen(context, builder, sig, args):
        a, b = (load(builder, address, FLOATS) for address in args)
        store(builder, builder.fadd(a, b), args[0])
        store(builder, builder.fsub(a, b), args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@inner
def butterflies(address, size):
    """Sums and differences at strides 1, 2, 4, ... of float32 [size], a power of two, in place."""
    stride = min(size, 256) if size >= LANES else 1
    if size >= 256:
        for i in range(0, size, 256):
            _chunk(address + 4 * i, 256)
    elif size == 128:
        _chunk(address, 128)
    elif size == 64:
        _chunk(address, 64)
    elif size == 32:
        _chunk(address, 32)
    elif size == 16:
        _chunk(address, 16)
    else:
        x = carray(as_pointer(address), (size,), np.float32)
        while stride < size:
            for i in range(size):
                if not i & stride:
                    a, b = x[i], x[i + stride]
                    x[i], x[i + stride] = a + b, a - b
            stride *= 2
    while stride < size:
        first = 0
        while first < size:  # a range raises where its step is zero, which kernels have no way to
            for i in range(first, first + stride, LANES):
                _between(address + 4 * i, address + 4 * (i + stride))
            first += 2 * stride
        stride *= 2


@inner
def forward(address, width, largest, signs):
    """Transform a row of inputs, float32 [width] at `address`, in place; signs float32 [largest].

    The factor comes first, so that nothing overflows that would not in the end.
    """
    first, size = 0, largest
    while first < width:
        while size > width - first:
            size >>= 1
        x = carray(as_pointer(address + 4 * first), (size,), np.float32)
        factor = np.float32(1.0 / np.sqrt(np.float64(size)))
        for i in range(size):
            x[i] *= signs[i] * factor
        butterflies(address + 4 * first, size)
        first += size


@inner
def inverse(address, width, largest, signs):
    """Undo `forward` on a row of a weight: to the bit what `hadamard.inverse` does."""
    first, size = 0, largest
    while first < width:
        while size > width - first:
            size >>= 1
        x = carray(as_pointer(address + 4 * first), (size,), np.float32)
        factor = np.float32(1.0 / np.sqrt(np.float64(size)))
        butterflies(address + 4 * first, size)
        for i in range(size):
            x[i] = x[i] * factor * signs[i]
        first += size


@inner
def largest_bits(row, width):
    """The bits of the largest magnitude of float32 [width] as an int32: from 0x7F800000 on where one is not finite."""
    bits, largest = carray(as_pointer(row), (width,), np.int32), np.int32(0)
    for i in range(width):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest


@inner
def rotate_row(x, kind, token, width, padded, block, signs, row):
    """Transform a token of x [tokens, width] to float32 [padded] at `row`, zeros behind it.

    kind      of x, as `on_cpu.KINDS`
    returns   a power of two that the row is to be multiplied by: tiny inputs are made larger, so that their scales are no
              subnormal numbers, and huge ones smaller, so that their sums are finite before a weight's scale is applied
    """
    values = carray(as_pointer(row), (padded,), np.float32)
    read(x, kind, width * token, row, width)
    for i in range(width, padded):
        values[i] = np.float32(0)
    largest, lift = largest_bits(row, width), np.float32(1)
    if largest < np.int32(67 << 23):
        lift = np.float32(2.0**-64)
    elif largest >= np.int32(222 << 23):
        lift = np.float32(2.0**64)
    if lift != np.float32(1):
        for i in range(width):
            values[i] *= np.float32(1) / lift
    forward(row, width, block, signs)
    return lift


def rotation() -> Any:
    """Transforms tokens one after another.

    Its job: tokens, x, kind of x, width, block, signs float32 [block], float32 [pieces, width] to work in, y, kind of y,
    pieces. x, signs, y and what to work in are addresses.
    """

    @to_machine_code()
    def rotate(job):
        tokens, x, kind, width, block, y, y_kind, pieces = job[1], job[2], job[3], job[4], job[5], job[8], job[9], job[10]
        signs = carray(as_pointer(job[6]), (block,), np.float32)
        while True:
            piece = take(job_address(job))
            if piece >= pieces:
                break
            row = job[7] + 4 * width * piece
            values = carray(as_pointer(row), (width,), np.float32)
            for token in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
                lift = rotate_row(x, kind, token, width, width, block, signs, row)
                if y_kind == 0:
                    floats = carray(as_pointer(y + 4 * width * token), (width,), np.float32)
                    for i in range(width):
                        floats[i] = values[i] * lift
                else:
                    write_bfloat16(row, y + 2 * width * token, width, lift)

    return rotate
