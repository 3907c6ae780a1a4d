"""Seed search on an NVIDIA GPU: a proved bound on tensor cores, then exact scores for the few seeds left.

Every block is scaled to unit length, so that a seed's residual 1 - ||Q'w||^2 says what share of the block it cannot reach
whatever its coefficients. One chunk of blocks goes through five steps, all on the GPU:

    bound      least residual of every tile of 64 seeds, products and maxima in float16 (`groups` says of what)
    first      four of the best tiles, one seed of each scored exactly: the threshold
    list       tiles, then seeds, whose residual less the margin does not exceed the threshold
    evaluate   `codec.evaluate` on the listed (block, seed) pairs, one to a lane, float64
    select     the least score of a block, then the least (seed, exponent, coefficients) among its equals

A seed that is not listed provably scores worse than one that was scored: `_margins` bounds everything that the fast
arithmetic can lose. Lists are sized for an average block (5.6 tiles and 4.1 seeds on Gaussian weights at the 4-bit preset). A
block that does not fit, or has no length, stays open and is redone: with longer lists if there are many, then with every
seed. Nothing is dropped, and `search` says how many there were.

The order within a list depends on timing; what is selected from it does not.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm import search_triton_kernels as kernels
from seedlm.basis import basis
from seedlm.codec import BlockCodes, Rounding
from seedlm.format import WORD_BITS, BlockFormat
from seedlm.groups import groups

WORKING_SET = 3 << 29
"""Bytes of GPU memory that a search may use at once, beside the tables (8 MB at the 4-bit preset) and its result."""

_TILE_SEEDS = 64
_TILE_ROWS = 64
_SEGMENT = 256
"""Blocks to a program where blocks are independent."""
_FIRST_TILES = 4
"""Seeds scored for the threshold. One is not enough: where its coefficients clamp, hundreds of seeds reach the threshold."""
_LIST_TILES, _LIST_BLOCKS = 16, 4096
"""Tiles and blocks to a segment of the lists."""
_ENTRIES = 4
"""Tiles rescanned by a warp at a time: 16 read so many cache lines a load that it took 0.69 ms instead of 0.41 (H100)."""
_BUDGETS = (16, 512)
"""Tiles that the lists have room for, per block, in the first and the second round."""
_SEEDS_PER_TILE = 3
"""Seeds that they have room for, per tile; with one, a single block's 1024 seeds could crowd out its neighbours."""
_FEW_BLOCKS = 64
"""Open blocks that are scored with every seed at once (0.3 ms): fewer cost less than another round of the bound."""
_MAX_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class _Tables:
    """Tables of a format on one device; tiles are padded with zero rows, which reach nothing, to whole `_TILE_ROWS`.

    rows        float16 [tiles/64, T, G + P-1, 64, Ck]: a group's own rows, then its shared ones, as the bound pass reads them
    own         float16 [tiles, C, T, G]
    shared      float16 [tiles, P-1, C, T]
    position    int32 [tiles, T, G]
    stream      int32 [...]: the register's endless bit stream, 32 bits a word
    pinv        float32 [N, P, C]
    """

    rows: Tensor
    own: Tensor
    shared: Tensor
    position: Tensor
    stream: Tensor
    pinv: Tensor
    seed_margin: float
    tile_margin: float


def search(
    blocks: Tensor,
    exponent_bias: int,
    format: BlockFormat,
    rounding: Rounding = "best",
    *,
    working_set: int = WORKING_SET,
    redone: Counter[int | None] | None = None,
) -> Iterator[tuple[BlockCodes, Tensor]]:
    """The same answer as `search_torch.brute_force`, in pieces of consecutive blocks.

    blocks        float32 [N, C] on a CUDA device
    working_set   bytes of GPU memory to stay within
    redone        is told how many blocks did not close: budget of the next try (None: every seed) -> blocks
    """
    with torch.cuda.device(blocks.device):
        job = _Job(blocks.device, exponent_bias, format, rounding, working_set, Counter() if redone is None else redone)
    pending: _Round | None = None
    for chunk in blocks.split(job.chunk_blocks(_BUDGETS[0])):
        # The GPU gets its next chunk before this thread waits for the last one.
        with torch.cuda.device(blocks.device):
            started = job.start(chunk.contiguous())
            finished, pending = pending and job.finish(pending), started
        if finished:
            yield finished
    if pending:
        with torch.cuda.device(blocks.device):
            finished = job.finish(pending)
        yield finished


class _Round(NamedTuple):
    """A chunk's first round under way: blocks, their score, key and whether they stay open, and, on the host, how many do."""

    blocks: Tensor
    score: Tensor
    key: Tensor
    unsolved: Tensor
    still_open: Tensor
    done: torch.cuda.Event


class _Job:
    """One search: its tables and constants."""

    def __init__(
        self, device: torch.device, bias: int, format: BlockFormat, rounding: Rounding, working_set: int, redone: Counter
    ) -> None:
        self.format, self.working_set, self.redone = format, working_set, redone
        self.tables = _tables(format, device)
        low, high = format.coefficient_range
        self.evaluation = {
            "BIAS": bias,
            "K": format.seed_bits,
            "C": format.block_size,
            "P": format.num_coefficients,
            "DIVISOR": format.divisor,
            "Q_LOW": low,
            "Q_HIGH": high,
            "Q_BITS": format.coefficient_bits,
            "E_LOW": format.exponent_range[0],
            "E_HIGH": format.exponent_range[1],
            "E_BITS": format.exponent_bits,
            "NEAREST": rounding == "nearest",
            "LANES": 128,
        }

    def chunk_blocks(self, budget: int) -> int:
        """Blocks, whole segments of them, whose lists and bounds fit the working set."""
        tiles = self.tables.position.shape[0]
        per_block = 2 * tiles + 6 * self.tables.rows.shape[-1] + 64 + 32 * _FIRST_TILES + (8 + 24 * _SEEDS_PER_TILE) * budget
        return max(1, min(_MAX_CHUNK, self.working_set // per_block) // _SEGMENT) * _SEGMENT

    def start(self, blocks: Tensor) -> _Round:
        """Queue the first round of a chunk; waits for nothing."""
        score, key, unsolved = self.bounded(blocks, _BUDGETS[0])
        count = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(unsolved.sum(), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return _Round(blocks, score, key, unsolved, count, done)

    def finish(self, started: _Round) -> tuple[BlockCodes, Tensor]:
        """Wait for a chunk and redo what stayed open until nothing is."""
        started.done.synchronize()
        if int(started.still_open):
            self.redo(started.blocks, started.unsolved.nonzero()[:, 0], started.score, started.key)
        return _codes(started.key, self.format), started.score

    def redo(self, blocks: Tensor, rows: Tensor, score: Tensor, key: Tensor) -> None:
        """Solve these rows' blocks in place: with a larger budget if they are many, then with every seed."""
        for budget in (*_BUDGETS[1:], None):
            if not len(rows):
                break
            # Open blocks are often copies of one: zeros, constants.
            distinct, copy = blocks[rows].unique(dim=0, return_inverse=True)
            if len(distinct) <= _FEW_BLOCKS:
                budget = None
            self.redone[budget] += len(rows)
            size = self.chunk_blocks(budget) if budget else max(1, self.working_set // (24 * self.format.num_seeds))
            pieces = [self.bounded(p, budget) if budget else self.exhaustive(p) for p in distinct.split(size)]
            new_score, new_key, still = (torch.cat(parts)[copy] for parts in zip(*pieces, strict=True))
            score[rows], key[rows] = new_score, new_key
            rows = rows[still]

    def bounded(self, blocks: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
        """Winners' score [N] and key [N], and which blocks stay open (bool [N]; theirs mean nothing)."""
        tables, device, count = self.tables, blocks.device, len(blocks)
        blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -count % _SEGMENT))
        tiles, groups_per_tile, group = tables.position.shape
        padded, segments, width = len(blocks), len(blocks) // _SEGMENT, tables.rows.shape[-1]
        shape = {"C": self.format.block_size, "P": self.format.num_coefficients, "CK": width, "T": groups_per_tile, "G": group}

        unit = torch.empty(padded, width, dtype=torch.float32, device=device)
        half = torch.empty(padded, width, dtype=torch.float16, device=device)
        norm = torch.empty(padded, dtype=torch.float64, device=device)
        kernels.normalize[segments,](blocks, unit, half, norm, C=self.format.block_size, CK=width, BN=_SEGMENT)
        least = torch.empty(tiles, padded, dtype=torch.float16, device=device)
        _launch_bound(half, tables.rows, least)

        best = _Best(padded, device)
        first, seeds = (_Pairs(segments, _FIRST_TILES * _SEGMENT, device, full=True) for _ in range(2))
        kernels.first[segments,](least, *first, padded, TILES=tiles, BN=_SEGMENT, TT=16, FIRST=_FIRST_TILES)
        threshold = torch.empty(padded, dtype=torch.float32, device=device)
        kernels.rescan[segments, 8](
            unit, tables.own, tables.shared, tables.position, threshold, best.open, *first, *seeds,
            first.capacity, seeds.capacity, ENTRIES=64, FIRST=True, **shape,
        )  # fmt: skip
        self.evaluate(blocks, seeds, best, splits=8)

        kernels.threshold[segments,](
            norm, best.score, threshold, best.open, tables.seed_margin, DIVISOR=self.format.divisor, BN=_SEGMENT
        )
        columns = min(_LIST_BLOCKS, padded)
        parts = tiles // _LIST_TILES, -(-padded // columns)
        capacity = columns * budget // parts[0]
        wanted = _Pairs(parts[0] * parts[1], capacity, device)
        seeds = _Pairs(parts[0] * parts[1], capacity * _SEEDS_PER_TILE, device)
        kernels.list[parts](
            least, threshold, best.open, best.listed, *wanted, padded, columns, wanted.capacity,
            tables.tile_margin - tables.seed_margin, BN=_SEGMENT, TT=_LIST_TILES, LIMIT=8 * budget, num_warps=1,
        )  # fmt: skip
        kernels.rescan[parts[0] * parts[1], 4](
            unit, tables.own, tables.shared, tables.position, threshold, best.open, *wanted, *seeds,
            wanted.capacity, seeds.capacity, ENTRIES=_ENTRIES, FIRST=False, num_warps=1, **shape,
        )  # fmt: skip
        self.select(seeds, *self.evaluate(blocks, seeds, best, splits=2), best, splits=1)
        score, key = best.result()
        return score[:count], key[:count], best.open[:count] != 0

    def exhaustive(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Winners' score [N] and key [N] over all seeds, and that no block stays open."""
        count, device = len(blocks), blocks.device
        seeds, best = _Pairs(count, self.format.num_seeds, device, full=True), _Best(count, device)
        seeds.block.copy_(torch.arange(count, dtype=torch.int32, device=device).unsqueeze(1).expand_as(seeds.block))
        seeds.item.copy_(torch.arange(seeds.capacity, dtype=torch.int32, device=device).expand_as(seeds.item))
        self.select(seeds, *self.evaluate(blocks, seeds, best, splits=64), best, splits=16)
        return *best.result(), torch.zeros(count, dtype=torch.bool, device=device)

    def evaluate(self, blocks: Tensor, seeds: "_Pairs", best: "_Best", splits: int) -> tuple[Tensor, Tensor]:
        """Score and key int64 [segments, capacity] of every pair; lowers `best.score`."""
        score, key = (torch.empty(seeds.block.shape, dtype=torch.int64, device=blocks.device) for _ in range(2))
        # A fused multiply-add would round once where the definition rounds twice.
        kernels.evaluate[len(seeds.count), splits](
            blocks, self.tables.pinv, self.tables.stream, *seeds, score, key, best.score, seeds.capacity,
            enable_fp_fusion=False, **self.evaluation,
        )  # fmt: skip
        return score, key

    def select(self, seeds: "_Pairs", score: Tensor, key: Tensor, best: "_Best", splits: int) -> None:
        kernels.select[len(seeds.count), splits](*seeds, score, key, best.score, best.key, seeds.capacity, LANES=256)


class _Pairs:
    """Lists of (block, item) in segments of one capacity; items are tiles (times 4, plus a tag) or positions in the cycle.

    block, item   int32 [segments, capacity], in no particular order
    count         int32 [segments]; may exceed the capacity, what is beyond was not kept
    """

    def __init__(self, segments: int, capacity: int, device: torch.device, full: bool = False) -> None:
        self.capacity = capacity = max(16, capacity // 16 * 16) if not full else capacity
        self.block, self.item = (torch.empty(segments, capacity, dtype=torch.int32, device=device) for _ in range(2))
        self.count = torch.full((segments,), capacity if full else 0, dtype=torch.int32, device=device)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.block, self.item, self.count))


class _Best:
    """The best of every block so far (a score as `evaluate` orders it, int64), tiles it has listed, whether it stays open."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.score, self.key = torch.full((2, blocks), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self.listed, self.open = torch.zeros(2, blocks, dtype=torch.int32, device=device)

    def result(self) -> tuple[Tensor, Tensor]:
        """Score float64 and key int64."""
        ordered = self.score
        return (ordered ^ ((ordered >> 63) & torch.iinfo(torch.int64).max)).view(torch.float64), self.key


def _codes(key: Tensor, format: BlockFormat) -> BlockCodes:
    """Fields of keys int64 [N]: seed, exponent, coefficients, most significant first, each counted from its least value."""
    coefficients = []
    for p in reversed(range(format.num_coefficients)):
        shift = format.coefficient_bits * (format.num_coefficients - 1 - p)
        coefficients.append(((key >> shift) & ((1 << format.coefficient_bits) - 1)) + format.coefficient_range[0])
    shift = format.coefficient_bits * format.num_coefficients
    exponents = ((key >> shift) & ((1 << format.exponent_bits) - 1)) + format.exponent_range[0]
    seeds = key >> (shift + format.exponent_bits)
    return BlockCodes(seeds.int(), exponents.to(torch.int8), torch.stack(coefficients[::-1], 1).to(torch.int8))


@lru_cache(maxsize=4)
def _tables(format: BlockFormat, device: torch.device) -> _Tables:
    found = groups(format)
    count, group, size = found.own.shape
    per_tile = max(1, _TILE_SEEDS // group)
    tiles = -(-count // (per_tile * _TILE_ROWS)) * _TILE_ROWS
    pad = tiles * per_tile - count

    def tiled(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, pad)).unflatten(0, (tiles, per_tile))

    own, shared = tiled(found.own), tiled(found.shared)  # [tiles, T, G or P-1, C]
    rows = torch.cat([own, shared], 2).unflatten(0, (-1, _TILE_ROWS)).permute(0, 2, 3, 1, 4)
    width = -(-size // 16) * 16
    cycle = basis(format).cycle
    bits = (cycle[: format.num_seeds] & 1).repeat(-(-(format.num_seeds + 256) // format.num_seeds))
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % WORD_BITS)).view(-1, WORD_BITS)
    words = (bits << torch.arange(WORD_BITS)).sum(1)
    seed_margin, tile_margin = _margins(format, found.deficit)
    return _Tables(
        rows=torch.nn.functional.pad(rows, (0, width - size)).contiguous().to(device),
        own=own.permute(0, 3, 1, 2).contiguous().to(device),
        shared=shared.permute(0, 2, 3, 1).contiguous().to(device),
        position=tiled(found.position.unsqueeze(-1)).squeeze(-1).contiguous().to(device),
        stream=words.to(torch.uint32).view(torch.int32).to(device),
        pinv=basis(format).pinv.permute(2, 0, 1).contiguous().to(device),
        seed_margin=seed_margin,
        tile_margin=tile_margin,
    )


def _margins(format: BlockFormat, deficit: float) -> tuple[float, float]:
    """By how much the true residual of a unit block may lie below the one computed by `rescan`, and by `bound`.

    `rescan` works in float32: C products, their sum and P squares of at most 1 each lose less than (C + P + 4) 2^-23.
    `bound` in float16 (unit roundoff h = 2^-11) adds, with energies up to 1 + d, d the deficit:

        2h + h^2 + 2 sqrt(C) 2^-25   the block rounded to float16, subnormal where small
        4h + 4h^2                    each product rounded to float16, 2h because truncation is not ruled out, then squared
        P h / 2                      P subtractions from at most 1
        2^-14                        the tag in the lowest bits, cleared: that raises negative residuals, by 2^-8 of 0.01
        2^-14                        the sums inside the tensor cores, undocumented: 2^-18 each is a hundred times what was seen
    """
    h = 2.0**-11
    size, count = format.block_size, format.num_coefficients
    single = (size + count + 4) * 2.0**-22 + deficit
    half = (6 * h + 5 * h * h) * (1 + 2 * deficit) + 2 * size**0.5 * 2.0**-25 + count * h / 2 + 2.0**-13
    return single, single + half


def _launch_bound(half: Tensor, rows: Tensor, least: Tensor) -> None:
    """Fill least float16 [tiles, blocks] for unit blocks float16 [blocks, Ck] and `_Tables.rows`."""
    tile_blocks, per_tile, group_rows, tile_rows, width = rows.shape
    own = _TILE_SEEDS // per_tile
    # H100: 14.6e12 pairs/s at the 4-bit preset, against 11.8e12 with 128 blocks in 3 stages; with few own rows a group is
    # too short for that, and 128 blocks in 3 stages are best (7.2e12 at the 3-bit preset).
    block_columns, stages = (256, 2) if own > 8 else (128, 3)
    kernels.bound[len(half) // block_columns,](
        half, rows, least, len(half), tile_blocks, OWN=own, SHARED=group_rows - own, T=per_tile, BM=tile_rows,
        BN=block_columns, CK=width, STAGES=stages, XORSIGN=torch.cuda.get_device_capability() >= (8, 6), num_warps=4,
    )  # fmt: skip
