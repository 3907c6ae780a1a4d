"""Compiled code that runs without the interpreter's lock, shared out over as many threads as torch may use.

    share_rows   a Python function over ranges of rows, by a pool of threads: work of milliseconds and more
    Kernel       a compiled function whose threads take pieces until none is left: work of microseconds. By torch's own threads
                 (`openmp`), or by ours where those are late (`team`)
    Jobs         several of these at once, in stages, again and again with other tensors
    Record       all that a thread would have run, to be run at once

They follow `torch.get_num_threads()` and survive a fork (the child makes new ones); OpenMP, numba's own choice, does not.
"""

import ctypes
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seedlm.codes import machine_code, on_cpu

_LATE = 1_000_000
"""Nanoseconds: pieces take some microseconds each, so that no thread should end much later than another."""

_PAUSE = 2_000_000, 500_000_000
"""Nanoseconds without torch's threads: at first, and at most."""

_WEIGHTS_PER_TASK = 1 << 17
"""A task shorter than this (0.3 ms) is not worth handing to a thread."""


def share_rows(work: Callable[[int, int], None], rows: int, weights_per_row: int) -> None:
    """Call work(first, last) on consecutive ranges of rows, over as many threads as torch may use."""
    if _record() is not None:
        raise NotRecorded("rows that are shared out are no job")
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
        if (record := _record()) is not None:
            record.take([[(self, numbers, pieces)]])
        else:
            self.run(struct.pack(f"{1 + len(numbers)}q", 0, *numbers), pieces)

    def run(self, job: bytes, pieces: int) -> None:
        """`share`, of a job as it lies in memory; nobody else may know it, so that it can be written to."""
        helpers = min(torch.get_num_threads(), pieces) - 1
        if helpers > 0:
            _threads().run(self.address, job, helpers)
        else:
            self._call(job)


Job = tuple[Kernel, tuple[int | None, ...], int]
"""A kernel, the numbers of `Kernel.share`, and pieces."""


class Jobs:
    """Several `Kernel.share` that are run at once, again and again, by threads that meet between stages.

    stages   each has jobs that do not wait for each other; None stands for a number that a call gives, and a job's lie together
    """

    def __init__(self, stages: Sequence[Sequence[Job]]) -> None:
        self._stages = stages
        jobs = [job for stage in stages for job in stage]
        laid: list[int | None] = []
        if len(jobs) > 1:
            self._kernel, first = kernel("seedlm.codes.team_numba", "run_all"), 2 * (1 + len(stages) + len(jobs))
            table: list[int | None] = [0, len(stages)]
            for stage in stages:
                table += [0, len(stage)]
                for each, numbers, _ in stage:
                    table += [each.address, 8 * (first + len(laid))]
                    laid += [0, *numbers]
            laid = [*table, *laid]
        else:
            self._kernel, laid = jobs[0][0], [0, *jobs[0][1]]
        self._pieces = sum(pieces for *_, pieces in jobs)
        self._laid = struct.pack(f"{len(laid)}q", *(number or 0 for number in laid))
        self._places = [place for place, number in enumerate(laid) if number is None and laid[place - 1] is not None]
        self._writes = [struct.Struct(f"{numbers.count(None)}q").pack_into for _, numbers, _ in jobs if None in numbers]

    def share(self, given: Sequence[Sequence[int]] = ()) -> None:
        """Run them. given: the numbers that are None, of each job that has any."""
        if (record := _record()) is not None:
            record.take(self._stages, given)
            return
        laid = bytearray(self._laid)
        for write, place, some in zip(self._writes, self._places, given, strict=True):
            write(laid, 8 * place, *some)
        self._kernel.run(bytes(laid), self._pieces)


class NotRecorded(Exception):
    """Something was asked for that is no job."""


class Record(TorchFunctionMode):
    """While it is entered, once, kernels of this thread do not run: they are kept as stages, for `run`.

    Nothing else may be computed meanwhile, since it would not be computed again: all that torch does but making, viewing and
    looking at tensors raises NotRecorded. Memory whose address is asked for is held, and nobody else's scratch.

    entered   whether it is. Who is interrupted (KeyboardInterrupt) on the way out may have left it so, and sets it himself
    """

    def __init__(self) -> None:
        super().__init__()
        self._stages: list[Sequence[Job]] = []
        self._held: list[Tensor] = []
        self._scratch = on_cpu.own_scratch()
        self.entered = False

    def __enter__(self) -> "Record":
        if torch._C._is_torch_function_all_disabled():
            raise NotRecorded("torch would not say what it does")
        self._scratch.__enter__()
        super().__enter__()
        _here.record = self
        self.entered = True  # last, and taken back first, whoever interrupts
        return self

    def __exit__(self, *reason: Any) -> None:
        self.entered = False
        _here.record = None
        super().__exit__(*reason)
        self._scratch.__exit__(*reason)
        if reason[0] is None:
            self._jobs = Jobs(self._stages)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if name in _LOOKS_OR_MAKES or not self.entered:
            return function(*args, **(kwargs or {}))
        if name == "data_ptr":
            self._held.append(args[0].detach())  # another memory may be given to the tensor itself
            return function(*args)
        if name in _IF_NEEDED and (found := function(*args, **(kwargs or {}))) is args[0]:
            return found
        if name == "__int__" and not args[0].is_floating_point():
            return function(*args)
        raise NotRecorded(f"{name} of torch is no job")

    def take(self, stages: Sequence[Sequence[Job]], given: Sequence[Sequence[int]] = ()) -> None:
        """Keep stages, with the numbers of a call (`Jobs.share`)."""
        numbers = iter(given)
        for stage in stages:
            self._stages.append([(each, _filled(mine, numbers), pieces) for each, mine, pieces in stage])

    def run(self) -> None:
        """All of it. Nothing of it may run elsewhere at that time."""
        self._jobs.share()


_LOOKS: Final = {"__get__", "dim", "element_size", "is_contiguous", "is_floating_point", "is_inference", "is_neg", "numel"}
_LOOKS_OR_MAKES: Final = _LOOKS | {"empty", "empty_like", "new_empty", "view"}
_IF_NEEDED: Final = {"contiguous", "to"}
"""What copies only where it has to."""
_here: Final = threading.local()


def _record() -> Record | None:
    found: Record | None = getattr(_here, "record", None)
    return found if found is not None and found.entered else None


def _filled(numbers: tuple[int | None, ...], given: Iterator[Sequence[int]]) -> tuple[int, ...]:
    """A job's numbers with those of a call."""
    some = iter(next(given) if None in numbers else ())
    return tuple(next(some) if number is None else number for number in numbers)


class Threads:
    """Who takes part in kernels: torch's threads while they are on time, or our own.

    torchs   `openmp.Region`, or None for our own always
    own      `team.Team`
    After a late region torch's are not asked for a while, and for twice as long after the next if none was on time between.
    """

    def __init__(self, torchs: Any, own: Any) -> None:
        self._torchs, self._own = torchs, own
        self._pause, self._until = _PAUSE[0], 0

    def run(self, kernel: int, job: bytes, helpers: int) -> None:
        """Run the kernel at an address, which takes pieces until there are none: here, and by so many others or more."""
        if self._torchs is None or time.monotonic_ns() < self._until:
            self._own.run(kernel, job, helpers)
        elif self._torchs.run(kernel, job, torch.get_num_threads()) < _LATE:
            self._pause = _PAUSE[0]
        else:
            self._until, self._pause = time.monotonic_ns() + self._pause, min(2 * self._pause, _PAUSE[1])


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
