"""Text from a model, piece by piece as it comes: what the `generate` command prints."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from seedlm.device import choose_device
from seedlm.errors import SourceError
from seedlm.integrations.transformers.opening import open_language_model, open_tokenizer
from seedlm.storage.source import is_repository, locate


@dataclass
class Timing:
    """Filled in while text is generated: seconds to load, tokens generated, and the seconds that took (prompt included)."""

    load_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    dequantize: bool = False,
    trust_remote_code: bool = False,
    timing: Timing | None = None,
) -> Iterator[str]:
    """Generate from a folder or Hub id, packed or not, yielding text as it is decoded: the prompt and what follows it.

    temperature   0 is greedy; above, tokens are drawn with this `seed`
    chat          put the prompt into the model's chat template, and yield the answer alone
    device        "auto", or a torch device
    dtype         of everything that is not packed: "auto" (as stored) or a torch dtype's name
    dequantize    all weights once after loading: faster on small models, as large as the original
    trust_remote_code   run code that comes with the model
    Raises SourceError if the model cannot be opened, lacks a weight, is no language model, or has no chat template.
    """
    timing = timing if timing is not None else Timing()
    start = time.perf_counter()
    where = choose_device(device)
    if not is_repository(model):
        locate(model)  # transformers would ask the Hub, several times, for a path that was mistyped
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    network = open_language_model(model, dtype=dtype, trust_remote_code=trust_remote_code).to(where)
    if dequantize and hasattr(network, "hf_quantizer"):
        network = network.dequantize()
    timing.load_seconds = time.perf_counter() - start

    if chat and not tokenizer.chat_template:
        raise SourceError(f"{model} has no chat template: generate without --chat")
    inputs = _tokens(tokenizer, prompt, chat=chat).to(where)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        torch.manual_seed(seed)
        options |= {"temperature": temperature, "top_p": top_p}
    yield from _stream(network, tokenizer, inputs, options, timing, skip_prompt=chat)


def _tokens(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """What a model is given: the prompt, or with `chat` a user's turn of it and the beginning of an answer."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _stream(
    network: Any, tokenizer: Any, inputs: Any, options: dict[str, Any], timing: Timing, *, skip_prompt: bool
) -> Iterator[str]:
    """The text as a thread generates it; whatever that raises is raised here, at the end.

    Left early (Ctrl-C, or a caller that has enough), it waits for the thread, which ends after the token it is at: a process
    that ends with torch at work in a thread is aborted.
    """
    from transformers import TextIteratorStreamer

    left = Event()

    def enough(input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), left.is_set(), device=input_ids.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        begin = time.perf_counter()
        try:
            output = network.generate(**inputs, **options, streamer=streamer, stopping_criteria=[enough])
            timing.tokens = output.shape[1] - inputs["input_ids"].shape[1]
        except BaseException as reason:  # shown in the caller's thread
            failure.append(reason)
            streamer.end()
        timing.seconds = time.perf_counter() - begin

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        left.set()
        thread.join()
    if failure:
        raise failure[0]
