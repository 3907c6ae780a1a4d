"""Seed search in plain torch: the brute force that defines the answer, and a bounded search that runs anywhere.

`brute_force` scores every seed. `search` needs far fewer: the energy of a block on the span of U(s),

    ||w||^2 - ||w - U q 2^E||^2  <=  ||Q' w||^2        (Q an orthonormal basis of U(s)'s columns)

caps what any coefficients can achieve, so one matrix product bounds all seeds at once. A few seeds with the highest caps set
the bar, and every seed whose cap, plus the rounding margin of float32, reaches it is scored. What is left out can neither win
nor tie, so every block's answer is proved.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from seedlm.codes.block.basis import basis
from seedlm.codes.block.codec import BlockCodes, evaluate, power_of_two
from seedlm.codes.block.format import BlockFormat, Rounding

_MARGIN = 1e-5
"""Share of ||w||^2 by which a float32 energy may fall short of the true one: 24 products of unit vectors at 2^-24 each
give less than 4e-6."""
_PAIRS = {"cpu": 1 << 16}
_MANY_PAIRS = 1 << 22
"""(block, seed) pairs scored at once. On a CPU 2^18 of them leave its caches and take 2 to 3 times as long (presets 2, 3 and
4, one core); elsewhere millions, or the device idles."""
_FIRST_SEEDS = 8
"""Seeds that set the bar, each the best of its tile. One is not enough: the highest cap may be an ill-conditioned seed's, whose
coefficients do not survive rounding."""
_CHUNK_BLOCKS, _TILE_SEEDS = 256, 2048
"""Blocks searched together, and seeds bounded together on a CPU: 2 MB of energies, which stay in its caches."""


def brute_force(
    blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding = "best"
) -> tuple[BlockCodes, Tensor]:
    """Score all 2^K - 1 seeds for every block and return the winners: Algorithm 3 as written.

    blocks    float32 [N, C]
    returns   codes of [N] blocks, score float64 [N] (`codec.score`)
    """
    winners = _Winners(blocks, exponent_bias, format, rounding)
    rows = torch.arange(len(blocks), device=blocks.device)
    everyone = torch.arange(format.num_seeds, device=blocks.device)
    for positions in everyone.split(max(1, _pairs(blocks) // max(1, len(blocks)))):
        winners.consider(rows.repeat_interleave(len(positions)), positions.repeat(len(rows)))
    return winners.result()


def search(
    blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding = "best"
) -> Iterator[tuple[BlockCodes, Tensor]]:
    """The same answer as `brute_force`, in pieces of consecutive blocks, each as soon as it is proved."""
    span = basis(format).span.to(blocks.device, _bound_dtype())
    for chunk in blocks.split(_CHUNK_BLOCKS):
        exponents = torch.frexp(chunk.abs().amax(1).double())[1].long()
        unit = chunk.double() * power_of_two(-exponents).unsqueeze(1)
        unit = (unit / unit.norm(dim=1, keepdim=True)).nan_to_num().to(span.dtype)

        peaks, positions = [], []
        for first, energies in _energies(unit, span):
            value, index = energies.max(1)
            peaks.append(value)
            positions.append(index + first)
        highest = torch.stack(peaks, 1).topk(min(_FIRST_SEEDS, len(peaks)), dim=1).indices
        winners = _Winners(chunk, exponent_bias, format, rounding)
        rows = torch.arange(len(chunk), device=chunk.device).repeat_interleave(highest.shape[1])
        winners.consider(rows, torch.stack(positions, 1).gather(1, highest).flatten())

        bar = (winners.achieved() - _MARGIN).to(span.dtype).unsqueeze(1)
        reaching = []
        for first, energies in _energies(unit, span):
            rows, index = (energies >= bar).nonzero(as_tuple=True)
            reaching.append(torch.stack([rows, index + first], 1))
        for part in torch.cat(reaching).split(_pairs(blocks)):
            winners.consider(*part.unbind(1))
        yield winners.result()


def _energies(unit: Tensor, span: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Energies of unit blocks [N, C] on every seed's span, some seeds at a time: (first position, [N, seeds]).

    They are computed anew for each of the two passes: on a CPU that is cheaper than to write and read them.
    """
    step = _TILE_SEEDS if unit.device.type == "cpu" else 8 * _TILE_SEEDS
    for first in range(0, span.shape[2], step):
        energies = (unit @ span[0, :, first : first + step]).square_()
        for columns in span[1:, :, first : first + step]:
            dot = unit @ columns
            energies.addcmul_(dot, dot)
        yield first, energies


def _bound_dtype() -> torch.dtype:
    """float32, unless torch has been told to take its products less seriously: TF32 and bfloat16 exceed the margin."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was told for one kind of device
        exact = False
    return torch.float32 if exact else torch.float64


def _pairs(blocks: Tensor) -> int:
    return _PAIRS.get(blocks.device.type, _MANY_PAIRS)


class _Winners:
    """The best candidate so far of every block, under the tie rule."""

    def __init__(self, blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding) -> None:
        n, device = len(blocks), blocks.device
        tables = basis(format)
        tables = replace(tables, pinv=tables.pinv.to(device))
        self.format = format
        self.arguments = (exponent_bias, format, tables, rounding)
        self.blocks = blocks.double()
        self.cycle = tables.cycle.to(device)
        self.score = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.seeds = torch.full((n,), format.num_seeds + 1, device=device)
        self.exponents = torch.zeros(n, dtype=torch.int64, device=device)
        self.coefficients = torch.zeros(n, format.num_coefficients, dtype=torch.int64, device=device)

    def consider(self, rows: Tensor, positions: Tensor) -> None:
        """Score the seed at positions[i] for block rows[i], both int64 [pairs], and keep what beats a row's winner."""
        score, exponents, coefficients = evaluate(self.blocks[rows], positions, *self.arguments)
        seeds = self.cycle[positions]
        least = self.score.scatter_reduce(0, rows, score, "amin")
        self.seeds[least < self.score] = self.format.num_seeds + 1
        lowest = self.seeds.scatter_reduce(0, rows, torch.where(score == least[rows], seeds, self.format.num_seeds + 1), "amin")
        winners = (score == least[rows]) & (seeds == lowest[rows])
        rows = rows[winners]
        self.score, self.seeds = least, lowest
        self.exponents[rows] = exponents[winners]
        self.coefficients[rows] = coefficients[winners]

    def achieved(self) -> Tensor:
        """Share of each block's energy that its winner accounts for, float64 [N]; 0 for blocks of zeros."""
        exponents = torch.frexp(self.blocks.abs().amax(1))[1].long()
        energy = (self.blocks * power_of_two(-exponents).unsqueeze(1)).square().sum(1) * self.format.divisor**2
        return (-self.score * power_of_two(-2 * exponents) / energy).nan_to_num()

    def result(self) -> tuple[BlockCodes, Tensor]:
        codes = BlockCodes(self.seeds.int(), self.exponents.to(torch.int8), self.coefficients.to(torch.int8))
        return codes, self.score
