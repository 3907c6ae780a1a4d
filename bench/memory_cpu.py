"""Memory of processes that generate text on a CPU: a dense model and packed ones, each in processes of its own.

    python bench/memory_cpu.py DENSE PACKED... [--new 64] [--repeats 3] [--json results/memory_cpu.json]

Each process loads a model and writes as `seedlm generate` does, and shows its memory at the end, while it still has the model;
then its C library gives back what is free. What a process writes is looked at first: no text, no number. A model's first
process, which may have to compile, is not counted. Of the others the smallest is shown: a larger one has more pages of
libraries, of which the system maps some around those that are used.

    RSS        all pages in memory; "trimmed" after the C library gave back what it holds free, the least that the process needs
    own        of these pages that belong to nobody else (anonymous)
    weights    of these, pages of the model's files, which the system may drop
    compiler   of these, pages of numba's and LLVM's libraries; and whether these are imported
    peak       the most there was at a time
    started    seconds from the process' start until the model was loaded, and until the first text came
"""

import argparse
import ctypes
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)")


def pages(folder: str) -> dict[str, float]:
    """Of this process, in MB."""
    found = dict.fromkeys(("rss", "own", "weights", "compiler"), 0.0)
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := _MAPPING.fullmatch(line):
            name = mapping[1]
        kind, _, value = line.partition(":")
        if kind == "Anonymous":
            found["own"] += int(value.split()[0]) * 1024e-6
        elif kind == "Rss":
            size = int(value.split()[0]) * 1024e-6
            found["rss"] += size
            found["weights"] += size * name.startswith(folder)
            found["compiler"] += size * ("llvmlite" in name or "numba" in name)
    return found


def seconds_alive() -> float:
    """Since this process began, from the system's clock of boots, which counts in hundredths."""
    begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun / 100


def child(model: str, new: int) -> None:
    import torch
    import transformers
    from transformers.utils import logging

    from seedlm.integrations.transformers.generate import Drawing, Writer

    logging.disable_progress_bar()
    writer = Writer(model, device="cpu")
    loaded = seconds_alive()
    pieces, first = [], 0.0
    for piece in writer.answer([{"role": "user", "content": "Why is the sky blue?"}], Drawing(max_new_tokens=new)):
        first = first or seconds_alive()
        pieces.append(piece)
    facts: dict[str, object] = pages(str(Path(model).resolve()))
    ctypes.CDLL(None).malloc_trim(0)
    facts["trimmed"] = pages(model)["rss"]
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    facts["peak"] = int(peak[1]) * 1024e-6 if peak else 0.0
    facts["loaded"], facts["first"] = loaded, first
    facts["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    facts["imported"] = [name for name in ("numba", "llvmlite") if name in sys.modules]
    print(json.dumps(facts | {"text": "".join(pieces)}))


def run(model: Path, new: int) -> dict:
    """The facts of a process, which must have written something."""
    command = [sys.executable, __file__, "--child", str(model), "--new", str(new)]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert len(re.findall(r"[a-z]{2,}", facts["text"])) > new // 4, f"{model} wrote {facts['text']!r}"
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.new)
    runs = {model: [run(model, options.new)] for model in options.models}
    print(*(f"{model} writes: {found[0]['text'][:70]!r}" for model, found in runs.items()), sep="\n")
    for _ in range(options.repeats):
        for model, found in runs.items():
            found.append(run(model, options.new))
    columns = ("rss", "trimmed", "own", "weights", "compiler", "peak")
    print(f"\n{'MB':32}{'files':>9}" + "".join(f"{name:>9}" for name in columns) + f"{'loaded s':>10}{'first s':>9}  imported")
    rows = []
    for model, (_, *found) in runs.items():
        best = min(found, key=lambda facts: facts["rss"])
        files = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
        best["loaded"], best["first"] = (min(facts[name] for facts in found) for name in ("loaded", "first"))
        rows.append({"model": model.name, "files": round(files, 1)} | {name: round(best[name], 1) for name in columns})
        rows[-1] |= {"loaded": round(best["loaded"], 2), "first": round(best["first"], 2), "imported": best["imported"]}
        rows[-1] |= best["versions"]
        numbers = "".join(f"{value:9.1f}" for value in [files, *(best[name] for name in columns)])
        print(f"{model.name[:32]:32}{numbers}{best['loaded']:10.2f}{best['first']:9.2f}  {' '.join(best['imported'])}")
    dense, *packed = rows
    for each in packed:
        saved, found = dense["files"] - each["files"], dense["rss"] - each["rss"]
        print(f"{each['model']}: files {saved:.1f} MB smaller, process {found:.1f} MB smaller ({found / saved:.0%})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
