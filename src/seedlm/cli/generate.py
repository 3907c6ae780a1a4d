"""``seedlm generate``."""

import sys
from typing import Annotated, Any

import typer

from seedlm.cli.console import stopped


def generate(
    model: Annotated[str, typer.Argument(help="Model folder or Hub repository, compressed or not.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.", max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template and print the answer alone.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of everything that is not packed: auto, bfloat16, float16, float32.")] = "auto",
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", "--expand", help="Dequantize once after loading: faster on a CPU, full size in memory."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. It can do anything.")
    ] = False,
) -> None:
    """Generate text, printed as it comes; then, on stderr, the speed."""
    from transformers.utils import logging

    from seedlm.integrations.transformers.generate import Timing
    from seedlm.integrations.transformers.generate import generate as pieces

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    timing = Timing()
    drawing: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    opening: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    text: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat, "dequantize": dequantize}
    try:
        for piece in pieces(model, prompt, **text, **drawing, **opening, timing=timing):
            print(piece, end="", flush=True)
    except KeyboardInterrupt as error:
        print()
        stopped(error)
    print()
    print(
        f"{timing.tokens} tokens in {timing.seconds:.1f} s, {timing.tokens / timing.seconds:.1f} tokens/s; "
        f"loaded in {timing.load_seconds:.1f} s",
        file=sys.stderr,
    )
