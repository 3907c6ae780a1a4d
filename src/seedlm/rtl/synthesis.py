"""A design through Yosys for Xilinx 7-series: cells of every module, the longest path, and what that says about the clock.

Synthesis keeps the modules, so cells can be counted for each; the path is measured on the flattened netlist, across them.
There is no placement: `sta` adds the cells' delays as Yosys' own 7-series library states them, and wires are an assumption
(`NET_NS`).
"""

import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seedlm.errors import BackendError
from seedlm.rtl.design import Design
from seedlm.rtl.verilog import emit, yosys

NET_NS: Final = (0.45, 0.9)
"""Assumed delay of a wire between slices, least and most: what placed 7-series designs show. Carry wires are in the cells."""

LUTRAM: Final = {"RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "SRL16E": 1, "SRLC32E": 1}
"""LUTs that a memory cell takes up."""

SCRIPT: Final = """
read_verilog {top}.v
synth_xilinx -family xc7 -noiopad -noclkbuf -top {top}
tee -q -o stat.json stat -json
flatten
opt_clean -purge
write_json net.json
write_verilog -noattr net.v
design -reset
read_verilog -lib -specify +/xilinx/cells_sim.v
read_verilog net.v
tee -q -o sta.txt sta
"""


@dataclass(frozen=True, kw_only=True)
class Area:
    """Cells of a module, those of its submodules left out. `bram` counts 36-kbit memories."""

    lut: int
    ff: int
    bram: float
    dsp: int

    def __add__(self, other: "Area") -> "Area":
        return Area(lut=self.lut + other.lut, ff=self.ff + other.ff, bram=self.bram + other.bram, dsp=self.dsp + other.dsp)

    def __mul__(self, count: int) -> "Area":
        return Area(lut=self.lut * count, ff=self.ff * count, bram=self.bram * count, dsp=self.dsp * count)


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What synthesis found.

    modules        name -> (how many, area of one)
    path           cell delays of the longest path in ns, and the cells along it
    nets           its wires that leave a slice
    levels         most LUTs between two registers; a carry chain, however long, is entered through a LUT and counts one more
    carries        longest carry chain, in CARRY4
    """

    modules: dict[str, tuple[int, Area]]
    path: float
    cells: list[str]
    nets: int
    levels: int
    carries: int

    @property
    def total(self) -> Area:
        total = Area(lut=0, ff=0, bram=0, dsp=0)
        for count, area in self.modules.values():
            total += area * count
        return total

    @property
    def clock_mhz(self) -> tuple[float, float]:
        """Clock that the longest path allows at the most and the least wire delay assumed."""
        least, most = (1000 / (self.path + self.nets * net) for net in reversed(NET_NS))
        return least, most


def synthesise(design: Design) -> Synthesis:
    """Runs Yosys on a design; minutes at full width. Raises BackendError if it fails."""
    top = f"{design.prefix}_matvec"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"{top}.v").write_text(emit(design))
        (folder / "run.ys").write_text(SCRIPT.format(top=top))
        done = subprocess.run([yosys(), "-q", "run.ys"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BackendError(f"yosys failed on {top}: {done.stderr.strip().splitlines()[-1]}")
        modules = _modules(_json(folder / "stat.json"), top)
        path, cells = _path((folder / "sta.txt").read_text())
        levels, carries = logic_levels(_json(folder / "net.json")["modules"][top]["cells"])
    nets = sum(1 for _, after in itertools.pairwise(cells) if not after.startswith("CARRY4.CI"))
    return Synthesis(modules=modules, path=path, cells=cells, nets=nets, levels=levels, carries=carries)


def _json(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text[text.index("{") :])


def _modules(stat: dict[str, Any], top: str) -> dict[str, tuple[int, Area]]:
    cells = {name.removeprefix("\\"): data["num_cells_by_type"] for name, data in stat["modules"].items()}
    counts: Counter[str] = Counter({top: 1})
    order = [top]
    for name in order:
        for kind, number in cells[name].items():
            if kind.removeprefix("\\") in cells:
                counts[kind.removeprefix("\\")] += number * counts[name]
                order.append(kind.removeprefix("\\"))
    return {name: (counts[name], _area(cells[name])) for name in order}


def _area(cells: dict[str, int]) -> Area:
    def count(pattern: str) -> int:
        return sum(n for kind, n in cells.items() if re.fullmatch(pattern, kind))

    return Area(
        lut=count(r"LUT\d|INV") + sum(cells.get(kind, 0) * luts for kind, luts in LUTRAM.items()),
        ff=count(r"FD[RSCP]E(_1)?"),
        bram=count("RAMB36E1") + count("RAMB18E1") / 2,
        dsp=count("DSP48E1"),
    )


def _path(text: str) -> tuple[float, list[str]]:
    """The longest path of an `sta` report: ns, and its cells from first to last."""
    found = re.search(r"Latest arrival time in '.*' is (\d+):", text)
    if found is None:
        raise BackendError("yosys sta reported no path")
    return int(found[1]) / 1000, re.findall(r"\((\w+\.\w+(?:->\w+)?)\)", text[found.end() : text.index("Arrival histogram")])[
        ::-1
    ]


def logic_levels(cells: dict[str, Any]) -> tuple[int, int]:
    """(most LUT levels, longest carry chain in CARRY4) between registers, inputs and outputs of a flat netlist."""
    driver: dict[int, tuple[str, str]] = {}
    for name, cell in cells.items():
        if re.fullmatch(r"LUT\d|INV|MUXF[78]|CARRY4|RAM32M|RAM64M", cell["type"]):
            for port, direction in cell["port_directions"].items():
                if direction == "output":
                    driver.update(dict.fromkeys(cell["connections"][port], (name, port)))
    level: dict[str, int] = {}
    chain: dict[str, int] = {}
    waiting = list(cells)
    while waiting:
        name = waiting[-1]
        cell = cells[name]
        if name in level:
            waiting.pop()
            continue
        kind = cell["type"]
        inputs = [
            (port, driver[bit][0])
            for port, bits in cell["connections"].items()
            if cell["port_directions"][port] == "input" and not (kind.startswith("RAM") and port.startswith(("DI", "W")))
            for bit in bits
            if bit in driver
        ]
        missing = [source for _, source in inputs if source not in level]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        carried = [source for port, source in inputs if port == "CI"] if kind == "CARRY4" else []
        others = [level[source] for port, source in inputs if port != "CI" or kind != "CARRY4"]
        cost = 1 if re.fullmatch(r"LUT\d|INV|CARRY4|RAM\d\dM", kind) else 0
        level[name] = max([cost + max(others, default=0), *(level[source] for source in carried)])
        chain[name] = 1 + max((chain[source] for source in carried), default=0) if kind == "CARRY4" else 0
    return max(level.values()), max(chain.values())
