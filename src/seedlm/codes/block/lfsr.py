"""The linear-feedback shift register that every weight is generated from (paper Section 3.1, Algorithm 1, Table 6).

A K-bit Fibonacci register holds a state in 1 .. 2^K - 1. One step XORs the bits at the tap indices (index 0 is the least
significant), shifts the state right by one and enters the feedback bit at bit K-1::

    state  = b[K-1] ... b2 b1 b0          feedback = XOR of b[i] for i in TAPS[K]
    next   = feedback b[K-1] ... b2 b1

All taps here are of maximal length: starting anywhere, the register visits all 2^K - 1 non-zero states. Seen over time it
is one endless bit stream: the state after n steps is the K-bit window that starts at stream bit n, and the K seed bits are
stream bits 0 .. K-1. Every fast form (tables, kernels, hardware) is derived from `step`; nothing is typed in twice.
"""

from collections.abc import Sequence

TAPS: dict[int, tuple[int, ...]] = {
    2: (0, 1),
    3: (0, 1),
    4: (0, 1),
    5: (0, 2),
    6: (0, 1),
    7: (0, 1),
    8: (0, 2, 3, 4),
    9: (0, 4),
    10: (0, 3),
    11: (0, 2),
    12: (0, 1, 2, 8),
    13: (0, 1, 2, 5),
    14: (0, 1, 2, 12),
    15: (0, 1),
    16: (0, 1, 3, 12),
    17: (0, 3),
    18: (0, 7),
    19: (0, 1, 2, 5),
    20: (0, 3),
    21: (0, 2),
    22: (0, 1),
    23: (0, 5),
    24: (0, 1, 2, 7),
}
"""Tap indices for each register length K, from the paper's Table 6."""


def period(bits: int) -> int:
    """Number of states of the K-bit register's only cycle, 2^K - 1."""
    return (1 << bits) - 1


def step(state: int, bits: int) -> int:
    """The state one clock after `state`. Any K-bit value is accepted; 0 maps to itself and is never part of the cycle."""
    feedback = 0
    for tap in TAPS[bits]:
        feedback ^= state >> tap
    return (state >> 1) | ((feedback & 1) << (bits - 1))


def states(seed: int, count: int, bits: int) -> list[int]:
    """The first `count` states recorded from `seed`. The first one is the state after one step, never the seed itself."""
    recorded = []
    state = seed
    for _ in range(count):
        state = step(state, bits)
        recorded.append(state)
    return recorded


def cycle(bits: int, start: int = 1) -> list[int]:
    """All 2^K - 1 states in the order the register visits them, beginning with `start` itself."""
    return [start, *states(start, period(bits) - 1, bits)]


def advance_matrix(count: int, bits: int) -> list[int]:
    """The linear map over GF(2) that takes a state `count` steps further, as K columns.

    Column i is the image of the state with only bit i set, so the image of any state is the XOR of the columns of its set
    bits (`apply`). It is found by running `step` on the unit vectors.
    """
    columns = []
    for i in range(bits):
        state = 1 << i
        for _ in range(count):
            state = step(state, bits)
        columns.append(state)
    return columns


def apply(columns: Sequence[int], state: int) -> int:
    """Image of `state` under a GF(2) matrix given by its columns."""
    image = 0
    for i, column in enumerate(columns):
        if state >> i & 1:
            image ^= column
    return image
