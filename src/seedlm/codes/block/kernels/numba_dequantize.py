"""Fast CPU kernel: packed words to weights, a twin of `codec.dequantize` bit for bit.

The states of a block are one contiguous window of the register's cycle. Split by index modulo P, the C states of coefficient
p are contiguous too, so a block costs P vector loads, P multiply-adds and one scaling, with no gather::

    phase r of the table   cycle[r], cycle[P + r], cycle[2P + r], ...      (less center)
    state (c, p) of a seed at position n   phase (n+1+p) % P, entry (n+1+p) // P + c

Tables are int16 for K <= 16: 131 KB at the presets, besides 262 KB from seed to position; both stay in a core's L2. The loop
is compiled per format and keeps to the definition: an integer sum, rounded once to float32, times the scale. It does
0.4 billion weights/s on one thread of a Zen 5, 30 times the reference. Products have a way of their own (`numba_product`).

Rows are shared out over plain threads, which run without the GIL, follow `torch.get_num_threads()` and survive a fork (the
child makes a new pool); OpenMP, numba's own choice, does not.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numba.cpython.unsafe import tuple as registers
from torch import Tensor

from seedlm.codes.block.basis import cycle_states, seed_positions
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.compiled import KEPT
from seedlm.codes.threads import share_rows

_with: Any = registers.tuple_setitem
"""_with(values, i, x): the tuple with item i replaced."""


def dequantize(words: Tensor, scales: Tensor, in_features: int, format: BlockFormat) -> Tensor:
    """Weights from packed words.

    words      int32 [out, words], on the CPU
    scales     of `lanes.scales`
    returns    float32 [out, in_features]
    """
    kernel = _kernel(format)
    weight = torch.empty(len(words), in_features, dtype=torch.float32, device="cpu")
    source, factors, target = words.contiguous().numpy(), scales.numpy(), weight.numpy()

    def rows(first: int, last: int) -> None:
        kernel.run(source[first:last], kernel.start, kernel.table, factors, target[first:last])

    share_rows(rows, *weight.shape)
    return weight


class _Kernel(NamedTuple):
    """Tables and compiled loop of one format.

    table    int16 or int32 [P * L], the cycle less center, phase after phase
    start    uint32 [2^K], position of the first state after each seed; seed 0, which is invalid, reads within the table too
    """

    table: np.ndarray
    start: np.ndarray
    run: Any


@lru_cache(maxsize=8)
def _kernel(format: BlockFormat) -> _Kernel:
    phases = format.num_coefficients
    length = -(-(format.num_seeds + phases) // phases) + format.block_size
    index = np.arange(length) * phases + np.arange(phases)[:, None]
    centred = cycle_states(format.seed_bits).numpy()[index % format.num_seeds] - format.center
    table = centred.ravel().astype(np.int16 if format.seed_bits <= 16 else np.int32)
    start = (seed_positions(format.seed_bits).numpy() + 1).astype(np.uint32)
    return _Kernel(table, start, _compile(format, length))


def _compile(format: BlockFormat, length: int) -> Any:
    """The loop over rows, for one format and table.

    Its constants are plain values so that numba can find it in its cache on disk. Weights are formed `lanes` at a time in
    tuples: those live in registers, where no store can alias them, and the compiler turns them into vectors. More than
    8 lanes or a loop over all C would not be unrolled, at 20 times the time.
    """
    size, count, block_bits = format.block_size, format.num_coefficients, format.block_bits
    lanes = math.gcd(size, 8)
    exponent_at, coefficients_at = format.seed_bits, format.seed_bits + format.exponent_bits
    coefficient_bits = format.coefficient_bits
    seed_mask, exponent_mask = (1 << format.seed_bits) - 1, (1 << format.exponent_bits) - 1
    widest_sum = format.center * -format.coefficient_range[0] * count
    integer = np.int32 if widest_sum < 1 << 31 else np.int64
    at_zero, q_zero = (np.uint32(0),) * count, (integer(0),) * count
    sums_zero, weights_zero = (integer(0),) * lanes, (np.float32(0),) * lanes

    @njit(nogil=True, cache=KEPT, error_model="numpy")
    def dequantize_rows(words, start, table, scales, weight):
        in_features = weight.shape[1]
        for r in range(len(words)):
            for block in range(-(-in_features // size)):
                word, offset = block * block_bits >> 5, block * block_bits & 31
                code = np.uint64(np.uint32(words[r, word])) >> np.uint64(offset)
                if offset + block_bits > 32:
                    code |= np.uint64(np.uint32(words[r, word + 1])) << np.uint64(32 - offset)
                if offset + block_bits > 64:
                    code |= np.uint64(np.uint32(words[r, word + 2])) << np.uint64(64 - offset)

                scale = scales[(code >> np.uint64(exponent_at)) & np.uint64(exponent_mask)]
                first = start[code & np.uint64(seed_mask)]
                at, q = at_zero, q_zero
                for p in range(count):
                    n = first + np.uint32(p)
                    at = _with(at, p, n % np.uint32(count) * np.uint32(length) + n // np.uint32(count))
                    above = 64 - coefficients_at - (p + 1) * coefficient_bits
                    q = _with(q, p, integer(np.int64(code << np.uint64(above)) >> np.int64(64 - coefficient_bits)))

                for c in range(0, size, lanes):
                    sums, weights = sums_zero, weights_zero
                    for p in range(count):
                        for i in range(lanes):
                            sums = _with(sums, i, sums[i] + integer(table[at[p] + np.uint32(c + i)]) * q[p])
                    for i in range(lanes):
                        weights = _with(weights, i, np.float32(sums[i]) * scale)
                    column = block * size + c
                    if column + lanes <= in_features:
                        for i in range(lanes):
                            weight[r, column + i] = weights[i]
                    else:
                        for i in range(in_features - column):
                            weight[r, column + i] = weights[i]

    return dequantize_rows
