"""The definition of the trellis code, against a few lines of plain Python."""

import pytest
import torch

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.family import FAMILY
from seedlm.codes.trellis.format import Trellis, TrellisFormat
from seedlm.errors import TensorError


def plain_value(words: list[int], row: int, rate: int, state_bits: int, multiplier: int) -> int:
    """A row's value from a stream of 32-bit words, bit by bit."""
    total = 32 * len(words)
    state = 0
    for k in range(state_bits):
        bit = (rate * row + k) % total
        state |= (words[bit // 32] >> bit % 32 & 1) << k
    return sum((state * multiplier % 2**32).to_bytes(4, "little")) - 510


def random_words(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


@pytest.mark.parametrize("rate", range(1, 9))
@pytest.mark.parametrize("state_bits", [12, 16])
@pytest.mark.parametrize("rows", [32, 96])
def test_values_are_windows_of_the_stream(rate, state_bits, rows):
    trellis = Trellis(rate=rate, state_bits=state_bits, multiplier=0x83DCD12D, cost_shift=0)
    words = random_words(2, rows * rate // 32)
    expected = [
        [plain_value([w & 0xFFFFFFFF for w in s], t, rate, state_bits, 0x83DCD12D) for t in range(rows)] for s in words.tolist()
    ]
    assert codec.decode_streams(words, trellis).tolist() == expected


@pytest.mark.parametrize("rate", range(1, 9))
def test_pack_and_unpack_are_inverse(rate):
    words = random_words(3, 2, 2 * rate)
    symbols = codec.unpack(words, rate)
    assert symbols.shape == (3, 2, 64)
    assert int(symbols.max()) < 1 << rate
    assert torch.equal(codec.pack(symbols, rate), words)


@pytest.mark.parametrize("rows", [1, 32, 33, 64, 100, 129])
def test_a_weight_is_its_strips(rows):
    format = TrellisFormat(rate=3, sequence_rows=64, transform=4)
    columns = 5
    words = random_words(format.segments(rows), columns * 3)
    values = codec.decode_values(words, format, (rows, columns))
    assert values.shape == (rows, columns)
    for row, column in [(0, 0), (rows - 1, columns - 1), (rows // 2, 2)]:
        first = row // 64 * 2
        stream = words[first : first + 2, 3 * column : 3 * column + 3].flatten().tolist()
        expected = plain_value([w & 0xFFFFFFFF for w in stream], row % 64, 3, 16, format.multiplier)
        assert int(values[row, column]) == expected
    streams = [
        words[f : f + n].unflatten(1, (columns, 3)).transpose(0, 1).flatten(1).contiguous() for f, n in format.strips(rows)
    ]
    assert torch.equal(codec.assemble(streams, format), words)


def test_rows_and_columns_are_slices():
    format = TrellisFormat(rate=2, sequence_rows=32, transform=4)
    words = random_words(4, 8 * 2)
    whole = codec.decode_values(words, format, (128, 8))
    assert torch.equal(codec.decode_values(words[1:3], format, (64, 8)), whole[32:96])
    assert torch.equal(codec.decode_values(words[:, 8:], format, (128, 4)), whole[:, 4:])


def test_scales_multiply_in_float32():
    format = TrellisFormat(rate=4, sequence_rows=32, transform=2)
    words, scales, scale = random_words(1, 12), torch.rand(20).half() + 0.5, torch.tensor([2.0**-9])
    values = codec.decode_values(words, format, (20, 3)).float()
    rotated = codec.rotated_weight(words, scales, scale, format, (20, 3))
    assert torch.equal(rotated, values * (scales.float() * scale)[:, None])
    weight = codec.dequantize(words, scales, scale, format, (20, 3))
    half = 2**-0.5
    expected = torch.stack([(rotated[:, 0] + rotated[:, 1]) * half, (rotated[:, 0] - rotated[:, 1]) * half, rotated[:, 2]], 1)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_scales_whose_weights_would_not_be_finite_are_refused():
    format, shape = TrellisFormat(rate=4), (40, 300)
    parts = {"words": random_words(format.segments(40), 300 * 4), "scales": torch.ones(40).half(), "scale": torch.ones(1)}
    parts["scale"][0] = torch.finfo(torch.float32).max / (510 * 128) * 0.99
    FAMILY.check(parts, format, shape)
    assert FAMILY.dequantize(parts, format, shape).isfinite().all()
    parts["scale"] *= 1.02
    with pytest.raises(TensorError, match=r"scales times scale must be at most 5\.21e\+33, got 5\.26e\+33"):
        FAMILY.check(parts, format, shape)
