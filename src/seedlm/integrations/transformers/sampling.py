"""`generate`'s loop over tokens, one step ahead of its own question whether to stop.

transformers asks after each token whether it was the last, which on a GPU means to wait for it; only then is the next step
prepared, and the GPU waits for that. Here the next step is under way when the question is answered: at the end of a text it
is one too many, and taken back. Tokens are transformers' to the bit, random ones too, since none is drawn before the answer.

One text, batch 1, over a static cache, whose result is its tokens; the prompt and the first token are left to transformers.
The rest is the loop that is documented there: processors, the choice, criteria, a streamer, in this order. A streamer that is
not transformers' or ours hears of a token before the next step, as it would there, and every streamer of the first one:
the step after it may be captured, for which a reader need not wait. On a CPU no step is ahead.
"""

from collections.abc import Callable, Mapping
from functools import cache as once
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor, StaticCache
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

AHEAD: tuple[str, ...] = ("cuda",)
"""Kinds of devices that work while Python goes on."""

_UNDERSTOOD: Final = frozenset({"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep"})


def is_understood(
    input_ids: Tensor, generation_config: Any, cache: Any, arguments: Mapping[str, Any], devices: tuple[str, ...]
) -> bool:
    """Whether `sample` does what transformers' `_sample` does with these arguments."""
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    return (
        type(cache) is StaticCache
        and input_ids.shape[0] == 1
        and input_ids.device.type in devices
        and not generation_config.return_dict_in_generate
        and not getattr(generation_config, "is_assistant", False)
        and generation_config.compile_config is None
        and all(value is None or name in _UNDERSTOOD for name, value in arguments.items())
        and arguments.get("use_cache") is True
        and (positions is None or positions.ndim == 2)
        and (mask is None or (mask.shape == input_ids.shape and bool(mask.all())))
    )


def sample(
    theirs: Any,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    cache: Any,
    arguments: Mapping[str, Any],
    stepper: Callable[[bool], Callable[[Tensor, Tensor | None], Tensor]],
) -> Tensor:
    """Tokens [1, length] that begin with `input_ids`.

    theirs      `_sample` of the model's own class
    cache       of `arguments`, a StaticCache
    stepper     a function of the next token [1, 1] and its position [1, 1], or None, to logits [1, 1, vocabulary]; asked with
                whether nobody but transformers and us is called between two tokens, who could change the model
    """
    one = StoppingCriteriaList([_AtOnce()])
    with_prompt = {"logits_processor": logits_processor, "stopping_criteria": one, "generation_config": generation_config}
    input_ids = theirs(model, input_ids, **with_prompt, **arguments)
    answer, positions, longest = _Answer(input_ids.device), arguments.get("position_ids"), stopping_criteria.max_length
    room = cache.layers[0].max_cache_len - int(cache.layers[0].cumulative_length)
    step = stepper(all(map(_is_known, (streamer, *logits_processor, *stopping_criteria))))
    begun = streamer is None
    while True:
        positions = None if positions is None else positions[:, -1:] + 1
        answer.ask(stopping_criteria(input_ids, None), input_ids[:, -1])
        more = longest is None or input_ids.shape[1] < longest
        ahead = more and room > 0 and input_ids.device.type in AHEAD and _is_known(streamer) and begun
        begun = True
        logits = step(input_ids[:, -1:], positions) if ahead else None
        try:
            last, token = answer.wait()
            if streamer is not None:
                streamer.put(token)
        except BaseException:
            _take_back(cache, int(ahead))
            raise
        _take_back(cache, int(last and ahead))
        if last or not more:
            break
        if logits is None:
            logits = step(input_ids[:, -1:], positions)
        room -= 1
        scores = logits_processor(input_ids, logits[:, -1].to(torch.float32, copy=True))
        input_ids = torch.cat((input_ids, _choice(scores, generation_config.do_sample)), dim=-1)
    if streamer is not None:
        streamer.end()
    return input_ids


def _take_back(cache: Any, steps: int) -> None:
    """What a cache holds of the last steps is no more part of the text."""
    if steps:
        torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], steps)


def _is_known(each: Any) -> bool:
    """Whether something that is called between two tokens is transformers' or ours, and calls nobody else."""
    home = each.__globals__["__name__"] if isinstance(each, FunctionType) else type(each).__module__
    ours = home.partition(".")[0] in ("transformers", "seedlm")
    return each is None or (ours and not isinstance(each, PrefixConstrainedLogitsProcessor))


def _choice(scores: Tensor, random: bool) -> Tensor:
    """The next token [1, 1]."""
    return torch.multinomial(scores.softmax(-1), num_samples=1) if random else most_likely(scores)


def most_likely(scores: Tensor) -> Tensor:
    """Where scores [1, vocabulary] are largest, [1, 1]. In two steps, as torch alone takes 34 us for 128256 on an H100."""
    width = _divisor(scores.shape[1])
    tops, places = scores.view(-1, width).max(-1)
    row = tops.argmax(0, keepdim=True)
    return (row * width + places[row])[None]


@once
def _divisor(number: int) -> int:
    """The largest divisor up to 1024; the number itself where that is none worth a second step."""
    return next((each for each in range(1024, 31, -1) if number % each == 0), number)


class _AtOnce(StoppingCriteria):
    """Stops after the first token."""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Answer:
    """Whether a token was the last, and the token, on their way from a device."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._last = torch.zeros(1, dtype=torch.bool, pin_memory=pinned)
        self._token = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self._there = torch.cuda.Event() if pinned else None
        self._device = device

    def ask(self, last: Tensor, token: Tensor) -> None:
        self._last.copy_(last, non_blocking=True)
        self._token.copy_(token, non_blocking=True)
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(self._device))

    def wait(self) -> tuple[bool, Tensor]:
        """The token [1] is the caller's to keep."""
        if self._there is not None:
            self._there.synchronize()
        return bool(self._last), self._token.clone()
