"""Seed search on an NVIDIA GPU: a proved bound on tensor cores, then exact scores for the few seeds left.

Every block is scaled to unit length, so that a seed's residual 1 - ||Q'w||^2 says what share of the block it cannot reach
whatever its coefficients. One chunk of blocks goes through five steps, all on the GPU:

    bound      least residual of every tile of 64 seeds, products and maxima in float16 (`groups` says of what)
    first      the four best of the tiles' minima, one seed of each scored exactly: the threshold
    list       tiles, then seeds, whose residual less the margin does not exceed the threshold
    evaluate   `codec.evaluate` on the listed (block, seed) pairs, one to a lane, float64
    select     the least score of a block, then the least (seed, exponent, coefficients) among its equals

A seed that is not listed provably scores worse than one that was scored: `_margins` bounds everything that the fast
arithmetic can lose. Lists are sized for `_BUDGETS[0]` entries a block on average. A block that does not fit (4 of 10^4 ...
on Gaussian weights none) stays open and is redone with a larger budget, and in the end with every seed; nothing is dropped.

Blocks go in segments of 256, each with its own lists and counters, so that no counter is shared by the whole device. The order
within a list depends on timing; what is selected from it does not.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedlm.basis import basis
from seedlm.codec import BlockCodes, Rounding
from seedlm.format import WORD_BITS, BlockFormat
from seedlm.groups import groups

WORKING_SET = 3 << 29
"""Bytes of GPU memory that a search may use at once, beside the tables (8 MB at the 4-bit preset) and its result."""

_SEGMENT = 256
_TILE_SEEDS = 64
_TILE_ROWS = 64
_FIRST_TILES = 4
_ENTRIES = 4
_LIST_TILES = 16
_LIST_BLOCKS = 4096
_SEEDS_PER_TILE = 3
_BUDGETS = (16, 512)
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
    blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding = "best", *, working_set: int = WORKING_SET,
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
    """A chunk's first round under way: its blocks, their score, key and whether they stay open, and how many do, on the host."""

    blocks: Tensor
    score: Tensor
    key: Tensor
    unsolved: Tensor
    count: Tensor
    done: torch.cuda.Event


class _Job:
    """One search: its tables and constants."""

    def __init__(self, device: torch.device, bias: int, format: BlockFormat, rounding: Rounding, working_set: int, redone: Counter) -> None:
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
        if int(started.count):
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
        shape = {"C": self.format.block_size, "P": self.format.num_coefficients, "T": groups_per_tile, "G": group, "CK": width}

        unit = torch.empty(padded, width, dtype=torch.float32, device=device)
        half = torch.empty(padded, width, dtype=torch.float16, device=device)
        norm = torch.empty(padded, dtype=torch.float64, device=device)
        _normalize[segments,](blocks, unit, half, norm, C=self.format.block_size, CK=width, BN=_SEGMENT)
        least = torch.empty(tiles, padded, dtype=torch.float16, device=device)
        _launch_bound(half, tables.rows, least)

        best = _Best(padded, device)
        first, seeds = (_Pairs(segments, _FIRST_TILES * _SEGMENT, device, full=True) for _ in range(2))
        _first[segments,](least, *first, padded, TILES=tiles, BN=_SEGMENT, TT=16, FIRST=_FIRST_TILES)
        threshold = torch.empty(padded, dtype=torch.float32, device=device)
        _rescan[segments, 8](
            unit, tables.own, tables.shared, tables.position, threshold, best.open, *first, *seeds, first.capacity, seeds.capacity,
            ENTRIES=64, FIRST=True, **shape,
        )  # fmt: skip
        self.evaluate(blocks, seeds, best, splits=8)

        _threshold[segments,](norm, best.score, threshold, best.open, tables.seed_margin, DIVISOR=self.format.divisor, BN=_SEGMENT)
        columns = min(_LIST_BLOCKS, padded)
        parts = tiles // _LIST_TILES, -(-padded // columns)
        # A single block may list all 1024 seeds of a segment's tiles, so seeds get more room than tiles.
        capacity = columns * budget // parts[0]
        wanted = _Pairs(parts[0] * parts[1], capacity, device)
        seeds = _Pairs(parts[0] * parts[1], capacity * _SEEDS_PER_TILE, device)
        _list[parts](
            least, threshold, best.open, best.listed, *wanted, padded, columns, wanted.capacity,
            tables.tile_margin - tables.seed_margin, BN=_SEGMENT, TT=_LIST_TILES, LIMIT=8 * budget, num_warps=1,
        )  # fmt: skip
        _rescan[parts[0] * parts[1], 4](
            unit, tables.own, tables.shared, tables.position, threshold, best.open, *wanted, *seeds, wanted.capacity, seeds.capacity,
            ENTRIES=_ENTRIES, FIRST=False, num_warps=1, **shape,
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
        _evaluate[len(seeds.count), splits](
            blocks, self.tables.pinv, self.tables.stream, *seeds, score, key, best.score, seeds.capacity,
            enable_fp_fusion=False, **self.evaluation,
        )  # fmt: skip
        return score, key

    def select(self, seeds: "_Pairs", score: Tensor, key: Tensor, best: "_Best", splits: int) -> None:
        _select[len(seeds.count), splits](*seeds, score, key, best.score, best.key, seeds.capacity, LANES=256)


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
    """The best of every block so far (a score as `_evaluate` orders it, int64), tiles it has listed, whether it stays open."""

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
    """By how much the true residual of a unit block may lie below the one computed by `_rescan`, and by `_bound`.

    `_rescan` works in float32: C products, their sum and P squares of at most 1 each lose less than (C + P + 4) 2^-23.
    `_bound` in float16 (unit roundoff h = 2^-11) adds, with energies up to 1 + d, d the deficit:

        2h + h^2 + 2 sqrt(C) 2^-25   the block rounded to float16, subnormal where small
        4h + 4h^2                    each product rounded to float16, 2h because truncation is not ruled out, then squared
        P h / 2                      P subtractions from at most 1
        2^-14                        the tag in the two lowest bits, which can raise a residual only where it is negative: -0.01 * 2^-8
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
    _bound[len(half) // block_columns,](
        half, rows, least, len(half), tile_blocks, OWN=own, SHARED=group_rows - own, T=per_tile, BM=tile_rows,
        BN=block_columns, CK=width, STAGES=stages, XORSIGN=torch.cuda.get_device_capability() >= (8, 6), num_warps=4,
    )  # fmt: skip


@triton.jit
def _larger_magnitude(a, b, XORSIGN: tl.constexpr):
    """A value of magnitude max(|a|, |b|), two float16 to an instruction, which Triton's own maximum is not."""
    if XORSIGN:
        return tl.inline_asm_elementwise(
            "max.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    return tl.inline_asm_elementwise(
        "{.reg .b32 x, y; abs.f16x2 x, $1; abs.f16x2 y, $2; max.f16x2 $0, x, y;}",
        "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _less_square(a, b):
    """a - b * b, rounded once."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 n; neg.f16x2 n, $2; fma.rn.f16x2 $0, n, $2, $1;}",
        "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _smaller(a, b):
    return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _tagged(a, tag):
    """a with the scalar `tag` in its two lowest mantissa bits."""
    bits = tl.zeros(a.shape, tl.int16) + tag.to(tl.int16)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0xFFFCFFFC, $2, 0xEA;",  # (a & b) | c
        "=r,r,r", [a, bits], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _normalize(blocks, unit, half, norm, C: tl.constexpr, CK: tl.constexpr, BN: tl.constexpr):
    """Blocks scaled to unit length, zero-padded to [.., CK], and their squared norms in float64."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, CK)
    w = tl.load(blocks + n[:, None].to(tl.int64) * C + c[None, :], mask=c[None, :] < C, other=0.0)
    w = w.to(tl.float64)
    squared = tl.sum(w * w, axis=1)
    tl.store(norm + n, squared)
    scaled = w / tl.sqrt(tl.where(squared > 0, squared, 1.0))[:, None]
    at = n[:, None] * CK + c[None, :]
    tl.store(unit + at, scaled.to(tl.float32))
    tl.store(half + at, scaled.to(tl.float16))


@triton.jit
def _bound(
    half, rows, least, blocks, tile_blocks, OWN: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CK: tl.constexpr, STAGES: tl.constexpr, XORSIGN: tl.constexpr,
):  # fmt: skip
    """Least residual of BM tiles at a time (a row each, T groups of OWN seeds) for BN blocks."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, CK)
    w = tl.load(half + n[None, :] * CK + k[:, None])
    at = rows + m[:, None] * CK + k[None, :]
    for tile_block in range(tile_blocks):
        best = tl.full([BM, BN], 4.0, tl.float16)
        for t in tl.range(T, num_stages=STAGES):
            group = at + (tile_block * T + t) * ((OWN + SHARED) * BM * CK)
            own = tl.dot(tl.load(group), w, out_dtype=tl.float16)
            for j in tl.static_range(1, OWN):
                x = tl.dot(tl.load(group + j * BM * CK), w, out_dtype=tl.float16)
                own = _larger_magnitude(own, x, XORSIGN)
            residual = _less_square(tl.full([BM, BN], 1.0, tl.float16), own)
            for p in tl.static_range(SHARED):
                s = tl.dot(tl.load(group + (OWN + p) * BM * CK), w, out_dtype=tl.float16)
                residual = _less_square(residual, s)
            best = _smaller(best, _tagged(residual, t * 4 // T))
        tl.store(least + (tile_block * BM + m)[:, None].to(tl.int64) * blocks + n[None, :], best)


@triton.jit
def _first(
    least, tile_block, tile_index, tile_count, blocks, TILES: tl.constexpr, BN: tl.constexpr, TT: tl.constexpr, FIRST: tl.constexpr
):
    """The FIRST best among the minima of TT interleaved shares of the tiles, for a segment of BN blocks."""
    segment = tl.program_id(0)
    lane = tl.arange(0, BN)
    n = segment * BN + lane
    key = tl.full([TT, BN], 2147483647, tl.int32)
    for start in range(0, TILES, TT):
        tile = start + tl.arange(0, TT)[:, None]
        residual = tl.load(least + tile.to(tl.int64) * blocks + n[None, :])
        # Non-negative float16 are ordered like their bits, so a residual and its tile make one integer to minimise.
        bits = tl.maximum(residual.to(tl.int16, bitcast=True), 0).to(tl.int32)
        key = tl.minimum(key, (bits << 16) | tile)
    for i in tl.static_range(FIRST):
        smallest = tl.min(key, axis=0)
        key = tl.where(key == smallest[None, :], 2147483647, key)
        at = segment * (FIRST * BN) + i * BN + lane
        tl.store(tile_block + at, n)
        tl.store(tile_index + at, (smallest & 0xFFFF) << 2 | (smallest >> 16 & 3))


@triton.jit
def _threshold(norm, best, threshold, open, margin, DIVISOR: tl.constexpr, BN: tl.constexpr):
    """The residual that a seed must not exceed to be able to win, for BN blocks."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    squared = tl.load(norm + n)
    ordered = tl.load(best + n)
    score = (ordered ^ ((ordered >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    reached = 1.0 + score / (DIVISOR * DIVISOR * 1.0) / tl.where(squared > 0, squared, 1.0)
    # A block of zeros reaches nothing with any seed and cannot be scaled: left open. 1e-6 covers the rounding to float32.
    tl.store(threshold + n, tl.where(squared > 0, reached + margin + 1e-6, -1.0).to(tl.float32))
    tl.store(open + n, 1, mask=squared == 0)


@triton.jit
def _list(
    least, threshold, open, listed, tile_block, tile_index, tile_count, blocks, columns, capacity, margin,
    BN: tl.constexpr, TT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Every tile that reaches its block's threshold, among TT tiles and some columns of blocks.

    A segment of the lists has few tiles and many blocks, so that `_rescan` finds the tiles' rows, a kilobyte each, in L1.
    """
    segment = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    base = segment.to(tl.int64) * capacity
    tiles = tl.program_id(0) * TT
    row = tl.arange(0, TT)[:, None]
    for start in range(tl.program_id(1) * columns, tl.minimum((tl.program_id(1) + 1) * columns, blocks), BN):
        n = start + tl.arange(0, BN)
        reach = tl.load(threshold + n) + margin
        tagged = tl.load(least + (tiles + row).to(tl.int64) * blocks + n[None, :]).to(tl.int16, bitcast=True)
        residual = (tagged & -4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        # One word a block says which of the tiles are wanted; almost all words are empty or have one bit.
        word = tl.sum(tl.where(residual <= reach[None, :], 1 << row, 0), axis=0)
        while tl.max(word, axis=0) > 0:
            wanted = word != 0
            tile = tiles + ((word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            before = tl.atomic_add(listed + n, 1, mask=wanted, sem="relaxed")
            at = tl.atomic_add(
                tile_count + segment + tl.zeros([BN], tl.int32), 1, mask=wanted & (before < LIMIT), sem="relaxed"
            )
            fits = wanted & (before < LIMIT) & (at < capacity)
            tl.store(tile_block + base + at, n, mask=fits)
            tl.store(tile_index + base + at, tile << 2, mask=fits)
            tl.store(open + n, 1, mask=wanted & (fits == 0))
            word = word & (word - 1)


@triton.jit
def _rescan(
    unit, own, shared, position, threshold, open, tile_block, tile_index, tile_count, found_block, found_position, found_count,
    capacity, found_capacity, C: tl.constexpr, P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, CK: tl.constexpr, ENTRIES: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Residuals of the seeds of listed tiles: the best of the tile's tagged quarter (FIRST), or all that reach the threshold."""
    segment = tl.program_id(0)
    base = segment.to(tl.int64) * capacity
    found_base = segment.to(tl.int64) * found_capacity
    count = tl.minimum(tl.load(tile_count + segment), capacity)
    TS: tl.constexpr = T // 4 if FIRST else T
    g = tl.arange(0, G)
    for start in range(tl.program_id(1) * ENTRIES, count, tl.num_programs(1) * ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        valid = entry < count
        n = tl.load(tile_block + base + entry, mask=valid, other=0)
        index = tl.load(tile_index + base + entry, mask=valid, other=0)
        tile = index >> 2
        t = (index & 3)[:, None] * (T // 4) + tl.arange(0, TS)[None, :]  # the tag is 0 where the whole tile is scanned
        slot = (t * G)[:, :, None] + g[None, None, :]
        residual = tl.full([ENTRIES, TS], 1.0, tl.float32)
        for p in tl.static_range(P - 1):
            s = tl.zeros([ENTRIES, TS], tl.float32)
            for c in tl.static_range(C):
                w = tl.load(unit + n * CK + c)
                s += w[:, None] * tl.load(shared + ((tile * (P - 1) + p) * C + c)[:, None] * T + t).to(tl.float32)
            residual -= s * s
        x = tl.zeros([ENTRIES, TS, G], tl.float32)
        for c in tl.static_range(C):
            w = tl.load(unit + n * CK + c)
            row = tl.load(own + (tile * C + c)[:, None, None] * (T * G) + slot)
            x += w[:, None, None] * row.to(tl.float32)
        residuals = residual[:, :, None] - x * x
        if FIRST:
            winner = (index & 3) * (T * G // 4) + tl.argmin(tl.reshape(residuals, [ENTRIES, TS * G]), axis=1)
            tl.store(found_block + base + entry, n, mask=valid)
            tl.store(found_position + base + entry, tl.load(position + tile * (T * G) + winner), mask=valid)
        else:
            reach = tl.where(valid, tl.load(threshold + n), -1.0)
            wanted = residuals <= reach[:, None, None]
            at = tl.atomic_add(found_count + segment + tl.zeros([ENTRIES, TS, G], tl.int32), 1, mask=wanted, sem="relaxed")
            fits = wanted & (at < found_capacity)
            block = n[:, None, None] + tl.zeros([ENTRIES, TS, G], tl.int32)
            where = tl.load(position + (tile * (T * G))[:, None, None] + slot, mask=fits, other=0)
            tl.store(found_block + found_base + at, block, mask=fits)
            tl.store(found_position + found_base + at, where, mask=fits)
            tl.store(open + block, 1, mask=wanted & (at >= found_capacity))


@triton.jit
def _power_of_two(exponent):
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _rounded(t, exponent, up, NEAREST: tl.constexpr, Q_LOW: tl.constexpr, Q_HIGH: tl.constexpr):
    """t / 2^exponent as a coefficient, float64: rounded to nearest even, or down plus `up`, and clamped."""
    x = _clamp(t * _power_of_two(-exponent), Q_LOW - 2.0, Q_HIGH + 2.0)
    if NEAREST:
        x = (x + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52: no fraction bits are left
    else:
        x = tl.floor(x) + up
    return _clamp(x, Q_LOW * 1.0, Q_HIGH * 1.0)


@triton.jit(do_not_specialize=["capacity", "BIAS"])
def _evaluate(
    blocks, pinv, stream, found_block, found_position, found_count, found_score, found_key, best, capacity, BIAS,
    K: tl.constexpr, C: tl.constexpr, P: tl.constexpr, DIVISOR: tl.constexpr, Q_LOW: tl.constexpr, Q_HIGH: tl.constexpr,
    Q_BITS: tl.constexpr, E_LOW: tl.constexpr, E_HIGH: tl.constexpr, E_BITS: tl.constexpr, NEAREST: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """`codec.evaluate` of the listed pairs, bit for bit. Where a product is exact in float64, so is its fused form."""
    segment = tl.program_id(0)
    base = segment.to(tl.int64) * capacity
    count = tl.minimum(tl.load(found_count + segment), capacity)
    for start in range(tl.program_id(1) * LANES, count, tl.num_programs(1) * LANES):
        entry = start + tl.arange(0, LANES)
        valid = entry < count
        n = tl.load(found_block + base + entry, mask=valid, other=0).to(tl.int64)
        position = tl.load(found_position + base + entry, mask=valid, other=0)

        # The register's states from `position` on: windows of the stream, first brought to a word boundary.
        words = ()
        shift = (position & 31).to(tl.int64)
        for i in tl.static_range((K + C * P + 31) // 32 + 1):
            low = tl.load(stream + (position >> 5) + i).to(tl.int64) & 0xFFFFFFFF
            high = tl.load(stream + (position >> 5) + i + 1).to(tl.int64)
            words = words + (((high << 32) | low) >> shift & 0xFFFFFFFF,)
        seed = words[0] & ((1 << K) - 1)

        w = ()
        for c in tl.static_range(C):
            w = w + (tl.load(blocks + n * C + c).to(tl.float64),)
        matrix = ()
        for i in tl.static_range(1, C * P + 1):
            state = (words[i // 32] | (words[i // 32 + 1] << 32)) >> (i % 32)
            matrix = matrix + (((state & ((1 << K) - 1)).to(tl.int32) - (1 << (K - 1))).to(tl.float64),)

        solution = ()
        moments = ()
        largest = tl.zeros([LANES], tl.float64)
        for p in tl.static_range(P):
            t = tl.zeros([LANES], tl.float64)
            a = tl.zeros([LANES], tl.float64)
            for c in tl.static_range(C):
                t = tl.fma(w[c], tl.load(pinv + (position * P + p) * C + c).to(tl.float64), t)
                a = tl.fma(w[c], matrix[c * P + p], a)
            t = t * DIVISOR
            solution = solution + (t,)
            moments = moments + (a,)
            largest = tl.maximum(largest, tl.abs(t))
        gram = ()  # [p][p2 >= p], off the diagonal doubled; sums of integers below 2^53: exact
        for p in tl.static_range(P):
            for p2 in tl.static_range(p, P):
                g = tl.zeros([LANES], tl.float64)
                for c in tl.static_range(C):
                    g = tl.fma(matrix[c * P + p], matrix[c * P + p2], g)
                if p2 > p:
                    g = g * 2.0
                gram = gram + (g,)

        # frexp by bits: nothing here is subnormal in float64.
        bits = (largest / (Q_HIGH + 0.5)).to(tl.int64, bitcast=True)
        ceiling = ((bits >> 52) - 1022 - tl.where((bits & 0xFFFFFFFFFFFFF) == 0, 1, 0)).to(tl.int32) - BIAS
        centre = _clamp(tl.where(largest == 0, E_LOW, ceiling), E_LOW, E_HIGH)

        score = tl.full([LANES], float("inf"), tl.float64)
        pick = tl.zeros([LANES], tl.int32)
        for shift_index in tl.static_range(1 if NEAREST else 3):
            exponent = _clamp(centre + (0 if NEAREST else shift_index - 1), E_LOW, E_HIGH) + BIAS
            factor = DIVISOR * _power_of_two(1 - exponent)
            unscale = _power_of_two(2 * exponent)
            for up in tl.static_range(1 if NEAREST else 2**P):
                q = ()
                for p in tl.static_range(P):
                    q = q + (_rounded(solution[p], exponent, (up >> (P - 1 - p)) & 1, NEAREST, Q_LOW, Q_HIGH),)
                inner = q[0] * moments[0]
                for p in tl.static_range(1, P):
                    inner = inner + q[p] * moments[p]
                squared = tl.zeros([LANES], tl.float64)
                for p in tl.static_range(P):
                    part = tl.zeros([LANES], tl.float64)
                    for p2 in tl.static_range(p, P):
                        part = tl.fma(gram[p * P - p * (p - 1) // 2 + p2 - p], q[p2], part)
                    squared = tl.fma(part, q[p], squared)
                new = (squared - factor * inner) * unscale
                # Candidates come in the tie rule's order, so only a lesser score replaces.
                better = new < score
                score = tl.where(better, new, score)
                pick = tl.where(better, shift_index * 2**P + up, pick)

        exponent = _clamp(centre + (0 if NEAREST else pick // 2**P - 1), E_LOW, E_HIGH)
        key = (seed << E_BITS) | (exponent - E_LOW).to(tl.int64)
        for p in tl.static_range(P):
            up = ((pick >> (P - 1 - p)) & 1).to(tl.float64)
            q = _rounded(solution[p], exponent + BIAS, up, NEAREST, Q_LOW, Q_HIGH)
            key = (key << Q_BITS) | (q.to(tl.int32) - Q_LOW).to(tl.int64)
        # Integers ordered like the float64: the sign bit flips the others.
        ordered = score.to(tl.int64, bitcast=True)
        ordered = ordered ^ ((ordered >> 63) & 0x7FFFFFFFFFFFFFFF)
        tl.store(found_score + base + entry, ordered, mask=valid)
        tl.store(found_key + base + entry, key, mask=valid)
        tl.atomic_min(best + n, ordered, mask=valid, sem="relaxed")


@triton.jit
def _select(found_block, found_position, found_count, found_score, found_key, best, best_key, capacity, LANES: tl.constexpr):
    """The least key of the candidates that have their block's least score."""
    segment = tl.program_id(0)
    base = segment.to(tl.int64) * capacity
    count = tl.minimum(tl.load(found_count + segment), capacity)
    for start in range(tl.program_id(1) * LANES, count, tl.num_programs(1) * LANES):
        entry = start + tl.arange(0, LANES)
        valid = entry < count
        n = tl.load(found_block + base + entry, mask=valid, other=0)
        winner = valid & (tl.load(found_score + base + entry, mask=valid, other=0) == tl.load(best + n))
        tl.atomic_min(best_key + n, tl.load(found_key + base + entry, mask=valid, other=0), mask=winner, sem="relaxed")
