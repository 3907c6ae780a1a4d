"""Threads that help with a kernel of microseconds, if they happen to be running.

Torch's way, a parallel region that ends when every thread has been there, costs a turn of the scheduler (10 ms and more) for
each operation as soon as something else runs on the machine, and torch's own waiting threads are such a something. Here the
caller does the work itself and helpers take pieces of it: it waits for pieces that somebody has taken, never for a thread to
wake. So two threads are not slower than one, whatever else runs.

A helper waits for work by looking at the board for about half a millisecond, giving way to others; then it sleeps, and the next
job wakes it. One job is on the board at a time: a second caller does its work alone.
"""

import ctypes
import threading
from collections import deque
from typing import Any, Final

import numpy as np

from seedlm.codes import machine_code

_MAKERS: Final = "seedlm.codes.team_numba"


class Team:
    """Helpers, as many as were ever asked for, which live as long as the process."""

    def __init__(self) -> None:
        self._memory = np.zeros(64, np.int64)
        self._board = self._memory.ctypes.data
        self._kept = machine_code.kernel(_MAKERS, "lead"), machine_code.kernel(_MAKERS, "help")
        leads, helps = (each.address for each in self._kept)
        self._lead = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(leads)
        self._help = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(helps)
        self._asleep: deque[Any] = deque()
        self._count, self._growing = 0, threading.Lock()

    def _grow(self, helpers: int) -> None:
        with self._growing:
            while self._count < helpers:
                threading.Thread(target=self._work, name="seedlm", daemon=True).start()
                self._count += 1

    def _work(self) -> None:
        lock = threading.Lock()
        while True:
            lock.acquire()
            self._asleep.append(lock)
            lock.acquire()
            lock.release()
            self._help(self._board)

    def run(self, kernel: int, job: bytes, helpers: int) -> None:
        """Run the kernel at an address, which takes pieces until there are none, here and on helpers: so many are woken."""
        if self._count < helpers:
            self._grow(helpers)
        for _ in range(helpers):
            try:
                self._asleep.pop().release()
            except IndexError:
                break
        self._lead(self._board, kernel, job)
