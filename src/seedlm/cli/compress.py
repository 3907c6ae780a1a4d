"""``seedlm compress`` and ``seedlm inspect``."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seedlm.cli.console import NOTHING_KEPT, in_bytes, kept, note, number, show, show_progress, stopped
from seedlm.cli.options import TrustRemoteCode
from seedlm.codes.registry import DEFAULT, family, family_of, parse_format
from seedlm.errors import FormatError
from seedlm.storage.selection import DENSE, format_or_dense
from seedlm.storage.untrusted import printable

if TYPE_CHECKING:
    from seedlm.codes.base import Format
    from seedlm.compress.allocate import Mixture
    from seedlm.storage.inspect import Report, RunReport


def compress(
    source: Annotated[str, typer.Argument(help="Folder of safetensors, GGUF file, or Hub repository (owner/name).")],
    out: Annotated[Path, typer.Argument(help="Folder to create. OUT.partial beside it holds the unfinished run.")],
    bits: Annotated[
        str | None,
        typer.Option(help="Bits per weight: any number from 2 to 8; 3-fast and the like search a tenth as long. Default: 4."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Instead of --bits: as many as fit weight files of this size, such as 4.0GB.", metavar="SIZE"),
    ] = None,
    code: Annotated[
        str, typer.Option(help="trellis, or block: the paper's own (5, 4.5, 4, 3.5, 3, 2.5, 2 bits).", metavar="NAME")
    ] = DEFAULT,
    feedback: Annotated[
        str,
        typer.Option(
            help="What errors are weighed by: own (a text that the model writes), none (the weights alone), a file of "
            "statistics, or a text, which calibrates on data. auto is own if the model can be run, and none for --code block.",
            metavar="auto|own|none|FILE",
        ),
    ] = "auto",
    sequences: Annotated[
        int | None,
        typer.Option(help="Sequences of 256 tokens to observe it on. Default: 256 on a GPU, 64 on a CPU.", min=1),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="Mix formats by the file of `seedlm sensitivity`: for --code block.", metavar="FILE"),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Bits of the embeddings, such as 8, or dense, which leaves them as they are. Default: 6-fast beside layers in "
            "up to 6 bits, dense beside more, with --code block, and where no code can stand for them.",
            metavar="BITS|dense",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="The same of the output head, by the same default; if it is tied to the embeddings, one option says both.",
            metavar="BITS|dense",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="A format instead of --bits, such as trellis-r4-l16-t256-h128.", metavar="SPEC")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="How the block code chooses coefficients: best (default), or the paper's own nearest.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Store what is not compressed as bfloat16, float16 or float32; default: as it is.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Also compress modules that match this glob, such as lm_head.", metavar="GLOB")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave modules that match this glob as they are; wins.", metavar="GLOB")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB are 5 * 10^9 bytes.", metavar="SIZE")] = "5GB",
    device: Annotated[
        str,
        typer.Option(help="Where to search: auto (every GPU, or else the CPU), cpu, cuda:1, cuda:0,cuda:1, or ray."),
    ] = "auto",
    backend: Annotated[str, typer.Option(help="Search backend: auto, or one by name; all give the same bits.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository; default: main.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Compress a model into a new folder.

    The linear layers inside numbered layers are compressed, and embeddings and head in 6 bits; norms, biases and routers stay
    as they are.
    Stopped at any moment, the same command goes on where it was.
    """
    from seedlm.compress.feedback import Feedback
    from seedlm.compress.request import Request
    from seedlm.integrations.transformers.before import find_source
    from seedlm.storage.source import open_source

    start = time.monotonic()
    if size is not None and (bits is not None or format is not None):
        raise FormatError("--size says how many bits there can be: give it without --bits and --format")
    wanted = _format(source, bits or "4", code, format, sensitivity, size)
    asked: dict[str, Any] = {
        "format": wanted,
        "feedback": replace(Feedback.parse(feedback), sequences=sequences),
        "dtype": dtype,
        "include": include or (),
        "exclude": exclude or (),
        "embeddings": None if embeddings is None else format_or_dense(embeddings, code) or DENSE,
        "head": None if head is None else format_or_dense(head, code) or DENSE,
        "max_shard_size": max_shard_size,
        "device": device,
        "backend": backend,
        **({"rounding": rounding} if rounding is not None else {}),
    }
    request = Request.of(out, **asked)
    try:
        found = find_source(source, revision, note)
        if found.path.is_dir():
            request.check_source(open_source(found.path))
        note(f"{source}: {found}; compressing to {size or _bits(wanted)} into {out}")
        with show_progress() as (on_progress, rate):
            on_progress("open", 0, 0)
            from transformers.utils import logging  # and torch: what was mistyped has been answered without them

            from seedlm.compress.run import compress_checkpoint

            logging.disable_progress_bar()
            report = compress_checkpoint(
                found.path, out, **asked, trust_remote_code=trust_remote_code, on_progress=on_progress, on_note=note
            )
    except KeyboardInterrupt as error:
        stopped(error, kept(out, "holds what is done", NOTHING_KEPT))
    run = {"seconds": round(time.monotonic() - start, 2), "weights_per_second": rate()}
    if as_json:
        print(json.dumps({**report.to_dict(), **run}, indent=2))
        return
    _print_totals(report)
    _print_dense(report)
    speed = f"; {run['weights_per_second'] / 1e6:.3f} million weights/s in the search" if run["weights_per_second"] else ""
    print(f"time              {run['seconds']:.1f} s{speed}")
    on_gpu = f", {in_bytes(report.peak_device_bytes)} on the GPU" if report.peak_device_bytes else ""
    print(f"memory            {in_bytes(report.peak_host_bytes)}{on_gpu}; on {', '.join(report.devices)}")
    _print_next(report)


def _bits(wanted: "Format | Mixture") -> str:
    from seedlm.compress.allocate import Mixture

    if isinstance(wanted, Mixture):
        return f"at most {wanted.bits:.3g} bits a weight, all that is stored counted"
    return f"{wanted.bits_per_weight:.3g} bits a weight"


def _format(
    source: str, bits: str, code: str, format: str | None, sensitivity: Path | None, size: str | None
) -> "Format | Mixture":
    """What is asked for: one format, or a mixture."""
    nbytes = None
    if size is not None:
        from seedlm.compress.plan import parse_size

        nbytes = parse_size(size, "--size")
    number = float(bits) if size is None and re.fullmatch(r"\d+(\.\d+)?", bits, re.ASCII) else None
    chosen = family(code)
    alone = [each.bits_per_weight for each in chosen.mixture]
    from seedlm.compress.allocate import Mixture

    if sensitivity is not None:
        if format is not None or (number is None and nbytes is None):
            raise FormatError("--sensitivity mixes formats to a number of --bits, such as 3.5; one of your own is not mixed")
        from seedlm.storage.sensitivity import read_sensitivity

        model, values = read_sensitivity(sensitivity)
        if model != source:  # rightly so for a fine-tuned model, or for another form of the same
            note(f"{sensitivity} was measured on {model!r}, and says little of any other model")
        return Mixture(bits=number, size=nbytes, sensitivity=values, formats=chosen.mixture)
    if nbytes is not None:
        return Mixture(size=nbytes, formats=chosen.mixture)
    if format is None and number is not None and bits not in chosen.presets and min(alone) < number < max(alone):
        return Mixture(bits=number, formats=chosen.mixture)
    if format is None and number is not None and bits not in chosen.presets:
        raise FormatError(f"--bits must be a number from {min(alone):g} to {max(alone):g}, got {bits}")
    return parse_format(format or bits, code)


def inspect(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Also read everything: check every code, and every tensor against its SHA-256.")
    ] = False,
) -> None:
    """Show the compressed tensors of a model: shape, format, bits per weight, error; then the totals."""
    from seedlm.storage.checkpoint import Checkpoint
    from seedlm.storage.inspect import inspect_checkpoint

    report = inspect_checkpoint(folder)
    if check:
        checkpoint = Checkpoint.open(folder)
        with show_progress() as (on_progress, _):
            on_progress("verify", 0, 0)
            checkpoint.verify()
            on_progress("check", 0, len(checkpoint.packed))
            for done, module in enumerate(checkpoint.packed, 1):
                checkpoint.tensor(module)
                on_progress("check", done, len(checkpoint.packed))
        by_digest = f"{len(checkpoint.digests)} of {len(checkpoint.files.entries)} tensors match their SHA-256"
        note(f"{by_digest}, {len(report.tensors)} compressed ones hold valid codes")
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    header = ("module", "shape", "format", "bits", "error")
    rows = [
        (printable(t.module), f"{t.shape[0]} x {t.shape[1]}", t.format, f"{t.bits_per_weight:.3f}", number(t.relative_error))
        for t in report.tensors
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    _print_totals(report)


def _dense_bytes(report: "Report") -> int:
    return max(0, report.bytes - round(report.bits_per_weight * report.compressed_weights / 8))


def _layers(report: "Report") -> tuple[int, float, int]:
    """Bytes of all but the compressed layers, as embeddings and head keep theirs at any bits, the layers' bits and weights."""
    outside = report.outside
    weights = report.compressed_weights - sum(tensor.weights for tensor in outside)
    bits = report.bits_per_weight * report.compressed_weights - sum(tensor.bits for tensor in outside)
    return max(0, report.bytes - round(bits / 8)), bits / weights if weights else 0.0, weights


def _print_dense(report: "RunReport") -> None:
    """What was left as it was, where that is much."""
    from seedlm.storage.checkpoint import Checkpoint

    dense = sorted(Checkpoint.open(report.folder).dense.items(), key=lambda item: -item[1].nbytes)[:2]
    if dense and _dense_bytes(report) > report.bytes / 4:
        largest = ", ".join(f"{name} {in_bytes(info.nbytes)}" for name, info in dense)
        show(f"                  these are {in_bytes(_dense_bytes(report))} of the size: {largest}")


def _print_next(report: "RunReport") -> None:
    """What to do with it, and what other bits would give."""
    from seedlm.integrations.transformers.before import has_chat_template

    kept, bits_now, weights = _layers(report)
    layer = next((tensor for tensor in report.tensors if tensor not in report.outside), report.tensors[0])
    known = family_of(parse_format(layer.format)).presets
    numbers = [float(name) for name in known if name.replace(".", "").isdigit()]
    others = [bits for bits in (3, 4, 5, 6) if abs(bits - bits_now) > 0.5 and bits in numbers]
    sizes = [f"{in_bytes(kept + bits * weights // 8)} at {bits} bits" for bits in others]
    print()
    if has_chat_template(Path(report.folder)) is False:
        show(f"let it write      seedlm generate {report.folder} TEXT        (or serve, bench)")
    else:
        show(f"talk with it      seedlm chat {report.folder}        (or generate, serve, bench)")
    show(f"what was lost     seedlm evaluate {report.folder} --reference SOURCE --text FILE")
    show(f"other sizes       {', '.join(sizes)}; --bits takes {min(numbers):g} to {max(numbers):g}")


def _print_totals(report: "Report") -> None:
    share = f", the original {in_bytes(report.source_bytes)}" if report.source_bytes else ""
    show(f"model             {report.folder}")
    sixteen = 2 * (report.compressed_weights + report.dense_weights)
    show(f"size              {in_bytes(report.bytes)}{share}; at 16 bits a weight it would be {in_bytes(sixteen)}")
    show(
        f"compressed        {len(report.tensors)} tensors, {report.compressed_weights:,} weights, "
        f"{report.bits_per_weight:.4f} bits each"
    )
    if outside := report.outside:
        tables = ", ".join(f"{printable(tensor.module)} in {tensor.bits_per_weight:.4f}" for tensor in outside)
        show(f"                  {tables}, the layers in {_layers(report)[1]:.4f}")
    show(
        f"left as it was    {report.dense_weights:,} weights; the whole model {report.model_bits_per_weight:.4f} bits a weight"
    )
    if report.feedback is not None:
        show(f"feedback          {report.feedback}{', which is data: this model is calibrated' if report.calibrated else ''}")
    if report.relative_error is not None and report.tensors:
        worst = max(report.tensors, key=lambda tensor: tensor.relative_error or 0.0)
        show(f"relative error    {report.relative_error:.4f}, largest {number(worst.relative_error)} in {worst.module}")
        if report.feedback not in (None, "none"):
            show("                  of the weights: feedback makes it larger, and what the model loses smaller")
