"""GF(2)-linear tables of the fused products, derived from the register by running it on single seed bits.

The bit string of a seed (its K bits, then the bits the register feeds back) is linear over GF(2) in the seed: its image is
the XOR of the images of the seed's set bits. So is every arrangement of such bits in words. A kernel gets the images of
the K single-bit seeds, builds a table for each byte of the seed, and XORs two entries.
"""

from seedlm.codes.block import lfsr
from seedlm.codes.block.format import BlockFormat


def bit_string(seed: int, length: int, bits: int) -> list[int]:
    """The first `length` bits of a seed's string: bit n is the lowest bit of the register after n steps."""
    return [state & 1 for state in [seed, *lfsr.states(seed, length - 1, bits)]]


def byte_entries(format: BlockFormat) -> list[list[int]]:
    """For each seed bit, words whose byte c holds the P bits that weight c adds to the string, at its top."""
    k, c, p = format.seed_bits, format.block_size, format.num_coefficients
    entries = []
    for bit in range(k):
        string = bit_string(1 << bit, k + c * p, k)
        tops = [sum(string[k + p * i + j] << (8 - p + j) for j in range(p)) for i in range(c)]
        words = [sum(top << 8 * j for j, top in enumerate(tops[i : i + 4])) for i in range(0, c, 4)]
        entries.append(words + [0] * ((2 if c <= 8 else 4) - len(words)))
    return entries


def half_entries(format: BlockFormat) -> list[list[int]]:
    """For each seed bit, words of two half words, one a weight.

    Bits 10 down to 0 are the 11 bits of state V[c, 0] below its highest, each XOR the highest; bit 15 is the highest;
    bit 10 + j is the bit that state V[c, j] adds. The kernel flips bits 15 and 10 .. 0: so they are sign and magnitude.
    """
    k, c, p = format.seed_bits, format.block_size, format.num_coefficients
    entries = []
    for bit in range(k):
        string = bit_string(1 << bit, k + c * p, k)
        halves = []
        for i in range(c):
            top = k + p * i
            half = string[top] << 15 | sum((string[top - 11 + n] ^ string[top]) << n for n in range(11))
            halves.append(half | sum(string[top + j] << 10 + j for j in range(1, p)))
        words = [halves[i] | halves[i + 1] << 16 for i in range(0, c, 2)]
        entries.append(words + [0] * (-len(words) % 4))
    return entries


def initializer(entries: list[list[int]]) -> str:
    """Entries as the text of a C initializer, without the outer braces."""
    return ",".join("{" + ",".join(f"{word:#010x}u" for word in entry) + "}" for entry in entries)
