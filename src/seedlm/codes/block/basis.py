"""What the codec and every search need to know about each seed's matrix U(s), computed once per format.

V(s) holds the C * P states after the seed, row by row; U(s) = (V(s) - center) / divisor. All tables are ordered along the
register's cycle, not by seed: position n stands for the seed `cycle[n]`, so V of position n is the window of the cycle that
starts at n + 1, and column p of one position is column p - 1 of the next.

Pseudo-inverses and orthonormal bases come from one column-by-column recurrence (Greville) in float64, written with separate
elementwise operations in a fixed order. IEEE arithmetic then gives the same bits on every machine, library and device, which a
call into LAPACK does not, and the choice of seeds hangs on them. Each column is orthogonalised twice: one pass loses
half the digits of the ill-conditioned seeds (cond up to 5e5 at K = 16).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from seedlm.codes.block import lfsr
from seedlm.codes.block.format import PRESETS, BlockFormat

KEPT_FORMATS: Final = len(PRESETS) + 1
"""Formats whose tables are kept, here and in the searches: a mixture goes from one preset to the next with every weight."""

_DEPENDENT = 1e-10
"""A column whose residual is below this share of its norm lies in the span of those before it (small K only); the
least independent column of K = 16 has 3e-6."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Tables of one format, n running over the positions of the cycle.

    cycle      int64 [N + C*P]: the register's states from state 1 on, wrapped round far enough for every window
    position   int64 [2^K]: where a seed stands in the cycle; entry 0 is unused
    pinv       float32 [P, C, N]: pseudo-inverse of V(s) - center, rounded once from float64
    span       float64 [P, C, N]: orthonormal columns spanning those of U(s), in their order; zero where a column is dependent
    """

    cycle: Tensor
    position: Tensor
    pinv: Tensor
    span: Tensor


@lru_cache(maxsize=8)
def cycle_states(seed_bits: int) -> Tensor:
    """The register's cycle from state 1 on, twice over so that windows may wrap: int64 [2 * (2^K - 1)]."""
    states, columns = torch.ones(1, dtype=torch.int64), lfsr.advance_matrix(1, seed_bits)
    values = torch.arange(256)
    while len(states) < lfsr.period(seed_bits):  # as many again, by the map that goes so many steps further
        further = torch.zeros_like(states)
        for first in range(0, seed_bits, 8):  # a byte's image from a table: 24 bits one by one take seconds
            images = torch.zeros_like(values)
            for bit, column in enumerate(columns[first : first + 8]):
                images ^= (values >> bit & 1) * column
            further ^= images[states >> first & 255]
        states = torch.cat([states, further])
        columns = [lfsr.apply(columns, column) for column in columns]
    states = states[: lfsr.period(seed_bits)]
    return torch.cat([states, states])


@lru_cache(maxsize=8)
def seed_positions(seed_bits: int) -> Tensor:
    """Where each seed stands in the cycle: int64 [2^K], entry 0 is -1."""
    size = lfsr.period(seed_bits)
    position = torch.full((size + 1,), -1, dtype=torch.int64)
    position[cycle_states(seed_bits)[:size]] = torch.arange(size)
    return position


def generator(positions: Tensor, format: BlockFormat) -> Tensor:
    """V(s) - center of the seeds at these positions of the cycle.

    positions   int64 [...]
    returns     int64 [..., C, P]
    """
    cycle = cycle_states(format.seed_bits).to(positions.device)
    count = format.block_size * format.num_coefficients
    steps = torch.arange(1, count + 1, device=positions.device) + positions.unsqueeze(-1)
    window = cycle[steps % format.num_seeds]
    return window.unflatten(-1, (format.block_size, format.num_coefficients)) - format.center


@lru_cache(maxsize=KEPT_FORMATS)
def basis(format: BlockFormat) -> Basis:
    """The tables of a format, kept for the life of the process (19 MB at the 4-bit preset)."""
    size, count = format.num_seeds, format.block_size * format.num_coefficients
    columns = generator(torch.arange(size), format).to(torch.float64).permute(2, 1, 0).contiguous()  # [P, C, N]
    pinv, span = greville(columns)
    cycle = cycle_states(format.seed_bits)
    repeats = -(-(size + count) // len(cycle))
    return Basis(
        cycle=cycle.repeat(repeats)[: size + count].clone(),
        position=seed_positions(format.seed_bits),
        pinv=pinv.to(torch.float32),
        span=span,
    )


def greville(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-inverse and orthonormal column basis of many small matrices at once.

    columns   float64 [P, C, N], integers
    returns   float64 [P, C, N] pseudo-inverse (its rows), float64 [P, C, N] orthonormal columns
    """
    span = torch.zeros_like(columns)
    pinv = torch.zeros_like(columns)
    for k, column in enumerate(columns):
        residual = column
        for _ in range(2):
            for q in span[:k]:
                residual = residual - q * _dot(q, residual)
        squared = _dot(residual, residual)
        independent = squared > _DEPENDENT**2 * _dot(column, column)
        span[k] = torch.where(independent, residual / squared.sqrt(), 0.0)

        combination = torch.stack([_dot(row, column) for row in pinv[:k]]) if k else columns.new_zeros(0, columns.shape[2])
        fresh = residual / squared
        if not bool(independent.all()):
            weighted = torch.zeros_like(column)
            for d, row in zip(combination, pinv[:k], strict=True):
                weighted = weighted + d * row
            fresh = torch.where(independent, fresh, weighted / (1.0 + _dot(combination, combination)))
        for p in range(k):
            pinv[p] = pinv[p] - combination[p] * fresh
        pinv[k] = fresh
    return pinv, span


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the first dimension of a * b, in order and one rounding at a time: [C, N] -> [N]."""
    total = torch.zeros_like(a[0]) if len(a) else a.new_zeros(a.shape[1:])
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total
