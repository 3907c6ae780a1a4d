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

from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import BlockFormat, Rounding
from seedlm.codes.block.search.triton_round import SEGMENT, Rounds

WORKING_SET = 2 << 30
"""Bytes of GPU memory that a search may use at once, beside the tables (8 MB at the 4-bit preset) and its result."""

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
"""Held where graphs are captured or destroyed: torch expects one capture at a time in a process (its issue 137844), and its
account of graphs is one for all threads."""
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
        self.rounds = Rounds(format, rounding, device)
        self.wave = _WAVE * torch.cuda.get_device_properties(device).multi_processor_count * SEGMENT
        self.plans: dict[int, _Plan] = {}
        self.last = torch.cuda.Event()

    def begin(self, exponent_bias: int, working_set: int) -> int:
        """Make ready for a tensor's blocks; returns how many to a chunk."""
        torch.cuda.current_stream().wait_event(self.last)
        self.rounds.bias.fill_(exponent_bias)
        self.working_set = working_set
        size = self.chunk_blocks(_BUDGETS[0])
        if max(self.plans, default=0) > size:
            with _graphs:
                self.last.synchronize()
                self.plans.clear()
        return size

    def chunk_blocks(self, budget: int) -> int:
        """Blocks, whole segments of them, whose lists and bounds fit half the working set: the other is for what is redone."""
        most = min(_MAX_CHUNK, self.working_set // 2 // self.rounds.bytes_per_block(budget))
        unit = self.wave if most >= self.wave else SEGMENT
        return max(1, most // unit) * unit

    def plan(self, count: int) -> _Plan:
        """The plan for at least this many blocks, at most a quarter too long."""
        step = max(SEGMENT, (1 << (count - 1).bit_length()) // 8)
        size = min(-(-count // step) * step, self.chunk_blocks(_BUDGETS[0]))
        if size not in self.plans:
            self.plans[size] = self.capture(size)
        return self.plans[size]

    def capture(self, size: int) -> _Plan:
        blocks = torch.zeros(size, self.format.block_size, device=self.rounds.bias.device)
        if not self.plans:
            self.rounds.fields(self.rounds.bounded(blocks[:SEGMENT], _BUDGETS[0])[1])  # compiles, which a capture cannot
        with _graphs, torch.cuda.stream(_capture_stream()):
            # Plans share their memory: they run one after the other. Other threads may go on with their own work.
            pool = next(iter(self.plans.values())).graph.pool() if self.plans else None
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                score, key, unsolved = self.rounds.bounded(blocks, _BUDGETS[0])
                codes = self.rounds.fields(key)
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
            codes = self.rounds.fields(key)
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
            pieces = [self.rounds.bounded(p, budget) if budget else self.rounds.exhaustive(p) for p in distinct.split(size)]
            new_score, new_key, still = (torch.cat(parts)[copy] for parts in zip(*pieces, strict=True))
            score[rows], key[rows] = new_score, new_key
            rows = rows[still]
