"""What a model itself says of a source, before anything is searched."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import seedlm
from seedlm.codes.registry import parse_format
from seedlm.errors import SourceError
from seedlm.modeling.blueprint import survey
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.selection import largest_left, select
from seedlm.storage.source import open_source
from tiny_models import SMALL, run, tiny_llama, tiny_model

IDS = torch.arange(1, 13).view(2, 6)
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


def rewrite(folder, change):
    """Change the tensors of a source folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config_of(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return config


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
def test_layers_of_multi_token_prediction_stay_as_they_are(tmp_path, model_type):
    heads = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
    heads = {**heads, "qk_nope_head_dim": 8} if model_type == "deepseek_v3" else {}
    tiny_model(model_type, **ROUTED, **heads, first_k_dense_replace=1).save_pretrained(tmp_path / "dense")
    added = {
        "model.layers.2.eh_proj.weight": torch.randn(32, 64),
        "model.layers.2.mlp.experts.0.gate_proj.weight": torch.randn(24, 32),
        "model.layers.2.enorm.weight": torch.randn(32),
    }
    rewrite(tmp_path / "dense", lambda tensors: tensors.update(added))
    notes = []
    run(tmp_path / "dense", tmp_path / "packed", on_note=notes.append)
    assert any("has no place for 3 tensors, which are kept as they are: model.layers.2." in note for note in notes)
    checkpoint = Checkpoint.open(tmp_path / "packed")
    assert all(torch.equal(checkpoint.dense_tensor(name), tensor) for name, tensor in added.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(list(seed_linears(model))) == len(checkpoint.packed)
    assert logits(model).isfinite().all()


def test_weights_that_modules_share_stay_dense_from_a_folder_and_in_memory(tmp_path):
    model = tiny_model(
        "zamba2",
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_headdim=8,
        num_mem_blocks=1,
        adapter_rank=4,
        attention_hidden_size=64,
        attention_head_dim=16,
    )
    model.save_pretrained(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    found = survey(source.config, source.tensors)
    shared = [name for name, reason in found.dense.items() if reason.startswith("shared with model.layers.")]
    assert any("self_attn.q_proj" in name for name in shared)
    run(tmp_path / "dense", tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(list(seed_linears(packed))) == len(Checkpoint.open(tmp_path / "packed").packed) > 0
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=seedlm.SeedLMConfig(format=SMALL), dtype=torch.float32
    )
    assert {name for name, _ in seed_linears(loaded)} == {name for name, _ in seed_linears(packed)}
    torch.testing.assert_close(logits(loaded), logits(packed), rtol=1e-4, atol=1e-5)


def test_a_linear_layer_that_computes_something_else_stays_dense():
    config = AutoConfig.for_model("deepseek_v4", num_hidden_layers=2)
    from transformers import DeepseekV4ForCausalLM

    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    config.architectures = ["DeepseekV4ForCausalLM"]
    tensors = {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    tensors["norm.weight"] = tensors.pop("model.norm.weight")  # as the original has it
    found = survey(config.to_dict(), tensors)
    grouped = [name for name, reason in found.dense.items() if reason == "DeepseekV4GroupedLinear is no plain linear layer"]
    assert [name.rpartition("layers.")[2] for name in grouped] == [f"{n}.self_attn.o_a_proj.weight" for n in (0, 1)]
    chosen, _ = select(tensors, {}, parse_format("4", "block"), survey=found)
    assert not {name.removesuffix(".weight") for name in grouped} & set(chosen)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (lambda name: "layers.1." in name, r"lacks 9 weights of LlamaForCausalLM.*: model\.layers\.1\.\*"),
        (lambda name: "layers.0.mlp.up" in name, r"lacks 1 weights .*: model\.layers\.0\.mlp\.up_proj\.weight"),
        (lambda name: name == "model.embed_tokens.weight", r"lacks 1 weights .*: model\.embed_tokens\.weight"),
    ],
    ids=["layer", "matrix", "embeddings"],
)
def test_a_source_that_lacks_what_its_config_declares_is_refused(tmp_path, lost, message):
    tiny_llama(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: [tensors.pop(name) for name in list(tensors) if lost(name)])
    with pytest.raises(SourceError, match=message):
        run(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_lacks_one_expert_is_refused(tmp_path):
    tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path / "m")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.gate_up_proj \(3 of 4 from .*w1"):
        run(tmp_path / "m", tmp_path / "out")


def test_a_head_may_be_missing_and_a_shape_may_not_differ(tmp_path):
    tiny_llama(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight"))
    run(tmp_path / "m", tmp_path / "out")
    config_of(tmp_path / "m", intermediate_size=45)
    with pytest.raises(SourceError, match=r"mlp\.\w+_proj\.weight: is \[.*44.*\] in the source, and \[.*45"):
        run(tmp_path / "m", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "nothing_like_it"},
            "has no model_type 'nothing_like_it': what is compressed is decided by names alone",
        ),
        ({"architectures": None}, "names no model_type and no architectures: what"),
        ({"num_attention_heads": 0}, r"LlamaForCausalLM cannot be built \(.*\): what"),
    ],
    ids=["unknown", "nameless", "impossible"],
)
def test_a_model_that_cannot_be_built_falls_back_to_names_and_says_so(tmp_path, changes, message):
    tiny_llama(tmp_path / "m")
    source = open_source(tmp_path / "m")
    found = survey(config_of(tmp_path / "m", **changes), source.tensors)
    assert found.name is None
    assert re.search(message, found.notes[0])
    notes = []
    report = run(tmp_path / "m", tmp_path / "out", on_note=notes.append)
    assert notes[0] == found.notes[0]
    assert len(report.tensors) == 14


def test_the_largest_that_stays_dense_against_expectation_is_named():
    tensors = {
        "h.0.experts.mlp.w1": TensorInfo("BF16", (3000, 100)),
        "h.0.attn.q_proj.weight": TensorInfo("BF16", (100, 100)),
        "embed.weight": TensorInfo("BF16", (10, 100)),
    }
    left = {"h.0.experts.mlp.w1": "not a weight", "embed.weight": "an embedding"}
    line = "96% of the weights are left dense inside of layers, the largest h.*.experts.mlp.w1 (96%: not a weight)"
    assert largest_left(tensors, left) == [line]
    assert largest_left(tensors, {"h.0.experts.mlp.w1": "excluded"}) == []


@pytest.mark.parametrize("square", [True, False])
def test_the_model_tells_how_a_stack_of_experts_lies(square):
    """qwen3_vl_moe: [experts, in, out] on the disk of some, turned on loading if its shape is not the parameter's."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2}
    text |= {"moe_intermediate_size": 16 if square else 24, "intermediate_size": 44}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text)
    config.vision_config.depth = 1
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    straight = {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert survey(config.to_dict(), straight).stacks[name].transposed is False
    if not square:
        shape = straight[name].shape
        turned = {**straight, name: TensorInfo("BF16", (shape[0], shape[2], shape[1]))}
        assert survey(config.to_dict(), turned).stacks[name].transposed is True
