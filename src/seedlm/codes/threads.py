"""Compiled code that runs without the interpreter's lock, shared out over as many threads as torch may use.

    share_rows   a Python function over ranges of rows, by a pool of threads: work of milliseconds and more
    Kernel       a compiled function whose threads take pieces until none is left: work of microseconds (`team`)

They follow `torch.get_num_threads()` and survive a fork (the child makes new ones); OpenMP, numba's own choice, does not.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
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
    """A function compiled by `numba.cfunc` that is given its job's address: int64, of which the first is the next piece.

    It takes pieces (`vectors.take`) and does them until there are no more, so any number of threads may run it at once.
    """

    def __init__(self, compiled: Any) -> None:
        self._kept, self._address = compiled, compiled.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def share(self, numbers: tuple[int, ...], pieces: int) -> None:
        """Run it with the numbers behind the first, on as many threads as there are pieces; returns when all is done."""
        job = struct.pack(f"{1 + len(numbers)}q", 0, *numbers)  # which nobody else knows, so that it can be written to
        helpers = min(torch.get_num_threads(), pieces) - 1
        if helpers > 0:
            _team().run(self._address, job, helpers)
        else:
            self._call(job)


@lru_cache(maxsize=1)
def _team() -> Any:
    from seedlm.codes.team import Team

    return Team()


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="seedlm")


def _after_fork() -> None:
    _pool.cache_clear()
    _team.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
