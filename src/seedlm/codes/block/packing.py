"""Fields of a block to dense words and back (FORMAT.md, "Packed words").

A block is one little-endian bit field of `format.block_bits` bits, lowest first::

    seed (K bits) | exponent (two's complement) | q[0] | q[1] | ... | q[P-1] (two's complement)

The blocks of a row follow each other with no gap; bit i of the row is bit i % 32 of int32 word i // 32. Only the end of a
row is padded, with zero bits, so rows start at a word and 32 / gcd(32, block_bits) blocks always fill whole words. At
the 4-bit preset a block is exactly one word: the seed in the low half, then e, q0, q1, q2 a nibble each.
"""

import torch
from torch import Tensor

from seedlm.codes.block.format import WORD_BITS, BlockFormat
from seedlm.errors import TensorError

_WORD_MASK = (1 << WORD_BITS) - 1


def pack(seeds: Tensor, exponents: Tensor, coefficients: Tensor, format: BlockFormat) -> Tensor:
    """Pack the fields of all blocks of a matrix into words.

    seeds          integer [out, blocks], 1 .. 2^K - 1
    exponents      integer [out, blocks], in `format.exponent_range`
    coefficients   integer [out, blocks, P], in `format.coefficient_range`
    returns        int32 [out, words]
    Raises TensorError if a shape does not fit or a field is out of range.
    """
    if seeds.dim() != 2 or exponents.shape != seeds.shape or coefficients.shape != (*seeds.shape, format.num_coefficients):
        raise TensorError(
            f"fields must be [out, blocks], [out, blocks] and [out, blocks, {format.num_coefficients}], "
            f"got {[*seeds.shape]}, {[*exponents.shape]} and {[*coefficients.shape]}"
        )
    _check_range("seed", seeds, (1, format.num_seeds))
    _check_range("exponent", exponents, format.exponent_range)
    _check_range("coefficient", coefficients, format.coefficient_range)

    # Two's complement is the value plus half its range with the highest bit flipped: so fields add up, and one XOR flips.
    codes, flips, shift = seeds.to(torch.int64, copy=True), 0, format.seed_bits
    fields = [(exponents, format.exponent_bits)] + [(q, format.coefficient_bits) for q in coefficients.unbind(-1)]
    for values, bits in fields:
        codes.add_(values, alpha=1 << shift)
        shift += bits
        flips |= 1 << (shift - 1)
    codes.add_(flips).bitwise_xor_(flips)

    rows, blocks = codes.shape
    groups = -(-blocks // format.blocks_per_group)
    padded = codes.new_zeros(rows, groups * format.blocks_per_group)
    padded[:, :blocks] = codes
    padded = padded.view(rows, groups, format.blocks_per_group)
    words = []
    for word in range(format.blocks_per_group * format.block_bits // WORD_BITS):
        value = padded.new_zeros(rows, groups)
        for block, offset in _overlaps(word, format):
            part = padded[:, :, block]
            value |= part << offset if offset >= 0 else part >> -offset
        words.append(value & _WORD_MASK)
    row_words = -(-blocks * format.block_bits // WORD_BITS)
    return _to_int32(torch.stack(words, dim=2).view(rows, -1)[:, :row_words])


def unpack(words: Tensor, blocks: int, format: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of all blocks: the inverse of `pack`. Checks shapes only; `check_codes` checks contents.

    words     int32 [out, words]
    blocks    blocks of a row
    returns   seeds int32 [out, blocks], exponents int8 [out, blocks], coefficients int8 [out, blocks, P]
    """
    row_words = -(-blocks * format.block_bits // WORD_BITS)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != row_words:
        raise TensorError(
            f"{blocks} blocks of {format} need int32 words of shape [out, {row_words}], "
            f"got {str(words.dtype).removeprefix('torch.')} {[*words.shape]}"
        )
    rows = words.shape[0]
    group_words = format.blocks_per_group * format.block_bits // WORD_BITS
    groups = -(-blocks // format.blocks_per_group)
    padded = torch.zeros(rows, groups * group_words, dtype=torch.int64, device=words.device)
    padded[:, :row_words] = words.to(torch.int64) & _WORD_MASK
    padded = padded.view(rows, groups, group_words)
    parts = [padded.new_zeros(rows, groups) for _ in range(format.blocks_per_group)]
    for word in range(group_words):
        for block, offset in _overlaps(word, format):
            value = padded[:, :, word]
            parts[block] |= value >> offset if offset >= 0 else value << -offset
    codes = torch.stack(parts, dim=2).view(rows, -1)[:, :blocks]

    shift = format.seed_bits + format.exponent_bits
    seeds = codes & ((1 << format.seed_bits) - 1)
    exponents = _signed(codes >> format.seed_bits, format.exponent_bits)
    shifts = shift + format.coefficient_bits * torch.arange(format.num_coefficients, device=words.device)
    coefficients = _signed(codes.unsqueeze(2) >> shifts, format.coefficient_bits)
    return seeds.to(torch.int32), exponents.to(torch.int8), coefficients.to(torch.int8)


def check_codes(words: Tensor, blocks: int, format: BlockFormat) -> None:
    """Raise TensorError if words hold a zero seed or set padding bits: all that packed words can get wrong.

    words   int32 [out, words], shape as `unpack` wants it
    """
    if _has_zero_seed(words, blocks, format):
        seeds, _, _ = unpack(words, blocks, format)
        zeros = (seeds == 0).nonzero()
        row, block = zeros[0].tolist()
        raise TensorError(f"{len(zeros)} blocks have seed 0, the first at row {row}, block {block}; seeds start at 1")
    used = blocks * format.block_bits % WORD_BITS
    if used and words.numel():
        dirty = ((words[:, -1].to(torch.int64) & _WORD_MASK) >> used).nonzero()
        if len(dirty):
            raise TensorError(f"padding bits must be zero, row {int(dirty[0])} has some set in its last word")


def _has_zero_seed(words: Tensor, blocks: int, format: BlockFormat) -> bool:
    """Whether any seed is zero, without unpacking: it is if its bits are zero in each word that it touches.

    On 2 shared cores 0.3 (4 bits) and 1.7 (3 bits) * 10^9 weights/s, where unpacking takes 0.03: a 7B model in 20 s, not 4 min.
    """
    group_words = format.blocks_per_group * format.block_bits // WORD_BITS
    for position in range(min(blocks, format.blocks_per_group)):
        count = len(range(position, blocks, format.blocks_per_group))
        first = position * format.block_bits
        zero = None
        for word in range(first // WORD_BITS, (first + format.seed_bits - 1) // WORD_BITS + 1):
            low = max(first - word * WORD_BITS, 0)
            high = min(first + format.seed_bits - word * WORD_BITS, WORD_BITS)
            mask = _signed(torch.tensor((1 << high) - (1 << low)), WORD_BITS).to(torch.int32).to(words.device)
            part = (words[:, word::group_words][:, :count] & mask) == 0
            zero = part if zero is None else zero & part
        if zero is not None and bool(zero.any()):
            return True
    return False


def _overlaps(word: int, format: BlockFormat) -> list[tuple[int, int]]:
    """Blocks of a group that share bits with its word number `word`, each with its first bit's offset in that word."""
    start = word * WORD_BITS
    first, last = start // format.block_bits, (start + WORD_BITS - 1) // format.block_bits
    return [(block, block * format.block_bits - start) for block in range(first, last + 1)]


def _signed(value: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits of int64 values, read as two's complement."""
    half = 1 << (bits - 1)
    return ((value & ((1 << bits) - 1)) ^ half) - half


def _to_int32(value: Tensor) -> Tensor:
    """int64 values in 0 .. 2^32 - 1 to the int32 with the same bits."""
    half = 1 << (WORD_BITS - 1)
    return ((value ^ half) - half).to(torch.int32)


def _check_range(name: str, values: Tensor, allowed: tuple[int, int]) -> None:
    if values.is_floating_point() or values.dtype == torch.bool:
        raise TensorError(f"{name}s must be integers, got {values.dtype}")
    if not values.numel():
        return
    least, most = torch.stack(values.aminmax()).tolist()  # one wait for a device, not two
    if least < allowed[0] or most > allowed[1]:
        raise TensorError(f"{name}s must be {allowed[0]} .. {allowed[1]}, got {least} .. {most}")
