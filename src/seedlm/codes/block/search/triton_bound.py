"""The bound pass of `search_triton`: blocks of unit length, and the least residual of every tile of seeds.

Float16 pairs are written in PTX: Triton's own maximum takes one value an instruction, and the bound pass is little else.
"""

import triton
import triton.language as tl


@triton.jit
def _extreme(a, b, c, COMPLEMENT: tl.constexpr):
    """Largest magnitude of three; of a complement's, the smallest. One instruction on Hopper for two float16 each."""
    MAGNITUDES: tl.constexpr = "{.reg .b32 x, y, z; abs.f16x2 x, $1; abs.f16x2 y, $2; abs.f16x2 z, $3; "
    LEAST: tl.constexpr = "min.f16x2 x, x, y; min.f16x2 $0, x, z;}"
    MOST: tl.constexpr = "max.f16x2 x, x, y; max.f16x2 $0, x, z;}"
    ASM: tl.constexpr = MAGNITUDES + (LEAST if COMPLEMENT else MOST)
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _with_square(a, b, COMPLEMENT: tl.constexpr):
    """Fused a - b * b, rounded once; for a complement a + b * b."""
    ASM: tl.constexpr = (
        "fma.rn.f16x2 $0, $2, $2, $1;" if COMPLEMENT else "{.reg .b32 n; neg.f16x2 n, $2; fma.rn.f16x2 $0, n, $2, $1;}"
    )
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _smaller(a, b):
    return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _tagged(a, tag):
    """Copies a with the scalar `tag` in its four lowest mantissa bits."""
    bits = tl.zeros(a.shape, tl.int16) + tag.to(tl.int16)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0xFFF0FFF0, $2, 0xEA;",  # (a & b) | c
        "=r,r,r", [a, bits], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def normalize(blocks, parts, norm, C: tl.constexpr, W: tl.constexpr, BN: tl.constexpr):
    """Blocks scaled to unit length as a float16 and what it leaves, each padded to W, and their squared norms in float64."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, W)
    w = tl.load(blocks + n[:, None].to(tl.int64) * C + c[None, :], mask=c[None, :] < C, other=0.0)
    w = w.to(tl.float64)
    squared = tl.sum(w * w, axis=1)
    tl.store(norm + n, squared)
    scaled = w / tl.sqrt(tl.where(squared > 0, squared, 1.0))[:, None]
    high = scaled.to(tl.float16)
    at = n[:, None] * (2 * W) + c[None, :]
    tl.store(parts + at, high)
    tl.store(parts + at + W, (scaled - high.to(tl.float64)).to(tl.float16))


@triton.jit
def _pair(rows, w, TM: tl.constexpr, BN: tl.constexpr):
    """Products of the blocks [16, BN] with two rows of TM tiles each, float16 [TM/8, 8, BN].

    Eight tiles' first rows stand before their second ones: the tensor cores give a thread both, so the split moves nothing.
    """
    at = tl.arange(0, 2 * TM)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.dot(tl.load(rows + at), w, out_dtype=tl.float16)
    return tl.split(tl.permute(tl.reshape(x, [TM // 8, 2, 8, BN]), 0, 2, 3, 1))


@triton.jit
def _residual(
    residual, rows, w, OWN: tl.constexpr, SHARED: tl.constexpr, COMPLEMENT: tl.constexpr, TM: tl.constexpr, BN: tl.constexpr
):
    """The residual after a group's pairs of rows: the best of its own, then the shared ones."""
    SIZE: tl.constexpr = 2 * TM * 16
    if OWN > 0:
        own, x = _pair(rows, w, TM, BN)
        own = _extreme(own, x, x, COMPLEMENT)
        for j in tl.static_range(1, OWN // 2):
            x, y = _pair(rows + j * SIZE, w, TM, BN)
            own = _extreme(own, x, y, COMPLEMENT)
        residual = _with_square(residual, own, COMPLEMENT)
    for j in tl.static_range(OWN // 2, (OWN + SHARED) // 2):
        x, y = _pair(rows + j * SIZE, w, TM, BN)
        residual = _with_square(_with_square(residual, x, COMPLEMENT), y, COMPLEMENT)
    return residual


@triton.jit
def bound(
    parts, rows, least, blocks, tile_blocks, OWN: tl.constexpr, SHARED: tl.constexpr, COMPLEMENT: tl.constexpr, T: tl.constexpr,
    TM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Least residual of TM tiles at a time (T groups each) for BN blocks, and in its lowest bits which sixteenth has it.

    OWN is even. If SHARED is odd, groups go in twos, and the last row of each makes a pair.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(parts + n[None, :] * (2 * W) + tl.arange(0, 16)[:, None])
    start = tl.full([TM // 8, 8, BN], 0.0 if COMPLEMENT else 1.0, tl.float16)
    GROUPS: tl.constexpr = 1 + SHARED % 2
    SIZE: tl.constexpr = (OWN + SHARED) // 2 * (2 * TM * 16)
    for tile_block in range(tile_blocks):
        best = tl.full([TM // 8, 8, BN], 4.0, tl.float16)
        for t in tl.range(T // GROUPS, num_stages=STAGES):
            group = rows + (tile_block * (T // GROUPS) + t) * (GROUPS * (OWN + SHARED) * TM * 16)
            residual = _residual(start, group, w, OWN, SHARED, COMPLEMENT, TM, BN)
            if GROUPS == 2:
                x, y = _pair(group + 2 * SIZE, w, TM, BN)
                residual = _with_square(residual, x, COMPLEMENT)
                other = _residual(_with_square(start, y, COMPLEMENT), group + SIZE, w, OWN, SHARED, COMPLEMENT, TM, BN)
                residual = _smaller(residual, other)
            best = _smaller(best, _tagged(residual, t * GROUPS * 16 // T))
        m = tile_block * TM + tl.arange(0, TM // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(least + m[:, :, None].to(tl.int64) * blocks + n[None, None, :], best)
