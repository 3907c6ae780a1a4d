"""A GGUF file as a source: llama.cpp's container, whose blocks are expanded a row range at a time.

Blocks are expanded by gguf-py; config and tokenizer come from transformers' reading of the file's metadata. Only
architectures whose conversion is a renaming, plus the row order of Llama's q and k, are read here (`_ARCHITECTURES`):
others permute, split or offset tensors in ways of their own, and are refused with the way out. So is a tensor that is not
in the table, such as the rotary factors of Llama 3.1, which the config that transformers derives would leave out.

Expanded blocks are float32, which is what transformers expands them to; F32, F16 and BF16 tensors keep their dtype.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedlm.errors import SourceError
from seedlm.storage.gguf_check import check_decoder, read_gguf_header
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.untrusted import opened

_ARCHITECTURES: Final = frozenset({"llama", "qwen2", "qwen3"})
_TOKENIZERS: Final = {"llama": "PreTrainedTokenizerFast", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
"""Model type -> what AutoTokenizer would take, had it parsed the whole metadata to learn the type: 2 s for 49,152 tokens."""
_PLAIN: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_CHUNK_BYTES: Final = 1 << 24
_MODULES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of a dense decoder's tensors, and those of transformers; in a layer after ``blk.N.``."""


class GGUFSource:
    """One GGUF file. Raises SourceError if gguf is not installed, or for an architecture or tensor that is not known here."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise SourceError(f"{path}: reading a GGUF file needs the gguf package: pip install 'seedlm[gguf]'") from None
        header = read_gguf_header(path, gguf.GGML_QUANT_SIZES)
        try:
            reader = gguf.GGUFReader(path)
        except Exception as reason:  # whatever numpy or the enums raise on a damaged file
            raise SourceError(f"{path}: not a readable GGUF file ({str(reason) or type(reason).__name__})") from reason
        self.path = path
        self.nbytes = path.stat().st_size
        architecture = _field(reader, "general.architecture", path)
        if architecture not in _ARCHITECTURES:
            raise SourceError(
                f"{path}: GGUF files of architecture {architecture!r} are not read here, only "
                f"{', '.join(sorted(_ARCHITECTURES))}; let transformers convert it once: from_pretrained(folder, "
                f"gguf_file={path.name!r}, quantization_config=GgufConfig(dequantize=True)), then save_pretrained"
            )
        check_decoder(header)
        heads = {}
        if architecture == "llama":
            query = int(_field(reader, "llama.attention.head_count", path))
            heads = {"q_proj": query, "k_proj": int(_field(reader, "llama.attention.head_count_kv", path, query))}
        self._gguf, self._tensors, self._heads = gguf, {}, heads
        self.tensors: dict[str, TensorInfo] = {}
        for tensor in reader.tensors:
            name = _model_name(tensor.name, path)
            self._tensors[name] = tensor
            dtype = _PLAIN.get(tensor.tensor_type.name, "F32")
            self.tensors[name] = TensorInfo(dtype, tuple(int(n) for n in reversed(tensor.shape)))
        self.config = self._config()
        with opened(path, SourceError) as file:
            head = file.read(int(reader.data_offset))
        self.fingerprint: dict[str, Any] = {
            path.name: hashlib.sha256(head).hexdigest(),
            "bytes": self.nbytes,
            "config.json": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
        }

    def rows(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        tensor, info = self._tensors[name], self.tensors[name]
        data = tensor.data[self._row_order(name)[start:stop]]
        kind = tensor.tensor_type
        if kind.name == "BF16":  # gguf-py hands bfloat16 out as bytes
            return torch.from_numpy(data.copy()).view(torch.bfloat16)
        values = torch.from_numpy(data.copy() if kind.name in _PLAIN else self._gguf.dequantize(data, kind))
        return values.view(-1, *info.shape[1:])

    def chunks(self, name: str) -> Iterator[bytes]:
        info = self.tensors[name]
        step = max(1, _CHUNK_BYTES // max(1, info.nbytes // info.shape[0]))
        for start in range(0, info.shape[0], step):
            yield self.rows(name, start, min(start + step, info.shape[0])).view(torch.uint8).numpy().tobytes()

    def copy_side_files(self, folder: Path) -> None:
        import transformers
        from transformers import GenerationConfig

        tokenizer = getattr(transformers, _TOKENIZERS.get(self.config["model_type"], "AutoTokenizer"))
        try:
            tokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).save_pretrained(folder)
        except Exception as reason:  # whatever a damaged vocabulary led to
            raise SourceError(f"{self.path}: its tokenizer cannot be built ({_one_line(reason)})") from reason
        tokens = {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in self.config}
        GenerationConfig(**tokens).save_pretrained(folder)

    def _row_order(self, name: str) -> Any:
        """For each row of the model's tensor, which row of the file it is.

        llama.cpp's rotary embedding pairs neighbours (2i, 2i + 1) of a head, transformers pairs (i, i + half): the
        file's q and k rows are in the first order.
        """
        import numpy as np

        rows = np.arange(self.tensors[name].shape[0])
        heads = self._heads.get(name.split(".")[-2]) if "." in name else None
        return rows if heads is None else rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _config(self) -> dict[str, Any]:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as reason:  # whatever damaged metadata led to
            raise SourceError(f"{self.path}: no configuration can be made of its metadata ({_one_line(reason)})") from reason
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        data: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
        data.pop("quantization_config", None)
        data.pop("_name_or_path", None)
        plain = {info.dtype for info in self.tensors.values() if len(info.shape) > 1}
        data["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(plain.pop() if len(plain) == 1 else "F32", "float32")
        return data


def _field(reader: Any, key: str, path: Path, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise SourceError(f"{path}: has no {key} in its metadata")
        return default
    return field.contents()


def _one_line(reason: BaseException) -> str:
    return " ".join(str(reason).split())[:300] or type(reason).__name__


def _model_name(name: str, path: Path) -> str:
    """The name in transformers of a GGUF tensor: ``blk.3.ffn_up.weight`` -> ``model.layers.3.mlp.up_proj.weight``."""
    *module, part = name.split(".")
    prefix = ""
    if module[:1] == ["blk"] and len(module) == 3 and module[1].isdigit():
        prefix, module = f"model.layers.{module[1]}.", module[2:]
    known = _MODULES.get(module[0]) if len(module) == 1 else None
    if known is None or part not in ("weight", "bias"):
        raise SourceError(f"{path}: holds a tensor {name!r} that is not part of a dense decoder; convert it with transformers")
    return f"{prefix}{known}.{part}"
