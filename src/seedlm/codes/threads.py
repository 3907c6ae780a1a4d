"""Compiled code that runs without the interpreter's lock, shared out over as many threads as torch may use.

    share_rows   a Python function over ranges of rows, by a pool of threads: work of milliseconds and more
    Kernel       a compiled function whose threads take pieces until none is left: work of microseconds. By torch's own threads
                 (`openmp`), or by ours where those are late (`team`)
    Jobs         several of these at once, again and again with other tensors

They follow `torch.get_num_threads()` and survive a fork (the child makes new ones); OpenMP, numba's own choice, does not.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch

from seedlm.codes import machine_code

_LATE = 1_000_000
"""Nanoseconds: pieces take some microseconds each, so that no thread should end much later than another."""

_PAUSE = 16, 4096
"""Jobs without torch's threads: at first, and at most."""

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
    """A compiled function that is given its job's address: int64, of which the first is the next piece.

    It takes pieces (`vectors.take`) and does them until there are no more, so any number of threads may run it at once.
    """

    def __init__(self, compiled: Any) -> None:
        self._kept, self.address = compiled, compiled.address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def share(self, numbers: tuple[int, ...], pieces: int) -> None:
        """Run it with the numbers behind the first, on as many threads as there are pieces; returns when all is done."""
        self.run(struct.pack(f"{1 + len(numbers)}q", 0, *numbers), pieces)

    def run(self, job: bytes, pieces: int) -> None:
        """`share`, of a job as it lies in memory; nobody else may know it, so that it can be written to."""
        helpers = min(torch.get_num_threads(), pieces) - 1
        if helpers > 0:
            _threads().run(self.address, job, helpers)
        else:
            self._call(job)


class Jobs:
    """What several `Kernel.share` that do not wait for each other have in common, call after call.

    jobs   each (kernel, numbers, pieces); None stands for a number that a call gives, and these lie together
    """

    def __init__(self, jobs: Sequence[tuple[Kernel, tuple[int | None, ...], int]]) -> None:
        laid: list[int | None] = []
        table: list[int] = []
        for each, numbers, _ in jobs:
            table += [each.address, 8 * (2 + 2 * len(jobs) + len(laid))]
            laid += [0, *numbers]
        self._kernel = jobs[0][0]
        if len(jobs) > 1:
            self._kernel, laid = kernel("seedlm.codes.team_numba", "run_all"), [0, len(jobs), *table, *laid]
        self._pieces = sum(pieces for *_, pieces in jobs)
        self._numbers = [number or 0 for number in laid]
        given = [place for place, number in enumerate(laid) if number is None]
        self._places = [place for place in given if place - 1 not in given]
        self._pack = struct.Struct(f"{len(laid)}q").pack

    def share(self, given: Sequence[Sequence[int]]) -> None:
        """Run them; threads meet once, at the end. given: each job's numbers that are None."""
        numbers = self._numbers.copy()
        for place, some in zip(self._places, given, strict=True):
            numbers[place : place + len(some)] = some
        self._kernel.run(self._pack(*numbers), self._pieces)


class Threads:
    """Who takes part in kernels: torch's threads while they are on time, or our own.

    torchs   `openmp.Region`, or None for our own always
    own      `team.Team`
    After a late region so many jobs are not torch's, and twice as many after the next if none was on time between.
    """

    def __init__(self, torchs: Any, own: Any) -> None:
        self._torchs, self._own = torchs, own
        self._pause, self._paused = _PAUSE[0], 0

    def run(self, kernel: int, job: bytes, helpers: int) -> None:
        """Run the kernel at an address, which takes pieces until there are none: here, and by so many others or more."""
        if self._torchs is None or self._paused > 0:
            self._paused -= 1
            self._own.run(kernel, job, helpers)
        elif self._torchs.run(kernel, job, torch.get_num_threads()) < _LATE:
            self._pause = _PAUSE[0]
        else:
            self._paused, self._pause = self._pause, min(2 * self._pause, _PAUSE[1])


_forked = False


@lru_cache(maxsize=1)
def _threads() -> Threads:
    from seedlm.codes.team import Team

    if sys.platform != "linux" or _forked:  # of OpenMP's threads a fork leaves nothing but the belief in them
        return Threads(None, Team())
    from seedlm.codes.openmp import Region

    return Threads(Region.find(), Team())


@cache
def kernel(module: str, maker: str, *parameters: Any) -> Kernel:
    """The kernel that a maker makes of parameters (`machine_code`), which is where it is as long as the process."""
    return Kernel(machine_code.kernel(module, maker, *parameters))


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="seedlm")


def _after_fork() -> None:
    global _forked
    _forked = True
    _pool.cache_clear()
    _threads.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
