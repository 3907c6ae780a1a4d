"""``seedlm observe``."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from seedlm.cli.console import in_bytes, note, show, show_progress, stopped
from seedlm.cli.options import TrustRemoteCode
from seedlm.errors import FormatError


def observe(
    model: Annotated[str, typer.Argument(help="Folder of safetensors, GGUF file, or Hub repository (owner/name).")],
    out: Annotated[Path, typer.Argument(help="File to create, .safetensors. OUT.partial beside it keeps an unfinished run.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Observe on this text, which is data; default: one that the model writes.", metavar="FILE"),
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option(help="Another model that writes the text: the same one, compressed, if it is too large.", metavar="MODEL"),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="How many: by default 256 on a GPU that holds the model, or 64.", min=1)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in each.", min=2)] = 256,
    seed: Annotated[int, typer.Option(help="Of what is written.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device such as cuda:1.")] = "auto",
    device_memory: Annotated[
        str | None, typer.Option(help="Use so much of the device, such as 40GB; default: what is free.", metavar="SIZE")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Observe a model, for `compress --feedback FILE` with any number of bits.

    Needs no data: the model writes a text itself. A model larger than the device is observed layer by layer. Stopped at any
    moment, the same command goes on; a text that is written is not written again.
    """
    from seedlm.storage.source import locate

    start = time.monotonic()
    if text is not None and writer is not None:
        raise FormatError("--text is a text, --writer a model that writes one: give one of them")
    if text is not None and not text.is_file():
        raise FormatError(f"{text}: no such text file")
    path = locate(model, revision=revision)
    wrote = None if writer is None else locate(writer)
    try:
        from transformers.utils import logging

        from seedlm.compress.observe import observe_checkpoint  # torch: what was mistyped has been answered without it
        from seedlm.compress.plan import parse_size
        from seedlm.compress.statistics import Feedback
        from seedlm.device import choose_device, peak_memory

        logging.disable_progress_bar()
        memory = None if device_memory is None else parse_size(device_memory, "--device-memory")
        wanted = Feedback("own" if text is None else "text", text, sequences, length, seed, wrote, memory)
        with show_progress() as (on_progress, _):
            found = observe_checkpoint(
                path,
                out,
                text=wanted,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=on_progress,
                on_note=note,
            )
    except KeyboardInterrupt as error:
        partial = out.with_name(out.name + ".partial")
        kept = f"; run the same command again to go on ({partial} keeps the text)" if partial.exists() else ""
        stopped(error, kept)
    host, held = peak_memory(choose_device(device))
    summary = {
        "file": str(out),
        "bytes": out.stat().st_size,
        "model": model,
        "text": found.facts.source,
        "data": text is not None,
        "sequences": found.facts.sequences,
        "length": found.facts.length,
        "layers": len(found.reads),
        "inputs": len(found.inputs),
        "fewest_tokens": min(read.tokens for read in found.inputs.values()),
        "seconds": round(time.monotonic() - start, 2),
        "peak_host_bytes": host,
        "peak_device_bytes": held,
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    show(f"statistics        {out}, {in_bytes(out.stat().st_size)}, for --feedback")
    data = ": what is made with it has seen data" if text is not None else ""
    show(f"text              {found.facts.source}, {found.facts.sequences} x {found.facts.length} tokens{data}")
    show(f"layers            {len(found.reads)}, which read {len(found.inputs)} inputs")
    on_gpu = f", {in_bytes(held)} on the GPU" if held else ""
    show(f"time              {summary['seconds']:.1f} s; memory {in_bytes(host)}{on_gpu}")
