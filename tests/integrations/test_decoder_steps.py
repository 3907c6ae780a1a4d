"""One token by our own forward: the same logits as by transformers', and its graphs and records."""

import gc
import os
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

from decoder_models import DEVICES, FORMATS, IDS, KINDS, TOLERANCE, cache_of, fused, model_of, off, on, theirs, tokens, written
from seedlm.codes import on_cpu, threads
from seedlm.codes.registry import parse_format
from seedlm.codes.trellis.kernels.cpu import NumbaBackend
from seedlm.inference import attention
from seedlm.integrations.transformers import decoder_reasons, decoder_steps
from seedlm.integrations.transformers.decoder_reasons import reason_unfused
from seedlm.integrations.transformers.decoder_steps import CACHE
from seedlm.modeling.linear import SeedLinear
from seedlm.modeling.quantize import compress_model, dequantize_model
from tiny_models import SMALL, tiny_model

pytestmark = pytest.mark.usefixtures("decodes_anywhere")


def launches(monkeypatch):
    """A list that becomes longer with each launch of attention's kernel."""
    launched, kernel = [], attention._kernel
    monkeypatch.setattr(attention, "_kernel", lambda *args: launched.append(1) or kernel(*args))
    return launched


class TestStep:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_and_cache_are_those_of_transformers(self, kind, format, device):
        model = on(device, model_of(kind, format))
        assert reason_unfused(model) is None
        mine, other = (cache_of(model, IDS.to(device)) for _ in range(2))
        for token in (each.to(device) for each in tokens()):
            logits, expected = decoder_steps.step(model, token, mine), theirs(model, token, other)
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
            assert off(decoder_steps.step(model, token.cuda(), mine), theirs(model, token.cuda(), other)) < TOLERANCE["cuda"]
        assert len(launched) == 6 * 2
        for found, expected in zip(mine.layers, other.layers, strict=True):
            assert off(found.keys, expected.keys) < TOLERANCE["cuda"]
            assert off(found.values, expected.values) < TOLERANCE["cuda"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("format", FORMATS)
    def test_halves(self, format, dtype):
        model = model_of("qwen2", format).to(dtype)
        assert reason_unfused(model) is None
        logits = decoder_steps.step(model, tokens()[0], cache_of(model))
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
            assert off(decoder_steps.step(model, token, mine), theirs(model, token, other)) < 1e-5

    def test_positions_of_the_rotary_embedding_are_others_where_they_are_given(self):
        model = model_of()
        token, positions = tokens()[0], torch.tensor([[3]])
        expected = theirs(model, token, cache_of(model), position_ids=positions)
        assert off(decoder_steps.step(model, token, cache_of(model), positions), expected) < 1e-5
        assert off(decoder_steps.step(model, token, cache_of(model)), expected) > 1e-3

    def test_tensors_of_a_cache_that_are_replaced(self, counted):
        model = fused()
        cache, other = cache_of(model), cache_of(model)
        model(input_ids=tokens()[0], use_cache=True, **{CACHE: cache})
        model(input_ids=tokens()[0], use_cache=True, **{CACHE: other})
        known = decoder_steps.steps_over(model, cache)
        assert decoder_steps.steps_over(model, cache) is known
        for layer in cache.layers:
            layer.keys = layer.keys.clone()
        found, expected = (model(input_ids=tokens()[1], use_cache=True, **{CACHE: each}).logits for each in (cache, other))
        assert torch.equal(found, expected)
        assert decoder_steps.steps_over(model, cache) is not known


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
                self.model, self.cache, self.read = model, weakref.ref(cache), decoder_steps._Read(model)

            def replay(self, token, positions):
                if self.read.unchanged():
                    return decoder_steps.step(self.model, token, self.cache(), positions)
                for layer in self.cache().layers:  # what a graph of other weights leaves behind
                    layer.cumulative_length += 1
                    layer.keys[:, :, layer.cumulative_length - 1] = torch.nan
                return torch.full((1, 1, 64), torch.nan)

        monkeypatch.setattr(decoder_steps, "_can_capture", lambda device: True)
        monkeypatch.setitem(decoder_steps._GRAPHS, "cpu", Graph)
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
        assert decoder_steps.steps_over(model, cache).replays == 1
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
        assert decoder_steps.steps_over(model, cache).reason == "model.norm is a Identity, which is not known there"
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
        assert decoder_steps.steps_over(model, cache).reason == "model.norm is a Identity, which is not known there"
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
                assert decoder_steps._CAPTURE.locked()
                if Graph.fails:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")

            def capture_end(self):
                assert decoder_steps._CAPTURE.locked()

            def replay(self):
                pass

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setitem(decoder_steps._GRAPHS, "cpu", decoder_steps._Graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(decoder_steps, "_capture_stream", lambda device: stream)
        monkeypatch.setattr(decoder_steps, "_can_capture", lambda device: True)
        monkeypatch.setattr(decoder_reasons, "_FAILED", [])
        monkeypatch.setattr(decoder_steps, "_LOST", [])
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
            graph = decoder_steps._Graph(torch.tensor([[5]]), torch.tensor([[12]]))
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
        assert decoder_steps.steps_over(model, cache).graph is not None
        assert len(launched) == (2 * 2 if width == 64 else 0)  # the first step, and the capture
        monkeypatch.setattr(decoder_steps, "_can_capture", lambda device: False)
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
            assert torch.equal(found, decoder_steps.step(model, token, other))
        for mine, its in zip(cache.layers, other.layers, strict=True):
            assert torch.equal(mine.keys, its.keys)
            assert torch.equal(mine.values, its.values)
            assert torch.equal(mine.cumulative_length, its.cumulative_length)
        assert (decoder_steps.steps_over(model, cache).replays > 0) == replayed

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
            assert torch.equal(found, decoder_steps.step(model, token, other, positions))
        assert decoder_steps.steps_over(model, cache).replays == 5

    def test_over_a_cache_that_is_full(self):
        model = self.packed()
        cache = cache_of(model, length=16)
        for token in tokens(4):
            model(input_ids=token, use_cache=True, **{CACHE: cache})
        assert decoder_steps.steps_over(model, cache).replays == 3
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
            found.append(decoder_steps.steps_over(model, cache).graph)
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
            steps = decoder_steps.steps_over(model, cache)
            before = model(input_ids=IDS, use_cache=False).logits
            change()
            assert not torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
            self.check(model, cache, other, 2)
            assert decoder_steps.steps_over(model, cache) is not steps
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
            assert torch.equal(found, decoder_steps.step(model, token, other))
        assert decoder_steps.steps_over(model, cache).replays == 3

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
        assert decoder_reasons._FAILED == []
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
        decoder_steps.steps_over(model, cache).graph._record.run()
        assert on_cpu.scratch(1)[0] is scratch
        assert (scratch == 7).all()
        self.check(model, cache, other)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_child_replays(self):
        model = self.packed()
        cache, other = cache_of(model), cache_of(model)
        self.check(model, cache, other)
        expected = decoder_steps.step(model, tokens()[0], other).numpy()
        threads._threads.cache_clear()
        threads._threads()  # which asks torch's first
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            graph = decoder_steps.steps_over(model, cache).graph
            found = graph.replay(tokens()[0], decoder_steps._next_position(cache))
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
        assert decoder_steps.steps_over(model, cache).graph is None

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
            record = weakref.ref(decoder_steps.steps_over(model, cache).graph)
            keys = StorageWeakRef(cache.layers[0].keys.untyped_storage())
            assert record() is not None
            del cache
            assert record() is None
            assert keys.expired()
            cache = cache_of(model)
            model(input_ids=token, use_cache=True, **{CACHE: cache})
            left = [
                weakref.ref(each) for each in (model, model.model.norm.weight, decoder_steps.steps_over(model, cache).graph)
            ]
            del model
            assert [each() for each in left] == [None, None, None]
        finally:
            gc.enable()


def dense_of(layer):
    return layer.to_dense().requires_grad_(False).eval()
