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
    if nvrtc.architecture(nvrtc.index_of(device)) < 90:
        return f"it needs compute capability 9.0, and {torch.cuda.get_device_name(device)} has less"
    return nvrtc.reason_unavailable()


@lru_cache(maxsize=32)
def plan(trellis: Trellis) -> _Plan:
    """The kernels' compile-time choices for a trellis."""
    shared_costs = 8 * trellis.groups + (20 << 10) <= _SHARED_BYTES
    threads, pairs, blocks = (32, 1, 16) if trellis.state_bits <= 12 else (min(512, trellis.groups), 1, 1)
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


def encode(targets: Tensor, roots: Tensor, trellis: Trellis, overlap: int) -> tuple[Tensor, Tensor]:
    """What `reference.search` finds, as words int32 [N, T * R / 32] and values int16 [N, T].

    targets float32 [N, T] and roots float32 [N, T], which may be one row expanded, on a GPU; the rest as there.
    """
    count, rows = targets.shape
    targets = targets.contiguous()
    if roots.stride() != (0, 1):
        roots = roots.contiguous()
    words = torch.empty(count, rows * trellis.rate // 32, dtype=torch.int32, device=targets.device)
    values = torch.empty(count, rows, dtype=torch.int16, device=targets.device)
    slots = _slots(trellis, rows, overlap)
    pairs = (count + 1) // 2
    chunk = _chunk(pairs, 4 * trellis.groups * slots, targets.device)
    kept = torch.empty(min(chunk, pairs), slots, trellis.groups, dtype=torch.int32, device=targets.device)
    for first in range(0, count, 2 * chunk):
        part = slice(first, first + 2 * chunk)
        _encode_chunk(targets[part], roots[part], trellis, overlap, kept, words[part], values[part])
    return words, values


def _slots(trellis: Trellis, rows: int, overlap: int) -> int:
    """Checkpoints of the longer run."""
    return -(-max(rows, 2 * overlap) // checkpoint_rows(trellis))


def _chunk(pairs: int, bytes_of_pair: int, device: torch.device) -> int:
    """Pairs of sequences to run together: all, or as many as the scratch memory takes, whole waves of blocks if it can."""
    most = max(1, _SCRATCH_BYTES // bytes_of_pair)
    if pairs <= most:
        return max(1, pairs)
    wave = torch.cuda.get_device_properties(device).multi_processor_count
    return most // wave * wave or most


def _global_costs(trellis: Trellis, pairs: int, device: torch.device) -> Tensor | None:
    """Room for path costs that do not fit shared memory."""
    if plan(trellis).shared_costs:
        return None
    return torch.empty(pairs, 2, trellis.groups, dtype=torch.int32, device=device)


def _own_words(chosen: _Plan, trellis: Trellis) -> int:
    """Words of shared memory that a pair takes without those for its rows."""
    scratch = 2 * (chosen.threads // 32) + 2
    return (2 * trellis.groups if chosen.shared_costs else 0) + -(-scratch // 4) * 4


def _encode_chunk(
    targets: Tensor, roots: Tensor, trellis: Trellis, overlap: int, kept: Tensor, words: Tensor, values: Tensor
) -> None:
    count, rows = targets.shape
    slots, device, stride = kept.shape[1], targets.device, roots.stride(0)
    chosen = plan(trellis)
    grid = (-(-count // (2 * chosen.pairs)),)
    ends, seams = torch.empty(2, count, dtype=torch.int32, device=device)
    costs = _global_costs(trellis, grid[0] * chosen.pairs, device)
    room = 4 * chosen.pairs * (_own_words(chosen, trellis) + 2 * rows)
    trace_room = 4 * _TRACE_WARPS * ((2 << (trellis.rate * checkpoint_rows(trellis))) + 2 * rows + rows // 4)
    forward = nvrtc.load(source(), "forward", "PPPPPPiiiiii", device=device, options=chosen.options, shared=room)
    backward = nvrtc.load(source(), "backward", "PPPPPPPiiiiiii", device=device, options=chosen.options, shared=trace_room)
    threads, traces = chosen.threads * chosen.pairs, (-(-count // _TRACE_WARPS),)

    def run(starts: Tensor | None, found: Tensor | None, begin: int, steps: int) -> None:
        forward(
            grid, threads, targets, roots, starts, kept, found, costs, count, stride, rows, begin, steps, slots, shared=room
        )

    def trace(groups: Tensor, found: Tensor | None, begin: int, steps: int, stop: int) -> None:
        outputs = (None, None) if found is not None else (words, values)
        backward(
            traces, 32 * _TRACE_WARPS, targets, roots, kept, groups, found, *outputs, count, stride, rows, begin, steps, stop,
            slots, shared=trace_room,
        )  # fmt: skip

    run(None, ends, rows - overlap, 2 * overlap)
    trace(ends, seams, rows - overlap, 2 * overlap, overlap)
    run(seams, None, 0, rows)
    trace(seams, None, 0, rows, 0)


def encode_panel(
    weight: Tensor,
    fed: Tensor | None,
    coefficients: Tensor | None,
    strips: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    trellis: Trellis,
    overlap: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`seedlm.codes.trellis.panel.encode_panel` in one kernel: arguments as there, on a GPU; words, values and errors."""
    count, columns, rows = weight.shape
    device, chosen = weight.device, plan(trellis)
    words = torch.empty(count, columns, rows * trellis.rate // 32, dtype=torch.int32, device=device)
    values = torch.empty(count, columns, rows, dtype=torch.int16, device=device)
    errors = torch.empty(count, columns, rows, dtype=torch.float32, device=device)
    slots = _slots(trellis, rows, overlap)
    wanted = -(-count // (2 * chosen.pairs))
    blocks = min(wanted, chosen.blocks * torch.cuda.get_device_properties(device).multi_processor_count)
    if not blocks:
        return words, values, errors
    kept = torch.empty(blocks * chosen.pairs, slots, trellis.groups, dtype=torch.int32, device=device)
    costs = _global_costs(trellis, blocks * chosen.pairs, device)
    room = 4 * chosen.pairs * (_own_words(chosen, trellis) + 2 * rows + rows // 2)
    kernel = nvrtc.load(source(), "panel", "PPPPPPPPPPPPPiiiii", device=device, options=chosen.options, shared=room)
    scale, roots, take, per_unit, matrix = (part.contiguous() for part in strips)
    kernel(
        (blocks,), chosen.threads * chosen.pairs, weight.contiguous(), fed if fed is None else fed.contiguous(), take, per_unit,
        scale, roots, coefficients if coefficients is None else coefficients.contiguous(), matrix, words, values, errors, kept,
        costs, count, columns, rows, overlap, slots, shared=room,
    )  # fmt: skip
    return words, values, errors
