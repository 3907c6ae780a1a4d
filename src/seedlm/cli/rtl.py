"""``seedlm rtl``."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from seedlm.cli.console import note, show_progress
from seedlm.errors import BackendError, FormatError, extra


def rtl(
    output: Annotated[Path, typer.Option("--output", "-o", help="Verilog file to write.")],
    bits: Annotated[str, typer.Option(help="Format: a preset (4, 3, ...) or a specification: block-k12-c4-p2-q4-e4.")] = "4",
    fp16: Annotated[bool, typer.Option("--fp16", help="Write the FP16 reference design instead.")] = False,
    beat_bits: Annotated[int, typer.Option(help="Width of the memory streams in bits, a power of two.")] = 512,
    max_features: Annotated[int, typer.Option(help="Activations held on chip.")] = 32768,
) -> None:
    """Write the matrix-vector product of a format as synthesisable Verilog."""
    from seedlm.codes.block.format import BlockFormat
    from seedlm.codes.registry import parse_format
    from seedlm.rtl.design import HalfDesign, SeedDesign
    from seedlm.storage.written import check_free, replacing

    check_free(output)
    sizes = {"beat_bits": beat_bits, "max_features": max_features}
    format = parse_format(bits, "block")
    if not isinstance(format, BlockFormat):
        raise FormatError(f"the hardware multiplies block codes, not {format.spec}")
    design = HalfDesign(**sizes) if fp16 else SeedDesign(format=format, **sizes)
    if find_spec("amaranth") is None:
        raise BackendError(f"seedlm rtl needs amaranth: {extra('rtl')}")
    note(
        f"{'FP16' if fp16 else format.spec}, {design.beat_bits} bits a clock, {design.max_features} activations: into {output}"
    )
    with show_progress() as (on_progress, _):
        on_progress("rtl", 0, 0)
        from seedlm.rtl.verilog import emit

        text = emit(design)
    with replacing(output) as file:
        file.write(text.encode())
    print(f"{output}: {design.prefix}_matvec, {design.lanes} multipliers, {design.beat_bits // 8} bytes a clock")
