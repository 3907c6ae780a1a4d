"""Architectures that people run: compressed from their folder, loaded packed, held against the same model made dense."""

import json
import re
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import seedlm
from seedlm.errors import CheckpointError, SourceError
from seedlm.modeling.experts import SeedExperts, projections_of
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.selection import stack_of
from tiny_models import SMALL, tiny_model

pytestmark = pytest.mark.usefixtures("dequantizing")

EXPERTS_CASES = ["mixtral", "gpt_oss", "llama4_text", "granitemoe"]
"""Held expert by expert; stacked and transposed, with biases; not routed by the usual interface; stacked under other names."""
IDS = torch.arange(1, 13).view(2, 6)
LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
ATTENTION = LLAMA.partition(" mlp")[0]
EXPERTS = "mlp.experts.N.gate_proj mlp.experts.N.up_proj mlp.experts.N.down_proj"
SHARED = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """packed, dense: the matrices of a layer that are codes on disk, N any expert; and those that are not."""

    packed: str
    dense: str = ""
    config: dict = field(default_factory=dict)
    experts: bool = False
    path: str = "model.layers"


ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "llama": Case(LLAMA),
    "llama-biased": Case(LLAMA, config={"attention_bias": True, "mlp_bias": True}),
    "mistral": Case(LLAMA),
    "qwen2": Case(LLAMA, config={"tie_word_embeddings": True}),
    "qwen3": Case(LLAMA),
    "gemma2": Case(LLAMA, config={"query_pre_attn_scalar": 8}),
    "gemma3_text": Case(LLAMA),
    "phi3": Case("self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "gpt_neox": Case("attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h", path="gpt_neox.layers"),
    "falcon": Case(
        "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
        config={"bias": True, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
        path="transformer.h",
    ),
    "mixtral": Case(
        f"{ATTENTION} block_sparse_moe.experts.N.w1 block_sparse_moe.experts.N.w2 block_sparse_moe.experts.N.w3",
        "block_sparse_moe.gate",
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        experts=True,
    ),
    "qwen2_moe": Case(
        f"{ATTENTION} {EXPERTS} " + " ".join(f"mlp.shared_expert.{name}" for name in SHARED),
        "mlp.gate mlp.shared_expert_gate",
        {**ROUTED, "num_experts": 3, "shared_expert_intermediate_size": 40},
        experts=True,
    ),
    "qwen3_moe": Case(f"{ATTENTION} {EXPERTS}", "mlp.gate", {**ROUTED, "num_experts": 3}, experts=True),
    "deepseek_v3": Case(
        "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj "
        f"{EXPERTS} " + " ".join(f"mlp.shared_experts.{name}" for name in SHARED),
        "mlp.gate",
        {
            **ROUTED,
            **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4},
            **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
        experts=True,
    ),
    "gpt_oss": Case(
        f"{ATTENTION} mlp.experts.gate_up_proj.N mlp.experts.down_proj.N",
        "mlp.router",
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        experts=True,
    ),
    "llama4_text": Case(
        f"{ATTENTION} feed_forward.experts.gate_up_proj.N feed_forward.experts.down_proj.N "
        + " ".join(f"feed_forward.shared_expert.{name}" for name in SHARED),
        "feed_forward.router",
        {"num_local_experts": 3, "num_experts_per_tok": 1},
        experts=True,
    ),
    "granitemoe": Case(
        f"{ATTENTION} block_sparse_moe.input_linear.N block_sparse_moe.output_linear.N",
        "block_sparse_moe.router.layer",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16},  # input_linear is square
        experts=True,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


def original(folder, name):
    """The dense folder of a case, written once."""
    dense = folder / f"{name}-dense"
    if not dense.exists():
        model = tiny_model(name.removesuffix("-biased"), num_hidden_layers=layers(CASES[name]), **CASES[name].config)
        if CASES[name].experts and not any(projections_of(module) for module in model.modules()):
            pytest.skip("this transformers has experts of another kind here, which cannot be packed")
        model.save_pretrained(dense)
    return dense


def packed(folder, name, **options):
    out = folder / f"{name}-packed{''.join(map(str, options.values()))}"
    if not out.exists():
        seedlm.compress_checkpoint(original(folder, name), out, format=SMALL, backend="torch", **options)
    return out


def layers(case):
    """Two, if only to see both found."""
    return 2 if case.experts else 1


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def made_dense(packed_folder, out):
    """A folder of ordinary weights: those that the packed one stands for."""
    out.mkdir()
    weights = {name: tensor.contiguous() for name, tensor in Checkpoint.open(packed_folder).weights()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed_folder / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("quantization_config", "fusion_config")})
    )
    return out


def assert_same(found, expected, exact):
    if exact:
        assert torch.equal(found, expected)
    else:  # the order in which outputs of experts are summed up differs
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_packed_model_computes_what_its_dense_weights_do(name, folder, tmp_path):
    case, source, target = CASES[name], original(folder, name), packed(folder, name)
    checkpoint = Checkpoint.open(target)
    before = load_file(source / "model.safetensors")

    paths = {re.sub(rf"^{case.path}\.\d+\.", "", module) for module in checkpoint.packed}
    assert {re.sub(r"(?<=\.)\d+\b", "N", path) for path in paths} == set(case.packed.split())
    assert all(
        f"{case.path}.{layer}.{dense}.weight" in checkpoint.dense
        for layer in range(layers(case))
        for dense in case.dense.split()
    )
    assert all(torch.equal(checkpoint.dense_tensor(key), before[key]) for key in checkpoint.dense)
    assert sum("bias" in key for key in checkpoint.dense) == sum("bias" in key for key in before)
    rebuilt = dict(checkpoint.weights())
    assert rebuilt.keys() == before.keys()
    for key in before.keys() - checkpoint.dense.keys():
        assert 0.2 < float((rebuilt[key] - before[key]).norm() / before[key].norm()) < 0.4

    model = load(target)
    assert len(list(seed_linears(model))) == len(checkpoint.packed)
    assert sum(isinstance(module, SeedExperts) for module in model.modules()) == layers(case) * case.experts
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == bool(getattr(model.config, "tie_word_embeddings", False))
    reference = load(made_dense(target, tmp_path / "dense"))
    assert_same(logits(model), logits(reference), exact=not case.experts)

    model.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert again.packed == checkpoint.packed
    assert again.files.entries.keys() == checkpoint.files.entries.keys()
    assert all(torch.equal(again.files.read(key), checkpoint.files.read(key)) for key in again.files.entries)
    if name in EXPERTS_CASES:
        assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", EXPERTS_CASES)
def test_experts_stay_packed_and_expand_to_what_they_were(name, folder, tmp_path):
    model = load(packed(folder, name))
    state = model.state_dict().values()
    assert not any(tensor.dim() > 2 for tensor in state)
    in_files = Checkpoint.open(packed(folder, name)).packed.values()
    assert sum(t.nbytes for t in state if t.dtype == torch.int32) == sum(info.nbytes for info in in_files)
    before = logits(model)
    model.dequantize()
    assert not list(seed_linears(model))
    assert_same(logits(model), before, exact=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("name", EXPERTS_CASES)
def test_experts_are_compressed_while_they_load(name, folder, tmp_path):
    model = load(original(folder, name), quantization_config=seedlm.SeedLMConfig(format=SMALL))
    assert_same(logits(model), logits(load(packed(folder, name))), exact=False)
    model.save_pretrained(tmp_path)
    Checkpoint.open(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_one_layer_of_experts_may_stay_dense(folder, tmp_path):
    target = packed(folder, "mixtral", exclude=["*.0.block_sparse_moe.*"])
    model = load(target)
    assert [name for name, m in model.named_modules() if isinstance(m, SeedExperts)] == ["model.layers.1.mlp.experts"]
    assert_same(logits(model), logits(load(made_dense(target, tmp_path / "dense"))), exact=False)


def test_the_base_model_finds_its_experts_in_the_same_folder(folder, tmp_path):
    base = AutoModel.from_pretrained(packed(folder, "mixtral"))
    model = load(packed(folder, "mixtral"))
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, base(IDS).last_hidden_state)


def test_gradients_flow_through_packed_experts(folder):
    model = load(packed(folder, "mixtral"))
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    found = embedded.grad.clone()
    embedded.grad = None
    model.dequantize()(inputs_embeds=embedded).logits.square().sum().backward()
    torch.testing.assert_close(found, embedded.grad, rtol=1e-4, atol=1e-6)


W1, STACKED = "model.layers.1.block_sparse_moe.experts.2.w1.weight", "model.layers.1.mlp.experts.down_proj.2.weight"
BIAS = "_exponent_bias"


def rewritten(source, folder, tensors, table=None):
    """A packed folder with other tensors, and another description of them, without digests."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    strings = Checkpoint.open(source).files.metadata[source / "model.safetensors"]
    table = {key: value for key, value in (table or json.loads(strings["seedlm"])).items() if key != "sha256"}
    save_file(tensors, folder / "model.safetensors", metadata={**strings, "seedlm": json.dumps(table)})
    return folder


def stacks(up, down, hidden=32, model_type="any"):
    """The transposedness of two stacks, by their shapes."""
    shapes = {"h.0.experts.gate_up_proj": up, "h.0.experts.down_proj": down}
    tensors = {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}
    found = [stack_of(name, tensors, {"hidden_size": hidden, "model_type": model_type}) for name in tensors]
    return [stack.transposed for stack in found]


def test_rows_of_a_stack_are_told_by_the_hidden_size_or_the_architecture():
    assert stacks((3, 88, 32), (3, 32, 44)) == [False, False]
    assert stacks((3, 32, 64), (3, 32, 32)) == [True, True]  # gpt-oss: down_proj alone does not tell
    assert stacks((3, 32, 32), (3, 16, 32), model_type="llama4_text") == [True, True]
    assert stacks((3, 32, 32), (3, 32, 16), model_type="qwen3_5_moe") == [False, False]
    for shapes in [((3, 32, 32), (3, 32, 16)), ((3, 88, 33), (3, 33, 44))]:
        with pytest.raises(SourceError, match=r"gate_up_proj: cannot tell rows from columns .* --exclude"):
            stacks(*shapes)


def test_a_layer_may_be_left_on_the_disk(folder, tmp_path):
    pytest.importorskip("accelerate")
    model = load(packed(folder, "mixtral"))
    where = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    options = {"device_map": {**where, "model.layers.1": "disk"}, "offload_folder": tmp_path / "off", "offload_buffers": True}
    assert torch.equal(logits(load(packed(folder, "mixtral"), **options)), logits(model))
    tensors = load_file(packed(folder, "mixtral") / "model.safetensors")
    tensors[W1][3] = 0
    broken = rewritten(packed(folder, "mixtral"), tmp_path / "broken", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*w1\.2: .* seed 0, the first at row 3"):
        load(broken, **options)


@pytest.mark.parametrize("exclude", ["*.experts.1.w1", "*.0.*.experts.2.*"])
def test_experts_that_are_not_treated_alike_are_refused(folder, exclude):
    with pytest.raises(SourceError, match=r"experts\.\d\.w\d\.weight: stays dense \(excluded\) while .* must be treated alike"):
        packed(folder, "mixtral", exclude=[exclude])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("mixtral", lambda t, m: t[W1][3].zero_(), r"experts\.packed\.w1\.2: .* seed 0, the first at row 3"),
        ("mixtral", lambda t, m: t.pop(W1), rf"{W1} is missing, it holds the words"),
        ("mixtral", lambda t, m: [t.pop(W1 + end) for end in ("", BIAS)], rf"{W1} is missing, it holds the words"),
        (
            "mixtral",
            lambda t, m: [t.pop(W1 + end) for end in ("", BIAS)] + [m["tensors"].pop(W1.removesuffix(".weight"))],
            "has 3 experts, but the codes of w1 for expert 2 are missing",
        ),
        (
            "mixtral",
            lambda t, m: [t.update({W1.replace(".2.", ".3.") + end: t[W1 + end].clone()}) for end in ("", BIAS)],
            r"experts\.3\.w1\.weight looks like part of a compressed weight that no metadata describes",
        ),
        (
            "mixtral",
            lambda t, m: [
                (t.pop(n), m["tensors"].pop(n.partition(".weight")[0], 0)) for n in list(t) if ".1.b" in n and ".w1." in n
            ],
            "not all that MixtralExperts.gate_up_proj is joined from",
        ),
        ("gpt_oss", lambda t, m: t.update({STACKED: t[STACKED][:, 1:].contiguous()}), rf"{STACKED} must be .*got .*\[32, 4\]"),
        ("gpt_oss", lambda t, m: m.pop("stacks"), "no linear layer and no experts of that name; compressed with --exclude"),
        ("gpt_oss", lambda t, m: m["stacks"][STACKED[:-9]].update(shape=[3, 44, 31]), r"must be \[31, 44\].* got \[32, 44\]"),
    ],
    ids=["seed", "words", "tensors", "expert", "stranger", "part", "width", "nameless", "shape"],
)
def test_experts_that_are_not_whole_are_refused(name, damage, message, folder, tmp_path):
    source = packed(folder, name)
    tensors = load_file(source / "model.safetensors")
    table = json.loads(Checkpoint.open(source).files.metadata[source / "model.safetensors"]["seedlm"])
    damage(tensors, table)
    with pytest.raises(CheckpointError, match=message):
        load(rewritten(source, tmp_path, tensors, table))


STACK = STACKED.removesuffix(".2.weight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t, m: [m["tensors"].pop(f"{STACK}.2"), *(t.pop(STACKED + end) for end in ("", BIAS))],
            rf"{STACK}\.2 is missing, a matrix of the stack {STACK}",
        ),
        (lambda t, m: t.update({STACK: torch.zeros(3, 44, 32)}), f"has {STACK} twice, as a tensor and as codes"),
        (lambda t, m: m["stacks"][STACK].update(shape=[3, 44]), rf"{STACK} has the impossible shape \[3, 44\]"),
        (lambda t, m: m["stacks"][STACK].update(shape=[1 << 20, 44, 32]), "must have at most 65536 matrices, got 1048576"),
        (lambda t, m: m["stacks"][STACK].update(transposed=1), f"the stack {STACK} must have shape and transposed"),
        (lambda t, m: m["stacks"].update(nix={"shape": [1, 2, 3], "transposed": False}), "stack nix, but none of its matrices"),
        (lambda t, m: m.update(stacks=[]), "stacks and sha256 must map names"),
    ],
    ids=["missing", "twice", "dims", "size", "flag", "empty", "list"],
)
def test_a_wrong_stack_does_not_open(damage, message, folder, tmp_path):
    source = packed(folder, "gpt_oss")
    tensors = load_file(source / "model.safetensors")
    table = json.loads(Checkpoint.open(source).files.metadata[source / "model.safetensors"]["seedlm"])
    damage(tensors, table)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(rewritten(source, tmp_path, tensors, table))
