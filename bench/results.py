"""The results that are committed: one model through every preset and every baseline, by the commands that anybody can run.

    python bench/results.py run smollm2 SOURCE --wikitext wiki.test.raw --calibration c4.utf8 --task-data DATA --workers 8
    python bench/results.py run stories260k tests/data/stories260k --text stories.txt --calibration more.txt --context 512
    python bench/results.py render            # results/*.json -> docs/results.md

`run` expands a GGUF file once, then starts ``seedlm compress`` and ``seedlm evaluate`` for every row, several at a time on one
device, keeps their whole results under WORK, where a row that is there already is not made again, and writes what a table
needs to results/NAME.json. A row that failed is written
down with its last line of error. Matrix products in float32 are allowed TF32 (PyTorch's "high"), the same for every row.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from seedlm import models
from seedlm.baselines import METHODS, baseline_names
from seedlm.format import PRESETS

ROOT = Path(__file__).parent.parent
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq")
MIXED = ("3.5", "3", "2.5")
"""Bits at which formats are also mixed by sensitivity."""
MARKS = ("<!-- made by bench/results.py render -->", "<!-- end -->")
SHORT = {"arc_easy": "ARC-e", "arc_challenge": "ARC-c", "hellaswag": "HellaSwag", "winogrande": "WinoGrande", "boolq": "BoolQ"}


def run(options: argparse.Namespace) -> None:
    """Every row of one model, then results/NAME.json."""
    work = options.work / options.name
    work.mkdir(parents=True, exist_ok=True)
    source = _expand(options.source, work / "original")
    names = ["original", *(f"seedlm-{preset}" for preset in PRESETS), *(f"seedlm-{bits}-mixed" for bits in MIXED)]
    names += baseline_names()
    names.sort(key=lambda name: not _calibrated(name))  # these take longest
    if options.only:
        names = [name for name in names if name in options.only.split(",")]
    start = time.monotonic()
    sensitivity = work / "sensitivity.json"
    if any(name.endswith("-mixed") for name in names) and not sensitivity.exists():
        with suppress(subprocess.CalledProcessError):  # then the rows that need it fail and say so
            _seedlm("sensitivity", source, "-o", str(sensitivity))
    with ThreadPoolExecutor(options.workers) as pool:
        rows = list(pool.map(lambda name: _row(name, source, work, options), names))
    whole = [row for row in rows if "error" not in row]
    shared = {key: whole[0].pop(key) for key in ("text", "protocol", "environment")}
    for row in whole[1:]:
        place = {key: row.pop(key) for key in shared}["environment"]
        if place["device_name"] != shared["environment"]["device_name"]:
            row["device_name"] = place["device_name"]
    seconds = round(time.monotonic() - start)
    results = {"model": options.name, "label": options.label, "seconds": seconds, **shared, "rows": rows}
    options.out.mkdir(exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{options.name}: {len(whole)} of {len(rows)} rows in {seconds} s", flush=True)


def _expand(source: str, folder: Path) -> str:
    """A GGUF file as a folder of float32 weights, so that the rows do not expand it once each; anything else as it is."""
    if not source.endswith(".gguf"):
        return source
    if not folder.exists():
        path = Path(source)
        options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        AutoModelForCausalLM.from_pretrained(path.parent, **options).save_pretrained(folder)
        models.load_tokenizer(path).save_pretrained(folder)
    return str(folder)


def _row(name: str, source: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    out, model, extra = work / f"{name}.json", source, []
    report = work / f"{name}.report.json"
    start = time.monotonic()
    try:
        if name.startswith("seedlm-"):
            model = str(work / name)
            if not out.exists():
                bits, mixed = name.removeprefix("seedlm-").removesuffix("-mixed"), name.endswith("-mixed")
                how = ["--sensitivity", str(work / "sensitivity.json")] if mixed else []
                _seedlm("compress", source, model, "--bits", bits, *how)
                report.write_text(_seedlm("inspect", model, "--json"))
        elif name != "original":
            extra = ["--baseline", name]
            if _calibrated(name):
                extra += ["--calibration", options.calibration]
        if not out.exists():
            text = ["--wikitext", options.wikitext] if options.wikitext else ["--text", options.text]
            size = ["--context", str(options.context), "--dtype", "float32"]
            tasks = ["--tasks", "paper", "--task-data", options.task_data] if options.task_data else []
            limits = [f"--limit={options.limit}"] * bool(options.limit) + [f"--task-limit={options.task_limit}"] * bool(
                options.task_limit
            )
            small = ["--new-tokens", "1", "--layers", "0"]  # its companion file stays here
            _seedlm("evaluate", model, "--reference", source, *text, *size, *tasks, *limits, *small, *extra, "--out", str(out))
    except subprocess.CalledProcessError as reason:
        lines = [line for line in (reason.stderr or "").splitlines() if line.strip()]
        print(f"{name}: FAILED after {time.monotonic() - start:.0f} s\n" + "\n".join(lines[-15:]), flush=True)
        return {"name": name, "error": lines[-1][:300] if lines else str(reason)}
    found = json.loads(out.read_text())
    print(f"{name}: {found['metrics']['perplexity']['mean']:.3f} in {time.monotonic() - start:.0f} s", flush=True)
    return _keep(name, found, json.loads(report.read_text()) if report.exists() else {})


def _seedlm(*arguments: str) -> str:
    command = [sys.executable, "-m", "seedlm", *arguments]
    environment = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "OMP_NUM_THREADS": "2", **os.environ}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _calibrated(name: str) -> bool:
    method = METHODS.get(name.rpartition("-")[0])
    return method is not None and method.calibrated


def _keep(name: str, found: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """What a table needs of one run's results."""
    baseline = found["run"]["baseline"] or {}
    if report:
        kind = {
            "libraries": {"seedlm": found["environment"]["seedlm"]},
            "options": found["model"]["format"],
            "calibrated": False,
        }
        baseline = {**kind, "bits_per_weight": report["bits_per_weight"], "relative_error": report["relative_error"]}
    metrics = ("perplexity", "kl", "top1_agreement", "perplexity_ratio")
    return {
        "name": name,
        **{key: baseline.get(key) for key in ("libraries", "options", "calibrated", "calibration_tokens")},
        "bits_per_weight": baseline.get("bits_per_weight", 16.0),
        "relative_error": baseline.get("relative_error"),
        **{key: found["metrics"][key] for key in metrics},
        "tasks": {
            task: {key: answer[key] for key in ("acc", "acc_norm", "questions", "version") if key in answer}
            for task, answer in found["tasks"].items()
        },
        "text": {key: found["text"][key] for key in ("form", "sha256", "tokens", "windows", "predictions")},
        "protocol": found["protocol"],
        "environment": found["environment"],
    }


# ---- results/*.json -> docs/results.md ----


def render(folder: Path, out: Path) -> None:
    """The tables of every model, rows ordered by bits, and of the weights alone, between the two marks of a page."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        parts.append(weight_table(found) if path.stem == "weight_space" else model_table(found))
    before, _, rest = out.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    out.write_text("\n\n".join([before + MARKS[0], *parts, MARKS[1] + after]))


def model_table(found: dict[str, Any]) -> str:
    """One model's table in Markdown."""
    place, text = found["environment"], found["text"]
    whole = [row for row in found["rows"] if "error" not in row]
    rows = sorted(whole, key=lambda row: (-row["bits_per_weight"], row["perplexity"]["mean"]))
    tasks = [task for task in TASKS if task in rows[0]["tasks"]]
    head = ["", "bits", "relative error", "perplexity", "KL", "same top token", *(SHORT[task] for task in tasks)]
    lines = [
        f"## {found['label']}",
        "",
        f"{text['tokens']:,} tokens, {text['windows']} windows; {place['device_name']}, torch {place['torch']}, transformers "
        f"{place['transformers']}, float32 with matrix products at {place['float32_matmul_precision']!r} precision.",
        "",
        *_markdown([*head, *(["mean"] if tasks else [])], [_cells(row, tasks) for row in rows]),
    ]
    for device in sorted({row["device_name"] for row in whole if "device_name" in row}):
        names = ", ".join(row["name"] for row in whole if row.get("device_name") == device)
        lines += ["", f"On another device ({device}): {names}."]
    failed = [row for row in found["rows"] if "error" in row]
    lines += ["", *(f"- `{row['name']}` did not run: {row['error']}" for row in failed)] if failed else []
    return "\n".join(lines)


def _cells(row: dict[str, Any], tasks: list[str]) -> list[str]:
    def pair(found: dict[str, float | None], digits: int, scale: float = 1) -> str:
        error = found["standard_error"]
        return f"{scale * (found['mean'] or 0):.{digits}f}" + (f" ± {scale * error:.{digits}f}" if error is not None else "")

    mark = "*" if row["calibrated"] else ""
    name = f"**{row['name']}**" if row["name"].startswith("seedlm") else row["name"]
    error = f"{row['relative_error']:.4f}" if row["relative_error"] is not None else ""
    perplexity = row["perplexity"]["mean"]
    cells = [name + mark, f"{row['bits_per_weight']:.3f}", error]
    cells.append(pair(row["perplexity"], 2) if perplexity < 1000 else f"{perplexity:.2g}")
    cells += [pair(row["kl"], 3), pair(row["top1_agreement"], 1, 100)] if row["name"] != "original" else ["", ""]
    scores = [row["tasks"][task].get("acc_norm", row["tasks"][task]["acc"]) for task in tasks]
    cells += [pair(score, 1, 100) for score in scores]
    if scores:  # the sets are independent, so their errors add in squares
        mean = sum(score["mean"] for score in scores) / len(scores)
        spread = sum(score["standard_error"] ** 2 for score in scores) ** 0.5 / len(scores)
        cells.append(f"{100 * mean:.1f} ± {100 * spread:.1f}")
    return cells


def weight_table(found: dict[str, Any]) -> str:
    """Squared relative errors in Markdown."""
    sources = list(found["sources"])
    rows = []
    for row in sorted(found["rows"], key=lambda row: -row["bits_per_weight"]):
        name = f"**{row['name']}**" if row["name"].startswith("seedlm") else row["name"]
        errors = [row["errors"].get(source) for source in sources]
        cells = ["" if error is None else f"{error[1]:.4f}" + _real(error[0], row) for error in errors]
        rows.append([name, f"{row['bits_per_weight']:.3f}", f"{4 ** -row['bits_per_weight']:.4f}", *cells])
    head = ["", "bits", "Shannon 4^-R", *(found["sources"][source] for source in sources)]
    return "\n".join(["## Weights alone", "", *_markdown(head, rows)])


def _real(bits: float, row: dict[str, Any]) -> str:
    """The bits of this column, where its shapes make them differ from the first column's."""
    return f" ({bits:.2f} b)" if abs(bits - row["bits_per_weight"]) > 0.03 else ""


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.add_argument("name")
    command.add_argument("source")
    command.add_argument("--label", required=True, help="the table's heading")
    text = command.add_mutually_exclusive_group(required=True)
    text.add_argument("--wikitext")
    text.add_argument("--text")
    command.add_argument("--calibration", required=True)
    command.add_argument("--task-data")
    command.add_argument("--context", type=int, default=2048)
    command.add_argument("--limit", type=int)
    command.add_argument("--task-limit", type=int)
    command.add_argument("--only", help="names of rows, with commas between")
    command.add_argument("--workers", type=int, default=1)
    command.add_argument("--work", type=Path, default=Path("build/results"))
    command.add_argument("--out", type=Path, default=ROOT / "results")
    command = commands.add_parser("render")
    command.add_argument("--results", type=Path, default=ROOT / "results")
    command.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    run(options) if options.command == "run" else render(options.results, options.out)


if __name__ == "__main__":
    main()
