"""``seedlm observe``."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from seedlm.cli.console import NOTHING_KEPT, in_bytes, kept, note, show, show_progress, stopped
from seedlm.cli.options import Device, TrustRemoteCode
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
        int | None, typer.Option(help="How many. Default: 256 on a GPU that holds the model, or 64.", min=1)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in each.", min=2)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of what is written.", min=0)] = 0,
    device: Device = "auto",
    device_memory: Annotated[
        str | None, typer.Option(help="Use so much of the device, such as 40GB; default: what is free.", metavar="SIZE")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository; default: main.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Observe a model, for `compress --feedback FILE` with any number of bits.

    Needs no data: the model writes a text itself. A model larger than the device is observed layer by layer. Stopped at any
    moment, the same command goes on; a text that is written is not written again.
    """
    from seedlm.calibration.amount import check_length
    from seedlm.compress.feedback import Feedback, check_observation
    from seedlm.compress.plan import parse_size
    from seedlm.integrations.transformers.before import find, find_source, longest_text

    start = time.monotonic()
    if text is not None and writer is not None:
        raise FormatError("--text is a text, --writer a model that writes one: give one of them")
    memory = None if device_memory is None else parse_size(device_memory, "--device-memory")
    wrote = None if writer is None else find(writer).path
    wanted = Feedback("own" if text is None else "text", text, sequences, length, seed, wrote, memory)
    check_observation(out, wanted)
    try:
        source = find_source(model, revision, note)
        check_length(longest_text(source.path), length)
        note(f"{model}: {source}; observing it on {text or 'a text that it writes'}, for {out}")
        with show_progress() as (on_progress, _):
            on_progress("open", 0, 0)
            from transformers.utils import logging  # and torch: what was mistyped has been answered without them

            from seedlm.compress.observe import observe_checkpoint
            from seedlm.device import choose_device, peak_memory

            logging.disable_progress_bar()
            found = observe_checkpoint(
                source.path,
                out,
                text=wanted,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=on_progress,
                on_note=note,
            )
    except KeyboardInterrupt as error:
        stopped(error, kept(out, "keeps the text", NOTHING_KEPT))
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
