"""A GGUF file as a source: llama.cpp's container, whose blocks are dequantized a row range at a time.

The header is read here (`gguf_check`), and blocks are dequantized by gguf-py; config and tokenizer come from transformers'
reading of the file's metadata, and what that passes over is added (`gguf_rope`, `_CARRIED`). Architectures are read here whose
conversion is a renaming, the row order of Llama's q and k, the 1 that Gemma's norms leave out, or a stack of experts: others,
and tensors that are not in the tables, are refused. A model in several files (``split.count``) is read from all of them.

Dequantized blocks are float32, as transformers makes them; F32, F16 and BF16 tensors keep their dtype.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from seedlm.errors import SourceError
from seedlm.storage.gguf_check import (
    ROPE_FREQS,
    GGUFHeader,
    GGUFTensor,
    check_decoder,
    gguf_parts,
    gguf_sizes,
    read_gguf_header,
)
from seedlm.storage.gguf_rope import rope_parameters
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.untrusted import opened

_GEMMA: Final = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ARCHITECTURES: Final[dict[str, dict[str, str]]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "nemotron": {},
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
"""Architecture -> the names of its tensors that differ from `_MODULES`."""
_LESS_ONE: Final = frozenset({"gemma2", "gemma3", "nemotron"})
"""Architectures whose norms multiply by 1 + weight in transformers, and by the sum in GGUF files."""
_EXPERTS: Final = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_CARRIED: Final = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
"""Metadata that transformers passes over for some architectures -> the setting that it is."""
_UNSUPPORTED: Final = ("attention.scale", "logit_scale", "embedding_scale", "residual_scale", "attention.clamp_kqv")
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


class UnreadArchitectureError(SourceError):
    """A GGUF file is of an architecture that is not read here."""


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in a file: of F32 and F16 its numbers, of every other type its bytes, rows first.

    kind    of gguf's `GGMLQuantizationType`
    shape   of the tensor
    """

    kind: Any
    shape: tuple[int, ...]
    data: "np.ndarray[Any, Any]"

    @classmethod
    def of(cls, content: "np.ndarray[Any, Any]", found: GGUFTensor, gguf: Any) -> "_Stored":
        """The view of a file's bytes that a tensor of its header is. Nothing is read."""
        kind = gguf.GGMLQuantizationType(found.kind)
        data = content[found.start : found.start + found.nbytes]
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        return cls(kind, found.shape, (data if dtype is None else data.view(dtype)).reshape(*found.shape[:-1], -1))

    def dequantized(self, gguf: Any, data: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Some rows of `data` as numbers, in memory of their own."""
        return data.copy() if self.kind.name in _PLAIN else gguf.dequantize(data, self.kind)


class GGUFSource:
    """One GGUF file, or a model in several.

    Raises SourceError if gguf is not installed, for an architecture, a tensor or metadata that is not known here, and for files
    of a model that are not there.
    """

    def __init__(self, path: Path) -> None:
        sizes = gguf_sizes(path)
        import gguf

        self._gguf = gguf
        header = read_gguf_header(path, sizes)
        architecture = header.fields.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise UnreadArchitectureError(
                f"{path}: GGUF files of architecture {architecture!r:.80} are not read here, only "
                f"{', '.join(sorted(_ARCHITECTURES))}; start from the original model's safetensors"
            )
        paths = gguf_parts(path, header.size("split.count") if header.fields.get("split.count") else 1)
        headers = [header if part == path else read_gguf_header(part, sizes) for part in paths]
        check_decoder(headers)
        self.path = paths[0]
        self.notes: list[str] = []
        self.nbytes = sum(part.stat().st_size for part in paths)
        licence = headers[0].fields.get("general.license")
        self.about: dict[str, Any] = {"license": licence} if isinstance(licence, str) and _LICENSE.fullmatch(licence) else {}
        self._architecture, self._heads = architecture, {}
        if architecture == "llama":
            query = headers[0].size("llama.attention.head_count")
            self._heads = {"q_proj": query, "k_proj": headers[0].size("llama.attention.head_count_kv", query)}
        self._tensors: dict[str, tuple[_Stored, int | None]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        freqs = None
        for each in headers:
            self._check_kinds(each)
            content = np.memmap(each.path, mode="r")
            for name, found in each.tensors.items():
                stored = _Stored.of(content, found, gguf)
                if name == ROPE_FREQS:
                    freqs = [float(value) for value in stored.dequantized(gguf, stored.data)]
                else:
                    self._add(name, stored)
        self.config = self._config(headers[0], freqs)
        self.fingerprint: dict[str, Any] = {
            **{each.path.name: _digest(each.path, each.start) for each in headers},
            "bytes": self.nbytes,
            "config.json": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
        }

    def _check_kinds(self, header: GGUFHeader) -> None:
        """Raise SourceError for a tensor of a type that gguf-py makes no numbers of, such as integers."""
        for number, name in {tensor.kind: name for name, tensor in header.tensors.items()}.items():
            kind = self._gguf.GGMLQuantizationType(number)
            size = self._gguf.GGML_QUANT_SIZES[kind][1]
            try:
                if kind.name not in _PLAIN:
                    self._gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            except NotImplementedError:
                raise SourceError(f"{header.path}: {name} is of type {kind.name}, which is not dequantized here") from None

    def _add(self, name: str, stored: "_Stored") -> None:
        """List a tensor of the file; a stack of experts as the matrices that the original has."""
        dtype = _PLAIN.get(stored.kind.name, "F32")
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in _EXPERTS and layer.startswith("blk.") and len(stored.shape) == 3 and self._architecture == "qwen3moe":
            for expert in range(stored.shape[0]):
                matrix = f"model.layers.{layer[4:]}.mlp.experts.{expert}.{_EXPERTS[kind]}.weight"
                self._tensors[matrix], self.tensors[matrix] = (stored, expert), TensorInfo(dtype, stored.shape[1:])
            return
        name = _model_name(name, self._architecture, self.path)
        self._tensors[name], self.tensors[name] = (stored, None), TensorInfo(dtype, stored.shape)

    def rows(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        (stored, expert), info = self._tensors[name], self.tensors[name]
        matrix = stored.data if expert is None else stored.data[expert]
        data = matrix[self._row_order(name)[start:stop]]
        if stored.kind.name == "BF16":
            return torch.from_numpy(data.copy()).view(torch.bfloat16)
        values = torch.from_numpy(stored.dequantized(self._gguf, data))
        if self._architecture in _LESS_ONE and "norm.weight" in name:
            values = values - 1
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
        rows = np.arange(self.tensors[name].shape[0])
        heads = self._heads.get(name.split(".")[-2]) if "." in name else None
        return rows if heads is None else rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _config(self, header: GGUFHeader, freqs: list[float] | None) -> dict[str, Any]:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except Exception as reason:  # whatever damaged metadata led to
            raise SourceError(f"{self.path}: no configuration can be made of its metadata ({_one_line(reason)})") from reason
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        data: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
        for key in ("quantization_config", "_name_or_path", "transformers_version"):
            data.pop(key, None)
        prefix = f"{self._architecture}."
        said = {key.removeprefix(prefix): value for key, value in header.fields.items() if key.startswith(prefix)}
        for key, setting in _CARRIED.items():
            if key in said and hasattr(config, setting):
                data[setting] = int(said[key])
        for key in _UNSUPPORTED:
            if float(said.get(key, 0.0)) not in (0.0, 1.0):
                raise SourceError(
                    f"{self.path}: its metadata has {key} {said[key]}, which transformers does not read from GGUF files; start "
                    f"from the original model's safetensors"
                )
        data["tie_word_embeddings"] = "lm_head.weight" not in self.tensors
        self._set_rope(data, config.to_dict().get("rope_parameters") or {}, said, freqs)
        plain = {info.dtype for info in self.tensors.values() if len(info.shape) > 1}
        data["dtype"] = {"F16": "float16", "BF16": "bfloat16"}.get(plain.pop() if len(plain) == 1 else "F32", "float32")
        return data

    def _set_rope(
        self, data: dict[str, Any], parameters: dict[str, Any], said: dict[str, Any], freqs: list[float] | None
    ) -> None:
        """Put what the file says of rotary embeddings into the config. A model with several kinds of layers scales the full."""
        scaling = {key.removeprefix("rope.scaling."): value for key, value in said.items() if key.startswith("rope.scaling.")}
        if "rope.scale_linear" in said:
            scaling["scale_linear"] = said["rope.scale_linear"]
        several = "full_attention" in parameters
        base = parameters["full_attention"] if several else parameters
        theta = float(said.get("rope.freq_base", base.get("rope_theta", 10000.0)))
        found = rope_parameters(scaling, freqs, theta, int(data.get("max_position_embeddings", 0)), f"{self.path}")
        if found:
            changed = {**base, "rope_theta": theta, **found}
            data["rope_parameters"] = {**parameters, "full_attention": changed} if several else changed


_LICENSE: Final = re.compile(r"[\w.+-]{1,80}", re.ASCII)
"""An identifier as the Hub has them, such as apache-2.0."""


def _digest(path: Path, nbytes: int) -> str:
    with opened(path, SourceError) as file:
        return hashlib.sha256(file.read(nbytes)).hexdigest()


def _one_line(reason: BaseException) -> str:
    return " ".join(str(reason).split())[:300] or type(reason).__name__


def _model_name(name: str, architecture: str, path: Path) -> str:
    """The name in transformers of a GGUF tensor: ``blk.3.ffn_up.weight`` -> ``model.layers.3.mlp.up_proj.weight``."""
    *module, part = name.split(".")
    prefix = ""
    if module[:1] == ["blk"] and len(module) == 3 and module[1].isdigit():
        prefix, module = f"model.layers.{module[1]}.", module[2:]
    known = {**_MODULES, **_ARCHITECTURES[architecture]}.get(module[0]) if len(module) == 1 else None
    if known is None or part not in ("weight", "bias"):
        raise SourceError(
            f"{path}: holds a tensor {name!r} that is not known for {architecture}; start from the original model's safetensors"
        )
    return f"{prefix}{known}.{part}"
