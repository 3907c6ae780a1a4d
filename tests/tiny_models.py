"""Tiny models and the bytes around them, shared by the tests of sources, checkpoints and runs."""

import json
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


def tiny_gguf(path: Path, architecture="llama", **extra) -> None:
    """A random GGUF file of one layer, in seven types; `extra` tensors by name, as (shape, type)."""
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
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(65 + n) for n in range(30)), "DE", "FG"])
    writer.add_token_merges(["D E", "F G"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kinds = gguf.GGMLQuantizationType
    shapes = {
        "token_embd.weight": ((32, 64), kinds.Q8_0),
        "output_norm.weight": ((64,), kinds.F32),
        "blk.0.attn_norm.weight": ((64,), kinds.F32),
        "blk.0.ffn_norm.weight": ((64,), kinds.F32),
        "blk.0.attn_q.weight": ((64, 64), kinds.Q4_1),
        "blk.0.attn_k.weight": ((32, 64), kinds.Q4_1),
        "blk.0.attn_v.weight": ((32, 64), kinds.F16),
        "blk.0.attn_output.weight": ((64, 64), kinds.BF16),
        "blk.0.ffn_gate.weight": ((96, 64), kinds.Q8_0),
        "blk.0.ffn_up.weight": ((96, 64), kinds.Q4_1),
        "blk.0.ffn_down.weight": ((64, 96), kinds.Q4_1),
        **extra,
    }
    for name, (shape, kind) in shapes.items():
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
