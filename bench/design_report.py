"""Turn what bench/design_space.py measured into docs/design.csv and docs/design.svg (needs matplotlib).

python bench/design_report.py OUT.json docs/
"""

import csv
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from seedlm.codes.block.format import PRESETS
from seedlm.codes.registry import parse_format

BUDGETS = (2, 2.5, 3, 3.5, 4, 4.5, 5)
GRID_ROWS = 40
COLUMNS = ("set", "format", "bits", "error", "standard_error", "at_least", "unquantised", "contenders")


def row(kind: str, m: dict) -> tuple:
    """A line of the table: relative errors, four digits."""
    error = math.sqrt(m["nmse"])
    rounded = (error, m["standard_error"] / (2 * error), math.sqrt(m["at_least"]), math.sqrt(m["unquantized"]))
    bits = round(m["bits_per_weight"], 4)
    return kind, m["format"], bits, *(f"{value:.4f}" for value in rounded), f"{m['contenders']:.1f}"


def within(rows: list[dict], budget: float) -> list[dict]:
    return sorted((m for m in rows if m["bits_per_weight"] <= budget), key=lambda m: m["nmse"])


def write_table(results: dict, path: Path) -> None:
    best = {m["format"]: m for budget in BUDGETS for m in within(results["grid"], budget)[:GRID_ROWS]}
    with open(path, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        out.writerows(row("grid", m) for m in best.values())
        for kind in ("normal", "open ended", "curves", "model"):
            out.writerows(row(kind, m) for m in sorted(results.get(kind, []), key=lambda m: (-m["bits_per_weight"], m["nmse"])))


def draw(results: dict, path: Path) -> None:
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "seedlm"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    shapes = {name: (f.block_size, f.num_coefficients, f.coefficient_bits) for name, f in PRESETS.items()}
    for (name, shape), marker in zip(shapes.items(), "osD^vPX", strict=True):
        points = []
        for m in results["curves"]:
            f = parse_format(m["format"])
            if (f.block_size, f.num_coefficients, f.coefficient_bits) == shape:
                points.append((f.seed_bits, math.sqrt(m["nmse"])))
        c, p, q = shape
        left.plot(
            *zip(*sorted(points), strict=True), marker=marker, markersize=3, linewidth=1, label=f"{name}: C={c} P={p} q={q}"
        )
    left.set(xlabel="seed bits K (the rest of the format fixed)", ylabel="relative error", yscale="log")
    left.set_title("More seeds")
    left.legend(fontsize=7, title="shape of preset", title_fontsize=7)

    final = {m["format"]: m["nmse"] for m in results["normal"]}
    kinds = {
        "best of all formats": lambda f: True,
        "4 exponent bits": lambda f: f.exponent_bits == 4,
    }
    for (label, fits), marker in zip(kinds.items(), "v^", strict=True):
        errors = [
            next(m["nmse"] for m in within(results["grid"], budget) if fits(parse_format(m["format"]))) for budget in BUDGETS
        ]
        right.plot(BUDGETS, errors, marker=marker, markersize=4, linewidth=1, label=label)
    names = [float(name) for name in PRESETS]
    right.plot(names, [final[f.spec] for f in PRESETS.values()], "o", label="presets")
    right.plot(BUDGETS, [4.0**-budget for budget in BUDGETS], "k--", linewidth=1, label="Shannon bound, 4^-bits")
    right.set(xlabel="bits a weight", ylabel="NMSE on N(0,1)", yscale="log")
    right.set_title("Against the budget")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    source, folder = map(Path, sys.argv[1:])
    results = json.loads(source.read_text())
    write_table(results, folder / "design.csv")
    draw(results, folder / "design.svg")


if __name__ == "__main__":
    main()
