"""Which tensors of a model are compressed, decided from names, shapes and dtypes alone: no model is built.

The rule, for a tensor named ``M.weight`` of module M:

1. Only matrices [out_features, in_features] that belong to a linear layer can be compressed. Vectors, stacks of matrices,
   other parameters and embeddings cannot, whatever the patterns say.
2. By default those inside a numbered layer (``model.layers.3.mlp.up_proj``) are, except routers, vision and audio towers,
   heads, and what would not become smaller.
3. ``include`` patterns add modules that rule 2 leaves out (``lm_head``); ``exclude`` patterns take modules away, and win.

Patterns are shell globs over the whole module name, in which ``*`` also matches dots. A pattern that matches no module of the
model is an error: it is nearly always a typing mistake.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from seedlm.errors import SourceError
from seedlm.format import Format
from seedlm.tensorfile import TensorInfo

_EMBEDDINGS: Final = ("*embed*", "*wte", "*wpe", "*word_embeddings*", "*relative_attention_bias")
_LEFT_DENSE: Final = {
    "a router": ("*router*", "*.gate", "*.shared_expert_gate"),
    "part of a vision or audio tower": ("*vision*", "*visual*", "*audio*", "*multi_modal_projector*", "*mm_projector*"),
    "an output head": ("*lm_head*", "*embed_out", "output"),
}
_ENCODABLE: Final = frozenset({"F32", "F16", "BF16"})
_TRANSPOSED_MODELS: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Architectures whose linear layers are transformers' Conv1D, which stores [in_features, out_features]."""


def select(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    format: Format,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Split a model's tensors into what is compressed and what is not.

    returns   modules to compress, in the tensors' order, and for every other tensor the reason why not
    Raises SourceError for a pattern without a match, a float64 weight, a tied head that was included, an architecture that
    stores its matrices transposed, and if nothing is left to compress.
    """
    include, exclude = tuple(include), tuple(exclude)
    _refuse_transposed(tensors, config)
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(module, pattern) for module in modules):
                tied = "; its head is tied to the embeddings and has no weight of its own" if "head" in pattern else ""
                raise SourceError(f"no module with a weight matches --{option} {pattern!r}{tied}")
    chosen, left = [], {}
    for name, info in tensors.items():
        reason = _why_not(name, info, format, include, exclude)
        if reason is not None:
            left[name] = reason
        elif info.dtype not in _ENCODABLE:
            raise SourceError(f"{name}: a weight must be F32, F16 or BF16, got {info}; convert the model, or --exclude it")
        elif "lm_head" in name and config.get("tie_word_embeddings") is True:
            raise SourceError(f"{name}: is tied to the embeddings (tie_word_embeddings), which stay dense; do not --include it")
        else:
            chosen.append(name.removesuffix(".weight"))
    if not chosen:
        raise SourceError(
            f"nothing to compress: none of the {len(tensors)} tensors is the weight of a linear layer to be packed"
        )
    return chosen, left


def dense_linears(tensors: Mapping[str, TensorInfo], left: Mapping[str, str]) -> list[str]:
    """Modules that may be linear layers and are not compressed, for ``modules_to_not_convert``.

    A tied head has no tensor but is a linear layer all the same, so ``lm_head`` is listed unless it is compressed.
    """
    names = {name.removesuffix(".weight") for name in left if _cannot(name, tensors[name]) is None}
    if "lm_head.weight" not in tensors:
        names.add("lm_head")
    return sorted(names)


def _why_not(name: str, info: TensorInfo, format: Format, include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """Why a tensor stays as it is; None if it is to be compressed."""
    cannot = _cannot(name, info)
    if cannot is not None:
        return cannot
    module = name.removesuffix(".weight")
    if any(fnmatchcase(module, pattern) for pattern in exclude):
        return "excluded"
    if any(fnmatchcase(module, pattern) for pattern in include):
        return None
    if not gets_smaller(format, *info.shape):
        return "no smaller as codes"
    return left_by_default(module)


def gets_smaller(format: Format, out_features: int, in_features: int) -> bool:
    """Whether a weight takes fewer bits as codes than as 16-bit numbers; tails of short rows may eat up the gain."""
    return format.stored_bits(out_features, in_features) < 16 * out_features * in_features


def left_by_default(module: str) -> str | None:
    """Rule 2: why a linear layer of this name stays as it is unless it is included; None if it is compressed."""
    for reason, patterns in _LEFT_DENSE.items():
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return reason
    if not any(part.isdigit() for part in module.split(".")):
        return "not in a numbered layer"
    return None


def _cannot(name: str, info: TensorInfo) -> str | None:
    """Why no pattern could make a tensor compressed; None if one could."""
    if len(info.shape) == 3 and "expert" in name:
        return "stacked experts"  # no codes for them yet: they need a module of their own on loading
    if not name.endswith(".weight"):
        return "not a weight"
    if len(info.shape) != 2 or 0 in info.shape or not re.match(r"B?F\d", info.dtype):
        return "not a matrix of floats"
    if any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in _EMBEDDINGS):
        return "an embedding"
    return None


def _refuse_transposed(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    kind = next((part["model_type"] for part in parts if part.get("model_type") in _TRANSPOSED_MODELS), None)
    for name, info in tensors.items():
        # The fused projection shows the orientation: [n, 3n] is Conv1D's, [3n, n] a linear layer's.
        if name.endswith("c_attn.weight") and len(info.shape) == 2 and info.shape[1] == 3 * info.shape[0]:
            kind = kind or "unknown, with Conv1D layers"
    if kind is not None:
        raise SourceError(
            f"models of type {kind!r} store their matrices as [in_features, out_features] (Conv1D); only linear layers, "
            f"[out_features, in_features], can be compressed"
        )
