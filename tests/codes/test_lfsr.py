"""The shift register: the paper's example, the period of every length, and the forms derived from one step."""

import random

import pytest

from seedlm.codes.block import lfsr
from seedlm.codes.block.basis import cycle_states


def test_worked_example_of_the_paper():
    recorded = lfsr.states(4, 8, bits=3)
    assert [recorded[i : i + 2] for i in range(0, 8, 2)] == [[2, 5], [6, 7], [3, 1], [4, 2]]


@pytest.mark.parametrize("bits", [k for k in lfsr.TAPS if k <= 17])
def test_every_nonzero_state_is_visited_once(bits):
    assert sorted(lfsr.cycle(bits)) == list(range(1, 1 << bits))
    assert lfsr.step(lfsr.cycle(bits)[-1], bits) == 1


@pytest.mark.parametrize("bits", lfsr.TAPS)
def test_period_of_every_length_is_maximal(bits):
    """The order of the step matrix is 2^K - 1: that power is the identity, and none at a proper prime cofactor is."""
    period = lfsr.period(bits)
    assert _power(bits, period) == [1 << i for i in range(bits)]
    for prime in _primes(period):
        assert _power(bits, period // prime) != [1 << i for i in range(bits)]


@pytest.mark.parametrize("bits", [2, 7, 16, 24])
def test_advance_matrix_is_that_many_steps(bits):
    chosen = random.Random(bits)
    for count in (0, 1, bits, 41):
        columns = lfsr.advance_matrix(count, bits)
        for state in [1, lfsr.period(bits), *(chosen.randrange(1, 1 << bits) for _ in range(20))]:
            expected = lfsr.states(state, count, bits)[-1] if count else state
            assert lfsr.apply(columns, state) == expected


def test_states_are_windows_of_one_bit_stream():
    seed, bits = 0xACE1, 16
    recorded = lfsr.states(seed, 40, bits)
    stream = [seed >> i & 1 for i in range(bits)] + [state >> (bits - 1) for state in recorded]
    for n, state in enumerate(recorded, 1):
        assert state == sum(bit << i for i, bit in enumerate(stream[n : n + bits]))


def _power(bits, exponent):
    """Columns of the step matrix to a power, by squaring."""
    result, base = [1 << i for i in range(bits)], lfsr.advance_matrix(1, bits)
    while exponent:
        if exponent & 1:
            result = [lfsr.apply(base, column) for column in result]
        base = [lfsr.apply(base, column) for column in base]
        exponent >>= 1
    return result


def _primes(n):
    factor = 2
    while factor * factor <= n:
        if n % factor == 0:
            yield factor
            while n % factor == 0:
                n //= factor
        factor += 1
    if n > 1:
        yield n


@pytest.mark.parametrize("bits", [2, 3, 8, 13, 16])
def test_the_table_of_states_is_the_cycle_twice(bits):
    assert cycle_states(bits).tolist() == 2 * lfsr.cycle(bits)
