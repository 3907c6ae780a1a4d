"""The results that are committed: one model through every preset and every baseline, by the commands that anybody can run.

    python bench/results.py run smollm2 SOURCE --wikitext wiki.test.raw --calibration c4.utf8 --task-data DATA --workers 8
    python bench/results.py run smollm2 SOURCE --wikitext wiki.test.raw --only trellis-4,trellis-3,trellis-3.5
    python bench/results.py run stories260k tests/data/stories260k --text stories.txt --calibration more.txt --context 512
    python bench/results.py render            # results/*.json -> docs/results.md

`run` expands a GGUF file once, then does for every row what ``seedlm compress`` and ``seedlm evaluate`` do: it compresses one
after the other, and measures in processes that take row after row. First the text with every row, then the zero-shot sets, so
that a run that is stopped has the first table whole; a row that takes long to make, or whose records are wanted for `seedlm
compare`, has all in one. Whole results are kept under WORK, where what is there is not made again, and what a table needs in
results/NAME.json, written anew after each; rows that were not asked for stay as they are there. A row that failed is named with
its error. `seedlm-B` is the block code's, `trellis-B` the trellis code's, whose text and statistics are made once for all.
Matrix products in float32 are allowed TF32 (PyTorch's "high"), the same for every row.
"""

import argparse
import gc
import json
import multiprocessing
import re
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

from seedlm.calibration import own_text
from seedlm.calibration.sensitivity import OwnText, measure_sensitivity
from seedlm.calibration.statistics import measure_statistics
from seedlm.codes.block.format import PRESETS
from seedlm.codes.registry import family, parse_format
from seedlm.compress.allocate import Mixture
from seedlm.compress.run import compress_checkpoint
from seedlm.device import choose_device
from seedlm.evaluation.methods import METHODS, baseline_names
from seedlm.evaluation.prompts import PROMPTS
from seedlm.evaluation.run import Settings, evaluate
from seedlm.evaluation.text import Text
from seedlm.evaluation.zeroshot import TASKS
from seedlm.integrations.transformers import models
from seedlm.storage.inspect import inspect_checkpoint
from seedlm.storage.sensitivity import read_sensitivity, write_sensitivity

ROOT = Path(__file__).parent.parent
MIXED = ("4.5", "4", "3.5", "3", "2.5")
"""Bits at which formats are also mixed by sensitivity."""
TRELLIS = ("4", "4.0", "4-fast", "3.5", "3", "3.0", "3-fast", "2.5", "2", "2-fast")
"""3.5, and 4.0 and 3.0 too, are mixtures: with everything that is stored they have at most so many bits a weight."""
RECORDED = ("original", "seedlm-4", "seedlm-4-mixed", "seedlm-3", "seedlm-3-mixed", "nf4-4", "gptq-3")
"""Rows whose predictions, layers, prompts and questions are kept, for a report of `seedlm compare`."""
LAYERS = {"embeddings": "dense", "head": "dense"}
"""Rows are of layers alone, as those of other methods."""
PLACE = ("device_name", "torch", "transformers", "float32_matmul_precision")
"""What rows of one table should have in common; a row says what was otherwise."""
MARKS = ("<!-- made by bench/results.py render -->", "<!-- end -->")
SHORT = {"arc_easy": "ARC-e", "arc_challenge": "ARC-c", "hellaswag": "HellaSwag", "winogrande": "WinoGrande", "boolq": "BoolQ"}


def run(options: argparse.Namespace) -> bool:
    """Every row of one model, and results/NAME.json; whether all are there."""
    start = time.monotonic()
    logging.disable_progress_bar()
    work = options.work / options.name
    work.mkdir(parents=True, exist_ok=True)
    ours = [f"seedlm-{preset}" for preset in PRESETS] + [f"seedlm-{bits}-mixed" for bits in MIXED]
    ours += [f"trellis-{bits}" for bits in TRELLIS]
    names = sorted(["original", *ours, *baseline_names()], key=_bits, reverse=True)
    if options.only:
        names = [name for name in names if name in options.only.split(",")]
    errors: dict[str, str] = {}

    def note(done: Future[tuple[str, str, str]]) -> None:
        name, error, said = done.result()
        if error:
            errors[name] = error
        print(f"[{time.monotonic() - start:5.0f} s] {said}", flush=True)
        _write(names, errors, work, options)

    # New processes: one forked after CUDA has begun could not use it.
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), _begin) as pool:
        for _ in range(options.workers):
            pool.submit(_begin)  # they start while this process goes on
        source = _expand(options.source, work / "original")
        ask = bool(options.task_data)
        whole = [name for name in names if _calibrated(name)]  # these take longest
        whole += [name for name in names if name in RECORDED and name not in whole]
        apart = [name for name in names if name not in whole]
        steps = [(name, True, ask) for name in whole] + [(name, True, False) for name in apart]
        steps += [(name, False, True) for name in apart if ask]
        # Ours have to be compressed first, here, while others are measured.
        steps.sort(key=lambda step: (not step[1], step[0] in ours))
        for name, text, tasks in steps:
            out = work / (f"{name}.json" if text else f"{name}.tasks.json")
            if out.exists():
                continue
            try:
                model = _compress(name, source, work) if name in ours else source
            except Exception as reason:
                errors[name] = _one_line(reason)
                print(f"{name}: FAILED to be compressed: {errors[name]}", flush=True)
                continue
            pool.submit(_measure, name, model, source if text else None, tasks, out, options).add_done_callback(note)
    _write(names, errors, work, options)
    print(f"{options.name}: {len(names) - len(errors)} of {len(names)} rows", flush=True)
    return not errors


def _write(names: list[str], errors: dict[str, str], work: Path, options: argparse.Namespace) -> None:
    """results/NAME.json of the rows so far."""
    rows = [_keep(name, work) for name in names if (work / f"{name}.json").exists()]
    if not rows:
        return
    shared = {key: rows[0].pop(key) for key in ("text", "protocol", "environment")}
    for row in rows[1:]:
        place = {key: row.pop(key) for key in shared}["environment"]
        if place["device_name"] != shared["environment"]["device_name"]:
            row["device_name"] = ("CPU, " if place["device"] == "cpu" else "") + place["device_name"]
    done = [row["name"] for row in rows]
    rows += [{"name": name, "error": error} for name, error in errors.items() if name not in done]
    place = options.out / f"{options.name}.json"
    if before := _read(place):
        assert before["text"] == shared["text"], f"{place} is of another text: {before['text']}"
        made = {row["name"] for row in rows}
        kept = [row for row in before["rows"] if row["name"] not in made]
        if kept:
            others = {
                key: shared["environment"][key] for key in PLACE if shared["environment"][key] != before["environment"][key]
            }
            rows = [{**row, "environment": others} if others and "error" not in row else row for row in rows]
            shared = {key: before[key] for key in shared}
        rows = sorted([*kept, *rows], key=lambda row: -_bits(row["name"]))
    results = {"model": options.name, "label": options.label or before.get("label", options.name), **shared, "rows": rows}
    options.out.mkdir(exist_ok=True)
    place.write_text(json.dumps(results, indent=1) + "\n")


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


def _begin() -> None:
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _measure(
    name: str, model: str, reference: str | None, tasks: bool, out: Path, options: argparse.Namespace
) -> tuple[str, str, str]:
    """One row on the text, if there is a reference, and on the tasks: its name, its error, and a line to say."""
    start = time.monotonic()
    recorded = name in RECORDED
    settings = Settings(
        context=options.context,
        limit=options.limit if reference else 1,
        batch_size=options.batch_size,
        dtype="float32",
        baseline=name if name in baseline_names() else None,
        calibration=options.calibration if _calibrated(name) else None,
        tasks=TASKS if tasks else (),
        task_data=options.task_data if tasks else None,
        task_limit=options.task_limit if tasks else None,
        task_batch=32,
        prompts=PROMPTS if recorded else (),
        layers=2 if recorded and name != "original" else 0,
    )
    text = Text.from_wikitext(options.wikitext) if options.wikitext else Text.from_file(options.text)
    try:
        found = evaluate(model, text, settings, reference=reference, out=out)
    except Exception as reason:  # whatever a library raises: the other rows go on
        said = f"{out.stem}: FAILED after {time.monotonic() - start:.0f} s\n{traceback.format_exc()[-3000:]}"
        return name, _one_line(reason), said
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    value = f"{found['metrics']['perplexity']['mean']:.3f} " if reference else ""
    memory = (found["run"]["peak_memory_bytes"] or 0) / 1e9
    return name, "", f"{out.stem}: {value}in {time.monotonic() - start:.0f} s, {memory:.1f} GB"


def _compress(name: str, source: str, work: Path) -> str:
    """The folder of one of our rows, compressed if it is not there."""
    folder, sensitivity, statistics = work / name, work / "sensitivity.json", work / "statistics.safetensors"
    if not folder.exists() and name.startswith("trellis-"):
        if not statistics.exists():
            network = models.load_model(Path(source), device=choose_device("auto"), dtype="float32")
            text = own_text.write_text(network, own_text.OwnText.for_device(choose_device("auto")))
            measure_statistics(network, text).save(statistics)
            del network
        bits, code = name.removeprefix("trellis-"), family("trellis")
        mixed = bits not in code.presets
        chosen = Mixture(bits=float(bits), formats=code.mixture) if mixed else parse_format(bits, "trellis")
        compress_checkpoint(source, folder, format=chosen, feedback=statistics, **LAYERS)
    elif not folder.exists():
        format: str | Mixture = name.removeprefix("seedlm-")
        if name.endswith("-mixed"):
            if not sensitivity.exists():
                network = models.load_model(Path(source), device=choose_device("auto"), dtype="float32")
                write_sensitivity(sensitivity, source, OwnText(), measure_sensitivity(network, OwnText()))
            format = Mixture(bits=_bits(name), sensitivity=read_sensitivity(sensitivity)[1], formats=family("block").mixture)
        chosen = format if isinstance(format, Mixture) else parse_format(format, "block")
        compress_checkpoint(source, folder, format=chosen, **LAYERS)
    torch.cuda.empty_cache()  # the GPU is shared
    if not (work / f"{name}.report.json").exists():
        (work / f"{name}.report.json").write_text(json.dumps(inspect_checkpoint(folder).to_dict()))
    return str(folder)


def _one_line(reason: Exception) -> str:
    return " ".join(f"{type(reason).__name__}: {reason}".split())[:300]


def _bits(name: str) -> float:
    """The bits in a row's name."""
    found = re.search(r"-([\d.]+)", name)
    return float(found[1]) if found else 16.0


def _calibrated(name: str) -> bool:
    method = METHODS.get(name.rpartition("-")[0])
    return method is not None and method.calibrated


def _keep(name: str, work: Path) -> dict[str, Any]:
    """What a table needs of one row's results."""
    found, asked, report = (_read(work / f"{name}{kind}.json") for kind in ("", ".tasks", ".report"))
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
            for task, answer in (found["tasks"] or asked.get("tasks", {})).items()
        },
        "text": {key: found["text"][key] for key in ("form", "sha256", "tokens", "windows", "predictions")},
        "protocol": found["protocol"],
        "environment": asked.get("environment", {}) | found["environment"],
    }


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


# ---- results/*.json -> docs/results.md ----


def render(folder: Path, out: Path) -> None:
    """The tables of every model, rows ordered by bits, and of the weights alone, between the two marks of a page."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if path.stem == "weight_space":
            parts.append(weight_table(found))
        elif "protocol" in found:  # others are of speed
            parts.append(model_table(found))
    before, _, rest = out.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    out.write_text("\n\n".join([before + MARKS[0], *parts, MARKS[1] + after]))


def model_table(found: dict[str, Any]) -> str:
    """One model's table in Markdown."""
    place, text = found["environment"], found["text"]
    whole = [row for row in found["rows"] if "error" not in row]
    rows = sorted(whole, key=lambda row: (-row["bits_per_weight"], row["perplexity"]["mean"]))
    tasks = [task for task in TASKS if any(task in row["tasks"] for row in rows)]
    head = ["", "bits", "relative error", "perplexity", "KL", "same top token", *(SHORT[task] for task in tasks)]
    lines = [
        f"## {found['label']}",
        "",
        f"{text['tokens']:,} tokens, {text['windows']} windows; {place['device_name']}, torch {place['torch']}, transformers "
        f"{place['transformers']}, float32 with matrix products at {place['float32_matmul_precision']!r} precision.",
        "",
        *_markdown([*head, *(["mean"] if tasks else [])], [_cells(row, tasks) for row in rows]),
    ]
    lines += ["", _agreement(rows, tasks)] if tasks else []
    for device in sorted({row["device_name"] for row in whole if "device_name" in row}):
        names = ", ".join(row["name"] for row in whole if row.get("device_name") == device)
        lines += ["", f"On another device ({device}): {names}."]
    for others in sorted({json.dumps(row["environment"]) for row in whole if "environment" in row}):
        names = ", ".join(row["name"] for row in whole if json.dumps(row.get("environment")) == others)
        lines += ["", f"Measured elsewhere ({', '.join(map(str, json.loads(others).values()))}): {names}."]
    failed = [row for row in found["rows"] if "error" in row]
    lines += ["", *(f"- `{row['name']}` did not run: {row['error']}" for row in failed)] if failed else []
    return "\n".join(lines)


def _agreement(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    """How well each set, and the two that are not at chance for a small model, put the compressed rows in the order of KL."""
    asked = [row for row in rows if row["name"] != "original" and row["tasks"]]
    scores = {SHORT[task]: [_score(row, task)["mean"] for row in asked] for task in tasks}
    if {"ARC-e", "HellaSwag"} <= scores.keys():
        scores["ARC-e and HellaSwag together"] = [sum(pair) for pair in zip(scores["ARC-e"], scores["HellaSwag"], strict=True)]
    found = {name: _rank_correlation([row["kl"]["mean"] for row in asked], values) for name, values in scores.items()}
    return (
        f"Rank correlation with KL, {len(asked)} rows: "
        + ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        + "."
    )


def _rank_correlation(*values: list[float]) -> float:
    """Spearman's: equal values share the mean of their ranks."""
    ranks = [(np.subtract.outer(line, line) > 0).sum(1) + (np.equal.outer(line, line)).sum(1) / 2 for line in values]
    return float(np.corrcoef(*ranks)[0, 1])


def _score(row: dict[str, Any], task: str) -> dict[str, float]:
    return row["tasks"][task].get("acc_norm", row["tasks"][task]["acc"])


def _cells(row: dict[str, Any], tasks: list[str]) -> list[str]:
    def pair(found: dict[str, float | None], digits: int, scale: float = 1) -> str:
        error = found["standard_error"]
        return f"{scale * (found['mean'] or 0):.{digits}f}" + (f" ± {scale * error:.{digits}f}" if error is not None else "")

    mark = "*" if row["calibrated"] else ""
    name = f"**{row['name']}**" if row["name"].startswith(("seedlm", "trellis")) else row["name"]
    error = f"{row['relative_error']:.4f}" if row["relative_error"] is not None else ""
    perplexity = row["perplexity"]["mean"]
    cells = [name + mark, f"{row['bits_per_weight']:.3f}", error]
    cells.append(pair(row["perplexity"], 2) if perplexity < 1000 else f"{perplexity:.2g}")
    cells += [pair(row["kl"], 3), pair(row["top1_agreement"], 1, 100)] if row["name"] != "original" else ["", ""]
    if not row["tasks"]:
        return cells + [""] * (len(tasks) + bool(tasks))
    scores = [_score(row, task) for task in tasks]
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
    command.add_argument("--label", help="the table's heading")
    text = command.add_mutually_exclusive_group(required=True)
    text.add_argument("--wikitext")
    text.add_argument("--text")
    command.add_argument("--calibration", help="a text for the methods that need one")
    command.add_argument("--task-data")
    command.add_argument("--context", type=int, default=2048)
    command.add_argument("--batch-size", type=int, default=4, help="windows in one forward pass")
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
    if options.command == "render":
        render(options.results, options.out)
    elif not run(options):
        sys.exit("rows failed; the same command tries them again")


if __name__ == "__main__":
    main()
