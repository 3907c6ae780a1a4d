"""The kernels of `search_triton` after the bound pass, in the order in which they run; what they are for is said there.

Lists are int32 arrays [segments, capacity] with a counter for each segment, which may end beyond the capacity. Scores are kept
as int64 that are ordered like the float64 they stand for, so that one atomic minimum works on them.
"""

import triton
import triton.language as tl


@triton.jit
def _plus_if_reached(sum, residual, limit, value: tl.constexpr):
    """Gives sum + value where residual <= limit, else sum."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 f; set.le.f16x2.f16x2 f, $2, $3; fma.rn.f16x2 $0, f, $4, $1;}",
        "=r,r,r,r,r", [sum, residual, limit, tl.full(sum.shape, value, tl.float16)], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _take_if_less(least, index, residual, tile):
    """The lesser of two residuals, and its tile as float16: exact up to 2048."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 f, d; set.lt.f16x2.f16x2 f, $4, $2; min.f16x2 $0, $4, $2; sub.f16x2 d, $5, $3; fma.rn.f16x2 $1, f, d, $3;}",
        "=r,=r,r,r,r,r", [least, index, residual, tile], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def first(
    least, tile_block, tile_index, blocks, TILES: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr, FIRST: tl.constexpr
):
    """The FIRST best among the minima of SHARES interleaved shares of the tiles, for BN blocks, with their tags."""
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
        tl.store(tile_index + at, (smallest & 0xFFFF) << 4 | (smallest >> 16 & 15))


@triton.jit
def best_seed(
    parts, own, shared, position, tile_block, tile_index, found_position, T: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    S: tl.constexpr, W: tl.constexpr, SHARE: tl.constexpr, COMPLEMENT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The seed of least residual in a tagged share (SHARE groups) of a tile, for BN pairs of block and share."""
    entry = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.load(tile_block + entry)
    index = tl.load(tile_index + entry)
    tile = index >> 4
    t = (index & 15)[:, None] * (T // 16) + tl.arange(0, SHARE)[None, :]
    slot = (t * G)[:, :, None] + tl.arange(0, G)[None, None, :]
    w = ()
    for c in tl.static_range(C):
        w = w + (tl.load(parts + n * (2 * W) + c).to(tl.float32),)
    x = tl.zeros([BN, SHARE, G], tl.float32)
    for c in tl.static_range(C):
        x += w[c][:, None, None] * tl.load(own + (tile * C + c)[:, None, None] * (T * G) + slot).to(tl.float32)
    energy = x * x
    if SHARE > 1:  # otherwise all share the rest
        for s in tl.static_range(S):
            y = tl.zeros([BN, SHARE], tl.float32)
            for c in tl.static_range(C):
                row = shared + (((tile[:, None] * 16 + t // (T // 16)) * S + s) * C + c) * (T // 16)
                y += w[c][:, None] * tl.load(row + t % (T // 16)).to(tl.float32)
            energy += (y * y)[:, :, None]
    energy = tl.reshape(energy, [BN, SHARE * G])
    winner = tl.argmin(energy, axis=1) if COMPLEMENT else tl.argmax(energy, axis=1)
    tl.store(found_position + entry, tl.load(position + tile * (T * G) + (index & 15) * (T * G // 16) + winner))


@triton.jit
def threshold(
    norm, best, threshold, limit, open, seed_root, seed_sum, tile_root, tile_sum, DIVISOR: tl.constexpr, BN: tl.constexpr
):
    """The residuals that a seed and a tile must not exceed to be able to win, for BN blocks: `search_triton_tables.Margins`."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    squared = tl.load(norm + n)
    ordered = tl.load(best + n)
    score = (ordered ^ ((ordered >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    reached = 1.0 + score / (DIVISOR * DIVISOR * 1.0) / tl.where(squared > 0, squared, 1.0)
    root = tl.sqrt(tl.maximum(reached, 0.0))
    seed = (root + seed_root) * (root + seed_root) + seed_sum
    tile = (root + tile_root) * (root + tile_root) + tile_sum
    # Rounded up, with all tag bits set: not below whatever a tile that is wanted may have there.
    tile = (tile * (1 + 2.0**-7) + 2.0**-24).to(tl.float16).to(tl.int16, bitcast=True) | 15
    # A block of zeros reaches nothing with any seed and cannot be scaled: left open.
    tl.store(threshold + n, tl.where(squared > 0, seed, -1.0).to(tl.float32))
    tl.store(limit + n, tl.where(squared > 0, tile.to(tl.float16, bitcast=True), -1.0))
    tl.store(open + n, 1, mask=squared == 0)


@triton.jit(do_not_specialize=["capacity"])
def list(
    least, limit, open, listed, tile_block, tile_count, blocks, capacity, BN: tl.constexpr, TT: tl.constexpr,
    PARTS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """For each of TT tiles the blocks whose limit it reaches, among BN blocks; LIMIT tiles a block."""
    tiles = tl.program_id(0) * TT
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    reach = tl.load(limit + n)
    # One word a block says which of the tiles are wanted; almost all words are empty or have one bit.
    word = tl.zeros([BN], tl.int32)
    for half in tl.static_range(TT // 8):
        bits = tl.zeros([BN], tl.float16)
        for row in tl.static_range(8):
            residual = tl.load(least + (tiles + half * 8 + row).to(tl.int64) * blocks + n)
            bits = _plus_if_reached(bits, residual, reach, 2.0**row)
        word |= bits.to(tl.int32) << (half * 8)
    count = _ones(word)
    before = tl.atomic_add(listed + n, count, mask=word != 0, sem="relaxed")
    for i in range(tl.max(count, axis=0)):
        wanted = i < count
        within = wanted & (before + i < LIMIT)
        segment = (tiles + _lowest_bit(word)) * PARTS + tl.program_id(1) % PARTS
        at = tl.atomic_add(tile_count + segment, 1, mask=within, sem="relaxed")
        fits = within & (at < capacity)
        tl.store(tile_block + segment.to(tl.int64) * capacity + at, n, mask=fits)
        tl.store(open + n, 1, mask=wanted & (fits == 0))
        word = word & (word - 1)


@triton.jit(do_not_specialize=["capacity", "found_capacity"])
def rescan(
    parts, own, shared, position, threshold, open, tile_block, tile_count, found_block, found_position, found_count, capacity,
    found_capacity, T: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    COMPLEMENT: tl.constexpr, SEEDS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The seeds, among SEEDS of a tile, that reach the threshold of a block that listed the tile.

    Float16 rows, but both parts of the block and sums in float32. Rows stay; BN listed blocks at a time go past them.
    """
    tile = tl.program_id(0)
    segment = tile * tl.num_programs(1) + tl.program_id(1)
    count = tl.minimum(tl.load(tile_count + segment), capacity)
    tile_block += segment.to(tl.int64) * capacity
    found = segment.to(tl.int64) * found_capacity
    k = tl.arange(0, 2 * W)
    inside = (k % W < C)[:, None]
    slot = tl.program_id(2) * SEEDS + tl.arange(0, SEEDS)
    own_rows = tl.load(own + (tile * C + k % W)[:, None] * (T * G) + slot[None, :], mask=inside, other=0.0)
    shared_rows = ()
    for s in tl.static_range(S):
        row = ((tile * 16 + slot // G // (T // 16)) * S + s)[None, :] * C + (k % W)[:, None]
        row = shared + row * (T // 16) + (slot // G % (T // 16))[None, :]
        shared_rows = shared_rows + (tl.load(row, mask=inside, other=0.0),)
    # Of eight columns in a row the tensor cores give a thread two: bits of one word, so that no thread needs another's.
    lane = tl.arange(0, 4)[None, :]
    bit = (1 << (tl.arange(0, SEEDS // 8)[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]))[None]
    for start in range(0, count, BN):
        entry = start + tl.arange(0, BN)
        n = tl.load(tile_block + entry, mask=entry < count, other=0)
        w = tl.load(parts + n[:, None] * (2 * W) + k[None, :])
        x = tl.dot(w, own_rows)
        residual = x * x if COMPLEMENT else 1.0 - x * x
        for s in tl.static_range(S):
            x = tl.dot(w, shared_rows[s])
            residual = residual + x * x if COMPLEMENT else residual - x * x
        # A block that is open is redone anyway, and takes no room from the others.
        reach = tl.where((entry < count) & (tl.load(open + n) == 0), tl.load(threshold + n), -1.0)
        hits = tl.reshape((residual <= reach[:, None]).to(tl.int32), [BN, SEEDS // 8, 4, 2])
        word = tl.sum(tl.sum(hits * bit, axis=3), axis=1)
        ones = _ones(word)
        first_at = tl.atomic_add(found_count + segment + tl.zeros([BN, 4], tl.int32), ones, mask=word != 0, sem="relaxed")
        block = n[:, None] + tl.zeros([BN, 4], tl.int32)
        for i in range(tl.max(tl.max(ones, axis=1), axis=0)):
            wanted = i < ones
            lowest = _lowest_bit(word)
            seed = tile * (T * G) + tl.program_id(2) * SEEDS + (lowest // 2) * 8 + lane * 2 + lowest % 2
            at = first_at + i
            fits = wanted & (at < found_capacity)
            tl.store(found_block + found + at, block, mask=fits)
            tl.store(found_position + found + at, tl.load(position + seed, mask=fits, other=0), mask=fits)
            tl.store(open + block, 1, mask=wanted & (at >= found_capacity))
            word = word & (word - 1)


@triton.jit
def _ones(word):
    """How many bits of an int32 are set."""
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _lowest_bit(word):
    """Which bit of an int32 is the lowest set."""
    return (((word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


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
