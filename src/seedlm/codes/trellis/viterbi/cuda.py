"""The Viterbi search on an NVIDIA GPU (compute capability 9.0 up), the same bits as `reference`: host side of `viterbi.cu`.

What a state costs a row, decides the speed; 65,536 of them make a weight. Two sequences share a thread block: their path
costs are the 16-bit halves of one word, and the values of a thread's 128 or so states stay in its registers, two in each. For
two edges of the trellis that leaves three instructions:

    HFMA2       d = target - value             the value's half is an operand's modifier
    HFMA2       1024 + d * d                   whose bits are the branch cost (`cost`)
    VIADDMNMX   best = min(best, path + cost)

A thread takes the 2^R groups a, a + 2^(L-2R), ... that have the same predecessors, so it reads a predecessor's cost once for
2^R edges. No back-pointers are kept: every few rows the path costs go to global memory, and `backward` computes what lies in
between again, but only for the few states that its path can come from. It runs with one warp a sequence.

Sequences are taken in chunks whose kept costs fit `_SCRATCH_BYTES`. Nothing waits for the device.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes.trellis.format import Trellis
from seedlm.codes.trellis.viterbi.cost import checkpoint_rows, period

_SCRATCH_BYTES = 2 << 30
_SHARED_BYTES = 227 << 10
"""What one block may take of a multiprocessor of compute capability 9.0."""
_SOURCE = Path(__file__).with_name("viterbi.cu")
_TRACE_WARPS = 4


class _Plan(NamedTuple):
    """How a trellis' kernels are compiled: THREADS for a pair of sequences, PAIRS a block, BLOCKS a multiprocessor."""

    threads: int
    pairs: int
    blocks: int
    shared_costs: bool
    options: tuple[str, ...]


def reason_unavailable(device: torch.device) -> str | None:
    """Why this search cannot take tensors of a device, or None."""
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the targets are on {device}"
    if nvrtc.architecture(device) < 90:
        return f"it needs compute capability 9.0, and {torch.cuda.get_device_name(device)} has less"
    return nvrtc.reason_unavailable()


@lru_cache(maxsize=32)
def plan(trellis: Trellis) -> _Plan:
    """The kernels' compile-time choices for a trellis."""
    shared_costs = 8 * trellis.groups + (20 << 10) <= _SHARED_BYTES
    threads, pairs, blocks = (32, 4, 4) if trellis.state_bits <= 12 else (min(512, trellis.groups), 1, 1)
    constants = {
        "RATE": trellis.rate,
        "STATE_BITS": trellis.state_bits,
        "MULTIPLIER": f"0x{trellis.multiplier:08X}u",
        "COST_SHIFT": trellis.cost_shift,
        "CHECKPOINT": checkpoint_rows(trellis),
        "PERIOD": period(trellis),
        "THREADS": threads,
        "PAIRS": pairs,
        "BLOCKS": blocks,
        "SHARED_COSTS": int(shared_costs),
    }
    return _Plan(threads, pairs, blocks, shared_costs, tuple(f"-D{name}={value}" for name, value in constants.items()))


@lru_cache(maxsize=1)
def source() -> str:
    """The kernels' text."""
    return _SOURCE.read_text(encoding="utf-8")


def encode(targets: Tensor, valid: int, trellis: Trellis, overlap: int) -> tuple[Tensor, Tensor]:
    """Words int32 [N, T * R / 32] and values int16 [N, T] of targets float32 [N, T] on a GPU; see `reference.search`."""
    count, rows = targets.shape
    targets = targets.contiguous()
    words = torch.empty(count, rows * trellis.rate // 32, dtype=torch.int32, device=targets.device)
    values = torch.empty(count, rows, dtype=torch.int16, device=targets.device)
    slots = -(-max(rows, 2 * overlap) // checkpoint_rows(trellis))
    pairs = (count + 1) // 2
    chunk = _chunk(pairs, 4 * trellis.groups * slots, targets.device)
    kept = torch.empty(min(chunk, pairs), slots, trellis.groups, dtype=torch.int32, device=targets.device)
    for first in range(0, count, 2 * chunk):
        part = slice(first, first + 2 * chunk)
        _encode_chunk(targets[part], valid, trellis, overlap, kept, words[part], values[part])
    return words, values


def _chunk(pairs: int, bytes_of_pair: int, device: torch.device) -> int:
    """Pairs of sequences to run together: all, or as many as the scratch memory takes, whole waves of blocks if it can."""
    most = max(1, _SCRATCH_BYTES // bytes_of_pair)
    if pairs <= most:
        return max(1, pairs)
    wave = torch.cuda.get_device_properties(device).multi_processor_count
    return most // wave * wave or most


def _encode_chunk(
    targets: Tensor, valid: int, trellis: Trellis, overlap: int, kept: Tensor, words: Tensor, values: Tensor
) -> None:
    count, rows = targets.shape
    slots, device = kept.shape[1], targets.device
    chosen = plan(trellis)
    grid = (-(-count // (2 * chosen.pairs)),)
    seams = torch.empty(2, count, dtype=torch.int32, device=device)
    costs = None
    if not chosen.shared_costs:
        costs = torch.empty(grid[0] * chosen.pairs, 2, trellis.groups, dtype=torch.int32, device=device)
    warps = chosen.threads // 32
    per_pair = rows + max(4, 2 * warps) + (2 * trellis.groups if chosen.shared_costs else 0)
    forward_bytes = 4 * per_pair * chosen.pairs
    reached = 2 << (trellis.rate * checkpoint_rows(trellis))
    backward_bytes = 4 * _TRACE_WARPS * (reached + rows + rows // 4)
    forward = nvrtc.load(source(), "forward", "PPPPPiiiiii", device=device, options=chosen.options, shared=forward_bytes)
    backward = nvrtc.load(source(), "backward", "PPPPPPiiiiiii", device=device, options=chosen.options, shared=backward_bytes)
    threads = chosen.threads * chosen.pairs
    traces = (-(-count // _TRACE_WARPS),)

    begin, steps = rows - overlap, 2 * overlap
    forward(grid, threads, targets, None, kept, seams[0], costs, count, rows, valid, begin, steps, slots, shared=forward_bytes)
    backward(
        traces, 32 * _TRACE_WARPS, targets, kept, seams[0], seams[1], None, None, count, rows, valid, begin, steps, overlap,
        slots, shared=backward_bytes,
    )  # fmt: skip
    seam = seams[1]
    forward(grid, threads, targets, seam, kept, None, costs, count, rows, valid, 0, rows, slots, shared=forward_bytes)
    backward(
        traces, 32 * _TRACE_WARPS, targets, kept, seam, None, words, values, count, rows, valid, 0, rows, 0,
        slots, shared=backward_bytes,
    )  # fmt: skip
