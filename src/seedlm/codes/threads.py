"""Compiled code that runs without the interpreter's lock, shared out over as many threads as torch may use.

    share_rows   a Python function over ranges of rows, by plain threads: work of milliseconds and more
    share        a compiled kernel whose threads take pieces until none is left: work of microseconds

Torch's idle OpenMP threads wait by spinning: for a while after each operation they take the processors from any other threads,
so that two threads of our own were slower than one. `share` therefore runs on those very threads, by the call that a compiler
makes of a parallel region (``GOMP_parallel``, in the OpenMP library that torch has loaded): they are awake, and there are no
more of them than processors. Where torch has no such library, and in a forked child, where its threads are gone, plain
threads do it.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_WEIGHTS_PER_TASK = 1 << 17
"""A task shorter than this (0.3 ms) is not worth handing to a thread."""


def share_rows(work: Callable[[int, int], None], rows: int, weights_per_row: int) -> None:
    """Call work(first, last) on consecutive ranges of rows, over as many threads as torch may use."""
    tasks = max(1, min(torch.get_num_threads(), rows, rows * weights_per_row // _WEIGHTS_PER_TASK))
    edges = [rows * i // tasks for i in range(tasks + 1)]
    if tasks == 1:
        work(0, rows)
    else:
        list(_pool(torch.get_num_threads()).map(work, edges[:-1], edges[1:]))


class Kernel:
    """A function compiled by `numba.cfunc` that takes the address of its job, int64 numbers of which the first is the next piece.

    It takes pieces (`vectors.take`) and does them until there are no more, so any number of threads may run it at once.
    """

    def __init__(self, compiled: Any) -> None:
        self._kept, self._address = compiled, compiled.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def share(self, numbers: tuple[int, ...], pieces: int) -> None:
        """Run it with the numbers behind the first, on no more threads than there are pieces; returns when all is done."""
        job = struct.pack(f"{1 + len(numbers)}q", 0, *numbers)  # which nobody else knows, so that it can be written to
        threads = min(torch.get_num_threads(), pieces)
        if threads < 2:
            self._call(job)
        elif (team := _team()) is not None:
            team(self._address, job, threads, 0)
        else:
            list(_pool(torch.get_num_threads()).map(self._call, [job] * threads))


@lru_cache(maxsize=1)
def _team() -> Any:
    """``GOMP_parallel(function, argument, threads, flags)`` of torch's own OpenMP library, None if it has none."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return found
    return None


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="seedlm")


def _after_fork() -> None:
    global _team
    _pool.cache_clear()
    _team = lambda: None  # noqa: E731


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
