"""``seedlm chat``."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seedlm.cli.console import note
from seedlm.cli.options import Backend, Dequantize, Device, DrawingSeed, Dtype, Temperature, TopP, TrustRemoteCode
from seedlm.errors import SourceError
from seedlm.storage.untrusted import printable

if TYPE_CHECKING:
    from seedlm.integrations.transformers.generate import Drawing, Turn, Writer

_HELP = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or Hub repository with a chat template.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.", metavar="TEXT")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: DrawingSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model, turn by turn.

    It remembers what was said until /reset. Ctrl-C stops an answer and not the program; /exit or Ctrl-D ends it.
    """
    from seedlm.integrations.transformers.before import check_backend, check_chat, check_new_tokens, find

    found = find(model)
    check_backend(backend, found.path, dequantized=dequantize)
    check_new_tokens(found.path, max_new_tokens)
    if not trust_remote_code:
        check_chat(model, found.path)
    if not sys.stderr.isatty():  # where no bar will tell
        note(f"{model}: {found}; loading")
    from transformers.utils import logging  # and torch: what was mistyped has been answered without them

    from seedlm.integrations.transformers.generate import Drawing, Writer

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    drawing = Drawing(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "dequantize": dequantize, "backend": backend}
    writer = Writer(model, chat=True, **how, trust_remote_code=trust_remote_code)
    print(f"{model}: {_HELP}", file=sys.stderr)
    _converse(writer, [{"role": "system", "content": system}] if system else [], drawing)


def _converse(writer: "Writer", opening: list["Turn"], drawing: "Drawing") -> None:
    """Turns from stdin until its end."""
    turns = list(opening)
    while (said := _read()) is not None:
        if said in ("/exit", "/quit"):
            return
        if said == "/reset":
            turns = list(opening)
        elif said.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif said:
            turns = _answer(writer, turns, said, len(opening), drawing)


def _read() -> str | None:
    """A line; None at the end of input. Ctrl-C gives up what was typed, and with nothing typed says how to end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # lines can be edited, and come again by the arrow keys
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(f"\n{_HELP}", file=sys.stderr)
        return ""


def _answer(writer: "Writer", turns: list["Turn"], said: str, kept: int, drawing: "Drawing") -> list["Turn"]:
    """Print the answer to a turn; the conversation with both, the oldest turns left out where the model has no room for them.

    kept   turns at the start that always stay
    """
    from seedlm.integrations.transformers.generate import NoRoomError

    turns = [*turns, {"role": "user", "content": said}]
    while True:
        try:
            pieces = writer.answer(turns, drawing)
            break
        except SourceError as reason:
            if not isinstance(reason, NoRoomError) or len(turns) <= kept + 2:
                print(printable(f"seedlm: {reason}"), file=sys.stderr)
                return turns[:-1]
            turns = [*turns[:kept], *turns[kept + 2 :]]
            print("seedlm: the conversation is too long for the model; its oldest turns are forgotten", file=sys.stderr)
    answer = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        pieces.close()  # which waits for its thread
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print()
    if writer.timing.positions is not None:
        print(f"seedlm: the answer ends where the model's {writer.timing.positions} positions do", file=sys.stderr)
    return [*turns, {"role": "assistant", "content": answer}]
