"""Torch's own OpenMP threads for kernels of microseconds, while they are on time.

Between two of our kernels torch runs some of its own: attention alone is ten parallel regions a layer. After each of them its
threads look for the next one and keep their cores, so that helpers of our own hardly run
(docs/log/products_cpu.md). So torch's are asked first. But a region ends when every thread has been there, and on
a machine that does other work as well that takes a turn of the scheduler, 10 ms and more. A region says how late it ended, and
whoever wants no more of that takes helpers that nobody waits for (`team`).
"""

import ctypes
import struct
import time
from pathlib import Path
from typing import Any, Final

import torch

from seedlm.codes import machine_code

_NEVER: Final = 2**63 - 1


class Region:
    """Runs kernels on torch's threads."""

    def __init__(self, run: Any) -> None:
        self._run, self._kept = run, machine_code.kernel("seedlm.codes.team_numba", "take_part")
        self._part = ctypes.c_void_p(self._kept.address)

    @classmethod
    def find(cls) -> "Region | None":
        """None where torch has no OpenMP of GCC's interface, or cannot be asked for it."""
        folder = Path(torch.__file__).parent / "lib"
        try:
            run = ctypes.CDLL(str(folder / "libtorch_cpu.so")).GOMP_parallel  # as torch finds it
        except (OSError, AttributeError):
            return None
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint), None
        return cls(run)

    def run(self, kernel: int, job: bytes, threads: int) -> int:
        """Run the kernel at an address, which takes pieces until there are none, on so many threads.

        threads   as many as torch uses: other numbers would make OpenMP end threads and start them anew
        returns   nanoseconds from when a thread first found nothing left to do until all had ended
        """
        region = struct.pack("2q", kernel, _NEVER) + job  # which nobody else knows, so that it can be written to
        self._run(self._part, region, threads, 0)
        return time.monotonic_ns() - struct.unpack_from("q", region, 8)[0]
