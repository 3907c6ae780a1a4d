"""``seedlm generate``."""

import sys
from typing import Annotated

import typer

from seedlm.cli.console import note, stopped
from seedlm.cli.options import Backend, Dequantize, Device, DrawingSeed, Dtype, Temperature, TopP, TrustRemoteCode
from seedlm.progress import say


def generate(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or Hub repository, compressed or not.")],
    prompt: Annotated[str, typer.Argument(help="Text to answer or, of a model without a chat template, to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.", min=1)] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: DrawingSeed = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Answer by the model's chat template, or go on from the text. Default: by one if it has one."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text, printed as it comes; then, on stderr, the speed."""
    from seedlm.integrations.transformers.before import check_backend, check_chat, check_new_tokens, find

    found = find(model)
    check_backend(backend, found.path, dequantized=dequantize)
    check_new_tokens(found.path, max_new_tokens)
    if chat and not trust_remote_code:
        check_chat(model, found.path)
    if not sys.stderr.isatty():  # where no bar will tell
        note(f"{model}: {found}; loading")
    from transformers.utils import logging  # and torch: what was mistyped has been answered without them

    from seedlm.integrations.transformers.generate import Drawing, Timing
    from seedlm.integrations.transformers.generate import generate as pieces

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    timing = Timing()
    drawing = Drawing(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    writing = pieces(
        model,
        prompt,
        chat=chat,
        drawing=drawing,
        timing=timing,
        device=device,
        dtype=dtype,
        dequantize=dequantize,
        backend=backend,
        trust_remote_code=trust_remote_code,
    )
    try:
        for piece in writing:
            print(piece, end="", flush=True)
    except KeyboardInterrupt as error:
        writing.close()
        print()
        stopped(error)
    print()
    if timing.positions is not None:
        note(f"the text ends where the model's {timing.positions} positions do")
    say(
        f"{timing.tokens} tokens in {timing.seconds:.1f} s, {timing.tokens / timing.seconds:.1f} tokens/s; "
        f"loaded in {timing.load_seconds:.1f} s"
    )
