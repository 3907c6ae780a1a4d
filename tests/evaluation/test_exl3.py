"""EXL3: what its quantiser is given and what becomes of what it returns. The quantiser itself, exllamav3's, needs a GPU."""

import importlib.util

import pytest
import torch
from torch import nn

from seedlm.codes.block.format import PRESETS
from seedlm.errors import EvaluationError
from seedlm.evaluation import exl3
from seedlm.evaluation.baselines import apply_baseline
from seedlm.evaluation.methods import parse_baseline
from seedlm.integrations.transformers import models
from seedlm.modeling.quantize import choose_modules
from tiny_models import STORIES

WINDOWS = torch.randint(3, 500, (10, 24), generator=torch.Generator().manual_seed(1))  # a whole batch, and one that is not


@pytest.fixture
def model():
    return models.load_model(STORIES, device=torch.device("cpu"), dtype="float32")


def linears(model):
    return {name: model.get_submodule(name) for name in choose_modules(model, PRESETS["4"])}


def inputs_now(model, layers):
    """X'X of every layer's inputs in float64, by one pass over all windows."""
    found = {}

    def keep(name, module, args):
        rows = args[0].reshape(-1, args[0].shape[-1]).double()
        found[name] = rows.T @ rows

    hooks = [layer.register_forward_pre_hook(lambda *both, name=name: keep(name, *both)) for name, layer in layers.items()]
    model(input_ids=WINDOWS)
    for hook in hooks:
        hook.remove()
    return found


def padded(matrix, rows, columns):
    return nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


@torch.no_grad()
def test_layers_are_quantised_one_after_the_other_on_what_the_quantised_ones_before_make_of_a_text(model, monkeypatch):
    layers = linears(model)
    originals = {name: layer.weight.clone() for name, layer in layers.items()}
    calls, expected, block = [], {}, None

    def quantize(weight, data, options, whole):
        nonlocal block
        name = data["first_key"]
        layer = layers[name]
        if name.split(".")[2] != block:  # nothing of this numbered layer is quantised yet
            block = name.split(".")[2]
            expected.update(inputs_now(model, layers))
        rows, columns = weight.shape
        assert (rows, columns) == (-(-layer.in_features // 128) * 128, -(-layer.out_features // 128) * 128)
        assert torch.equal(weight, padded(originals[name].T, rows, columns))
        torch.testing.assert_close(data["H"], padded(expected[name], rows, rows).float(), rtol=1e-4, atol=1e-3)
        assert data["count"] == WINDOWS.numel()
        assert not data["finalized"]
        assert (options["K"], options["mul1"], options["devices"]) == (2.5, True, [torch.device("cpu")])
        assert ("out_sensitivity" in options) == name.endswith(("gate_proj", "up_proj"))
        assert torch.get_float32_matmul_precision() == "highest"
        calls.append(name)
        stored = {"trellis": torch.zeros(rows // 16, columns // 16, 40, dtype=torch.int16), "svh": torch.zeros(columns).half()}
        return weight * 2 + 1, 0.5, stored

    monkeypatch.setattr(exl3, "load_quantizer", lambda: quantize)
    torch.set_float32_matmul_precision("high")
    try:
        stored = exl3.quantize_layers(model, layers, WINDOWS, 2.5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert calls == list(layers)
    assert all(torch.equal(layer.weight, originals[name] * 2 + 1) for name, layer in layers.items())
    shapes = [[-(-length // 128) * 128 for length in weight.shape] for weight in originals.values()]
    assert stored == sum(2.5 * rows * columns + 16 * rows for rows, columns in shapes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(approximate="tanh")])
@torch.no_grad()
def test_a_gates_sensitivity_is_what_an_error_of_its_outputs_does_behind_the_down_projection(model, act):
    layers = {name: layer for name, layer in linears(model).items() if name.startswith("model.layers.1.")}
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.act_fn = act
    seen = exl3._observe(model, "model.layers.1", layers, WINDOWS)
    kept = []
    hook = mlp.register_forward_pre_hook(lambda module, args: kept.append(args[0].reshape(-1, args[0].shape[-1])))
    model(input_ids=WINDOWS)
    hook.remove()
    step = 1e-3
    outputs = {name: getattr(mlp, f"{name}_proj")(kept[0]).double() for name in ("gate", "up")}
    for name, output in outputs.items():
        other = act(outputs["gate"]) if name == "up" else outputs["up"]
        ahead, behind = (act(output + d) if name == "gate" else output + d for d in (step, -step))
        slopes = ((ahead - behind) * other / (2 * step)).square().mean(0) * mlp.down_proj.weight.square().sum(0)
        torch.testing.assert_close(seen[f"model.layers.1.mlp.{name}_proj"].sensitivity, slopes.float(), rtol=1e-4, atol=1e-8)
    assert seen["model.layers.1.mlp.down_proj"].sensitivity is None


@torch.no_grad()
def test_a_feed_forward_layer_that_is_not_whole_has_no_sensitivity(model):
    seen = exl3._observe(model, "model.layers.0", {"model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}, WINDOWS)
    assert seen["model.layers.0.mlp.up_proj"].sensitivity is None


def test_a_layer_outside_the_numbered_ones_is_named(model, monkeypatch):
    monkeypatch.setattr(exl3, "load_quantizer", lambda: None)
    with pytest.raises(EvaluationError, match="lm_head is in no numbered layer"):
        exl3.quantize_layers(model, {"lm_head": model.lm_head}, WINDOWS, 3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exl3.load_quantizer.cache_clear()
    with pytest.raises(EvaluationError, match=r"EXL3 needs exllamav3: pip install '\.\[baselines\]' in a copy"):
        exl3.load_quantizer()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("exllamav3") is None, reason="exllamav3 is not installed")
@pytest.mark.parametrize(("name", "least", "most"), [("exl3-4", 0.03, 0.07), ("exl3-2.5", 0.08, 0.2)])
def test_its_own_quantiser_loses_what_the_code_must(name, least, most):
    """Errors of N(0, 1) are 0.066 and about 0.18. A third of them goes where rows and columns are padded: a plain grid in the
    place of the code leaves two thirds of its own error in these weights.
    """
    model = models.load_model(STORIES, device=torch.device("cuda"), dtype="float32")
    facts = apply_baseline(model, name, WINDOWS)
    assert least < facts["relative_error"] < most
    _, _, bits = parse_baseline(name)
    shapes = [[-(-length // 128) * 128 for length in layer.weight.shape] for layer in linears(model).values()]
    stored = sum(bits * rows * columns + 16 * (rows + columns) + 32 for rows, columns in shapes)
    assert facts["bits_per_weight"] * facts["weights"] == pytest.approx(stored)
