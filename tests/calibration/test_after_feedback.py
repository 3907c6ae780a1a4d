"""Sensitivities for mixed rates: what they say of a layer's error is what coding it with feedback leaves."""

import pytest
import torch

from seedlm.calibration.after_feedback import after_elimination, sensitivities
from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format
from seedlm.errors import SourceError
from seedlm.storage.selection import matrices_of
from seedlm.storage.source import FolderSource
from seedlm.storage.statistics import InputStatistics, Statistics, StatisticsFacts
from tiny_models import save_tensors

WIDTH, ROWS, TOKENS = 128, 64, 1 << 20
FORMAT, BLOCK = parse_format("trellis-r3-l12-t64-h128"), parse_format("block-k8-c8-p3-q4-e4")
FACTS = StatisticsFacts(model="m", text="t", source="own text", sequences=1, length=TOKENS, weighting="gradient")


def correlated(strength, seed=0):
    """X'X of inputs of which a few directions are most, float64 [width, width]."""
    random = torch.Generator().manual_seed(seed)
    few = torch.randn(WIDTH, 8, dtype=torch.float64, generator=random)
    return torch.eye(WIDTH, dtype=torch.float64) + strength * few @ few.T


def coded(weight, hessian, format):
    """The weight's error after coding, with feedback or without."""
    encoded, _ = encode(weight, format, hessian=hessian, tokens=None if hessian is None else TOKENS)
    return (weight - encoded.dequantize()).double()


@pytest.mark.parametrize("format", [FORMAT, BLOCK], ids=["columns, transformed", "blocks of columns"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 10.0])
def test_they_say_what_feedback_leaves(strength, format):
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    hessian = correlated(strength)
    with_feedback, without = coded(weight, hessian.float(), format), coded(weight, None, format)
    share = float(without.square().sum() / weight.double().square().sum())
    left = float((with_feedback @ hessian * with_feedback).sum())
    energy = float(weight.double().square().sum()) / WIDTH
    assert left == pytest.approx(share * energy * after_elimination(hessian, format), rel=0.15)
    if strength:
        assert left < 0.5 * share * energy * float(hessian.trace())


def test_pivots_of_independent_inputs_are_their_squares():
    for format in (FORMAT, BLOCK):
        assert after_elimination(torch.eye(WIDTH), format) == pytest.approx(WIDTH * 1.01)
        assert after_elimination(torch.zeros(WIDTH, WIDTH), format) == 0


@pytest.fixture
def source(tmp_path):
    random = torch.Generator().manual_seed(2)
    weights = {f"model.layers.0.{name}.weight": torch.randn(ROWS, WIDTH, generator=random) for name in "abc"}
    return FolderSource(save_tensors(tmp_path / "model", weights))


def statistics(rows):
    read = InputStatistics.of(correlated(1.0), TOKENS)
    names = [f"model.layers.0.{name}" for name in "ab"]
    return Statistics(FACTS, {names[0]: read}, dict.fromkeys(names, names[0]), rows)


def test_rows_count_by_their_gradients_and_energies(source):
    names = [f"model.layers.0.{name}" for name in "abc"]
    rows = {names[0]: torch.arange(1.0, ROWS + 1), names[1]: 2 * torch.arange(1.0, ROWS + 1)}
    found = sensitivities(statistics(rows), dict.fromkeys(names, (ROWS, WIDTH)), source, FORMAT)
    left = after_elimination(InputStatistics.of(correlated(1.0), TOKENS).product(), FORMAT)
    for name in names[:2]:
        energy = source.rows(f"{name}.weight", 0, ROWS).double().square().mean(1)
        assert found[name] == pytest.approx(0.5 * float((rows[name].double() * energy).sum()) * left, rel=1e-5)
    assert found[names[2]] == 0  # was not observed


def test_without_gradients_they_are_refused(source):
    with pytest.raises(SourceError, match="have no gradients"):
        sensitivities(statistics({}), {"model.layers.0.a": (ROWS, WIDTH)}, source, FORMAT)


def test_experts_of_a_stack_have_their_own(tmp_path):
    """A stack is one tensor of the file and as many matrices as there are experts."""
    random = torch.Generator().manual_seed(2)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {stack: torch.randn(2, WIDTH, ROWS, generator=random)}
    source = FolderSource(save_tensors(tmp_path / "experts", tensors, model_type="llama4_text", hidden_size=WIDTH))
    modules = matrices_of([stack], source.tensors, source.config)
    assert set(modules) == {f"{stack}.0", f"{stack}.1"}
    shapes = {module: shape for module, (_, shape, _) in modules.items()}
    read = InputStatistics.of(correlated(1.0), TOKENS)
    rows = {module: torch.ones(shape[0]) for module, shape in shapes.items()}
    found = sensitivities(Statistics(FACTS, {"x": read}, dict.fromkeys(shapes, "x"), rows), shapes, source, FORMAT)
    assert all(found[module] > 0 for module in shapes)
