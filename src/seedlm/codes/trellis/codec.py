"""The definition of the trellis code in plain torch: what a stream of bits means.

For one column, the words of a strip's segments one after another are a stream of R * T bits; bit i is bit i % 32 of word
i // 32. The stream is cyclic. Row t has the state

    s_t = bits R*t .. R*t + L-1, lowest first          s_{t+1} = (s_t >> R) | new << (L - R)

and its value is an integer that looks random: the sum of the four bytes of s_t * multiplier (mod 2^32), less 510, the mean of
four random bytes. Times its row's scale it is a weight in the transformed basis (`seedlm.codes.hadamard`):

    w_rot[r, c] = float32(value) * (float32(scales[r]) * scale)          each product rounded once, in float32

Neighbouring rows share L - R bits of their states, so nothing but R new bits a weight is stored, and any weight is computed
from its own window alone. Kernels and searches are checked against these functions.
"""

import torch
from torch import Tensor

from seedlm.codes import hadamard
from seedlm.codes.trellis.format import SEGMENT_ROWS, Trellis, TrellisFormat

VALUE_CENTER = 510
"""Subtracted from a byte sum; values lie in -510 .. 510."""

VALUE_STD = 147.80
"""Standard deviation of the sum of four uniform bytes: sqrt(4 * (256^2 - 1) / 12)."""

_ROW_VALUES = 1 << 22
"""Values of looked-up rows that are decoded at a time, in int64."""


def state_values(states: Tensor, multiplier: int) -> Tensor:
    """Values of states: integer of any shape -> int16 of that shape, in -510 .. 510."""
    mixed = (states.long() * multiplier) & 0xFFFFFFFF
    total = (mixed & 255) + (mixed >> 8 & 255) + (mixed >> 16 & 255) + (mixed >> 24)
    return (total - VALUE_CENTER).to(torch.int16)


def value_table(trellis: Trellis, device: torch.device | str = "cpu") -> Tensor:
    """int16 [2^L]: the value of every state."""
    return state_values(torch.arange(trellis.states, device=device), trellis.multiplier)


def pack(symbols: Tensor, rate: int) -> Tensor:
    """Streams from the R bits of each row.

    symbols     integer [..., T], each in 0 .. 2^R - 1, the lowest R bits of the row's state; T a multiple of 32
    returns     int32 [..., T * R / 32]
    """
    bits = (symbols.long().unsqueeze(-1) >> torch.arange(rate, device=symbols.device)) & 1
    words = (bits.flatten(-2).unflatten(-1, (-1, 32)) << torch.arange(32, device=symbols.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: Tensor, rate: int) -> Tensor:
    """The inverse of `pack`: int32 [..., T * R / 32] -> int64 [..., T]."""
    bits = (words.long().unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1
    return (bits.flatten(-2).unflatten(-1, (-1, rate)) << torch.arange(rate, device=words.device)).sum(-1)


def windows(symbols: Tensor, rate: int, state_bits: int) -> Tensor:
    """States of cyclic streams: int64 [..., T] symbols -> int64 [..., T] states."""
    states = torch.zeros_like(symbols, dtype=torch.int64)
    for k in range(-(-state_bits // rate)):
        states += symbols.long().roll(-k, -1) << (rate * k)
    return states & ((1 << state_bits) - 1)


def decode_streams(words: Tensor, trellis: Trellis) -> Tensor:
    """Values of whole streams: int32 [..., T * R / 32] -> int16 [..., T]."""
    return state_values(windows(unpack(words, trellis.rate), trellis.rate, trellis.state_bits), trellis.multiplier)


def decode_values(words: Tensor, format: TrellisFormat, shape: tuple[int, int]) -> Tensor:
    """State values of a whole weight: words int32 [S, in * R] -> int16 [out, in]."""
    out_features, in_features = shape
    strips = []
    for first, count in format.strips(out_features):
        streams = words[first : first + count].unflatten(-1, (in_features, format.rate)).transpose(0, 1).flatten(1)
        strips.append(decode_streams(streams, format.trellis).T)
    return torch.cat(strips)[:out_features]


def assemble(streams: list[Tensor], format: TrellisFormat) -> Tensor:
    """`words` of a weight from the streams of its strips, in order.

    streams     for each strip int32 [in, segments * R], as the encoder returns them
    returns     int32 [S, in * R]
    """
    return torch.cat([s.unflatten(-1, (-1, format.rate)).transpose(0, 1).flatten(1) for s in streams])


def rotated_weight(words: Tensor, scales: Tensor, scale: Tensor, format: TrellisFormat, shape: tuple[int, int]) -> Tensor:
    """The weight in the transformed basis, float32 [out, in], from its parts (module docstring)."""
    return decode_values(words, format, shape).float() * (scales.float() * scale).unsqueeze(-1)


def dequantize(words: Tensor, scales: Tensor, scale: Tensor, format: TrellisFormat, shape: tuple[int, int]) -> Tensor:
    """The weight as it is multiplied, float32 [out, in]: `rotated_weight` transformed back along the inputs."""
    return hadamard.inverse(rotated_weight(words, scales, scale, format, shape), format.transform)


def dequantize_rows(
    words: Tensor, scales: Tensor, scale: Tensor, format: TrellisFormat, shape: tuple[int, int], indices: Tensor
) -> Tensor:
    """Rows of `dequantize`, bit for bit, float32 [*indices.shape, in], of which each is decoded from its own windows alone.

    indices   integer of any shape, 0 .. out - 1
    The state of row t of a strip begins at bit R * t of every column's stream and has at most 16 bits, so it lies in two
    words of it: a row costs two words a column, whatever the size of the weight.
    """
    found = []
    for piece in indices.flatten().split(max(1, _ROW_VALUES // shape[1])):
        row_scales = scales.index_select(0, piece).float() * scale
        values = state_values(_row_states(words, format, shape, piece.long()), format.multiplier)
        found.append(hadamard.inverse(values.float() * row_scales.unsqueeze(-1), format.transform))
    return torch.cat(found).reshape(*indices.shape, shape[1])


def _row_states(words: Tensor, format: TrellisFormat, shape: tuple[int, int], rows: Tensor) -> Tensor:
    """States int64 [n, in] of rows int64 [n], from the two words of every column that hold them."""
    rate, step = format.rate, format.sequence_rows // SEGMENT_ROWS
    first = rows // format.sequence_rows * step
    length = (format.segments(shape[0]) - first).clamp(max=step) * rate
    bit = rows % format.sequence_rows * rate
    streams = words.unflatten(-1, (shape[1], rate))

    def word(number: Tensor) -> Tensor:
        return streams[first + number // rate, :, number % rate].long() & 0xFFFFFFFF

    low, high = word(bit // 32), word((bit // 32 + 1) % length)
    return (low | high << 32) >> (bit % 32).unsqueeze(-1) & ((1 << format.state_bits) - 1)


def padded_rows(rows: int) -> int:
    """Rows with the padding to whole segments."""
    return -(-rows // SEGMENT_ROWS) * SEGMENT_ROWS
