"""`attention.attend` on a CPU, compiled by numba: key heads are pieces, which threads take.

A token's query heads that share a key head go over its positions together: scores, softmax, the sum of values, in float32. The
token's own key and value are written to the cache first, and read from there as they are stored.
"""

from typing import Any

import numpy as np
from numba import carray

from seedlm.codes.compiled import to_machine_code
from seedlm.codes.vectors import (
    as_pointer,
    exponential,
    from_bits,
    inner,
    job_address,
    read_bfloat16,
    take,
    to_bits,
    write,
    write_bfloat16,
)


@inner
def _line(x, kind, index, width, room):
    """The address of numbers `index` and on as float32, in `room` if they have to be converted."""
    if kind == 0:
        return x + 4 * index
    read_bfloat16(x + 2 * index, room, width)
    return room


@inner
def _turn(line, cosines, sines, target, width, factor):
    """Rotary embedding of float32 [width], of whose halves one turns the other, times a factor."""
    x, y = carray(as_pointer(line), (width,), np.float32), carray(as_pointer(target), (width,), np.float32)
    c, s = carray(as_pointer(cosines), (width,), np.float32), carray(as_pointer(sines), (width,), np.float32)
    half = width // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        y[i] = (a * c[i] - b * s[i]) * factor
        y[i + half] = (b * c[i + half] + a * s[i + half]) * factor


def attend() -> Any:
    """Its job: key heads, query heads of each, width, length of the cache, bits of float32 scaling, kind (`on_cpu.KINDS`) of
    all tensors, then addresses: position int64 [1], q, k, v, cosines, sines, keys, values, out, floats [key heads *
    `attention._floats`].

    Sums may be taken in any order.
    """

    @to_machine_code(fastmath={"reassoc", "contract", "nsz"})
    def run(job):
        heads, group, width, length, kind = job[1], job[2], job[3], job[4], job[6]
        now = carray(as_pointer(job[7]), (1,), np.int64)[0]
        scaling = from_bits(np.int32(job[5]))
        while True:
            head = take(job_address(job))
            if head >= heads:
                break
            work = job[16] + 4 * head * (group * (width + length) + 4 * width)
            scores_at, cosines = work + 4 * group * width, work + 4 * group * (width + length)
            sines, room, other = cosines + 4 * width, cosines + 8 * width, cosines + 12 * width
            queries = carray(as_pointer(work), (group, width), np.float32)
            scores = carray(as_pointer(scores_at), (group, length), np.float32)
            cosines, sines = _line(job[11], kind, 0, width, cosines), _line(job[12], kind, 0, width, sines)
            cache = head * length * width
            _turn(_line(job[9], kind, head * width, width, room), cosines, sines, other, width, np.float32(1))
            write(other, job[13], kind, cache + now * width, 0, 0, width)
            value = _line(job[10], kind, head * width, width, room)
            if kind == 0:
                stored = carray(as_pointer(job[14] + 4 * (cache + now * width)), (width,), np.float32)
                given = carray(as_pointer(value), (width,), np.float32)
                for i in range(width):
                    stored[i] = given[i]
            else:
                write_bfloat16(value, job[14] + 2 * (cache + now * width), width, np.float32(1))
            for g in range(group):
                line = _line(job[8], kind, (head * group + g) * width, width, room)
                _turn(line, cosines, sines, work + 4 * g * width, width, scaling)
            for place in range(now + 1):
                key = carray(as_pointer(_line(job[13], kind, cache + place * width, width, room)), (width,), np.float32)
                for g in range(group):
                    score = np.float32(0)
                    for i in range(width):
                        score += queries[g, i] * key[i]
                    scores[g, place] = score
            for g in range(group):
                highest, total, nans = scores[g, 0], np.float32(0), 0
                for place in range(now + 1):
                    highest = max(highest, scores[g, place])
                    nans += scores[g, place] != scores[g, place]
                for place in range(now + 1):
                    below = scores[g, place] - highest
                    share = np.float32(0) if below < np.float32(-87) else exponential(below)
                    scores[g, place] = share
                    total += share
                if nans or to_bits(highest) == np.int32(0x7F800000):  # which exponentials do not keep
                    total = np.float32(np.nan)
                for place in range(now + 1):
                    scores[g, place] /= total
                for i in range(width):
                    queries[g, i] = np.float32(0)
            for place in range(now + 1):
                line = carray(as_pointer(_line(job[14], kind, cache + place * width, width, room)), (width,), np.float32)
                for g in range(group):
                    share = scores[g, place]
                    for i in range(width):
                        queries[g, i] += share * line[i]
            for g in range(group):
                write(work + 4 * g * width, job[15], kind, (head * group + g) * width, 0, 0, width)

    return run
