"""Which block formats there are under a budget of bits a weight. Imports no torch."""

import itertools
import math
from typing import Final

from seedlm.codes.block.format import MAX_BLOCK_BITS, BlockFormat
from seedlm.errors import FormatError

SEED_BITS: Final = (4, 16)
"""Registers to consider: the fast searches end at 16 bits, and below 4 there is next to nothing to choose from."""
MAX_COEFFICIENTS: Final = 8
COEFFICIENT_BITS: Final = (2, 8)
EXPONENT_BITS: Final = (2, 4)
WIDTH: Final = 64
"""Weights of a sample: the longest block there is. A format of C weights a block is measured on the first C."""


def candidates(bits: float, *, max_block: int = WIDTH, seed_bits: tuple[int, int] = SEED_BITS) -> list[BlockFormat]:
    """Block formats of at most `bits` bits a weight, less those whose every code a format of the list has as well.

    For given C, P, coefficient and exponent bits the rest of the budget goes to the seed. Beyond the longest register a spare
    bit would go to the exponent and P spare bits to the coefficients, whose wider ranges contain the narrower ones.
    Raises FormatError if the budget allows no block at all.
    """
    if not math.isfinite(bits):
        raise FormatError(f"a budget must be a number of bits a weight, got {bits}")
    found = []
    for c, p, q, e in itertools.product(
        range(2, max_block + 1),
        range(1, MAX_COEFFICIENTS + 1),
        range(COEFFICIENT_BITS[0], COEFFICIENT_BITS[1] + 1),
        range(EXPONENT_BITS[0], EXPONENT_BITS[1] + 1),
    ):
        rest = math.floor(bits * c + 1e-9) - e - p * q
        k = min(rest, seed_bits[1])
        spare = rest - k
        if p >= c or k < seed_bits[0] or k + e + p * q > MAX_BLOCK_BITS or spare >= p or (spare and e < EXPONENT_BITS[1]):
            continue
        found.append(BlockFormat(seed_bits=k, block_size=c, num_coefficients=p, coefficient_bits=q, exponent_bits=e))
    if not found:
        raise FormatError(f"no block format has {bits} bits a weight or less; try 1 to 8")
    return found
