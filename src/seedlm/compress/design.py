"""The design space (paper Section 3.4): which block format has the least expected error under a budget of bits a weight.

    candidates   (`design_space`) every (K, C, P, coefficient bits, exponent bits) within the budget that no other contains
    blocks       what to measure on: N(0,1), or the weights of a model
    measure      the error of formats on such blocks, as the search would leave it

A candidate is measured without a search of its own. Formats of equal K, C and P share their matrices U(s), so one bound pass
serves all of them: a block's residual off the span of every U(s), which no coefficients can undercut. Seeds are then scored in
ascending order of it: with v = q 2^e,

    ||w - U v||^2  =  ||w||^2 - 2 v' U'w + v' U'U v

costs P^2 products. Only so many seeds of least residual are looked at. Where the next one could still win, the block's
error is known between two ends, and both are reported: `Rated.nmse` is what was found, `Rated.at_least` what no seed can
undercut. With 4 bits a coefficient they coincide. With 2 bits rounding outweighs the residual, which then says little about a
seed: `Rated.contenders` is how many seeds an exact search would have to score, and what such a format costs to use.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seedlm.codes.block.basis import generator, greville
from seedlm.codes.block.codec import best_exponent, power_of_two
from seedlm.codes.block.format import BlockFormat, Rounding, check_rounding
from seedlm.compress.design_space import WIDTH
from seedlm.compress.items import Target
from seedlm.compress.worker import pieces
from seedlm.errors import TensorError
from seedlm.storage.checkpoint import PackedInfo
from seedlm.storage.selection import matrices_of, select
from seedlm.storage.source import Source

_FIRST = 16
"""Seeds scored for every block; of the others those whose residual reaches below what these achieve."""
_KEPT = 256
_PAIRS = {"cpu": 1 << 22}
_MANY_PAIRS = 1 << 26
"""(block, seed) residuals held at once: 16 MB on a CPU, 268 MB on a GPU."""
_SCORED_PAIRS = 1 << 18
_CORNERS = 1 << 24
"""Pairs held at once that may be scored, and coefficients tried for them; float64."""


@dataclass(frozen=True, kw_only=True)
class Rated:
    """What a format leaves of some blocks, as shares of their energy: relative errors squared.

    nmse             error of the best code found
    standard_error   of `nmse`, from the blocks being a sample
    at_least         what no seed can undercut on these blocks, with this format
    unquantized      what no seed can undercut with real coefficients
    contenders       seeds of a block, on average, that reach below `nmse` with real coefficients
    """

    format: BlockFormat
    nmse: float
    standard_error: float
    at_least: float
    unquantized: float
    contenders: float

    @property
    def relative_error(self) -> float:
        """||W - W^||_F / ||W||_F."""
        return math.sqrt(self.nmse)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format.spec,
            "bits_per_weight": self.format.bits_per_weight,
            "nmse": self.nmse,
            "standard_error": self.standard_error,
            "at_least": self.at_least,
            "unquantized": self.unquantized,
            "contenders": self.contenders,
        }


def normal_blocks(count: int, seed: int = 0) -> Tensor:
    """Samples of N(0,1), float32 [count, WIDTH]."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def model_blocks(source: Source, count: int, seed: int = 0) -> Tensor:
    """Runs of weights from anywhere in the matrices that `compress` would take, each matrix scaled to unit mean square.

    returns   float32 [count, W]; W is WIDTH, or the shortest row's length
    Raises SourceError if the model has nothing to compress.
    """
    format = BlockFormat(block_size=8, num_coefficients=3)
    modules, _ = select(source.tensors, source.config, format)
    matrices = matrices_of(modules, source.tensors, source.config)
    width = min(WIDTH, *(columns for _, (_, columns), _ in matrices.values()))
    random = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([rows * columns for _, (rows, columns), _ in matrices.values()], dtype=torch.float64)
    shares = torch.multinomial(sizes, count, replacement=True, generator=random).bincount(minlength=len(sizes))
    samples = []
    for (module, (name, shape, stack)), share in zip(matrices.items(), shares.tolist(), strict=True):
        if share:
            (weight,) = pieces(source, name, Target(module, PackedInfo(format, shape, stack)), math.prod(shape))
            rows = torch.randint(shape[0], (share, 1), generator=random)
            starts = torch.randint(shape[1] - width + 1, (share, 1), generator=random)
            scale = weight.float().square().mean().sqrt().clamp_min(1e-30)
            samples.append(weight[rows, starts + torch.arange(width)].float() / scale)
    return torch.cat(samples)


def measure(
    formats: Iterable[BlockFormat],
    samples: Tensor,
    rounding: Rounding = "best",
    *,
    kept: int = _KEPT,
    prune: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Rated]:
    """The error that the best of all seeds leaves, for every format, in descending order of K, C and P.

    samples       float32 [N, W], W at least the largest block
    kept          seeds of a block to score at most
    prune         leave out a format that even with real coefficients is worse than another one of its K
    on_progress   told the number of formats just dealt with, any number of times
    The exponent's range lies about the exponents that a format needs on these blocks: a tensor's bias can put it there.
    """
    check_rounding(rounding)
    by_shape: dict[tuple[int, int, int], list[BlockFormat]] = {}
    for format in formats:
        by_shape.setdefault((format.seed_bits, format.block_size, format.num_coefficients), []).append(format)
    least: dict[int, float] = {}
    for (k, c, _), group in sorted(by_shape.items(), reverse=True):
        if c > samples.shape[1]:
            raise TensorError(f"{group[0]} needs samples of {c} weights, got {[*samples.shape]}")
        results = _measure_shape(group, samples, rounding, kept, least.get(k, math.inf) if prune else math.inf)
        least[k] = min([least.get(k, math.inf), *(result.nmse for result in results)])
        yield from results
        if on_progress is not None:
            on_progress(len(group))


def _measure_shape(formats: list[BlockFormat], samples: Tensor, rounding: Rounding, kept: int, limit: float) -> list[Rated]:
    """`measure` of formats that share K, C and P; nothing if their residual alone exceeds the limit."""
    shape, device = formats[0], samples.device
    blocks = samples[:, : shape.block_size].double()
    columns = generator(torch.arange(shape.num_seeds, device=device), shape).permute(2, 1, 0).contiguous().double()
    pinv, span = greville(columns)
    tables = pinv * shape.divisor, columns / shape.divisor, span.float()

    energy = blocks.square().sum(1)
    residuals: list[Tensor] = []
    rows: dict[BlockFormat, list[tuple[Tensor, Tensor, Tensor]]] = {format: [] for format in formats}
    biases: dict[BlockFormat, int] = {}
    pairs = _PAIRS.get(device.type, _MANY_PAIRS)
    for part in blocks.split(max(1, min(pairs // shape.num_seeds, _SCORED_PAIRS // kept))):
        nearest = _Nearest(part, *tables, kept)
        residuals.append(nearest.residual[:, 0])
        unquantized = float(torch.cat(residuals).sum() / energy.sum())  # so far
        if unquantized > limit:
            return []
        for format in formats:
            if format not in biases:
                biases[format] = nearest.choose_bias(format, rounding)
            rows[format].append(nearest.errors(format, biases[format], rounding))
    results = []
    for format in formats:
        error, at_least, contenders = (torch.cat(column) for column in zip(*rows[format], strict=True))
        nmse = error.sum() / energy.sum()
        deviation = (error - nmse * energy).square().mean().sqrt() / energy.mean()
        results.append(
            Rated(
                format=format,
                nmse=float(nmse),
                standard_error=float(deviation) / math.sqrt(len(blocks)),
                at_least=float(at_least.sum() / energy.sum()),
                unquantized=unquantized,
                contenders=float(contenders.double().mean()),
            )
        )
    return results


class _Nearest:
    """The seeds of least residual for some blocks, ascending, and what scoring them takes.

    energies    float32 [N, seeds], of the blocks on every seed's span
    norm        float64 [N, kept], ||w||^2
    residual    float64 [N, kept], that less the energy on the seed's span
    solution    float64 [N, kept, P], least-squares coefficients t = pinv(U) w
    moments     float64 [N, kept, P], U'w
    gram        float64 [N, kept, P, P], U'U
    complete    whether these are all seeds
    """

    def __init__(self, blocks: Tensor, pinv: Tensor, columns: Tensor, span: Tensor, kept: int) -> None:
        """Take blocks float64 [N, C]; pinv and columns float64 and span float32, each [P, C, seeds]."""
        single = blocks.float()
        self.energies = torch.zeros(len(blocks), span.shape[2], device=blocks.device)
        for rows in span:
            dot = single @ rows
            self.energies.addcmul_(dot, dot)
        kept = min(kept, span.shape[2])
        energy, seeds = self.energies.topk(kept, dim=1)
        self.complete = kept == span.shape[2]
        self.norm = blocks.square().sum(1, keepdim=True).expand_as(energy)
        self.residual = (self.norm - energy).clamp_min(0.0)
        self.solution = torch.einsum("pcnk,nc->nkp", pinv[:, :, seeds], blocks)
        chosen = columns[:, :, seeds].permute(2, 3, 1, 0)  # [N, kept, C, P]
        self.moments = torch.einsum("nkcp,nc->nkp", chosen, blocks)
        self.gram = chosen.mT @ chosen

    def choose_bias(self, format: BlockFormat, rounding: Rounding) -> int:
        """The exponent bias of least error among those that put the usual exponent in the middle of the range."""
        first = self.solution[:, :_FIRST]
        usual = int(torch.frexp(first.abs().amax(-1) / (format.coefficient_range[1] + 0.5))[1].median())
        errors = {
            bias: float(self._errors((slice(None), slice(_FIRST)), format, bias, rounding).amin(1).sum())
            for bias in (usual, usual - 1, usual + 1)
        }
        return min(errors, key=errors.__getitem__)

    def errors(self, format: BlockFormat, bias: int, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
        """Least error of the kept seeds, a bound for all seeds, both float64 [N]; and how many seeds reach below the error."""
        error = self._errors((slice(None), slice(_FIRST)), format, bias, rounding).amin(1)
        rows, places = (self.residual[:, _FIRST:] < error.unsqueeze(1)).nonzero(as_tuple=True)
        more = self._errors((rows, places + _FIRST), format, bias, rounding)
        error = error.scatter_reduce(0, rows, more, "amin")
        at_least = error if self.complete else error.minimum(self.residual[:, -1])
        return error, at_least, (self.energies > (self.norm[:, :1] - error.unsqueeze(1))).sum(1)

    def _errors(self, which: tuple, format: BlockFormat, bias: int, rounding: Rounding) -> Tensor:
        """Errors of the chosen (block, seed) pairs with the best coefficients that `codec` would try."""
        solution, moments, gram = self.solution[which], self.moments[which], self.gram[which]
        shape, count = solution.shape[:-1], format.num_coefficients
        step = max(1, _CORNERS // (count << count))
        pieces = zip(
            solution.reshape(-1, count).split(step),
            moments.reshape(-1, count).split(step),
            gram.reshape(-1, count, count).split(step),
            strict=True,
        )
        return self.norm[which] + torch.cat([_score(*piece, format, bias, rounding) for piece in pieces]).view(shape)


def _score(solution: Tensor, moments: Tensor, gram: Tensor, format: BlockFormat, bias: int, rounding: Rounding) -> Tensor:
    """||w - U v||^2 - ||w||^2, least over the candidates of `codec.evaluate`: all corners of t's cell at three exponents.

    solution, moments   float64 [n, P]
    gram                float64 [n, P, P]
    returns             float64 [n]
    """
    start = best_exponent(solution, bias, format)
    corners = torch.tensor([*itertools.product((0.0, 1.0), repeat=solution.shape[1])], dtype=torch.float64)
    least = torch.full_like(solution[:, 0], torch.inf)
    for shift in (0,) if rounding == "nearest" else (-1, 0, 1):
        unit = power_of_two((start + shift).clamp(*format.exponent_range) + bias).view(-1, 1, 1)
        scaled = solution.unsqueeze(1) / unit
        tried = scaled.round() if rounding == "nearest" else scaled.floor() + corners.to(solution.device)
        v = tried.clamp_(*format.coefficient_range) * unit
        least = least.minimum(((v @ gram - 2.0 * moments.unsqueeze(1)) * v).sum(2).amin(1))
    return least
