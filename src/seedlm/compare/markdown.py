"""The table of a comparison, as Markdown."""

from typing import Any

from seedlm.storage.untrusted import printable


def to_markdown(comparison: dict[str, Any]) -> str:
    """The table, what stands behind it, and what to beware of."""
    names, rows = table(comparison)
    lines = ["| " + " | ".join(map(_escape, names)) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
    lines += ["", explain(comparison), *(f"- {_escape(note)}" for note in comparison["notes"])]
    return "\n".join(lines) + "\n"


def table(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the cells of every model as people read them. Columns without any value are left out."""
    rows = comparison["models"]
    columns: list[tuple[str, list[str]]] = [
        ("model", [row["label"] for row in rows]),
        ("method", [row["method"] for row in rows]),
        ("data-free", [{True: "yes", False: "no", None: ""}[row["data_free"]] for row in rows]),
        ("bits per weight", [_number(row["bits_per_weight"], 3) for row in rows]),
        ("whole model", [_number(row["model_bits_per_weight"], 3) for row in rows]),
        ("MB", [_number(row["bytes"] / 1e6 if row["bytes"] is not None else None, 2) for row in rows]),
        ("perplexity", [_estimate(row["metrics"].get("perplexity")) for row in rows]),
        ("KL, nats", [_estimate(row["metrics"].get("kl")) for row in rows]),
        ("same top token, %", [_percent(row["metrics"].get("top1_agreement")) for row in rows]),
    ]
    for task in comparison["tasks"]:
        metric = next(row["tasks"][task]["metric"] for row in rows if task in row["tasks"])
        columns.append((f"{task} ({metric}), %", [_percent(row["tasks"].get(task)) for row in rows]))
    if len(comparison["tasks"]) > 1:
        columns.append(("mean of tasks, %", [_percent(row["tasks_mean"]) for row in rows]))
    columns = [(name, cells) for name, cells in columns if any(cells)]
    return [name for name, _ in columns], [list(cells) for cells in zip(*(cells for _, cells in columns), strict=True)]


def explain(comparison: dict[str, Any]) -> str:
    """One line: text, windows, and what the errors are."""
    text = comparison["text"]
    return (
        f"{_escape(text['path'].rpartition('/')[2])}: {text['windows']} windows of {comparison['context']} tokens. Bits per "
        "weight: of the compressed weights with all overhead, and of the whole model. ± is one standard error, over windows or "
        "questions."
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _estimate(found: dict[str, Any] | None) -> str:
    """Digits enough to show the standard error."""
    if found is None:
        return ""
    mean, error = found["mean"], found["standard_error"]
    if mean is None:
        return "not finite"
    digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 3
    return f"{mean:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error is not None else "")


def _percent(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    error = found["standard_error"]
    if found["mean"] is None:
        return ""
    return f"{100 * found['mean']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _escape(text: str) -> str:
    """What Markdown, and HTML inside it, would take for more than text."""
    for character in "\\|`*_[]<>":
        text = text.replace(character, f"&#{ord(character)};" if character in "<>" else f"\\{character}")
    return printable(" ".join(text.split()))
