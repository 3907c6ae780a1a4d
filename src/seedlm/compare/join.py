"""Many runs as one JSON object: a row for every model, and beside it what changed in their behaviour.

A model's place in the lineage comes from fingerprints: a run's model was made from its reference. The original is the run
whose model all others were held against or, if nobody ran it, what the others say of it. Lists of items hold one entry for
every model, in the order of the rows; None where a run has no record of it.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Final

from seedlm.codes.registry import parse_format
from seedlm.compare.behaviour import compare_prompts, compare_questions, compare_tokens
from seedlm.compare.runs import Run
from seedlm.errors import FormatError
from seedlm.version import __version__

COMPARE_VERSION: Final = 1

_QUALITY: Final = {"kl": -1, "perplexity": -1, "top1_agreement": 1, "tasks": 1}
"""The measures of quality, and whether more (1) or less is better."""

_DENSE: Final = ("float32", "float16", "bfloat16", "float64")


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Join runs that `load_runs` found to be comparable: the object that `to_markdown` and `to_html` render."""
    original = _find_original(runs)
    has_original = original is not None or any(run.results["reference"] for run in runs)
    made = sorted(
        (run for run in runs if run is not original),
        key=lambda run: (-(_bits(run) or 0), _nll(run), run.label),
    )
    columns: list[Run | None] = [*made]
    rows = [_row(run) for run in made]
    if has_original:
        columns.insert(0, original)
        rows.insert(0, _row(original) if original else _reference_row(next(run for run in runs if run.results["reference"])))
    for row, run in zip(rows, columns, strict=True):
        row["original"] = row is rows[0] and has_original
        row["parent"] = 0 if run and run is not original and _made_from(run, rows[0]) else None
    tasks = list(dict.fromkeys(task for run in runs for task in _accuracies(run.results)))
    for row in rows:
        row["tasks_mean"] = _mean_of(row["tasks"], tasks)
    first = runs[0].results
    return {
        "compare_version": COMPARE_VERSION,
        "seedlm": __version__,
        "text": first["text"],
        "context": first["settings"]["context"],
        "protocol": first["protocol"],
        "tasks": tasks,
        "notes": _notes(runs, original),
        "models": rows,
        "fronts": {metric: {cost: _front(rows, metric, cost) for cost in ("bits_per_weight", "bytes")} for metric in _QUALITY},
        "layers": [_layers(run) for run in columns],
        "distributions": [((run and run.records) or {}).get("distributions") or None for run in columns],
        "tokens": compare_tokens(columns),
        "prompts": compare_prompts(columns),
        "questions": compare_questions(columns, tasks, has_original),
    }


def _find_original(runs: Sequence[Run]) -> Run | None:
    wanted = {run.results["reference"]["fingerprint"] for run in runs if run.results["reference"]}
    found = [run for run in runs if run.results["model"]["fingerprint"] in wanted and run.baseline is None]
    return min(found, key=lambda run: run.results["reference"] is not None, default=None)


def _row(run: Run) -> dict[str, Any]:
    model, results = run.results["model"], run.results
    row = {
        "label": run.label,
        "file": run.path.name,
        **_method(run),
        "name": model["name"],
        "fingerprint": model["fingerprint"],
    }
    row |= {key: model[key] for key in ("format", "bits_per_weight", "model_bits_per_weight", "weights", "bytes")}
    if run.baseline:
        row |= _baseline_size(model, run.baseline)
    row["metrics"] = {name: estimate for name, estimate in results["metrics"].items() if not name.startswith("reference_")}
    row["tasks"] = _accuracies(results)
    about, place = results["run"], results["environment"]
    row |= {key: about.get(key) for key in ("dtype", "tokens_per_second", "peak_memory_bytes")}
    row |= {key: place.get(key) for key in ("device_name", "torch", "transformers", "commit")}
    return row


def _reference_row(run: Run) -> dict[str, Any]:
    """The original as seen by a run that was held against it."""
    metrics, reference = run.results["metrics"], run.results["reference"]
    return {
        "label": "original",
        "file": None,
        "method": "original",
        "options": None,
        "data_free": None,
        **{key: reference[key] for key in ("name", "fingerprint", "format", "bits_per_weight")},
        **{key: reference[key] for key in ("model_bits_per_weight", "weights", "bytes")},
        "metrics": {"nll": metrics["reference_nll"], "perplexity": metrics["reference_perplexity"]},
        "tasks": {},
        "dtype": run.results["run"].get("reference_dtype"),
    }


def _method(run: Run) -> dict[str, Any]:
    """The method's name, its options, and whether it did without data; None where that does not arise or is not known."""
    if baseline := run.baseline:
        libraries = ", ".join(f"{name} {version}" for name, version in (baseline.get("libraries") or {}).items())
        options = "; ".join(filter(None, (baseline.get("options"), libraries)))
        return {"method": baseline["name"], "options": options, "data_free": not baseline.get("calibrated")}
    format = run.results["model"]["format"]
    if format in _DENSE:
        return {"method": "dense", "options": format, "data_free": None}
    try:
        for part in format.split(", "):
            parse_format(part)
    except FormatError:
        return {"method": format, "options": None, "data_free": None}
    formats, data_free = format.count(", ") + 1, not run.results["model"].get("calibrated")
    return {"method": "SeedLM", "options": format if formats == 1 else f"{formats} formats mixed", "data_free": data_free}


def _baseline_size(model: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """What a model would take on disk: its quantised weights in their bits, all others as they are stored now."""
    stored, count, bits = model["bits_per_weight"], baseline.get("weights"), baseline["bits_per_weight"]
    size: dict[str, Any] = {"bits_per_weight": bits, "bytes": None, "model_bits_per_weight": None, "format": baseline["name"]}
    if stored and count and model["weights"]:
        size["bytes"] = round(model["bytes"] - count * (stored - bits) / 8)
        size["model_bits_per_weight"] = 8 * size["bytes"] / model["weights"]
    return size


def _nll(run: Run) -> float:
    mean: float | None = run.results["metrics"]["nll"]["mean"]
    return math.inf if mean is None else mean


def _bits(run: Run) -> float | None:
    bits: float | None = (run.baseline or run.results["model"])["bits_per_weight"]
    return bits


def _accuracies(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the tasks that have one; tasks that generate text are measured otherwise, each in its own way, and not compared."""
    found = {}
    for task, result in results["tasks"].items():
        metric = "acc_norm" if "acc_norm" in result else "acc"
        if metric in result:
            found[task] = {"metric": metric, "questions": result["questions"], **result[metric]}
    return found


def _mean_of(results: dict[str, Any], tasks: list[str]) -> dict[str, float] | None:
    """Over all tasks, if it has them all; the tasks' errors are independent."""
    if not tasks or any(task not in results for task in tasks):
        return None
    mean = math.fsum(results[task]["mean"] for task in tasks) / len(tasks)
    return {"mean": mean, "standard_error": math.hypot(*(results[task]["standard_error"] for task in tasks)) / len(tasks)}


def _made_from(run: Run, row: dict[str, Any]) -> bool:
    source = run.results["reference"] or (run.results["model"] if run.baseline else None)
    return bool(row["original"] and source and source["fingerprint"] == row["fingerprint"])


def _front(rows: list[dict[str, Any]], metric: str, cost: str) -> list[int]:
    """The compressed models that no other beats on cost and quality, from the cheapest."""
    points = []
    for place, row in enumerate(rows):
        found = row["tasks_mean"] if metric == "tasks" else row["metrics"].get(metric)
        if found and found["mean"] is not None and row[cost] is not None and not row["original"]:
            points.append((row[cost], -_QUALITY[metric] * found["mean"], place))
    front: list[int] = []
    best = math.inf
    for _, loss, place in sorted(points):
        if loss < best:
            best = loss
            front.append(place)
    return front


def _layers(run: Run | None) -> dict[str, Any] | None:
    """Errors by module; the linear layers are left out where the method scales inputs and weights against each other."""
    found: dict[str, Any] | None = (run.records or {}).get("layers") if run else None
    if run is None or found is None:
        return None
    rescaled = run.baseline is not None and run.baseline.get("relative_error") is None
    return {
        "hidden": found["hidden"],
        "weight_error": None if rescaled else {row["module"]: row["weight_error"] for row in found["linears"]},
        "output_error": None if rescaled else {row["module"]: row["output_error"] for row in found["linears"]},
    }


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _short(value: str) -> str:
    """A commit as people write it; of another value what fits a line."""
    return value[:9] + value[40:] if re.fullmatch(r"[0-9a-f]{40}(-dirty)?", value) else value[:40]


def _notes(runs: Sequence[Run], original: Run | None) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    for what, section, key in (
        ("dtypes", "run", "dtype"),
        ("devices", "environment", "device_name"),
        ("versions of torch", "environment", "torch"),
        ("versions of transformers", "environment", "transformers"),
        ("commits of seedlm", "environment", "commit"),
    ):
        values = sorted({str(run.results.get(section, {}).get(key)) for run in runs})
        if len(values) > 1:
            notes.append(f"The runs have different {what}: {', '.join(map(_short, values))}.")
    alone = [run.label for run in runs if not run.results["reference"] and run is not original]
    if alone:
        notes.append(f"Measured without a reference, so without KL divergence and layers: {_list(alone)}.")
    bare = [run.label for run in runs if run.records is None]
    if bare:
        notes.append(f"No records beside the results, so no tokens, prompts, questions or layers: {_list(bare)}.")
    if any(run.baseline for run in runs):
        notes.append(
            "Sizes of models quantised after loading are computed: their bits a weight, and all else as the original stores it."
        )
    return notes
