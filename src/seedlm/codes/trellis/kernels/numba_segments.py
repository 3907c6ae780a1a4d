"""The loop of `numba_dequantize`."""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, error_model="numpy")
def segments(words, scales, rate, state_bits, multiplier, strip, first, last, weight):
    """Weights float32 [out, in] of segments `first` to `last` of words int32 [S, in * rate]; scales float32 [out]."""
    out, width = weight.shape
    mask, factor = np.uint64((1 << state_bits) - 1), np.uint64(multiplier)
    for segment in range(first, last):
        start = segment // strip * strip
        length = min(strip, len(words) - start)
        after = start + (segment - start + 1) % length
        for t in range(min(32, out - 32 * segment)):
            row = 32 * segment + t
            scale, word, offset = scales[row], rate * t >> 5, np.uint64(rate * t & 31)
            inside = word + 1 < rate
            for c in range(width):
                low = np.uint64(np.uint32(words[segment, c * rate + word]))
                next_word = words[segment, c * rate + word + 1] if inside else words[after, c * rate]
                window = (low | np.uint64(np.uint32(next_word)) << np.uint64(32)) >> offset
                mixed = (window & mask) * factor
                total = (mixed & np.uint64(255)) + (mixed >> np.uint64(8) & np.uint64(255))
                total += (mixed >> np.uint64(16) & np.uint64(255)) + (mixed >> np.uint64(24) & np.uint64(255))
                weight[row, c] = np.float32(np.int32(total) - np.int32(510)) * scale
