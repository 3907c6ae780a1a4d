"""What a token's products read on a CPU, made of what comes before them in a decoder layer: an RMS norm, or a gate.

Each is a stage of one piece before these products' own (`threads.Jobs`). In float32, rounded nowhere but where the sum is left
in h.
"""

from typing import Any

import numpy as np
from numba import carray

from seedlm.codes.compiled import to_machine_code
from seedlm.codes.vectors import as_pointer, exponential, from_bits, job_address, read, read_bfloat16, take, write_bfloat16


def norm() -> Any:
    """RMS norm of h + delta, the sum of which is left in h.

    Its job: width, bits of float32 epsilon, h, delta or 0, weight, their kind, floats (`records.floats`).
    """

    @to_machine_code()
    def run(job):
        if take(job_address(job)) == 0:
            width, epsilon, h, delta, weight, kind, to = job[1], job[2], job[3], job[4], job[5], job[6], job[7]
            x = carray(as_pointer(to), (width,), np.float32)
            others = carray(as_pointer(to + 4 * width), (width,), np.float32)
            read(h, kind, 0, to, width)
            if delta:
                read(delta, kind, 0, to + 4 * width, width)
                for i in range(width):
                    x[i] += others[i]
                if kind == 0:
                    target = carray(as_pointer(h), (width,), np.float32)
                    for i in range(width):
                        target[i] = x[i]
                else:
                    write_bfloat16(to, h, width, np.float32(1))
                    read_bfloat16(h, to, width)
            read(weight, kind, 0, to + 4 * width, width)
            a = b = c = d = np.float32(0)  # four sums, each of which waits for itself alone
            for i in range(0, width - 3, 4):
                a += x[i] * x[i]
                b += x[i + 1] * x[i + 1]
                c += x[i + 2] * x[i + 2]
                d += x[i + 3] * x[i + 3]
            for i in range(width // 4 * 4, width):
                a += x[i] * x[i]
            mean = (a + b + (c + d)) / np.float32(width)
            factor = np.float32(1) / np.sqrt(mean + from_bits(np.int32(epsilon)))
            for i in range(width):
                x[i] = x[i] * factor * others[i]

    return run


def gate() -> Any:
    """silu(gate) * up.

    Its job: width, gate, up, their kind, floats (`records.floats`).
    """

    @to_machine_code()
    def run(job):
        if take(job_address(job)) == 0:
            width, given, up, kind, to = job[1], job[2], job[3], job[4], job[5]
            values = carray(as_pointer(to), (width,), np.float32)
            others = carray(as_pointer(to + 4 * width), (width,), np.float32)
            read(given, kind, 0, to, width)
            read(up, kind, 0, to + 4 * width, width)
            for i in range(width):
                x = values[i]
                silu = x / (np.float32(1) + exponential(-x))
                values[i] = (np.float32(0) if x < np.float32(-87) else silu) * others[i]

    return run
