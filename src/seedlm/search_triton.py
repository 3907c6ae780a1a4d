"""Seed search on an NVIDIA GPU: a proved bound on tensor cores, then exact scores for the few seeds left.

Every block is scaled to unit length, so that a seed's residual 1 - ||Q'w||^2 says what share of the block it cannot reach
whatever its coefficients. One chunk of blocks goes through six steps, all on the GPU:

    bound      least residual of every tile of 256 seeds, products and maxima in float16 (`groups` says of what)
    first      three of the best tiles, one seed of each scored exactly: the threshold
    list       for every tile the blocks that it may have the best seed for
    rescan     the seeds of a tile that may be the best, for all its blocks at once: rows stay, blocks go past
    evaluate   `codec.evaluate` on the listed (block, seed) pairs, one to a lane, float64
    select     the least score of a block, then the least (seed, exponent, coefficients) among its equals

A seed that is not listed provably scores worse than one that was scored: `_margins` bounds everything that the fast
arithmetic can lose. Lists are sized for an average block (4.6 tiles and 3.7 seeds on Gaussian weights at the 4-bit preset; at
most 10 and 11, at 4.5 bits). A block that does not fit, or has no length, stays open and is redone: with longer lists if there
are many, then with every seed. Nothing is dropped, and `search` says how many there were.

The order within a list depends on timing; what is selected from it does not.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm import search_triton_bound
from seedlm import search_triton_kernels as kernels
from seedlm.codec import BlockCodes
from seedlm.format import BlockFormat, Rounding
from seedlm.search_triton_tables import Tiles, tables

WORKING_SET = 2 << 30
"""Bytes of GPU memory that a search may use at once, beside the tables (8 MB at the 4-bit preset) and its result."""

_SEGMENT = 256
"""Blocks to a program where blocks are independent."""
_FIRST_TILES, _SHARES = 3, 8
"""Seeds scored for the threshold, and shares of the tiles with at most one of them. One is not enough: where its coefficients
clamp, hundreds of seeds reach the threshold. Ill-conditioned seeds are no use: at 4.5 bits three of all kinds left 1.4 % of
blocks open."""
_LIST_TILES = 16
"""Tiles to a program of `list`, of which it takes a segment of blocks."""
_PARTS = 8
"""Lists of a tile's blocks: with a single one, programs wait in line to add to it."""
_RESCAN_SEEDS, _RESCAN_BLOCKS = 128, 64
"""Seeds of a tile and blocks that listed it that go through the tensor cores together."""
_BUDGETS = (24, 256)
"""Tiles and seeds that the lists have room for, per block, in the first and the second round."""
_FEW_BLOCKS = 64
"""Open blocks that are scored with every seed at once (0.3 ms): fewer cost less than another round of the bound."""
_WAVE = 6
"""Programs of the bound to a processor, where two or three fit: chunks are whole multiples, so that all end together."""
_MAX_CHUNK = 1 << 19


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
    device = blocks.device
    with _lent(format, rounding, device) as engine:
        with torch.cuda.device(device):
            size = engine.begin(exponent_bias, working_set)
        for chunk in blocks.split(size):
            # The GPU gets its next chunk before this thread waits for the last one.
            with torch.cuda.device(device):
                started = engine.start(chunk)
                finished, pending = pending and engine.finish(pending, redone), started
            if finished:
                yield finished
        if pending:
            with torch.cuda.device(device):
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


_graphs = threading.Lock()
"""Held where graphs are captured or destroyed: torch keeps one account of them for all threads, without a lock (2.11)."""
_idle: list["_Engine"] = []
_own = threading.local()


@contextmanager
def _lent(format: BlockFormat, rounding: Rounding, device: torch.device) -> Iterator["_Engine"]:
    """An engine that is this caller's until it ends: an idle one if there is one, since a capture takes longer than a small
    tensor's search. Idle ones of other formats go first: with the plans of seven, a mixture's threads would fill a card.
    """
    wanted = format, rounding, device
    with _graphs:
        engine = next((engine for engine in _idle if engine.wanted == wanted), None)
        if engine is not None:
            _idle.remove(engine)
        elif others := [engine for engine in _idle if engine.wanted[2] == device]:
            for other in others:
                other.last.synchronize()
                _idle.remove(other)
            del others, other
            torch.cuda.empty_cache()  # a graph's memory serves no other before
    if engine is None:
        with torch.cuda.device(device):
            engine = _Engine(format, rounding, device)
    try:
        yield engine
    finally:
        with _graphs:
            _idle.append(engine)


def _capture_stream() -> torch.cuda.Stream:
    """A stream that no other thread launches on: what they did there would go into the capture and never run.

    The current one, or one kept for this thread if that is the default, which cannot be captured. Not a new one each time:
    torch hands out the same 32 over and over.
    """
    stream = torch.cuda.current_stream()
    if stream != torch.cuda.default_stream():
        return stream
    side: torch.cuda.Stream | None = getattr(_own, "side", None)
    if side is None or side.device != stream.device:
        side = _own.side = torch.cuda.Stream(stream.device)
    return side


class _Engine:
    """A format's search on one device.

    A round is twenty launches of 0.1 ms each on the host, more than the GPU takes for small tensors and as much as it takes for
    large ones. So rounds are captured once for each number of blocks, and replayed.
    """

    def __init__(self, format: BlockFormat, rounding: Rounding, device: torch.device) -> None:
        self.wanted = format, rounding, device
        self.format, self.working_set = format, WORKING_SET
        self.tables = tables(format, device)
        self.wave = _WAVE * torch.cuda.get_device_properties(device).multi_processor_count * _SEGMENT
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
            with _graphs:
                self.last.synchronize()
                self.plans.clear()
        return size

    def chunk_blocks(self, budget: int) -> int:
        """Blocks, whole segments of them, whose lists and bounds fit half the working set: the other is for what is redone."""
        tiles = sum(map(len, self.tables.kinds))
        per_block = 2 * tiles + 4 * self.tables.width + 96 + 32 * _FIRST_TILES + 32 * budget
        most = min(_MAX_CHUNK, self.working_set // 2 // per_block)
        unit = self.wave if most >= self.wave else _SEGMENT
        return max(1, most // unit) * unit

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
        with _graphs, torch.cuda.stream(_capture_stream()):
            # Plans share their memory: they run one after the other. Other threads may go on with their own work.
            pool = next(iter(self.plans.values())).graph.pool() if self.plans else None
            graph = torch.cuda.CUDAGraph()
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
        device, count = blocks.device, len(blocks)
        blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -count % _SEGMENT))
        padded, segments, width = len(blocks), len(blocks) // _SEGMENT, self.tables.width
        kinds, sizes = self.tables.kinds, [len(kind) for kind in self.tables.kinds]

        parts = torch.empty(padded, 2, width, dtype=torch.float16, device=device)
        norm = torch.empty(padded, dtype=torch.float64, device=device)
        search_triton_bound.normalize[segments,](blocks, parts, norm, C=self.format.block_size, W=width, BN=_SEGMENT)
        least = torch.empty(sum(sizes), padded, dtype=torch.float16, device=device)
        for kind, part in zip(kinds, least.split(sizes), strict=True):
            self.bound(parts, kind, part)

        best = _Best(padded, device)
        seeds = _pairs(segments, _FIRST_TILES * _SEGMENT, device, full=True)
        self.first(parts, kinds[0], least, seeds)
        self.evaluate(blocks, seeds, best, splits=2 * _FIRST_TILES)
        threshold = torch.empty(padded, dtype=torch.float32, device=device)
        limit = torch.empty(padded, dtype=torch.float16, device=device)
        kernels.threshold[segments,](
            norm, best.score, threshold, limit, best.open, *self.tables.margins, DIVISOR=self.format.divisor, BN=_SEGMENT
        )

        most = -(-segments // _PARTS) * _SEGMENT  # a list can have so many blocks
        capacity = max(32, most * budget // sizes[0])
        wanted = torch.empty(_PARTS * sum(sizes), min(capacity, most), dtype=torch.int32, device=device)
        listed = torch.zeros(len(wanted), dtype=torch.int32, device=device)
        kernels.list[sum(sizes) // _LIST_TILES, segments](
            least, limit, best.open, best.listed, wanted, listed, padded, wanted.shape[1],
            BN=_SEGMENT, TT=_LIST_TILES, PARTS=_PARTS, LIMIT=8 * budget, num_warps=1,
        )  # fmt: skip
        seeds = _pairs(len(wanted), capacity, device)
        start = 0
        for kind in kinds:
            rows = slice(start, start + _PARTS * len(kind))
            self.rescan(parts, kind, threshold, best.open, wanted[rows], listed[rows], _Pairs(*(x[rows] for x in seeds)))
            start = rows.stop
        self.select(seeds, *self.evaluate(blocks, seeds, best, splits=4), best, splits=1)
        score, key = best.result()
        return score[:count], key[:count], best.open[:count] != 0

    def bound(self, parts: Tensor, kind: Tiles, least: Tensor) -> None:
        """Fill least float16 [tiles, blocks] for unit blocks float16 [blocks, 2, W]."""
        tile_blocks = kind.rows.shape[0]
        seeds = kind.position.shape[2]
        own = seeds if seeds % 2 == 0 else 0  # a single seed's own row counts like shared ones
        shared = kind.shared.shape[1] + seeds - own
        # Three programs fit a processor, though 14 to 22 registers are spilled. H100, 4-bit preset: 0.90 ms for 2^18 blocks,
        # against 1.05 for two programs of 8 warps.
        search_triton_bound.bound[len(parts) // _SEGMENT,](
            parts, kind.rows, least, len(parts), tile_blocks, OWN=own, SHARED=shared, COMPLEMENT=kind.complement,
            T=kind.position.shape[1], TM=len(kind) // tile_blocks, BN=_SEGMENT, W=self.tables.width, STAGES=3,
            num_warps=4, maxnreg=168,
        )  # fmt: skip

    def first(self, parts: Tensor, kind: Tiles, least: Tensor, seeds: "_Pairs") -> None:
        """Fill the list with good seeds, some of each block."""
        tiles = torch.empty_like(seeds.block)
        kernels.first[len(tiles),](
            least, seeds.block, tiles, len(parts), BN=_SEGMENT, TILES=max(kind.sound // _SHARES, 1) * _SHARES, SHARES=_SHARES,
            FIRST=_FIRST_TILES, num_warps=1,
        )  # fmt: skip
        # The bound takes groups with an odd number of rows in twos, which have one tag.
        share = max(kind.position.shape[1] // 16, 1 + (kind.position.shape[2] + kind.shared.shape[1]) % 2)
        kernels.best_seed[tiles.numel() // 64,](
            parts, kind.own, kind.shared, kind.position, seeds.block, tiles, seeds.item, SHARE=share, BN=64, **self.shape(kind)
        )

    def rescan(
        self, parts: Tensor, kind: Tiles, threshold: Tensor, still_open: Tensor, wanted: Tensor, listed: Tensor, seeds: "_Pairs"
    ) -> None:
        """List the seeds that may win, for blocks int32 [tiles * _PARTS, capacity] of which there are `listed`."""
        size = kind.position[0].numel()
        kernels.rescan[len(kind), _PARTS, -(-size // _RESCAN_SEEDS)](
            parts, kind.own, kind.shared, kind.position, threshold, still_open, wanted, listed, *seeds, wanted.shape[1],
            seeds.capacity, SEEDS=min(size, _RESCAN_SEEDS), BN=_RESCAN_BLOCKS, num_warps=4, **self.shape(kind),
        )  # fmt: skip

    def shape(self, kind: Tiles) -> dict[str, int]:
        return {
            "T": kind.position.shape[1],
            "G": kind.position.shape[2],
            "C": self.format.block_size,
            "S": kind.shared.shape[1],
            "W": self.tables.width,
            "COMPLEMENT": kind.complement,
        }

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
