"""The tables of `search_triton` on one device: tiles of seed groups as the kernels read them, and the margins of the proof."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from seedlm.basis import KEPT_FORMATS, basis
from seedlm.format import WORD_BITS, BlockFormat
from seedlm.groups import Groups, groups

_TILE_SEEDS = 64
_TILES = 64
"""There are whole multiples of this many tiles: 1024 at the presets."""
_ABREAST = 32
"""Tiles that the bound takes at once: two of their rows fill the tensor cores' 64."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one kind of group, padded with zero rows, which reach nothing, to whole `_TILES`.

    rows        float16 [tiles/32, T, rows/2, 4, 2, 8, Ck]: pairs of rows, of eight tiles each, as `bound` reads them
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
class Tables:
    """Tables of a format on one device.

    kinds       tiles of groups, most seeds first
    width       Ck: C padded to what the tensor cores take
    stream      int32 [...]: the register's endless bit stream, 32 bits a word
    pinv        float32 [N, P, C]
    """

    kinds: tuple[Tiles, ...]
    width: int
    stream: Tensor
    pinv: Tensor
    seed_margin: float
    tile_margin: float


@lru_cache(maxsize=KEPT_FORMATS)
def tables(format: BlockFormat, device: torch.device) -> Tables:
    found = groups(format)
    states = basis(format).cycle
    bits = (states[: format.num_seeds] & 1).repeat(-(-(format.num_seeds + 256) // format.num_seeds))
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % WORD_BITS)).view(-1, WORD_BITS)
    words = (bits << torch.arange(WORD_BITS)).sum(1)
    seed_margin, tile_margin = _margins(format, max(part.deficit for part in found))
    return Tables(
        kinds=tuple(_tiles(part, device) for part in found),
        width=-(-format.block_size // 16) * 16,
        stream=words.to(torch.uint32).view(torch.int32).to(device),
        pinv=basis(format).pinv.permute(2, 0, 1).contiguous().to(device),
        seed_margin=seed_margin,
        tile_margin=tile_margin,
    )


def _tiles(part: Groups, device: torch.device) -> Tiles:
    """Groups laid out in tiles of up to `_TILE_SEEDS`: fewer where they would not fill `_TILES`."""
    count, group, size = part.own.shape
    per_tile = max(4, min(_TILE_SEEDS // group, 1 << ((count - 1) // _TILES).bit_length()))
    tiles = -(-count // (per_tile * _TILES)) * _TILES
    pad = tiles * per_tile - count

    def tiled(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, pad)).unflatten(0, (tiles, per_tile))

    own, shared = tiled(part.own), tiled(part.shared)  # [tiles, T, G or P-1, C]
    rows = torch.cat([own, shared], 2)
    if rows.shape[2] % 2:
        # What is left over of a group makes a pair with its neighbour's.
        rows = rows.unflatten(1, (-1, 2))
        rows = torch.cat([rows[..., :-1, :].flatten(2, 3), rows[..., -1, :]], 2)
    rows = rows.unflatten(2, (-1, 2)).unflatten(0, (-1, _ABREAST // 8, 8)).permute(0, 3, 4, 1, 5, 2, 6)
    return Tiles(
        rows=torch.nn.functional.pad(rows, (0, -size % 16)).contiguous().to(device),
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
