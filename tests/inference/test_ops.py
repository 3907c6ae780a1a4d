"""The operators: products, gradients, compilers, and what is asked of a backend."""

import copy
from typing import ClassVar

import pytest
import torch

from random_codes import random_words
from seedlm.codes.block.family import FAMILY
from seedlm.codes.block.format import parse_spec
from seedlm.codes.dequantizing import DequantizingBackend
from seedlm.errors import BackendError, FormatError, TensorError
from seedlm.inference import ops
from seedlm.modeling.linear import compress_module, share_input

CPU = torch.device("cpu")
SMALL = parse_spec("block-k8-c8-p3-q4-e4")
SHAPE = (6, 20)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


class Packed:
    """A random weight, its plan and what its backend prepared."""

    def __init__(self, device="cpu", shape=SHAPE, bias=-8, backend="torch"):
        words = random_words(SMALL, *shape, seed=1)
        parts = {"words": words, "exponent_bias": torch.tensor([bias], dtype=torch.int32)}
        self.weight = FAMILY.dequantize(parts, SMALL, shape).to(device)
        self.plan = ops.plan_for(SMALL, shape, torch.device(device), backend)
        self.prepared = self.plan.backend.prepare({name: part.to(device) for name, part in parts.items()}, SMALL, shape)

    def linear(self, x, bias=None):
        return ops.linear(x, [], self.prepared, self.plan, bias)

    def operator(self, x, bias=None):
        return torch.ops.seedlm.linear(x, [], self.prepared, self.plan.text, bias)


@pytest.fixture
def packed():
    return Packed()


@pytest.fixture
def doubling(monkeypatch):
    """A backend with a transform: it doubles x, counts how often, and halves the weight."""

    class Doubling(DequantizingBackend):
        name = "doubling"
        calls: ClassVar[list[str]] = []

        def reason_unavailable(self, device, format, shape):
            return None

        def prepare(self, parts, format, shape):
            return [FAMILY.dequantize(parts, format, shape)]

        def dequantize(self, prepared, format, shape, dtype):
            return prepared[0].to(dtype, copy=True)

        def empty_transform(self, x, format, in_features):
            return [torch.empty_like(x)]

        def transform(self, x, format, in_features):
            self.calls.append(f"{in_features} of {format.spec}")
            return [2 * x]

        def linear(self, x, prepared, format, shape, bias, transformed=()):
            (doubled,) = transformed or self.transform(x, format, shape[1])
            return torch.nn.functional.linear(doubled, prepared[0] / 2, bias)

    Doubling.calls.clear()
    monkeypatch.setattr(FAMILY, "backends", lambda: (Doubling(),), raising=False)
    monkeypatch.setattr(ops, "_PLANS", {})
    return Doubling


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (0, 20)], ids=str)
def test_linear_is_a_product_with_the_dequantized_weight(shape, device):
    packed, x, bias = Packed(device), torch.randn(shape, device=device), torch.randn(6, device=device)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x, packed.weight, b)
        assert torch.equal(packed.linear(x, b), expected)
        assert torch.equal(packed.operator(x, b), expected)


def test_an_input_in_another_layout_gives_the_same_contiguous_product(packed):
    x = torch.randn(3, 20, 2).transpose(1, 2)
    torch.testing.assert_close(packed.operator(x), packed.operator(x.contiguous()))
    assert packed.operator(x).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantize_rounds_once_to_the_dtype_asked_for(packed, dtype):
    found = ops.dequantize(packed.prepared, packed.plan, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, packed.weight.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_the_input_and_the_bias(device):
    packed = Packed(device)
    x = torch.randn(2, 3, 20, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    upstream = torch.randn(2, 3, 6, dtype=torch.float64, device=device)
    found = torch.autograd.grad(packed.linear(x, bias), (x, bias), upstream)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, packed.weight.double(), bias), (x, bias), upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_bias_alone_has_a_gradient(packed):
    bias = torch.randn(6, requires_grad=True)
    packed.linear(torch.randn(3, 20), bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))


def test_a_backward_pass_keeps_no_weight(packed):
    out = packed.linear(torch.randn(3, 20, requires_grad=True))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed.linear(torch.randn(3, 20, requires_grad=True))
    assert {id(tensor) for tensor in kept} == {id(tensor) for tensor in packed.prepared}
    assert out.requires_grad


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_pass_torchs_own_checks(packed, with_bias):
    x = torch.randn(3, 20, requires_grad=True)
    bias = torch.randn(6, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.seedlm.linear.default, (x, [], packed.prepared, packed.plan.text, bias))
    torch.library.opcheck(torch.ops.seedlm.dequantize.default, (packed.prepared, packed.plan.text, torch.bfloat16))


def test_a_transform_passes_torchs_own_checks(doubling):
    packed, x = Packed(backend="doubling"), torch.randn(3, 20)
    torch.library.opcheck(torch.ops.seedlm.transform.default, (x, packed.plan.input_text))
    arguments = (x.requires_grad_(), ops.transform(x, packed.plan, packed.prepared), packed.prepared, packed.plan.text, None)
    torch.library.opcheck(torch.ops.seedlm.linear.default, arguments)


def test_layers_of_other_heights_have_one_transform(doubling):
    high, low = Packed(shape=(6, 20), backend="doubling"), Packed(shape=(2, 20), backend="doubling")
    x = torch.randn(3, 20)
    transformed = ops.transform(x, high.plan, high.prepared)
    assert high.plan.input_text == low.plan.input_text == f"{SMALL.spec} *x20 doubling"
    for packed in (high, low):
        found = ops.linear(x, transformed, packed.prepared, packed.plan, None)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, packed.weight))
    assert doubling.calls == [f"20 of {SMALL.spec}"]


def test_fakes_give_shape_and_dtype_without_a_product(packed):
    prepared = [tensor.to("meta") for tensor in packed.prepared]
    assert torch.ops.seedlm.dequantize(prepared, packed.plan.text, torch.float16).shape == (6, 20)
    x = torch.empty(2, 5, 20, dtype=torch.bfloat16, device="meta")
    y = torch.ops.seedlm.linear(x, [], prepared, packed.plan.text, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 6), torch.bfloat16, "meta")


@pytest.mark.parametrize("way", ["linear", "operator"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 19), r"x must be \[..., 20\], got \[2, 19\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.zeros(2, 20, dtype=torch.int32), "floating point, got int32"),
    ],
    ids=["width", "scalar", "dtype"],
)
def test_inputs_that_do_not_fit_are_refused(packed, x, message, way):
    with pytest.raises(TensorError, match=message):
        getattr(packed, way)(x)


def test_a_weight_is_not_dequantized_to_integers(packed):
    with pytest.raises(TensorError, match="floating-point dtype, got int32"):
        ops.dequantize(packed.prepared, packed.plan, torch.int32)


def test_a_text_is_enough_to_find_a_plan(packed, monkeypatch):
    monkeypatch.setattr(ops, "_PLANS", {})
    found = ops.find_plan(packed.plan.text)
    assert packed.plan.text == f"{SMALL.spec} 6x20 torch"
    assert (found.backend, found.format, found.shape) == (packed.plan.backend, SMALL, SHAPE)
    assert ops.find_plan(packed.plan.text) is found


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nonsense", BackendError, "a plan is '<spec> <out>x<in> <backend>', got 'nonsense'"),
        (f"{SMALL.spec} 6 torch", BackendError, "a plan is"),
        (f"{SMALL.spec} 6x20 fpga", BackendError, "block codes have no backend 'fpga'"),
        ("cube-3 6x20 torch", FormatError, "unknown format 'cube-3'"),
    ],
    ids=["words", "shape", "backend", "format"],
)
def test_a_text_that_is_no_plan_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        ops.find_plan(text)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_computes_in_its_dtype_as_torchs_own_does(device, dtype):
    packed, x, bias = Packed(device), torch.randn(3, 20, dtype=dtype, device=device), torch.randn(6, dtype=dtype, device=device)
    with torch.autocast(device, torch.bfloat16):
        found, expected = packed.linear(x, bias), torch.nn.functional.linear(x, packed.weight.to(dtype), bias)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_keeps_a_product_whole(packed, backend):
    compiled = torch.compile(packed.linear, fullgraph=True, backend=backend)
    x = torch.randn(3, 20)
    assert torch.equal(compiled(x), packed.linear(x))
    assert torch.equal(compiled(torch.cat([x, x])), packed.linear(torch.cat([x, x])))


def test_modes_that_look_at_operators_see_the_operator(packed):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Names():
        packed.linear(torch.randn(2, 20))
    assert Names.seen == ["aten::randn", "seedlm::linear"]


class TestWhatKernelsMustNotSee:
    """Kernels take addresses: what is elsewhere, or no numbers, is refused before."""

    SHAPE = (64, 48)

    @pytest.fixture(params=["trellis-r4-l12-t32-h32", "block-k8-c8-p3-q4-e4"])
    def layer(self, request):
        torch.manual_seed(1)
        return compress_module(torch.nn.Linear(48, 64), request.param)[0].requires_grad_(False)

    @pytest.mark.parametrize("tokens", [1, 70])
    def test_an_x_elsewhere(self, layer, tokens):
        with pytest.raises(TensorError, match="x is on meta, the codes are on cpu"):
            layer(torch.empty(tokens, 48, device="meta"))
        share_input(layer, other := copy.deepcopy(layer))
        for each in (layer, other):
            with pytest.raises(TensorError, match="x is on meta, the codes are on cpu"):
                each(torch.empty(tokens, 48, device="meta"))

    @pytest.mark.parametrize(
        ("bias", "found"),
        [
            (torch.ones(3), r"torch.float32 \[3\] on cpu"),
            (torch.ones(1, 64), r"torch.float32 \[1, 64\] on cpu"),
            (torch.ones(64).half(), r"torch.float16 \[64\] on cpu"),
            (torch.empty(64, device="meta"), r"torch.float32 \[64\] on meta"),
        ],
    )
    def test_a_bias_that_does_not_fit(self, layer, bias, found):
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        for more in ([layer], [layer, copy.deepcopy(layer)]):
            if len(more) > 1:
                share_input(*more)
            with pytest.raises(TensorError, match=rf"bias must be torch.float32 \[64\] on cpu.*, got {found}"):
                layer(torch.randn(1, 48))

    def test_a_view_whose_numbers_are_stored_with_the_other_sign(self, layer):
        x = torch.randn(2, 48)
        negative = torch._neg_view(x)
        assert torch.equal(layer(negative), layer(-x))

    def test_a_model_on_meta(self, layer):
        assert layer.to("meta")(torch.empty(2, 48, device="meta")).shape == (2, 64)
