"""The tables of `search_triton` on one device: tiles of seed groups as the kernels read them, and the margins of the proof."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from seedlm.codes.block.basis import KEPT_FORMATS, basis
from seedlm.codes.block.format import WORD_BITS, BlockFormat
from seedlm.codes.block.search.groups import Groups, groups

_TILE_SEEDS = 256
_SHARES = 16
"""The bound tells which sixteenth of a tile is the best."""
_ABREAST = 32
"""Tiles that the bound takes at once: two of their rows fill the tensor cores' 64. There are whole multiples of them."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one kind of group. Where groups do not fill the last ones, they are repeated.

    rows        float16 [tiles/32, T, rows/2, 4, 2, 8, 16]: pairs of rows, of eight tiles each, as `bound` reads them
    own         float16 [tiles, C, T, G]
    shared      float16 [tiles, 16, S, C, T/16]
    position    int32 [tiles, T, G]
    sound       so many tiles have well-conditioned seeds only
    """

    rows: Tensor
    own: Tensor
    shared: Tensor
    position: Tensor
    sound: int
    complement: bool

    def __len__(self) -> int:
        return len(self.position)


class Margins(NamedTuple):
    """A seed or tile may win if its residual, as computed, is <= (sqrt(residual to be reached) + root)^2 + sum.

    For tiles, 2^-7 more than that: what is relative, in `_margins`.
    """

    seed_root: float
    seed_sum: float
    tile_root: float
    tile_sum: float


@dataclass(frozen=True, eq=False)
class Tables:
    """Tables of a format on one device.

    kinds       tiles of groups, most seeds first
    width       W, C padded to 8 or 16
    stream      int32 [...]: the register's endless bit stream, 32 bits a word
    pinv        float32 [N, P, C]
    """

    kinds: tuple[Tiles, ...]
    width: int
    stream: Tensor
    pinv: Tensor
    margins: Margins


@lru_cache(maxsize=KEPT_FORMATS)
def tables(format: BlockFormat, device: torch.device) -> Tables:
    found = groups(format)
    states = basis(format).cycle
    bits = (states[: format.num_seeds] & 1).repeat(-(-(format.num_seeds + 256) // format.num_seeds))
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % WORD_BITS)).view(-1, WORD_BITS)
    words = (bits << torch.arange(WORD_BITS)).sum(1)
    return Tables(
        kinds=tuple(_tiles(part, device) for part in found),
        width=-(-format.block_size // 8) * 8,
        stream=words.to(torch.uint32).view(torch.int32).to(device),
        pinv=basis(format).pinv.permute(2, 0, 1).contiguous().to(device),
        margins=_margins(format, found[0].complement, max(part.slack for part in found)),
    )


def _tiles(part: Groups, device: torch.device) -> Tiles:
    """Groups laid out in tiles of up to `_TILE_SEEDS`: fewer where they would not fill `_ABREAST`."""
    count, group, size = part.own.shape
    per_tile = max(_SHARES, min(_TILE_SEEDS // group, 1 << ((count - 1) // _ABREAST).bit_length()))
    tiles = -(-count // (per_tile * _ABREAST)) * _ABREAST
    places = torch.arange(tiles * per_tile).view(tiles, per_tile) % count

    own, shared = part.own[places], part.shared[places]  # [tiles, T, G or S, C]
    rows = torch.cat([own, shared], 2)
    if rows.shape[2] % 2:
        # What is left over of a group makes a pair with its neighbour's.
        rows = rows.unflatten(1, (-1, 2))
        rows = torch.cat([rows[..., :-1, :].flatten(2, 3), rows[..., -1, :]], 2)
    rows = rows.unflatten(2, (-1, 2)).unflatten(0, (-1, _ABREAST // 8, 8)).permute(0, 3, 4, 1, 5, 2, 6)
    rows = torch.nn.functional.pad(rows, (0, -size % 8))
    # The tensor cores sum up 16 products: of a block of 8 that is both of its parts, each with the same rows.
    rows = rows if rows.shape[-1] == 16 else torch.cat([rows, rows], -1)
    return Tiles(
        rows=rows.contiguous().to(device),
        own=own.permute(0, 3, 1, 2).contiguous().to(device),
        shared=shared.unflatten(1, (_SHARES, -1)).permute(0, 1, 3, 4, 2).contiguous().to(device),
        position=part.position[places].contiguous().to(device),
        sound=part.sound // per_tile,
        complement=part.complement,
    )


def _margins(format: BlockFormat, complement: bool, slack: float) -> Margins:
    """What the fast arithmetic can lose, for unit blocks and D rows a seed: P, or C - P of a complement.

    The residual to be reached, from float64 scores, is good to 1e-9 of ||w||^2; 1e-6 covers it and what is kept in float32.
    Vectors of D products, each at most 1 + slack in length, differ from the true ones by at most

        b   from rounding the block. As two float16 (`rescan`; `bound` where C <= 8): 2^-22, and 2^-25 an element where
            subnormal. As one: h + 2^-25 an element, h = 2^-11 being the unit roundoff
        s   from the sums inside the tensor cores, undocumented: sqrt(D) 2^-18, a hundred times what was seen
        r   from each product's rounding to float16 (`bound`): 2h of it, as truncation is not ruled out, and 2^-24

    so the root of a complement's residual grows by b + s + r + slack at most, of which 2h is relative. D squares and sums in
    float16 then add D h, relative again, and 2^-25 each where subnormal. With D <= 4 that is (1 + 2h)^2 (1 + h)^D < 1.004,
    and rounding the limit to float16 takes 2^-11, or 2^-25: all below the 2^-7 (and 2^-24) that `threshold` adds.

    Energies e = 1 - residual go up to (1 + slack). An error x of the vector is 2x + x^2 of e, and D subtractions in float16
    from at most 1 lose h / 2 each. In float32 (`rescan`) the squares and sums lose less than (D + 2) 2^-23.

    The tag in the lowest bits takes nothing: the limit has all of them set, and a negative residual stays below any limit.
    """
    h = 2.0**-11
    size = format.block_size
    rows = size - format.num_coefficients if complement else format.num_coefficients
    tiny, sums = size**0.5 * 2.0**-25, rows**0.5 * 2.0**-18
    both = 2.0**-22 + tiny
    block = both if size <= 8 else h + tiny
    seed = (both + sums) * (1 + slack)
    tile = (block + sums) * (1 + slack) + rows**0.5 * 2.0**-24
    single = (rows + 2) * 2.0**-23 + 1e-6
    if complement:
        return Margins(seed + slack, single, tile + slack, rows * 2.0**-25 + 1e-6)
    energy = (1 + slack) ** 2
    seed, tile = (2 * x + x * x for x in (seed, tile + 2 * h * (1 + tile + slack)))
    return Margins(0.0, seed * energy + slack + single, 0.0, tile * energy + slack + rows * h / 2 + 1e-6)
