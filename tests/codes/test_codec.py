"""The definition of the block code: reconstruction, exponents, candidates, scores, and the packed fields."""

import itertools
import math

import pytest
import torch

from random_codes import random_codes
from seedlm.codes.block import lfsr
from seedlm.codes.block.basis import basis, generator
from seedlm.codes.block.codec import (
    BlockCodes,
    best_exponent,
    block_scale,
    choose_exponent_bias,
    dequantize,
    evaluate,
    power_of_two,
)
from seedlm.codes.block.format import PRESETS
from seedlm.codes.block.packing import pack, unpack
from seedlm.codes.registry import parse_format
from seedlm.errors import TensorError

FORMATS = ["4", "3", "block-k5-c3-p2-q3-e3", "block-k24-c20-p5-q3-e6", "block-k11-c7-p1-q8-e2"]


@pytest.mark.parametrize("spec", [f for f in FORMATS if "k24" not in f])
def test_dequantizing_is_the_formula(spec):
    """Against integer arithmetic in plain Python, register stepped state by state."""
    format = parse_format(spec, "block")
    codes = random_codes(format, 20)
    found = dequantize(codes, -3, format)
    size, count = format.block_size, format.num_coefficients
    for block in range(20):
        seed, exponent, q = (field[block].tolist() for field in codes)
        states = lfsr.states(seed, size * count, format.seed_bits)
        for c in range(size):
            total = sum((states[c * count + p] - format.center) * q[p] for p in range(count))
            exact = total * 2.0 ** (exponent - 3) / format.divisor
            assert found[block, c].item() == pytest.approx(exact, rel=3e-7, abs=1e-38)


def test_dequantizing_a_known_block():
    """K = 3 from seed 4 gives rows [2,5] [6,7] [3,1] [4,2] (paper, Figure 3); center 4, divisor 3."""
    format = parse_format("block-k3-c4-p2-q4-e4", "block")
    codes = BlockCodes(torch.tensor([4]), torch.tensor([1]), torch.tensor([[3, -2]]))
    expected = torch.tensor([[-2 * 3 - 1 * 2, 2 * 3 - 3 * 2, -1 * 3 + 3 * 2, 0 * 3 + 2 * 2]]) * 2 / 3
    torch.testing.assert_close(dequantize(codes, 0, format), expected, rtol=2e-7, atol=0)


def test_scale_covers_the_whole_float_range():
    format = PRESETS["4"]
    exponents = torch.tensor([-8, 7], dtype=torch.int8)
    assert block_scale(exponents, 121, format).isfinite().all()
    tiny = block_scale(exponents, -130, format)
    assert tiny[0].item() == pytest.approx(2.0**-138 / 32767, rel=0.5, abs=2e-45)


def test_power_of_two_is_exact():
    exponents = torch.arange(-1000, 1000)
    assert power_of_two(exponents).tolist() == [math.ldexp(1.0, e) for e in exponents.tolist()]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(7.5, 0), (7.5000001, 1), (7.4999999, 0), (3.75, -1), (15.0, 1), (1e-9, -8), (1e9, 7), (0.0, -8)],
)
def test_exponent_rule_at_powers_of_two(largest, expected):
    """ceil(log2(max|t| / 7.5)); an error of 1e-7 beside a power of two would double the scale."""
    solution = torch.tensor([[0.0, -largest, largest / 2]], dtype=torch.float64)
    assert best_exponent(solution, 0, PRESETS["4"]).item() == expected


@pytest.mark.parametrize("sigma", [1e-38, 1e-8, 1.0, 1e4, 1e38])
def test_exponent_bias_puts_the_largest_weight_in_the_top_octave(sigma):
    weight = torch.tensor([[sigma, -sigma / 3]])
    bias = choose_exponent_bias(weight, PRESETS["4"])
    assert 2.0 ** (bias + 6) <= weight[0, 0].item() < 2.0 ** (bias + 7)
    assert choose_exponent_bias(torch.zeros(2, 2), PRESETS["4"]) == 0


@pytest.mark.parametrize("spec", ["4", "3", "block-k12-c5-p2-q4-e4"])
def test_pseudo_inverse_and_span_agree_with_lapack(spec):
    format = parse_format(spec, "block")
    tables = basis(format)
    matrix = generator(torch.arange(format.num_seeds), format).double()
    expected = torch.linalg.pinv(matrix)
    error = (tables.pinv.double().permute(2, 0, 1) - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
    assert error.max() < 1e-7
    span = tables.span.permute(2, 1, 0)
    assert (span.mT @ span - torch.eye(format.num_coefficients)).abs().max() < 1e-12
    residual = matrix - span @ (span.mT @ matrix)
    assert residual.abs().max() < 1e-9 * format.center


def test_dependent_columns_have_the_minimum_norm_inverse():
    """K = 2 has three states, so four columns cannot be independent in three rows."""
    format = parse_format("block-k2-c4-p3-q4-e4", "block")
    matrix = generator(torch.arange(3), format).double()
    expected = torch.linalg.pinv(matrix, rtol=1e-9)
    torch.testing.assert_close(basis(format).pinv.permute(2, 0, 1).double(), expected, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(matrix).min() < 3


def test_best_rounding_is_the_best_of_its_candidates():
    format = parse_format("block-k7-c5-p2-q4-e4", "block")
    tables = basis(format)
    block = torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).double().float().double()
    position = torch.tensor([11])
    score, exponent, q = evaluate(block, position, 0, format, tables, "best")
    matrix = generator(position, format)[0].double() / format.divisor
    t = matrix.pinverse() @ block[0]
    start = best_exponent(t.unsqueeze(0), 0, format).item()
    errors = {}
    for e in range(start - 1, start + 2):
        for up in itertools.product((0, 1), repeat=2):
            c = [max(-8, min(7, math.floor(x / 2.0**e) + u)) for x, u in zip(t.tolist(), up, strict=True)]
            errors[e, *c] = (block[0] - matrix @ torch.tensor(c, dtype=torch.float64) * 2.0**e).square().sum().item()
    best = min(errors, key=errors.get)
    assert (exponent.item(), *q[0].tolist()) == best
    assert score.item() / format.divisor**2 + block.square().sum().item() == pytest.approx(errors[best], rel=1e-9)


@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("spec", FORMATS)
def test_packed_fields_come_back(spec, blocks):
    format = parse_format(spec, "block")
    codes = random_codes(format, 3, blocks)
    words = pack(*codes, format)
    assert words.shape == (3, -(-blocks * format.block_bits // 32))
    for found, expected in zip(unpack(words, blocks, format), codes, strict=True):
        assert torch.equal(found, expected)


def test_packed_layout_of_both_presets():
    """FORMAT.md: little-endian bit fields, seed lowest, blocks with no gap."""
    four = pack(torch.tensor([[0x8001]]), torch.tensor([[-2]]), torch.tensor([[[3, -8, 7]]]), PRESETS["4"])
    assert four.item() & 0xFFFFFFFF == 0x783E8001
    seeds, exponents = torch.tensor([[0x8001, 0x0002]]), torch.tensor([[-2, 5]])
    three = pack(seeds, exponents, torch.tensor([[[3, -8, 7, -1], [1, 2, 3, 4]]]), PRESETS["3"])
    bits = (0xF783E8001) | (0x432150002 << 36)
    assert [word & 0xFFFFFFFF for word in three[0].tolist()] == [bits >> 32 * i & 0xFFFFFFFF for i in range(3)]


def test_row_and_column_ranges_are_slices():
    format = PRESETS["3"]
    codes = random_codes(format, 4, 24)
    words = pack(*codes, format)
    assert torch.equal(pack(*(field[1:3] for field in codes), format), words[1:3])
    assert torch.equal(pack(*(field[:, 8:16] for field in codes), format), words[:, 9:18])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(0, 0, "seeds must be 1 .. 65535, got 0"), (1, 8, "exponents must be -8 .. 7"), (2, -9, "coefficients must be -8 .. 7")],
)
def test_fields_out_of_range_are_refused(field, value, message):
    codes = [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 3, dtype=torch.int64)]
    codes[field].view(-1)[0] = value
    with pytest.raises(TensorError, match=message):
        pack(*codes, PRESETS["4"])
