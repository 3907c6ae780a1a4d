"""What code around a packed layer learns from its `weight`, and what it is told instead."""

import pytest
import torch
from torch import nn

from seedlm.errors import TensorError
from seedlm.modeling.linear import compress_module
from seedlm.modeling.quantize import compress_model, seed_linears

SPEC = "block-k8-c8-p3-q4-e4"


@pytest.fixture
def layer():
    return compress_module(nn.Linear(20, 6, dtype=torch.bfloat16), SPEC, backend="torch")[0]


def test_a_weight_has_the_dense_ones_facts(layer):
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.layout) == (torch.bfloat16, torch.device("cpu"), torch.strided)
    assert (weight.shape, weight.ndim, weight.size(1), weight.numel()) == ((6, 20), 2, 20, 120)
    assert (weight.element_size(), weight.nbytes, weight.stride(), weight.is_contiguous()) == (2, 240, (20, 1), True)
    assert (weight.is_floating_point(), weight.requires_grad, weight.grad, weight.is_meta) == (True, False, None, False)
    assert weight.data.shape == weight.detach().shape == (6, 20)
    assert repr(weight) == "PackedWeight(shape=[6, 20], dtype=torch.bfloat16, device='cpu')"


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.float64), torch.float64),
        (lambda m: m.type(torch.float32), torch.float32),
        (lambda m: m.to("cpu"), torch.bfloat16),
        (lambda m: m.to_empty(device="meta"), torch.bfloat16),
    ],
    ids=["half", "to", "type", "device", "empty"],
)
def test_it_follows_casts_and_devices(layer, cast, dtype):
    moved = cast(layer)
    assert moved.weight.dtype == dtype
    assert moved.weight.device == moved.bias.device
    assert all(part.dtype == torch.int32 for part in layer.parts.values())


@pytest.mark.parametrize("make", [torch.empty_like, torch.zeros_like, lambda w: w.new_zeros(6, 20)], ids=["empty", "zeros", "new"])
def test_tensors_like_it_can_be_made(layer, make):
    made = make(layer.weight)
    assert type(made) is torch.Tensor
    assert (made.shape, made.dtype, made.is_contiguous()) == ((6, 20), torch.bfloat16, True)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w.div_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.T,
        lambda w: w[0],
        lambda w: w.float(),
        lambda w: w.clone(),
        lambda w: w.tolist(),
        lambda w: w.numpy(),
        lambda w: w.data_ptr(),
        lambda w: bool((w == 0).all()),
        lambda w: nn.functional.linear(torch.zeros(2, 20, dtype=torch.bfloat16), w),
    ],
    ids=["add", "in-place", "data", "transpose", "index", "cast", "clone", "list", "numpy", "pointer", "compare", "product"],
)
def test_values_are_refused_with_what_to_do(layer, use):
    with pytest.raises(TensorError, match=r"needs the values of a weight that is stored as codes: layer\.dequantize\(dtype\)"):
        use(layer.weight)


def test_a_compiler_sees_the_values(layer):
    def ask(x):
        return x.to(layer.weight.dtype) @ layer.weight.T

    x = torch.randn(3, 20)
    compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x.bfloat16() @ layer.dequantize(torch.bfloat16).T)


def tiny(name, **changes):
    transformers = pytest.importorskip("transformers")
    kinds = {
        "t5": ("T5Config", "T5ForConditionalGeneration", {"d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 1}),
        "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"attention_hidden_size": 32, "num_hidden_layers": 2}),
    }
    config, model, sizes = kinds[name]
    torch.manual_seed(0)
    width = {"d_model": 32} if name == "t5" else {"hidden_size": 32}
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=64, **width, **sizes, **changes)).eval()


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_t5_which_asks_for_its_weights_dtype_computes_as_if_dense(dtype, activation):
    model = tiny("t5", feed_forward_proj=activation)
    compress_model(model, SPEC, backend="torch", include=["*"], exclude=["lm_head"])
    model.to(dtype)
    for name, layer in list(seed_linears(model)):
        if name.endswith(".wo"):
            layer.float()  # what transformers does to the dense model, in float16
    ids = torch.arange(1, 9).view(2, 4)
    packed = model(input_ids=ids, decoder_input_ids=ids).logits
    for name, layer in list(seed_linears(model)):
        model.set_submodule(name, layer.to_dense(layer.weight.dtype))
    dense = model(input_ids=ids, decoder_input_ids=ids).logits
    assert packed.dtype == dense.dtype
    assert torch.equal(packed, dense)


def test_rwkv_which_divides_its_weights_is_told_what_to_do():
    model = tiny("rwkv")
    compress_model(model, SPEC, backend="torch")
    ids = torch.arange(1, 9).view(2, 4)
    with torch.no_grad(), pytest.raises(TensorError, match=r"div_ needs the values .* layer\.to_dense\(dtype\)"):
        model(ids)
    model.config.rescale_every = 0  # its own switch for that
    with torch.no_grad():
        assert model(ids).logits.shape == (2, 4, 64)


def test_deepseeks_indexer_finds_its_projections_dtype():
    modeling = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    configs = pytest.importorskip("transformers.models.deepseek_v32.configuration_deepseek_v32")
    names = {name: kind for name, kind in vars(modeling).items() if name.endswith("Indexer")}
    (indexer,) = names.values()
    assert indexer is not None
    assert configs is not None
    projection = compress_module(nn.Linear(32, 8, bias=False), SPEC, backend="torch")[0]
    hidden = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    weights = projection(hidden.to(projection.weight.dtype)).float()  # its line
    assert torch.equal(weights, projection.to_dense()(hidden.float()))
