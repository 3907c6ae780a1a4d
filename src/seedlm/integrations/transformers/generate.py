"""Text from a model, piece by piece as it comes: what the commands `generate` and `chat` print."""

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from seedlm.device import choose_device
from seedlm.errors import SourceError
from seedlm.integrations.transformers.before import no_template
from seedlm.integrations.transformers.models import check_tokens, longest_text
from seedlm.integrations.transformers.opening import open_language_model, open_tokenizer
from seedlm.modeling.quantize import set_backend
from seedlm.storage.source import is_repository, locate

Turn = dict[str, str]
"""``{"role": "system", "user" or "assistant", "content": text}``, as chat templates take it."""


class NoRoomError(SourceError):
    """A prompt, or a conversation, of more tokens than its model has positions for; without its oldest turns one may fit."""


def room(model: Any, count: int, text: str) -> int | None:
    """New tokens that a model has positions for after so many tokens; None if it does not say.

    text   what the tokens are, as a user knows it
    Raises NoRoomError if there is no position left.
    """
    longest = longest_text(model)
    if longest is not None and count >= longest:
        raise NoRoomError(f"{text} has {count} tokens, the model knows {longest} positions")
    return None if longest is None else longest - count


@dataclass
class Timing:
    """Filled in while text is generated: seconds to load, tokens generated, and the seconds that took (prompt included).

    positions   that the model knows, where the last text ended because it had no more; None where it did not
    """

    load_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    positions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are chosen: the likeliest at temperature 0; above, drawn with a seed from the likeliest of share `top_p`.

    There are at most `max_new_tokens`, and no more than the model has positions for.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Writer:
    """A language model that writes.

    model         a folder, packed or not or of a GGUF file, such a file, or a Hub repository
    chat          whether it answers turns by its chat template; None if it has one
    device        "auto", or a torch device
    dtype         of everything that is not packed: "auto" (as stored) or a torch dtype's name
    dequantize    all weights once after loading: as large as the original then
    backend       how packed layers multiply (`modeling.quantize.set_backend`)
    trust_remote_code   run code that comes with the model
    Raises SourceError if the model cannot be opened, lacks a weight, is no language model, or has no chat template, and
    BackendError for a backend that cannot be had.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        chat: bool | None = None,
        device: str = "auto",
        dtype: str = "auto",
        dequantize: bool = False,
        backend: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        from seedlm.integrations.transformers.decoder import fuse_decoding

        start = time.perf_counter()
        where = choose_device(device)
        if not is_repository(model):
            # The GGUF file of a folder. transformers would ask the Hub, several times, for a path that was mistyped.
            model = locate(model)
        self._where = model
        self._tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
        self._tokenizer.model_max_length = sys.maxsize  # `room` says what is too long, where transformers would warn
        has_template = bool(self._tokenizer.chat_template)
        if chat and not has_template:
            raise SourceError(no_template(model))
        self.chats = has_template if chat is None else chat
        self._network = open_language_model(model, dtype=dtype, trust_remote_code=trust_remote_code).to(where)
        if dequantize and hasattr(self._network, "hf_quantizer"):
            self._network = self._network.dequantize()
        if backend != "auto":
            set_backend(self._network, backend)
        fuse_decoding(self._network)
        self.timing = Timing(load_seconds=time.perf_counter() - start)

    def go_on(self, prompt: str, drawing: Drawing) -> Generator[str, None, None]:
        """A text and what follows it.

        Raises NoRoomError if it is too long for the model, SourceError for tokens that it does not know.
        """
        return self._stream(self._tokenizer(prompt, return_tensors="pt"), drawing, "the prompt", skip_prompt=False)

    def answer(self, turns: Sequence[Turn], drawing: Drawing) -> Generator[str, None, None]:
        """The answer to some turns, the last of which is the user's.

        Raises NoRoomError if they are too long for the model, SourceError for tokens that it does not know.
        """
        inputs = self._tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self._stream(inputs, drawing, "the conversation", skip_prompt=True)

    def _stream(self, inputs: Any, drawing: Drawing, text: str, *, skip_prompt: bool) -> Generator[str, None, None]:
        """`_pieces`, once it is known that the model has positions for tokens and knows all of them."""
        count = inputs["input_ids"].shape[1]
        left = room(self._network, count, text)
        check_tokens(self._network, inputs["input_ids"], text, self._where)
        positions = None
        if left is not None and left < drawing.max_new_tokens:
            drawing, positions = replace(drawing, max_new_tokens=left), count + left
        return self._pieces(inputs, drawing, positions, skip_prompt=skip_prompt)

    def _pieces(self, inputs: Any, drawing: Drawing, positions: int | None, *, skip_prompt: bool) -> Generator[str, None, None]:
        """The text as a thread generates it; whatever that raises is raised here, at the end.

        Left early (Ctrl-C, or a caller that has enough), it waits for the thread, which ends after the token it is at: a
        process that ends with torch at work in a thread is aborted.
        """
        from transformers import TextIteratorStreamer

        from seedlm.integrations.transformers.decoder import static_cache

        options: dict[str, Any] = {"max_new_tokens": drawing.max_new_tokens, "do_sample": drawing.temperature > 0}
        options |= {"num_beams": 1, "num_return_sequences": 1}  # whatever the model's own settings are: one text is streamed
        if drawing.temperature > 0:
            torch.manual_seed(drawing.seed)
            options |= {"temperature": drawing.temperature, "top_p": drawing.top_p}
        options |= static_cache(self._network, inputs["input_ids"].shape[1] + drawing.max_new_tokens)
        inputs, left = inputs.to(self._network.device), Event()

        def enough(input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(input_ids),), left.is_set(), device=input_ids.device)

        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            begin = time.perf_counter()
            try:
                output = self._network.generate(**inputs, **options, streamer=streamer, stopping_criteria=[enough])
                self.timing.tokens = output.shape[1] - inputs["input_ids"].shape[1]
                self.timing.positions = positions if self.timing.tokens == drawing.max_new_tokens else None
            except BaseException as reason:  # shown in the caller's thread
                failure.append(reason)
                streamer.end()
            self.timing.seconds = time.perf_counter() - begin

        thread = Thread(target=work, daemon=True)
        try:
            thread.start()
            yield from (piece for piece in streamer if piece)
        finally:
            left.set()
            _wait_for(thread)
        if failure:
            raise failure[0]


def generate(
    model: str | Path,
    prompt: str,
    *,
    chat: bool | None = None,
    drawing: Drawing | None = None,
    timing: Timing | None = None,
    **opening: Any,
) -> Generator[str, None, None]:
    """Text from a model as it is decoded: the answer by its chat template, or the prompt and what follows it.

    chat      whether to use the template; None if there is one
    timing    filled in while text comes
    opening   the other arguments of `Writer`, which says what is raised
    """
    writer = Writer(model, chat=chat, **opening)
    if timing is not None:
        timing.load_seconds, writer.timing = writer.timing.load_seconds, timing
    drawing = drawing or Drawing()
    pieces = writer.answer([{"role": "user", "content": prompt}], drawing) if writer.chats else writer.go_on(prompt, drawing)
    with closing(pieces):
        yield from pieces


def _wait_for(thread: Thread) -> None:
    """Until it has ended: a second Ctrl-C asks for what is under way."""
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            continue
