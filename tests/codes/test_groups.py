"""The GPU search's grouping of seeds: it has all seeds, and what its rows give plus its slack bounds every seed's residual."""

import pytest
import torch

from seedlm.codes.block.basis import basis
from seedlm.codes.block.encode import reason_no_search
from seedlm.codes.block.format import PRESETS
from seedlm.codes.block.search.groups import groups
from seedlm.codes.registry import parse_format

SPECS = ["4", "5", "block-k5-c4-p2-q3-e3", "block-k12-c8-p1-q2-e4", "block-k12-c8-p3-q4-e4", "block-k3-c8-p4-q4-e4"]
SPECS += ["block-k6-c4-p4-q4-e2", "block-k9-c5-p4-q4-e2"]


@pytest.mark.parametrize("spec", SPECS)
def test_rows_and_slack_bound_every_seed(spec):
    format = parse_format(spec, "block")
    found = groups(format)
    everyone = torch.cat([part.position.flatten() for part in found])
    assert torch.equal(everyone.unique(), torch.arange(format.num_seeds, dtype=torch.int32))
    # Random directions, and for some seeds the worst one: a vector of their own span.
    span = basis(format).span.permute(2, 0, 1)  # [N, P, C]
    blocks = torch.cat([torch.randn(64, format.block_size, dtype=torch.float64), span[:: max(1, len(span) // 64), 0]])
    blocks = torch.nn.functional.normalize(blocks, dim=1)
    energy = (span @ blocks.T).square().sum(1)
    for part in found:
        given = (part.own.double() @ blocks.T).square() + (part.shared.double() @ blocks.T).square().sum(1, keepdim=True)
        seeds = energy[part.position.long()]
        beyond = given.sqrt() - (1 - seeds).clamp_min(0).sqrt() if part.complement else seeds - given
        assert 1e-5 < part.slack < 1e-3
        assert float(beyond.max()) <= part.slack


@pytest.mark.parametrize("spec", ["5", "3.5"])
def test_a_complement_gives_the_residual_itself(spec):
    format = parse_format(spec, "block")
    (part,) = groups(format)
    assert part.complement
    span = basis(format).span.permute(2, 0, 1)[part.position.long()]  # [groups, 2, P, C]
    block = torch.nn.functional.normalize(torch.randn(format.block_size, dtype=torch.float64), dim=0)
    given = (part.own.double() @ block).square() + (part.shared.double() @ block).square().sum(1, keepdim=True)
    independent = span.square().sum((2, 3)).round() == format.num_coefficients  # others leave one more dimension
    assert int((~independent).sum()) < format.num_seeds // 100
    residual = 1 - (span @ block).square().sum(-1)
    torch.testing.assert_close(given[independent], residual[independent], rtol=0, atol=2 * part.slack)


def test_the_4_bit_preset_shares_two_rows_among_sixteen_seeds():
    shared, alone = groups(parse_format("4", "block"))
    assert shared.own.shape == (4064, 16, 8)
    assert alone.own.shape == (511, 1, 8)


def test_without_a_gpu_the_backend_says_so():
    assert "NVIDIA GPU" in reason_no_search("triton", torch.device("cpu"))


def test_a_mixture_of_all_presets_builds_every_table_once():
    for _ in range(2):
        found = [basis(format) for format in PRESETS.values()]
    assert all(basis(format) is kept for format, kept in zip(PRESETS.values(), found, strict=True))
    assert groups.cache_info().maxsize >= len(PRESETS)
