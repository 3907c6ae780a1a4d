"""Stages of jobs that threads run together on a CPU: each piece once, and none before all of the stage before it are done."""

import ctypes
import random
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch.nn import functional

from seedlm.codes import on_cpu
from seedlm.codes.threads import Jobs, Kernel, NotRecorded, Record, kernel, share_rows

pytest.importorskip("numba")

SIZES = (5, 1, 1, 3, 8, 1, 2, 13, 1, 4)
"""Pieces of each stage's two jobs, together."""


@pytest.fixture(scope="module")
def kernels():
    """One whose pieces look whether the stage before them is done and take their time; two that count pieces, and calls."""
    from numba import carray, cfunc, types

    from seedlm.codes.team_numba import add, pause
    from seedlm.codes.vectors import as_pointer, job_address, take

    sleep = ctypes.CDLL(None).usleep
    sleep.argtypes, sleep.restype = (ctypes.c_uint,), ctypes.c_int

    @cfunc(types.void(types.CPointer(types.int64)))
    def piece(job):
        """Its job: pieces, round (address), then addresses and counts: before, done by it; of mistakes; whether to sleep."""
        now = carray(as_pointer(job[2]), (1,), np.int64)[0]
        before, done = carray(as_pointer(job[3]), (job[4],), np.int64), carray(as_pointer(job[5]), (job[1],), np.int64)
        while True:
            found = take(job_address(job))
            if found >= job[1]:
                break
            for i in range(job[4]):
                if before[i] != now:
                    add(job[6], 1)
            turns = (found * 7919 + now * 104729 + job[1] * 31) % 257
            if job[7] and turns < 3:
                sleep(20 + 50 * turns)
            for _ in range(turns):
                pause()
            done[found] += 1

    @cfunc(types.void(types.CPointer(types.int64)))
    def once(job):
        if take(job_address(job)) == 0:
            add(job[1], 1)

    @cfunc(types.void(types.CPointer(types.int64)))
    def call(job):
        add(job[1], 1)

    return Kernel(piece), Kernel(once), Kernel(call)


class Work:
    """Jobs of stages after stages, run again and again. mistakes: pieces that were begun before others were done."""

    def __init__(self, piece, sizes=SIZES, sleeps=1):
        self.now, self.mistakes = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.done = [np.zeros(size, np.int64) for size in sizes]
        self.stages, before = [], np.zeros(0, np.int64)
        for done in self.done:
            half, at = len(done) // 2, done.ctypes.data
            parts = [(0, half), (half, len(done) - half)] if half else [(0, 1)]
            which = self.now.ctypes.data, before.ctypes.data, len(before)
            self.stages.append(
                [(piece, (n, *which, at + 8 * first, self.mistakes.ctypes.data, sleeps), n) for first, n in parts]
            )
            before = done
        self.jobs = Jobs(self.stages)

    def run(self, run):
        """Once more, by a function; each piece has to be done once, and after what is before it."""
        self.now += 1
        run()
        assert all((done == self.now).all() for done in self.done)
        assert self.mistakes == 0

    def laid(self):
        """The jobs as they lie in memory, at the first piece."""
        return bytes(bytearray(self.jobs._laid))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thousands_of_runs_with_threads_that_are_delayed(kernels, threads):
    work, before = Work(kernels[0]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(1500):
            work.run(work.jobs.share)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("helpers", [1, 4])
def test_by_our_own_helpers(kernels, helpers):
    from seedlm.codes.team import Team

    team, work = Team(), Work(kernels[0])
    for number in range(1500):
        work.run(lambda: team.run(work.jobs._kernel.address, work.laid(), helpers))
        if number % 500 == 0:
            time.sleep(0.01)  # they go to sleep


def test_threads_come_whenever_they_like(kernels):
    """One is there from the beginning, others come while it is at work or when all is done; each returns when all is."""
    work, count, draw = Work(kernels[0]), 4, random.Random(1)
    memory, waits = [b""], [0.0] * count
    begun, ended = threading.Barrier(count + 1), threading.Barrier(count + 1)

    def come(number):
        while True:
            begun.wait()
            if not memory[0]:
                return
            time.sleep(waits[number])
            work.jobs._kernel._call(memory[0])
            if any((done != work.now).any() for done in work.done):
                work.mistakes += 1
            ended.wait()

    def together():
        waits[1:] = [draw.choice((0, 1e-5, 1e-4, 1e-3)) * draw.random() for _ in range(count - 1)]
        memory[0] = work.laid()
        begun.wait()
        ended.wait()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(1000):
            work.run(together)
    finally:
        memory[0] = b""
        begun.wait()
    for thread in threads:
        thread.join()


def test_who_comes_when_all_is_done_runs_nothing(kernels):
    calls = np.zeros(1, np.int64)
    jobs = Jobs([[(kernels[2], (calls.ctypes.data,), 1)] * 2, [(kernels[2], (calls.ctypes.data,), 1)]])
    memory = bytes(bytearray(jobs._laid))
    for _ in range(3):
        jobs._kernel._call(memory)
        assert calls == 3


def test_one_thread_does_all_of_it_while_others_do_not_come(kernels):
    work = Work(kernels[0])
    work.run(lambda: work.jobs._kernel._call(work.laid()))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are pinned")
def test_threads_that_share_a_core_give_way(kernels):
    """Seven threads of torch's and one core: whoever waits lets the one go on that it waits for."""
    import os

    work, cores, before = Work(kernels[0], sleeps=0), os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(3)
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), {min(cores)})
    try:
        for _ in range(20):
            work.run(work.jobs.share)
    finally:
        torch.set_num_threads(before)
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), cores)


def test_numbers_that_a_call_gives(kernels):
    calls = [np.zeros(1, np.int64) for _ in range(3)]
    where = [each.ctypes.data for each in calls]
    once = kernels[1]
    jobs = Jobs([[(once, (None, None), 1), (once, (where[1],), 1)], [(once, (None,), 1)]])
    jobs.share([(where[0], 5), (where[2],)])
    jobs.share([(where[2], 5), (where[2],)])
    assert [each.item() for each in calls] == [1, 2, 3]
    with pytest.raises(ValueError, match="zip"):
        jobs.share([(where[0], 5)])


class TestRecord:
    def test_nothing_runs_until_it_is_asked_for_and_then_all_in_order(self, kernels):
        work = Work(kernels[0])
        with Record() as record:
            Jobs(work.stages[:3]).share()
            for stage in work.stages[3:]:
                for each, numbers, pieces in stage:
                    each.share(numbers, pieces)
        assert all((done == 0).all() for done in work.done)
        for _ in range(200):
            work.run(record.run)

    def test_numbers_of_the_calls(self, kernels):
        calls = [np.zeros(1, np.int64) for _ in range(3)]
        jobs = Jobs([[(kernels[1], (None,), 1)], [(kernels[1], (calls[2].ctypes.data,), 1)]])
        with Record() as record:
            for each in calls[:2]:
                jobs.share([(each.ctypes.data,)])
        record.run()
        record.run()
        assert [each.item() for each in calls] == [2, 2, 4]
        jobs.share([(calls[0].ctypes.data,)])  # runs as ever
        assert [each.item() for each in calls] == [3, 2, 5]

    @pytest.mark.parametrize(
        "compute",
        [
            lambda x: x + 1,
            lambda x: x.add_(1),
            lambda x: x.__iadd__(1),
            lambda x: functional.linear(x, x),
            lambda x: x.T.contiguous(),
            lambda x: x.to(torch.bfloat16),
            lambda x: x.clone(),
            lambda x: x.copy_(x),
            lambda x: x[0],
            lambda x: x.sum().item(),
            lambda x: bool(x.isfinite().all()),
            lambda x: int(x[0, 0]),
            lambda x: torch.zeros(3),
            lambda x: x.cpu(),
            lambda x: torch.ops.aten.mul(x, 2),
            lambda x: torch._foreach_add_([x], 1),
            lambda x: share_rows(lambda first, last: None, 1, 1),
        ],
    )
    def test_nothing_else_is_computed_meanwhile(self, compute):
        x = torch.ones(2, 2)
        with pytest.raises(NotRecorded, match="no job"), Record():
            compute(x)
        assert torch.equal(x, torch.ones(2, 2))
        x += 1  # and then all is as ever
        ran = []
        share_rows(lambda first, last: ran.append((first, last)), 1, 1)
        assert ran == [(0, 1)]

    def test_what_only_looks_and_makes_is_allowed(self):
        x, place = torch.ones(2, 2), torch.tensor([3])
        with Record() as record:
            found = x.new_empty(4), torch.empty(3), torch.empty_like(x), x.view(-1), x.contiguous(), x.to(torch.float32)
            assert (int(place), x.shape, x.numel(), x.dtype, x.is_contiguous()) == (3, (2, 2), 4, torch.float32, True)
            kernel_of_nothing().share((), 0)
        assert found[4] is found[5] is x
        record.run()

    def test_memory_that_its_jobs_know_is_held(self):
        x = torch.ones(1000)
        y = torch.ones(1000)
        with Record() as record:
            places = x.data_ptr(), y.data_ptr(), on_cpu.scratch(100)[1], on_cpu.scratch(5000)[1]
            kernel_of_nothing().share((), 0)
        y.data = torch.zeros(1000)
        del x
        held = {each.data_ptr() for each in record._held}
        assert held >= {*places}
        assert on_cpu.scratch(1)[1] not in held

    def test_not_where_torch_asks_no_mode(self):
        """Nobody would know whose memory is to be held, or that something else was computed."""
        with torch._C.DisableTorchFunction(), pytest.raises(NotRecorded, match="would not say"), Record():
            pass
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NotRecorded, match="no job"), Record():
            torch.ones(2) + 1

    def test_who_is_interrupted_on_the_way_in_or_out_records_no_more(self, kernels):
        """At any call and after any that is C's, which is where Python looks for signals."""
        calls, interrupted = np.zeros(1, np.int64), 0
        for after in range(1000):
            left, record = [after], Record()

            def look(frame, event, _, left=left):
                left[0] -= event in ("call", "c_return")
                if left[0] < 0:
                    raise KeyboardInterrupt

            sys.setprofile(look)
            try:
                with record:
                    kernels[1].share((0,), 1)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                record.entered = False
                done = left[0] >= 0
                sys.setprofile(None)
            before = calls.copy()
            kernels[1].share((calls.ctypes.data,), 1)
            assert calls == before + 1
            assert torch.ones(1) + 1 == 2
            if done:
                break
        assert 10 < interrupted == after

    def test_scratch_is_what_it_was(self):
        before = on_cpu.scratch(100)
        with Record():
            assert on_cpu.scratch(100)[1] != before[1]
            kernel_of_nothing().share((), 0)
        assert on_cpu.scratch(100)[0] is before[0]

    def test_another_thread_is_not_recorded(self, kernels):
        calls = np.zeros(1, np.int64)
        with Record() as record:
            thread = threading.Thread(target=kernels[1].share, args=((calls.ctypes.data,), 1))
            thread.start()
            thread.join()
            assert calls == 1
            kernel_of_nothing().share((), 0)
        record.run()
        assert calls == 1


def kernel_of_nothing():
    return kernel("seedlm.codes.team_numba", "run_all")
