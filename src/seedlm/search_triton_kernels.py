"""The kernels of `search_triton`, in the order in which they run; what they are for is said there.

Lists are int32 arrays [segments, capacity] with a counter for each segment, which may end beyond the capacity. Scores are kept
as int64 that are ordered like the float64 they stand for, so that one atomic minimum works on them.

Float16 pairs are written in PTX: Triton's own maximum takes one value an instruction, and the bound pass is little else.
"""

import triton
import triton.language as tl


@triton.jit
def _largest_magnitude(a, b, c):
    """Gives max(|a|, |b|, |c|): one instruction on Hopper for two float16 each, which Triton's own maximum is not."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 x, y, z; abs.f16x2 x, $1; abs.f16x2 y, $2; abs.f16x2 z, $3; max.f16x2 x, x, y; max.f16x2 $0, x, z;}",
        "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _less_square(a, b):
    """Fused a - b * b, rounded once."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 n; neg.f16x2 n, $2; fma.rn.f16x2 $0, n, $2, $1;}",
        "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _smaller(a, b):
    return tl.inline_asm_elementwise("min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _plus_if_reached(sum, residual, limit, value: tl.constexpr):
    """Gives sum + value where residual <= limit, else sum."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 f; set.le.f16x2.f16x2 f, $2, $3; fma.rn.f16x2 $0, f, $4, $1;}",
        "=r,r,r,r,r", [sum, residual, limit, tl.full(sum.shape, value, tl.float16)], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _tagged(a, tag):
    """Copies a with the scalar `tag` in its two lowest mantissa bits."""
    bits = tl.zeros(a.shape, tl.int16) + tag.to(tl.int16)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0xFFFCFFFC, $2, 0xEA;",  # (a & b) | c
        "=r,r,r", [a, bits], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def normalize(blocks, unit, half, norm, C: tl.constexpr, CK: tl.constexpr, BN: tl.constexpr):
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
def _pair(rows, w, TM: tl.constexpr, BN: tl.constexpr, CK: tl.constexpr):
    """Products of the blocks [CK, BN] with two rows of TM tiles each, float16 [TM/8, 8, BN].

    Eight tiles' first rows stand before their second ones: the tensor cores give a thread both, so the split moves nothing.
    """
    at = tl.arange(0, 2 * TM)[:, None] * CK + tl.arange(0, CK)[None, :]
    x = tl.dot(tl.load(rows + at), w, out_dtype=tl.float16)
    return tl.split(tl.permute(tl.reshape(x, [TM // 8, 2, 8, BN]), 0, 2, 3, 1))


@triton.jit
def _residual(residual, rows, w, OWN: tl.constexpr, SHARED: tl.constexpr, TM: tl.constexpr, BN: tl.constexpr, CK: tl.constexpr):
    """What a group's pairs of rows leave of the residual: the largest of its own, and the shared ones."""
    SIZE: tl.constexpr = 2 * TM * CK
    if OWN > 0:
        own, x = _pair(rows, w, TM, BN, CK)
        own = _largest_magnitude(own, x, x)
        for j in tl.static_range(1, OWN // 2):
            x, y = _pair(rows + j * SIZE, w, TM, BN, CK)
            own = _largest_magnitude(own, x, y)
        residual = _less_square(residual, own)
    for j in tl.static_range(OWN // 2, (OWN + SHARED) // 2):
        x, y = _pair(rows + j * SIZE, w, TM, BN, CK)
        residual = _less_square(_less_square(residual, x), y)
    return residual


@triton.jit
def bound(
    half, rows, least, blocks, tile_blocks, OWN: tl.constexpr, SHARED: tl.constexpr, T: tl.constexpr, TM: tl.constexpr,
    BN: tl.constexpr, CK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Least residual of TM tiles at a time (T groups each) for BN blocks. OWN is even; if SHARED is odd, groups go in twos."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    w = tl.load(half + n[None, :] * CK + tl.arange(0, CK)[:, None])
    one = tl.full([TM // 8, 8, BN], 1.0, tl.float16)
    GROUPS: tl.constexpr = 1 + SHARED % 2
    SIZE: tl.constexpr = (OWN + SHARED) // 2 * (2 * TM * CK)
    for tile_block in range(tile_blocks):
        best = one + 3.0
        for t in tl.range(T // GROUPS, num_stages=STAGES):
            group = rows + (tile_block * (T // GROUPS) + t) * (GROUPS * (OWN + SHARED) * TM * CK)
            if GROUPS == 1:
                best = _smaller(best, _tagged(_residual(one, group, w, OWN, SHARED, TM, BN, CK), t * 4 // T))
            else:
                x, y = _pair(group + 2 * SIZE, w, TM, BN, CK)
                first = _residual(_less_square(one, x), group, w, OWN, SHARED, TM, BN, CK)
                best = _smaller(best, _tagged(first, t * 8 // T))
                second = _residual(_less_square(one, y), group + SIZE, w, OWN, SHARED, TM, BN, CK)
                best = _smaller(best, _tagged(second, (t * 8 + 4) // T))
        m = tile_block * TM + tl.arange(0, TM // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(least + m[:, :, None].to(tl.int64) * blocks + n[None, None, :], best)


@triton.jit
def _take_if_less(least, index, residual, tile):
    """The lesser of two residuals, and its tile as float16: exact up to 2048."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 f, d; set.lt.f16x2.f16x2 f, $4, $2; min.f16x2 $0, $4, $2; sub.f16x2 d, $5, $3; fma.rn.f16x2 $1, f, d, $3;}",
        "=r,=r,r,r,r,r", [least, index, residual, tile], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def first(
    least, tile_block, tile_index, tile_count, blocks, TILES: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """The FIRST best among the minima of SHARES interleaved shares of the tiles, for a segment of BN blocks."""
    segment = tl.program_id(0)
    lane = tl.arange(0, BN)
    n = segment * BN + lane
    values = ()
    tiles = ()
    for share in tl.static_range(SHARES):
        value = tl.load(least + blocks.to(tl.int64) * share + n)
        tile = tl.full([BN], share, tl.float16)
        values = values + (value,)
        tiles = tiles + (tile,)
    for start in range(SHARES, TILES, SHARES):
        new_values = ()
        new_tiles = ()
        for share in tl.static_range(SHARES):
            residual = tl.load(least + blocks.to(tl.int64) * (start + share) + n)
            value, tile = _take_if_less(values[share], tiles[share], residual, tl.zeros([BN], tl.float16) + (start + share))
            new_values = new_values + (value,)
            new_tiles = new_tiles + (tile,)
        values = new_values
        tiles = new_tiles
    keys = ()
    for share in tl.static_range(SHARES):
        # Non-negative float16 are ordered like their bits, so a residual and its tile make one integer to minimise.
        bits = tl.maximum(values[share].to(tl.int16, bitcast=True), 0).to(tl.int32)
        keys = keys + ((bits << 16) | tiles[share].to(tl.int32),)
    for i in tl.static_range(FIRST):
        smallest = keys[0]
        for share in tl.static_range(1, SHARES):
            smallest = tl.minimum(smallest, keys[share])
        rest = ()
        for share in tl.static_range(SHARES):
            rest = rest + (tl.where(keys[share] == smallest, 2147483647, keys[share]),)
        keys = rest
        at = segment * (FIRST * BN) + i * BN + lane
        tl.store(tile_block + at, n)
        tl.store(tile_index + at, (smallest & 0xFFFF) << 2 | (smallest >> 16 & 3))


@triton.jit
def threshold(norm, best, threshold, open, margin, DIVISOR: tl.constexpr, BN: tl.constexpr):
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
def list(
    least, threshold, open, listed, tile_block, tile_index, tile_count, blocks, columns, capacity, margin,
    BN: tl.constexpr, TT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Every tile that reaches its block's threshold, among TT tiles and some columns of blocks.

    A segment of the lists has few tiles and many blocks, so that `rescan` finds the tiles' rows, a kilobyte each, in L1.
    """
    segment = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    base = segment.to(tl.int64) * capacity
    tiles = tl.program_id(0) * TT
    for start in range(tl.program_id(1) * columns, tl.minimum((tl.program_id(1) + 1) * columns, blocks), BN):
        n = start + tl.arange(0, BN)
        reach = tl.load(threshold + n) + margin
        # Rounded up, with all tag bits set: above whatever a tile that is wanted may have there.
        limit = (reach * (1 + 2.0**-10)).to(tl.float16).to(tl.int16, bitcast=True) | 3
        limit = limit.to(tl.float16, bitcast=True)
        # One word a block says which of the tiles are wanted; almost all words are empty or have one bit.
        word = tl.zeros([BN], tl.int32)
        for half in tl.static_range(TT // 8):
            bits = tl.zeros([BN], tl.float16)
            for row in tl.static_range(8):
                residual = tl.load(least + (tiles + half * 8 + row).to(tl.int64) * blocks + n)
                bits = _plus_if_reached(bits, residual, limit, 2.0**row)
            word |= bits.to(tl.int32) << (half * 8)
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
def rescan(
    unit, own, shared, position, threshold, open, tile_block, tile_index, tile_count, found_block, found_position, found_count,
    capacity, found_capacity, C: tl.constexpr, P: tl.constexpr, T: tl.constexpr, G: tl.constexpr, CK: tl.constexpr,
    ENTRIES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Residuals of the seeds of listed tiles: the best of the tagged quarter (FIRST), or all that reach the threshold."""
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
    """Gives t / 2^exponent as a coefficient, float64: rounded to nearest even, or down plus `up`, and clamped."""
    x = _clamp(t * _power_of_two(-exponent), Q_LOW - 2.0, Q_HIGH + 2.0)
    if NEAREST:
        x = (x + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52: no fraction bits are left
    else:
        x = tl.floor(x) + up
    return _clamp(x, Q_LOW * 1.0, Q_HIGH * 1.0)


@triton.jit(do_not_specialize=["capacity"])
def evaluate(
    blocks, pinv, stream, bias, found_block, found_position, found_count, found_score, found_key, best, capacity,
    K: tl.constexpr, C: tl.constexpr, P: tl.constexpr, DIVISOR: tl.constexpr, Q_LOW: tl.constexpr, Q_HIGH: tl.constexpr,
    Q_BITS: tl.constexpr, E_LOW: tl.constexpr, E_HIGH: tl.constexpr, E_BITS: tl.constexpr, NEAREST: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """`codec.evaluate` of the listed pairs, bit for bit. Where a product is exact in float64, so is its fused form."""
    segment = tl.program_id(0)
    base = segment.to(tl.int64) * capacity
    count = tl.minimum(tl.load(found_count + segment), capacity)
    exponent_bias = tl.load(bias)
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
        ceiling = ((bits >> 52) - 1022 - tl.where((bits & 0xFFFFFFFFFFFFF) == 0, 1, 0)).to(tl.int32) - exponent_bias
        centre = _clamp(tl.where(largest == 0, E_LOW, ceiling), E_LOW, E_HIGH)

        score = tl.full([LANES], float("inf"), tl.float64)
        pick = tl.zeros([LANES], tl.int32)
        # Not unrolled: code for three exponents takes three times as long to compile, and no less to run.
        for shift_index in range(0 if NEAREST else -1, 1 if NEAREST else 2):
            exponent = _clamp(centre + shift_index, E_LOW, E_HIGH) + exponent_bias
            factor = DIVISOR * _power_of_two(1 - exponent)
            unscale = _power_of_two(2 * exponent)
            down = ()
            above = ()
            for p in tl.static_range(P):
                down = down + (_rounded(solution[p], exponent, 0, NEAREST, Q_LOW, Q_HIGH),)
                above = above + (_rounded(solution[p], exponent, 1, NEAREST, Q_LOW, Q_HIGH),)
            for up in tl.static_range(1 if NEAREST else 2**P):
                q = ()
                for p in tl.static_range(P):
                    q = q + (above[p] if (up >> (P - 1 - p)) & 1 else down[p],)
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
                pick = tl.where(better, (shift_index + 1) * 2**P + up, pick)

        exponent = _clamp(centre + (pick >> P) - 1, E_LOW, E_HIGH)
        key = (seed << E_BITS) | (exponent - E_LOW).to(tl.int64)
        for p in tl.static_range(P):
            up = ((pick >> (P - 1 - p)) & 1).to(tl.float64)
            q = _rounded(solution[p], exponent + exponent_bias, up, NEAREST, Q_LOW, Q_HIGH)
            key = (key << Q_BITS) | (q.to(tl.int32) - Q_LOW).to(tl.int64)
        # Integers ordered like the float64: the sign bit flips the others.
        ordered = score.to(tl.int64, bitcast=True)
        ordered = ordered ^ ((ordered >> 63) & 0x7FFFFFFFFFFFFFFF)
        tl.store(found_score + base + entry, ordered, mask=valid)
        tl.store(found_key + base + entry, key, mask=valid)
        tl.atomic_min(best + n, ordered, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["capacity"])
def select(found_block, found_position, found_count, found_score, found_key, best, best_key, capacity, LANES: tl.constexpr):
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


@triton.jit(do_not_specialize=["count"])
def fields(
    key, seeds, exponents, coefficients, count, P: tl.constexpr, Q_LOW: tl.constexpr, Q_BITS: tl.constexpr,
    E_LOW: tl.constexpr, E_BITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The fields of keys: seed, exponent, coefficients, most significant first, each counted from its least value."""
    n = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = n < count
    bits = tl.load(key + n, mask=inside, other=0)
    for p in tl.static_range(P - 1, -1, -1):
        tl.store(coefficients + n.to(tl.int64) * P + p, ((bits & ((1 << Q_BITS) - 1)) + Q_LOW).to(tl.int8), mask=inside)
        bits = bits >> Q_BITS
    tl.store(exponents + n, ((bits & ((1 << E_BITS) - 1)) + E_LOW).to(tl.int8), mask=inside)
    tl.store(seeds + n, (bits >> E_BITS).to(tl.int32), mask=inside)
