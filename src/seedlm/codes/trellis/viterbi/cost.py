"""What the encoder minimises: squared errors, rounded so that every processor counts them alike and fast.

Sums of float32 squares depend on fused multiply-adds, and 65,536 of them a weight are what encoding costs. So costs are 16-bit
integers, and a GPU computes two of them in three instructions. With x the target in units of the values, n the trellis'
`cost_shift` and float16 arithmetic rounding to nearest even,

    x' = float16(round(8 * clamp(x, -510, 510) / 2^n)) / 8
    d  = x' - value / 2^n
    branch cost = bits(float16(1024 + d * d)) - bits(float16(1024))

Between 1024 and 2048 neighbouring float16 numbers are 1 apart: up to 1023 the cost is d * d rounded to the nearest integer.
Beyond, it grows by half, a quarter, ... of that, up to 6144 where float16 is infinite. n is chosen such that the usual error
costs some 25, and costs are exact in the sense that counts (`docs/log/encoder.md` has what the rounding does to the error).

d is exact wherever the cost is below 6144, and so is 1024 + d * d in float32: multiples of 1/64 below 65536. Therefore the
cost is the same whether computed in float16 with one rounding (fused), or in float32 and rounded to float16.

Path costs lie in 0 .. 32767 and stay there: larger sums become 32767, and every `period` rows the least is subtracted.
"""

import torch
from torch import Tensor

from seedlm.codes.trellis.format import Trellis

HIGHEST_PATH_COST = 0x7FFF
HIGHEST_BRANCH_COST = 0x7C00 - 0x6400
_OFFSET, _OFFSET_BITS = 1024.0, 0x6400
_CLAMP = 510.0


def scaled_targets(targets: Tensor, trellis: Trellis) -> Tensor:
    """Targets float32 in units of the values -> x' as float16, same shape."""
    eighths = (targets.clamp(-_CLAMP, _CLAMP) * 2.0 ** (3 - trellis.cost_shift)).round()
    return (eighths.to(torch.float16).float() / 8).to(torch.float16)


def branch_costs(targets: Tensor, values: Tensor, trellis: Trellis) -> Tensor:
    """Costs of values for targets: x' float16 and int16 values that broadcast -> int32."""
    difference = targets.float() - values.float() * 2.0**-trellis.cost_shift
    return (_OFFSET + difference * difference).to(torch.float16).view(torch.int16).int() - _OFFSET_BITS


def checkpoint_rows(trellis: Trellis) -> int:
    """Rows between the path costs that a kernel keeps. It computes those in between again for the few states that matter."""
    return max(1, 8 // trellis.rate)


def period(trellis: Trellis) -> int:
    """Rows between two subtractions of the least path cost: 8, rounded up to whole checkpoints."""
    step = checkpoint_rows(trellis)
    return -(-8 // step) * step
