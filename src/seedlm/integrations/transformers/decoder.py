"""One token by `modeling.fused` and `inference.attention`, where transformers' own forward would launch every small step.

For models whose decoder layers are Llama's (`reason_unfused`). `step` is the whole forward of one token over a static cache.
"""

import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from seedlm.inference.attention import attend
from seedlm.modeling.embedding import SeedEmbedding, TiedLinear
from seedlm.modeling.fused import gated_linear, normed_linears
from seedlm.modeling.linear import SeedLinear

CACHE: Final = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls a cache, among arguments and in outputs."""

_PREFIXES: Final = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
_LINEAR: Final = (nn.Linear, SeedLinear)
_ROPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long a text is."""
_ATTENTIONS: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def reason_unfused(model: nn.Module) -> str | None:
    """Why no token of a model goes through `step`; None if tokens do."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _PREFIXES:
        return f"model type {kind} is none of {', '.join(_PREFIXES)}"
    return _reason_modules(model, kind) or _reason_config(model, config)


def _reason_modules(model: nn.Module, kind: str) -> str | None:
    """The part of the reason that lies in the model's modules."""
    known = _classes(kind)
    placed = set()
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if type(module) not in known.get("layer" if leaf.isdecimal() else leaf, ()):
            return f"{name or 'the model'} is a {type(module).__name__}, which is not known there"
        if "forward" in vars(module) or any(_hooks(module)):
            return f"{name or 'the model'} has a hook or a forward of its own"
        if module.training:
            return f"{name or 'the model'} is in training mode"
        if any(type(each) is not nn.Parameter for each in module._parameters.values() if each is not None):
            return f"{name} has parameters of a class of their own"
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            placed.add((str(weight.dtype), str(weight.device)))
    if _has_any_global_hook():
        return "there are hooks for all modules"
    return None if len(placed) == 1 else f"its weights have several dtypes or devices: {sorted(placed)}"


def _classes(kind: str) -> dict[str, tuple[type, ...]]:
    """The classes of modules, by the last part of their names."""
    home = sys.modules.get(f"transformers.models.{kind}.modeling_{kind}")

    def own(name: str) -> tuple[type, ...]:
        found = getattr(home, _PREFIXES[kind] + name, None)
        return () if found is None else (found,)

    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), own("RMSNorm"))
    products = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {
        "": own("ForCausalLM"),
        "model": own("Model"),
        "embed_tokens": (nn.Embedding, SeedEmbedding),
        "rotary_emb": own("RotaryEmbedding"),
        "layers": (nn.ModuleList,),
        "layer": own("DecoderLayer"),
        "self_attn": own("Attention"),
        "mlp": own("MLP"),
        "act_fn": (nn.SiLU, type(ACT2FN["silu"])),
        "lm_head": (*_LINEAR, TiedLinear),
        **norms,
        **dict.fromkeys(products, _LINEAR),
    }


def _hooks(module: nn.Module) -> Iterator[object]:
    """The hooks of a module but for those by which transformers collects hidden states, which do nothing unless it is asked."""
    yield from module._forward_pre_hooks.values()
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
            yield hook


def _reason_config(model: Any, config: Any) -> str | None:
    """The part of the reason that lies in the configuration and in sizes."""
    inner = model.model
    attention, rotary = inner.layers[0].self_attn, inner.rotary_emb
    if config.num_hidden_layers != len(inner.layers):
        return f"it has {len(inner.layers)} layers, of which {config.num_hidden_layers} are in use"
    if getattr(config, "sliding_window", None) is not None or {*(getattr(config, "layer_types", None) or ())} - {
        "full_attention"
    }:
        return "its attention has a sliding window"
    if rotary.rope_type not in _ROPES:
        return f"its rotary embedding is {rotary.rope_type}, and none of {', '.join(_ROPES)}"
    if 2 * rotary.inv_freq.numel() != attention.head_dim:
        return "its rotary embedding turns a part of each head"
    if attention.q_proj.out_features != config.num_attention_heads * attention.head_dim:
        return f"{attention.q_proj.out_features} outputs of q_proj are not {config.num_attention_heads} heads"
    if config._attn_implementation not in _ATTENTIONS:
        return f"its attention is {config._attn_implementation}"
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return "its configuration asks for other outputs than logits"
    return None


def _reason_no_cache(model: Any, cache: Any) -> str | None:
    """Why a model whose tokens go through `step` cannot do so over a cache; None if it can."""
    attention, weight = model.model.layers[0].self_attn, model.model.norm.weight
    if cache.offloading or len(cache.layers) != len(model.model.layers):
        return "the cache is offloaded, or another model's"
    for layer in cache.layers:
        if type(layer) is not StaticLayer or not isinstance(layer.cumulative_length, Tensor):
            return f"a layer of the cache is a {type(layer).__name__} that is not known there"
        if not layer.is_initialized:
            return "the cache is empty"
        shape = (1, attention.k_proj.out_features // attention.head_dim, layer.max_cache_len, attention.head_dim)
        tensors: Any = layer.keys, layer.values
        for each in tensors:
            if each.shape != shape or (each.dtype, each.device) != (weight.dtype, weight.device) or not each.is_contiguous():
                return f"the cache holds {each.dtype} {[*each.shape]} on {each.device}, not {weight.dtype} {[*shape]}"
    return None


def step(model: Any, token: Tensor, cache: Any, positions: Tensor | None = None) -> Tensor:
    """The forward of one token, for a model and a cache that fit; the cache is one longer afterwards.

    token       int64 [1, 1]
    positions   int64 [1, 1], of the rotary embedding; the length of the cache if None
    returns     logits [1, 1, vocabulary] of the model's dtype
    """
    inner, lengths = model.model, [layer.cumulative_length for layer in cache.layers]
    h, delta = inner.embed_tokens(token), None
    cos, sin = inner.rotary_emb(h, position_ids=lengths[0].view(1, 1) if positions is None else positions)
    for layer, store, length in zip(inner.layers, cache.layers, lengths, strict=True):
        attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        q, k, v = normed_linears(h, delta, norm.weight, norm.variance_epsilon, projections)
        read = attend(q, k, v, cos, sin, store.keys, store.values, length.view(1), attention.scaling)
        delta, norm = attention.o_proj(read), layer.post_attention_layernorm
        gate, up = normed_linears(h, delta, norm.weight, norm.variance_epsilon, [mlp.gate_proj, mlp.up_proj])
        delta = gated_linear(gate, up, mlp.down_proj)
    (logits,) = normed_linears(h, delta, inner.norm.weight, inner.norm.variance_epsilon, [model.lm_head])
    torch._foreach_add_(lengths, 1)
    return logits
