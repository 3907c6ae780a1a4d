"""Statistics layer by layer: the same as of the whole model at once, with one layer at a time on the device."""

import pytest
import torch

from seedlm.calibration import placement
from seedlm.calibration import statistics as module
from seedlm.calibration.layer_by_layer import NotAChainError
from seedlm.calibration.own_text import OwnText, write_text
from seedlm.calibration.placement import is_away, kept, nbytes, numbered_layers, place, workspace
from seedlm.calibration.spool import keep
from seedlm.calibration.statistics import measure_statistics
from seedlm.errors import EvaluationError
from tiny_models import tiny_model

TOKENS = torch.randint(1, 64, (5, 9), generator=torch.Generator().manual_seed(0))
KINDS = {
    "llama": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "falcon": {"bias": True, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 40, "moe_layers": [1]},
}


def at_once(model, monkeypatch):
    """The statistics of the whole model in one pass."""

    def refuse(*_):
        raise NotAChainError("asked for")

    with monkeypatch.context() as patch:
        patch.setattr(module, "layer_by_layer", refuse)
        return measure_statistics(model, TOKENS, batch=2)


def assert_same(one, other):
    assert one.reads == other.reads
    assert one.rows.keys() == other.rows.keys()
    assert all(torch.equal(rows, other.rows[name]) for name, rows in one.rows.items())
    for name, found in one.inputs.items():
        assert found.tokens == other.inputs[name].tokens
        assert torch.equal(found.scale, other.inputs[name].scale)
        assert torch.equal(found.correlation, other.inputs[name].correlation)


@pytest.fixture
def away():
    """A model none of whose layers has room."""
    model = tiny_model("llama", bos_token_id=5, num_hidden_layers=3)
    layers = numbered_layers(model).values()
    outside = nbytes(model) - sum(map(nbytes, layers))
    assert place(model, torch.device("cpu"), outside + nbytes(model.model.layers[0])) == sum(map(nbytes, layers))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_whole_model_gives(kind, monkeypatch):
    model = tiny_model(kind, **KINDS[kind])
    monkeypatch.setattr(module, "_at_once", lambda *_: pytest.fail("its layers are a chain"))
    found = measure_statistics(model, TOKENS, batch=2)
    monkeypatch.undo()
    assert_same(found, at_once(model, monkeypatch))


def test_layers_that_are_away_give_the_same(away, tmp_path):
    model = tiny_model("llama", bos_token_id=5, num_hidden_layers=3)
    text = OwnText(sequences=5, length=9)
    tokens = write_text(away, text)
    assert torch.equal(tokens, write_text(model, text))
    assert_same(measure_statistics(away, tokens, batch=2, spool=tmp_path), measure_statistics(model, tokens, batch=2))
    assert not list(tmp_path.iterdir())


def test_one_layer_is_there_at_a_time_and_comes_twice(away, monkeypatch):
    """Once for each piece forwards, and once backwards for all pieces."""
    layers = numbered_layers(away)
    home = {name: {p.data_ptr() for p in layer.parameters()} for name, layer in layers.items()}
    visits, come = [], placement._Visit.come

    def present():
        return [name for name, layer in layers.items() if {p.data_ptr() for p in layer.parameters()} != home[name]]

    def watched(visit):
        before = present()
        come(visit)
        visits.extend(present() if not before else [])
        assert len(present()) == 1

    monkeypatch.setattr(placement._Visit, "come", watched)
    measure_statistics(away, TOKENS, batch=2)
    assert visits == [*[*layers] * 3, *reversed(layers)]
    assert not present()


def test_layers_stay_as_long_as_there_is_room():
    model = tiny_model("llama", num_hidden_layers=4)
    layer = nbytes(model.model.layers[0])
    outside = nbytes(model) - 4 * layer
    assert place(model, torch.device("cpu"), outside + 3 * layer) == 2 * layer
    assert [is_away(each) for each in model.model.layers] == [False, False, True, True]
    with pytest.raises(EvaluationError, match=r"a layer of it takes .* more than there is room for on cpu"):
        place(tiny_model("llama"), torch.device("cpu"), outside)


def test_a_layer_goes_when_a_pass_fails(away):
    home = [p.data_ptr() for p in away.parameters()]
    away.model.layers[1].self_attn.v_proj.weight.data[:] = torch.inf
    with pytest.raises(EvaluationError, match=r"layers.1.*not finite"):
        measure_statistics(away, TOKENS)
    assert [p.data_ptr() for p in away.parameters()] == home
    assert not any("forward" in vars(layer) for layer in away.model.layers)


@pytest.mark.parametrize("way", ["between", "in place", "beside", "in a box", "at the end"])
def test_layers_that_are_no_chain_are_seen(way, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3)
    returned, layers = [], model.model.layers
    layers[0].register_forward_hook(lambda m, args, output: returned.append(output))
    if way == "between":
        layers[2].register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    elif way == "in place":
        layers[2].register_forward_pre_hook(lambda m, args: (args[0].add_(1), *args[1:]))
    elif way == "beside":
        layers[2].register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "more": returned[-1]}), with_kwargs=True)
    elif way == "in a box":
        box = {}
        for layer in layers:
            layer.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "box": box}), with_kwargs=True)
        layers[0].mlp.register_forward_hook(lambda m, args, output: box.update(kept=output))
    else:
        model.model.norm.register_forward_pre_hook(lambda m, args: (args[0] + returned[-1],))
    passes = []
    real = module._at_once
    monkeypatch.setattr(module, "_at_once", lambda *arguments: (passes.append(1), real(*arguments)))
    found = measure_statistics(model, TOKENS, batch=2)
    assert passes == [1]
    assert all(read.tokens == TOKENS.numel() for read in found.inputs.values())
    place(model, torch.device("cpu"), nbytes(model) - 1)
    with pytest.raises(EvaluationError, match="it must fit the device as a whole, for "):
        measure_statistics(model, TOKENS, batch=2)


def test_what_is_kept_on_a_disk_is_the_same(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
        tensor = torch.randn(3, 5).mul(100).to(dtype)
        assert torch.equal(keep(tensor.T, tmp_path), tensor.T)
        assert keep(tensor, None) is tensor
    assert keep(torch.empty(0, 4), tmp_path).shape == (0, 4)
    assert not list(tmp_path.iterdir())


def test_workspace_counts_sums_logits_and_caches():
    """70B's shapes: a float64 sum of 28672 columns is 6.6 GB, and a cache of 128 x 256 tokens 10.7 GB."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        config = LlamaConfig(**sizes, num_hidden_layers=80, vocab_size=128256, dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config)
    assert 137e9 < nbytes(model) < 142e9
    assert kept(model, 64 * 256) == 80 * 64 * 256 * 8192 * 2
    assert 10e9 < workspace(model, 128, 256, 1) < 20e9
    assert 13e9 < workspace(model, 1, 256, 8) < 25e9
