"""The report: one HTML file that needs nothing but a browser.

Tables and the lineage are HTML made here; charts are Vega-Lite, drawn by the library that stands in the file, from the
comparison as JSON. A policy in the page forbids every connection, and every script but its own three by their SHA-256. All text
of others passes through `html.escape`, or through JSON and then `textContent`.
"""

import base64
import hashlib
import html
import json
from importlib.resources import files
from string import Template
from typing import Any, Final

from seedlm.compare.markdown import explain, table
from seedlm.errors import EvaluationError, extra

_LIBRARY: Final = "window.vegaEmbed = vegaEmbed;"
"""What the page calls; the bundle holds it with all that it needs."""


def to_html(comparison: dict[str, Any]) -> str:
    """The whole page. Raises EvaluationError without the plotting library."""
    try:
        import vl_convert
    except ImportError:
        raise EvaluationError(f"the HTML report needs vl-convert: {extra('report')}; the table and --json do not") from None
    here = files("seedlm.compare")
    library, script = vl_convert.javascript_bundle(_LIBRARY), (here / "page.js").read_text(encoding="utf-8")
    assert "</script" not in library.lower()
    names = [row["label"] for row in comparison["models"]]
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(" · ".join(names) if len(names) < 6 else f"{len(names)} models"),
        hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (library, script)),
        style=(here / "page.css").read_text(encoding="utf-8"),
        explain=html.escape(explain(comparison).replace("\\", "")),
        protocol=html.escape(comparison["protocol"]),
        version=html.escape(comparison["seedlm"]),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in comparison["notes"]),
        table=_table(comparison),
        lineage=_lineage(comparison["models"]),
        counts=_counts(comparison),
        data=json.dumps(comparison, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        library=library,
        script=script,
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _table(comparison: dict[str, Any]) -> str:
    """The table; a box in every compressed model's row chooses it for the charts and lists."""
    names, rows = table(comparison)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = []
    for place, (cells, row) in enumerate(zip(rows, comparison["models"], strict=True)):
        label = html.escape(cells[0])
        box = "" if row["original"] else f'<input type="checkbox" data-model="{place}" aria-label="show {label}">'
        first = f'<th scope="row"><label>{box}<span class="key" data-key="{place}"></span>{label}</label></th>'
        body.append(f"<tr>{first}" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells[1:]) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _lineage(rows: list[dict[str, Any]]) -> str:
    """A tree: the original, the methods, and what each made of it with which options."""

    def describe(row: dict[str, Any], known: tuple[str, ...] = ()) -> str:
        facts = [
            f"{row['bits_per_weight']:.3f} bits" if row["bits_per_weight"] else "",
            _megabytes(row["bytes"]),
            "" if row["options"] in known else row["options"],
        ]
        about = html.escape(", ".join(filter(None, facts)))
        name = f"<small>{html.escape(row['name'])}</small>" if row["name"] not in (row["label"], *known) else ""
        return f"<b>{html.escape(row['label'])}</b> <span>{about}</span> {name}"

    def branch(parent: int | None) -> str:
        methods: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["parent"] == parent and not row["original"]:
                methods.setdefault(row["method"].rpartition("-")[0] or row["method"], []).append(row)
        items = []
        for method, made in methods.items():
            kind = {True: "data-free", False: "calibrated", None: ""}[made[0]["data_free"]]
            options = made[0]["options"] or ""
            shared = options if len(made) > 1 and all(row["options"] == options for row in made) else ""
            leaves = "".join(f"<li>{describe(row, (rows[0]['name'], shared))}</li>" for row in made)
            about = html.escape(", ".join(filter(None, (kind, shared))))
            items.append(f"<li><i>{html.escape(method)}</i> <span>{about}</span><ul>{leaves}</ul></li>")
        return "".join(items)

    original = f"<li>{describe(rows[0])}<ul>{branch(0)}</ul></li>" if rows[0]["original"] else ""
    return f'<ul class="tree">{original}{branch(None)}</ul>'


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.2f} MB"


def _counts(comparison: dict[str, Any]) -> str:
    """How many questions every model lost and gained."""
    counts = {task: cells for task, cells in comparison["questions"]["counts"].items() if any(cells)}
    if not counts:
        return ""
    head = "".join(f'<th scope="col">{html.escape(task)}</th>' for task in counts)
    body = []
    for place, row in enumerate(comparison["models"]):
        cells = [column[place] for column in counts.values()]
        if not row["original"] and any(cells):
            texts = [f"&minus;{cell['lost']} +{cell['gained']} of {cell['questions']}" if cell else "" for cell in cells]
            body.append(
                f'<tr><th scope="row">{html.escape(row["label"])}</th>'
                + "".join(f"<td>{text}</td>" for text in texts)
                + "</tr>"
            )
    caption = "Questions answered right by the original but not by the model (&minus;), and the reverse (+)"
    head = f'<thead><tr><th scope="col">model</th>{head}</tr></thead>'
    return f'<div class="wide"><table><caption>{caption}</caption>{head}<tbody>{"".join(body)}</tbody></table></div>'
