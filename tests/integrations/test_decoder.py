"""One token by our own forward: the same logits as by transformers', and the reasons why not."""

import pytest
import torch
from torch import nn
from transformers import StaticCache

from seedlm.integrations.transformers import decoder
from seedlm.integrations.transformers.decoder import CACHE, reason_unfused
from seedlm.modeling.quantize import compress_model
from tiny_models import SMALL, tiny_model

IDS = torch.arange(1, 13)[None]
KINDS = ["llama", "mistral", "qwen2"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
FORMATS = [None, SMALL, "3-fast"]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def model_of(kind="llama", format=None, **changes):
    """A tiny model, packed where there is a format. Mistral's attention has no window."""
    model = tiny_model(kind, **changes)
    if kind == "mistral":
        model.config.sliding_window = None
    if format:
        compress_model(model, format)
    return model


def cache_of(model, ids=IDS, length=24):
    """A static cache that holds a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(input_ids=ids, use_cache=True, **{CACHE: cache})
    return cache


def tokens(count=6):
    return [torch.tensor([[number + 3]]) for number in range(count)]


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class TestStep:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_and_cache_are_those_of_transformers(self, kind, format, device):
        model = model_of(kind, format).to(device)
        assert reason_unfused(model) is None
        ours, theirs = (cache_of(model, IDS.to(device)) for _ in range(2))
        for token in (each.to(device) for each in tokens()):
            logits = decoder.step(model, token, ours)
            expected = model(input_ids=token, use_cache=True, **{CACHE: theirs}).logits
            assert logits.shape == expected.shape
            assert off(logits, expected) < 1e-5
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            assert mine.cumulative_length == other.cumulative_length == 18
            assert off(mine.keys, other.keys) < 1e-5
            assert off(mine.values, other.values) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("format", FORMATS)
    def test_halves(self, format, dtype):
        model = model_of("qwen2", format).to(dtype)
        assert reason_unfused(model) is None
        ours, theirs = cache_of(model), cache_of(model)
        logits = decoder.step(model, tokens()[0], ours)
        expected = model(input_ids=tokens()[0], use_cache=True, **{CACHE: theirs}).logits
        assert logits.dtype == dtype
        assert off(logits.double(), expected.double()) < 20 * torch.finfo(dtype).eps

    @pytest.mark.parametrize(
        "changes",
        [
            {"tie_word_embeddings": True},
            {"attention_bias": True, "mlp_bias": True},
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 1, "head_dim": 16},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        ],
        ids=["tied", "biases", "one-for-each", "one-for-all", "yarn", "linear"],
    )
    def test_other_shapes_of_a_llama(self, changes):
        model = model_of("llama", **changes)
        assert reason_unfused(model) is None
        ours, theirs = cache_of(model), cache_of(model)
        for token in tokens():
            expected = model(input_ids=token, use_cache=True, **{CACHE: theirs}).logits
            assert off(decoder.step(model, token, ours), expected) < 1e-5

    @pytest.mark.parametrize("tie", [True, False])
    def test_packed_embeddings_and_heads(self, tie):
        model = tiny_model("llama", tie_word_embeddings=tie)
        compress_model(model, SMALL, embeddings=SMALL, head=SMALL)
        assert reason_unfused(model) is None
        ours, theirs = cache_of(model), cache_of(model)
        for token in tokens():
            expected = model(input_ids=token, use_cache=True, **{CACHE: theirs}).logits
            assert off(decoder.step(model, token, ours), expected) < 1e-5

    def test_positions_of_the_rotary_embedding_are_others_where_they_are_given(self):
        model = model_of()
        ours, theirs, plain = cache_of(model), cache_of(model), cache_of(model)
        token, positions = tokens()[0], torch.tensor([[3]])
        expected = model(input_ids=token, position_ids=positions, use_cache=True, **{CACHE: theirs}).logits
        assert off(decoder.step(model, token, ours, positions), expected) < 1e-5
        assert off(decoder.step(model, token, plain), expected) > 1e-3


class TestReasons:
    """What keeps a model from it. Each changes a model that it would serve."""

    @pytest.mark.parametrize(
        ("kind", "changes", "reason"),
        [
            ("qwen3", {}, "model type qwen3 is none of llama, mistral, qwen2"),
            ("mistral", {"sliding_window": 8}, "sliding window"),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
            ("llama", {"hidden_act": "gelu"}, "model.layers.0.mlp.act_fn is a GELU"),
            (
                "llama",
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                "is dynamic, and none of",
            ),
            ("llama", {"output_hidden_states": True}, "other outputs than logits"),
        ],
    )
    def test_architectures_and_configurations(self, kind, changes, reason):
        assert reason in reason_unfused(tiny_model(kind, **changes))

    def test_a_base_model_and_no_model(self):
        assert "which is not known there" in reason_unfused(model_of().model)
        assert reason_unfused(nn.Linear(2, 2)) == "model type None is none of llama, mistral, qwen2"

    @pytest.mark.parametrize("name", ["model.layers.1.self_attn", "model.layers.0.mlp.up_proj", "model.norm", "lm_head"])
    def test_hooks(self, name):
        model = model_of()
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda *_: None)
        assert reason_unfused(model) == f"{name} has a hook or a forward of its own"
        handle.remove()
        assert reason_unfused(model) is None
        module.register_forward_pre_hook(lambda *_: None)
        assert reason_unfused(model) == f"{name} has a hook or a forward of its own"

    def test_a_hook_for_all_modules(self):
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert reason_unfused(model_of()) == "there are hooks for all modules"
        finally:
            handle.remove()

    def test_a_forward_that_was_replaced(self):
        model = model_of()
        model.model.norm.forward = lambda x: x
        assert reason_unfused(model) == "model.norm has a hook or a forward of its own"

    def test_layers_of_another_class(self):
        class Adapted(nn.Linear):
            pass

        model = model_of()
        model.model.layers[1].self_attn.v_proj = Adapted(32, 16)
        assert reason_unfused(model) == "model.layers.1.self_attn.v_proj is a Adapted, which is not known there"

    def test_training_and_several_dtypes(self):
        model = model_of()
        model.model.layers[0].train()
        assert reason_unfused(model) == "model.layers.0 is in training mode"
        model.eval().model.norm.double()
        assert "several dtypes or devices" in reason_unfused(model)

    def test_hidden_states_that_were_asked_for_once_leave_no_reason(self):
        model = model_of()
        assert model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert reason_unfused(model) is None
