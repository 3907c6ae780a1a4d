"""What the block code's products on a CPU are given (`numba_product`), and which formats they serve."""

from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from seedlm.codes.block.codec import block_scale
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.block.kernels.tables import bit_string

_LANES: Final = 16
DIGIT: Final = 4


def serves(format: BlockFormat) -> bool:
    """Whether a format's blocks fit 16 lanes: those of all presets do."""
    return (
        format.seed_bits <= 16
        and format.exponent_bits <= DIGIT
        and format.num_coefficients <= 4
        and format.coefficient_bits <= 8
        and format.block_size <= 32
        and format.block_bits <= 64
        and format.block_bits % 2 == 0
    )


def groups(format: BlockFormat, in_features: int) -> int:
    """Groups of 16 blocks of a row."""
    return -(-in_features // (_LANES * format.block_size))


@lru_cache(maxsize=16)
def tables(format: BlockFormat) -> np.ndarray:
    """int32 [string words, digits, 16]: what each digit of a seed adds to the string that begins after one step."""
    digits, count = -(-format.seed_bits // DIGIT), string_words(format.seed_bits, format.block_size, format.num_coefficients)
    images = [
        sum(bit << n for n, bit in enumerate(bit_string(1 << i, 32 * count + 1, format.seed_bits)[1:]))
        for i in range(format.seed_bits)
    ] + [0] * DIGIT
    found = np.zeros((count, digits, 16), np.uint32)
    for digit in range(digits):
        for value in range(16):
            image = 0
            for bit in range(DIGIT):
                if value >> bit & 1:
                    image ^= images[DIGIT * digit + bit]
            found[:, digit, value] = [image >> 32 * word & 0xFFFFFFFF for word in range(count)]
    return found.view(np.int32)


def string_words(seed_bits: int, size: int, coefficients: int) -> int:
    return -(-(size * coefficients - 1 + seed_bits) // 32)


def scales(exponent_bias: int, format: BlockFormat) -> Tensor:
    """float32 [2^exponent_bits]: the scale of every exponent, indexed by its bits read as unsigned."""
    codes = torch.arange(1 << format.exponent_bits)
    half = 1 << (format.exponent_bits - 1)
    return block_scale((codes ^ half) - half, exponent_bias, format)
