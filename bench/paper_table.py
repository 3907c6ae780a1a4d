"""The paper's table, for whoever has the weights: one command, the paper's figures beside the measured ones.

    python bench/paper_table.py llama-2-7b --wikitext wiki.test.raw
    python bench/paper_table.py llama-3-8b --wikitext wiki.test.raw --model /models/Meta-Llama-3-8B
    python bench/paper_table.py llama-3-70b --wikitext wiki.test.raw --packed
    python bench/paper_table.py my-model --wikitext wiki.test.raw --model /models/my-model    # the paper has no row of it

Compresses at 4 and 3 bits by the paper's block code and by the trellis code, this package's default. Then measures perplexity
(WikiText-2 raw test, windows of 2048 tokens; 166 with Llama-2's tokenizer) and the paper's five zero-shot sets (acc_norm where
a set has it) for the original and all of them, in float16. Stopped at any moment, the same command goes on where it was. A 70B
model in float16 takes 141 GB: --packed leaves the compressed ones packed (36 GB at 4 bits), --no-original skips the dense one.
The paper rounds coefficients to the nearest, as --rounding nearest does; the default finds a lower error. Embeddings and head
are left as they are, as in the paper.
"""

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TASKS: Final = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq")


@dataclass(frozen=True)
class Paper:
    """What was published of one model: perplexity and zero-shot mean in per cent, by bits; None where it was not."""

    repository: str
    perplexity: dict[str, float]
    zero_shot: dict[str, float]
    others: str


PAPER: Final = {
    "llama-2-7b": Paper("meta-llama/Llama-2-7b-hf", {"16": 5.5, "4": 5.7}, {}, "4 bits, channel-wise: AWQ 5.8, OmniQuant 6.1"),
    "llama-2-70b": Paper(
        "meta-llama/Llama-2-70b-hf",
        {"4": 3.5},
        {"4": 75.90},
        "4 bits, channel-wise: perplexity AWQ 3.5, OmniQuant 3.7; zero-shot AWQ 76.27",
    ),
    "llama-3-8b": Paper("meta-llama/Meta-Llama-3-8B", {}, {"16": 72.26, "4": 71.31, "3": 62.79}, ""),
    "llama-3-70b": Paper(
        "meta-llama/Meta-Llama-3-70B",
        {"4": 3.8},
        {"16": 79.51, "4": 78.06, "3": 74.68},
        "4 bits, channel-wise: perplexity AWQ 4.7, OmniQuant diverged",
    ),
}
"""SeedLM (ICLR 2025, arXiv 2410.10714); zero-shot there with lm-evaluation-harness 0.4.3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"{', '.join(PAPER)}, or a name of your own with --model")
    parser.add_argument("--wikitext", required=True, help="wiki.test.raw")
    parser.add_argument("--model", help="folder or repository of the weights; default: the Hub's")
    parser.add_argument("--task-data", help="folder of local files for the five sets; default: the Hub's")
    parser.add_argument("--no-tasks", action="store_true", help="perplexity only")
    parser.add_argument("--no-original", action="store_true", help="leave the dense model out")
    parser.add_argument("--packed", action="store_true", help="leave the compressed models packed while they are measured")
    parser.add_argument("--codes", default="block,trellis", help="which to compress by")
    parser.add_argument("--rounding", default="best", choices=["best", "nearest"])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window; the paper's is 2048")
    parser.add_argument("--limit", type=int, help="first windows and questions only, for a trial")
    options = parser.parse_args()
    if options.name not in PAPER and not options.model:
        parser.error(f"the paper has {', '.join(PAPER)}; any other model takes --model FOLDER, got {options.name!r} alone")
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.model or PAPER[options.name].repository
    results = {} if options.no_original else {"16": evaluate(source, "16-dense", options)}
    for code, bits in itertools.product(options.codes.split(","), ("4", "3")):
        kind = options.rounding if code == "block" else code
        folder = options.work / f"{options.name}-{bits}bit-{kind}"
        if not folder.exists():
            how = ["--code", code, "--bits", bits, "--embeddings", "dense", "--head", "dense", "--dtype", options.dtype]
            seedlm("compress", source, str(folder), *how, *(["--rounding", options.rounding] if code == "block" else []))
        results[f"{bits} {code}"] = evaluate(str(folder), f"{bits}-{kind}", options)
    print(table(options.name, results))


def evaluate(model: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's results, measured or found from an earlier run."""
    out = options.work / f"{options.name}-{name}.json"
    if not out.exists():
        arguments = ["--wikitext", options.wikitext, "--dtype", options.dtype, "--context", str(options.context)]
        arguments += [] if options.no_tasks else ["--tasks", "paper"]
        arguments += ["--task-data", options.task_data] if options.task_data else []
        arguments += ["--packed"] if options.packed and name != "16-dense" else []
        arguments += ["--limit", str(options.limit), "--task-limit", str(options.limit)] if options.limit else []
        seedlm("evaluate", model, *arguments, "--out", str(out))
    return dict(json.loads(out.read_text()))


def seedlm(*arguments: str) -> None:
    print("$ seedlm", *arguments, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "seedlm", *arguments], check=True, stdout=sys.stderr)


def table(name: str, results: dict[str, dict[str, Any]]) -> str:
    """Measured and published figures, a row for each code and number of bits."""
    paper = PAPER.get(name, Paper("", {}, {}, ""))
    windows = next(iter(results.values()))["text"]["windows"]
    lines = [
        f"{name}, WikiText-2, {windows} windows; zero-shot: mean of {', '.join(TASKS)}",
        f"{'bits':>10}{'perplexity':>20}{'paper':>8}{'zero-shot':>20}{'paper':>8}",
    ]
    for what, found in results.items():
        bits = "-" if what.endswith("trellis") else what.partition(" ")[0]  # of the block code the paper has figures
        mean, error = found["metrics"]["perplexity"].values()
        cells = [f"{mean:.3f} +- {error:.3f}" if error is not None else f"{mean:.3f}", _published(paper.perplexity, bits, 1)]
        if found["tasks"]:
            scores = [found["tasks"][task].get("acc_norm", found["tasks"][task]["acc"]) for task in TASKS]
            mean = sum(score["mean"] for score in scores) / len(scores)
            error = sum(score["standard_error"] ** 2 for score in scores) ** 0.5 / len(scores)
            cells += [f"{100 * mean:.2f} +- {100 * error:.2f}", _published(paper.zero_shot, bits, 2)]
        lines.append(f"{what:>10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (20, 8, 20, 8), strict=False)))
    return "\n".join([*lines, *([f"paper, {paper.others}"] if paper.others else [])])


def _published(figures: dict[str, float], bits: str, digits: int) -> str:
    return f"{figures[bits]:.{digits}f}" if bits in figures else "-"


if __name__ == "__main__":
    main()
