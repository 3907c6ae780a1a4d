"""Columns of a panel with feedback between them, against column by column in integers of any size."""

from fractions import Fraction

import pytest
import torch

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.panel import ERROR_LIMIT, Strips, encode_panel
from seedlm.codes.trellis.viterbi import cost, reason_no_search, viterbi

UNIT = -30
"""Exponent of the unit that errors are counted in."""
SHIFT = 20
"""Coefficients are counted in units of 2^-SHIFT."""


def problem(count: int, columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Strips]:
    """Weight, what was fed before, coefficients of two matrices, strips; a row of zeros and two rows of padding."""
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scale = normal(count, rows).abs() * 1e-4 + 1e-5
    scale[0, 3] = 0
    weight = normal(count, columns, rows) * scale.unsqueeze(1) * codec.VALUE_STD
    fed = (normal(count, columns, rows) * 2.0 ** (SHIFT + 17)).round().double()
    coefficients = (normal(2, columns, columns) * 0.3 * 2**SHIFT).round().double().triu(1)
    roots = cost.row_roots(torch.exp(normal(count, rows)))
    roots[:, -2:] = 0
    take = torch.full((count, rows), 2.0 ** (UNIT - SHIFT), dtype=torch.float64)
    per_unit = torch.full((count, rows), 2.0**-UNIT, dtype=torch.float64)
    return weight, fed, coefficients, Strips(scale, roots, take, per_unit, torch.arange(count, dtype=torch.int32) % 2)


def test_each_column_is_coded_for_what_the_earlier_ones_missed():
    format = TrellisFormat(rate=3, state_bits=12)
    weight, fed, coefficients, strips = problem(3, 4, 32)
    words, values, errors = encode_panel(weight, fed, coefficients, strips, format.trellis, 16)
    assert int(errors.abs().max()) <= ERROR_LIMIT
    for n in range(3):
        given = coefficients[n % 2]
        for column in range(4):
            target = torch.empty(32)
            for row in range(32):
                taken = int(fed[n, column, row])
                taken += sum(int(errors[n, k, row]) * int(given[k, column]) for k in range(column))
                exact = Fraction(float(weight[n, column, row])) + Fraction(taken) * Fraction(2) ** (UNIT - SHIFT)
                target[row] = torch.tensor(float(exact), dtype=torch.float64).float()
            scaled = torch.where(strips.scale[n] > 0, target / strips.scale[n], 0.0)
            weights = strips.roots[n].square()
            expected, reached = viterbi(scaled[None], 30, format, row_weights=weights, overlap=16)
            assert torch.equal(words[n, column], expected[0])
            assert torch.equal(values[n, column], reached[0])
            missed = (weight[n, column].double() - (reached[0].float() * strips.scale[n]).double()) * 2.0**-UNIT
            assert torch.equal(errors[n, column].double(), missed.round().clamp(-ERROR_LIMIT, ERROR_LIMIT))


def test_without_feedback_columns_are_coded_alone():
    format = TrellisFormat(rate=2, state_bits=12)
    weight, _, _, strips = problem(2, 3, 32)
    together = encode_panel(weight, None, None, strips, format.trellis, 16)
    for column in range(3):
        alone = encode_panel(weight[:, column, None], None, None, strips, format.trellis, 16)
        assert torch.equal(together.words[:, column], alone.words[:, 0])


@pytest.mark.parametrize(
    ("rate", "state_bits", "count"), [(3, 12, 5), (4, 12, 18), (1, 16, 2), (2, 16, 1), (4, 16, 3), (8, 16, 2)]
)
@pytest.mark.parametrize("backend", ["numba", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backends_give_the_reference_bits(backend, rate, state_bits, count):
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if reason := reason_no_search(backend, device):
        pytest.skip(reason)
    trellis = TrellisFormat(rate=rate, state_bits=state_bits).trellis
    weight, fed, coefficients, strips = problem(count, 2, 32)
    expected = encode_panel(weight, fed, coefficients, strips, trellis, 16, "reference")
    there = [part.to(device) for part in (weight, fed, coefficients)]
    found = encode_panel(*there, Strips(*(part.to(device) for part in strips)), trellis, 16, backend)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)
