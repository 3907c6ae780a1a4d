"""Why a model, or a cache, does not go through our own forward."""

import functools
import sys

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import StaticLayer

from decoder_models import IDS, KINDS, cache_of, fused, model_of
from seedlm.integrations.transformers import decoder_reasons, decoder_steps
from seedlm.integrations.transformers.decoder_reasons import reason_unfused
from seedlm.modeling.linear import SeedLinear
from tiny_models import SMALL, tiny_model

pytestmark = pytest.mark.usefixtures("decodes_anywhere")

HALF = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}


def modeling(model):
    """The module of transformers that a model comes from."""
    return sys.modules[decoder_reasons.original_class(type(model)).__module__]


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
            ("llama", {"rope_parameters": HALF}, "turns a part of each head"),
            ("llama", {"output_hidden_states": True}, "other outputs than logits"),
        ],
    )
    def test_architectures_and_configurations(self, kind, changes, reason):
        assert reason in reason_unfused(tiny_model(kind, **changes))

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("num_hidden_layers", 1, "it has 2 layers, of which 1 are in use"),
            ("num_attention_heads", 8, "32 outputs of q_proj are not 8 heads"),
            ("layer_types", ["full_attention", "sliding_attention"], "its attention has a sliding window"),
            ("_attn_implementation", "paged|sdpa", "its attention is paged|sdpa"),
            ("output_attentions", True, "its configuration asks for other outputs than logits"),
            ("return_dict", False, "its configuration asks for other outputs than logits"),
        ],
    )
    def test_a_configuration_that_was_changed(self, name, value, reason):
        model = model_of(attn_implementation="eager")
        setattr(model.config, name, value)
        assert reason_unfused(model) == reason

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

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["Attention", "DecoderLayer", "ForCausalLM", "MLP", "Model", "RMSNorm", "RotaryEmbedding"])
    @pytest.mark.parametrize("named_alike", [False, True])
    def test_a_forward_that_was_replaced_in_its_class(self, monkeypatch, kind, name, named_alike):
        model = fused(kind)
        changed = getattr(modeling(model), decoder_reasons._PREFIXES[kind] + name)
        forward = lambda *args, **inputs: None  # noqa: E731
        monkeypatch.setattr(changed, "forward", functools.wraps(changed.forward)(forward) if named_alike else forward)
        assert reason_unfused(model).endswith("has a hook or a forward of its own")

    def test_a_forward_of_another_class_of_transformers_and_one_that_torch_wraps(self, monkeypatch):
        model, other = model_of(), model_of("mistral")
        norm = type(model.model.norm)
        monkeypatch.setattr(norm, "forward", torch.no_grad()(norm.forward))  # as some versions have it
        assert reason_unfused(model) is None
        monkeypatch.setattr(norm, "forward", type(other.model.norm).forward)
        assert reason_unfused(model).endswith("has a hook or a forward of its own")

    @pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, SeedLinear])
    def test_a_forward_that_was_replaced_in_a_layer_of_any_model(self, monkeypatch, kind):
        model = model_of(format=SMALL)
        monkeypatch.setattr(kind, "forward", lambda *_: None)
        assert reason_unfused(model).endswith("has a hook or a forward of its own")

    def test_a_class_that_was_replaced_before_the_model_was_made(self, monkeypatch):
        home = modeling(model_of())
        monkeypatch.setattr(home, "LlamaRMSNorm", type("LlamaRMSNorm", (home.LlamaRMSNorm,), {"__module__": "liger"}))
        assert reason_unfused(model_of()).endswith("is a LlamaRMSNorm, which is not known there")

    @pytest.mark.parametrize(
        ("name", "attention"), [("apply_rotary_pos_emb", "sdpa"), ("eager_attention_forward", "eager"), (None, "sdpa")]
    )
    def test_functions_that_were_replaced(self, monkeypatch, name, attention):
        model = model_of(attn_implementation=attention)
        assert reason_unfused(model) is None
        if name:
            monkeypatch.setattr(modeling(model), name, lambda *_: None)
        else:
            monkeypatch.setitem(AttentionInterface._global_mapping, attention, lambda *_: None)
        assert reason_unfused(model) == "functions of its attention were replaced"

    def test_a_function_that_the_package_kernels_made_a_module_of_is_not_replaced_until_it_gets_another_forward(
        self, monkeypatch
    ):
        names = {"__name__": "kernels.layer.layer", "nn": nn}
        exec("class Func(nn.Module):\n    def forward(self, *args): ...", names)
        model, function = model_of(), names["Func"]()
        monkeypatch.setattr(modeling(model), "apply_rotary_pos_emb", function)
        assert reason_unfused(model) is None
        function.forward = lambda *_: None
        assert reason_unfused(model) == "functions of its attention were replaced"

    def test_layers_in_another_order(self):
        model = model_of()
        model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
        assert reason_unfused(model) == "its layers are not in their own order"

    def test_no_layers(self):
        assert reason_unfused(model_of(num_hidden_layers=0)) == "it has 0 layers, of which 0 are in use"

    @pytest.mark.parametrize("home", ["_parameters", "_buffers"])
    def test_tensors_of_a_class_of_their_own(self, home):
        class Special(nn.Parameter):
            pass

        model = model_of()
        getattr(model.model.norm, home)["weight"] = Special(torch.ones(32))
        assert reason_unfused(model) == "model.norm has tensors of a class of their own"

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
        model.eval().model.norm.half()
        reason = "its weights have several dtypes or devices: torch.float16 on cpu, torch.float32 on cpu"
        assert reason_unfused(model) == reason
        assert reason_unfused(model.double()) == "its weights are of torch.float64"

    def test_hidden_states_that_were_asked_for_once_leave_no_reason(self):
        model = model_of()
        assert model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert reason_unfused(model) is None

    def test_on_the_cpu_others_do_not(self, monkeypatch):
        monkeypatch.setattr(decoder_reasons, "PACKED", ("cpu",))
        reason = "on a cpu transformers' own forward is as fast"
        mixed = model_of("llama", "3-fast")
        mixed.model.layers[1].mlp.up_proj = nn.Linear(32, 64, bias=False).requires_grad_(False).eval()
        by_torch = model_of("llama", "3-fast")
        for layer in by_torch.modules():
            if isinstance(layer, SeedLinear):
                layer.backend = "torch"
        halves = model_of("llama", "3-fast").to(torch.float16)
        for model in (model_of("llama"), model_of("llama", SMALL), mixed, by_torch, halves):
            assert reason_unfused(model) == reason

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda cache: setattr(cache, "offloading", True), "the cache is offloaded, or another model's"),
            (lambda cache: setattr(cache.layers[1], "cumulative_length", 12), "a layer of the cache is a StaticLayer"),
            (
                lambda cache: setattr(cache.layers[1], "__class__", type("Odd", (StaticLayer,), {})),
                "a layer of the cache is a Odd",
            ),
            (lambda cache: setattr(cache.layers[1], "values", torch.zeros(1, 2, 8, 24).mT), "the cache holds"),
            (
                lambda cache: setattr(cache.layers[1], "keys", torch.zeros(1, 2, 24, 8).double()),
                "the cache holds torch.float64",
            ),
        ],
        ids=["offloaded", "length", "class", "strides", "dtype"],
    )
    def test_not_over_a_cache_of_another_kind(self, change, reason):
        model = fused()
        cache = cache_of(model)
        assert decoder_steps.steps_over(model, cache).reason is None
        change(cache)
        assert decoder_reasons.reason_unfused_over(model, cache).startswith(reason)
