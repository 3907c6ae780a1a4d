"""Tiny models and the bytes around them, shared by the tests of sources, checkpoints and runs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

SMALL = "block-k8-c8-p3-q4-e4"
"""255 seeds: a search that takes no time."""

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


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """A source folder with just these tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


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
