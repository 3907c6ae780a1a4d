"""One token by `modeling.fused` and `inference.attention`, where transformers' own forward would launch every small step.

For models whose decoder layers are Llama's (`reason_unfused`). `step` is the whole forward of one token over a static cache.
`fuse_decoding` gives a model a subclass of its class, of the same name, so that copies, files and signatures stay what they
were. Its forward takes this way where a call asks for no more than `_is_step` allows, and transformers' for every other call:

    one token, batch 1, a `StaticCache`, no mask, no output but logits, in evaluation and without gradients

To see whether a mask hides anything would be to wait for the GPU, so a call with a mask is transformers'. `generate` drops a
mask of ones; for a static cache it makes one anew at each token, which is left out here. It compiles no step that goes this
way, unless it is given a `compile_config`.

The first step over a cache runs as it is, the second is captured, and all others replay it: on a GPU as a CUDA graph, on a CPU
as jobs that are run at once (`threads.Record`). Over the next cache of that length the first is captured already, if the model
is the same (`_CAPTURED`). On a GPU `generate` has each step under way before it asks whether the one before was the last
(`sampling`). Graphs belong to a cache and are let go with it, and so is what they read: weights of a model that was moved away
stay until then. A model and a cache are checked once, and again when one of them, or the number of threads, has changed. Where
the cache lies is looked at before each step. So is what the model has (`_Read`), but at a replay on a GPU while it is at work.

One text at a time is meant. While a thread captures, another that draws random numbers on that GPU fails, by a torch whose
captures share the state of a generator (2.11 does). A device on which a capture fails is left to transformers from then on.

On a CPU all that is for packed models alone, whose backend makes the layers' input itself; dense ones take as long either way.
Embedding, rotary embedding and head are no part of what is captured there. A step that cannot be captured runs as it is.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache as once
from functools import partial, wraps
from operator import attrgetter, eq, is_
from threading import Lock
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from seedlm.codes.threads import NotRecorded, Record
from seedlm.device import free_host_memory
from seedlm.errors import BackendError
from seedlm.inference import ops
from seedlm.inference.attention import attend, check_position
from seedlm.integrations.transformers import sampling as ahead
from seedlm.modeling.embedding import SeedEmbedding, TiedLinear
from seedlm.modeling.fused import attended_linear, gated_linear, normed_linears
from seedlm.modeling.linear import SeedLinear

DEVICES: tuple[str, ...] = ("cuda", "cpu")
"""Kinds of devices on which models decode this way."""
PACKED: tuple[str, ...] = ("cpu",)
"""Those of them where only models do whose layers' backend makes their input itself: else it takes as long as transformers."""
CACHE: Final = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls a cache, among arguments and in outputs."""

_PREFIXES: Final = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
_LINEAR: Final = (nn.Linear, SeedLinear)
_ROPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long a text is."""
_ATTENTIONS: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_DTYPES: Final = ("torch.float16", "torch.bfloat16", "torch.float32")
_KNOWN: Final = frozenset(
    {"input_ids", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache", "return_dict"}
)


def reason_unfused(model: nn.Module) -> str | None:
    """Why no token of a model goes through `step`; None if tokens do."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _PREFIXES:
        return f"model type {kind} is none of {', '.join(_PREFIXES)}"
    return _reason_modules(model, kind) or _reason_config(model, config) or _reason_now(config) or _reason_device(model)


def _reason_modules(model: nn.Module, kind: str) -> str | None:
    """The part of the reason that lies in the model's modules."""
    known = _classes(kind)
    placed = set()
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        original: Any = _original(type(module))
        if original not in known.get("layer" if leaf.isdecimal() else leaf, ()):
            return f"{name or 'the model'} is a {type(module).__name__}, which is not known there"
        changed = original is not nn.ModuleList and not _is_of(original.forward, original.__module__)
        if changed or (name and ("forward" in vars(module) or any(_hooks(module)))):  # the model's own are called
            return f"{name or 'the model'} has a hook or a forward of its own"
        if module.training:
            return f"{name or 'the model'} is in training mode"
        if any(type(each) not in (nn.Parameter, Tensor) for each in _tensors(module)):
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


def _is_of(function: Any, *homes: str) -> bool:
    """Whether a function comes from one of some modules or their submodules. One that `wraps` gave its name does not."""
    found, scope = getattr(function, "__module__", None), getattr(function, "__globals__", {}).get("__name__", "")
    packages = {"torch", *(home.partition(".")[0] for home in homes)}  # torch has the likes of `no_grad`
    return any(f"{found}.".startswith(f"{home}.") for home in homes) and scope.partition(".")[0] in packages


def _tensors(module: nn.Module) -> list[Tensor]:
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


def _reason_now(config: Any) -> str | None:
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


def _reason(model: Any, cache: Any) -> str | None:
    """Why no token of a model goes through `step` over a cache; None if tokens do."""
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


def step(model: Any, token: Tensor, cache: Any, positions: Tensor | None = None) -> Tensor:
    """The forward of one token, for a model and a cache that fit; the cache is one longer afterwards.

    token       int64 [1, 1]
    positions   int64 [1, 1], of the rotary embedding; the length of the cache if None
    returns     logits [1, 1, vocabulary] of the model's dtype
    """
    h, cos, sin = _before_layers(model, token, _next_position(cache) if positions is None else positions)
    return _after_layers(model, h, _layers(model, h, cos, sin, cache), cache)


def _before_layers(model: Any, token: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The token's h [1, 1, features], and cosines and sines [1, 1, head's] of its dtype."""
    h = model.model.embed_tokens(token)
    return h, *model.model.rotary_emb(h, position_ids=positions)


def _layers(model: Any, h: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
    """What the last layer adds to h, to which all before it have been added in place."""
    delta: Tensor | None = None
    for layer, store in zip(model.model.layers, cache.layers, strict=True):
        attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        q, k, v = normed_linears(h, delta, norm.weight, norm.variance_epsilon, projections)
        read = attend(q, k, v, cos, sin, store.keys, store.values, store.cumulative_length.view(1), attention.scaling)
        delta, norm = attended_linear(read, attention.o_proj), layer.post_attention_layernorm
        gate, up = normed_linears(h, delta, norm.weight, norm.variance_epsilon, [mlp.gate_proj, mlp.up_proj])
        delta = gated_linear(gate, up, mlp.down_proj)
    assert delta is not None
    return delta


def _after_layers(model: Any, h: Tensor, delta: Tensor, cache: Any) -> Tensor:
    """Logits; the cache is one longer."""
    norm = model.model.norm
    (logits,) = normed_linears(h, delta, norm.weight, norm.variance_epsilon, [model.lm_head])
    torch._foreach_add_([layer.cumulative_length for layer in cache.layers], 1)
    return logits


# ---- Steps over a cache ----


def decode(model: Any, token: Tensor, cache: Any, positions: Tensor | None = None) -> Tensor | None:
    """`step`, as the replay of a graph where there is one; None, with nothing done, for a model or a cache that do not fit."""
    while (steps := _steps(model, cache)).reason is None:
        if (logits := steps.step(model, token, cache, positions)) is not None:
            return logits
    return None


def _stepper(model: Any, cache: Any, alone: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The steps of one text. alone: nobody else is called between two of them, who could change the model or the cache.

    Then a step that came about by a graph says that the next may replay it without looking.
    """
    graph: Any = None

    def of(token: Tensor, positions: Tensor | None) -> Tensor:
        nonlocal graph
        if graph is not None:
            logits: Tensor = graph.replay(token, _next_position(cache) if positions is None else positions)
            return logits
        before = _replays(model, cache)
        inputs = {"input_ids": token, "position_ids": positions, "use_cache": True, "return_dict": True, CACHE: cache}
        logits = model(**inputs).logits
        if alone and _replays(model, cache) == before + 1:
            graph = _STEPS[model][cache].graph
        return logits

    return of


def _replays(model: Any, cache: Any) -> int:
    """How many steps of a model over a cache were replays."""
    steps = _STEPS.get(model, {}).get(cache)
    return steps.replays if steps else 0


def _next_position(cache: Any) -> Tensor:
    length: Tensor = cache.layers[0].cumulative_length
    return length.view(1, 1)


class _Steps:
    """Those of one model over one cache.

    reason   why there are none
    where    the cache lay when this was found, and the number of threads; empty if it is to be found again
    graph    of one step, once it is captured
    replays  of it that were found right
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.reason = _reason(model, cache)
        self.where = _where(cache)
        self._read: Any = None if self.reason else _Read(model)
        self.graph: Any = None
        self.replays = 0
        self._mark = hash((self._read.mark(), cache.layers[0].max_cache_len)) if self._read else None
        self._warm = self._mark is not None and _CAPTURED.get(model) == self._mark
        self._stepped, self._captures = False, True

    def step(self, model: Any, token: Tensor, cache: Any, positions: Tensor | None) -> Tensor | None:
        """Logits; None, with nothing done, if the reason is to be found again."""
        by_graph, self._warm = self._warm and self._captures and _can_capture(token.device), True
        if not (by_graph and self.graph and self.graph.at_work) and not self._read.unchanged():
            self.where = []
            return None
        stepped, self._stepped = self._stepped, True
        if not by_graph:
            return step(model, token, cache, positions)
        if positions is None:
            positions = _next_position(cache)
        if self.graph is None:
            graph = _GRAPHS[token.device.type](token, positions)
            try:
                graph.capture(model, cache)
            except NotRecorded:
                self._captures = False
                return step(model, token, cache, positions)
            except RuntimeError as reason:  # whatever a kernel does that no graph holds
                _LOST.append(graph)
                if not stepped:  # it was the first over this cache, so a kernel may have been missing after all
                    _CAPTURED.pop(model, None)
                    return step(model, token, cache, positions)
                text = f"steps on {token.device} cannot be captured: {' '.join(str(reason).split()):.300}"
                _FAILED.append((token.device, text))
                self.where = []
                return None
            self.graph, _CAPTURED[model] = graph, self._mark
        logits = self.graph.replay(token, positions)
        if self.graph.at_work and not self._read.unchanged():
            torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], 1)
            self.where = []
            return None
        self.replays += 1
        return logits


_STEPS: Final[WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, _Steps]]] = WeakKeyDictionary()
_CAPTURED: Final[WeakKeyDictionary[nn.Module, int | None]] = WeakKeyDictionary()
"""What the last step of a model that was captured depended on, as a hash that holds none of it. A step that depends on the same
needs no other before it: weights are prepared, kernels loaded."""


def _steps(model: Any, cache: Any) -> _Steps:
    """The steps over a cache as it is now, which are kept as long as it."""
    known = _STEPS.get(model)
    if known is None:
        known = _STEPS.setdefault(model, WeakKeyDictionary())
    steps = known.get(cache)
    if steps is None or steps.where != _where(cache):
        steps = known[cache] = _Steps(model, cache)
    return steps


def _where(cache: Any) -> list[int]:
    """The addresses of a cache's tensors, 0 for one that is not there, and the number of threads, for which jobs are cut."""
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values, layer.cumulative_length)]
    return [torch.get_num_threads(), *(each.data_ptr() if isinstance(each, Tensor) else 0 for each in tensors)]


def _can_capture(device: torch.device) -> bool:
    """Whether there are graphs on a device, and nobody captures one of which this step becomes a part."""
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


_CAPTURE: Final = Lock()


@once
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures, one after another: cuBLAS keeps 32 MiB for each stream that it has seen."""
    return torch.cuda.Stream(device)


_FAILED: Final[list[tuple[torch.device, str]]] = []
"""Devices on which a capture failed, and why."""
_LOST: Final[list["_Graph"]] = []
"""Graphs whose capture failed. They are kept for ever, since torch may go on to use them."""


class _Graph:
    """One step over one cache as a CUDA graph. Of the model and of the cache it has only addresses.

    at_work   whether a replay goes on while Python does
    """

    at_work: ClassVar[bool] = True

    def __init__(self, token: Tensor, positions: Tensor) -> None:
        with torch.inference_mode(False):  # else they could only be written to in inference mode
            self._token, self._positions = token.clone(), positions.clone()
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, model: Any, cache: Any) -> None:
        """Raises RuntimeError for a step that no graph holds."""
        device = self._token.device
        before, stream = torch.cuda.current_stream(device), _capture_stream(device)
        with _CAPTURE, torch.cuda.stream(stream):  # and on its device
            stream.wait_stream(before)
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._logits = step(model, self._token, cache, self._positions)
            finally:
                self._graph.capture_end()
        before.wait_stream(stream)

    def replay(self, token: Tensor, positions: Tensor) -> Tensor:
        """The logits, which are the caller's to keep."""
        with torch.cuda.device(token.device):  # a graph goes to the stream of the device that is current
            self._token.copy_(token)
            self._positions.copy_(positions)
            self._graph.replay()
            return self._logits.clone()


class _Recorded:
    """The layers of one step over one cache on a CPU, as jobs (`Record`)."""

    at_work: ClassVar[bool] = False

    def __init__(self, token: Tensor, positions: Tensor) -> None:
        self._given, self._record = (token, positions), Record()

    def capture(self, model: Any, cache: Any) -> None:
        """Raises NotRecorded for layers that are no jobs."""
        self._model, self._cache = weakref.ref(model), weakref.ref(cache)
        with torch.inference_mode(False), torch.no_grad():  # else inputs could only be written to in inference mode
            try:
                self._inputs = h, cos, sin = tuple(each.clone() for each in _before_layers(model, *self._given))
                with self._record:
                    self._delta = _layers(model, h, cos, sin, cache)
            except RuntimeError as reason:  # nothing has run yet: no memory, or an onlooker that would raise it again
                raise NotRecorded(str(reason)) from reason
            finally:
                self._record.entered = False

    def replay(self, token: Tensor, positions: Tensor) -> Tensor:
        """The logits, which are the caller's to keep. Raises IndexError for a cache that is full."""
        model: Any = self._model()
        cache: Any = self._cache()
        for mine, given in zip(self._inputs, _before_layers(model, token, positions), strict=True):
            mine.copy_(given)
        for layer in cache.layers:
            check_position(layer.cumulative_length, layer.max_cache_len)
        self._record.run()
        return _after_layers(model, self._inputs[0], self._delta, cache)


_GRAPHS: Final[dict[str, Any]] = {"cuda": _Graph, "cpu": _Recorded}


_ATTRIBUTES: Final = ("training", "variance_epsilon", "scaling", "attention_scaling", "_prepared", "weight", "bias")
"""What a step depends on of a module itself; the last two where they are no parameters."""


class _Read:
    """What a step reads of a model, held as it is now: modules, tensors, attributes. Hooks are only counted."""

    def __init__(self, model: nn.Module) -> None:
        self._homes: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._sized: list[Any] = []
        tensors, buffers = [], []
        for module in model.modules():
            homes: list[Any] = [module._modules, module._parameters, module._buffers, vars(module)]
            for home in homes:
                names = [name for name in _ATTRIBUTES if name in home] if home is vars(module) else home
                self._homes += len(names) * [home]
                self._names += names
            self._sized += [module._forward_hooks, module._forward_pre_hooks, vars(module)]
            tensors += _tensors(module)
            buffers += [each for each in module._buffers.values() if each is not None and not each.is_inference()]
        self._found = [*map(dict.get, self._homes, self._names)]
        self._sizes = [*map(len, self._sized)]
        self._tensors, self._buffers = tensors, buffers
        self._storages = [each.detach() for each in tensors]  # `.to` and `.data` give a tensor another one
        self._addresses = [each.data_ptr() for each in tensors]
        self._versions = [each._version for each in buffers]  # codes are prepared, which no parameter is

    def mark(self) -> int:
        """Another one for another model, or one that was changed; not so for values that were written into its tensors."""
        return hash((*map(id, self._found), *self._addresses, *self._sizes))

    def unchanged(self) -> bool:
        """Whether they still are what the model has, and buffers hold what they held."""
        return (
            all(map(is_, map(dict.get, self._homes, self._names), self._found))
            and all(map(eq, map(len, self._sized), self._sizes))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._addresses))
            and all(map(eq, map(attrgetter("_version"), self._buffers), self._versions))
        )


# ---- The way in ----


def fuse_decoding(model: nn.Module) -> None:
    """Let a model decode by `step` where it can: give it a subclass of its class, if that is one that is known here."""
    kind: Any = type(model)
    if _original(kind) is kind and kind in {each for name in _PREFIXES for each in _classes(name)[""]}:
        model.__class__ = _fused(kind)


def static_cache(model: Any, tokens: int) -> dict[str, Any]:
    """What to ask `generate` for so that a model decodes by `step`: nothing where it cannot, or has a cache of its own wish.

    tokens   that the cache is to hold; `generate` makes it no shorter than it is configured and than one before. Not by this
             way if it takes more than half of the memory that is free, or on a CPU holds more than the model has positions
    """
    if reason_unfused(model) or model.generation_config.cache_implementation is not None:
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


def _original(kind: type) -> type:
    """The class that a class of `_fused` stands for; another one itself."""
    found: type = vars(kind).get("_unfused", kind)
    return found


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
            if _is_step(self, found) and _steps(self, cache).reason is None:
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
        understood = ahead.is_understood(input_ids, generation_config, cache, arguments, DEVICES) and not synced_gpus
        if understood and _is_called_alone(self) and reason_unfused(self) is None:
            return ahead.sample(theirs, self, input_ids, *whole, streamer, cache, arguments, partial(_stepper, self, cache))
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
        and token.device.type in DEVICES
        and (positions is None or (positions.shape == (1, 1) and positions.device == token.device))
        and all(value is None or value is False or name in _KNOWN for name, value in inputs.items())
        and inputs.get("use_cache") is not False
        and inputs.get("return_dict") is not False
        and isinstance(kept, int)
        and kept >= 0
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled(token.device.type))
        and ops.unobserved(token)
        and _reason_now(model.config) is None
    )
