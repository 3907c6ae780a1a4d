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

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm import search_triton_kernels as kernels
from seedlm.basis import basis
from seedlm.codec import BlockCodes, Rounding
from seedlm.format import WORD_BITS, BlockFormat
from seedlm.groups import Groups, groups

WORKING_SET = 3 << 30
"""Bytes of GPU memory that a search may use at once, beside the tables (8 MB at the 4-bit preset) and its result."""
_LANES = 2
"""Chunks under way at once: while one keeps the tensor cores busy, others wait for memory."""

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
_BOUND_BLOCKS = 128


@dataclass(frozen=True, eq=False)
class _Tiles:
    """The tiles of one kind of group, padded with zero rows, which reach nothing, to whole `_TILE_ROWS`.

    rows        float16 [tiles/64, T, G + P-1, 64, 8 or Ck]: a group's own rows, then its shared ones, as `bound` reads them
    own         float16 [tiles, C, T, G]
    shared      float16 [tiles, P-1, C, T]
    position    int32 [tiles, T, G]
    """

    rows: Tensor
    own: Tensor
    shared: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True, eq=False)
class _Tables:
    """Tables of a format on one device.

    kinds       tiles of groups, most seeds first
    width       Ck: C padded to what the tensor cores take
    stream      int32 [...]: the register's endless bit stream, 32 bits a word
    pinv        float32 [N, P, C]
    """

    kinds: tuple[_Tiles, ...]
    width: int
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
    device = blocks.device
    with torch.cuda.device(device):
        job = _Job(device, exponent_bias, format, rounding, working_set, Counter() if redone is None else redone)
        lanes = [torch.cuda.Stream() for _ in range(_LANES)]
    started: deque[_Round] = deque()
    for chunk, lane in zip(blocks.split(job.chunk_blocks(_BUDGETS[0])), cycle(lanes)):
        with torch.cuda.device(device):
            lane.wait_stream(torch.cuda.current_stream())
            chunk.record_stream(lane)
            with torch.cuda.stream(lane):
                started.append(job.start(chunk.contiguous()))
        # Every lane has its next chunk before this thread waits for one.
        if len(started) > _LANES:
            with torch.cuda.device(device):
                finished = job.finish(started.popleft())
            yield finished
    while started:
        with torch.cuda.device(device):
            finished = job.finish(started.popleft())
        yield finished


class _Round(NamedTuple):
    """A chunk's first round under way: blocks, their score, key, fields and whether they stay open, and how many do."""

    blocks: Tensor
    score: Tensor
    key: Tensor
    codes: BlockCodes
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
        tiles = sum(map(len, self.tables.kinds))
        per_block = 2 * tiles + 6 * self.tables.width + 64 + 32 * _FIRST_TILES + (8 + 24 * _SEEDS_PER_TILE) * budget
        share = self.working_set // (_LANES + 1)  # one for what is redone
        return max(1, min(_MAX_CHUNK, share // per_block) // _SEGMENT) * _SEGMENT

    def start(self, blocks: Tensor) -> _Round:
        """Queue the first round of a chunk; waits for nothing."""
        score, key, unsolved = self.bounded(blocks, _BUDGETS[0])
        codes = self.fields(key)
        count = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(unsolved.sum(), non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return _Round(blocks, score, key, codes, unsolved, count, done)

    def finish(self, started: _Round) -> tuple[BlockCodes, Tensor]:
        """Wait for a chunk and redo what stayed open until nothing is."""
        started.done.synchronize()
        blocks, score, key, codes, unsolved = started[:5]
        for tensor in (blocks, score, key, *codes, unsolved):
            tensor.record_stream(torch.cuda.current_stream())  # or the lane that they belong to would reuse their memory
        if int(started.still_open):
            self.redo(blocks, unsolved.nonzero()[:, 0], score, key)
            codes = self.fields(key)
        return codes, score

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
        padded, segments, width = len(blocks), len(blocks) // _SEGMENT, tables.width
        sizes = [len(kind) for kind in tables.kinds]

        unit = torch.empty(padded, width, dtype=torch.float32, device=device)
        half = torch.empty(padded, width, dtype=torch.float16, device=device)
        norm = torch.empty(padded, dtype=torch.float64, device=device)
        kernels.normalize[segments,](blocks, unit, half, norm, C=self.format.block_size, CK=width, BN=_SEGMENT)
        least = torch.empty(sum(sizes), padded, dtype=torch.float16, device=device)
        for kind, part in zip(tables.kinds, least.split(sizes), strict=True):
            _launch_bound(half, kind, part)

        best = _Best(padded, device)
        first, seeds = (_pairs(segments, _FIRST_TILES * _SEGMENT, device, full=True) for _ in range(2))
        kernels.first[segments,](least, *first, padded, TILES=sizes[0], BN=_SEGMENT, TT=16, FIRST=_FIRST_TILES)
        threshold = torch.empty(padded, dtype=torch.float32, device=device)
        self.rescan(tables.kinds[0], unit, threshold, best.open, first, seeds, splits=8, ENTRIES=64, FIRST=True)
        self.evaluate(blocks, seeds, best, splits=8)

        kernels.threshold[segments,](
            norm, best.score, threshold, best.open, tables.seed_margin, DIVISOR=self.format.divisor, BN=_SEGMENT
        )
        columns = min(_LIST_BLOCKS, padded)
        across, down = -(-padded // columns), [size // _LIST_TILES for size in sizes]
        capacity = columns * budget // down[0]
        wanted = _pairs(sum(down) * across, capacity, device)
        seeds = _pairs(sum(down) * across, capacity * _SEEDS_PER_TILE, device)
        segment = 0
        for kind, part, rows in zip(tables.kinds, least.split(sizes), down, strict=True):
            tiles, found = (_Pairs(*(field[segment : segment + rows * across] for field in lists)) for lists in (wanted, seeds))
            segment += rows * across
            kernels.list[rows, across](
                part, threshold, best.open, best.listed, *tiles, padded, columns, tiles.capacity,
                tables.tile_margin - tables.seed_margin, BN=_SEGMENT, TT=_LIST_TILES, LIMIT=8 * budget, num_warps=1,
            )  # fmt: skip
            self.rescan(kind, unit, threshold, best.open, tiles, found, splits=4, ENTRIES=_ENTRIES, FIRST=False, num_warps=1)
        self.select(seeds, *self.evaluate(blocks, seeds, best, splits=2), best, splits=1)
        score, key = best.result()
        return score[:count], key[:count], best.open[:count] != 0

    def rescan(
        self, kind: _Tiles, unit: Tensor, threshold: Tensor, still_open: Tensor, tiles: "_Pairs", seeds: "_Pairs", splits: int,
        **options: int,
    ) -> None:  # fmt: skip
        kernels.rescan[len(tiles.filled), splits](
            unit, kind.own, kind.shared, kind.position, threshold, still_open, *tiles, *seeds, tiles.capacity, seeds.capacity,
            C=self.format.block_size, P=self.format.num_coefficients, CK=self.tables.width,
            T=kind.position.shape[1], G=kind.position.shape[2], **options,
        )  # fmt: skip

    def exhaustive(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Winners' score [N] and key [N] over all seeds, and that no block stays open."""
        count, device = len(blocks), blocks.device
        seeds, best = _pairs(count, self.format.num_seeds, device, full=True), _Best(count, device)
        seeds.block.copy_(torch.arange(count, dtype=torch.int32, device=device).unsqueeze(1).expand_as(seeds.block))
        seeds.item.copy_(torch.arange(seeds.capacity, dtype=torch.int32, device=device).expand_as(seeds.item))
        self.select(seeds, *self.evaluate(blocks, seeds, best, splits=64), best, splits=16)
        return *best.result(), torch.zeros(count, dtype=torch.bool, device=device)

    def evaluate(self, blocks: Tensor, seeds: "_Pairs", best: "_Best", splits: int) -> tuple[Tensor, Tensor]:
        """Score and key int64 [segments, capacity] of every pair; lowers `best.score`."""
        score, key = (torch.empty(seeds.block.shape, dtype=torch.int64, device=blocks.device) for _ in range(2))
        # A fused multiply-add would round once where the definition rounds twice.
        kernels.evaluate[len(seeds.filled), splits](
            blocks, self.tables.pinv, self.tables.stream, *seeds, score, key, best.score, seeds.capacity,
            enable_fp_fusion=False, **self.evaluation,
        )  # fmt: skip
        return score, key

    def fields(self, key: Tensor) -> BlockCodes:
        """The fields that keys int64 [N] stand for."""
        count, device = len(key), key.device
        seeds = torch.empty(count, dtype=torch.int32, device=device)
        exponents = torch.empty(count, dtype=torch.int8, device=device)
        coefficients = torch.empty(count, self.format.num_coefficients, dtype=torch.int8, device=device)
        kernels.fields[-(-count // 256),](
            key, seeds, exponents, coefficients, count, P=self.format.num_coefficients, LANES=256,
            **{name: self.evaluation[name] for name in ("Q_LOW", "Q_BITS", "E_LOW", "E_BITS")},
        )  # fmt: skip
        return BlockCodes(seeds, exponents, coefficients)

    def select(self, seeds: "_Pairs", score: Tensor, key: Tensor, best: "_Best", splits: int) -> None:
        kernels.select[len(seeds.filled), splits](*seeds, score, key, best.score, best.key, seeds.capacity, LANES=256)


class _Pairs(NamedTuple):
    """Lists of (block, item) in segments of one capacity; items are tiles (times 4, plus a tag) or positions in the cycle.

    block, item   int32 [segments, capacity], in no particular order
    filled        int32 [segments]; may exceed the capacity, what is beyond was not kept
    """

    block: Tensor
    item: Tensor
    filled: Tensor

    @property
    def capacity(self) -> int:
        return self.block.shape[1]


def _pairs(segments: int, capacity: int, device: torch.device, full: bool = False) -> _Pairs:
    """Empty lists, or lists about to be filled to their capacity."""
    capacity = max(16, capacity // 16 * 16) if not full else capacity
    block, item = (torch.empty(segments, capacity, dtype=torch.int32, device=device) for _ in range(2))
    return _Pairs(block, item, torch.full((segments,), capacity if full else 0, dtype=torch.int32, device=device))


class _Best:
    """The best of every block so far (a score as `evaluate` orders it, int64), tiles it has listed, whether it stays open."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.score, self.key = torch.full((2, blocks), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self.listed, self.open = torch.zeros(2, blocks, dtype=torch.int32, device=device)

    def result(self) -> tuple[Tensor, Tensor]:
        """Score float64 and key int64."""
        ordered = self.score
        return (ordered ^ ((ordered >> 63) & torch.iinfo(torch.int64).max)).view(torch.float64), self.key


@lru_cache(maxsize=4)
def _tables(format: BlockFormat, device: torch.device) -> _Tables:
    found = groups(format)
    states = basis(format).cycle
    bits = (states[: format.num_seeds] & 1).repeat(-(-(format.num_seeds + 256) // format.num_seeds))
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % WORD_BITS)).view(-1, WORD_BITS)
    words = (bits << torch.arange(WORD_BITS)).sum(1)
    seed_margin, tile_margin = _margins(format, max(part.deficit for part in found))
    return _Tables(
        kinds=tuple(_tiles(part, device) for part in found),
        width=-(-format.block_size // 16) * 16,
        stream=words.to(torch.uint32).view(torch.int32).to(device),
        pinv=basis(format).pinv.permute(2, 0, 1).contiguous().to(device),
        seed_margin=seed_margin,
        tile_margin=tile_margin,
    )


def _tiles(part: Groups, device: torch.device) -> _Tiles:
    """Groups laid out in tiles of up to `_TILE_SEEDS`: fewer where they would not fill `_TILE_ROWS`."""
    count, group, size = part.own.shape
    per_tile = min(max(4, _TILE_SEEDS // group), max(4, 1 << ((count - 1) // _TILE_ROWS).bit_length()))
    tiles = -(-count // (per_tile * _TILE_ROWS)) * _TILE_ROWS
    pad = tiles * per_tile - count

    def tiled(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, pad)).unflatten(0, (tiles, per_tile))

    own, shared = tiled(part.own), tiled(part.shared)  # [tiles, T, G or P-1, C]
    rows = torch.cat([own, shared], 2).unflatten(0, (-1, _TILE_ROWS)).permute(0, 2, 3, 1, 4)
    return _Tiles(
        rows=torch.nn.functional.pad(rows, (0, -size % 8)).contiguous().to(device),
        own=own.permute(0, 3, 1, 2).contiguous().to(device),
        shared=shared.permute(0, 2, 3, 1).contiguous().to(device),
        position=tiled(part.position.unsqueeze(-1)).squeeze(-1).contiguous().to(device),
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


def _launch_bound(half: Tensor, kind: _Tiles, least: Tensor) -> None:
    """Fill least float16 [tiles, blocks] for unit blocks float16 [blocks, Ck] and one kind of tile."""
    tile_blocks, per_tile, group_rows, tile_rows, row = kind.rows.shape
    own = kind.position.shape[2]
    kernels.bound[len(half) // _BOUND_BLOCKS,](
        half, kind.rows, least, len(half), tile_blocks, OWN=own, SHARED=group_rows - own, T=per_tile, BM=tile_rows,
        BN=_BOUND_BLOCKS, CK=half.shape[1], ROW=row, STAGES=3, num_warps=4,
    )  # fmt: skip
