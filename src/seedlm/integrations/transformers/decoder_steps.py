"""One token by `modeling.fused` and `inference.attention`, where transformers' own forward would launch every small step.

For models and caches of which `decoder_reasons` knows no reason. `step` is the whole forward of one token over a static cache;
`decode` is that, or the replay of one before.

The first step over a cache runs as it is, the second is captured, and all others replay it: on a GPU as a CUDA graph, on a CPU
as jobs that are run at once (`threads.Record`). Over the next cache of that length the first is captured already, if the model
is the same (`_CAPTURED`). On a GPU `generate` has each step under way before it asks whether the one before was the last
(`sampling`). Graphs belong to a cache and are let go with it, and so is what they read: weights of a model that was moved away
stay until then. A model and a cache are checked once, and again when one of them, or the number of threads, has changed. Where
the cache lies is looked at before each step. So is what the model has (`_Read`), but at a replay on a GPU while it is at work.

One text at a time is meant. While a thread captures, another that draws random numbers on that GPU fails, by a torch whose
captures share the state of a generator (2.11 does). A device on which a capture fails is left to transformers from then on.

On a CPU embedding, rotary embedding and head are no part of what is captured. A step that cannot be captured runs as it is.
"""

import weakref
from collections.abc import Callable
from functools import cache as once
from operator import attrgetter, eq, is_
from threading import Lock
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from seedlm.codes.threads import NotRecorded, Record
from seedlm.inference.attention import attend, check_position
from seedlm.integrations.transformers.decoder_reasons import leave_to_transformers, own_tensors, reason_unfused_over
from seedlm.modeling.fused import attended_linear, gated_linear, normed_linears

CACHE: Final = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls a cache, among arguments and in outputs."""


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
    while (steps := steps_over(model, cache)).reason is None:
        if (logits := steps.step(model, token, cache, positions)) is not None:
            return logits
    return None


def stepper(model: Any, cache: Any, alone: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
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


class Steps:
    """The steps of one model over one cache.

    reason   why there are none
    where    the cache lay when this was found, and the number of threads; empty if it is to be found again
    graph    of one step, once it is captured
    replays  of it that were found right
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.reason = reason_unfused_over(model, cache)
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
                leave_to_transformers(token.device, text)
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


_STEPS: Final[WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, Steps]]] = WeakKeyDictionary()
_CAPTURED: Final[WeakKeyDictionary[nn.Module, int | None]] = WeakKeyDictionary()
"""What the last step of a model that was captured depended on, as a hash that holds none of it. A step that depends on the same
needs no other before it: weights are prepared, kernels loaded."""


def steps_over(model: Any, cache: Any) -> Steps:
    """The steps over a cache as it is now, which are kept as long as it."""
    known = _STEPS.get(model)
    if known is None:
        known = _STEPS.setdefault(model, WeakKeyDictionary())
    steps = known.get(cache)
    if steps is None or steps.where != _where(cache):
        steps = known[cache] = Steps(model, cache)
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
            tensors += own_tensors(module)
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
