"""The hardware's arithmetic in integers: what every simulation is compared with, bit for bit.

Products are sums of integers in one unit, so a row is a Python integer whatever the order; only `align` and `to_float32` round.
Against the product of the decoded weights and the FP16 activations in real numbers, with X_k the power of two above the largest
|x| of block k (`error_bound`):

    |y - sum w x|  <=  sum over blocks of 2^-18 * X_k * sum |w|   (alignment)   +   2^-24 * 1.02 * |y|   (float32)
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seedlm.codes.block import packing
from seedlm.codes.block.basis import generator, seed_positions
from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import BlockFormat
from seedlm.errors import TensorError
from seedlm.rtl.design import Design, SeedDesign

FRACTION_BITS = 32
"""Leading bits of a row's sum that its float is made from (`result`)."""


class Aligned(NamedTuple):
    """Activations on chip: mantissas int64 [blocks, C], shared int64 [blocks], and whether one was Inf or NaN."""

    mantissas: np.ndarray
    shared: np.ndarray
    invalid: bool


def align(x: np.ndarray, block_size: int) -> Aligned:
    """Block floating point of FP16 activations: x ~= mantissa * 2^(shared - 30).

    x          float16 [columns]
    returns    blocks of C, the last one padded with zeros
    """
    if x.dtype != np.float16 or x.ndim != 1:
        raise TensorError(f"activations must be float16 of one dimension, got {x.dtype} {[*x.shape]}")
    padded = np.zeros(-(-len(x) // block_size) * block_size, np.int64)
    padded[: len(x)] = x.view(np.uint16)
    bits = padded.reshape(-1, block_size)
    field = bits >> 10 & 31
    exponent = np.maximum(field, 1) - 1
    significand = (bits & 1023) | (field > 0) << 10
    shared = exponent.max(1)
    magnitude = ((significand << 7 >> (shared[:, None] - exponent)) + 1) >> 1
    return Aligned(np.where(bits >> 15, -magnitude, magnitude), shared, bool((field == 31).any()))


def block_sums(codes: BlockCodes, format: BlockFormat) -> Tensor:
    """The decoder's integers, int64 [..., C]: `codec.dequantize` before its scale."""
    matrix = generator(seed_positions(format.seed_bits)[codes.seeds.long()], format)
    return (matrix * codes.coefficients.unsqueeze(-2).long()).sum(-1)


def product(design: Design, weights: Tensor, x: np.ndarray, bias: int = 0) -> np.ndarray:
    """What the hardware streams out for a product.

    weights    SeedDesign: packed words int32 [out, words]; HalfDesign: float16 [out, columns]
    x          float16 [columns]
    returns    float32 [out], its bits exactly the hardware's
    """
    aligned = align(x, design.block_size)
    if isinstance(design, SeedDesign):
        totals = _seed_totals(design.format, weights, aligned)
        invalid = [aligned.invalid] * len(totals)
    else:
        totals, bad = _half_totals(weights, aligned)
        invalid = [aligned.invalid or b for b in bad]
    return np.array([to_float32(t, bias, design, i) for t, i in zip(totals, invalid, strict=True)], np.uint32).view(np.float32)


def _seed_totals(format: BlockFormat, words: Tensor, aligned: Aligned) -> list[int]:
    blocks = len(aligned.shared)
    totals = [0] * len(words)
    for start in range(0, len(words), 64):  # bounds the memory of the states
        codes = BlockCodes(*packing.unpack(words[start : start + 64], blocks, format))
        products = (block_sums(codes, format).numpy() * aligned.mantissas).sum(-1)
        shifts = codes.exponents.numpy().astype(np.int64) - format.exponent_range[0] + aligned.shared
        for i, total in enumerate(_shifted_sums(products, shifts)):
            totals[start + i] = total
    return totals


def _half_totals(weights: Tensor, aligned: Aligned) -> tuple[list[int], list[bool]]:
    if weights.dtype != torch.float16:
        raise TensorError(f"weights must be float16, got {str(weights.dtype).removeprefix('torch.')}")
    size = aligned.mantissas.shape[1]
    bits = np.zeros((len(weights), aligned.mantissas.size), np.int64)
    bits[:, : weights.shape[1]] = weights.numpy().view(np.uint16)
    field = bits >> 10 & 31
    magnitude = (bits & 1023) | (field > 0) << 10
    products = np.where(bits >> 15, -magnitude, magnitude) * aligned.mantissas.reshape(-1)
    shifts = np.maximum(field, 1) - 1 + np.repeat(aligned.shared, size)
    return _shifted_sums(products, shifts), (field == 31).any(1).tolist()


def _shifted_sums(products: np.ndarray, shifts: np.ndarray) -> list[int]:
    """For each row, the sum of products << shifts as a Python integer; int64 sums per shift stay far from overflow."""
    totals = [0] * len(products)
    for shift in np.unique(shifts):
        for row, part in enumerate(np.where(shifts == shift, products, 0).sum(1).tolist()):
            totals[row] += part << int(shift)
    return totals


def to_float32(total: int, bias: int, design: Design, invalid: bool = False) -> int:
    """float32 bits of total * 2^(bias + exponent_offset) / divisor, as `result.ToFloat` makes them."""
    sign = int(total < 0) << 31
    magnitude = abs(total)
    if invalid:
        return 0x7FC00000
    if magnitude == 0:
        return sign
    lead = magnitude.bit_length() - 1
    below = FRACTION_BITS - 1 - lead
    fraction = magnitude << below if below >= 0 else magnitude >> -below
    exponent = lead + bias + design.exponent_offset + 127
    shift = design.divisor_bits
    if shift > 1:
        exponent -= shift
        while shift < FRACTION_BITS:
            fraction += fraction >> shift
            shift *= 2
    if fraction >> FRACTION_BITS:
        fraction >>= 1
        exponent += 1
    rounded = (fraction + (1 << FRACTION_BITS - 25)) >> FRACTION_BITS - 24
    exponent += rounded >> 24
    if exponent < 1:
        return sign
    if exponent > 254:
        return sign | 0x7F800000
    return sign | exponent << 23 | rounded & 0x7FFFFF


def error_bound(design: Design, magnitudes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The bound of this file's head, for finite results in float32's normal range.

    magnitudes   float64 [out, columns], |w|
    x            float16 [columns]
    y            float32 [out]
    returns      float64 [out]
    """
    aligned = align(x, design.block_size)
    half_unit = np.ldexp(0.5, aligned.shared - 30)
    per_column = np.repeat(half_unit, design.block_size)[: len(x)]
    return magnitudes @ per_column + 2.0**-24 * 1.02 * np.abs(y.astype(np.float64))
