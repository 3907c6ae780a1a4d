"""Rows of a matrix shared out over plain threads, for compiled code that runs without the interpreter's lock.

They follow `torch.get_num_threads()` and survive a fork (the child makes a new pool); OpenMP, numba's own choice, does not.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

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


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="seedlm")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
