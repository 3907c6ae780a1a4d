"""One token by our own forward: the same logits as by transformers', the way in for `generate`, and the reasons why not."""

import copy
import functools
import gc
import inspect
import os
import pickle
import re
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from operator import attrgetter
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

from seedlm.codes import on_cpu, threads
from seedlm.codes.registry import parse_format
from seedlm.codes.trellis.kernels.cpu import NumbaBackend
from seedlm.inference import attention
from seedlm.integrations.transformers import decoder
from seedlm.integrations.transformers.decoder import CACHE, fuse_decoding, reason_unfused
from seedlm.integrations.transformers.quantizer import SeedLMConfig
from seedlm.modeling.linear import SeedLinear
from seedlm.modeling.quantize import compress_model, dequantize_model
from tiny_models import SMALL, tiny_model

IDS = torch.arange(1, 13)[None]
KINDS = ["llama", "mistral", "qwen2"]
HALF = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
FORMATS = [None, SMALL, "3-fast"]
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}
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


def modeling(model):
    """The module of transformers that a model comes from."""
    return sys.modules[decoder._original(type(model)).__module__]


def tokens(count=6):
    return [torch.tensor([[number + 3]]) for number in range(count)]


def off(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def on(device, model):
    """In half precision on a GPU, whose products are no more exact."""
    return model.to(device, torch.float16 if device == "cuda" else torch.float32)


@pytest.fixture(autouse=True)
def on_the_cpu_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(decoder, "PACKED", ())
    with torch.no_grad():
        yield


def launches(monkeypatch):
    """A list that becomes longer with each launch of attention's kernel."""
    launched, kernel = [], attention._kernel
    monkeypatch.setattr(attention, "_kernel", lambda *args: launched.append(1) or kernel(*args))
    return launched


def theirs(model, token, cache, **more):
    """Logits by transformers' own forward."""
    return decoder._original(type(model)).forward(model, input_ids=token, use_cache=True, **{CACHE: cache}, **more).logits


class TestStep:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_and_cache_are_those_of_transformers(self, kind, format, device):
        model = on(device, model_of(kind, format))
        assert reason_unfused(model) is None
        mine, other = (cache_of(model, IDS.to(device)) for _ in range(2))
        for token in (each.to(device) for each in tokens()):
            logits, expected = decoder.step(model, token, mine), theirs(model, token, other)
            assert logits.shape == expected.shape
            assert off(logits, expected) < TOLERANCE[device]
        for found, expected in zip(mine.layers, other.layers, strict=True):
            assert found.cumulative_length == expected.cumulative_length == 18
            assert off(found.keys, expected.keys) < TOLERANCE[device]
            assert off(found.values, expected.values) < TOLERANCE[device]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_by_the_kernel_of_attention(self, monkeypatch, kind, format):
        launched = launches(monkeypatch)
        model = on("cuda", model_of(kind, format, head_dim=64))
        mine, other = (cache_of(model, IDS.cuda()) for _ in range(2))
        for token in tokens():
            assert off(decoder.step(model, token.cuda(), mine), theirs(model, token.cuda(), other)) < TOLERANCE["cuda"]
        assert len(launched) == 6 * 2
        for found, expected in zip(mine.layers, other.layers, strict=True):
            assert off(found.keys, expected.keys) < TOLERANCE["cuda"]
            assert off(found.values, expected.values) < TOLERANCE["cuda"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("format", FORMATS)
    def test_halves(self, format, dtype):
        model = model_of("qwen2", format).to(dtype)
        assert reason_unfused(model) is None
        logits = decoder.step(model, tokens()[0], cache_of(model))
        assert logits.dtype == dtype
        assert off(logits, theirs(model, tokens()[0], cache_of(model))) < 20 * torch.finfo(dtype).eps

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
        self.check(model_of("llama", **changes))

    @pytest.mark.parametrize("tie", [True, False])
    def test_packed_embeddings_and_heads(self, tie):
        model = tiny_model("llama", tie_word_embeddings=tie)
        compress_model(model, SMALL, embeddings=SMALL, head=SMALL)
        self.check(model)

    def check(self, model):
        assert reason_unfused(model) is None
        mine, other = cache_of(model), cache_of(model)
        for token in tokens():
            assert off(decoder.step(model, token, mine), theirs(model, token, other)) < 1e-5

    def test_positions_of_the_rotary_embedding_are_others_where_they_are_given(self):
        model = model_of()
        token, positions = tokens()[0], torch.tensor([[3]])
        expected = theirs(model, token, cache_of(model), position_ids=positions)
        assert off(decoder.step(model, token, cache_of(model), positions), expected) < 1e-5
        assert off(decoder.step(model, token, cache_of(model)), expected) > 1e-3


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

    def test_a_hook_of_the_model_itself_is_called(self, counted):
        model, called = fused(), []
        model.register_forward_hook(lambda *_: called.append(1))
        written(model)
        assert counted == [7]
        assert len(called) == 8

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
        changed = getattr(modeling(model), decoder._PREFIXES[kind] + name)
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


# ---- The way in ----


@pytest.fixture
def counted(monkeypatch):
    """How many tokens went through `step`."""
    count = [0]

    def step(*args):
        count[0] += 1
        return original(*args)

    original = decoder.step
    monkeypatch.setattr(decoder, "step", step)
    return count


def fused(kind="llama", format=None, **changes):
    model = model_of(kind, format, **changes)
    fuse_decoding(model)
    return model


def written(model, ids=IDS, new=8, **options):
    """Tokens and logits of a greedy text."""
    options = {"cache_implementation": "static", "pad_token_id": 0, **options}
    found = model.generate(
        ids,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits)


class TestGenerate:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_text_with_and_without(self, counted, monkeypatch, kind, format, device):
        model, ids = on(device, fused(kind, format)), IDS.to(device)
        found, logits = written(model, ids)
        replayed = 5 if device == "cuda" else 6 if format == "3-fast" else 0  # on a GPU the capture is a step
        assert counted == [7 - replayed]  # the prompt tells the first of 8
        monkeypatch.setattr(decoder, "DEVICES", ())
        expected_tokens, expected = written(model, ids, disable_compile=True)
        same = int((found == expected_tokens).long().cumprod(1).sum()) - IDS.shape[1]
        assert same == 8 or device == "cuda"
        assert off(logits[: same + 1], expected[: same + 1]) < TOLERANCE[device]

    def test_on_the_cpu_nothing_changes(self, counted, monkeypatch):
        monkeypatch.undo()
        assert decoder.PACKED == ("cpu",)
        model = fused()
        monkeypatch.setattr(decoder, "step", None)
        assert reason_unfused(model) == "on a cpu transformers' own forward is as fast"
        assert decoder.static_cache(model, 8) == {}
        with torch.no_grad():
            written(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_on_the_cpu_packed_models_go_this_way(self, counted, monkeypatch, kind, dtype):
        """With attention and what lies between products compiled: the same text and logits as by transformers."""
        monkeypatch.setattr(decoder, "PACKED", ("cpu",))
        model = fused(kind, "3-fast", head_dim=64).to(dtype)
        assert reason_unfused(model) is None
        assert decoder.static_cache(model, 8) == {"cache_implementation": "static"}
        found, logits = written(model)
        assert counted == [1]  # the others are replayed
        monkeypatch.setattr(decoder, "DEVICES", ())
        tokens, expected = written(model, disable_compile=True)
        same = int((found == tokens).long().cumprod(1).sum()) - IDS.shape[1]
        assert same == 8 or dtype == torch.bfloat16
        assert off(logits[: same + 1], expected[: same + 1]) < {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]

    def test_on_the_cpu_others_do_not(self, monkeypatch):
        monkeypatch.setattr(decoder, "PACKED", ("cpu",))
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

    def test_what_is_asked_of_generate(self, counted):
        model = fused()
        assert decoder.static_cache(model, 8) == {"cache_implementation": "static"}
        model.generation_config.cache_implementation = "dynamic"
        assert decoder.static_cache(model, 8) == {}
        assert decoder.static_cache(tiny_model("qwen3"), 8) == {}

    def test_no_static_cache_that_takes_more_than_half_of_the_free_memory(self, monkeypatch):
        model = fused()
        monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4096, 1 << 30))
        assert decoder.static_cache(model, 8)  # of 256 bytes each
        assert not decoder.static_cache(model, 9)
        for home, name in ((model, "_previous_max_cache_length"), (model.generation_config, "max_cache_len")):
            monkeypatch.setattr(home, name, 9, raising=False)  # `generate` makes it no shorter
            assert not decoder.static_cache(model, 8)
            monkeypatch.setattr(home, name, 8)

    def test_on_the_cpu_no_static_cache_for_more_than_the_positions_or_half_of_the_memory(self, monkeypatch):
        model = fused()
        longest = model.config.max_position_embeddings
        assert decoder.static_cache(model, longest)
        assert not decoder.static_cache(model, longest + 1)
        monkeypatch.setattr(decoder, "free_host_memory", lambda: 4096)
        assert decoder.static_cache(model, 8)  # of 256 bytes each
        assert not decoder.static_cache(model, 9)
        monkeypatch.setattr(decoder, "free_host_memory", lambda: None)
        assert decoder.static_cache(model, longest)

    def test_a_second_text_and_one_over_a_cache_that_was_reset(self, counted):
        model = fused()
        expected = written(model)
        for _ in range(2):
            again = written(model)
            assert all(map(torch.equal, again, expected))
        cache = StaticCache(config=model.config, max_cache_len=24)
        for _ in range(2):
            again = written(model, cache_implementation=None, **{CACHE: cache})
            assert all(map(torch.equal, again, expected))
            cache.reset()
        assert counted == [5 * 7]

    def test_a_text_goes_on_from_where_it_was(self, counted):
        model = fused()
        whole, _ = written(model, new=8)
        cache = StaticCache(config=model.config, max_cache_len=24)
        options = {"cache_implementation": None, CACHE: cache}
        first, _ = written(model, new=3, **options)
        second, _ = written(model, first, new=5, **options)
        assert torch.equal(second, whole)
        assert counted == [7 + 2 + 5]  # what goes on is one token, and no prompt

    def test_the_mask_that_generate_makes_is_left_out_alone(self, counted):
        model = fused()
        cache = cache_of(model)
        asked = {"next_sequence_length": 1, "attention_mask": None, "use_cache": True, CACHE: cache}
        ids = torch.cat([IDS, tokens()[0]], dim=1)
        asked["position_ids"] = torch.arange(13)[None]
        found = model.prepare_inputs_for_generation(ids, **asked)
        expected = LlamaForCausalLM.prepare_inputs_for_generation(model, ids, **asked)
        assert expected.pop("attention_mask").shape == (1, 1, 1, 24)
        assert found.pop(CACHE) is expected.pop(CACHE) is cache
        assert found.keys() == expected.keys()
        assert torch.equal(found["input_ids"], tokens()[0])
        assert found["position_ids"].tolist() == [[12]]
        asked |= {CACHE: cache_of(model, torch.cat([IDS, IDS])), "position_ids": torch.arange(13).expand(2, 13)}
        assert "attention_mask" in model.prepare_inputs_for_generation(torch.cat([ids, ids]), **asked)

    @pytest.mark.parametrize(
        ("ids", "options"),
        [
            (IDS, {"attention_mask": torch.cat([torch.zeros(1, 2), torch.ones(1, 10)], dim=1).long()}),
            (torch.cat([IDS, IDS.flip(1)]), {}),
            (IDS, {"num_beams": 2}),
            (IDS, {"output_hidden_states": True}),
            (IDS, {"output_attentions": True}),
            (IDS, {"cache_implementation": None}),
            (IDS, {"cache_implementation": None, "use_cache": False}),
        ],
        ids=["padding", "batch", "beams", "hidden-states", "attentions", "dynamic", "no-cache"],
    )
    def test_other_calls_are_those_of_transformers(self, counted, monkeypatch, ids, options):
        model = fused(attn_implementation="eager")
        tokens, logits = written(model, ids, **options)
        assert counted == [0]
        monkeypatch.setattr(decoder, "_is_step", lambda *_: False)
        expected_tokens, expected = written(model, ids, **options)
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(logits, expected)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None),
            lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None),
            lambda model: model.train(),
        ],
        ids=["hook", "pre-hook", "training"],
    )
    def test_models_with_a_reason_are_those_of_transformers(self, counted, change):
        model = fused()
        change(model)
        written(model)
        assert counted == [0]

    @pytest.mark.parametrize("way", ["compressed", "loaded", "compressed-while-loaded"])
    def test_packed_models_decode_so_by_themselves(self, counted, tmp_path, way):
        model = model_of("llama", SMALL)
        if way == "loaded":
            model.save_pretrained(tmp_path)
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
        elif way == "compressed-while-loaded":
            model_of().save_pretrained(tmp_path)
            model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SeedLMConfig(format=SMALL))
        written(model)
        assert counted == [7]
        written(model.dequantize())
        assert counted == [14]

    def test_text_of_the_command_is_the_same(self, counted, monkeypatch, folders):
        from seedlm.integrations.transformers.generate import Drawing, generate

        drawing = Drawing(max_new_tokens=20)

        def text():
            return "".join(generate(folders[1], "Once upon a time", chat=False, drawing=drawing, device="cpu"))

        found = text()
        assert counted == [19]
        monkeypatch.setattr(decoder, "DEVICES", ("cuda",))
        assert found == text()
        assert counted == [19]

    def test_a_sliding_window(self, counted):
        model = tiny_model("mistral", sliding_window=8)
        fuse_decoding(model)
        written(model)
        assert counted == [0]

    def test_an_adapter(self, counted):
        peft = pytest.importorskip("peft")
        model = fused()
        plain, _ = written(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
        before = counted[0]
        written(adapted, IDS)
        assert counted == [before] == [7]
        assert torch.equal(written(adapted.unload())[0], plain)
        assert counted == [14]


class TestCalls:
    """Calls of the model itself."""

    def test_one_token(self, counted):
        model = fused()
        cache, other = cache_of(model), cache_of(model)
        for name in {"past_key_values", CACHE}:
            found = model(input_ids=tokens()[0], use_cache=True, **{name: cache})
            expected = LlamaForCausalLM.forward(model, input_ids=tokens()[0], use_cache=True, **{CACHE: other})
            assert type(found) is type(expected)
            assert found.keys() == expected.keys()
            assert found[CACHE] is cache
            assert off(found.logits, expected.logits) < 1e-5
        assert counted[0] == len({"past_key_values", CACHE})

    @pytest.mark.parametrize(
        "options",
        [
            {"attention_mask": torch.ones(1, 13)},
            {"output_hidden_states": True},
            {"return_dict": False},
            {"use_cache": False},
            {"labels": torch.tensor([[1]])},
            {"logits_to_keep": torch.tensor([0])},
            {"logits_to_keep": -1},
            {"input_ids": torch.tensor([[1, 2]])},
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 1, 32)},
            {"cache_of": DynamicCache},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_other_calls(self, counted, options):
        model = fused()
        cache = options.get("cache_of", lambda **_: cache_of(model))(config=model.config)
        call = {"input_ids": tokens()[0], "use_cache": True, CACHE: cache, **options}
        call.pop("cache_of", None)
        model(**call)
        assert counted == [0]

    def test_not_with_gradients_autocast_or_an_onlooker(self, counted):
        from torch.utils.flop_counter import FlopCounterMode

        model = fused()
        call = {"input_ids": tokens()[0], "use_cache": True}
        with torch.enable_grad():
            assert model(**call, **{CACHE: cache_of(model)}).logits.requires_grad
        cache = cache_of(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not decoder._is_step(model, {**call, CACHE: cache})
        with FlopCounterMode(display=False) as counter:
            model(**call, **{CACHE: cache})
        assert counter.get_total_flops()
        assert counted == [0]
        model(**call, **{CACHE: cache})
        assert counted == [1]

    def test_not_while_it_is_traced_or_over_positions_elsewhere(self, monkeypatch):
        model = fused()
        call = {"input_ids": tokens()[0], CACHE: cache_of(model), "position_ids": torch.tensor([[12]])}
        assert decoder._is_step(model, call)
        assert not decoder._is_step(model, {**call, "position_ids": torch.empty(1, 1, device="meta")})
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert not decoder._is_step(model, call)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: nn.modules.module.register_module_forward_hook(lambda *_: None),
            lambda model: model.model.layers[0].mlp.register_forward_hook(lambda *_: None),
            lambda model: model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None),
            lambda model: setattr(model.model.norm, "forward", type(model.model.norm).forward.__get__(model.model.norm)),
            lambda model: setattr(model.config, "output_hidden_states", True),
            lambda model: model.train(),
            lambda model: model.model.layers[0].train(),
            lambda model: model.model.layers.__setitem__(0, copy.deepcopy(model.model.layers[1])),
        ],
        ids=["all", "hook", "pre-hook", "forward", "hidden-states", "training", "layer-training", "layer"],
    )
    def test_not_from_the_step_on_at_which_there_is_a_reason(self, counted, change):
        model = fused()
        cache = cache_of(model)
        model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
        assert counted == [1]
        handle = change(model)
        try:
            model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
        finally:
            if hasattr(handle, "remove"):
                handle.remove()
        assert counted == [1]

    def test_not_over_an_empty_cache_and_then_over_it(self, counted):
        model = fused()
        cache = StaticCache(config=model.config, max_cache_len=8)
        for expected in range(3):
            model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
            assert counted == [expected]
        assert cache.get_seq_length() == 3

    @pytest.mark.parametrize(
        ("changes", "ids", "reason"),
        [
            ({"num_hidden_layers": 3}, IDS, "the cache is offloaded, or another model's"),
            ({"num_key_value_heads": 1}, IDS, r"holds torch.float32 \[1, 1, 24, 8\] on cpu, not torch.float32 \[1, 2, 24, 8\]"),
            ({}, torch.cat([IDS, IDS]), r"holds torch.float32 \[2, 2, 24, 8\] on cpu, not"),
        ],
        ids=["layers", "heads", "batch"],
    )
    def test_not_over_a_cache_that_does_not_fit(self, counted, changes, ids, reason):
        model, cache = fused(), cache_of(model_of(**changes), ids)
        assert decoder.decode(model, tokens()[0], cache) is None
        assert re.search(reason, decoder._steps(model, cache).reason)
        assert counted == [0]

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
        assert decoder._steps(model, cache).reason is None
        change(cache)
        assert decoder._reason(model, cache).startswith(reason)

    def test_codes_that_change_between_two_tokens(self, counted):
        model = fused(format=SMALL)
        cache, other = cache_of(model), cache_of(model)
        model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
        dequantize_model(model)
        found = model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache}).logits
        theirs(model, tokens()[0], other)
        expected = theirs(model, tokens()[0], other)
        assert counted == [2]
        assert off(found, expected) < 1e-5

    def test_tensors_of_a_cache_that_are_replaced(self, counted):
        model = fused()
        cache, other = cache_of(model), cache_of(model)
        model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
        model(input_ids=tokens()[0], use_cache=True, **{CACHE: other})
        known = decoder._steps(model, cache)
        assert decoder._steps(model, cache) is known
        for layer in cache.layers:
            layer.keys = layer.keys.clone()
        found, expected = (model(input_ids=tokens()[1], use_cache=True, **{CACHE: each}).logits for each in (cache, other))
        assert torch.equal(found, expected)
        assert decoder._steps(model, cache) is not known


class TestTheModelStaysWhatItWas:
    def test_its_class(self):
        model, plain = fused(), model_of()
        assert type(model) is not LlamaForCausalLM
        assert isinstance(model, LlamaForCausalLM)
        assert repr(model) == repr(plain)
        assert repr(type(model)) == repr(LlamaForCausalLM)
        for name in ("forward", "prepare_inputs_for_generation", "get_compiled_call", "generate"):
            assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(plain, name))
        kind = type(model)
        fuse_decoding(model)
        assert type(model) is kind is type(fused())

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), tiny_model("qwen3"), model_of().model], ids=["linear", "qwen3", "base"])
    def test_others_are_left_alone(self, model):
        kind = type(model)
        fuse_decoding(model)
        assert type(model) is kind

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
    def test_copies_decode_by_themselves(self, counted, copied):
        model = fused(format=SMALL)
        before = written(model)
        other = copied(model)
        assert type(other) is type(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert all(map(torch.equal, written(other), before))
        assert counted == [14]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
    def test_a_class_that_is_made_of_its_class_is_not_it(self, monkeypatch, copied):
        mine = type("Mine", (type(fused()),), {"__module__": __name__})
        monkeypatch.setattr(sys.modules[__name__], "Mine", mine, raising=False)
        model = fused()
        model.__class__ = mine
        assert reason_unfused(model) == "the model is a Mine, which is not known there"
        assert type(copied(model)) is mine

    def test_a_folder_of_it(self, counted, tmp_path):
        model = fused()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is LlamaForCausalLM
        assert loaded.config.architectures == ["LlamaForCausalLM"]
        found, expected = written(model), written(loaded)
        assert torch.equal(found[0], expected[0])
        assert counted == [7]

    def test_it_and_its_caches_are_let_go(self, counted):
        gc.collect()
        gc.disable()
        try:
            model = fused()
            cache = cache_of(model)
            model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
            keys, steps = weakref.ref(cache.layers[0].keys), weakref.ref(decoder._steps(model, cache))
            del cache
            assert keys() is None
            assert steps() is None
            cache = cache_of(model)
            model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
            left = [weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.weight)]
            del model
            assert [each() for each in left] == [None, None]
        finally:
            gc.enable()


class TestCompilation:
    """What `generate` compiles. Nothing is compiled here: that transformers would is enough."""

    @pytest.fixture
    def compiled(self, monkeypatch):
        asked = []

        def get_compiled_call(self, config):
            asked.append(config)
            return self.__call__

        monkeypatch.setattr(LlamaForCausalLM, "get_compiled_call", get_compiled_call)
        monkeypatch.setattr(LlamaForCausalLM, "_valid_auto_compile_criteria", lambda *_: True)
        decoder._fused.cache_clear()
        yield asked
        decoder._fused.cache_clear()

    def test_no_step_is_compiled(self, counted, compiled):
        written(fused())
        assert (compiled, counted) == ([], [7])

    def test_other_calls_are(self, counted, compiled):
        written(fused(), torch.cat([IDS, IDS]))
        assert (compiled, counted) == ([None] * 7, [0])

    def test_so_are_those_of_a_model_with_a_reason(self, counted, compiled):
        model = fused()
        model.model.norm.register_forward_hook(lambda *_: None)
        written(model)
        assert (compiled, counted) == ([None] * 7, [0])

    def test_who_asks_for_it_gets_it(self, compiled):
        config = CompileConfig()
        written(fused(), compile_config=config)
        assert compiled == [config]

    def test_a_compiler_sees_transformers_forward(self, counted):
        torch.compiler.reset()
        model = fused()
        cache, other = cache_of(model), cache_of(model)
        found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
        assert off(found.logits, theirs(model, tokens()[0], other)) < 1e-5
        assert counted == [0]


class TestGraphs:
    """Steps that replay a graph. What stands for one on the CPU runs the step; the books around it are the same."""

    @pytest.fixture
    def graphs(self, counted, monkeypatch):
        """Those that were captured and are still there."""
        alive = weakref.WeakSet()

        class Graph:
            at_work = True

            def __init__(self, token, positions):
                alive.add(self)

            def capture(self, model, cache):
                self.model, self.cache, self.read = model, weakref.ref(cache), decoder._Read(model)

            def replay(self, token, positions):
                if self.read.unchanged():
                    return decoder.step(self.model, token, self.cache(), positions)
                for layer in self.cache().layers:  # what a graph of other weights leaves behind
                    layer.cumulative_length += 1
                    layer.keys[:, :, layer.cumulative_length - 1] = torch.nan
                return torch.full((1, 1, 64), torch.nan)

        monkeypatch.setattr(decoder, "_can_capture", lambda device: True)
        monkeypatch.setitem(decoder._GRAPHS, "cpu", Graph)
        return alive

    def call(self, model, cache, count=1):
        token = torch.tensor([[5]], device=model.device)
        return [model(input_ids=token, use_cache=True, **{CACHE: cache}).logits for _ in range(count)]

    def test_the_second_step_over_a_cache_is_captured_and_let_go_with_it(self, graphs):
        model = fused()
        caches = [cache_of(model) for _ in range(2)]
        for cache in caches:
            self.call(model, cache)
        assert len(graphs) == 0
        self.call(model, caches[0], 3)
        assert len(graphs) == 1
        self.call(model, caches[1])
        assert len(graphs) == 2
        del caches[0], cache
        assert len(graphs) == 1

    def test_over_the_next_cache_the_first_step_is_captured(self, graphs):
        model = fused(format=SMALL)
        first, other = cache_of(model), cache_of(model)
        self.call(model, first, 2)
        del first
        assert len(graphs) == 0
        cache, longer = cache_of(model), cache_of(model, length=48)
        found = self.call(model, cache)
        assert len(graphs) == 1
        assert decoder._steps(model, cache).replays == 1
        assert off(found[0], theirs(model, torch.tensor([[5]]), other)) < 1e-5
        self.call(model, longer)
        assert len(graphs) == 1  # of another length, so not at once

    def test_of_a_model_that_was_changed_the_first_step_is_not_captured(self, graphs):
        model = fused(format=SMALL)
        self.call(model, cache_of(model), 2)
        model.model.layers[1].mlp.up_proj.register_buffer("weight_words", torch.zeros(44, 9).int())
        cache = cache_of(model)
        self.call(model, cache)
        assert len(graphs) == 0
        self.call(model, cache)
        assert len(graphs) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.to(torch.float64),
            lambda model: model.model.layers[0].mlp.set_submodule("up_proj", nn.Linear(32, 44, bias=False).eval()),
            lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.ones(32))),
            lambda model: setattr(model.model.norm.weight, "data", torch.ones(32)),
            lambda model: setattr(model.model.rotary_emb.inv_freq, "data", torch.ones(4)),
            lambda model: setattr(model.model.layers[1].mlp.up_proj.weight_words, "data", torch.zeros(44, 9).int()),
            lambda model: setattr(model.model.norm, "variance_epsilon", 1e-3),
            lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
            lambda model: setattr(model.model.rotary_emb, "attention_scaling", 0.5),
            lambda model: setattr(model.model.layers[1].mlp.up_proj, "backend", "torch"),
            lambda model: model.model.layers[1].mlp.up_proj.parts["words"].add_(0),
            lambda model: model.model.layers[1].mlp.up_proj.register_buffer("weight_words", torch.zeros(44, 9).int()),
            dequantize_model,
            lambda model: model.load_state_dict(model.state_dict()),
        ],
        ids=[
            "dtype",
            "module",
            "parameter",
            "data",
            "frequencies",
            "words",
            "epsilon",
            "scaling",
            "rotary-scaling",
            "backend",
            "codes",
            "parts",
            "dequantized",
            "loaded",
        ],
    )
    def test_a_change_of_the_model_is_seen(self, graphs, change):
        model = fused(format=SMALL)
        cache = cache_of(model)
        self.call(model, cache, 3)
        (before,) = graphs
        assert before.read.unchanged()
        change(model)
        assert not before.read.unchanged()

    def test_the_token_at_which_it_changed_is_computed_again(self, graphs):
        model = fused(format=SMALL)
        cache, other = cache_of(model), cache_of(model)
        self.call(model, cache, 3)
        before = weakref.ref(*graphs)
        dequantize_model(model)
        found = self.call(model, cache, 3)
        expected = [theirs(model, torch.tensor([[5]]), other) for _ in range(6)][3:]
        assert cache.get_seq_length() == other.get_seq_length() == 18
        assert all(off(*each) < 1e-5 for each in zip(found, expected, strict=True))
        assert before() is None
        assert len(graphs) == 1

    @pytest.mark.parametrize("steps", [1, 2])
    def test_a_change_is_seen_before_a_graph_and_before_it_is_captured(self, graphs, counted, steps):
        model = fused()
        cache = cache_of(model)
        self.call(model, cache, steps)
        model.model.norm = nn.Identity()
        self.call(model, cache)
        assert counted == [steps]
        assert decoder._steps(model, cache).reason == "model.norm is a Identity, which is not known there"
        assert len(graphs) == 0

    @pytest.mark.parametrize("name", ["lm_head.weight", "model.rotary_emb.inv_freq"])
    def test_memory_that_a_graph_reads_stays_until_it_is_let_go(self, graphs, name):
        model = fused()
        cache = cache_of(model)
        self.call(model, cache, 2)
        tensor = attrgetter(name)(model)
        storage = StorageWeakRef(tensor.untyped_storage())
        tensor.data = tensor.data.clone()
        assert not storage.expired()
        self.call(model, cache)
        assert storage.expired()

    def test_one_that_changed_into_what_does_not_fit_goes_on_by_transformers(self, graphs, counted):
        model = fused()
        cache, other = cache_of(model), cache_of(model)
        self.call(model, cache, 3)
        model.model.norm = nn.Identity()
        found = self.call(model, cache, 2)
        expected = [theirs(model, torch.tensor([[5]]), other) for _ in range(5)][3:]
        assert cache.get_seq_length() == 17
        assert counted == [3]
        assert decoder._steps(model, cache).reason == "model.norm is a Identity, which is not known there"
        assert len(graphs) == 0
        assert all(off(*each) < 1e-5 for each in zip(found, expected, strict=True))

    @pytest.fixture
    def torch_graphs(self, monkeypatch):
        """The graphs of a torch that has a GPU: capturing runs the step, and replaying does nothing."""
        made = weakref.WeakSet()

        class Graph:
            fails = False

            def __init__(self):
                made.add(self)

            def capture_begin(self, **_):
                assert decoder._CAPTURE.locked()
                if Graph.fails:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")

            def capture_end(self):
                assert decoder._CAPTURE.locked()

            def replay(self):
                pass

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setitem(decoder._GRAPHS, "cpu", decoder._Graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(decoder, "_capture_stream", lambda device: stream)
        monkeypatch.setattr(decoder, "_can_capture", lambda device: True)
        monkeypatch.setattr(decoder, "_FAILED", [])
        monkeypatch.setattr(decoder, "_LOST", [])
        Graph.made = made
        return Graph

    def test_a_step_that_cannot_be_captured_is_transformers_as_are_all_on_its_device(self, torch_graphs, counted):
        torch_graphs.fails = True
        model, another = fused(), fused("qwen2")
        for each, steps in ((model, 1), (model, 1), (another, 1)):
            cache, other = cache_of(each), cache_of(each)
            found = self.call(each, cache, 3)
            assert counted == [steps]
            assert len(torch_graphs.made) == 1  # tried once, and kept: torch may still point to it
            expected = [theirs(each, torch.tensor([[5]]), other) for _ in range(3)]
            assert all(off(*each) < 1e-5 for each in zip(found, expected, strict=True))
        reason = "steps on cpu cannot be captured: operation not permitted when stream is capturing"
        assert reason_unfused(model) == reason_unfused(another) == reason

    def test_a_first_step_that_cannot_be_captured_runs_as_it_is(self, torch_graphs, counted):
        model = fused()
        self.call(model, cache_of(model), 2)
        torch_graphs.fails, cache, other = True, cache_of(model), cache_of(model)
        found = self.call(model, cache)
        assert reason_unfused(model) is None
        assert len(torch_graphs.made) == 1  # kept: torch may still point to it
        torch_graphs.fails = False
        assert off(found[0], theirs(model, torch.tensor([[5]]), other)) < 1e-5
        self.call(model, cache)
        assert len(torch_graphs.made) == 2

    def test_inputs_of_a_graph_that_was_captured_in_inference_mode_are_written_outside_of_it(self, torch_graphs):
        model = fused()
        cache = cache_of(model)
        with torch.inference_mode():
            graph = decoder._Graph(torch.tensor([[5]]), torch.tensor([[12]]))
            graph.capture(model, cache)
        for mine, given in ((graph._token, 5), (graph._positions, 12)):
            assert mine.item() == given
            mine.copy_(torch.tensor([[6]]))
        assert graph._logits.shape == (1, 1, 64)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("width", [8, 64])
    def test_a_graph_computes_what_the_steps_compute(self, monkeypatch, kind, format, width):
        launched = launches(monkeypatch)
        model = on("cuda", fused(kind, format, head_dim=width))
        cache, other = (cache_of(model, IDS.cuda()) for _ in range(2))
        found = self.call(model, cache, 6)
        assert decoder._steps(model, cache).graph is not None
        assert len(launched) == (2 * 2 if width == 64 else 0)  # the first step, and the capture
        monkeypatch.setattr(decoder, "_can_capture", lambda device: False)
        expected = self.call(model, other, 6)
        assert all(off(*each) < 1e-3 for each in zip(found, expected, strict=True))
        assert len({each.data_ptr() for each in found}) == 6
        for mine, its in zip(cache.layers, other.layers, strict=True):
            assert off(mine.keys, its.keys) < 1e-3
            assert mine.cumulative_length == its.cumulative_length == 18

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_a_graph_of_codes_that_changed_is_let_go(self):
        model = on("cuda", fused(format="3-fast"))
        cache, other = (cache_of(model, IDS.cuda()) for _ in range(2))
        self.call(model, cache, 3)
        dequantize_model(model, torch.float16)
        found = self.call(model, cache, 3)
        token = torch.tensor([[5]], device="cuda")
        expected = [theirs(model, token, other) for _ in range(6)][3:]
        assert cache.get_seq_length() == 18
        assert all(off(*each) < TOLERANCE["cuda"] for each in zip(found, expected, strict=True))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_memory_of_a_text_is_free_after_it(self):
        model = on("cuda", fused(format="3-fast"))
        left = []
        for _ in range(3):
            written(model, IDS.cuda())
            torch.cuda.synchronize()
            left.append(torch.cuda.memory_allocated())
        assert left[1] == left[2]


class TestRecords:
    """Steps on a CPU whose layers are replayed as jobs: the bits of `step`."""

    @pytest.fixture(autouse=True)
    def two_threads(self):
        pytest.importorskip("numba")
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    def packed(self, kind="llama", dtype=torch.float32, **changes):
        return fused(kind, "3-fast", **changes).to(dtype)

    def check(self, model, cache, other, count=4, replayed=True):
        """Tokens over a cache by the model, and over another like it by `step`."""
        for token in tokens(count):
            found = model(input_ids=token, use_cache=True, **{CACHE: cache}).logits
            assert torch.equal(found, decoder.step(model, token, other))
        for mine, its in zip(cache.layers, other.layers, strict=True):
            assert torch.equal(mine.keys, its.keys)
            assert torch.equal(mine.values, its.values)
            assert torch.equal(mine.cumulative_length, its.cumulative_length)
        assert (decoder._steps(model, cache).replays > 0) == replayed

    @pytest.mark.parametrize("threads", [1, 2, 5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_token_has_the_bits_of_a_step(self, kind, dtype, threads):
        torch.set_num_threads(threads)
        model = self.packed(kind, dtype)
        self.check(model, cache_of(model, length=64), cache_of(model, length=64), count=50)

    @pytest.mark.parametrize(
        "changes",
        [
            {"tie_word_embeddings": True},
            {"attention_bias": True, "mlp_bias": True},
            {"num_key_value_heads": 1, "head_dim": 16},
            {"num_hidden_layers": 1},
        ],
        ids=["tied", "biases", "one-for-all", "one-layer"],
    )
    def test_other_shapes(self, changes):
        model = self.packed(**changes)
        self.check(model, cache_of(model), cache_of(model))

    @pytest.mark.parametrize("tie", [True, False])
    def test_packed_embeddings_and_heads(self, tie):
        model = tiny_model("llama", tie_word_embeddings=tie)
        compress_model(model, "3-fast", embeddings="6-fast", head="6-fast")
        self.check(model, cache_of(model), cache_of(model))

    def test_formats_that_differ_between_layers(self):
        model = self.packed()
        for layer in (model.model.layers[0].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            other = SeedLinear(layer.in_features, layer.out_features, parse_format("6-fast"), dtype=torch.float32)
            other.weight_words.random_(-(2**31), 2**31 - 1)
            other.weight_scales.fill_(0.001)
            other.weight_scale.fill_(1)
            model.set_submodule(next(name for name, each in model.named_modules() if each is layer), other.eval())
        self.check(model, cache_of(model), cache_of(model))

    def test_positions_of_the_rotary_embedding_that_are_given(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        for token, place in zip(tokens(), (3, 4, 9, 2, 2, 7), strict=True):
            positions = torch.tensor([[place]])
            found = model(input_ids=token, position_ids=positions, use_cache=True, **{CACHE: cache}).logits
            assert torch.equal(found, decoder.step(model, token, other, positions))
        assert decoder._steps(model, cache).replays == 5

    def test_over_a_cache_that_is_full(self):
        model = self.packed()
        cache = cache_of(model, length=16)
        for token in tokens(4):
            model(input_ids=token, use_cache=True, **{CACHE: cache})
        assert decoder._steps(model, cache).replays == 3
        before = [each.clone() for layer in cache.layers for each in (layer.keys, layer.values, layer.cumulative_length)]
        with pytest.raises(IndexError, match="position 16 is none of a cache of 16"):
            model(input_ids=token, use_cache=True, **{CACHE: cache})
        after = [each for layer in cache.layers for each in (layer.keys, layer.values, layer.cumulative_length)]
        assert all(map(torch.equal, before, after))

    def test_the_number_of_threads_changes(self):
        model = self.packed()
        cache, other, found = cache_of(model, length=32), cache_of(model, length=32), []
        for count in (2, 1, 3, 2):
            torch.set_num_threads(count)
            self.check(model, cache, other, 3)
            found.append(decoder._steps(model, cache).graph)
        assert len({id(each) for each in found}) == 4

    def test_the_model_changes(self):
        model = self.packed()
        cache, other = cache_of(model, length=64), cache_of(model, length=64)
        layer, up = model.model.layers[0], model.model.layers[1].mlp.up_proj
        changes = [
            lambda: up.parts["words"].add_(12345),
            lambda: up.register_buffer("weight_words", up.weight_words.flip(1)),
            lambda: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.rand(32))),
            lambda: setattr(layer.input_layernorm.weight, "data", torch.rand(32)),
            lambda: setattr(model.model.norm.weight, "data", torch.rand(32)),
            lambda: setattr(layer.post_attention_layernorm, "variance_epsilon", 0.1),
            lambda: setattr(layer.self_attn, "scaling", 0.1),
        ]
        for change in changes:
            self.check(model, cache, other, 2)
            steps = decoder._steps(model, cache)
            before = model(input_ids=IDS, use_cache=False).logits
            change()
            assert not torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
            self.check(model, cache, other, 2)
            assert decoder._steps(model, cache) is not steps
        dequantize_model(model)
        self.check(model, cache, other, 3, replayed=False)

    @pytest.mark.parametrize("path", ["layers.0.input_layernorm.weight", "layers.1.self_attn.o_proj.bias"])
    def test_a_tensor_that_is_no_parameter_is_replaced(self, path):
        model = self.packed(attention_bias=True)
        home, name = model.model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        before = getattr(home, name).detach()
        delattr(home, name)
        setattr(home, name, before)
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other)
        setattr(home, name, before * 2)
        self.check(model, cache, other)

    def test_torch_makes_tensors_elsewhere_unless_it_is_told(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        for token in tokens(4):
            with torch.device("meta"):
                found = model(input_ids=token, use_cache=True, **{CACHE: cache}).logits
            assert torch.equal(found, decoder.step(model, token, other))
        assert decoder._steps(model, cache).replays == 3

    def test_torch_asks_no_mode(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        with torch._C.DisableTorchFunction():
            self.check(model, cache, other, replayed=False)

    def test_an_onlooker_that_raises_leaves_nothing(self, counted):
        class Refusing(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function is torch.empty:
                    raise RuntimeError("no memory")
                return function(*args, **(kwargs or {}))

        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other, 1, replayed=False)
        with Refusing(), pytest.raises(RuntimeError, match="no memory"):
            model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})
        assert decoder._FAILED == []
        assert reason_unfused(model) is None
        self.check(model, cache_of(model), cache_of(model))

    @pytest.mark.parametrize("where", ["__enter__", "__exit__", "fused"])
    def test_who_is_interrupted_while_it_is_recorded_goes_on(self, where):
        def look(frame, event, _):
            if event == "call" and frame.f_code.co_name == where and isinstance(frame.f_locals.get("self"), of):
                raise KeyboardInterrupt

        model = self.packed()
        of = NumbaBackend if where == "fused" else threads.Record
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other, 1, replayed=False)
        before = sys.getprofile()
        try:
            sys.setprofile(look)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})
        finally:
            sys.setprofile(before)
        self.check(model, cache, other)

    def test_the_cache_moves(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other)
        for layer in cache.layers:
            layer.keys, old = layer.keys.clone(), layer.keys
            old.fill_(torch.nan)
        self.check(model, cache, other)

    def test_two_caches_in_turn(self):
        model = self.packed()
        pairs = [(cache_of(model, ids), cache_of(model, ids)) for ids in (IDS, IDS.flip(1)[:, :7])]
        for _ in range(3):
            for pair in pairs:
                self.check(model, *pair, 2)

    def test_replayed_outside_of_the_inference_mode_in_which_it_was_captured(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        with torch.inference_mode():
            self.check(model, cache, other, 3)
        self.check(model, cache, other, 3)
        with torch.inference_mode():
            self.check(model, cache, other, 3)

    def test_two_threads_with_two_models(self):
        models = [self.packed(), self.packed("qwen2")]
        expected = [written(model) for model in models]
        together = Barrier(2)

        def texts(model):
            torch.set_num_threads(2)
            with torch.no_grad():
                together.wait()
                return [written(model) for _ in range(10)]

        with ThreadPoolExecutor(2) as pool:
            for its, found in zip(expected, pool.map(texts, models), strict=True):
                assert all(torch.equal(*each) for text in found for each in zip(its, text, strict=True))

    def test_it_works_in_memory_of_its_own(self):
        """The thread in which it was captured may be at other work while another one replays it."""
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other)
        scratch = on_cpu.scratch(1)[0].fill_(7)
        decoder._steps(model, cache).graph._record.run()
        assert on_cpu.scratch(1)[0] is scratch
        assert (scratch == 7).all()
        self.check(model, cache, other)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_child_replays(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other)
        expected = decoder.step(model, tokens()[0], other).numpy()
        threads._threads.cache_clear()
        threads._threads()  # which asks torch's first
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            graph = decoder._steps(model, cache).graph
            found = graph.replay(tokens()[0], decoder._next_position(cache))
            os._exit(0 if (found.numpy() == expected).all() else 1)
        assert os.waitpid(child, 0)[1] == 0

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: setattr(layer.mlp, "up_proj", dense_of(layer.mlp.up_proj)),
            lambda layer: setattr(layer.mlp, "down_proj", dense_of(layer.mlp.down_proj)),
            lambda layer: setattr(layer.self_attn, "o_proj", dense_of(layer.self_attn.o_proj)),
            lambda layer: setattr(layer.self_attn.o_proj, "backend", "torch"),
            lambda layer: setattr(layer.self_attn.q_proj, "backend", "torch"),
            lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(64)[::2])),
        ],
        ids=["up", "down", "o", "backend", "one-backend", "strides"],
    )
    def test_a_step_that_cannot_be_captured_runs_as_it_is(self, counted, change):
        model = self.packed()
        change(model.model.layers[1])
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other, replayed=False)
        assert counted == [2 * 4]
        assert decoder._steps(model, cache).graph is None

    def test_attention_by_torch_cannot_be_captured(self, counted, monkeypatch):
        monkeypatch.setattr(attention, "_by_numba", lambda *_: False)
        model = self.packed()
        self.check(model, cache_of(model), cache_of(model), replayed=False)
        assert counted == [2 * 4]

    def test_they_are_let_go_with_their_cache_and_with_their_model(self):
        gc.collect()
        gc.disable()
        try:
            model = self.packed()
            cache = cache_of(model)
            for token in tokens(3):
                model(input_ids=token, use_cache=True, **{CACHE: cache})
            record = weakref.ref(decoder._steps(model, cache).graph)
            keys = StorageWeakRef(cache.layers[0].keys.untyped_storage())
            assert record() is not None
            del cache
            assert record() is None
            assert keys.expired()
            cache = cache_of(model)
            model(input_ids=token, use_cache=True, **{CACHE: cache})
            left = [weakref.ref(each) for each in (model, model.model.norm.weight, decoder._steps(model, cache).graph)]
            del model
            assert [each() for each in left] == [None, None, None]
        finally:
            gc.enable()


def dense_of(layer):
    return layer.to_dense().requires_grad_(False).eval()
