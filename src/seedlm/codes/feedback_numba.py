"""The elementwise part of `feedback`'s factorization, compiled: the same operations in the same order, so the same bits.

Torch needs some thirty small operations a column for it, which on a GPU are all waiting: 16,000 for a width of 576.
"""

import numpy as np
from numba import njit

from seedlm.codes.compiled import KEPT


@njit(nogil=True, cache=KEPT, error_model="numpy")
def factor_panel(columns: np.ndarray, least: float) -> None:
    """`feedback._factor_panel` of float64 [batch, panel, rest], in place."""
    for b in range(columns.shape[0]):
        for i in range(columns.shape[1]):
            pivot = columns[b, i, i]
            root = np.sqrt(max(pivot, least))
            columns[b, i, i] = root
            for k in range(i + 1, columns.shape[2]):
                columns[b, i, k] = 0.0 if pivot < least else columns[b, i, k] / root
            for j in range(i + 1, columns.shape[1]):
                factor = columns[b, i, j]
                for k in range(i + 1, columns.shape[2]):
                    product = factor * columns[b, i, k]
                    columns[b, j, k] = columns[b, j, k] - product
