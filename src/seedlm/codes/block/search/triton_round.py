"""One round of `search_triton`: a chunk of blocks through all steps, with lists of a given size."""

from typing import NamedTuple

import torch
from torch import Tensor

from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import BlockFormat, Rounding
from seedlm.codes.block.search import triton_bound
from seedlm.codes.block.search import triton_kernels as kernels
from seedlm.codes.block.search.triton_tables import Tiles, tables

SEGMENT = 256
"""Blocks to a program where blocks are independent."""
_FIRST_TILES, _SHARES = 3, 8
"""Seeds scored for the threshold, and shares of the tiles with at most one of them. One is not enough: where its coefficients
clamp, hundreds of seeds reach the threshold. Ill-conditioned seeds are no use: at 4.5 bits three of all kinds left 1.4 % of
blocks open."""
_LIST_TILES = 16
"""Tiles to a program of `list`, of which it takes a segment of blocks."""
_LISTS = 4096
"""Lists of blocks for all tiles together: with one for each tile, programs wait in line to add to them."""
_RESCAN_SEEDS, _RESCAN_BLOCKS = 128, 64
"""Seeds of a tile and blocks that listed it that go through the tensor cores together."""


class Rounds:
    """A format's rounds on one device.

    bias   int32 scalar there: the exponent bias of the blocks to come
    """

    def __init__(self, format: BlockFormat, rounding: Rounding, device: torch.device) -> None:
        self.format = format
        self.tables = tables(format, device)
        self.bias = torch.zeros((), dtype=torch.int32, device=device)
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

    def bytes_per_block(self, budget: int) -> int:
        """Bytes of GPU memory that `bounded` takes for a block."""
        tiles = sum(map(len, self.tables.kinds))
        return 2 * tiles + 4 * self.tables.width + 96 + 32 * _FIRST_TILES + 32 * budget

    def bounded(self, blocks: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
        """Winners' score [N] and key [N], and which blocks stay open (bool [N]; theirs mean nothing)."""
        device, count = blocks.device, len(blocks)
        blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -count % SEGMENT))
        padded, segments = len(blocks), len(blocks) // SEGMENT
        kinds, sizes = self.tables.kinds, [len(kind) for kind in self.tables.kinds]
        parts, norm, least = self.bounds(blocks)

        best = _Best(padded, device)
        seeds = _pairs(segments, _FIRST_TILES * SEGMENT, device, full=True)
        self.first(parts, kinds[0], least, seeds)
        self.evaluate(blocks, seeds, best, splits=2 * _FIRST_TILES)
        threshold = torch.empty(padded, dtype=torch.float32, device=device)
        limit = torch.empty(padded, dtype=torch.float16, device=device)
        kernels.threshold[segments,](
            norm, best.score, threshold, limit, best.open, *self.tables.margins, DIVISOR=self.format.divisor, BN=SEGMENT
        )

        lists = _LISTS // sizes[0]
        most = -(-segments // lists) * SEGMENT  # no list can have more blocks
        capacity = max(32, most * budget // sizes[0])
        wanted = torch.empty(lists * sum(sizes), min(capacity, most), dtype=torch.int32, device=device)
        listed = torch.zeros(len(wanted), dtype=torch.int32, device=device)
        kernels.list[sum(sizes) // _LIST_TILES, segments](
            least, limit, best.open, best.listed, wanted, listed, padded, wanted.shape[1],
            BN=SEGMENT, TT=_LIST_TILES, PARTS=lists, LIMIT=8 * budget, num_warps=1,
        )  # fmt: skip
        seeds = _pairs(len(wanted), capacity, device)
        start = 0
        for kind in kinds:
            rows = slice(start, start + lists * len(kind))
            self.rescan(parts, kind, threshold, best.open, wanted[rows], listed[rows], _Pairs(*(x[rows] for x in seeds)))
            start = rows.stop
        self.select(seeds, *self.evaluate(blocks, seeds, best, splits=2), best, splits=1)
        score, key = best.result()
        return score[:count], key[:count], best.open[:count] != 0

    def bounds(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whole segments of blocks at unit length, float16 [N, 2, W], their squared norms, float64 [N], and the least residual
        of every tile, float16 [tiles of all kinds, N].
        """
        count, width, device = len(blocks), self.tables.width, blocks.device
        sizes = [len(kind) for kind in self.tables.kinds]
        parts = torch.empty(count, 2, width, dtype=torch.float16, device=device)
        norm = torch.empty(count, dtype=torch.float64, device=device)
        triton_bound.normalize[count // SEGMENT,](blocks, parts, norm, C=self.format.block_size, W=width, BN=SEGMENT)
        least = torch.empty(sum(sizes), count, dtype=torch.float16, device=device)
        for kind, part in zip(self.tables.kinds, least.split(sizes), strict=True):
            self.bound(parts, kind, part)
        return parts, norm, least

    def bound(self, parts: Tensor, kind: Tiles, least: Tensor) -> None:
        """Fill least float16 [tiles, N] for one kind."""
        tile_blocks = kind.rows.shape[0]
        seeds = kind.position.shape[2]
        own = seeds if seeds % 2 == 0 else 0  # a single seed's own row counts like shared ones
        shared = kind.shared.shape[2] + seeds - own
        # Three programs fit a processor, though some registers are spilled; three of 8 warps in 80 were slower.
        triton_bound.bound[len(parts) // SEGMENT,](
            parts, kind.rows, least, len(parts), tile_blocks, OWN=own, SHARED=shared, COMPLEMENT=kind.complement,
            T=kind.position.shape[1], TM=len(kind) // tile_blocks, BN=SEGMENT, W=self.tables.width, STAGES=3,
            num_warps=4, maxnreg=168,
        )  # fmt: skip

    def first(self, parts: Tensor, kind: Tiles, least: Tensor, seeds: "_Pairs") -> None:
        """Fill the list with good seeds, some of each block."""
        tiles = torch.empty_like(seeds.block)
        kernels.first[len(tiles),](
            least, seeds.block, tiles, len(parts), BN=SEGMENT, TILES=max(kind.sound // _SHARES, 1) * _SHARES, SHARES=_SHARES,
            FIRST=_FIRST_TILES, num_warps=1,
        )  # fmt: skip
        # The bound takes groups with an odd number of rows in twos, which have one tag.
        share = max(kind.position.shape[1] // 16, 1 + (kind.position.shape[2] + kind.shared.shape[2]) % 2)
        kernels.best_seed[tiles.numel() // 64,](
            parts, kind.own, kind.shared, kind.position, seeds.block, tiles, seeds.item, SHARE=share, BN=64, **self.shape(kind)
        )

    def rescan(
        self, parts: Tensor, kind: Tiles, threshold: Tensor, still_open: Tensor, wanted: Tensor, listed: Tensor, seeds: "_Pairs"
    ) -> None:
        """List the seeds that may win, for blocks int32 [lists of a tile, capacity] of which there are `listed`."""
        size = kind.position[0].numel()
        kernels.rescan[len(kind), len(wanted) // len(kind), -(-size // _RESCAN_SEEDS)](
            parts, kind.own, kind.shared, kind.position, threshold, still_open, wanted, listed, *seeds, wanted.shape[1],
            seeds.capacity, SEEDS=min(size, _RESCAN_SEEDS), BN=_RESCAN_BLOCKS, num_warps=4, **self.shape(kind),
        )  # fmt: skip

    def shape(self, kind: Tiles) -> dict[str, int]:
        return {
            "T": kind.position.shape[1],
            "G": kind.position.shape[2],
            "C": self.format.block_size,
            "S": kind.shared.shape[2],
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
