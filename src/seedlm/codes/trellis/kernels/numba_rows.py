"""Rows of the trellis code's weights on a CPU, each from its own windows alone, to the bit those of `codec.dequantize_rows`."""

from typing import Any

import numpy as np
from numba import carray

from seedlm.codes.compiled import to_machine_code
from seedlm.codes.hadamard_numba import inverse
from seedlm.codes.trellis.format import MULTIPLIERS, SEGMENT_ROWS
from seedlm.codes.vectors import as_pointer, job_address, take


def rows(rate: int, state_bits: int) -> Any:
    """Forms rows in the model's basis.

    Its job: how many, segments in all, of a strip, width, addresses of their numbers int64 [rows], of words, of factors
    float32 [rows], of y float32 [rows, width], block of the transform, signs float32 [block].
    """
    multiplier, mask = np.uint32(MULTIPLIERS[state_bits]), np.uint32((1 << state_bits) - 1)

    @to_machine_code()
    def form(job):
        count, total, strip, width, words, to, block = job[1], job[2], job[3], job[4], job[6], job[8], job[9]
        wanted = carray(as_pointer(job[5]), (count,), np.int64)
        factors = carray(as_pointer(job[7]), (count,), np.float32)
        signs = carray(as_pointer(job[10]), (block,), np.float32)
        while True:
            piece = take(job_address(job))
            if piece >= count:
                break
            segment, bit = wanted[piece] // SEGMENT_ROWS, wanted[piece] % SEGMENT_ROWS * rate
            start = segment // strip * strip
            following = start + (segment - start + 1) % min(strip, total - start)
            word, shift, factor = bit // 32, np.uint64(bit % 32), factors[piece]
            after, there = (segment, word + 1) if word + 1 < rate else (following, 0)
            size = rate * (width - 1) + 1
            lower = carray(as_pointer(words + 4 * (segment * rate * width + word)), (size,), np.uint32)
            upper = carray(as_pointer(words + 4 * (after * rate * width + there)), (size,), np.uint32)
            y = carray(as_pointer(to + 4 * width * piece), (width,), np.float32)
            for column in range(width):
                both = np.uint64(lower[rate * column]) | np.uint64(upper[rate * column]) << np.uint64(32)
                mixed = np.uint32(np.uint32(both >> shift) & mask) * multiplier
                pairs = (mixed & np.uint32(0x00FF00FF)) + (mixed >> np.uint32(8) & np.uint32(0x00FF00FF))
                value = np.int32((pairs + (pairs >> np.uint32(16))) & np.uint32(0xFFFF)) - np.int32(510)
                y[column] = np.float32(value) * factor
            inverse(to + 4 * width * piece, width, block, signs)

    return form
