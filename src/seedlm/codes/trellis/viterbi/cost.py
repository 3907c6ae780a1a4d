"""What the encoder minimises: weighted squared errors, rounded so that every processor counts them alike and fast.

Sums of float32 squares depend on fused multiply-adds, and 65,536 of them a weight are what encoding costs. So costs are 16-bit
integers, and a GPU computes two of them in three instructions. With t the target in units of the values, n the trellis'
`cost_shift`, s the root of the row's weight (`row_roots`) and float16 numbers rounded to nearest, ties to even,

    x = float16(round(64 * s * clamp(t, -510, 510) / 2^n) / 64)
    d = float16(x - s * value / 2^n)
    branch cost = bits(float16(1024 + d * d)) - bits(float16(1024))

Between 1024 and 2048 neighbouring float16 numbers are 1 apart: up to 1023 the cost is d * d rounded to the nearest integer.
Beyond, it grows by half, a quarter, ... of that, up to 6144 where float16 is infinite. n is chosen such that the usual error
costs some 25; what the rounding does to the error, is in docs/log/encoder.md: nothing that can be measured.

Roots are eighths and scaled values too, so the exact difference is a multiple of 1/64 and exact in float32, and so is
1024 + d * d wherever the cost is below 6144. Therefore float16 arithmetic with fused products, and float32 arithmetic that is
rounded to float16 twice, give the same.

Path costs lie in 0 .. 32767 and stay there: larger sums become 32767, and every `period` rows the least is subtracted.
"""

import torch
from torch import Tensor

from seedlm.codes.trellis.format import Trellis

HIGHEST_PATH_COST = 0x7FFF
HIGHEST_BRANCH_COST = 0x7C00 - 0x6400
FARTHEST = 254
"""Distances d from here on cost the most."""
_OFFSET, _OFFSET_BITS = 1024.0, 0x6400
_CLAMP = 510.0
_ROOTS = (1, 64)
"""Smallest and largest root of a row's weight, in eighths."""


def row_roots(weights: Tensor) -> Tensor:
    """Roots of row weights as the costs take them: eighths from 1/8 to 8.

    weights     float32, at least 0, of any shape: what a row's squared error counts; the usual one should be about 1
    returns     float32 of the same shape
    """
    low, high = _ROOTS
    return (weights.sqrt() * 8).round().clamp(low, high) / 8


def scaled_targets(targets: Tensor, roots: Tensor, trellis: Trellis) -> Tensor:
    """Targets in units of the values and roots, float32 that broadcast -> x as float16."""
    factor = roots * 2.0 ** (6 - trellis.cost_shift)
    return ((targets.clamp(-_CLAMP, _CLAMP) * factor).round() / 64).to(torch.float16)


def branch_costs(targets: Tensor, values: Tensor, roots: Tensor, trellis: Trellis) -> Tensor:
    """Costs of values for targets: x float16, int16 values and float32 roots that broadcast -> int32."""
    exact = targets.float() - roots * (values.float() * 2.0**-trellis.cost_shift)
    difference = exact.to(torch.float16).float()
    return (_OFFSET + difference * difference).to(torch.float16).view(torch.int16).int() - _OFFSET_BITS


def checkpoint_rows(trellis: Trellis) -> int:
    """Rows between the path costs that a kernel keeps. It computes those in between again for the few states that matter."""
    return max(1, 8 // trellis.rate)


def period(trellis: Trellis) -> int:
    """Rows between two subtractions of the least path cost: 8, rounded up to whole checkpoints."""
    step = checkpoint_rows(trellis)
    return -(-8 // step) * step
