"""Codes with every field uniform over its range, for what reads codes and does not care which weight they came from."""

import torch

from seedlm.codes.block import packing
from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import BlockFormat


def random_codes(format: BlockFormat, *shape: int, seed: int = 0) -> BlockCodes:
    """Fields of blocks [*shape]; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)

    def field(low: int, high: int, *more: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high + 1, (*shape, *more), generator=generator).to(dtype)

    return BlockCodes(
        field(1, format.num_seeds, dtype=torch.int32),
        field(*format.exponent_range),
        field(*format.coefficient_range, format.num_coefficients),
    )


def random_words(format: BlockFormat, out: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """The packed words int32 [out, words] of a weight [out, in_features]."""
    return packing.pack(*random_codes(format, out, format.blocks_per_row(in_features), seed=seed), format)
