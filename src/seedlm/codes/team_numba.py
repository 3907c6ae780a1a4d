"""What threads do with kernels, compiled by numba: all of them are called with addresses, and find pieces to do (`threads`)."""

import time
from typing import Any, Final

from llvmlite import ir
from llvmlite.binding import address_of_symbol, get_default_triple
from numba import types

from seedlm.codes.compiled import inner, to_machine_code
from seedlm.codes.vectors import I32, I64, call, intrinsic, job_address, pointer

_JOB, _KERNEL, _SERIAL, _INSIDE, _TAKEN = 0, 64, 128, 192, 256
"""Places on the board, in bytes: apart, so that waiting for one does not slow down another."""

_LOOKS: Final = 1 << 14
_LEFT: Final = 1 << 32
"""Counts a thread that has left a stage, above those that are in it."""

_POLITE: Final = address_of_symbol("sched_yield") is not None


def atomic(operation: str) -> Any:
    """An atomic operation on the int64 at an address; what was there before is returned."""

    @intrinsic
    def run(typingctx, address, value):
        def codegen(context, builder, sig, args):
            return builder.atomic_rmw(operation, pointer(builder, args[0], I64), args[1], "seq_cst")

        return types.intp(types.intp, types.intp), codegen

    return run


add, _exchange, _least = atomic("add"), atomic("xchg"), atomic("min")


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


@intrinsic
def _at(typingctx, address):
    """The int64 at an address."""

    def codegen(context, builder, sig, args):
        return builder.load(pointer(builder, args[0], I64))

    return types.intp(types.intp), codegen


@intrinsic
def _now(typingctx):
    """Nanoseconds on the clock of `time.monotonic_ns`."""

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():
            place = builder.alloca(ir.ArrayType(I64, 2))
        address = builder.ptrtoint(place, I64)
        call(builder, "clock_gettime", I32, ir.Constant(I32, time.CLOCK_MONOTONIC), address)
        found = builder.load(place)
        return builder.add(
            builder.mul(builder.extract_value(found, 0), ir.Constant(I64, 10**9)), builder.extract_value(found, 1)
        )

    return types.intp(), codegen


@inner
def _rest(turn):
    """What a thread that waits does between two looks."""
    if turn & 31:
        pause()
    else:
        _give_way()


def run_all() -> Any:
    """One stage after another, each when all before it are done.

    Its job: 0, stages, of each 0, how many jobs, of each of these its kernel's address and where it lies, in bytes from here;
    the jobs. The 0 of a stage counts threads: those in it, and by `_LEFT` those that have left it.

    A thread leaves a stage when it has found no more pieces there. So who comes later has nothing to do in it, and with nobody
    in it all of it is done: nobody waits for a thread that has not come. One word counts both, so that all see one order. Who
    comes before the first has left is counted when that one looks.
    """

    @to_machine_code()
    def run(job):
        at = 2
        for _ in range(job[1]):
            stage, jobs = job_address(job) + 8 * at, job[at + 1]
            at += 2
            if add(stage, 1) < _LEFT:
                for i in range(at, at + 2 * jobs, 2):
                    call_kernel(job[i], job_address(job) + job[i + 1])
            at += 2 * jobs
            add(stage, _LEFT - 1)
            turn = 0
            while look(stage) & (_LEFT - 1):
                turn += 1
                _rest(turn)

    return run


def lead() -> Any:
    """Do a job, with whoever comes (`team`)."""

    @to_machine_code(types.intp, types.intp, types.intp)
    def run(board, kernel, job):
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

    return run


def help() -> Any:
    """Take part in jobs until there has been none for a while."""

    @to_machine_code(types.intp)
    def run(board):
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
            else:
                _rest(idle)

    return run


def take_part() -> Any:
    """What a region's threads do (`openmp`): the job, then a note of when one found no more of it, if that is the earliest."""

    @to_machine_code(types.intp)
    def run(region):
        call_kernel(_at(region), region + 16)
        _least(region + 8, _now())

    return run
