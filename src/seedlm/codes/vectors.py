"""LLVM code for kernels that work on memory by address.

Kernels that multiply are emitted as LLVM's own code, 16 lanes at a time, and called from functions that numba compiles: so a
loop keeps its sums in registers and uses the instructions that add products of bytes, and no machine needs a compiler. Vectors
are generic: LLVM cuts 16 lanes into what the processor has (one register of AVX-512, two of AVX2, four of NEON).

Nothing here is bounds-checked; addresses are integers, offsets count bytes.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import carray, extending, types
from numba.core import cgutils

from seedlm.codes.compiled import inner

LANES: Final = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
INTS, FLOATS, BYTES = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES), ir.VectorType(I8, 4 * LANES)

intrinsic: Any = extending.intrinsic


def pointer(builder, address: ir.Value, to: ir.Type, offset: int = 0) -> ir.Value:
    """A typed pointer, `offset` bytes after an address."""
    if offset:
        address = builder.add(address, ir.Constant(I64, offset))
    return builder.inttoptr(address, to.as_pointer())


def load(builder, address: ir.Value, of: ir.Type, offset: int = 0) -> ir.Value:
    """A value of any type from an address of any alignment."""
    return builder.load(pointer(builder, address, of, offset), align=1)


def store(builder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    builder.store(value, pointer(builder, address, value.type, offset), align=1)


def constant(values: Sequence[float], of: ir.Type = I32) -> ir.Constant:
    return ir.Constant(ir.VectorType(of, len(values)), list(values))


def splat(builder, value: ir.Value, lanes: int = LANES) -> ir.Value:
    """A scalar in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, ir.Constant(I32, 0)), [0] * lanes)


def shuffle(builder, value: ir.Value, lanes: Sequence[int], other: ir.Value | None = None) -> ir.Value:
    """Lanes of a vector, or of two: those of `other` are counted on."""
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined) if other is None else other, constant(lanes))


def call(builder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """One of LLVM's functions by name."""
    kind = ir.FunctionType(result, [each.type for each in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def in_parts(builder, name: str, part: ir.VectorType, *arguments: ir.Value) -> ir.Value:
    """An instruction on registers, applied to all of longer vectors. `part` is what it returns, of a register's size."""
    count = arguments[0].type.count * arguments[0].type.element.width // (part.count * part.element.width)
    pieces = []
    for n in range(count):
        cut = []
        for value in arguments:
            size = value.type.count // count
            cut.append(shuffle(builder, value, range(n * size, (n + 1) * size)))
        pieces.append(call(builder, name, part, *cut))
    while len(pieces) > 1:
        pieces = [shuffle(builder, x, range(2 * x.type.count), y) for x, y in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


def literal(*arguments: types.Type) -> list[Any]:
    """The values of arguments that have to be constants where an intrinsic is called."""
    return [argument.literal_value for argument in arguments]  # type: ignore[attr-defined]


@intrinsic
def as_pointer(typingctx, address):
    """An address as what `numba.carray` takes."""
    return types.voidptr(types.intp), lambda context, builder, sig, args: builder.inttoptr(args[0], I8.as_pointer())


@intrinsic
def job_address(typingctx, job):
    """The address of a job's first number (`threads.Kernel`)."""
    return types.intp(job), lambda context, builder, sig, args: builder.ptrtoint(args[0], I64)


@intrinsic
def take(typingctx, address):
    """The int64 at an address, which is one more afterwards: no two threads are given the same."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), ir.Constant(I64, 1), "monotonic")

    return types.intp(types.intp), codegen


@intrinsic(prefer_literal=True)
def scratch(typingctx, size):
    """The address of so many bytes (a constant) that live as long as the function runs."""
    (count,) = literal(size)

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():  # numba's own way also clears them, byte by byte
            place = builder.alloca(ir.ArrayType(I8, count))
        return builder.ptrtoint(place, I64)

    return types.intp(size), codegen


@intrinsic
def from_bits(typingctx, bits):
    """The float32 of an int32's bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], F32)


@intrinsic
def to_bits(typingctx, value):
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], I32)


@inner
def exponential(x):
    """The exponential of a float32, to 3e-7 of itself; between exp(-87) and exp(88), however far x is beyond. NaN is not kept.

    2^n times a polynomial, so that LLVM makes vectors of loops, which libm's function would not let it.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.rint(x * np.float32(1.44269504))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.0 / 5040)
    p = p * f + np.float32(1.0 / 720)
    p = p * f + np.float32(1.0 / 120)
    p = p * f + np.float32(1.0 / 24)
    p = p * f + np.float32(1.0 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return p * from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@inner
def to_bfloat16(value):
    """The uint16 bits of a float32 rounded to bfloat16, halves to even."""
    bits = np.uint32(to_bits(value))
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@intrinsic
def _narrow(typingctx, source, target, factor):
    """`to_bfloat16` of 16 floats times a factor."""

    def codegen(context, builder, sig, args):
        x = builder.fmul(load(builder, args[0], FLOATS), splat(builder, args[2]))
        bits = builder.bitcast(x, INTS)
        odd = builder.and_(builder.lshr(bits, constant([16] * LANES)), constant([1] * LANES))
        rounded = builder.lshr(builder.add(builder.add(bits, constant([0x7FFF] * LANES)), odd), constant([16] * LANES))
        rounded = builder.select(builder.fcmp_unordered("uno", x, x), constant([0x7FC0] * LANES), rounded)
        store(builder, builder.trunc(rounded, ir.VectorType(I16, LANES)), args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), codegen


@intrinsic
def _widen(typingctx, source, target):
    """The floats of 16 bfloat16."""

    def codegen(context, builder, sig, args):
        bits = builder.zext(load(builder, args[0], ir.VectorType(I16, LANES)), INTS)
        store(builder, builder.shl(bits, constant([16] * LANES)), args[1])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@inner
def write_bfloat16(source, target, count, factor):
    """Write float32 [count] at an address, times a factor, as bfloat16 to another."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        _narrow(source + 4 * i, target + 2 * i, factor)
    floats, halves = carray(as_pointer(source), (count,), np.float32), carray(as_pointer(target), (count,), np.uint16)
    for i in range(whole, count):
        halves[i] = to_bfloat16(floats[i] * factor)


@inner
def read_bfloat16(source, target, count):
    """Write bfloat16 [count] at an address as float32 to another."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        _widen(source + 2 * i, target + 4 * i)
    halves, bits = carray(as_pointer(source), (count,), np.uint16), carray(as_pointer(target), (count,), np.int32)
    for i in range(whole, count):
        bits[i] = np.int32(np.uint32(halves[i]) << np.uint32(16))


@inner
def read(x, kind, index, target, count):
    """Write x[index] and on, of `put`'s kinds, as float32 [count] to an address."""
    if kind == 0:
        source, values = (
            carray(as_pointer(x + 4 * index), (count,), np.float32),
            carray(as_pointer(target), (count,), np.float32),
        )
        for i in range(count):
            values[i] = source[i]
    else:
        read_bfloat16(x + 2 * index, target, count)


@inner
def put(y, kind, index, value, bias, row):
    """Write float32 value, plus bias[row] unless the address of bias is 0, to y[index]; kind 0 is float32, 1 bfloat16."""
    if kind == 0:
        if bias:
            value += carray(as_pointer(bias + 4 * row), (1,), np.float32)[0]
        carray(as_pointer(y + 4 * index), (1,), np.float32)[0] = value
        return
    if bias:
        value += from_bits(np.int32(carray(as_pointer(bias + 2 * row), (1,), np.uint16)[0]) << np.int32(16))
    carray(as_pointer(y + 2 * index), (1,), np.uint16)[0] = to_bfloat16(value)


@inner
def write(values, y, kind, index, bias, row, count):
    """`put` float32 [count], from an address, to y[index] and on, with bias[row] and on."""
    floats = carray(as_pointer(values), (count,), np.float32)
    if kind == 0:
        if bias:
            added = carray(as_pointer(bias + 4 * row), (count,), np.float32)
            for i in range(count):
                floats[i] += added[i]
        target = carray(as_pointer(y + 4 * index), (count,), np.float32)
        for i in range(count):
            target[i] = floats[i]
        return
    if bias:
        halves = carray(as_pointer(bias + 2 * row), (count,), np.uint16)
        for i in range(count):
            floats[i] += from_bits(np.int32(np.uint32(halves[i]) << np.uint32(16)))
    write_bfloat16(values, y + 2 * index, count, np.float32(1))
