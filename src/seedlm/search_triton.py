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

import threading
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm import search_triton_kernels as kernels
from seedlm.codec import BlockCodes
from seedlm.format import BlockFormat, Rounding
from seedlm.search_triton_tables import Tiles, tables

WORKING_SET = 2 << 30
"""Bytes of GPU memory that a search may use at once, beside the tables (8 MB at the 4-bit preset) and its result."""

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
    redone = Counter() if redone is None else redone
    pending: _Round | None = None
    with torch.cuda.device(blocks.device):
        engine = _engine(format, rounding, blocks.device)
        size = engine.begin(exponent_bias, working_set)
    for chunk in blocks.split(size):
        # The GPU gets its next chunk before this thread waits for the last one.
        with torch.cuda.device(blocks.device):
            started = engine.start(chunk)
            finished, pending = pending and engine.finish(pending, redone), started
        if finished:
            yield finished
    if pending:
        with torch.cuda.device(blocks.device):
            finished = engine.finish(pending, redone)
        yield finished


class _Round(NamedTuple):
    """A chunk's first round under way: its blocks, their score, key and fields, whether they stay open, and how many do."""

    blocks: Tensor
    score: Tensor
    key: Tensor
    codes: BlockCodes
    unsolved: Tensor
    still_open: Tensor
    done: torch.cuda.Event


class _Plan(NamedTuple):
    """The first round of some number of blocks as a CUDA graph: what it reads and what it leaves."""

    graph: torch.cuda.CUDAGraph
    blocks: Tensor
    score: Tensor
    key: Tensor
    codes: BlockCodes
    unsolved: Tensor


_kept = threading.local()


def _engine(format: BlockFormat, rounding: Rounding, device: torch.device) -> "_Engine":
    """The engine of this thread, kept with its plans and their memory: a capture takes longer than a small tensor's search.

    One at a time: with the plans of seven formats, a mixture's threads would fill a card.
    """
    wanted = format, rounding, device
    engine: _Engine | None = getattr(_kept, "engine", None)
    if engine is None or _kept.wanted != wanted:
        if engine is not None:
            engine.last.synchronize()
            del _kept.engine, engine
            torch.cuda.empty_cache()  # a graph's memory serves no other before
        _kept.engine, _kept.wanted = _Engine(format, rounding, device), wanted
    return _kept.engine


def _capture_stream() -> torch.cuda.Stream:
    """A stream that no other thread launches on: what they did there would go into the capture and never run.

    The current one, or one kept for this thread if that is the default, which cannot be captured. Not a new one each time:
    torch hands out the same 32 over and over.
    """
    stream = torch.cuda.current_stream()
    if stream != torch.cuda.default_stream():
        return stream
    side: torch.cuda.Stream | None = getattr(_kept, "side", None)
    if side is None or side.device != stream.device:
        side = _kept.side = torch.cuda.Stream(stream.device)
    return side


class _Engine:
    """A format's search on one device.

    A round is twenty launches of 0.1 ms each on the host, more than the GPU takes for small tensors and as much as it takes for
    large ones. So rounds are captured once for each number of blocks, and replayed.
    """

    def __init__(self, format: BlockFormat, rounding: Rounding, device: torch.device) -> None:
        self.format, self.working_set = format, WORKING_SET
        self.tables = tables(format, device)
        self.bias = torch.zeros((), dtype=torch.int32, device=device)
        self.plans: dict[int, _Plan] = {}
        self.last = torch.cuda.Event()
        low, high = format.coefficient_range
        self.evaluation = {
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

    def begin(self, exponent_bias: int, working_set: int) -> int:
        """Make ready for a tensor's blocks; returns how many to a chunk."""
        torch.cuda.current_stream().wait_event(self.last)
        self.bias.fill_(exponent_bias)
        self.working_set = working_set
        size = self.chunk_blocks(_BUDGETS[0])
        if max(self.plans, default=0) > size:
            self.last.synchronize()
            self.plans.clear()
        return size

    def chunk_blocks(self, budget: int) -> int:
        """Blocks, whole segments of them, whose lists and bounds fit half the working set: the other is for what is redone."""
        tiles = sum(map(len, self.tables.kinds))
        per_block = 2 * tiles + 6 * self.tables.width + 96 + 32 * _FIRST_TILES + (8 + 24 * _SEEDS_PER_TILE) * budget
        return max(1, min(_MAX_CHUNK, self.working_set // 2 // per_block) // _SEGMENT) * _SEGMENT

    def plan(self, count: int) -> _Plan:
        """The plan for at least this many blocks, at most a quarter too long."""
        step = max(_SEGMENT, (1 << (count - 1).bit_length()) // 8)
        size = min(-(-count // step) * step, self.chunk_blocks(_BUDGETS[0]))
        if size not in self.plans:
            self.plans[size] = self.capture(size)
        return self.plans[size]

    def capture(self, size: int) -> _Plan:
        blocks = torch.zeros(size, self.format.block_size, device=self.bias.device)
        if not self.plans:
            self.fields(self.bounded(blocks[:_SEGMENT], _BUDGETS[0])[1])  # compiles and loads, which a capture cannot
        pool = next(iter(self.plans.values())).graph.pool() if self.plans else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream()):
            # Plans share their memory: they run one after the other. Other threads may go on with their own work.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                score, key, unsolved = self.bounded(blocks, _BUDGETS[0])
                codes = self.fields(key)
            finally:
                graph.capture_end()
        return _Plan(graph, blocks, score, key, codes, unsolved)

    def start(self, blocks: Tensor) -> _Round:
        """Queue the first round of a chunk; waits for nothing."""
        count = len(blocks)
        plan = self.plan(count)
        plan.blocks[:count] = blocks
        plan.blocks[count:] = 0
        plan.graph.replay()
        score, key, *fields, unsolved = (x[:count].clone() for x in (plan.score, plan.key, *plan.codes, plan.unsolved))
        still_open = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(unsolved.sum(), non_blocking=True)
        self.last = torch.cuda.Event()
        self.last.record()
        return _Round(blocks, score, key, BlockCodes(*fields), unsolved, still_open, self.last)

    def finish(self, started: _Round, redone: Counter[int | None]) -> tuple[BlockCodes, Tensor]:
        """Wait for a chunk and redo what stayed open until nothing is."""
        started.done.synchronize()
        codes, score, key = started.codes, started.score, started.key
        if int(started.still_open):
            self.redo(started.blocks, started.unsolved.nonzero()[:, 0], score, key, redone)
            codes = self.fields(key)
        return codes, score

    def redo(self, blocks: Tensor, rows: Tensor, score: Tensor, key: Tensor, redone: Counter[int | None]) -> None:
        """Solve these rows' blocks in place: with a larger budget if they are many, then with every seed."""
        for budget in (*_BUDGETS[1:], None):
            if not len(rows):
                break
            # Open blocks are often copies of one: zeros, constants.
            distinct, copy = blocks[rows].unique(dim=0, return_inverse=True)
            if len(distinct) <= _FEW_BLOCKS:
                budget = None
            redone[budget] += len(rows)
            size = self.chunk_blocks(budget) if budget else max(1, self.working_set // (48 * self.format.num_seeds))
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
            self.bound(half, kind, part)

        best = _Best(padded, device)
        first, seeds = (_pairs(segments, _FIRST_TILES * _SEGMENT, device, full=True) for _ in range(2))
        kernels.first[segments,](
            least, *first, padded, TILES=sizes[0], BN=_SEGMENT, SHARES=2 * _FIRST_TILES, FIRST=_FIRST_TILES, num_warps=1
        )
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

    def bound(self, half: Tensor, kind: Tiles, least: Tensor) -> None:
        """Fill least float16 [tiles, blocks] for unit blocks float16 [blocks, Ck]."""
        tile_blocks = kind.rows.shape[0]
        seeds = kind.position.shape[2]
        own = seeds if seeds % 2 == 0 else 0  # a single seed's own row counts like shared ones
        shared = self.format.num_coefficients - 1 + seeds - own
        # H100: three programs of 4 warps to a processor, 0.90 ms a chunk at the 4-bit preset, against 1.05 for two of 8 warps,
        # which are best at the 3-bit preset (2.31 against 2.77 ms).
        options = {"num_warps": 4, "maxnreg": 168} if own > 8 and shared % 2 == 0 else {"num_warps": 8}
        kernels.bound[len(half) // _SEGMENT,](
            half, kind.rows, least, len(half), tile_blocks, OWN=own, SHARED=shared,
            T=kind.position.shape[1], TM=len(kind) // tile_blocks, BN=_SEGMENT, CK=half.shape[1], STAGES=3, **options,
        )  # fmt: skip

    def rescan(
        self, kind: Tiles, unit: Tensor, threshold: Tensor, still_open: Tensor, tiles: "_Pairs", seeds: "_Pairs", splits: int,
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
            blocks, self.tables.pinv, self.tables.stream, self.bias, *seeds, score, key, best.score, seeds.capacity,
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
