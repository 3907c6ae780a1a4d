"""The tables of docs/hardware.md: clocks, area, clock rate, energy. Measured here, written between two marks of the page.

``python -m seedlm.rtl.report PAGE`` (make rtl-report) simulates and synthesises three designs at full width, 20 minutes on two
cores.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from seedlm.codes.block import packing
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.rtl import twin
from seedlm.rtl.design import HALF_BITS, Design, HalfDesign, SeedDesign
from seedlm.rtl.simulate import Product, Simulator
from seedlm.rtl.synthesis import NET_NS, Synthesis, synthesise

BEGIN, END = "<!-- rtl-report begins -->", "<!-- rtl-report ends -->"
SIZES: Final = (512, 1024, 2048)
DESIGNS: Final = {"FP16": HalfDesign(), "4 bit": SeedDesign(format=PRESETS["4"]), "3 bit": SeedDesign(format=PRESETS["3"])}
CLOCK_MHZ: Final = 200
"""Clock at which the tables' times are stated."""
PAPER_CLOCKS: Final = {("FP16", 2048): "136,559", ("4 bit", 2048): "34,331"}
PAPER_RATIO: Final = {512: "3.67x", 1024: "3.92x", 2048: "3.98x"}
PAPER_AREA: Final = "67K LUT, 45.4K FF, 144 BRAM, 128 DSP"

_SMALL = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
_MLP_70B = {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)}
MODELS: Final = {
    "Llama-2-7B": (32, {**_SMALL, "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}),
    "Llama-3-8B": (
        32,
        {**_SMALL, "k": (1024, 4096), "v": (1024, 4096), "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)},
    ),
    "Llama-2-70B, Llama-3-70B": (80, {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192), **_MLP_70B}),
}
"""Layers, and (out, in) of the linear layers of each."""


@dataclass(frozen=True)
class Clocks:
    """Clocks of one simulated product and the largest gap between two of its results, in clocks."""

    clocks: int
    largest_gap: int


def random_product(design: Design, rows: int, columns: int, seed: int = 0) -> Product:
    """A product of random codes (or FP16 weights) and activations: clocks do not depend on the values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, generator=generator).half().numpy()
    if not isinstance(design, SeedDesign):
        return Product(torch.randn(rows, columns, generator=generator).half(), x)
    return Product(random_words(design.format, rows, columns, generator), x, -4)


def random_words(format: BlockFormat, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Packed words of random codes, int32 [rows, words]."""
    shape = (rows, format.blocks_per_row(columns))
    (low, high), (least, most) = format.coefficient_range, format.exponent_range
    return packing.pack(
        torch.randint(1, format.num_seeds + 1, shape, generator=generator),
        torch.randint(least, most + 1, shape, generator=generator),
        torch.randint(low, high + 1, (*shape, format.num_coefficients), generator=generator),
        format,
    )


def measure(name: str, folder: Path) -> dict[int, Clocks]:
    """Clocks of the square sizes in one design; every result is compared with the twin's before it counts."""
    design = DESIGNS[name]
    products = [random_product(design, n, n) for n in SIZES]
    measured = {}
    for n, product, run in zip(SIZES, products, Simulator(design, folder).run(products), strict=True):
        if run.y.tobytes() != twin.product(design, product.weights, product.x, product.bias).tobytes():
            raise AssertionError(f"{name} {n} x {n}: the simulated hardware and the twin differ")
        measured[n] = Clocks(run.clocks, int(np.diff(run.times).max()))
    return measured


def stream_clocks(design: Design, rows: int, columns: int) -> float:
    """Clocks that the streams alone take: activations, then weights at one chunk or one beat a clock, whichever is more."""
    command = design.command(rows, columns)
    beats = rows * design.units_per_row(columns) / design.beat_units
    return -(-columns * HALF_BITS // design.beat_bits) + max(rows * command.chunks, beats)


def clocks_table(measured: dict[str, dict[int, Clocks]]) -> list[str]:
    """Clocks beside the paper's."""
    lines = [
        "| matrix | FP16 | paper | 4 bit | paper | FP16 / 4 bit | paper | 3 bit | FP16 / 3 bit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n in SIZES:
        half, four, three = (measured[name][n].clocks for name in ("FP16", "4 bit", "3 bit"))
        paper = [PAPER_CLOCKS.get((name, n), "") for name in ("FP16", "4 bit")]
        lines.append(
            f"| {n} x {n} | {half:,} | {paper[0]} | {four:,} | {paper[1]} | {half / four:.3f}x | {PAPER_RATIO[n]} "
            f"| {three:,} | {half / three:.3f}x |"
        )
    lines += [
        "",
        "Clocks beyond the streams' own (`stream_clocks`), and the largest gap between two results against clocks a row:",
        "",
    ]
    lines += ["| | " + " | ".join(f"{n} x {n}" for n in SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    for name, design in DESIGNS.items():
        cells = []
        for n in SIZES:
            m = measured[name][n]
            row = (stream_clocks(design, n, n) - n / 32) / n
            cells.append(f"{m.clocks - stream_clocks(design, n, n):.0f}; {m.largest_gap} of {row:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def model_table(measured: dict[str, dict[int, Clocks]]) -> list[str]:
    """Clocks and milliseconds per token of the Llama shapes: streams plus the constant that simulation found."""
    constant = {name: measured[name][2048].clocks - stream_clocks(design, 2048, 2048) for name, design in DESIGNS.items()}
    lines = ["| linear layers of | FP16, clocks a token (ms) | 4 bit | 3 bit |", "|---|---|---|---|"]
    for model, (layers, shapes) in MODELS.items():
        total = {
            name: layers * sum(stream_clocks(design, *shape) + constant[name] for shape in shapes.values())
            for name, design in DESIGNS.items()
        }
        cells = [
            f"{clocks:,.0f} ({clocks / CLOCK_MHZ / 1000:,.0f} ms) {total['FP16'] / clocks:.3f}x" for clocks in total.values()
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    bandwidth = 64 * CLOCK_MHZ / 1000
    return [
        *lines,
        "",
        "A model: streams, plus the constant measured at 2048 x 2048 for each layer. Memory brings 64 bytes every clock; "
        f"times are at {CLOCK_MHZ} MHz, a memory of {bandwidth:g} GB/s, and scale with it. Attention, norms and the output "
        "head are not in them.",
    ]


def area_table(found: dict[str, Synthesis]) -> list[str]:
    """Cells per module and in all, beside the paper's."""
    lines = ["| module | count | LUT | FF | BRAM | DSP |", "|---|---|---|---|---|---|"]
    for name, synthesis in found.items():
        lines.append(f"| **{name}** | | | | | |")
        for module, (count, area) in synthesis.modules.items():
            lines.append(f"| {module} | {count} | {area.lut:,} | {area.ff:,} | {area.bram:g} | {area.dsp} |")
        total = synthesis.total
        lines.append(f"| all of it | | **{total.lut:,}** | **{total.ff:,}** | **{total.bram:g}** | **{total.dsp}** |")
    return [*lines, "", f"The paper's 4-bit design: {PAPER_AREA}."]


def path_table(found: dict[str, Synthesis]) -> list[str]:
    """The longest paths and the clocks they allow."""
    lines = [
        "| | LUT levels | longest carry chain | longest path, cells alone | wires on it | clock |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in found.items():
        least, most = s.clock_mhz
        lines.append(
            f"| {name} | {s.levels} | {s.carries} CARRY4 | {s.path:.2f} ns | {s.nets} | {least:.0f} to {most:.0f} MHz |"
        )
    return [
        *lines,
        "",
        f"The clock adds {NET_NS[0]} to {NET_NS[1]} ns a wire to the cells' delays; nothing was placed or routed.",
    ]


@dataclass(frozen=True)
class Source:
    """Where a figure of the energy table is from, and its value in pJ."""

    pj: float
    source: str


HOROWITZ = "Horowitz, ISSCC 2014, 45 nm"
DRAM: Final = {
    "off-chip DRAM": Source(20.0, f"{HOROWITZ}: 1.3 nJ per 64 bits, the low end of its DRAM range"),
    "HBM2": Source(3.9, "O'Connor et al., MICRO 2017"),
}
HALF_MULTIPLY = Source(1.1, HOROWITZ)
HALF_ADD = Source(0.4, HOROWITZ)
INT_MULTIPLY = Source(3.1 / 1024, f"{HOROWITZ}: 3.1 pJ at 32 x 32 bits, a bit product its 1024th")
INT_ADD = Source(0.1 / 32, f"{HOROWITZ}: 0.1 pJ at 32 bits, a bit its 32nd")
FPGA_FACTOR = 14
"""Dynamic power of FPGA logic against standard cells (Kuon and Rose, IEEE TCAD 2007); applied to all arithmetic, DSPs too."""
ADDED_BITS = 130
"""Bits of addition a weight at the 4-bit preset: 201 CARRY4 of a decoder and 35 of the lanes for 8 weights, 12 for the row."""


def energy_table() -> list[str]:
    """Energy of a weight in pJ: memory by bits stored, arithmetic by operations."""
    half_mac = HALF_MULTIPLY.pj + HALF_ADD.pj
    seed_mac = 21 * 18 * INT_MULTIPLY.pj + ADDED_BITS * INT_ADD.pj
    rows = {
        "FP16": (16.0, half_mac),
        "int4, FP16 scale per 128": (4.125, half_mac + HALF_MULTIPLY.pj / 128),
        "SeedLM 4 bit": (4.0, seed_mac),
    }
    lines = ["| | bits | arithmetic, pJ (as cells; on FPGA) |", "|---|---|---|"]
    lines[0] += "".join(f" {name}, pJ | {name} and FPGA |" for name in DRAM)
    lines[1] += "---|---|" * len(DRAM)
    base = {name: 16 * d.pj + half_mac * FPGA_FACTOR for name, d in DRAM.items()}
    for name, (bits, mac) in rows.items():
        cells = ""
        for dram, d in DRAM.items():
            total = bits * d.pj + mac * FPGA_FACTOR
            cells += f" {bits * d.pj:.1f} | {total:.1f} ({base[dram] / total:.2f}x less) |"
        lines.append(f"| {name} | {bits:g} | {mac:.2f}; {mac * FPGA_FACTOR:.1f} |{cells}")
    sources = {**{f"{n} per bit": d for n, d in DRAM.items()}, "FP16 multiply": HALF_MULTIPLY, "FP16 add": HALF_ADD}
    sources |= {"integer multiply, per bit product": INT_MULTIPLY, "integer add, per bit": INT_ADD}
    lines += ["", "Sources: " + "; ".join(f"{n} {s.pj:.3g} pJ ({s.source})" for n, s in sources.items()) + "."]
    return [
        *lines,
        f"FPGA arithmetic is taken as {FPGA_FACTOR} times its cells (Kuon and Rose, IEEE TCAD 2007). Left out of all rows: "
        "registers, selectors and shifters, the XOR network, on-chip memory, clock and leakage.",
    ]


def main() -> None:
    """Measures everything and writes it into the page named on the command line."""
    page = Path(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "build/rtl")
    found = {name: synthesise(design) for name, design in DESIGNS.items()}
    measured = {name: measure(name, folder) for name in DESIGNS}
    sections = {
        "Clocks": clocks_table(measured),
        "Clocks of whole models": model_table(measured),
        "Area": area_table(found),
        "Longest path": path_table(found),
        "Energy a weight": energy_table(),
    }
    body = "\n\n".join(f"### {title}\n\n" + "\n".join(lines) for title, lines in sections.items())
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


if __name__ == "__main__":
    main()
