"""A trellis weight as literal bytes, decoded twice: by the package, and by a reader written after FORMAT.md alone."""

import numpy as np
import pytest
import torch

from seedlm.codes.encoded import EncodedTensor
from seedlm.codes.registry import parse_format


def signs(count):
    """The sign stream: the paper's 16-bit register from seed 0xACE1, taps 0, 1, 3, 12."""
    state, found = 0xACE1, []
    for _ in range(count):
        bit = (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 1
        state = state >> 1 | bit << 15
        found.append(-1 if state & 1 else 1)
    return found


def read(words, scales, scale, rate, state_bits, rows, block, shape):
    out, width = shape
    r = np.zeros(shape, np.float32)
    step = rows // 32
    for first in range(0, len(words), step):
        segments = words[first : first + step]
        for c in range(width):
            stream = [int(w) >> i & 1 for s in segments for w in s[c * rate : (c + 1) * rate] for i in range(32)]
            for t in range(min(32 * len(segments), out - 32 * first)):
                state = sum(stream[(rate * t + i) % len(stream)] << i for i in range(state_bits))
                h = state * (0x83DCD12D if state_bits == 16 else 0x5BEBA253) % 2**32
                value = sum(h >> k & 255 for k in (0, 8, 16, 24)) - 510
                row = 32 * first + t
                r[row, c] = np.float32(value) * (np.float32(scales[row]) * np.float32(scale[0]))
    left, at = width, 0
    while left:
        size = block
        while size > left:
            size //= 2
        part = r[:, at : at + size].copy()
        stride = 1
        while stride < size:
            for i in range(size):
                if i // stride % 2 == 0:
                    low, high = part[:, i].copy(), part[:, i + stride].copy()
                    part[:, i], part[:, i + stride] = low + high, low - high
            stride *= 2
        r[:, at : at + size] = part * np.float32(size**-0.5) * np.array(signs(size), np.float32)
        left, at = left - size, at + size
    return r


@pytest.mark.parametrize(
    "spec", ["trellis-r4-l16-t64-h8", "trellis-r3-l16-t32-h4", "trellis-r2-l12-t64-h8", "trellis-r7-l16-t96-h2"]
)
def test_a_reader_of_the_documents_finds_the_same_weight(spec):
    format, shape = parse_format(spec), (70, 13)
    generator = torch.Generator().manual_seed(3)
    parts = {
        name: torch.randint(-(2**31), 2**31, part.shape, generator=generator).int()
        if part.dtype == "int32"
        else torch.rand(part.shape, generator=generator).to(getattr(torch, part.dtype))
        for name, part in format.parts(*shape).items()
    }
    numbers = [part.numpy().astype(np.uint32) if part.dtype == torch.int32 else part.numpy() for part in parts.values()]
    expected = read(*numbers, format.rate, format.state_bits, format.sequence_rows, format.transform, shape)
    found = EncodedTensor(format, shape, parts).dequantize()
    assert torch.equal(found, torch.from_numpy(expected))


def test_golden_words():
    """Three columns of a strip of one segment, by hand: rate 4, all state windows of a ramp."""
    format = parse_format("trellis-r4-l16-t32-h1")
    words = torch.arange(12, dtype=torch.int32).view(1, 12) * 0x01234567
    parts = {"words": words, "scales": torch.full((4,), 0.5, dtype=torch.float16), "scale": torch.tensor([0.25])}
    found = EncodedTensor(format, (4, 3), parts).dequantize()
    assert found.tolist() == GOLDEN


GOLDEN = [[-63.75, -7.375, 17.125], [-63.75, -7.5, 29.0], [-63.75, 12.75, 5.625], [-63.75, 1.125, 2.125]]
