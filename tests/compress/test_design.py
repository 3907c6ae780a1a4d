"""The design space: no better format is left out, and a format's measured error is what the search would leave."""

import json

import pytest
import torch
from typer.testing import CliRunner

from seedlm.cli import app
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.block.search import torch_search
from seedlm.codes.registry import parse_format
from seedlm.compress.design import measure, model_blocks, normal_blocks
from seedlm.compress.design_space import candidates
from seedlm.errors import FormatError, TensorError
from seedlm.storage.source import open_source
from tiny_models import save_tensors


def searched_error(format: BlockFormat, samples: torch.Tensor, rounding: str) -> float:
    """NMSE of scoring every seed, at the best exponent bias about that of unit weights."""
    blocks = samples[:, : format.block_size].contiguous()
    energy = blocks.double().square().sum()
    scores = [torch_search.brute_force(blocks, bias, format, rounding)[1].sum() for bias in (-1, 0, 1)]
    return float(min(scores) / format.divisor**2 / energy + 1)


@pytest.mark.parametrize("rounding", ["best", "nearest"])
@pytest.mark.parametrize(
    "spec", ["block-k8-c8-p3-q4-e4", "block-k9-c7-p2-q3-e3", "block-k5-c6-p4-q5-e4", "block-k8-c4-p1-q8-e4"]
)
def test_the_error_is_that_of_scoring_every_seed(spec, rounding):
    format, samples = parse_format(spec), normal_blocks(24, seed=3)
    (measured,) = measure([format], samples, rounding)
    assert measured.at_least == measured.nmse
    assert measured.nmse == pytest.approx(searched_error(format, samples, rounding), rel=1e-6)
    assert 0 < measured.unquantized < measured.nmse


def test_what_few_seeds_leave_open_is_between_the_two_ends():
    """With two bits a coefficient the residual says little, so the winner is often not among a few seeds of least residual."""
    format, samples = parse_format("block-k9-c5-p4-q2-e4"), normal_blocks(12, seed=4)
    (few,), (all_seeds,) = measure([format], samples, kept=20), measure([format], samples, kept=511)
    assert few.at_least < all_seeds.nmse < few.nmse
    assert all_seeds.at_least == all_seeds.nmse == pytest.approx(searched_error(format, samples, "best"), rel=1e-6)
    assert all_seeds.contenders > 20


def test_the_standard_error_is_the_spread_between_samples():
    format = parse_format("block-k6-c6-p2-q4-e4")
    runs = [next(measure([format], normal_blocks(64, seed))) for seed in range(24)]
    spread = torch.tensor([run.nmse for run in runs]).std()
    assert sum(run.standard_error for run in runs) / len(runs) == pytest.approx(float(spread), rel=0.3)


def test_dependent_columns_do_not_break_the_error():
    """Where columns coincide the least-squares coefficients are 1e8 and more, and their squares leave nothing of float64."""
    (measured,) = measure([parse_format("block-k12-c6-p4-q2-e2")], normal_blocks(64))
    assert 0 < measured.at_least <= measured.nmse < 0.1


def test_pruning_keeps_the_best_format_of_every_seed_length():
    formats, samples = candidates(3, max_block=4), normal_blocks(16, seed=5)
    everything, dealt_with = list(measure(formats, samples)), []
    pruned = list(measure(formats, samples, prune=True, on_progress=dealt_with.append))
    assert sum(dealt_with) == len(everything) == len(formats)
    assert len(pruned) < len(formats)
    for k in {format.seed_bits for format in formats}:
        best = min((m for m in everything if m.format.seed_bits == k), key=lambda m: m.nmse)
        assert best in pruned


@pytest.mark.parametrize("bits", [1, 2, 2.5, 3.3, 4])
def test_candidates_keep_the_budget_and_no_code_of_another(bits):
    found = candidates(bits)
    assert len(found) == len(set(found))
    assert max(format.bits_per_weight for format in found) <= bits
    wider = {(f.seed_bits, f.block_size, f.num_coefficients, f.coefficient_bits + 1, f.exponent_bits) for f in found}
    assert not wider & {(f.seed_bits, f.block_size, f.num_coefficients, f.coefficient_bits, f.exponent_bits) for f in found}


@pytest.mark.parametrize("name", ["4", "3"])
def test_the_papers_configurations_are_candidates(name):
    assert PRESETS[name] in candidates(float(name))


def test_a_budget_without_any_block_is_refused():
    with pytest.raises(FormatError, match=r"no block format has 0\.1 bits a weight or less"):
        candidates(0.1)


def test_samples_shorter_than_a_block_are_refused():
    with pytest.raises(TensorError, match=r"needs samples of 12 weights, got \[5, 8\]"):
        list(measure([PRESETS["3"]], torch.zeros(5, 8)))


def test_samples_of_a_model_are_its_compressible_weights_at_unit_scale(tmp_path):
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(8, 80) * 0.01 * 10**i for i in range(2)}
    tensors = {**weights, "model.embed_tokens.weight": torch.full((8, 80), 1e6)}
    samples = model_blocks(open_source(save_tensors(tmp_path / "model", tensors)), 500)
    assert samples.shape == (500, 64)
    assert float(samples.square().mean()) == pytest.approx(1, rel=0.05)
    row = weights["model.layers.1.mlp.up_proj.weight"]
    scaled = (row / row.square().mean().sqrt()).unfold(1, 64, 1).reshape(-1, 64)
    assert 0.3 < (torch.cdist(samples, scaled).amin(1) < 0.05).float().mean() < 0.7


def test_samples_of_stacked_experts_lie_along_their_input(tmp_path):
    experts = torch.arange(40.0)[:, None].expand(3, 40, 24).contiguous()  # transposed: rows of a matrix are its columns
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": experts}
    samples = model_blocks(open_source(save_tensors(tmp_path / "model", tensors, hidden_size=40)), 8)
    assert samples.shape == (8, 40)
    torch.testing.assert_close(samples / samples[:, 1:2], torch.arange(40.0).expand(8, 40))


def test_the_command_prints_a_table_and_json(tmp_path):
    torch.manual_seed(0)
    save_tensors(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 40)})
    options = ["design", "--bits", "2.5", "--blocks", "8", "--max-block", "4", "--model", str(tmp_path / "model")]
    table = CliRunner().invoke(app, [*options, "--top", "3"])
    assert table.exit_code == 0, table.output
    assert table.stdout.count("block-k") > 3
    data = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    found = {row["format"] for row in data["formats"]}
    assert found < {format.spec for format in candidates(2.5, max_block=4)}
    assert data["formats"] == sorted(data["formats"], key=lambda row: row["nmse"])
