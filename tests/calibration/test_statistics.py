"""Statistics of linear layers: against what hand-written passes give, by the right names, in a file and back."""

import json

import pytest
import torch
from torch import nn

from seedlm.calibration.statistics import measure_statistics, model_fingerprint
from seedlm.errors import EvaluationError, SourceError
from seedlm.storage.statistics import InputStatistics, Statistics
from tiny_models import join, split, tiny_model

TOKENS = torch.randint(64, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def measured(model):
    return measure_statistics(model, TOKENS, batch=2)


def inputs_of(model, name):
    """What a layer reads, [tokens, in], by a hook of the test's own."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_products_are_means_over_tokens(model, layer):
    statistics = measure_statistics(model, TOKENS, gradients=False, batch=2)
    x = inputs_of(model, layer)
    found = statistics.input_of(layer)
    expected = x.T @ x / len(x)
    scale = expected.diagonal().sqrt()
    torch.testing.assert_close(
        found.product().double() / scale[:, None] / scale, expected / scale[:, None] / scale, atol=1e-3, rtol=0
    )
    assert found.tokens == 45
    assert not statistics.rows


def test_rows_are_mean_squared_gradients(model, measured):
    layer = model.model.layers[1].mlp.up_proj
    outputs = []
    handle = layer.register_forward_hook(lambda m, args, out: (out.retain_grad(), outputs.append(out))[0])
    loss = nn.functional.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    loss.backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    expected = outputs[0].grad.flatten(0, 1).square().mean(0)
    torch.testing.assert_close(measured.rows["model.layers.1.mlp.up_proj"], expected, rtol=1e-4, atol=0)


def test_tokens_weigh_by_the_root_of_their_share_of_squared_gradients(model):
    """In one batch, where the mean is over all tokens."""
    name = "model.layers.0.mlp.down_proj"
    outputs, x = [], inputs_of(model, name)
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: (out.retain_grad(), outputs.append(out))[0])
    nn.functional.cross_entropy(model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    squares = outputs[0].grad.flatten(0, 1).double().square()
    weight = (squares / squares.mean(0)).mean(1).sqrt()
    expected = (x * weight[:, None]).T @ x / weight.sum()
    found = measure_statistics(model, TOKENS, batch=5).input_of(name).product()
    torch.testing.assert_close(found.double(), expected, atol=2e-3 * float(expected.diagonal().max()), rtol=0)


def test_layers_that_read_the_same_share_it(measured):
    reads = measured.reads
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert reads[f"{attention}.q_proj"] == reads[f"{attention}.k_proj"] == reads[f"{attention}.v_proj"]
        assert reads[f"{mlp}.gate_proj"] == reads[f"{mlp}.up_proj"]
        assert (
            len({reads[name] for name in (f"{attention}.q_proj", f"{attention}.o_proj", f"{mlp}.up_proj", f"{mlp}.down_proj")})
            == 4
        )
    assert len(measured.inputs) == 9
    assert all(found.tokens == 45 for found in measured.inputs.values())


def test_encoders_get_one_tensor_for_one_input(measured):
    attention = "model.layers.0.self_attn"
    k, o, q = (measured.facts_of(f"{attention}.{name}_proj", 2.0) for name in "koq")
    assert k.hessian is q.hessian
    assert o.hessian is not q.hessian
    assert torch.equal(q.hessian, measured.input_of(f"{attention}.q_proj").product())
    assert (q.largest, q.tokens, len(q.importance), len(k.importance)) == (2.0, 45, 32, 16)
    nothing = measured.facts_of("elsewhere", 2.0)
    assert (nothing.hessian, nothing.importance, nothing.tokens) == (None, None, 0)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_comes_back_as_it_was(model, gradients):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    measure_statistics(model, TOKENS, gradients=gradients)
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks for module in modules.values())


def test_some_layers_alone_get_the_same_sums(model, measured):
    few = measure_statistics(model, TOKENS, batch=2, layers={"model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"})
    assert set(few.reads) == {"model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"}
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(few.input_of(name).correlation, measured.input_of(name).correlation)
    assert few.reads["model.layers.0.self_attn.k_proj"] == "model.layers.0.self_attn.k_proj"
    assert few.input_of("model.layers.1.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("kind", "changes", "layer"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers.0.block_sparse_moe.experts.{}.w2"),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
            "model.layers.0.mlp.experts.{}.down_proj",
        ),
        (
            "dbrx",
            {
                **{"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}, "d_model": 32, "hidden_size": None},
                "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
            },
            "transformer.blocks.0.ffn.experts.mlp.w2.{}",
        ),
    ],
)
def test_experts_are_observed_by_the_tokens_that_reach_them(kind, changes, layer):
    model = tiny_model(kind, **changes)
    measured = measure_statistics(model, TOKENS, batch=2)
    tokens = [found.tokens if (found := measured.input_of(layer.format(i))) else 0 for i in range(4)]
    assert sum(tokens) == 2 * TOKENS.numel()
    down, gate, up, rows = {
        "mixtral": ("w2", "w1", "w3", 44),
        "qwen3_moe": ("down_proj", "gate_proj", "up_proj", 12),
        "dbrx": ("w2", "w1", "v1", 20),
    }[kind]
    for i in range(4):
        if tokens[i]:
            first, second = (layer.format(i).replace(down, other) for other in (gate, up))
            assert measured.reads[first] == measured.reads[second] != measured.reads[layer.format(i)]
            assert measured.input_of(first).tokens == tokens[i]
            assert len(measured.rows[second]) == rows
            assert measured.input_of(layer.format(i)).product().shape == (rows, rows)


def test_the_order_of_what_a_layer_reads_first_does_not_depend_on_the_batch(model, measured):
    assert measure_statistics(model, TOKENS, batch=5).reads == measured.reads


def test_a_file_gives_back_what_was_saved(tmp_path, measured):
    path = tmp_path / "statistics.safetensors"
    measured.save(path)
    loaded = Statistics.load(path)
    assert loaded.facts == measured.facts
    assert loaded.facts.source == "own text"
    assert loaded.reads == measured.reads
    assert loaded.rows.keys() == measured.rows.keys()
    assert all(torch.equal(loaded.rows[name], rows) for name, rows in measured.rows.items())
    for name, found in measured.inputs.items():
        assert torch.equal(loaded.inputs[name].product(), found.product())
        assert loaded.inputs[name].tokens == found.tokens
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_products_survive_their_rounding():
    x = torch.randn(200, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 10.0 ** torch.arange(-3, 4)
    x[:, 2] = 0
    product = x.T @ x
    found = InputStatistics.of(product, 200).product()
    scale = product.diagonal().sqrt()
    assert ((found - product).abs() <= 6e-4 * scale[:, None] * scale).all()
    assert torch.equal(found, found.T)
    assert not found[2].any()


def edited(path, change):
    """The file with other metadata."""
    header, data = split(path)
    content = json.loads(header["__metadata__"]["statistics"])
    change(content, header)
    header["__metadata__"]["statistics"] = json.dumps(content)
    path.write_bytes(join(header, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, h: c.update(statistics_version=2), "version 1"),
        (lambda c, h: c["facts"].pop("model"), "facts"),
        (lambda c, h: c["facts"].update(length="9"), "facts"),
        (lambda c, h: c["reads"].update(x="nowhere"), "reads"),
        (lambda c, h: c["tokens"].update(more=3), "inputs.more.scale"),
        (lambda c, h: c["tokens"].update({next(iter(c["tokens"])): -1}), "tokens"),
        (lambda c, h: c["reads"].pop("lm_head"), "rows.lm_head"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, measured, change, message):
    path = tmp_path / "statistics.safetensors"
    measured.save(path)
    edited(path, change)
    with pytest.raises(SourceError, match=message):
        Statistics.load(path)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 3e38])
def test_scales_that_are_none_are_refused(tmp_path, measured, value):
    path, name = tmp_path / "statistics.safetensors", next(iter(measured.inputs))
    broken = InputStatistics(torch.full_like(measured.inputs[name].scale, value), measured.inputs[name].correlation, 1)
    Statistics(measured.facts, {**measured.inputs, name: broken}, measured.reads, measured.rows).save(path)
    with pytest.raises(SourceError, match="scale"):
        Statistics.load(path)


def test_correlations_that_no_input_has_are_refused(tmp_path, measured):
    path, name = tmp_path / "statistics.safetensors", next(iter(measured.inputs))
    correlation = measured.inputs[name].correlation.clone()
    correlation[2] = -1  # of the second feature with itself
    broken = InputStatistics(measured.inputs[name].scale.clamp_min(1e-3), correlation, 1)
    Statistics(measured.facts, {**measured.inputs, name: broken}, measured.reads, measured.rows).save(path)
    with pytest.raises(SourceError, match=rf"inputs.{name}.correlation must be 1 of a feature with itself, got -1 of 1"):
        Statistics.load(path)


def test_a_truncated_file_is_refused(tmp_path, measured):
    path = tmp_path / "statistics.safetensors"
    measured.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="truncated"):
        Statistics.load(path)


def test_fingerprints_tell_models_apart(model):
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama")) != model_fingerprint(tiny_model("llama", seed=1))


def test_what_is_not_finite_is_named():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[:] = torch.inf
    with pytest.raises(EvaluationError, match=r"layers.1.*not finite"):
        measure_statistics(model, TOKENS)


def test_nothing_to_observe_is_refused(model):
    with pytest.raises(EvaluationError, match="no linear layer"):
        measure_statistics(model, TOKENS, layers={"nowhere"})
