"""How activations lie in memory for a few tokens' products on a CPU (`numba_product`), and how many of these go at once."""

from typing import Final

from seedlm.codes.processor import byte_products, features

GROUP: Final = 256
"""Columns that share a scale."""

LEVELS: Final = (1 << 14) - 1
"""The largest activation: int32 has room for 256 times 510 times this."""

PADDED: Final = GROUP + 16
INTEGERS: Final = 64
RECORD: Final = INTEGERS + 2 * PADDED + 32
"""Bytes of a group's activations: its scale, what its sums are too small by, then its integers and zeros behind them."""

HEADER: Final = 64
"""Bytes before a token's records: a power of two that its products are multiplied by."""


def groups(width: int) -> int:
    return -(-width // GROUP)


def records(width: int) -> int:
    """Bytes of a token's activations."""
    return HEADER + groups(width) * RECORD


def workspace(width: int) -> int:
    """Bytes for a token's activations, and for the floats that they are made from, which lie behind those of all tokens."""
    return records(width) + 4 * GROUP * groups(width)


def floats(width: int) -> int:
    """How many a norm or a gate is worked with (`numba_source`); what it makes are the first of them."""
    return 2 * width


def in_pairs() -> bool:
    """Whether `numba_pairs` multiplies."""
    return byte_products() == "vnni512" and features() >= {"avx512vbmi", "avx512bw"}


def at_once() -> int:
    """Tokens that share the decoding of a weight: more have no registers for their sums."""
    return 8 if in_pairs() else 4
