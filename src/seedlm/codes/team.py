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
from llvmlite import ir
from llvmlite.binding import address_of_symbol, get_default_triple
from numba import cfunc, types

from seedlm.codes.compiled import KEPT
from seedlm.codes.vectors import I32, I64, call, intrinsic, job_address, pointer

_JOB, _KERNEL, _SERIAL, _INSIDE, _TAKEN = 0, 64, 128, 192, 256
"""Places on the board, in bytes: apart, so that waiting for one does not slow down another."""

_LOOKS: Final = 1 << 14
_POLITE: Final = address_of_symbol("sched_yield") is not None


def atomic(operation: str) -> Any:
    """An atomic operation on the int64 at an address; what was there before is returned."""

    @intrinsic
    def run(typingctx, address, value):
        def codegen(context, builder, sig, args):
            return builder.atomic_rmw(operation, pointer(builder, args[0], I64), args[1], "seq_cst")

        return types.intp(types.intp, types.intp), codegen

    return run


add, _exchange = atomic("add"), atomic("xchg")


@intrinsic
def look(typingctx, address):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.intp(types.intp), codegen


@intrinsic
def call_kernel(typingctx, kernel, job):
    """Run the kernel at an address on the job at another."""

    def codegen(context, builder, sig, args):
        function = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [I64]).as_pointer())
        builder.call(function, [args[1]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@cfunc(types.void(types.CPointer(types.int64)), cache=KEPT)
def run_all(job):
    """One job after another. job: 0, how many, of each its kernel's address and where it lies, in bytes from here; the jobs."""
    for i in range(job[1]):
        call_kernel(job[2 + 2 * i], job_address(job) + job[3 + 2 * i])


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a loop that waits."""

    def codegen(context, builder, sig, args):
        triple = get_default_triple()
        if triple.startswith("x86_64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith(("aarch64", "arm64")):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(I32, 1))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _give_way(typingctx):
    def codegen(context, builder, sig, args):
        if _POLITE:
            call(builder, "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), codegen


@cfunc(types.void(types.intp, types.intp, types.intp), cache=KEPT)
def _lead(board, kernel, job):
    """Do a job, with whoever comes."""
    if _exchange(board + _TAKEN, 1):
        call_kernel(kernel, job)
        return
    _exchange(board + _KERNEL, kernel)
    add(board + _SERIAL, 1)
    _exchange(board + _JOB, job)
    call_kernel(kernel, job)
    _exchange(board + _JOB, 0)
    while look(board + _INSIDE):
        pause()
    _exchange(board + _TAKEN, 0)


@cfunc(types.void(types.intp), cache=KEPT)
def _help(board):
    """Take part in jobs until there has been none for a while."""
    idle, last = 0, 0
    while idle < _LOOKS:
        idle += 1
        if look(board + _JOB) and look(board + _SERIAL) != last:
            add(board + _INSIDE, 1)  # from here on the caller waits
            job = look(board + _JOB)
            if job:
                last, idle = look(board + _SERIAL), 0
                call_kernel(look(board + _KERNEL), job)
            add(board + _INSIDE, -1)
        elif idle & 31:
            pause()
        else:
            _give_way()


class Team:
    """Helpers, as many as were ever asked for, which live as long as the process."""

    def __init__(self) -> None:
        self._memory = np.zeros(64, np.int64)
        self._board = self._memory.ctypes.data
        self._lead = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(_lead.address or 0)
        self._help = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_help.address or 0)
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
