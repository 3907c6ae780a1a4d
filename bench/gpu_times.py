"""What benchmarks on a GPU share: shapes, times by graphs, the bandwidth of a copy."""

import statistics
import time
from collections.abc import Callable

import torch

SHAPES = ["57344x8192", "8192x28672", "28672x4096", "4096x14336", "4096x4096"]
"""Out and in of gate + up and of down of a 70B model, the same of an 8B model, and its q and o."""

CACHE_BYTES = 200_000_000
WARM = 0.05
"""Seconds of work before anything is timed: a GPU that waited for the host runs at lower clocks for a while."""


def microseconds(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Median time of one of the calls, which are captured in a graph one after another.

    At least ten to a graph, so that starting the graph (about 10 us) does not count.
    """
    calls = calls * -(-10 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(nbytes: int) -> int:
    """How many weights of a size have to take turns so that none stays in the cache."""
    return max(1, CACHE_BYTES // nbytes + 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """TB/s of a large copy on the device, bytes read and written: not in a graph, whose copies are slower."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(10):
            target.copy_(source)

    copies()
    return 20 * source.nbytes / statistics.median(seconds(device, copies) for _ in range(5)) / 1e12
