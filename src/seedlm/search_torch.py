"""Seed search in plain torch: the brute force that defines the answer, and a bounded search that runs anywhere.

`brute_force` scores every seed. `search` needs far fewer: the energy of a block on the span of U(s),

    ||w||^2 - ||w - U q 2^E||^2  <=  ||Q' w||^2        (Q an orthonormal basis of U(s)'s columns)

caps what any coefficients can achieve, so one matrix product bounds all seeds at once. Seeds are then scored in descending
order of their cap until the next cap, plus the rounding margin of float32, falls below what the best scored seed achieved.
Every block returned is thereby proved: no seed outside the scored ones can win or tie.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from seedlm.basis import Basis, basis
from seedlm.codec import BlockCodes, Rounding, evaluate, power_of_two
from seedlm.format import BlockFormat

_MARGIN = 1e-5
"""Share of ||w||^2 by which a float32 energy may fall short of the true one: 24 products of unit vectors at 2^-24 each
give less than 4e-6."""
_FIRST_CANDIDATES = 8
_BRUTE_PAIRS, _BRUTE_PAIRS_GPU = 1 << 18, 1 << 22
"""Pairs scored at once. A GPU needs millions to be busy: 2^18 left an H100 at 10^7 pairs/s."""
_BOUND_ENERGIES = 1 << 23


def brute_force(
    blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding = "best"
) -> tuple[BlockCodes, Tensor]:
    """Score all 2^K - 1 seeds for every block and return the winners: Algorithm 3 as written.

    blocks    float32 [N, C]
    returns   codes of [N] blocks, score float64 [N] (`codec.score`)
    """
    tables = _tables_on(blocks.device, format)
    state = _State(blocks, exponent_bias, format, rounding, tables)
    everyone = torch.arange(format.num_seeds, device=blocks.device)
    pairs = _BRUTE_PAIRS_GPU if blocks.is_cuda else _BRUTE_PAIRS
    for positions in everyone.split(max(1, pairs // max(1, len(blocks)))):
        state.consider(torch.arange(len(blocks), device=blocks.device), positions.expand(len(blocks), -1))
    return state.result()


def search(
    blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding = "best"
) -> Iterator[tuple[BlockCodes, Tensor]]:
    """The same answer as `brute_force`, in pieces of consecutive blocks, each as soon as it is proved."""
    tables = _tables_on(blocks.device, format)
    span = tables.span.to(blocks.device, torch.float32).flatten(0, 1)  # [P * C, N]
    span = span.view(format.num_coefficients, format.block_size, -1)
    for chunk in blocks.split(max(1, _BOUND_ENERGIES // format.num_seeds)):
        yield _search_chunk(chunk, exponent_bias, format, rounding, tables, span)


def _tables_on(device: torch.device, format: BlockFormat) -> Basis:
    """The tables that scoring reads, moved once: on a GPU a copy for every call would take longer than its arithmetic."""
    tables = basis(format)
    return replace(tables, pinv=tables.pinv.to(device), cycle=tables.cycle.to(device))


def _search_chunk(blocks, exponent_bias, format, rounding, tables: Basis, span: Tensor):
    exponents = torch.frexp(blocks.abs().amax(1).double())[1].long()
    unit = (blocks.double() * power_of_two(-exponents).unsqueeze(1)).float()
    norms = unit.double().square().sum(1)
    energies = sum((unit @ q).square() for q in span)  # [N, seeds]

    state = _State(blocks, exponent_bias, format, rounding, tables)
    open_rows = torch.arange(len(blocks), device=blocks.device)
    count = min(_FIRST_CANDIDATES, format.num_seeds)
    done = 0
    while len(open_rows):
        top, positions = energies[open_rows].topk(count, dim=1)
        state.consider(open_rows, positions[:, done:])
        if count == format.num_seeds:
            break
        achieved = -state.score[open_rows] / format.divisor**2 * power_of_two(-2 * exponents[open_rows])
        unproved = top[:, -1].double() + _MARGIN * norms[open_rows] >= achieved
        open_rows = open_rows[unproved]
        done, count = count, min(4 * count, format.num_seeds)
    return state.result()


class _State:
    """The best candidate so far of every block, under the tie rule."""

    def __init__(self, blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding, tables: Basis) -> None:
        n, device = len(blocks), blocks.device
        self.arguments = (exponent_bias, format, tables, rounding)
        self.blocks = blocks.double()
        self.cycle = tables.cycle.to(device)
        self.score = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.seeds = torch.zeros(n, dtype=torch.int64, device=device)
        self.exponents = torch.zeros(n, dtype=torch.int64, device=device)
        self.coefficients = torch.zeros(n, format.num_coefficients, dtype=torch.int64, device=device)

    def consider(self, rows: Tensor, positions: Tensor) -> None:
        """Score seeds at positions int64 [len(rows), S] for these rows' blocks and keep the better of each row."""
        score, exponents, coefficients = evaluate(self.blocks[rows].unsqueeze(1), positions, *self.arguments)
        seeds = self.cycle[positions]
        least = score.amin(1, keepdim=True)
        pick = torch.where(score == least, seeds, seeds.max() + 1).argmin(1, keepdim=True)
        score, seeds, exponents = (x.gather(1, pick)[:, 0] for x in (score, seeds, exponents))
        coefficients = coefficients.gather(1, pick.unsqueeze(2).expand(-1, -1, coefficients.shape[2]))[:, 0]
        better = (score < self.score[rows]) | ((score == self.score[rows]) & (seeds < self.seeds[rows]))
        rows = rows[better]
        self.score[rows] = score[better]
        self.seeds[rows] = seeds[better]
        self.exponents[rows] = exponents[better]
        self.coefficients[rows] = coefficients[better]

    def result(self) -> tuple[BlockCodes, Tensor]:
        codes = BlockCodes(self.seeds.int(), self.exponents.to(torch.int8), self.coefficients.to(torch.int8))
        return codes, self.score
