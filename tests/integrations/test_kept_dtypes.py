"""Weights that a model keeps in float32 whatever its dtype, when they are packed."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import toy_family  # noqa: F401 (registers a family with float16 parts)
from seedlm import compress_checkpoint
from seedlm.modeling.quantize import seed_linears

pytestmark = pytest.mark.usefixtures("dequantizing")

IDS = torch.arange(1, 9).view(2, 4)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2)
    folder = tmp_path_factory.mktemp("t5") / "dense"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("spec", ["block-k8-c8-p3-q4-e4", "toy-3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_t5_computes_as_if_dense_and_its_codes_stay_exact(t5, tmp_path, dtype, spec):
    compress_checkpoint(t5, tmp_path / "packed", format=spec, device="cpu")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=dtype)
    layers = dict(seed_linears(model))
    for name, layer in layers.items():
        kept = name.endswith(".wo") and dtype == torch.float16
        assert layer.weight.dtype == (torch.float32 if kept else dtype), name
        stored = {part: (kind.dtype, kind.shape) for part, kind in layer.format.parts(*layer.weight.shape).items()}
        assert {part: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for part, t in layer.parts.items()} == stored
    packed = model(input_ids=IDS, decoder_input_ids=IDS).logits
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_dense(layer.weight.dtype))
    assert any(name.endswith(".wo") for name in layers)
    assert torch.equal(model(input_ids=IDS, decoder_input_ids=IDS).logits, packed)
