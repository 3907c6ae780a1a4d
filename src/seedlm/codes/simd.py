"""Vector registers for numba: 32 lanes of int16 or float32 as values, so that a kernel can keep its state in registers.

Numba vectorises simple loops over arrays, but a recurrence over thousands of steps with 32 independent blocks in the lanes has
its vector loop innermost, and its state would go through memory at every step. These two types are LLVM vectors with the dozen
operations that the seed search uses. They are generic IR, not instructions of one processor: LLVM maps them to what it has
(one 512-bit register on AVX-512, two on AVX2, four on NEON).

Arrays are C-contiguous, offsets count elements, nothing is bounds-checked.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import extending, njit, types
from numba.core import cgutils
from numba.np.arrayobj import make_array

LANES = 32

_NO_WAYS_IN: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(nogil=True, **_NO_WAYS_IN)
"""Compiles what only compiled functions call: ways in from Python and from C take their time to compile too. For the same
reason the searches fill and copy arrays by loops: numba's own slices and arrays double the seconds that it takes."""

intrinsic: Any = extending.intrinsic  # whose type hints do not know that the typing context is not the caller's to give

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_I16V, _I32V, _F32V = (ir.VectorType(t, LANES) for t in (_I16, _I32, _F32))


class _Vector(types.Type):
    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=name)


int16x32 = _Vector("int16x32", _I16V)
float32x32 = _Vector("float32x32", _F32V)


@extending.register_model(_Vector)
class _VectorModel(extending.models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _pointer(context, builder, array_type, array, offset, to: ir.Type) -> ir.Value:
    data = make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


def _splat(builder, value: ir.Value, to: ir.VectorType) -> ir.Value:
    one = builder.insert_element(ir.Constant(to, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(to, ir.Undefined), ir.Constant(ir.VectorType(_I32, to.count), [0] * to.count)
    )


def _const(value: int, to: ir.VectorType = _I32V) -> ir.Constant:
    return ir.Constant(to, [value] * to.count)


@intrinsic
def load(typingctx, array, offset):
    """32 elements of a contiguous int16 or float32 array from `offset` on."""
    vector = int16x32 if array.dtype == types.int16 else float32x32

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], vector.llvm)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, offset, value):
    """Write 32 lanes to a contiguous array from `offset` on."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], value.llvm)
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def splat_pair(typingctx, array, offset):
    """An int16 that stands twice in an element of an int32 array, in all lanes: x86 broadcasts 32 bits for free, not 16."""

    def codegen(context, builder, sig, args):
        pair = builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], _I32))
        return builder.bitcast(_splat(builder, pair, ir.VectorType(_I32, LANES // 2)), _I16V)

    return int16x32(array, types.intp), codegen


@intrinsic
def splat(typingctx, value):
    """A float32 in all lanes."""
    return float32x32(types.float32), lambda context, builder, sig, args: _splat(builder, args[0], _F32V)


@intrinsic
def zero(typingctx):
    """int16 zeros."""
    return int16x32(), lambda context, builder, sig, args: _const(0, _I16V)


@intrinsic
def add(typingctx, a, b):
    """Lane by lane sum, wrapping around."""
    return int16x32(int16x32, int16x32), lambda context, builder, sig, args: builder.add(*args)


@intrinsic
def half(typingctx, a):
    """Arithmetic shift right by one."""
    return int16x32(int16x32), lambda context, builder, sig, args: builder.ashr(args[0], _const(1, _I16V))


_ROUNDING_PRODUCTS = (
    ("avx512bw", "llvm.x86.avx512.pmul.hr.sw.512", 32),
    ("avx2", "llvm.x86.avx2.pmul.hr.sw", 16),
    ("ssse3", "llvm.x86.ssse3.pmul.hr.sw.128", 8),
    ("neon", "llvm.aarch64.neon.sqrdmulh.v8i16", 8),
)
"""Processor feature, instruction and its lanes. LLVM used to recognise the product below, but its own simplifications now hide
it: 41 instead of 6 us a block (EPYC of 2022, LLVM 22)."""


@intrinsic
def mul_q15(typingctx, a, b):
    """Product of two Q15 fractions, rounded to nearest: (a * b + 2^14) >> 15. Not for -1 times -1."""

    def codegen(context, builder, sig, args):
        features = get_host_cpu_features()
        for feature, name, width in _ROUNDING_PRODUCTS:
            if features.get(feature):
                return _in_parts(builder, name, width, args)
        wide = builder.mul(*(builder.sext(x, _I32V) for x in args))
        return builder.trunc(builder.ashr(builder.add(wide, _const(1 << 14)), _const(15)), _I16V)

    return int16x32(int16x32, int16x32), codegen


def _in_parts(builder, name: str, width: int, args) -> ir.Value:
    """Apply an int16 instruction of `width` lanes to all lanes of two vectors."""
    part = ir.VectorType(_I16, width)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(part, [part, part]), name)

    def shuffle(x, y, indices):
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(indices)), indices))

    parts = []
    for first in range(0, LANES, width):
        lanes = list(range(first, first + width))
        parts.append(builder.call(function, [shuffle(x, ir.Constant(_I16V, ir.Undefined), lanes) for x in args]))
    while len(parts) > 1:
        parts = [shuffle(x, y, list(range(2 * x.type.count))) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@intrinsic
def maximum(typingctx, a, b):
    """Lane by lane maximum of int16."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.icmp_signed(">", *args), *args)

    return int16x32(int16x32, int16x32), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    """The sum a * b + c of float32 lanes, fused where the processor can."""

    def codegen(context, builder, sig, args):
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_F32V, [_F32V] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        return builder.call(function, args)

    return float32x32(float32x32, float32x32, float32x32), codegen


@intrinsic
def at_least(typingctx, a, b):
    """Bit i of the uint32 result tells whether lane i of a is >= lane i of b."""

    def codegen(context, builder, sig, args):
        compare = builder.icmp_signed if sig.args[0] == int16x32 else builder.fcmp_ordered
        return builder.bitcast(compare(">=", *args), _I32)

    return types.uint32(a, b), codegen


@intrinsic
def lowest_bit(typingctx, mask):
    """Index of the lowest set bit of a non-zero uint32."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.cttz(args[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.intp(types.uint32), codegen
