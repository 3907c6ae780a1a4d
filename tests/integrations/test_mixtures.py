"""Mixtures whose experts follow no common interface of transformers, or are rearranged on loading: compressed, loaded, run."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import seedlm
from seedlm.codes.registry import parse_format
from seedlm.compress.allocate import Mixture
from seedlm.compress.feedback import Feedback
from seedlm.compress.observe import observe_checkpoint
from seedlm.compress.request import Request
from seedlm.errors import CheckpointError, OutputError
from seedlm.modeling.experts import SeedExperts
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.source import open_source
from tiny_models import SMALL, join, run, split, tiny_model

IDS = torch.arange(1, 13).view(2, 6)
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CASES = {
    # Experts of attention too; one projection to a module, tokens sorted by expert.
    "jetmoe": ({"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}, 8),
    # Experts that hand back what they are given.
    "longcat_flash": (
        {
            **LATENT,
            **{"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 24},
            **{"num_key_value_heads": 4, "ffn_hidden_size": 44, "qk_head_dim": 16, "head_dim": 8},
        },
        1,
    ),
    # Stacks of two dimensions, parameters of a child.
    "dbrx": (
        {
            **{"num_hidden_layers": 1, "d_model": 32, "hidden_size": None},
            "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
        1,
    ),
}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("model_type", CASES)
def test_experts_of_their_own_kind_compute_what_their_dense_weights_do(tmp_path, model_type):
    config, modules = CASES[model_type]
    tiny_model(model_type, **config).save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    packed = Checkpoint.open(tmp_path / "packed").packed
    assert len(list(seed_linears(model))) == len(packed)
    assert sum(isinstance(module, SeedExperts) for module in model.modules()) == modules
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").packed.keys() == packed.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), before)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-5, atol=1e-6)

    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=seedlm.SeedLMConfig(format=SMALL), dtype=torch.float32
    )
    torch.testing.assert_close(logits(quantized), before, rtol=1e-5, atol=1e-6)
    quantized.save_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")), before, rtol=1e-5, atol=1e-6
    )


def test_weights_that_rwkv_scales_by_itself_stay_dense(tmp_path):
    tiny_model(
        "rwkv", attention_hidden_size=32, num_attention_heads=None, num_key_value_heads=None, head_dim=None
    ).save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed")
    names = {name.partition("blocks.")[2][2:] for name in Checkpoint.open(tmp_path / "packed").packed}
    assert names == {"attention.key", "attention.receptance", "attention.value", "feed_forward.key", "feed_forward.receptance"}
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()).isfinite().all()


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "num_hidden_layers": 2}
SPARSE = {"moe_intermediate_size": 24, "mlp_layer_types": ["dense", "sparse"], "intermediate_size": 44}


def ernie():
    """Half of the experts in the file are a module of their own, for the tokens of images, and smaller."""
    text = {**HEADS, **SPARSE, "hidden_size": 64, "head_dim": 128, "moe_num_experts": 3, "moe_k": 2}
    text |= {"moe_intermediate_size": [24, 16], "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 44, "num_heads": 4}
    config = transformers.AutoConfig.for_model("ernie4_5_vl_moe", text_config=text, vision_config=tower)
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def inkling():
    """Rows of gate and up by turns: in one parameter of the routed experts, in one each of those that all tokens go through."""
    text = {**HEADS, **SPARSE, "hidden_size": 32, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 2, "d_rel": 4}
    text |= {"num_experts_per_tok": 2, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
    text |= {"layer_types": ["hybrid_sliding", "hybrid"], "rel_extent": 8, "logits_mup_width_multiplier": 1.0}
    towers = {
        "vision_config": {"text_hidden_size": 32, "num_hidden_layers": 4, "patch_size": 2, "temporal_patch_size": 1},
        "audio_config": {"text_hidden_size": 32, "n_mel_bins": 4, "mel_vocab_size": 4},
    }
    config = transformers.AutoConfig.for_model("inkling_mm_model", text_config=text, **towers)
    return transformers.InklingForConditionalGeneration(config)


@pytest.fixture
def built(monkeypatch):
    """A random model of one of these, in evaluation mode."""

    def build(make):
        if make is inkling:  # its sizes are tensors of floats, which torch refuses
            module = pytest.importorskip("transformers.models.inkling.modeling_inkling")
            scales = module.plan_out_scales
            monkeypatch.setattr(module, "plan_out_scales", lambda *sizes: scales(*sizes, device="cpu").long().tolist())
        torch.manual_seed(0)
        dense = make().eval()
        for parameter in dense.parameters():
            torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.3)
        return dense

    return build


@pytest.mark.parametrize(("build", "unseen"), [(ernie, 13), (inkling, 0)])
def test_they_are_observed_by_a_text_alone(tmp_path, built, build, unseen):
    built(build).save_pretrained(tmp_path / "dense")
    notes = []
    observe_checkpoint(
        tmp_path / "dense",
        tmp_path / "statistics.safetensors",
        text=Feedback("own", sequences=8, length=16),
        device="cpu",
        on_note=notes.append,
    )
    assert [note for note in notes if "no statistics" in note] == [
        f"no statistics of {unseen} of 36 layers, which go by their weights alone: model.layers.1.mlp.experts.3.down_proj ..."
    ] * (unseen > 0)  # Ernie's last experts are for images alone


def test_codes_that_transformers_would_rearrange_are_not_saved(tmp_path, built):
    """Inkling's ``gate_proj`` and ``up_proj`` are, to transformers, the shared experts' wherever they stand in a name."""
    dense = built(inkling)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense")
    seedlm.compress_model(model, SMALL)
    with pytest.raises(OutputError, match=r"^10 packed layers of InklingForConditionalGeneration cannot be saved: "):
        model.save_pretrained(tmp_path / "packed")
    assert not any(tmp_path.glob("packed/*"))
    model = type(dense).from_pretrained(tmp_path / "dense")
    seedlm.compress_model(model, SMALL, exclude=["*.mlp.*"])
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path / "packed")), logits(model))


@pytest.mark.parametrize(
    ("build", "experts", "others"), [(ernie, 18, ("*self_attn*", "*resampler*", "*shared*")), (inkling, 12, "*.attn.*")]
)
def test_experts_that_loading_rearranges_compute_what_their_dense_weights_do(tmp_path, built, build, experts, others):
    dense = built(build)
    dense.save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed", exclude=others)
    checkpoint = Checkpoint.open(tmp_path / "packed")
    assert sum("experts." in name for name in checkpoint.packed) == experts
    assert not any("mlp.experts." in name for name in checkpoint.dense)
    model = type(dense).from_pretrained(tmp_path / "packed")
    assert sum(isinstance(module, SeedExperts) for module in model.modules()) == 2
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").packed == checkpoint.packed
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = type(dense).from_pretrained(tmp_path / "again").state_dict()
    assert states.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in states.items())
    (tmp_path / "dense" / "model.safetensors").unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in checkpoint.weights()},
        tmp_path / "dense" / "model.safetensors",
        metadata={"format": "pt"},
    )
    decoded = type(dense).from_pretrained(tmp_path / "dense")  # as transformers itself rearranges them
    torch.testing.assert_close(logits(decoded), before, rtol=1e-5, atol=1e-6)
    model.dequantize()
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in decoded.named_parameters())


W1, W2 = (f"transformer.blocks.0.ffn.experts.mlp.{name}" for name in ("w1", "w2"))


@pytest.fixture(scope="module")
def dbrx(tmp_path_factory):
    """A packed folder with stacks of two dimensions."""
    root = tmp_path_factory.mktemp("dbrx")
    tiny_model("dbrx", **CASES["dbrx"][0]).save_pretrained(root / "dense")
    run(root / "dense", root / "packed")
    return root / "packed"


def test_a_stack_of_two_dimensions_is_described_as_the_format_says(dbrx):
    """By FORMAT.md's words alone."""
    header, data = split(dbrx / "model.safetensors")
    table = json.loads(header["__metadata__"]["seedlm"])
    config = json.loads((dbrx / "config.json").read_text())["quantization_config"]
    assert (table["format_version"], config["format_version"]) == (4, 4)
    assert table["stacks"][W1] == {"shape": [96, 32], "transposed": False, "experts": 4}
    assert table["stacks"][W2] == {"shape": [96, 32], "transposed": True, "experts": 4}
    assert table["tensors"][f"{W2}.3"] == {"shape": [32, 24], "format": SMALL}
    name = f"{W2}.3.weight"
    facts = [name, "I32", header[name]["shape"], SMALL, [32, 24], W2, [96, 32], True]
    line = json.dumps(facts, separators=(",", ":")).encode() + b"\n"
    assert hashlib.sha256(line + data[slice(*header[name]["data_offsets"])]).hexdigest() == table["sha256"][name]
    whole = dict(Checkpoint.open(dbrx).weights())[W2]
    assert torch.equal(whole[72:], Checkpoint.open(dbrx).tensor(f"{W2}.3").dequantize().T)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        *(({"experts": value}, "experts must be a positive integer") for value in (0, -4, True, 4.0, "4", None, [4], {})),
        ({"experts": 5}, "mlp.w1 must be a multiple of its 5 experts, got 96"),
        ({"experts": 3}, r"w1\.0 must be \[32, 32\], as in .*w1, got \[24, 32\]"),
        ({"experts": 1 << 17}, "must have at most 65536 matrices, got 131072"),
        ({"shape": [4, 24, 32]}, r"has the impossible shape \[4, 24, 32\]"),
        ({"shape": [120, 32], "experts": 5}, r"w1\.4 is missing, a matrix of the stack"),
        ({"transposed": True}, r"w1\.0 must be \[32, 24\]"),
        ({"flat": True}, "must have shape and transposed"),
    ],
)
def test_a_wrong_stack_of_two_dimensions_does_not_open(dbrx, tmp_path, stack, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(changed(dbrx, tmp_path, lambda table: table["stacks"][W1].update(stack)))


def test_older_versions_have_no_stacks_of_two_dimensions(dbrx, tmp_path):
    with pytest.raises(CheckpointError, match=r"is known from format_version 4 on, got 4 in version 3"):
        Checkpoint.open(changed(dbrx, tmp_path / "metadata", lambda table: table.update(format_version=3)))
    folder = changed(dbrx, tmp_path / "config", lambda table: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is a matrix of a stack of two dimensions, for which .* must be 4, got 3"):
        Checkpoint.open(folder)


def changed(folder, copy, change):
    """A copy of a folder with other metadata."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    header, data = split(folder / "model.safetensors")
    table = json.loads(header["__metadata__"]["seedlm"])
    change(table)
    header["__metadata__"]["seedlm"] = json.dumps(table)
    (copy / "model.safetensors").write_bytes(join(header, data))
    return copy


def test_what_only_the_model_tells_of_flat_stacks_is_not_refused_by_their_names(dbrx):
    dense = dbrx.parent / "dense"
    Request.of(dense / "out", format="4", feedback="none", exclude="*.mlp.w?").check_source(open_source(dense))
    mixture = Mixture(size=15_000, formats=(parse_format("2"), parse_format("4")))
    Request.of(dense / "out", format=mixture, feedback="own").check_source(open_source(dense))
