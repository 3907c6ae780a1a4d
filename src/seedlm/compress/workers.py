"""Who runs the units: threads of this process, a process for each device, or a Ray cluster. All of them run `units.Worker`.

    the first device     threads here: while one waits for its file, the GPU or the disk, another one's search runs
    each further one     a child process with the same threads, since one interpreter can keep only a few GPUs busy; units go to
                         its standard input and events come from its standard output
    ray                  a task for each unit (`engine_ray`)

A worker tells what happens as events; `run` hands a unit to each thread that is free, and yields the events. No thread waits
for the disk: in each process one more does, once for all units written meanwhile, and then they are finished. A worker that
dies takes no more with it than the units that were not, which are not in the journal: the run ends with one line that says so,
and the next one does them again.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import torch

from seedlm.codes.together import Room
from seedlm.compress.worker import Job, Unit, Worker
from seedlm.device import free_host_memory, peak_memory
from seedlm.errors import BackendError, SeedLMError
from seedlm.storage.source import Source

_GPU_THREADS: Final = 4
_THREAD_BYTES: Final = 3 << 29
"""Units at once on a GPU, and memory that it should have free for each. On an H100 1, 2, 3 and 4 gave
299, 430, 454 and 512 million weights/s (docs/log/pipeline.md). A search on a CPU has threads of its own."""

_FEEDBACK_THREADS: Final = 32
"""Units at once on a GPU with error feedback: column follows column, so a matrix of few rows fills few multiprocessors."""

_CPU_FEEDBACK_THREADS: Final = 12
"""The same on a CPU, for each of torch's threads: with feedback a column of a small matrix is a few sequences, and the search
takes 32 of several matrices at once (`codes.together`)."""

_CPU_SHARE: Final = 2
"""One part in so many of the memory that is free is used for matrices with feedback at a time, or what one of them takes."""

_TABLE_THREADS: Final = 4
"""Torch's threads on the processor beside a GPU, which make tables by thousands of small operations: spread over all
processors by a process for each GPU, they wait for each other (docs/log/pipeline.md)."""

_CHILD: Final = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from seedlm.compress.workers import serve; serve()"
)


class Ready(NamedTuple):
    """A thread waits for a unit."""


class Encoded(NamedTuple):
    """So many weights more are encoded."""

    weights: int


@dataclass(frozen=True)
class Finished:
    """A unit's bytes are on disk. `device`, and the most memory so far of the process that did it, in bytes."""

    unit: Unit
    facts: dict[str, Any]
    device: str
    host_bytes: int
    device_bytes: int


KEPT: Final = "what is finished is kept, and the same command goes on from there"

Event = Ready | Encoded | Finished | BaseException
Post = Callable[["Workers", Event], None]


class Workers(Protocol):
    """Some threads that take units, each after it has said that it is ready.

    They start by `start` and not when they are made: whoever is to close them is in place by then. A thread that Ctrl-C left
    without one would keep the process from ending.
    """

    def start(self) -> None: ...

    def submit(self, unit: Unit) -> None: ...

    def close(self) -> None:
        """Return when nothing is written any more, however far `start` came."""
        ...


class Runner(Protocol):
    """What runs units."""

    def run(self, units: Iterable[Unit]) -> Iterator[Encoded | Finished]: ...


class _Stopped(Exception):
    """Raised inside a unit that nobody waits for any more."""


class Threads:
    """Threads of this process, on one device, and one that waits for the disk. The first thing they do is to warm up."""

    def __init__(self, job: Job, device: torch.device, source: Source | None, post: Post) -> None:
        self._job, self._device, self._source, self._post = job, device, source, post
        self._units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[tuple[Unit, dict[str, Any]] | None] = queue.SimpleQueue()
        self._stopping = False
        self._ready = threading.Lock()
        self._worker: Worker | None = None
        count = 1
        if device.type == "cuda":
            most = _GPU_THREADS if job.statistics is None else _FEEDBACK_THREADS
            count = max(1, min(most, torch.cuda.mem_get_info(device)[0] // _THREAD_BYTES))
        elif job.statistics is not None:
            count = _CPU_FEEDBACK_THREADS * torch.get_num_threads()
        self._room = Room((free_host_memory() or 8 << 30) // _CPU_SHARE) if count > 1 and device.type == "cpu" else None
        self._threads = [threading.Thread(target=self._work, name=f"seedlm {device}") for _ in range(count)]
        self._settler = threading.Thread(target=self._settle, name=f"seedlm {device} disk")

    def start(self) -> None:
        for thread in (*self._threads, self._settler):
            thread.start()

    def submit(self, unit: Unit) -> None:
        self._units.put(unit)

    def close(self) -> None:
        self._stopping = True
        self._units.put(None)
        try:
            _wait_for(self._threads)
        finally:  # a second Ctrl-C does not wait, and the threads end all the same
            self._written.put(None)
        _wait_for([self._settler])
        if self._worker is not None:
            self._worker.close()

    def _work(self) -> None:
        try:
            with self._ready:
                if self._stopping:
                    return
                if self._worker is None:
                    self._worker = Worker(self._job, self._device, self._source)
                    self._worker.warm_up()
            self._post(self, Ready())
            while (unit := self._units.get()) is not None:
                self._written.put((unit, self._run(self._worker, unit)))
                self._post(self, Ready())
            self._units.put(None)  # each passes it on
        except _Stopped:
            pass
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self._device)
            self._post(self, BackendError(f"{self._device}: {free:,} of its {total:,} bytes are free, not enough; {KEPT}"))
        except BaseException as error:  # raised where the events are read
            self._post(self, error)

    def _run(self, worker: Worker, unit: Unit) -> dict[str, Any]:
        if self._room is None:
            return worker.run(unit, self._tell)
        nbytes = worker.working_bytes(unit)
        self._room.enter(nbytes)
        try:
            if self._stopping:  # all that waited for room come in now, one after the other
                raise _Stopped
            return worker.run(unit, self._tell)
        finally:
            self._room.leave(nbytes)

    def _settle(self) -> None:
        try:
            while True:
                batch = [self._written.get()]
                while not self._written.empty():
                    batch.append(self._written.get())
                units = [written for written in batch if written is not None]
                if len(units) < len(batch):  # nobody waits any more
                    return
                assert self._worker is not None
                self._worker.settle({unit.destination.file for unit, _ in units})
                for unit, facts in units:
                    self._post(self, Finished(unit, facts, str(self._device), *peak_memory(self._device)))
        except BaseException as error:
            self._post(self, error)

    def _tell(self, weights: int) -> None:
        if self._stopping:
            raise _Stopped
        self._post(self, Encoded(weights))


def _wait_for(threads: Iterable[threading.Thread]) -> None:
    """Until those that were started have ended."""
    for thread in threads:
        if thread.is_alive():
            thread.join()


class Child:
    """A process of its own, on one device."""

    def __init__(self, job: Job, device: torch.device, threads: int, post: Post) -> None:
        self._device, self._post = device, post
        command = [sys.executable, "-c", _CHILD.format(path=sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._units, self._events = self._process.stdin, self._process.stdout
        self._closing = False
        self._first = (job, device, threads)
        self._reader = threading.Thread(target=self._read, name=f"seedlm {device}")

    def start(self) -> None:
        self._reader.start()
        self._send(self._first)

    def submit(self, unit: Unit) -> None:
        self._send(unit)

    def close(self) -> None:
        self._closing = True
        self._process.kill()  # whatever it is at is not in the journal
        self._process.wait()
        _wait_for([self._reader])
        self._events.close()
        with suppress(OSError):  # what it did not read any more
            self._units.close()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it has died, which `_read` tells
            pickle.dump(message, self._units)
            self._units.flush()

    def _read(self) -> None:
        try:
            while True:
                self._post(self, pickle.load(self._events))
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            if not self._closing:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                self._post(self, BackendError(f"the worker for {self._device} died ({how}); {KEPT}"))


def serve() -> None:
    """The other end of `Child`: units from standard input, events to standard output, until the input ends."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the events
    lock = threading.Lock()

    def post(_: Workers, event: Event) -> None:
        if isinstance(event, BaseException) and not isinstance(event, SeedLMError | OSError):
            traceback.print_exception(event)  # which pickle leaves behind
            event = RuntimeError(f"{type(event).__name__}: {event}")
        with lock:
            pickle.dump(event, events)
            events.flush()

    def messages(file: BinaryIO) -> Iterator[Any]:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return

    received = messages(sys.stdin.buffer)
    job, device, threads = next(received)
    torch.set_num_threads(threads)
    workers = Threads(job, device, None, post)
    workers.start()
    for unit in received:
        workers.submit(unit)
    os._exit(0)  # nobody is there to be told: stop in the middle


class Engine:
    """Workers that have been started, as seen through their events."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[tuple[Workers, Event]] = queue.SimpleQueue()

    def post(self, workers: Workers, event: Event) -> None:
        self.events.put((workers, event))

    def run(self, units: Iterable[Unit]) -> Iterator[Encoded | Finished]:
        """Run all units, each taken when there is a worker for it; yields what happens. Raises whatever a worker raised."""
        units = iter(units)
        waiting = next(units, None)
        running = 0
        while waiting or running:
            workers, event = self.events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Finished):
                running -= 1
            if isinstance(event, Ready) and waiting:
                workers.submit(waiting)
                running += 1
                waiting = next(units, None)
            if isinstance(event, Encoded | Finished):
                yield event


def share_threads(devices: list[torch.device], threads: int) -> list[int]:
    """How many of torch's threads on the processor the process of each device gets."""
    cpus = sum(device.type == "cpu" for device in devices)
    on_gpu = max(1, min(_TABLE_THREADS, threads // (2 * len(devices))))  # half of them read ahead
    return [max(1, threads // cpus) if device.type == "cpu" else on_gpu for device in devices]


@contextmanager
def start(job: Job, devices: list[torch.device], source: Source) -> Iterator[Engine]:
    """Start the workers; on leaving they have stopped. `source` is the job's, open."""
    engine = Engine()
    everything = torch.get_num_threads()
    own, *others = share_threads(devices, everything)
    with ExitStack() as stack:

        def begin(workers: Workers) -> None:
            stack.callback(workers.close)
            workers.start()

        for device, threads in zip(devices[1:], others, strict=True):
            begin(Child(job, device, threads, engine.post))
        stack.callback(torch.set_num_threads, everything)
        torch.set_num_threads(own)
        begin(Threads(job, devices[0], source, engine.post))
        yield engine
