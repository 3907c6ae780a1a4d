"""The Viterbi search in plain torch, written to be read; the kernels return its bits.

Path costs are kept for groups of states with the same successors. With P = 2^R, G = 2^(L-R) and row t's branch cost e_t,

    cost_t(g) = min over j < P of  cost_{t-1}((g*P + j) mod G) + e_t(value(g*P + j))

because state g*P + j's predecessors are the states of group (g*P + j) mod G. A path through group g after the last row is
traced back by asking, row by row, which j attains the minimum; the smallest does. The j's are the rows' stored bits.

A stream is cyclic: the group before row 0 must be the group after the last row. Which one it is to be, is found first:

    1. a run over the last W rows and then the first W, both ends free; the group its best path has between them is kept
    2. a run over all rows that starts in that group and is traced back from it

For W the whole sequence, step 1 would be a run over everything, twice; 2 * W is at most the number of rows.
Close to its start, the second run's traceback only takes groups that the start can reach, so that the stream always closes.
"""

import torch
from torch import Tensor

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import Trellis
from seedlm.codes.trellis.viterbi.cost import HIGHEST_PATH_COST, branch_costs, period, scaled_targets


def search(targets: Tensor, valid: int, trellis: Trellis, overlap: int) -> Tensor:
    """The rows' bits of the best cyclic streams that the procedure above finds.

    targets     float32 [N, T], in units of the values
    valid       rows from here on cost nothing, whatever their value
    overlap     W, rows of the first run on each side of the seam
    returns     int64 [N, T], each in 0 .. 2^R - 1
    """
    rows = targets.shape[1]
    overlap = min(overlap, rows // 2)
    scaled = scaled_targets(targets, trellis)
    seam = [*range(rows - overlap, rows), *range(overlap)]
    costs = _run(scaled, seam, valid, trellis, None)
    best = _first_min(costs[-1])
    boundary = _trace(scaled, seam, valid, trellis, costs, best, None, stop=overlap)[1]
    costs = _run(scaled, list(range(rows)), valid, trellis, boundary)
    return _trace(scaled, list(range(rows)), valid, trellis, costs, boundary, boundary, stop=0)[0]


def _first_min(costs: Tensor) -> Tensor:
    """Index of the smallest element along the last dimension, the first of equal ones."""
    size = costs.shape[-1]
    return (costs.long() * size + torch.arange(size, device=costs.device)).min(-1).values % size


def _row_costs(scaled: Tensor, row: int, valid: int, values: Tensor, trellis: Trellis) -> Tensor:
    """Branch costs int32 [N, ...] of one row for values [N or 1, ...]."""
    target = scaled[:, row].reshape(-1, *[1] * (values.dim() - 1))
    costs = branch_costs(target, values, trellis)
    return costs if row < valid else torch.zeros_like(costs)


def _run(scaled: Tensor, order: list[int], valid: int, trellis: Trellis, start: Tensor | None) -> list[Tensor]:
    """Path costs int32 [N, G] before the first row of `order` and after each; from group `start` [N], or from any."""
    values = codec.value_table(trellis, scaled.device).unsqueeze(0)
    groups, branches = trellis.groups, trellis.branches
    before = torch.arange(trellis.states, device=scaled.device) % groups
    cost = torch.zeros(len(scaled), groups, dtype=torch.int32, device=scaled.device)
    if start is not None:
        cost = cost.fill_(HIGHEST_PATH_COST).scatter_(1, start.unsqueeze(1), 0)
    costs = [cost]
    for step, row in enumerate(order):
        reached = cost[:, before] + _row_costs(scaled, row, valid, values, trellis)
        cost = reached.unflatten(1, (groups, branches)).amin(2).clamp(max=HIGHEST_PATH_COST)
        if (step + 1) % period(trellis) == 0:
            cost = cost - cost.amin(1, keepdim=True)
        costs.append(cost)
    return costs


def _trace(
    scaled: Tensor,
    order: list[int],
    valid: int,
    trellis: Trellis,
    costs: list[Tensor],
    group: Tensor,
    start: Tensor | None,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Bits int64 [N, steps - stop] of the paths that end in `group`, and their groups before step `stop`, int64 [N]."""
    rate, groups = trellis.rate, trellis.groups
    choices = torch.arange(trellis.branches, device=scaled.device)
    symbols = []
    for step in reversed(range(stop, len(order))):
        states = group.unsqueeze(1) * trellis.branches + choices
        values = codec.state_values(states, trellis.multiplier)
        total = costs[step].gather(1, states % groups) + _row_costs(scaled, order[step], valid, values, trellis)
        if start is not None:
            known = (1 << max(0, trellis.state_bits - rate - rate * step)) - 1
            wrong = (states % groups & known) != ((start >> min(rate * step, 62)) & known).unsqueeze(1)
            total = total.masked_fill(wrong, 1 << 20)
        choice = _first_min(total)
        symbols.append(choice)
        group = (group * trellis.branches + choice) % groups
    return torch.stack(symbols[::-1], 1), group
