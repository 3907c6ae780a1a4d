"""The exact seed search on a CPU: every seed bounded in 16-bit fixed point, the few that could win evaluated in float64.

What makes it fast is the structure of the generator. Consecutive states differ by a shift and one new bit, so with z(n) the
state n's column, scaled to [-1, 1], and s(n) the +-1 vector of its new bits (one per row),

    z(n + 1) = z(n) / 2 + s(n + 1) / 2          and          span U(n) = span{ z(n+1), s(n+2), ..., s(n+P) }

Only 2^C sign vectors exist. Per block, one table holds <w, s> for all of them; then each state costs one table load h(n)
and one step f(n) = f(n-1)/2 + h(n)/2 of <w, z(n)>, and a block's energy on a seed's span is P squares of short combinations of
h(n+2) .. h(n+P) and f(n+1) with constants of the seed (Gram-Schmidt). 32 blocks run in the lanes of a vector.

That energy caps what any coefficients can achieve. Its error has a proved bound (`search_numba_tables`): the recurrence keeps
bits that the register has dropped, and the arithmetic is Q15. Seeds whose constants would amplify it (3 %, where the columns
nearly coincide) are bounded in float32 from their orthonormal columns instead. Per block then:

    1. the largest cap of every tile of 32 seeds
    2. evaluate the best seed of the best tile: what it achieves is the bar
    3. every tile whose largest cap plus margin reaches the bar is bounded again in float32, and every seed that still
       reaches it is evaluated exactly as `codec.evaluate` does; the bar rises

What is left out cannot win or tie, so the result is Algorithm 3's argmin, block by block.
"""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from seedlm.codes import simd
from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import BlockFormat, Rounding
from seedlm.codes.block.search.numba_tables import ENERGY_UNIT, SHARE, UNIT, plan
from seedlm.codes.compiled import KEPT
from seedlm.codes.simd import LANES

_FLOAT_MARGIN = 1e-5
"""Proved bound of the float32 energy's error, as a share of ||w||^2: P * C products of unit vectors give 4e-6."""
_UNIT_WEIGHT = np.full(1, (1 << 15) // SHARE * 0x10001, np.int32)
"""The weight 1 in Q15, twice."""
_ONE = 1000
_POWERS = np.ldexp(1.0, np.arange(-_ONE, _ONE))
"""_POWERS[_ONE + e] is 2^e: a call into the math library costs more than the candidate it is for."""
_FEW_SEEDS = 4096
"""A block this near to nothing is decided by the seeds that can beat zero at all, if they are at most so many."""
_PIECE_BLOCKS = 2048


def search(
    blocks: Tensor, exponent_bias: int, format: BlockFormat, rounding: Rounding = "best"
) -> Iterator[tuple[BlockCodes, Tensor]]:
    """The answer of `search_torch.brute_force`, in pieces of consecutive blocks, on `torch.get_num_threads()` threads."""
    tables = plan(format)
    dims = (0,) * format.block_size, (0,) * format.num_coefficients
    code = exponent_bias, rounding == "best", *format.coefficient_range, *format.exponent_range

    def piece(part: Tensor) -> tuple[BlockCodes, Tensor]:
        n = len(part)
        seeds = np.empty(n, np.int32)
        exponents = np.empty(n, np.int8)
        coefficients = np.empty((n, format.num_coefficients), np.int8)
        scores = np.empty(n, np.float64)
        _run(dims, part.contiguous().numpy(), code, tables.bounds, tables.exact, (seeds, exponents, coefficients, scores))
        return BlockCodes(*map(torch.from_numpy, (seeds, exponents, coefficients))), torch.from_numpy(scores)

    threads = max(1, torch.get_num_threads())
    share = -(-len(blocks) // (threads * LANES)) * LANES  # of few blocks, such as a column step has
    pieces = iter(blocks.split(min(_PIECE_BLOCKS, share)))
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(piece, part) for part in itertools.islice(pieces, 2 * threads)]
        while running:
            yield running.pop(0).result()
            running.extend(pool.submit(piece, part) for part in itertools.islice(pieces, 1))


# The compiled part. `dims` is a pair of tuples with C and P elements: a tuple's length is part of its type, so numba compiles
# (and caches on disk) one version per shape in which both are constants. `code` holds the exponent bias, whether to try all
# roundings, and the smallest and largest coefficient and exponent; `tables` and `plan` are those of `Plan`.


@simd.inner
def _fill_table(dims, unit, sums, table):
    """Fixed-point <w, s> / sqrt(C) of 32 blocks for every sign pattern s, 8 rows at a time.

    unit float32 [C, 32]; sums float32 [256, 32], scratch; table int16 [chunks * 256 * 32]
    """
    size = len(dims[0])
    chunks = (size + 7) // 8
    scale = np.float32(UNIT / math.sqrt(size))
    first = 0
    for c in range(chunks):
        rows = size // chunks + (c < size % chunks)
        for lane in range(LANES):
            total = np.float32(0.0)
            for i in range(rows):
                total -= unit[first + i, lane]
            sums[0, lane] = total
        for i in range(rows):
            half = 1 << i
            for pattern in range(half):
                for lane in range(LANES):
                    sums[half + pattern, lane] = sums[pattern, lane] + np.float32(2.0) * unit[first + i, lane]
        for pattern in range(1 << rows):
            row = (c * 256 + pattern) * LANES
            for lane in range(LANES):
                scaled = sums[pattern, lane] * scale + np.float32(32768.5)
                table[row + lane] = np.int16(np.int32(scaled) - 32768)
        first += rows


@simd.inner
def _projection(dims, table, offsets, n):
    """Fixed-point <w, s(n)> / sqrt(C) of 32 blocks."""
    h = simd.load(table, offsets[0, n])
    for c in range(1, (len(dims[0]) + 7) // 8):
        h = simd.add(h, simd.load(table, offsets[c, n]))
    return h


@simd.inner
def _bound(dims, table, offsets, constants, seeds, tiles, maxima, top):
    """Fixed-point energies of all seeds: the largest of each tile int16 [tiles * 32] and of all of them int16 [32]."""
    count = len(dims[1])
    num_constants = count * (count + 1) // 2 - (count > 1)
    f = simd.zero()
    for i in range(-48, 1):
        f = simd.add(simd.half(f), simd.half(_projection(dims, table, offsets, (i % seeds + seeds) % seeds)))
    highest = simd.zero()
    for tile in range(tiles):
        tile_highest = simd.zero()
        for j in range(LANES):
            n = tile * LANES + j
            at = n * num_constants
            f = simd.add(simd.half(f), simd.half(_projection(dims, table, offsets, n + 1)))
            energy = simd.zero()
            for k in range(1, count + 1):
                v = f if k == count else _projection(dims, table, offsets, n + 1 + k)
                for i in range(1, k):
                    r = simd.splat_pair(constants, at)
                    at += 1
                    v = simd.add(v, simd.mul_q15(_projection(dims, table, offsets, n + 1 + i), r))
                square = simd.mul_q15(v, v)
                if k == 1 and count > 1:
                    energy = simd.mul_q15(square, simd.splat_pair(_UNIT_WEIGHT, 0))
                else:
                    energy = simd.add(energy, simd.mul_q15(square, simd.splat_pair(constants, at)))
                    at += 1
            tile_highest = simd.maximum(tile_highest, energy)
        simd.store(maxima, tile * LANES, tile_highest)
        highest = simd.maximum(highest, tile_highest)
    simd.store(top, 0, highest)


@simd.inner
def _evaluate(dims, block, position, tables, code, winner, scratch, winner_q):
    """Score one seed for one block as `codec.evaluate` does, and keep it in `winner` if it comes first under the tie rule.

    block float64 [C]; winner float64 [3]: score, seed, exponent; winner_q float64 [P]; scratch float64 [3, P] and [P, P].
    The norm goes through the Gram matrix: integers below 2^53, so it is the sum of squares exactly.
    """
    size, count = len(dims[0]), len(dims[1])
    states, seeds, _, pinv, divisor = tables
    bias, all_roundings, low_q, high_q, low_e, high_e = code
    ups = 1 << count if all_roundings else 1
    reach = 1 if all_roundings else 0
    matrix = position + 1
    (solution, moments, q), gram = scratch
    largest = 0.0
    for p in range(count):
        t = block[0] * np.float64(pinv[position, p, 0])
        a = block[0] * np.float64(states[matrix + p])
        for c in range(1, size):
            t = t + block[c] * np.float64(pinv[position, p, c])
            a = a + block[c] * np.float64(states[matrix + count * c + p])
        solution[p] = t * divisor
        moments[p] = a
        largest = max(largest, abs(solution[p]))
    for p in range(count):
        for r in range(p + 1):
            cross = 0.0
            for c in range(size):
                cross += np.float64(states[matrix + count * c + p]) * np.float64(states[matrix + count * c + r])
            gram[p, r] = cross
    start = low_e
    if largest > 0.0:
        mantissa, start = math.frexp(largest / (high_q + 0.5))
        if mantissa == 0.5:
            start -= 1
        start = min(max(start - bias, low_e), high_e)
    for shift in range(-reach, reach + 1):
        exponent = min(max(start + shift, low_e), high_e)
        factor = divisor * _POWERS[1 - exponent - bias + _ONE]
        unit = _POWERS[2 * (exponent + bias) + _ONE]
        inverse = _POWERS[_ONE - exponent - bias]
        for up in range(ups):
            inner = norm = 0.0
            for p in range(count):
                scaled = solution[p] * inverse
                value = np.floor(scaled) + (up >> p & 1) if ups > 1 else np.rint(scaled)
                value = min(max(value, np.float64(low_q)), np.float64(high_q))
                q[p] = value
                inner = value * moments[p] if p == 0 else inner + value * moments[p]
                cross = 0.5 * value * gram[p, p]
                for r in range(p):
                    cross += q[r] * gram[p, r]
                norm += 2.0 * value * cross
            score = (norm - factor * inner) * unit
            if score > winner[0]:
                continue
            if score == winner[0]:
                order = np.float64(seeds[position]) - winner[1]
                if order == 0.0:
                    order = exponent - winner[2]
                for p in range(count):
                    if order == 0.0:
                        order = q[p] - winner_q[p]
                if order >= 0.0:
                    continue
            winner[0] = score
            winner[1] = seeds[position]
            winner[2] = exponent
            for p in range(count):
                winner_q[p] = q[p]


@simd.inner
def _energies(dims, unit, lane, spans, tile):
    """Float32 energies of one block for the 32 positions of a tile; unit float32 [C, 32]."""
    size, count = len(dims[0]), len(dims[1])
    at = tile * (size * count * LANES)
    total = simd.splat(np.float32(0.0))
    for _ in range(count):
        dot = simd.splat(np.float32(0.0))
        for c in range(size):
            dot = simd.multiply_add(simd.load(spans, at), simd.splat(unit[c, lane]), dot)
            at += LANES
        total = simd.multiply_add(dot, dot, total)
    return total


@simd.inner
def _scan(dims, unit, lanes, exact, block_energy, tile, positions, spans, tables, code, winners, scratch, winners_q):
    """Evaluate the seeds of a tile that could beat or tie the winner, for the blocks whose bit is set in `lanes`."""
    while lanes:
        lane = simd.lowest_bit(lanes)
        lanes &= lanes - np.uint32(1)
        bar = simd.splat(np.float32(-winners[lane, 0] / block_energy[lane] - _FLOAT_MARGIN))
        mask = simd.at_least(_energies(dims, unit, lane, spans, tile), bar)
        while mask:
            i = simd.lowest_bit(mask)
            mask &= mask - np.uint32(1)
            position = np.int64(positions[tile, i])
            if position >= 0:
                _evaluate(dims, exact[lane], position, tables, code, winners[lane], scratch, winners_q[lane])


@simd.inner
def _start(dims, unit, lane, block, tile, positions, spans, tables, code, winner, scratch, winner_q, floats):
    """Evaluate the most promising seed of a tile."""
    simd.store(floats, 0, _energies(dims, unit, lane, spans, tile))
    best = 0
    for i in range(1, LANES):
        if floats[i] > floats[best]:
            best = i
    _evaluate(dims, block, np.int64(max(positions[tile, best], 0)), tables, code, winner, scratch, winner_q)


@simd.inner
def _nearly_nothing(dims, block, norm, weakness, by_weakness, tables, code, winner, scratch, winner_q):
    """Decide a block so small that few seeds can do better than zero coefficients; False if they are not few.

    A candidate beats zero only if its vector is shorter than 2 ||w||, and no non-zero coefficients at the smallest
    exponent give one shorter than 2^(e+b) / ||pinv(U)||. The rest can at most tie, so of them only the smallest
    seed that reaches zero matters.
    """
    reach = 0.999 * _POWERS[code[4] + code[0] + _ONE] / (2.0 * norm)
    if weakness[min(_FEW_SEEDS, len(weakness) // 16)] >= reach:
        return False
    for i in range(len(weakness)):
        if weakness[i] < reach:
            break
        _evaluate(dims, block, np.int64(by_weakness[i]), tables, code, winner, scratch, winner_q)
    for seed in range(1, len(tables[2])):
        if winner[0] <= 0.0 and (winner[0] < 0.0 or seed > winner[1]):
            break
        _evaluate(dims, block, np.int64(tables[2][seed]), tables, code, winner, scratch, winner_q)
    return True


@simd.inner
def _fixed_bar(score, energy, margin):
    """The least fixed-point energy that can belong to a seed as good as this score."""
    return np.int16(max(-1.0, math.floor((-score / energy - margin) * ENERGY_UNIT)))


@njit(nogil=True, cache=KEPT)
def _run(dims, blocks, code, plan, tables, out):
    """Search float32 [N, C] blocks; results into the arrays of `out`."""
    size, count = len(dims[0]), len(dims[1])
    offsets, constants, positions, spans, margin, weakness, by_weakness, tiles = plan
    seeds_out, exponents_out, coefficients_out, scores_out = out
    unit = np.zeros((size, LANES), np.float32)
    exact = np.zeros((LANES, size), np.float64)
    block_energy = np.zeros(LANES, np.float64)
    sums = np.empty((256, LANES), np.float32)
    table = np.empty((size + 7) // 8 * 256 * LANES, np.int16)
    maxima = np.empty(tiles * LANES, np.int16)
    top = np.empty(LANES, np.int16)
    bar = np.empty(LANES, np.int16)
    floats = np.empty(LANES, np.float32)
    winners = np.empty((LANES, 3), np.float64)
    winners_q = np.empty((LANES, count), np.float64)
    columns = np.empty((3, count), np.float64)
    scratch = (columns[0], columns[1], columns[2]), np.empty((count, count), np.float64)

    for first in range(0, len(blocks), LANES):
        lanes = min(LANES, len(blocks) - first)
        pending = np.uint32(0)
        for lane in range(LANES):
            total = 0.0
            for c in range(size):
                value = np.float64(blocks[first + lane, c]) if lane < lanes else 0.0
                exact[lane, c] = value
                total += value * value
            norm = math.sqrt(total)
            winners[lane, 0] = np.inf
            for p in range(count):
                winners_q[lane, p] = 0.0
            block_energy[lane] = total * tables[4] * tables[4]
            for c in range(size):
                unit[c, lane] = exact[lane, c] / norm if total > 0.0 else 0.0
            if total == 0.0:
                winners[lane, 0] = 0.0
                winners[lane, 1] = 1.0
                winners[lane, 2] = code[4]
            elif not _nearly_nothing(
                dims, exact[lane], norm, weakness, by_weakness, tables, code, winners[lane], scratch, winners_q[lane]
            ):
                pending |= np.uint32(1) << np.uint32(lane)

        if pending:
            _fill_table(dims, unit, sums, table)
            _bound(dims, table, offsets, constants, len(weakness), tiles, maxima, top)
            fresh = pending
            for tile in range(tiles):
                mask = simd.at_least(simd.load(maxima, tile * LANES), simd.load(top, 0)) & fresh
                fresh &= ~mask
                while mask:
                    lane = simd.lowest_bit(mask)
                    mask &= mask - np.uint32(1)
                    _start(
                        dims, unit, lane, exact[lane], tile, positions, spans, tables, code, winners[lane], scratch,
                        winners_q[lane], floats,
                    )  # fmt: skip
                    bar[lane] = _fixed_bar(winners[lane, 0], block_energy[lane], margin)
            for tile in range(len(positions)):
                mask = pending
                if tile < tiles:
                    mask &= simd.at_least(simd.load(maxima, tile * LANES), simd.load(bar, 0))
                if mask:
                    _scan(
                        dims, unit, mask, exact, block_energy, tile, positions, spans, tables, code, winners, scratch, winners_q
                    )
                    while mask and tile < tiles:
                        lane = simd.lowest_bit(mask)
                        mask &= mask - np.uint32(1)
                        bar[lane] = _fixed_bar(winners[lane, 0], block_energy[lane], margin)
        for lane in range(lanes):
            seeds_out[first + lane] = np.int32(winners[lane, 1])
            exponents_out[first + lane] = np.int8(winners[lane, 2])
            scores_out[first + lane] = winners[lane, 0]
            for p in range(count):
                coefficients_out[first + lane, p] = np.int8(winners_q[lane, p])
