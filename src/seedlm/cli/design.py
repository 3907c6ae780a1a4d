"""``seedlm design``."""

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from seedlm.cli.console import note, show_progress, stopped
from seedlm.cli.options import Device

if TYPE_CHECKING:
    from seedlm.compress.design import Rated

_BAR = 48


def design(
    bits: Annotated[float, typer.Option(help="Budget in bits a weight, such as 4 or 2.5.")],
    model: Annotated[
        str | None,
        typer.Option(help="Measure on the weights of this model instead of N(0,1): folder, GGUF file, Hub repository."),
    ] = None,
    blocks: Annotated[int, typer.Option(help="Blocks to measure on: the standard error falls with their root.", min=2)] = 64,
    rounding: Annotated[str, typer.Option(help="How coefficients are chosen: best, or the paper's own nearest.")] = "best",
    max_block: Annotated[
        int | None,
        typer.Option(
            help="Longest block, in weights. Default: 64 on a GPU; on a CPU 8, some seconds, where 64 take many minutes.",
            min=2,
            max=64,
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Formats to list.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the sample.", min=0)] = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print every format measured as JSON.")] = False,
) -> None:
    """Find the formats of least expected error under a budget: the paper's grid search, exponent bits included.

    Errors are ||W - W^|| / ||W|| with their standard errors. Unquantised is the error with real coefficients, contenders the
    seeds of a block that an exact search must score: what a format costs to use. `seedlm compress --format` takes any of them;
    with 2 exponent bits (e2) it does worse than shown, since it sets their range by the largest weight.
    """
    from seedlm.codes.block.format import check_rounding
    from seedlm.compress.design_space import candidates
    from seedlm.integrations.transformers.before import find_source
    from seedlm.progress import counted
    from seedlm.storage.source import open_source

    start = time.monotonic()
    check_rounding(rounding)
    candidates(bits, max_block=max_block or 8)
    there = None if model is None else find_source(model, tell=note)
    note(f"formats of at most {bits:g} bits a weight, on {blocks} blocks of {model or 'N(0,1)'}{f': {there}' if there else ''}")
    try:
        with show_progress() as (on_progress, _):
            if there is not None:
                on_progress("open", 0, 0)
            from seedlm.compress.design import measure, model_blocks, normal_blocks
            from seedlm.device import choose_device

            where = choose_device(device)
            samples = normal_blocks(blocks, seed) if there is None else model_blocks(open_source(there.path), blocks, seed)
            longest = max_block or (8 if where.type == "cpu" else 64)
            formats = candidates(bits, max_block=min(longest, samples.shape[1]))
            if max_block is None and where.type == "cpu":
                note("blocks of up to 8 weights, some seconds; --max-block 64 looks at all, in many minutes")
            with counted(None, "design", len(formats), on_progress) as tell:
                measuring = measure(
                    formats,
                    samples.to(where),
                    rounding,  # type: ignore[arg-type]  # checked above
                    prune=True,
                    on_progress=tell,
                )
                measured = list(measuring)
    except KeyboardInterrupt as error:
        stopped(error)
    measured.sort(key=lambda m: m.nmse)
    seconds = round(time.monotonic() - start, 2)
    if as_json:
        run = {"bits": bits, "model": model, "blocks": blocks, "rounding": rounding, "seed": seed, "device": str(where)}
        print(json.dumps({**run, "seconds": seconds, "formats": [m.to_dict() for m in measured]}, indent=2))
        return
    print(
        f"{len(formats)} formats of at most {bits:g} bits, on {blocks} blocks of {model or 'N(0,1)'}, {seconds:.0f} s; "
        f"{len(formats) - len(measured)} are worse than others even with real coefficients"
    )
    print()
    _print_table(measured[:top])
    print()
    _print_curve(measured)


def _print_table(measured: "list[Rated]") -> None:
    from seedlm.codes.block.format import PRESETS, WORD_BITS

    presets = {format: name for name, format in PRESETS.items()}
    print(f"{'format':26} {'bits':>6}  {'error':16}  {'unquantised':11}  {'contenders':>10}  block")
    for m in measured:
        words = m.format.blocks_per_group * m.format.block_bits // WORD_BITS
        layout = f"{m.format.block_bits} bits, {m.format.blocks_per_group} in {words} word{'s' * (words > 1)}"
        name = f"; preset {presets[m.format]}" if m.format in presets else ""
        error = f"{m.relative_error:.4f} +- {m.standard_error / (2 * m.relative_error):.4f}"
        least = "" if m.at_least == m.nmse else f"; at least {m.at_least**0.5:.4f}"
        print(
            f"{m.format.spec:26} {m.format.bits_per_weight:6.3f}  {error}  {m.unquantized**0.5:<11.4f}  "
            f"{m.contenders:10.1f}  {layout}{name}{least}"
        )


def _print_curve(measured: "list[Rated]") -> None:
    """The least error with each number of seed bits, and where it is."""
    best: dict[int, Rated] = {}
    for m in measured:  # ascending error
        best.setdefault(m.format.seed_bits, m)
    widest = max(m.relative_error for m in best.values())
    print("error against seed bits, the best format with each")
    for k, m in sorted(best.items()):
        bar = "#" * round(_BAR * m.relative_error / widest)
        print(f"{k:3} {m.relative_error:.4f} {bar:{_BAR}} {m.format.spec}")
