"""The Viterbi search on a CPU: 32 sequences in the lanes of a vector, the same bits as `reference`.

A state's value is an integer in -510 .. 510, and 65,536 states share some 900 of them. So per row the cost of every *level*
(distinct value) is computed once for 32 sequences, and an edge of the trellis is two loads, a sum and a maximum of 32 int16:
the path so far, and the level of its state.

Costs are kept as 32767 minus the cost, so that signed 16-bit maxima do, and 0 is the highest cost there is.

Traceback needs the path costs of every row. With 12 state bits they are kept; with 16 those of every few rows are, and for
the rows in between the costs of the few groups that the path can come from are computed again.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from seedlm.codes import simd
from seedlm.codes.compiled import KEPT
from seedlm.codes.simd import LANES
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import Trellis
from seedlm.codes.trellis.viterbi import lanes
from seedlm.codes.trellis.viterbi.cost import FARTHEST, HIGHEST_PATH_COST, branch_costs, checkpoint_rows, period, scaled_targets
from seedlm.codes.trellis.viterbi.lanes import negative_costs

_TOP = HIGHEST_PATH_COST
_KEPT_GROUPS = 1 << 11
"""Up to so many groups the path costs of every row are kept: 64 bytes each, 16 MB for 128 rows."""


@lru_cache(maxsize=8)
def _tables(trellis: Trellis) -> tuple[np.ndarray, ...]:
    """Costs by distance, the levels, and the level of every state.

    costs       int16 [D], the cost of a distance of d sixty-fourths; the last one is for all larger ones
    levels      float32 [V], distinct values in ascending order, in the scaled unit
    level_of    uint16 [2^L], by state
    """
    values, level_of = torch.unique(codec.value_table(trellis), return_inverse=True)
    distances = (torch.arange(64 * FARTHEST + 1) / 64).to(torch.float16)
    costs = branch_costs(distances, torch.zeros(1, dtype=torch.int16), torch.ones(1), trellis)
    return (
        costs.to(torch.int16).numpy(),
        (values.float() * 2.0**-trellis.cost_shift).numpy(),
        level_of.to(torch.int32).numpy().astype(np.uint16),
    )


def reason_unavailable(device: torch.device) -> str | None:
    """Why this search cannot take tensors of a device, or None."""
    return lanes.reason_unavailable() if device.type == "cpu" else f"it runs on the CPU, and the targets are on {device}"


def search(targets: Tensor, roots: Tensor, trellis: Trellis, overlap: int) -> Tensor:
    """`reference.search` on `torch.get_num_threads()` threads; arguments and result as there, on the CPU."""
    count, rows = targets.shape
    given = torch.stack([scaled_targets(targets, roots, trellis).float(), roots.expand_as(targets)], 1).numpy()
    symbols = np.empty((count, rows), np.uint8)
    tables = _tables(trellis)
    step = 1 if trellis.groups <= _KEPT_GROUPS else checkpoint_rows(trellis)
    machine = trellis.rate, trellis.state_bits, trellis.multiplier, 2.0**-trellis.cost_shift, period(trellis), step

    def piece(first: int) -> None:
        block = np.zeros((2, rows, LANES), np.float32)
        part = given[first : first + LANES]
        block[:, :, : len(part)] = part.transpose(1, 2, 0)
        _encode(machine, block.reshape(2, -1), overlap, tables, symbols[first : first + LANES])

    if count <= LANES:  # a column with error feedback: what is left of the processor is for other matrices (`workers`)
        piece(0)
    else:
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for _ in pool.map(piece, range(0, count, LANES)):
                pass
    return torch.from_numpy(symbols).long()


@simd.inner
def _fill(values, to):
    """Write a number to all of a contiguous array."""
    for i in range(len(values)):
        values[i] = to


@simd.inner
def _copy(source, to):
    """Write an array to another one of its length."""
    for i in range(len(to)):
        to[i] = source[i]


@simd.inner
def _level_costs(given, row, levels, out):
    """Negated costs of all levels for the 32 targets and roots of a row: int16 [V * 32]."""
    target, root = simd.load(given[0], row * LANES), simd.load(given[1], row * LANES)
    for i in range(len(levels)):
        simd.store(out, i * LANES, negative_costs(target, root, levels[i]))


@simd.inner
def _better(best, path, level_costs, level):
    """The better of a path and one that comes over a state of this level."""
    return simd.maximum(best, simd.add(path, simd.load(level_costs, np.intp(level) * LANES)))


@simd.inner
def _row(rate, state_bits, before, level_costs, level_of, after):
    """Path costs after a row from those before it: int16 [G * 32] each.

    The groups a, a + 2^(L-2R), ... have the same predecessors, so these are loaded once, as many as registers hold.
    """
    branches = 1 << rate
    stride = 1 << (state_bits - 2 * rate)
    for a in range(stride):
        at = a * branches * LANES
        for c in range(0, branches, min(branches, 8)):
            p0, p1 = simd.load(before, at), simd.load(before, at + LANES)
            p2 = p3 = p4 = p5 = p6 = p7 = p0
            if branches > 2:
                p2, p3 = simd.load(before, at + 2 * LANES), simd.load(before, at + 3 * LANES)
            if branches > 4:
                p4, p5 = simd.load(before, at + 4 * LANES), simd.load(before, at + 5 * LANES)
                p6, p7 = simd.load(before, at + 6 * LANES), simd.load(before, at + 7 * LANES)
            at += 8 * LANES
            for i in range(branches):
                group = a + i * stride
                best = simd.load(after, group * LANES) if c else simd.zero()
                s = group * branches + c
                best = _better(best, p0, level_costs, level_of[s])
                best = _better(best, p1, level_costs, level_of[s + 1])
                if branches > 2:
                    best = _better(best, p2, level_costs, level_of[s + 2])
                    best = _better(best, p3, level_costs, level_of[s + 3])
                if branches > 4:
                    best = _better(best, p4, level_costs, level_of[s + 4])
                    best = _better(best, p5, level_costs, level_of[s + 5])
                    best = _better(best, p6, level_costs, level_of[s + 6])
                    best = _better(best, p7, level_costs, level_of[s + 7])
                simd.store(after, group * LANES, best)


@simd.inner
def _subtract_least(costs):
    """Shift each lane's path costs such that the least is 0."""
    least = simd.zero()
    for i in range(0, len(costs), LANES):
        least = simd.maximum(least, simd.load(costs, i))
    shift = np.empty(LANES, np.int16)
    simd.store(shift, 0, least)
    for lane in range(LANES):
        shift[lane] = _TOP - shift[lane]
    raised = simd.load(shift, 0)
    for i in range(0, len(costs), LANES):
        simd.store(costs, i, simd.add(simd.load(costs, i), raised))


@simd.inner
def _run(machine, given, first, steps, tables, kept):
    """Path costs of `steps` rows from row `first` on, around the end; those after the last row, int16 [G * 32].

    kept int16 [slots, G * 32]: the costs before every `step`-th row; the first slot is given.
    """
    rate, state_bits, _, _, period, step = machine
    _, levels, level_of = tables
    rows = given.shape[1] // LANES
    level_costs = np.empty(len(levels) * LANES, np.int16)
    before, after = np.empty(kept.shape[1], np.int16), np.empty(kept.shape[1], np.int16)
    _copy(kept[0], before)
    for k in range(steps):
        row = (first + k) % rows
        if k % step == 0:
            _copy(before, kept[k // step])
        _level_costs(given, row, levels, level_costs)
        _row(rate, state_bits, before, level_costs, level_of, after)
        if (k + 1) % period == 0:
            _subtract_least(after)
        before, after = after, before
    return before


@simd.inner
def _cost(machine, target, root, state, costs):
    """Cost of a state for a target in the scaled unit and its root."""
    _, _, multiplier, unit, _, _ = machine
    mixed = (np.uint64(state) * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
    value = np.int64(mixed & np.uint64(255)) - 510
    for shift in range(8, 32, 8):
        value += np.int64(mixed >> np.uint64(shift) & np.uint64(255))
    return np.int64(costs[min(np.int64(64.0 * abs(target - root * (value * unit))), len(costs) - 1)])


@simd.inner
def _trace(machine, given, first, steps, stop, costs, kept, lane, group, start, symbols):
    """Trace one lane's path that ends in `group` after `steps` rows back to before step `stop`; the group there.

    Step 0 is row `first`; `start` is the group before it, or -1 for any; symbols uint8 [T].
    """
    rate, state_bits, _, _, _, step = machine
    rows = given.shape[1] // LANES
    branches = 1 << rate
    groups = 1 << (state_bits - rate)
    reached = np.empty((step, 1 << (rate * step)), np.int64)
    end = steps
    while end > stop:
        begin = (end - 1) // step * step
        count = end - begin
        for k in range(count):
            at = (first + begin + k) % rows * LANES + lane
            for index in range(1 << (rate * (count - k))):
                state = ((group << (rate * (count - k))) | index) & ((1 << state_bits) - 1)
                cost = np.int64(_TOP)
                if k == 0:
                    cost -= kept[begin // step, state % groups * LANES + lane]
                else:
                    for j in range(branches):
                        cost = min(cost, reached[k - 1, index * branches + j])
                reached[k, index] = cost + _cost(machine, given[0, at], given[1, at], state, costs)
        index = 0
        for k in range(count - 1, -1, -1):
            now = begin + k
            if now < stop:
                break
            shared = max(0, state_bits - rate - rate * now) if start >= 0 else 0
            choice = 0
            least = np.int64(1 << 20)
            for j in range(branches):
                right = shared == 0 or ((group << rate | j) ^ (start >> (rate * now))) & ((1 << shared) - 1) == 0
                if right and reached[k, index * branches + j] < least:
                    least = reached[k, index * branches + j]
                    choice = j
            symbols[(first + now) % rows] = choice
            index = index * branches + choice
            group = (group << rate | choice) % groups
        end = begin
    return group


@njit(nogil=True, cache=KEPT)
def _encode(machine, given, overlap, tables, symbols):
    """Encode up to 32 sequences: given float32 [2, T * 32] targets and roots; the rows' bits go to symbols uint8 [lanes, T]."""
    rate, state_bits, _, _, _, step = machine
    rows, lanes, costs = given.shape[1] // LANES, len(symbols), tables[0]
    groups = 1 << (state_bits - rate)
    kept = np.empty(((max(rows, 2 * overlap) - 1) // step + 1, groups * LANES), np.int16)
    seam = np.empty(LANES, np.int64)
    _fill(kept[0], _TOP)
    end = _run(machine, given, rows - overlap, 2 * overlap, tables, kept)
    for lane in range(lanes):
        best = 0
        for group in range(groups):
            if end[group * LANES + lane] > end[best * LANES + lane]:
                best = group
        seam[lane] = _trace(
            machine, given, rows - overlap, 2 * overlap, overlap, costs, kept, lane, best, -1, symbols[lane]
        )  # fmt: skip
    _fill(kept[0], 0)
    for lane in range(lanes):
        kept[0, seam[lane] * LANES + lane] = _TOP
    _run(machine, given, 0, rows, tables, kept)
    for lane in range(lanes):
        _trace(machine, given, 0, rows, 0, costs, kept, lane, seam[lane], seam[lane], symbols[lane])
