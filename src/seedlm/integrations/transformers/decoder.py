"""The way into `decoder_steps` for models of transformers: a forward that takes it where a call asks for no more than it gives.

`fuse_decoding` gives a model whose decoder layers are Llama's (`decoder_reasons`) a subclass of its class, of the same name, so
that copies, files and signatures stay what they were. Its forward takes this way where a call asks for no more than `_is_step`
allows, and transformers' for every other call:

    one token, batch 1, a `StaticCache`, no mask, no output but logits, in evaluation and without gradients

To see whether a mask hides anything would be to wait for the GPU, so a call with a mask is transformers'. `generate` drops a
mask of ones; for a static cache it makes one anew at each token, which is left out here. It compiles no step that goes this
way, unless it is given a `compile_config`.

On a CPU all that is for packed models alone, whose backend makes the layers' input itself; dense ones take as long either way.
"""

from collections.abc import Callable, Mapping
from functools import cache as once
from functools import partial, wraps
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from seedlm.device import free_host_memory
from seedlm.inference import ops
from seedlm.integrations.transformers import decoder_reasons as reasons
from seedlm.integrations.transformers import sampling as ahead
from seedlm.integrations.transformers.decoder_steps import CACHE, decode, stepper, steps_over

_KNOWN: Final = frozenset(
    {"input_ids", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache", "return_dict"}
)


def fuse_decoding(model: nn.Module) -> None:
    """Let a model decode by `step` where it can: give it a subclass of its class, if that is one that is known here."""
    kind: Any = type(model)
    if reasons.original_class(kind) is kind and reasons.is_known(kind):
        model.__class__ = _fused(kind)


def static_cache(model: Any, tokens: int) -> dict[str, Any]:
    """What to ask `generate` for so that a model decodes by `step`: nothing where it cannot, or has a cache of its own wish.

    tokens   that the cache is to hold; `generate` makes it no shorter than it is configured and than one before. Not by this
             way if it takes more than half of the memory that is free, or on a CPU holds more than the model has positions
    """
    if reasons.reason_unfused(model) or model.generation_config.cache_implementation is not None:
        return {}
    before = getattr(model, "_previous_max_cache_length", 0)
    tokens = max(tokens, before, getattr(model.generation_config, "max_cache_len", None) or 0)
    features = 2 * sum(layer.self_attn.k_proj.out_features for layer in model.model.layers)
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else free_host_memory()
    if free is not None and tokens * features * model.dtype.itemsize > free // 2:
        return {}
    if model.device.type == "cpu" and tokens > model.config.max_position_embeddings:
        return {}
    return {"cache_implementation": "static"}


@once
def _fused(kind: Any) -> Any:
    """A class of models that decode by `step` where they can."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        if not args and _is_step(self, inputs):
            cache = _cache_in(inputs)
            logits = decode(self, inputs["input_ids"], cache, inputs.get("position_ids"))
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})
        return kind.forward(self, *args, **inputs)

    @wraps(kind.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, *args: Any, **inputs: Any) -> Any:
        if isinstance(cache := inputs.get(CACHE), StaticCache) and inputs.get("attention_mask") is None:
            found = kind.prepare_inputs_for_generation(self, *args, **{**inputs, CACHE: None})  # which makes no mask without
            found[CACHE] = cache
            if _is_step(self, found) and steps_over(self, cache).reason is None:
                return found
        return kind.prepare_inputs_for_generation(self, *args, **inputs)

    @wraps(kind.get_compiled_call)
    def get_compiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
        if compile_config is not None:
            return kind.get_compiled_call(self, compile_config)

        def call(**inputs: Any) -> Any:
            return self(**inputs) if _is_step(self, inputs) else kind.get_compiled_call(self, None)(**inputs)

        return call

    theirs = kind._sample

    @wraps(theirs)
    def sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **arguments: Any,
    ) -> Any:
        whole, cache = (logits_processor, stopping_criteria, generation_config), _cache_in(arguments)
        understood = ahead.is_understood(input_ids, generation_config, cache, arguments, reasons.DEVICES) and not synced_gpus
        if understood and _is_called_alone(self) and reasons.reason_unfused(self) is None:
            return ahead.sample(theirs, self, input_ids, *whole, streamer, cache, arguments, partial(stepper, self, cache))
        return theirs(self, input_ids, *whole, synced_gpus=synced_gpus, streamer=streamer, **arguments)

    def reduce(self: Any, protocol: Any) -> Any:
        found = kind.__reduce_ex__(self, max(2, protocol))
        return (_new, (kind,), *found[2:]) if type(self) is _fused(kind) else found

    same = {name: getattr(kind, name) for name in ("__module__", "__doc__")}
    own = {"forward": forward, "get_compiled_call": get_compiled_call, "__reduce_ex__": reduce, "_unfused": kind}
    own |= {"prepare_inputs_for_generation": prepare_inputs_for_generation, "_sample": sample}
    return type(kind)(kind.__name__, (kind,), {**same, **own})


def _new(kind: Any) -> Any:
    """An empty model, of which `pickle` and `copy` make one."""
    return _fused(kind).__new__(_fused(kind))


def _is_called_alone(model: Any) -> bool:
    """Whether calling a model is no more than its forward, and nobody replaced what prepares its inputs."""
    own = {"forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}
    return not (model._forward_hooks or model._forward_pre_hooks or own & vars(model).keys())


def _cache_in(inputs: Mapping[str, Any]) -> Any:
    found = inputs.get("cache")
    return inputs.get("past_key_values") if found is None else found


def _is_step(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a call's arguments ask for one token over a static cache, and nothing looks on while it is computed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(_cache_in(inputs)) is not StaticCache:
        return False
    token, positions, kept = inputs.get("input_ids"), inputs.get("position_ids"), inputs.get("logits_to_keep", 0)
    return (
        type(token) is Tensor
        and token.shape == (1, 1)
        and token.device.type in reasons.DEVICES
        and (positions is None or (positions.shape == (1, 1) and positions.device == token.device))
        and all(value is None or value is False or name in _KNOWN for name, value in inputs.items())
        and inputs.get("use_cache") is not False
        and inputs.get("return_dict") is not False
        and isinstance(kept, int)
        and kept >= 0
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled(token.device.type))
        and ops.unobserved(token)
        and reasons.reason_now(model.config) is None
    )
