"""``seedlm bench``."""

import json
from typing import Annotated, Any

import typer

from seedlm.cli.console import in_bytes, note, show, show_progress
from seedlm.cli.options import Backend, Device, Dtype, TrustRemoteCode


def bench(
    model: Annotated[str, typer.Argument(help="Model folder or Hub repository, compressed or not.")],
    tokens: Annotated[int, typer.Option(help="New tokens.", metavar="N")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens before them, random ones.", metavar="N")] = 512,
    repeats: Annotated[int, typer.Option(help="Runs: the median is shown, with the least and the most.", metavar="N")] = 3,
    compiled: Annotated[
        bool, typer.Option("--compile", help="A static cache, compiled by transformers, with CUDA graphs. Takes minutes.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="Only say which backend multiplies, and why no other.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure how fast a model generates here: compressed, dense, and in bitsandbytes' NF4 where that is installed.

    Memory is that of all weights ("weights"), and on a GPU the most that torch had at a time ("peak"). On a CPU it is that of
    this process, with libraries and mapped files ("process"), when its first row is done: later rows would have in it what
    went before. So what a dense model takes is shown by `seedlm bench` of its own folder.
    """
    from seedlm.evaluation.settings import SpeedSettings, check_room
    from seedlm.integrations.transformers.before import check_backend, find, longest_text
    from seedlm.storage.checkpoint import Checkpoint

    counts: dict[str, Any] = {"tokens": tokens, "prompt_tokens": prompt_tokens, "repeats": repeats}
    where: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "trust_remote_code": trust_remote_code}
    settings = SpeedSettings(**counts, compiled=compiled, **where)
    there = find(model, tell=note)
    check_backend(backend, there.path)
    if explain:
        Checkpoint.open(there.path)
        from seedlm.evaluation.speed import explain_backends

        kinds = explain_backends(model, device, backend)
        print(json.dumps(kinds, indent=2)) if as_json else _print_backends(kinds)
        return
    check_room(longest_text(there.path), settings)
    note(f"{model}: {there}; {tokens} tokens after {prompt_tokens}, {repeats} times each")
    with show_progress() as (on_progress, _):
        on_progress("load", 0, 0)
        from transformers.utils import logging  # and torch: what was mistyped has been answered without them

        from seedlm.evaluation.speed import measure_speed

        logging.set_verbosity_error()  # it warns of prompts that are longer than a model is used to
        logging.disable_progress_bar()
        found = measure_speed(model, settings, on_progress)
    print(json.dumps(found, indent=2)) if as_json else _print_rows(found)


def _print_rows(found: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    compiled = "compiled" if found["compiled"] else "not compiled"
    show(f"{found['model']}: {found['tokens']} tokens after {found['prompt_tokens']}, batch 1, {found['dtype']}, {compiled}")
    show(f"{found['device_name']} ({found['device']}), {versions}")
    memory = "process" if found["rows"][0]["process_bytes"] is not None else "peak"
    table = [["", "tokens/s", "first token", "prompt tokens/s", "weights", memory]]
    for row in found["rows"]:
        peak = in_bytes(row[f"{memory}_bytes"]) if row[f"{memory}_bytes"] is not None else "-"
        rate, first = _spread(row, "tokens_per_second"), _spread(row, "first_token_seconds", 1e3, " ms")
        prompt = f"{row['prompt_tokens_per_second']:.1f}"
        table.append([row["what"], rate, first, prompt, in_bytes(row["weight_bytes"]), peak])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells, row in zip(table, [{}, *found["rows"]], strict=True):
        backends = ", ".join(f"{name} ({count} layers)" for name, count in row.get("backends", {}).items())
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        show(f"{cells[0]:8}{line}  {backends}".rstrip())
    if memory == "process" and found["rows"][0]["compiler"]:
        show("process has numba and LLVM in it, which compiled kernels; once more, it may do without")
    for what, reason in found["left_out"].items():
        show(f"{what:8}{reason}")


def _spread(row: dict[str, Any], name: str, scale: float = 1.0, unit: str = "") -> str:
    """The median of the runs, and the least and the most of them, if there were several."""
    median, least, most = (scale * value for value in (row[name], *row[f"{name}_range"]))
    return f"{median:.1f}{unit}" + (f" ({least:.1f} to {most:.1f})" if least != most else "")


def _print_backends(kinds: list[dict[str, Any]]) -> None:
    for kind in kinds:
        rows, columns = kind["shape"]
        show(f"{kind['format']} {rows}x{columns}, {kind['weights']} weights: {kind['backend']}")
        for name, reason in kind["others"].items():
            show(f"  not {name}: {reason}")
