"""Tiny models and the bytes around them, shared by the tests of sources, checkpoints and runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from seedlm.compress.run import compress_checkpoint
from seedlm.storage.inspect import RunReport

SMALL = "block-k8-c8-p3-q4-e4"
"""255 seeds: a search that takes no time."""

STORIES = Path(__file__).parent / "data" / "stories260k"
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def tiny_model(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal language model of any architecture, with odd sizes, and biases and norms that are not trivial.

    changes   of the configuration; None takes a size away
    """
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(seed)
    sizes = {name: value for name, value in {**_SIZES, **changes}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.3)
    return model


def tiny_llama(folder: Path, *, dtype=torch.bfloat16, seed=0, shard="5GB", layers=2, **changes) -> LlamaForCausalLM:
    """A random Llama with odd sizes, saved to a folder."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


_GGUF_MLP = {"blk.0.ffn_gate.weight": (96, 64), "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96)}
_GGUF_QKV = {"blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (32, 64), "blk.0.attn_v.weight": (32, 64)}
_GGUF_NORMS = {"blk.0.attn_q_norm.weight": (16,), "blk.0.attn_k_norm.weight": (16,)}
_GGUF_SANDWICH = {"blk.0.post_attention_norm.weight": (64,), "blk.0.post_ffw_norm.weight": (64,)}
_GGUF_STACKS = {"gate": (3, 32, 64), "up": (3, 32, 64), "down": (3, 64, 32)}
_GGUF_PLAIN_MLP = {"blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96)}
_GGUF_NORM_BIASES = {f"{name}.bias": (64,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
GGUF_LAYERS = {
    "llama": {**_GGUF_QKV, **_GGUF_MLP},
    "qwen2": {**_GGUF_QKV, **_GGUF_MLP, "blk.0.attn_q.bias": (64,), "blk.0.attn_k.bias": (32,), "blk.0.attn_v.bias": (32,)},
    "qwen3": {**_GGUF_QKV, **_GGUF_MLP, **_GGUF_NORMS},
    "qwen3moe": {
        **_GGUF_QKV,
        **_GGUF_NORMS,
        "blk.0.ffn_gate_inp.weight": (3, 64),
        **{f"blk.0.ffn_{name}_exps.weight": shape for name, shape in _GGUF_STACKS.items()},
    },
    "gemma2": {**_GGUF_QKV, **_GGUF_MLP, **_GGUF_SANDWICH},
    "gemma3": {**_GGUF_QKV, **_GGUF_MLP, **_GGUF_SANDWICH, **_GGUF_NORMS},
    "nemotron": {**_GGUF_QKV, **_GGUF_PLAIN_MLP, **_GGUF_NORM_BIASES},
    "starcoder2": {
        **_GGUF_QKV,
        **_GGUF_PLAIN_MLP,
        **_GGUF_NORM_BIASES,
        **{f"blk.0.{name}.bias": (n,) for name, n in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64))},
        **{"blk.0.ffn_up.bias": (96,), "blk.0.ffn_down.bias": (64,)},
    },
    "phi3": {"blk.0.attn_qkv.weight": (128, 64), "blk.0.ffn_up.weight": (192, 64), "blk.0.ffn_down.weight": (64, 96)},
}
"""Of the architectures that are read: a layer's tensors but for those that all have."""


def tiny_gguf(path: Path, architecture="llama", *, metadata=None, leave_out=(), **extra) -> None:
    """A random GGUF file of one layer, in several types.

    metadata    entries of the architecture to add, by what follows its name
    leave_out   names of tensors
    extra       tensors by name, as (shape, type), or an array
    """
    gguf = pytest.importorskip("gguf")
    rng = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(32)
    if architecture in ("qwen3", "qwen3moe", "gemma2", "gemma3"):
        writer.add_key_length(16)
    if architecture == "qwen3moe":
        writer.add_expert_count(3)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(65 + n) for n in range(30)), "DE", "FG"])
    writer.add_token_merges(["D E", "F G"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if architecture == "phi3":  # whose default is 32000
        writer.add_pad_token_id(0)
    kinds = gguf.GGMLQuantizationType
    types = {"attn_v": kinds.F16, "attn_output": kinds.BF16, "ffn_gate": kinds.Q8_0, "token_embd": kinds.Q8_0}
    shapes = {
        "token_embd.weight": (32, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        **GGUF_LAYERS.get(architecture, GGUF_LAYERS["llama"]),
        "blk.0.attn_output.weight": (64, 64),
    }
    tensors = {
        name: (shape, kinds.F32 if len(shape) == 1 else types.get(name.split(".")[-2], kinds.Q4_1))
        for name, shape in shapes.items()
    }
    for name, given in {**tensors, **extra}.items():
        if name in leave_out:
            continue
        if not isinstance(given, tuple):
            writer.add_tensor(name, given)
            continue
        shape, kind = given
        values = torch.randn(shape, generator=rng).numpy()
        if kind == kinds.F32:
            writer.add_tensor(name, values)
        elif kind == kinds.F16:
            writer.add_tensor(name, values.astype("float16"))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """A source folder with just these tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def run(source: Path, out: Path, **options) -> RunReport:
    """Compress a model as fast as can be."""
    return compress_checkpoint(source, out, **{"format": SMALL, "backend": "torch", **options})


def told(stderr: str) -> list[str]:
    """The lines of stderr but for what a command begins with, and its progress."""
    from seedlm.progress import PHASES

    begun = "|".join([r".* weights in [\d,]+ tensors", *(label for label, _, _ in PHASES.values())])
    return [line for line in stderr.splitlines() if not re.match(f"seedlm: ({begun})", line)]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def split(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header and data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict | str, data: bytes) -> bytes:
    """The file of a header and data, however wrong they are."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data
