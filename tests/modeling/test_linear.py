"""SeedLinear and the walks over a model."""

import pytest
import torch
from torch import nn

from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format
from seedlm.errors import CheckpointError, TensorError
from seedlm.modeling.linear import SeedLinear, compress_module
from seedlm.modeling.quantize import choose_modules, compress_model, dequantize_model
from seedlm.storage.checkpoint import stored_name

pytestmark = pytest.mark.usefixtures("dequantizing")

SPEC = "block-k8-c8-p3-q4-e4"
FORMAT = parse_format(SPEC)


class Toy(nn.Module):
    """Two numbered layers with what a decoder has around them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 40), "gate": nn.Linear(24, 4), "down": nn.Linear(40, 24, bias=False)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(24, 30, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu()) * layer["gate"](x).mean()
        return self.lm_head(x)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


def pack(model, **options):
    return compress_model(model, SPEC, backend="torch", **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 20), (5, 8), (3, 41)], ids=str)
def test_a_packed_layer_computes_with_its_dequantized_weight(shape, bias):
    torch.manual_seed(1)
    dense = nn.Linear(shape[1], shape[0], bias=bias)
    layer, error = compress_module(dense, SPEC, backend="torch")
    x = torch.randn(4, shape[1])
    weight = layer.dequantize()
    assert torch.equal(layer(x), nn.functional.linear(x, weight, dense.bias))
    assert layer.bias is dense.bias
    measured = float((dense.weight - weight).norm().detach() / dense.weight.norm().detach())
    assert error == pytest.approx(measured, rel=1e-5)
    assert 0.05 < error < 0.5
    assert torch.equal(layer.to_dense()(x), layer(x))


def test_the_state_dict_is_what_a_checkpoint_stores():
    layer, _ = compress_module(nn.Linear(20, 6), SPEC, backend="torch")
    parts = FORMAT.parts(6, 20)
    expected = {stored_name("m", name): (part.dtype, part.shape) for name, part in parts.items()} | {
        "m.bias": ("float32", (6,))
    }
    state = nn.ModuleDict({"m": layer}).state_dict()
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()} == expected
    assert set(expected) == {"m.weight", "m.weight_exponent_bias", "m.bias"}


def test_a_state_dict_loads_into_an_empty_layer():
    layer, _ = compress_module(nn.Linear(20, 6), SPEC, backend="torch")
    other = SeedLinear(20, 6, FORMAT, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_moves_the_bias_and_leaves_the_codes(cast):
    layer, _ = compress_module(nn.Linear(20, 6), SPEC, backend="torch")
    before = {name: part.clone() for name, part in layer.parts.items()}
    cast(layer)
    assert all(torch.equal(part, before[name]) and part.dtype == torch.int32 for name, part in layer.parts.items())
    assert layer.weight.dtype == layer.bias.dtype
    x = torch.randn(2, 20).to(layer.bias.dtype)
    assert layer(x).dtype == layer.bias.dtype
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(x.dtype), layer.bias))


def test_it_says_what_it_is():
    assert repr(SeedLinear(20, 6, FORMAT)) == f"SeedLinear(in_features=20, out_features=6, bias=False, format={SPEC})"


def test_it_compiles_whole_and_trains_what_is_around_it():
    layer, _ = compress_module(nn.Linear(20, 6), SPEC, backend="torch")
    model = nn.Sequential(nn.Linear(20, 20), layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 20)
    compiled(x).square().sum().backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    nn.Sequential(model[0], layer.to_dense())(x).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad, rtol=1e-5, atol=1e-6)


def test_a_model_is_compressed_inside_its_numbered_layers(toy):
    names = {f"layers.{i}.{part}" for i in (0, 1) for part in ("up", "down")}
    errors = pack(toy)
    assert set(errors) == names == {name for name, m in toy.named_modules() if isinstance(m, SeedLinear)}
    assert toy.lm_head.weight is toy.embed.weight
    assert all(0 < error < 0.5 for error in errors.values())


def test_a_dequantized_model_computes_the_same(toy):
    pack(toy)
    ids = torch.arange(12).view(2, 6)
    packed = toy(ids)
    dequantize_model(toy)
    assert torch.equal(toy(ids), packed)
    assert not any(isinstance(m, SeedLinear) for m in toy.modules())


def test_patterns_add_and_take_away(toy):
    assert choose_modules(toy, FORMAT, ["*.gate"], ["layers.1.*"]) == ["layers.0.up", "layers.0.gate", "layers.0.down"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_refused(toy, option):
    with pytest.raises(TensorError, match=r"'layer\.\*'"):
        pack(toy, **{option: ["layer.*"]})


def test_a_tied_weight_is_refused_by_name(toy):
    with pytest.raises(TensorError, match=r"lm_head\.weight is shared with embed\.weight"):
        pack(toy, include=["lm_head"])


def test_a_weight_that_cannot_be_encoded_is_named(toy):
    toy.layers[1]["up"].weight.data[0, 0] = torch.nan
    with pytest.raises(TensorError, match=r"layers\.1\.up\.weight: .*1 NaN"):
        pack(toy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda words, bias: bias.fill_(193), "m: exponent bias must be -192 .. 192, got 193"),
        (lambda words, bias: words[4].zero_(), "m: .* seed 0, the first at row 4"),
        (lambda words, bias: words[2, -1].bitwise_or_(-(2**31)), "m: padding bits"),
    ],
    ids=["bias", "seed", "padding"],
)
def test_invalid_codes_are_found(damage, message):
    layer, _ = compress_module(nn.Linear(20, 6), SPEC, backend="torch")
    layer.check("m")
    damage(*layer.parts.values())
    with pytest.raises(CheckpointError, match=message):
        layer.check("m")


def test_a_number_of_bits_is_a_format_and_one_pattern_needs_no_list():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8))
    assert compress_model(model, "3-fast", exclude="1", include="*").keys() == {"0"}
    assert "tensor(" not in repr(encode(torch.zeros(4, 16), "3-fast")[0])


def test_layers_of_one_input_share_it_where_their_family_is_fused():
    import toy_family

    def attention():
        return nn.ModuleDict({name: nn.Linear(16, 16) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})

    model = nn.ModuleDict({"layers": nn.ModuleList([attention(), attention()])})
    compress_model(model, toy_family.ToyFormat(4))
    first, second = ({name: layer._shared for name, layer in block.items()} for block in model["layers"])
    assert first["o_proj"] is None
    assert first["q_proj"][0] is first["k_proj"][0] is first["v_proj"][0] is not second["q_proj"][0]
    assert [first[name][1] for name in ("q_proj", "k_proj", "v_proj")] == [0, 1, 2]
    block = nn.ModuleDict({"layers": nn.ModuleList([attention()])})
    compress_model(block, SPEC, backend="torch")
    assert all(layer._shared is None for layer in block["layers"][0].values())
