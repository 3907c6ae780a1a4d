"""The definition of the block code: how a block is dequantized, how coefficients are rounded, how a candidate is scored.

Everything here is plain torch, written to be read; searches and kernels are checked against it. Three functions are the
definition, and FORMAT.md states them in prose:

    dequantize   w = (sum of (V[c,p] - center) * q[p]) * 2^(e + b) / divisor
    candidates   t = pinv(U) w, then (q, e) near t: either one rounding or all of them around it
    score        ||w - U q 2^(e+b)||^2 - ||w||^2 up to a constant factor, in float64

Scores decide between seeds, so they must come out bit for bit alike on every backend. Therefore sums run over c, then over
p, in ascending order, every product and sum is rounded on its own (no fused multiply-add), and the only table that is not
an integer, pinv, is rounded to float32, which makes its products with float32 weights exact in float64.
Equal reconstructions, such as (0, a, b) at one seed and (a, b, 0) at the next or (q, e) and (2q, e - 1), score exactly alike.
The tie rule: least score, then smallest seed, then smallest exponent, then smallest coefficients, first to last.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm.codes.block import packing
from seedlm.codes.block.basis import Basis, generator, seed_positions
from seedlm.codes.block.format import EXPONENT_BIAS_RANGE, BlockFormat, Rounding, check_rounding


class BlockCodes(NamedTuple):
    """The fields of some blocks: seeds int32 [...], exponents int8 [...], coefficients int8 [..., P]."""

    seeds: Tensor
    exponents: Tensor
    coefficients: Tensor


def dequantize(codes: BlockCodes, exponent_bias: int, format: BlockFormat) -> Tensor:
    """Blocks from their fields (paper Equation 3).

    codes           fields of any leading shape [...]
    exponent_bias   the tensor's bias
    returns         float32 [..., C]: the exact integer sum and the scale 2^(e+b) / divisor, each rounded to float32, multiplied
    """
    matrix = generator(seed_positions(format.seed_bits).to(codes.seeds.device)[codes.seeds.long()], format)
    sums = (matrix * codes.coefficients.unsqueeze(-2).long()).sum(-1)
    return sums.to(torch.float32) * block_scale(codes.exponents, exponent_bias, format).unsqueeze(-1)


def dequantize_rows(words: Tensor, exponent_bias: int, in_features: int, format: BlockFormat) -> Tensor:
    """Rows from packed words: the definition that every kernel is held against.

    words      int32 [out, words]
    returns    float32 [out, in_features]
    """
    codes = BlockCodes(*packing.unpack(words, format.blocks_per_row(in_features), format))
    return dequantize(codes, exponent_bias, format).flatten(1)[:, :in_features]


def block_scale(exponents: Tensor, exponent_bias: int, format: BlockFormat) -> Tensor:
    """float32 of 2^(e+b) * float32(1 / divisor), the scale of a block's integer sums; exponents integer [...]."""
    reciprocal = torch.tensor(1.0 / format.divisor, dtype=torch.float32, device=exponents.device)
    return (reciprocal.double() * power_of_two(exponents.long() + exponent_bias)).float()


def power_of_two(exponents: Tensor) -> Tensor:
    """Exactly 2^e in float64 for int64 exponents in -1022 .. 1023. torch.ldexp goes through pow, which may be off by a bit."""
    return ((exponents + 1023) << 52).view(torch.float64)


def choose_exponent_bias(weight: Tensor, format: BlockFormat) -> int:
    """The bias that puts the largest stored exponent at the tensor's largest magnitude.

    With 2^(x-1) <= max|w| < 2^x the largest exponent, plus bias, is x: coefficients up to 7.5 * max|w| are in reach above, and
    blocks down to 2^-12 of the largest keep full precision below. 0 for a tensor of zeros.
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest == 0.0:
        return 0
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    low, high = EXPONENT_BIAS_RANGE
    return max(low, min(high, int(exponent) - format.exponent_range[1]))


def evaluate(blocks: Tensor, positions: Tensor, exponent_bias: int, format: BlockFormat, basis: Basis, rounding: Rounding):
    """The best coefficients of given seeds for given blocks, and their score: Algorithm 3's inner loop.

    blocks          float64 [..., C], float32 values
    positions       int64 [...], positions of the seeds in the cycle; broadcast against the blocks
    returns         score float64 [...], exponents int64 [...], coefficients int64 [..., P]
    """
    blocks, positions = torch.broadcast_tensors(blocks, positions.unsqueeze(-1))
    positions = positions[..., 0]
    size, coefficients = format.block_size, format.num_coefficients
    pinv = basis.pinv.to(blocks.device)
    matrix = generator(positions, format)
    solution, moments = [], []
    for p in range(coefficients):
        t = blocks[..., 0] * pinv[p, 0][positions].double()
        a = blocks[..., 0] * matrix[..., 0, p].double()
        for c in range(1, size):
            t = t + blocks[..., c] * pinv[p, c][positions].double()
            a = a + blocks[..., c] * matrix[..., c, p].double()
        solution.append(t * format.divisor)
        moments.append(a)

    best: tuple[Tensor, Tensor, Tensor] | None = None
    for exponents, q in _candidates(torch.stack(solution, -1), exponent_bias, format, rounding):
        s = score(matrix, torch.stack(moments, -1), exponents + exponent_bias, q, format)
        if best is None:
            best = (s, exponents, q)
            continue
        better = (s < best[0]) | ((s == best[0]) & _precedes(exponents, q, best[1], best[2]))
        best = (
            torch.where(better, s, best[0]),
            torch.where(better, exponents, best[1]),
            torch.where(better.unsqueeze(-1), q, best[2]),
        )
    assert best is not None
    return best


def score(matrix: Tensor, moments: Tensor, exponents: Tensor, coefficients: Tensor, format: BlockFormat) -> Tensor:
    """(||w - U q 2^E||^2 - ||w||^2) * divisor^2, in float64.

    matrix         int64 [..., C, P], V - center
    moments        float64 [..., P], sum over c of w[c] * matrix[c, p]
    exponents      int64 [...], bias included (E)
    coefficients   int64 [..., P]
    """
    sums = (matrix * coefficients.unsqueeze(-2)).sum(-1)
    norm = (sums[..., 0] * sums[..., 0]).double()
    for c in range(1, format.block_size):
        norm = norm + (sums[..., c] * sums[..., c]).double()
    inner = coefficients[..., 0].double() * moments[..., 0]
    for p in range(1, format.num_coefficients):
        inner = inner + coefficients[..., p].double() * moments[..., p]
    factor = format.divisor * power_of_two(1 - exponents)
    return (norm - factor * inner) * power_of_two(2 * exponents)


def best_exponent(solution: Tensor, exponent_bias: int, format: BlockFormat) -> Tensor:
    """The exponent at which the largest |t| just fits: ceil(log2(max|t| / 7.5)) less the bias, by frexp, clamped to its range.

    solution   float64 [..., P]
    returns    int64 [...]; the smallest exponent where t is zero
    """
    low, high = format.exponent_range
    largest = solution.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest / (format.coefficient_range[1] + 0.5))
    ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent).long() - exponent_bias
    return torch.where(largest == 0, low, ceiling).clamp(low, high)


def _candidates(solution: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding):
    """The (exponent int64 [...], coefficients int64 [..., P]) to score for least-squares solutions float64 [..., P]."""
    check_rounding(rounding)
    start = best_exponent(solution, exponent_bias, format)
    for shift in (0,) if rounding == "nearest" else (-1, 0, 1):
        exponents = (start + shift).clamp(*format.exponent_range)
        scaled = solution * power_of_two(-(exponents + exponent_bias)).unsqueeze(-1)
        if rounding == "nearest":
            yield exponents, scaled.round().clamp(*format.coefficient_range).long()
            continue
        floor = scaled.floor()
        for up in itertools.product((0, 1), repeat=format.num_coefficients):
            q = floor + torch.tensor(up, dtype=torch.float64, device=floor.device)
            yield exponents, q.clamp(*format.coefficient_range).long()


def _precedes(exponents: Tensor, q: Tensor, other_exponents: Tensor, other_q: Tensor) -> Tensor:
    """Whether (e, q) comes before (other e, other q) in the tie rule's order, elementwise."""
    less = exponents < other_exponents
    equal = exponents == other_exponents
    for p in range(q.shape[-1]):
        less = less | (equal & (q[..., p] < other_q[..., p]))
        equal = equal & (q[..., p] == other_q[..., p])
    return less
