"""One more operation on the vector registers of `seedlm.codes.simd`: the branch costs of a value for 32 targets."""

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, get_process_triple
from numba import types
from numba.core import cgutils

from seedlm.codes.simd import LANES, float32x32, int16x32, intrinsic

_F32V = ir.VectorType(ir.FloatType(), LANES)
_F16V = ir.VectorType(ir.HalfType(), LANES)
_I16V = ir.VectorType(ir.IntType(16), LANES)


def reason_unavailable() -> str | None:
    """Why this processor has no conversion to half precision, or None."""
    if not get_process_triple().startswith("x86_64") or get_host_cpu_features().get("f16c"):
        return None
    return "the processor has no half-precision conversion (F16C)"


def _all(value: float, to: ir.VectorType) -> ir.Constant:
    return ir.Constant(to, [value] * LANES)


@intrinsic
def negative_costs(typingctx, targets, roots, value):
    """Minus the branch costs (`cost.branch_costs`) of a value for 32 targets and roots, all in the scaled unit, in float32.

    Before each conversion everything is exact, so it does not matter whether products are fused with sums.
    """

    def codegen(context, builder, sig, args):
        targets, roots, value = args
        one = builder.insert_element(ir.Constant(_F32V, ir.Undefined), builder.fneg(value), ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        minus = builder.shuffle_vector(one, ir.Constant(_F32V, ir.Undefined), everywhere)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_F32V, [_F32V] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        exact = builder.call(function, [roots, minus, targets])
        difference = builder.fpext(builder.fptrunc(exact, _F16V), _F32V)
        square = builder.call(function, [difference, difference, _all(1024.0, _F32V)])
        bits = builder.bitcast(builder.fptrunc(square, _F16V), _I16V)
        return builder.sub(_all(0x6400, _I16V), bits)

    return int16x32(float32x32, float32x32, types.float32), codegen
