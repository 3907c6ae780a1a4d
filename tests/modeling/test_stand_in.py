"""What code around a packed layer learns from its `weight`, and what it is told instead."""

import pytest
import torch
from torch import nn

from seedlm.errors import TensorError
from seedlm.modeling.linear import compress_module
from seedlm.modeling.quantize import compress_model, dequantize_model, seed_linears
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("dequantizing")

SPEC = "block-k8-c8-p3-q4-e4"
IDS = torch.arange(1, 9).view(2, 4)


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


@pytest.mark.parametrize(
    "make", [torch.empty_like, torch.zeros_like, lambda w: w.new_zeros(6, 20)], ids=["empty", "zeros", "new"]
)
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


def test_transformers_has_no_values_to_initialise(layer):
    initialization = pytest.importorskip("transformers.initialization")
    initialization.normal_(layer.weight, mean=0.0, std=0.1)


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
    packed = model(input_ids=IDS, decoder_input_ids=IDS).logits
    for name, layer in list(seed_linears(model)):
        model.set_submodule(name, layer.to_dense(layer.weight.dtype))
    dense = model(input_ids=IDS, decoder_input_ids=IDS).logits
    assert packed.dtype == dense.dtype
    assert torch.equal(packed, dense)


def test_rwkv_which_divides_its_weights_is_told_what_to_do():
    model = tiny("rwkv")
    compress_model(model, SPEC, backend="torch", include=["*.attention.output"])  # dense by default, for this reason
    with torch.no_grad(), pytest.raises(TensorError, match=r"div_ needs the values .* layer\.to_dense\(dtype\)"):
        model(IDS)
    model.config.rescale_every = 0  # its own switch for that
    with torch.no_grad():
        assert model(IDS).logits.shape == (2, 4, 64)


def test_deepseeks_indexer_which_casts_to_its_projections_dtype_computes_as_if_dense():
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
    indexer = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 4, "mlp_layer_types": ["dense", "sparse"]}
    model = tiny_model("deepseek_v32", num_key_value_heads=4, head_dim=None, **sizes, **experts, **indexer)
    compress_model(model, SPEC, backend="torch", include=["*.weights_proj"], exclude=["*.mlp.*"])
    model.bfloat16()
    packed = model(IDS).logits
    assert "model.layers.1.self_attn.indexer.weights_proj" in dict(seed_linears(model))
    dequantize_model(model, torch.bfloat16)
    assert torch.equal(packed, model(IDS).logits)
