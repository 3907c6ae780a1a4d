"""The Viterbi search in plain torch, written to be read; the kernels return its bits.

Path costs are kept for groups of states with the same successors. With P = 2^R, G = 2^(L-R) and row t's branch cost e_t,

    cost_t(g) = min over j < P of  cost_{t-1}((g*P + j) mod G) + e_t(value(g*P + j))

because state g*P + j's predecessors are the states of group (g*P + j) mod G. A path through group g after the last row is
traced back by asking, row by row, which j attains the minimum; the smallest does. The j's are the rows' stored bits.

A stream is cyclic: the group before row 0, at the *seam*, must be the group after the last row. Which one, is found first:

    1. a run over the last W rows and on over the first W, both ends free; the group at the seam of its best path is kept
    2. a run over all rows that starts in this group, traced back from the same group

A path that ends in the group near the start of the second run may only come from groups that lead back to the seam, however
high costs are, so a stream always closes. W trades work, (T + 2 W) / T, against error (docs/log/encoder.md).
"""

import torch
from torch import Tensor

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import Trellis
from seedlm.codes.trellis.viterbi.cost import HIGHEST_PATH_COST, branch_costs, period, scaled_targets


def search(targets: Tensor, roots: Tensor, trellis: Trellis, overlap: int) -> Tensor:
    """The rows' bits of the best cyclic streams that the procedure above finds.

    targets     float32 [N, T], in units of the values
    roots       float32 [N, T], of `cost.row_roots`; 0 for rows that cost nothing, whatever their value
    overlap     W, 1 .. T
    returns     int64 [N, T], each in 0 .. 2^R - 1
    """
    rows = targets.shape[1]
    given = scaled_targets(targets, roots, trellis), roots
    around = [*range(rows - overlap, rows), *range(overlap)]
    costs = _run(given, around, trellis)
    _, seam = _trace(given, around, trellis, costs, _first_min(costs[-1]), stop=overlap)
    costs = _run(given, list(range(rows)), trellis, seam)
    return _trace(given, list(range(rows)), trellis, costs, seam, stop=0, start=seam)[0]


def _first_min(costs: Tensor) -> Tensor:
    """Index of the smallest element along the last dimension, the first of equal ones (argmin promises none)."""
    size = costs.shape[-1]
    return (costs.long() * size + torch.arange(size, device=costs.device)).min(-1).values % size


_Given = tuple[Tensor, Tensor]
"""Scaled targets float16 [N, T] and roots float32 [N, T]."""


def _row_costs(given: _Given, row: int, values: Tensor, trellis: Trellis) -> Tensor:
    """Branch costs int32 [N, M] of one row for values [N or 1, M]."""
    scaled, roots = given
    return branch_costs(scaled[:, row, None], values, roots[:, row, None], trellis)


def _run(given: _Given, order: list[int], trellis: Trellis, start: Tensor | None = None) -> list[Tensor]:
    """Path costs int32 [N, G] before the first row of `order` and after each; from group `start` [N] or from any."""
    device = given[0].device
    values = codec.value_table(trellis, device).unsqueeze(0)
    groups, branches = trellis.groups, trellis.branches
    before = torch.arange(trellis.states, device=device) % groups
    cost = torch.zeros(len(given[0]), groups, dtype=torch.int32, device=device)
    if start is not None:
        cost.fill_(HIGHEST_PATH_COST).scatter_(1, start.unsqueeze(1), 0)
    costs = [cost]
    for step, row in enumerate(order):
        reached = cost[:, before] + _row_costs(given, row, values, trellis)
        cost = reached.unflatten(1, (groups, branches)).amin(2).clamp(max=HIGHEST_PATH_COST)
        if (step + 1) % period(trellis) == 0:
            cost = cost - cost.amin(1, keepdim=True)
        costs.append(cost)
    return costs


def _trace(
    given: _Given,
    order: list[int],
    trellis: Trellis,
    costs: list[Tensor],
    group: Tensor,
    stop: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Trace the paths that end in `group` after the last row of `order` back to before its row `stop`.

    returns     their bits int64 [N, rows traced], and the groups that they come from int64 [N]: `start` if it is given
    """
    rate, groups = trellis.rate, trellis.groups
    choices = torch.arange(trellis.branches, device=group.device)
    symbols = []
    for step in reversed(range(stop, len(order))):
        states = group.unsqueeze(1) * trellis.branches + choices
        values = codec.state_values(states, trellis.multiplier)
        total = costs[step].gather(1, states % groups) + _row_costs(given, order[step], values, trellis)
        shared = trellis.state_bits - rate - rate * step  # bits that the group before this step shares with `start`
        if start is not None and shared > 0:
            wrong = (states - (start >> rate * step).unsqueeze(1)) % (1 << shared) != 0
            total = total.masked_fill(wrong, 1 << 20)
        choice = _first_min(total)
        symbols.append(choice)
        group = (group * trellis.branches + choice) % groups
    return torch.stack(symbols[::-1], 1), group
