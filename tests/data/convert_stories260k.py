"""Turn karpathy's stories260K (llama2.c "version 0" files) into the Hugging Face folder that stands beside this script.

    python tests/data/convert_stories260k.py stories260K.bin tok512.bin tests/data/stories260k

The weights stay float32, bit for bit. Two things differ between the layouts: llama2.c rotates adjacent pairs of a head's
dimensions and transformers rotates its two halves, so the rows of q and k change places; and the file ends with two tables
of the rotation that neither needs.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors

LICENSE = """stories260K, weights and tokenizer: Copyright (c) Andrej Karpathy, MIT licence (karpathy/tinyllamas on Hugging
Face, revision 0bd21da7698eaf29a0d7de3992de8a46ef624add, folder stories260K). Converted by convert_stories260k.py; the
values are unchanged, the rows of the query and key projections are in transformers' order.
"""


def main(weights: Path, vocabulary: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors, config = read_weights(weights.read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    read_tokenizer(vocabulary.read_bytes(), config["vocab_size"]).save(str(out / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 1},
        "tokenizer_config.json": {**special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512},
    }
    for name, data in files.items():
        (out / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (out / "LICENSE").write_text(LICENSE, encoding="utf-8")


def read_weights(data: bytes) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors under transformers' names, and the config."""
    dim, hidden, layers, heads, kv_heads, vocab, max_seq = struct.unpack_from("<7i", data)
    values, position = np.frombuffer(data, "<f4", offset=28), 0
    head, kv_dim = dim // heads, dim // heads * kv_heads

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        size = int(np.prod(shape))
        tensor = torch.from_numpy(values[position : position + size].copy()).view(*shape)
        position += size
        return tensor

    def halves(rows: torch.Tensor) -> torch.Tensor:
        """Rows of each head from pairs (0, 1), (2, 3), ... to first elements, then second ones."""
        return rows.view(-1, head // 2, 2, dim).transpose(1, 2).reshape(-1, dim).contiguous()

    embedding = take(vocab, dim)
    parts = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    assert position + 2 * max_seq * head // 2 == len(values), "two rotation tables should be left"
    for name, stack in parts.items():
        for layer, tensor in enumerate(stack):
            turned = halves(tensor) if name in ("self_attn.q_proj", "self_attn.k_proj") else tensor.clone()
            tensors[f"model.layers.{layer}.{name}.weight"] = turned
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_seq,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    return tensors, config


def read_tokenizer(data: bytes, size: int) -> Tokenizer:
    """The same encoding as llama2.c: a space in front, then the best-scored merge of two neighbours until there is none.

    llama2.c merges whatever two neighbours spell a token, best score first and leftmost among equals. `tokenizers` wants the
    pairs listed, in order of preference: all ways to cut a token into two tokens.
    """
    tokens, position = [], 4
    for _ in range(size):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        tokens.append((data[position : position + length], score))
        position += length
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [text.decode("utf-8").replace(" ", "\u2581") for text, _ in tokens[len(names) :]]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = []
    for index in sorted(range(len(special) + 256, size), key=lambda index: -tokens[index][1]):
        name = names[index]
        cuts = [(name[:i], name[i:]) for i in range(1, len(name))]
        merges += [(a, b) for a, b in cuts if vocabulary.get(a, 0) >= 259 and vocabulary.get(b, 0) >= 259]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return tokenizer


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
