"""``seedlm compare``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from seedlm.errors import EvaluationError


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Results of `seedlm evaluate --out`, two or more.", metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file to create: the report, one file for a browser.", metavar="FILE"),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option(help="JSON file to create: all that the report shows.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the Markdown table.")] = False,
) -> None:
    """Hold measured models side by side: a Markdown table, and with -o a report of what each costs, keeps and loses.

    The runs must be of one text, cut in one way; whatever lies beside their results (records) is shown too.
    """
    from seedlm.compare import compare_runs, load_runs, to_html, to_markdown
    from seedlm.storage.written import check_free, replacing

    for path in filter(None, (out, json_out)):
        check_free(path)
    comparison = compare_runs(load_runs(runs))
    text = json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        for file, content in ((out, to_html(comparison) if out else ""), (json_out, text)):
            if file:
                with replacing(file) as stream:
                    stream.write(content.encode())
    except OSError as reason:
        raise EvaluationError(f"{reason.filename}: cannot be written ({reason.strerror})") from None
    print(json.dumps(comparison, indent=1) if as_json else to_markdown(comparison), end="\n" if as_json else "")
