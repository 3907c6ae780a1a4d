"""The way into our own forward for `generate` and for calls of a model, which stays what it was."""

import copy
import gc
import inspect
import pickle
import re
import sys
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaForCausalLM, StaticCache

from decoder_models import DEVICES, FORMATS, IDS, KINDS, TOLERANCE, cache_of, fused, model_of, off, on, theirs, tokens, written
from seedlm.integrations.transformers import decoder, decoder_reasons, decoder_steps
from seedlm.integrations.transformers.decoder import fuse_decoding
from seedlm.integrations.transformers.decoder_reasons import reason_unfused
from seedlm.integrations.transformers.decoder_steps import CACHE
from seedlm.integrations.transformers.quantizer import SeedLMConfig
from seedlm.modeling.quantize import dequantize_model
from tiny_models import SMALL, tiny_model

pytestmark = pytest.mark.usefixtures("decodes_anywhere")


class TestGenerate:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_text_with_and_without(self, counted, monkeypatch, kind, format, device):
        model, ids = on(device, fused(kind, format)), IDS.to(device)
        found, logits = written(model, ids)
        replayed = 5 if device == "cuda" else 6 if format == "3-fast" else 0  # on a GPU the capture is a step
        assert counted == [7 - replayed]  # the prompt tells the first of 8
        monkeypatch.setattr(decoder_reasons, "DEVICES", ())
        expected_tokens, expected = written(model, ids, disable_compile=True)
        same = int((found == expected_tokens).long().cumprod(1).sum()) - IDS.shape[1]
        assert same == 8 or device == "cuda"
        assert off(logits[: same + 1], expected[: same + 1]) < TOLERANCE[device]

    def test_on_the_cpu_nothing_changes(self, counted, monkeypatch):
        monkeypatch.undo()
        assert decoder_reasons.PACKED == ("cpu",)
        model = fused()
        monkeypatch.setattr(decoder_steps, "step", None)
        assert reason_unfused(model) == "on a cpu transformers' own forward is as fast"
        assert decoder.static_cache(model, 8) == {}
        with torch.no_grad():
            written(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_on_the_cpu_packed_models_go_this_way(self, counted, monkeypatch, kind, dtype):
        """With attention and what lies between products compiled: the same text and logits as by transformers."""
        monkeypatch.setattr(decoder_reasons, "PACKED", ("cpu",))
        model = fused(kind, "3-fast", head_dim=64).to(dtype)
        assert reason_unfused(model) is None
        assert decoder.static_cache(model, 8) == {"cache_implementation": "static"}
        found, logits = written(model)
        assert counted == [1]  # the others are replayed
        monkeypatch.setattr(decoder_reasons, "DEVICES", ())
        tokens, expected = written(model, disable_compile=True)
        same = int((found == tokens).long().cumprod(1).sum()) - IDS.shape[1]
        assert same == 8 or dtype == torch.bfloat16
        assert off(logits[: same + 1], expected[: same + 1]) < {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]

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
        monkeypatch.setattr(decoder_reasons, "DEVICES", ("cuda",))
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
        assert decoder_steps.decode(model, tokens()[0], cache) is None
        assert re.search(reason, decoder_steps.steps_over(model, cache).reason)
        assert counted == [0]

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

    def test_a_hook_of_the_model_itself_is_called(self, counted):
        model, called = fused(), []
        model.register_forward_hook(lambda *_: called.append(1))
        written(model)
        assert counted == [7]
        assert len(called) == 8


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
            keys, steps = weakref.ref(cache.layers[0].keys), weakref.ref(decoder_steps.steps_over(model, cache))
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
