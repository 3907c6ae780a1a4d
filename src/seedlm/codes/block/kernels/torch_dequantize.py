"""The definition (`codec.dequantize`) in operations that any device can queue: it never waits for one.

The definition takes the exponent bias as a number and copies its tables to the device at every call; both would stop a CUDA
graph. Here bias and tables are tensors on the device already, and the arithmetic is the same, operation for operation: an
exact integer sum and a scale, each rounded to float32, multiplied. Weights are formed some rows at a time, since a weight's
intermediate values take 60 bytes.
"""

import struct
from functools import lru_cache

import torch
from torch import Tensor

from seedlm.codes.block import packing
from seedlm.codes.block.basis import cycle_states, seed_positions
from seedlm.codes.block.codec import power_of_two
from seedlm.codes.block.format import BlockFormat

PIECE = {"cpu": 1 << 20}
_PIECE_ELSEWHERE = 1 << 23
"""Weights formed at a time: 60 MB of intermediate values on the CPU, 0.5 GB on other devices, where launches count."""


@lru_cache(maxsize=8)
def tables(seed_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One cycle of the register, and where each seed stands in it: int32 [2^K - 1] and int32 [2^K], on the device."""
    with torch.inference_mode(False):
        positions = seed_positions(seed_bits)
        cycle = cycle_states(seed_bits)[: len(positions) - 1]
        return cycle.to(device, torch.int32), positions.to(device, torch.int32)


def dequantize(
    words: Tensor,
    exponent_bias: Tensor,
    cycle: Tensor,
    positions: Tensor,
    in_features: int,
    format: BlockFormat,
    dtype: torch.dtype,
) -> Tensor:
    """Weights from packed words.

    words              int32 [out, words]
    exponent_bias      int32 [1]
    cycle, positions   of `tables`, on the words' device, like all the rest
    returns            [out, in_features] in `dtype`: float32, rounded once
    """
    weight = words.new_empty(words.shape[0], in_features, dtype=dtype)
    rows = max(1, PIECE.get(words.device.type, _PIECE_ELSEWHERE) // in_features)
    for first in range(0, words.shape[0], rows):
        piece = words[first : first + rows]
        weight[first : first + rows] = _rows(piece, exponent_bias, cycle, positions, in_features, format)
    return weight


def _rows(
    words: Tensor, exponent_bias: Tensor, cycle: Tensor, positions: Tensor, in_features: int, format: BlockFormat
) -> Tensor:
    """float32 [rows, in_features] of some rows."""
    seeds, exponents, coefficients = packing.unpack(words, format.blocks_per_row(in_features), format)
    size, count = format.block_size, format.num_coefficients
    steps = torch.arange(1, size * count + 1, device=words.device)
    window = (positions[seeds.long()].unsqueeze(-1) + steps) % format.num_seeds
    matrix = (cycle[window].long() - format.center).unflatten(-1, (size, count))
    sums = (matrix * coefficients.unsqueeze(-2).long()).sum(-1).to(torch.float32)
    (reciprocal,) = struct.unpack("f", struct.pack("f", 1.0 / format.divisor))
    scale = (power_of_two(exponents.long() + exponent_bias.long()) * reciprocal).float()
    return (sums * scale.unsqueeze(-1)).flatten(1)[:, :in_features]
