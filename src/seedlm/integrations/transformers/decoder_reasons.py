"""Why a model cannot decode by `decoder_steps`: its layers are not Llama's, someone looks on, or its device gains nothing.

What is known is listed, and everything else is a reason: classes of modules by the last part of their names, forwards and
functions of attention that come from where they should, configurations, dtypes, a cache that fits. Nothing here waits for a
device.
"""

import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations
from transformers.cache_utils import StaticLayer

from seedlm.errors import BackendError
from seedlm.inference import ops
from seedlm.modeling.embedding import SeedEmbedding, TiedLinear
from seedlm.modeling.linear import SeedLinear

DEVICES: tuple[str, ...] = ("cuda", "cpu")
"""Kinds of devices on which models decode this way."""
PACKED: tuple[str, ...] = ("cpu",)
"""Those of them where only models do whose layers' backend makes their input itself: else it takes as long as transformers."""

_PREFIXES: Final = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
_LINEAR: Final = (nn.Linear, SeedLinear)
_ROPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long a text is."""
_ATTENTIONS: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_DTYPES: Final = ("torch.float16", "torch.bfloat16", "torch.float32")
_FAILED: Final[list[tuple[torch.device, str]]] = []
"""Devices on which a capture failed, and why."""


def reason_unfused(model: nn.Module) -> str | None:
    """Why no token of a model goes through `decoder_steps.step`; None if tokens do."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _PREFIXES:
        return f"model type {kind} is none of {', '.join(_PREFIXES)}"
    return _reason_modules(model, kind) or _reason_config(model, config) or reason_now(config) or _reason_device(model)


def _reason_modules(model: nn.Module, kind: str) -> str | None:
    """The part of the reason that lies in the model's modules."""
    known = _classes(kind)
    placed = set()
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        original: Any = original_class(type(module))
        if original not in known.get("layer" if leaf.isdecimal() else leaf, ()):
            return f"{name or 'the model'} is a {type(module).__name__}, which is not known there"
        changed = original is not nn.ModuleList and not _is_of(original.forward, original.__module__)
        if changed or (name and ("forward" in vars(module) or any(_hooks(module)))):  # the model's own are called
            return f"{name or 'the model'} has a hook or a forward of its own"
        if module.training:
            return f"{name or 'the model'} is in training mode"
        if any(type(each) not in (nn.Parameter, Tensor) for each in own_tensors(module)):
            return f"{name} has tensors of a class of their own"
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            placed.add((str(weight.dtype), str(weight.device)))
    if len(placed) > 1:
        found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(placed))
        return f"its weights have several dtypes or devices: {found}"
    dtype = min(placed)[0]
    return None if dtype in _DTYPES else f"its weights are of {dtype}"


def _classes(kind: str) -> dict[str, tuple[type, ...]]:
    """The classes of modules, by the last part of their names."""
    home = sys.modules.get(f"transformers.models.{kind}.modeling_{kind}")

    def own(name: str) -> tuple[type, ...]:
        found: Any = getattr(home, _PREFIXES[kind] + name, None)
        return (found,) if home and getattr(found, "__module__", None) == home.__name__ else ()

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
        "act_fn": (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU)),
        "lm_head": (*_LINEAR, TiedLinear),
        **norms,
        **dict.fromkeys(products, _LINEAR),
    }


def leave_to_transformers(device: torch.device, reason: str) -> None:
    """From now on the reason of every model on a device."""
    _FAILED.append((device, reason))


def is_known(kind: type) -> bool:
    """Whether a class is one of models that may have no reason."""
    return any(kind in _classes(name)[""] for name in _PREFIXES)


def original_class(kind: type) -> type:
    """The class that a class of `decoder` stands for; another one itself."""
    found: type = vars(kind).get("_unfused", kind)
    return found


def _is_of(function: Any, *homes: str) -> bool:
    """Whether a function comes from one of some modules or their submodules. One that `wraps` gave its name does not."""
    found, scope = getattr(function, "__module__", None), getattr(function, "__globals__", {}).get("__name__", "")
    packages = {"torch", *(home.partition(".")[0] for home in homes)}  # torch has the likes of `no_grad`
    return any(f"{found}.".startswith(f"{home}.") for home in homes) and scope.partition(".")[0] in packages


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module itself."""
    return [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]


def _hooks(module: nn.Module) -> Iterator[object]:
    """The hooks of a module but for those by which transformers collects hidden states, which do nothing unless it is asked."""
    yield from module._forward_pre_hooks.values()
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
            yield hook


def _reason_config(model: Any, config: Any) -> str | None:
    """The part of the reason that lies in the configuration and in sizes."""
    inner = model.model
    if not 0 < len(inner.layers) == config.num_hidden_layers:
        return f"it has {len(inner.layers)} layers, of which {config.num_hidden_layers} are in use"
    if any(layer.self_attn.layer_idx != place for place, layer in enumerate(inner.layers)):
        return "its layers are not in their own order"
    attention, rotary, home = inner.layers[0].self_attn, inner.rotary_emb, sys.modules[type(inner).__module__]
    kinds = getattr(config, "layer_types", None) or ()
    if getattr(config, "sliding_window", None) is not None or any(each != "full_attention" for each in kinds):
        return "its attention has a sliding window"
    if rotary.rope_type not in _ROPES:
        return f"its rotary embedding is {rotary.rope_type}, and none of {', '.join(_ROPES)}"
    if 2 * rotary.inv_freq.numel() != attention.head_dim:
        return "its rotary embedding turns a part of each head"
    if attention.q_proj.out_features != config.num_attention_heads * attention.head_dim:
        return f"{attention.q_proj.out_features} outputs of q_proj are not {config.num_attention_heads} heads"
    if config._attn_implementation not in _ATTENTIONS:
        return f"its attention is {config._attn_implementation}"
    attends = home.ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, home.eager_attention_forward)
    rotates = getattr(home.apply_rotary_pos_emb, "forward", home.apply_rotary_pos_emb)  # `kernels` makes a module of it
    if not (_is_of(attends, "transformers") and _is_of(rotates, home.__name__, "kernels")):
        return "functions of its attention were replaced"
    return None


def reason_now(config: Any) -> str | None:
    """The part of the reason that may come with any call."""
    if _has_any_global_hook():
        return "there are hooks for all modules"
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return "its configuration asks for other outputs than logits"
    return None


def _reason_device(model: Any) -> str | None:
    """The part of the reason that lies in the device."""
    device, dtype = model.model.norm.weight.device, model.model.norm.weight.dtype
    if device.type not in DEVICES or (device.type in PACKED and not _fuses(model.model.layers, dtype)):
        return f"on a {device.type} transformers' own forward is as fast"
    return next((reason for failed, reason in _FAILED if failed == device), None)


def _fuses(layers: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all linear layers are packed, and their backend makes a token's input of `dtype` itself."""
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            return False
        if isinstance(module, SeedLinear):
            try:
                backend = ops.plan_for(module.format, module.shape, module.device, module.backend).backend
            except BackendError:
                return False
            if dtype not in getattr(backend, "fuses", ()):
                return False
    return True


def reason_unfused_over(model: Any, cache: Any) -> str | None:
    """Why no token of a model goes through `decoder_steps.step` over a cache; None if tokens do."""
    if reason := reason_unfused(model):
        return reason
    attention, weight = model.model.layers[0].self_attn, model.model.norm.weight
    if cache.offloading or len(cache.layers) != len(model.model.layers):
        return "the cache is offloaded, or another model's"
    for layer in cache.layers:
        if type(layer) is not StaticLayer or getattr(layer.cumulative_length, "dtype", None) != torch.int64:
            return f"a layer of the cache is a {type(layer).__name__} that is not known there"
        if not layer.is_initialized:
            return "the cache is empty"
        shape = (1, attention.k_proj.out_features // attention.head_dim, layer.max_cache_len, attention.head_dim)
        tensors: Any = layer.keys, layer.values
        for each in tensors:
            if each.shape != shape or (each.dtype, each.device) != (weight.dtype, weight.device) or not each.is_contiguous():
                return f"the cache holds {each.dtype} {[*each.shape]} on {each.device}, not {weight.dtype} {[*shape]}"
    return None
