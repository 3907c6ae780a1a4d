"""The command line. One function per command; what takes time to import is imported inside it.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 refused with one line that says why, 130 stopped by
Ctrl-C.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seedlm.errors import BackendError, EvaluationError, SeedLMError
from seedlm.version import __version__

if TYPE_CHECKING:
    from seedlm.report import Report

app = typer.Typer(
    name="seedlm",
    help="Large language models whose weights are regrown from seeds: a quarter of the memory, no calibration data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: errors that have a message are one line, anything else is a bug and keeps its traceback."""
    try:
        app(standalone_mode=True)
    except SeedLMError as error:
        print(f"seedlm: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"seedlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    source: Annotated[str, typer.Argument(help="Folder of safetensors, GGUF file, or Hub repository (owner/name).")],
    out: Annotated[Path, typer.Argument(help="Folder to create. OUT.partial beside it holds the unfinished run.")],
    bits: Annotated[str, typer.Option(help="Bits per weight: 4 or 3, the paper's configurations.")] = "4",
    format: Annotated[
        str | None, typer.Option(help="A format instead of --bits, such as block-k16-c8-p3-q4-e4.", metavar="SPEC")
    ] = None,
    rounding: Annotated[str, typer.Option(help="How coefficients are chosen: best, or the paper's own nearest.")] = "best",
    dtype: Annotated[
        str | None, typer.Option(help="Store what is not compressed as bfloat16, float16 or float32; default: as it is.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Also compress modules that match this glob, such as lm_head.", metavar="GLOB")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave modules that match this glob as they are; wins.", metavar="GLOB")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.", metavar="SIZE")] = "5GB",
    device: Annotated[str, typer.Option(help="Where to search: auto (the GPU if there is one), cpu, cuda, cuda:1.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="Search backend: auto, triton, numba or torch; all give the same bits.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Compress a model into a new folder.

    The linear layers inside numbered layers are compressed; embeddings, head, norms, biases and routers stay as they are.
    Stopped at any moment, the same command goes on where it was.
    """
    from seedlm.compress import compress_checkpoint

    start = time.monotonic()
    try:
        with _progress() as (on_progress, rate):
            report = compress_checkpoint(
                source,
                out,
                format=format or bits,
                rounding=rounding,  # type: ignore[arg-type]  # checked inside, with the allowed values in the message
                dtype=dtype,
                include=include or (),
                exclude=exclude or (),
                max_shard_size=max_shard_size,
                device=device,
                backend=backend,  # type: ignore[arg-type]
                revision=revision,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        print(f"seedlm: stopped; run the same command again to go on ({out}.partial holds what is done)", file=sys.stderr)
        sys.exit(130)
    run = {"seconds": round(time.monotonic() - start, 2), "weights_per_second": rate()}
    if as_json:
        print(json.dumps({**report.to_dict(), **run}, indent=2))
        return
    _print_totals(report)
    speed = f", {run['weights_per_second'] / 1e6:.3f} million weights/s" if run["weights_per_second"] else ""
    print(f"time              {run['seconds']:.1f} s{speed}")


@app.command()
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
    expand: Annotated[
        bool, typer.Option("--expand", help="Regrow all weights once after loading: faster on a CPU, full size in memory.")
    ] = False,
) -> None:
    """Generate text, printed as it comes; then, on stderr, the speed."""
    from seedlm.generate import Timing
    from seedlm.generate import generate as pieces

    timing = Timing()
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "chat": chat}
    for piece in pieces(model, prompt, **options, device=device, dtype=dtype, expand=expand, timing=timing):  # type: ignore[arg-type]
        print(piece, end="", flush=True)
    print()
    print(
        f"{timing.tokens} tokens in {timing.seconds:.1f} s, {timing.tokens / timing.seconds:.1f} tokens/s; "
        f"loaded in {timing.load_seconds:.1f} s",
        file=sys.stderr,
    )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Also read and check every code.")] = False,
) -> None:
    """Show the compressed tensors of a model: shape, format, bits per weight, error; then the totals."""
    from seedlm.checkpoint import Checkpoint
    from seedlm.report import inspect_checkpoint

    report = inspect_checkpoint(folder)
    if check:
        checkpoint = Checkpoint.open(folder)
        for module in checkpoint.packed:
            checkpoint.tensor(module)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    header = ("module", "shape", "format", "bits", "error")
    rows = [
        (t.module, f"{t.shape[0]} x {t.shape[1]}", t.format, f"{t.bits_per_weight:.3f}", _number(t.relative_error))
        for t in report.tensors
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    _print_totals(report)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, packed or not, GGUF file, or Hub repository (owner/name).")],
    wikitext: Annotated[
        Path | None, typer.Option(help="The raw WikiText-2 file, wiki.test.raw, joined as papers do.", metavar="FILE")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Any text file instead, as it is.", metavar="FILE")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with, token by token: the original.", metavar="MODEL")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.", metavar="TOKENS")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Score the first N windows only.", metavar="N")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.", metavar="N")] = 1,
    device: Annotated[str, typer.Option(help="auto, or a torch device such as cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    packed: Annotated[bool, typer.Option("--packed", help="Leave packed weights packed: less memory, slower.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to create; OUT.partial beside it holds the unfinished run.", metavar="FILE")
    ] = None,
    tokens_out: Annotated[Path | None, typer.Option(help=".npz file to create: every prediction.", metavar="FILE")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks too: names with commas between, or 'paper' for its five.", metavar="NAMES"),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of local files for the tasks, instead of the Hub.", metavar="FOLDER")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="The first N questions of each task only.", metavar="N")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from a reference.

    Perplexity by the papers' protocol; with a reference also KL divergence and agreement on the most likely token. Stopped at
    any moment, the same command with --out goes on where it was.
    """
    from transformers.utils import logging

    from seedlm.evaluate import Settings, Text
    from seedlm.evaluate import evaluate as run
    from seedlm.zeroshot import TASKS

    if (wikitext is None) == (text is None):
        raise EvaluationError("give a text: --wikitext FILE (wiki.test.raw) or --text FILE, one of them")
    logging.set_verbosity_error()  # a text is longer than a model's context, which its tokenizer warns about
    logging.disable_progress_bar()
    try:
        with _progress() as (on_progress, _):
            results = run(
                model,
                Text.from_wikitext(wikitext) if wikitext else Text.from_file(text or ""),
                Settings(
                    context=context,
                    limit=limit,
                    batch_size=batch_size,
                    device=device,
                    dtype=dtype,
                    packed=packed,
                    tasks=TASKS if tasks == "paper" else tuple(tasks.split(",")) if tasks else (),
                    task_data=str(task_data) if task_data else None,
                    task_limit=task_limit,
                ),
                reference=reference,
                out=out,
                tokens_out=tokens_out,
                revision=revision,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        partial = Path(f"{out}.partial")
        kept = f"; run the same command again to go on ({partial} holds what is done)" if partial.exists() else ""
        print(f"seedlm: stopped{kept}", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        _print_results(results)


def _print_results(results: dict[str, Any]) -> None:
    def estimate(name: str) -> str:
        value, error = results["metrics"][name].values()
        return f"{value:.4f}" + (f" +- {error:.4f}" if error is not None else "")

    for role in ("model", "reference"):
        if info := results[role]:
            bits = [f"{info['bits_per_weight']:.4f} bits a weight"] if info["bits_per_weight"] else []
            bits += [f"the whole model {info['model_bits_per_weight']:.4f}"] if info["model_bits_per_weight"] else []
            print(f"{role:17} {info['name']} ({', '.join([info['format'], *bits, _bytes(info['bytes'])])})")
    facts, run, place = results["text"], results["run"], results["environment"]
    bos = "starting with" if facts["starts_with_bos"] else "without"
    print(f"text              {facts['path']}: {facts['form']}; {facts['tokens']:,} tokens, {bos} BOS")
    print(
        f"protocol          {facts['windows']} windows of {results['settings']['context']} tokens, each alone, "
        f"{facts['predictions']:,} predictions; errors are standard errors over windows"
    )
    print(f"perplexity        {estimate('perplexity')}")
    if results["reference"]:
        print(f"of the reference  {estimate('reference_perplexity')}; ratio {estimate('perplexity_ratio')}")
        print(f"KL divergence     {estimate('kl')} nats a token")
        print(f"same top token    {estimate('top1_agreement')} of all")
    speed = [f"{run['tokens_per_second']:,.0f} tokens/s"] if run["tokens_per_second"] else []
    memory = [f"at most {_bytes(run['peak_memory_bytes'])} of memory"] if run["peak_memory_bytes"] else []
    for task, answer in results["tasks"].items():
        kind = "acc_norm" if "acc_norm" in answer else "acc"
        accuracy, error = answer[kind].values()
        print(f"{task:17} {accuracy:.4f} +- {error:.4f} ({kind}, {answer['questions']} questions, version {answer['version']})")
    print("time              " + ", ".join([f"{run['seconds']:.1f} s", *speed, *memory]))
    print(f"on                {place['device_name']} ({place['device']}), {run['dtype']}, torch {place['torch']}")


@app.command()
def rtl(
    output: Annotated[Path, typer.Option("--output", "-o", help="Verilog file to write.")],
    bits: Annotated[str, typer.Option(help="Format: 4, 3, or a specification such as block-k12-c4-p2-q4-e4.")] = "4",
    fp16: Annotated[bool, typer.Option("--fp16", help="Write the FP16 reference design instead.")] = False,
    beat_bits: Annotated[int, typer.Option(help="Width of the memory streams in bits, a power of two.")] = 512,
    max_features: Annotated[int, typer.Option(help="Activations held on chip.")] = 32768,
) -> None:
    """Write the matrix-vector product of a format as synthesisable Verilog."""
    from seedlm.format import parse_format
    from seedlm.rtl.design import HalfDesign, SeedDesign

    try:
        from seedlm.rtl.verilog import emit
    except ImportError as error:
        raise BackendError(f"seedlm rtl needs {error.name}: pip install 'seedlm[rtl]'") from None
    sizes = {"beat_bits": beat_bits, "max_features": max_features}
    design = HalfDesign(**sizes) if fp16 else SeedDesign(format=parse_format(bits), **sizes)
    output.write_text(emit(design))
    print(f"{output}: {design.prefix}_matvec, {design.lanes} multipliers, {design.beat_bits // 8} bytes a clock")


def _print_totals(report: "Report") -> None:
    share = f", the original {_bytes(report.source_bytes)}" if report.source_bytes else ""
    print(f"model             {report.folder}")
    sixteen = 2 * (report.compressed_weights + report.dense_weights)
    print(f"size              {_bytes(report.bytes)}{share}; at 16 bits a weight it would be {_bytes(sixteen)}")
    print(
        f"compressed        {len(report.tensors)} tensors, {report.compressed_weights:,} weights, "
        f"{report.bits_per_weight:.4f} bits each"
    )
    print(
        f"left as it was    {report.dense_weights:,} weights; the whole model {report.model_bits_per_weight:.4f} bits a weight"
    )
    if report.relative_error is not None and report.tensors:
        worst = max(report.tensors, key=lambda tensor: tensor.relative_error or 0.0)
        print(f"relative error    {report.relative_error:.4f}, largest {_number(worst.relative_error)} in {worst.module}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@contextmanager
def _progress() -> Iterator[tuple[Any, Any]]:
    """A progress bar on stderr, only if that is a terminal: the callback for it, and the rate of the search so far."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            prefix, unit = task.fields["unit"]
            scale = {"M": 1e6, "k": 1e3}[prefix]
            speed = task.finished_speed or task.speed
            rate = f" {speed / scale:6.3f} {prefix}/s" if speed else ""
            return Text(f"{task.completed / scale:.1f} / {(task.total or 0) / scale:.1f} {prefix} {unit}{rate}")

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Amount(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    labels = {
        "read": ("Reading the source", ("M", "bytes")),
        "compress": ("Searching seeds", ("M", "weights")),
        "evaluate": ("Scoring", ("k", "tokens")),
    }
    tasks: dict[str, Any] = {}
    started: dict[str, tuple[float, int]] = {}
    latest: dict[str, tuple[float, int]] = {}

    def on_progress(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            label, unit = labels[phase]
            tasks[phase] = bar.add_task(label, total=total, completed=done, unit=unit)
            started[phase] = (time.monotonic(), done)
        latest[phase] = (time.monotonic(), done)
        bar.update(tasks[phase], completed=done)

    def rate() -> float | None:
        """Weights per second of this run's search; None if nothing was left to search."""
        if "compress" not in started:
            return None
        seconds, weights = (end - begin for end, begin in zip(latest["compress"], started["compress"], strict=True))
        return weights / seconds if weights and seconds > 0 else None

    with bar:
        yield on_progress, rate
