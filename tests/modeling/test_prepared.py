"""What a backend made of a layer's parts lives as long as those parts, and is no part of the layer."""

import copy
import gc
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn

import toy_family  # noqa: F401 (registers its family)
from seedlm.codes.block.family import FAMILY
from seedlm.codes.dequantizing import DequantizingBackend
from seedlm.errors import BackendError
from seedlm.inference import ops
from seedlm.modeling.linear import SeedLinear, compress_module, own_name, share_input

SPEC = "block-k8-c8-p3-q4-e4"
SPECS = [SPEC, "toy-4", "trellis-r3-l12-t32-h8"]


@pytest.fixture
def fresh():
    """A compiler that has seen no layer yet: it counts how often it compiles the same code."""
    torch.compiler.reset()


def packed(spec=SPEC, out=6, in_features=20, bias=True, dtype=None):
    torch.manual_seed(out)
    return compress_module(nn.Linear(in_features, out, bias=bias, dtype=dtype), spec)[0]


@pytest.fixture(params=SPECS)
def layer(request):
    return packed(request.param)


@pytest.fixture
def repacking(monkeypatch):
    """The block code behind a backend that keeps a copy of the codes, counts its calls, and doubles x first."""

    class Repacking(DequantizingBackend):
        name = "repacking"
        prepared: ClassVar[list[weakref.ref]] = []
        transformed: ClassVar[list[torch.Tensor]] = []

        def reason_unavailable(self, device, format, shape):
            return None

        def prepare(self, parts, format, shape):
            copied = parts["words"].clone()
            self.prepared.append(weakref.ref(copied))
            return [parts["exponent_bias"], copied]

        def dequantize(self, prepared, format, shape, dtype):
            bias, words = prepared
            return FAMILY.dequantize({"words": words, "exponent_bias": bias}, format, shape).to(dtype)

        def empty_transform(self, x, format, in_features):
            return [torch.empty_like(x)]

        def transform(self, x, format, in_features):
            self.transformed.append(x)
            return [2 * x]

        def linear(self, x, prepared, format, shape, bias, transformed=()):
            (doubled,) = transformed or self.transform(x, format, shape[1])
            return nn.functional.linear(doubled, self.dequantize(prepared, format, shape, x.dtype) / 2, bias)

    Repacking.prepared.clear()
    Repacking.transformed.clear()
    monkeypatch.setattr(FAMILY, "backends", lambda: (Repacking(),), raising=False)
    monkeypatch.setattr(ops, "_PLANS", {})
    return Repacking


def same(layer, other, x=None):
    x = torch.randn(3, 20) if x is None else x
    return torch.equal(layer(x), other(x))


def test_preparing_is_done_once(repacking):
    layer = packed()
    for _ in range(3):
        layer(torch.randn(2, 20))
    layer.to("cpu")
    layer.half()
    layer(torch.randn(2, 20, dtype=torch.float16))
    assert len(repacking.prepared) == 1


def test_a_part_that_is_read_as_stored_is_not_held_twice(layer):
    _, prepared = layer.prepare()
    assert any(tensor is part for tensor in prepared for part in layer.parts.values())


REPLACED = {
    "set by name": lambda layer, words: setattr(layer, own_name("words"), words),
    "set in the buffers": lambda layer, words: layer._buffers.update({own_name("words"): words}),
    "written in place": lambda layer, words: layer.parts["words"].copy_(words),
    "loaded": lambda layer, words: layer.load_state_dict({**layer.state_dict(), "weight": words}),
    "assigned": lambda layer, words: layer.load_state_dict({**layer.state_dict(), "weight": words}, assign=True),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_replaced_parts_are_prepared_anew(repacking, replace):
    layer, other = packed(), packed(out=6, in_features=20)
    words = compress_module(nn.Linear(20, 6), SPEC)[0].parts["words"]
    before = layer.dequantize()
    replace(layer, words.clone())
    expected = FAMILY.dequantize({**layer.parts, "words": words}, layer.format, (6, 20))
    assert torch.equal(layer.dequantize(), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(other.dequantize(), before)


def test_what_was_prepared_goes_with_the_parts(repacking):
    layer = packed()
    layer.prepare()
    layer._buffers[own_name("words")] = torch.empty(6, 3, dtype=torch.int32, device="meta")  # as offloading hooks do
    gc.collect()
    assert repacking.prepared[0]() is None


def test_a_layer_that_goes_leaves_nothing_behind(repacking):
    layer = packed()
    layer.prepare()
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    assert repacking.prepared[0]() is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_layers_of_their_own(layer, again):
    layer.prepare()
    other = again(layer.half())
    assert other._prepared is None
    assert same(other, layer, torch.randn(3, 20, dtype=torch.float16))
    assert other.weight.dtype == torch.float16
    assert all(a is not b and torch.equal(a, b) for a, b in zip(other.parts.values(), layer.parts.values(), strict=True))


def test_nothing_prepared_is_in_the_state(repacking):
    layer = packed()
    before = {name for name, _ in layer.named_buffers()}, set(layer.state_dict())
    layer.prepare()
    assert ({name for name, _ in layer.named_buffers()}, set(layer.state_dict())) == before
    assert before[1] == {"weight", "weight_exponent_bias", "bias"}


@pytest.mark.parametrize("own", [False, True], ids=["files", "buffers"])
def test_a_state_dict_has_the_names_of_files_or_of_buffers_and_both_are_read(layer, own):
    layer.own_names = own
    state = nn.ModuleDict({"m": layer}).state_dict()
    assert ("m.weight_words" in state, "m.weight" in state) == (own, not own)
    other = nn.ModuleDict({"m": SeedLinear(20, 6, layer.format, bias=True)})
    assert other.load_state_dict(state) == ([], [])
    assert same(other["m"], layer)


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_dict_of_other_dtypes_is_refused_not_converted(spec):
    layer = packed(spec)
    state = {name: tensor.double() if name != "bias" else tensor for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight must be torch\.int\d+, got torch\.float64"):
        layer.load_state_dict(state)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "there and back": lambda m: m.half().to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_change_no_part_not_even_floats(layer, cast):
    before = {name: part.clone() for name, part in layer.parts.items()}
    cast(layer)
    for name, part in layer.parts.items():
        assert part.dtype == before[name].dtype
        assert torch.equal(part, before[name])
    assert layer.weight.dtype == layer.bias.dtype


def test_parts_that_a_loader_widened_have_their_dtype_again():
    layer = packed("toy-3")
    before = layer.parts["scales"]
    layer._buffers[own_name("scales")] = before.float()
    layer.restore_dtypes()
    assert layer.parts["scales"].dtype == torch.float16
    assert torch.equal(layer.parts["scales"], before)


def test_preparing_in_inference_mode_does_not_stand_in_trainings_way():
    layer = packed()
    with torch.inference_mode():
        layer(torch.randn(2, 20))
    x = torch.randn(2, 20, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_a_backend_that_cannot_run_says_why():
    layer = packed()
    layer.backend = "fpga"
    with pytest.raises(BackendError, match="unknown backend 'fpga'"):
        layer(torch.randn(2, 20))


def test_another_backend_takes_effect_at_the_next_call():
    layer = packed()
    layer(torch.randn(2, 20))
    layer.backend = "torch"
    layer(torch.randn(2, 20))
    assert layer.prepare()[0].backend.name == "torch"
    assert copy.deepcopy(layer).backend == "torch"
    layer.backend = "fpga"
    with pytest.raises(BackendError, match="unknown backend 'fpga'"):
        layer(torch.randn(2, 20))


def test_layers_that_share_their_input_transform_it_once(repacking):
    q, k, v = packed(), packed(out=2), packed(out=3)
    share_input(q, k, v)
    x = torch.randn(4, 20)
    with torch.no_grad():
        for _ in range(2):
            for layer in (q, k, v):
                torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert [y is x for y in repacking.transformed] == [True, True]
    q(x)
    q(x)
    k(torch.randn(4, 20))
    assert len(repacking.transformed) == 5
    assert all(layer._shared[0] is q._shared[0] for layer in (q, k, v))


def test_the_last_layer_lets_go_of_a_shared_input(repacking):
    q, k = packed(), packed(out=2)
    share_input(q, k)
    with torch.no_grad():
        q(torch.randn(4, 20))
        x = torch.randn(4, 20)
        q(x), k(x)
    shared = q._shared[0]
    assert shared._kept is None


def test_an_input_that_was_changed_is_not_the_one_that_was_kept():
    layers = [compress_module(torch.nn.Linear(48, 64, bias=False), "trellis-r4-l12-t32-h32")[0] for _ in range(2)]
    share_input(*layers)
    q, k = layers
    x = torch.randn(1, 48)
    with torch.no_grad():
        q(x)
        x.mul_(2)
        torch.testing.assert_close(k(x), k.to_dense()(x), rtol=1e-3, atol=1e-3)
        q(x)
    x.requires_grad_()
    assert k(x).requires_grad  # what was kept has no gradient


def test_threads_that_run_one_model_never_take_each_others_input(repacking):
    q, k, v = packed(), packed(out=2), packed(out=3)
    share_input(q, k, v)
    inputs = [torch.randn(64, 20) for _ in range(4)]

    def attend(x):
        with torch.no_grad():
            return torch.cat([q(x), k(x), v(x)], -1)

    expected = [attend(x) for x in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda x: [attend(x) for _ in range(200)], inputs))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(y, each) for y, many in zip(expected, found, strict=True) for each in many)


def test_gradients_flow_through_a_shared_input(repacking):
    q, k = packed(), packed(out=2)
    share_input(q, k)
    x = torch.randn(4, 20, requires_grad=True)
    (q(x).sum() + k(x).sum()).backward()
    expected = q.dequantize().sum(0) + k.dequantize().sum(0)
    torch.testing.assert_close(x.grad, expected.expand(4, 20))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_finds_a_layer_that_nobody_prepared(layer, backend, fresh):
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, 20)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        layer.double()
        x = x.double()
        assert torch.equal(compiled(x), layer(x))


def test_compiled_layers_share_their_input_too(repacking, fresh):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = packed(out=4), packed(out=2), packed(out=3)
            share_input(self.q, self.k, self.v)

        def forward(self, x):
            x = x.relu()
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    model, calls = Attention(), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: calls.append(graph) or graph)
    x = torch.randn(5, 20)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    targets = [str(node.target) for node in calls[0].graph.nodes if node.op == "call_function"]
    assert sum("seedlm.transform" in target for target in targets) == 1
    assert sum("seedlm.linear" in target for target in targets) == 3


@pytest.fixture
def joining(repacking, monkeypatch):
    """The same, and it multiplies by several weights at once: what `calls` counts."""
    calls = []

    def linears(self, x, prepared, format, shapes, biases):
        calls.append(shapes)
        return [self.linear(x, *each) for each in zip(prepared, [format] * len(shapes), shapes, biases, strict=True)]

    monkeypatch.setattr(repacking, "linears", linears, raising=False)
    return calls


def three(**options):
    layers = [packed(out=out, **options) for out in (4, 2, 3)]
    share_input(*layers)
    return layers


def test_products_of_a_shared_input_are_made_at_once(joining):
    layers = three()
    x = torch.randn(4, 20)
    with torch.no_grad():
        for _ in range(2):
            for layer in layers:
                torch.testing.assert_close(layer(x), layer.to_dense()(x))
        assert joining == [((4, 20), (2, 20), (3, 20))] * 2
        assert layers[0]._shared[0]._kept is None
        for layer in reversed(layers):  # in any order, and nobody takes what is of another x
            y = torch.randn(4, 20)
            torch.testing.assert_close(layer(y), layer.to_dense()(y))
    assert len(joining) == 5


def test_a_layer_that_comes_again_multiplies_anew(joining):
    q, k, _ = three()
    x = torch.randn(4, 20)
    with torch.no_grad():
        q(x)
        x += 1
        torch.testing.assert_close(q(x), q.to_dense()(x))
        torch.testing.assert_close(k(x), k.to_dense()(x))
    assert len(joining) == 2


def test_products_are_made_one_by_one_where_a_gradient_is_wanted(joining):
    q, k, v = three(bias=False)
    x = torch.randn(4, 20, requires_grad=True)
    sum(layer(x).sum() for layer in (q, k, v)).backward()
    assert x.grad is not None
    assert not joining
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert [layer(x).dtype for layer in (q, k, v)] == [torch.bfloat16] * 3
    assert not joining


def test_layers_of_different_formats_are_not_joined(joining):
    q, k = packed(), packed(SPECS[1], out=2)
    share_input(q, k)
    x = torch.randn(4, 20)
    with torch.no_grad():
        torch.testing.assert_close(k(x), k.to_dense()(x))
        torch.testing.assert_close(q(x), q.to_dense()(x))
    assert not joining


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_join_their_own_layers(joining, again):
    model = nn.ModuleList(three())
    other = again(model)
    with torch.no_grad():
        for layer in model:
            layer.weight_words.zero_()
        for _ in range(2):
            x = torch.randn(4, 20)
            for layer in other:
                torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert len(joining) == 1  # the first time they did not know each other
    del model
    assert all(known() is layer for known, layer in zip(other[0]._shared[0]._layers, other, strict=True))


def test_layers_let_go_of_each_other(joining):
    q, k, v = three()
    x = torch.randn(4, 20)
    gone = weakref.ref(k)
    del k
    assert gone() is None
    with torch.no_grad():
        torch.testing.assert_close(q(x), q.to_dense()(x))
        torch.testing.assert_close(v(x), v.to_dense()(x))
    assert not joining


def test_compiled_products_of_a_shared_input_are_made_at_once(joining, fresh):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = three()

        def forward(self, x):
            x = x.relu()
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    model, calls = Attention(), []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: calls.append(graph) or graph)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(5, 20)
            assert torch.equal(compiled(x), model(x))
        targets = [str(node.target) for node in calls[0].graph.nodes if node.op == "call_function"]
        assert sum("seedlm.linears" in target for target in targets) == 1
        assert not any("seedlm.linear." in target or "seedlm.transform" in target for target in targets)
        assert len(calls) == 1
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def offloaded(model, tmp_path, disk):
    accelerate = pytest.importorskip("accelerate")
    if disk:
        return accelerate.disk_offload(model, tmp_path, offload_buffers=True)
    return accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)


@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
@pytest.mark.parametrize("spec", SPECS)
def test_accelerate_offloads_layers_with_the_names_of_buffers(spec, disk, tmp_path):
    model = nn.Sequential(packed(spec), nn.ReLU(), packed(spec, out=8, in_features=6))
    x = torch.randn(3, 20)
    with torch.no_grad():
        expected = model(x)
        for layer in (model[0], model[2]):
            layer.own_names = True
        model = offloaded(model, tmp_path, disk)
        assert all(part.is_meta for part in model[0].parts.values())
        for _ in range(2):
            assert torch.equal(model(x), expected)
        assert not disk or model[0]._prepared is None  # on the CPU, what is offloaded is the part that was used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_cuda_graph_around_a_layer_computes_what_the_layer_does(dtype, spec):
    layer = packed(spec).to("cuda:0", dtype)
    x = torch.randn(3, 20, dtype=dtype, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_compiles_a_layer_whole(mode, fresh):
    layer = packed(dtype=torch.float16).cuda()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    x = torch.randn(3, 20, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            torch.testing.assert_close(compiled(x).clone(), layer(x), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_call_never_waits_for_the_device():
    layer = packed(dtype=torch.float16).cuda()
    x = torch.randn(3, 20, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        layer(x)
        try:
            torch.cuda.set_sync_debug_mode("error")
            layer(x)
            layer.dequantize(torch.float16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
