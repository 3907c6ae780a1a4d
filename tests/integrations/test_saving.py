"""Every way of making a packed model in memory saves a folder that loads, or refuses to save."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import seedlm
from seedlm.errors import CheckpointError
from seedlm.modeling.linear import compress_module
from seedlm.modeling.quantize import seed_linears
from tiny_models import SMALL, tiny_model

IDS = torch.arange(1, 13).view(2, 6)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def same(model, folder):
    """Whether a model saves a folder that gives the same logits, packed where the model is."""
    model.save_pretrained(folder)
    again = loaded(folder)
    assert dict(seed_linears(again)).keys() == dict(seed_linears(model)).keys()
    return torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("kind", "format"), [("llama", "2-fast"), ("qwen2_moe", SMALL), ("opt", SMALL)])
def test_a_model_compressed_in_memory_saves_one_that_loads(kind, format, tmp_path):
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if kind == "qwen2_moe" else {}
    sizes |= {"ffn_dim": 44, "word_embed_proj_dim": 32} if kind == "opt" else {}
    model = tiny_model(kind, **sizes)
    seedlm.compress_model(model, format)
    assert same(model, tmp_path / "first")
    assert same(loaded(tmp_path / "first"), tmp_path / "second")
    seedlm.inspect_checkpoint(tmp_path / "first")


def test_formats_that_differ_are_told_apart(tmp_path):
    model = tiny_model("llama")
    seedlm.compress_model(model, SMALL, exclude="*.mlp.*")
    seedlm.compress_model(model, "3-fast")
    assert same(model, tmp_path / "mixed")
    section = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert len(section["overrides"]) == 6
    assert section["modules_to_not_convert"] == ["lm_head"]


def test_the_model_inside_another_module_is_told_too(tmp_path):
    model = tiny_model("llama")
    seedlm.compress_model(torch.nn.ModuleDict({"language": model}), SMALL)
    assert same(model, tmp_path / "inner")


def test_a_dequantized_model_saves_an_ordinary_one(tmp_path):
    model = tiny_model("llama")
    seedlm.compress_model(model, SMALL)
    logits = model(IDS).logits
    seedlm.dequantize_model(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(loaded(tmp_path)(IDS).logits, logits)


def test_a_layer_put_there_by_hand_is_not_saved_until_the_model_knows(tmp_path):
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, compress_module(model.get_submodule(name), SMALL)[0])
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has packed layers and does not know it"):
        model.save_pretrained(tmp_path / "refused")
    assert not [*(tmp_path / "refused").glob("*.safetensors")]
    assert f"{name}.weight" in model.state_dict()
    seedlm.compress_model(model, SMALL, exclude="*")
    assert same(model, tmp_path / "told")
