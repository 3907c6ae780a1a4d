"""How work that takes long tells how far it is, and how that is shown."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

Progress = Callable[[str, int, int], None]
"""Told (phase, done, total), in the unit of the phase (`PHASES`): tokens of ``text``, bytes of ``read``, weights of
``compress``. A phase's first call says where it starts, which is not 0 when an earlier run is gone on with; a total of 0 is
one that nobody knows, as of ``open`` and ``load``. From several threads, one call at a time."""

Tell = Callable[[int], None]
"""Told how many more are done, any number of times: weights, unless it is said otherwise."""

PHASES: Final = {
    "open": ("Opening the model", "", ""),
    "load": ("Loading the model", "", ""),
    "text": ("Writing a text", "k", "tokens"),
    "statistics": ("Observing layers", "k", "tokens"),
    "read": ("Reading the source", "M", "bytes"),
    "compress": ("Encoding", "M", "weights"),
    "evaluate": ("Scoring", "k", "tokens"),
    "sensitivity": ("Measuring", "k", "tokens"),
    "prompts": ("Continuing prompts, comparing layers", "", ""),
    "tasks": ("Asking tasks", "", "tasks"),
    "packed": ("Measuring packed", "", "runs"),
    "dense": ("Measuring dense", "", "runs"),
    "nf4": ("Measuring NF4", "", "runs"),
    "design": ("Measuring formats", "", "formats"),
    "verify": ("Reading everything", "", ""),
    "check": ("Checking codes", "", "tensors"),
    "rtl": ("Writing the design", "", ""),
}
"""Phase -> what a user is told, and the unit in which."""

_SCALES: Final = {"M": 1e6, "k": 1e3, "": 1.0}


class Bars:
    """Progress bars on stderr: how far, how fast, how long still. Used as a context, in a terminal or a notebook."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Live
        from rich.text import Text

        class Amount(ProgressColumn):
            def render(self, task: Task) -> Text:
                prefix, unit = task.fields["unit"]
                if task.total is None:
                    return Text("")
                scale, speed = _SCALES[prefix], task.finished_speed or task.speed
                rate = f" {speed / scale:6.3f} {prefix}/s" if speed else ""
                return Text(f"{task.completed / scale:.1f} / {task.total / scale:.1f} {prefix} {unit}{rate}")

        columns = (TextColumn("{task.description}"), BarColumn(), Amount(), TimeElapsedColumn(), TimeRemainingColumn())
        self._live = Live(*columns, console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}
        self._waiting: Any = None

    @staticmethod
    def are_seen() -> bool:
        """Whether somebody looks: stderr is a terminal, or this is a notebook."""
        if "ipykernel" not in sys.modules and not (sys.stderr and sys.stderr.isatty()):
            return False
        from rich.console import Console

        console = Console(stderr=True)
        return console.is_terminal or console.is_jupyter

    def __enter__(self) -> "Bars":
        self._live.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._live.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._waiting is not None and phase not in self._tasks:
            self._live.remove_task(self._waiting)  # what nobody knew the end of has ended
            self._waiting = None
        if phase not in self._tasks:
            label, *unit = PHASES[phase]
            self._tasks[phase] = self._live.add_task(label, total=total or None, completed=done, unit=unit)
            if not total:
                self._waiting = self._tasks[phase]
        elif total:
            self._live.update(self._tasks[phase], completed=done)


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """What a caller wants to be told; if it did not say, bars in a terminal or a notebook, and nothing elsewhere."""
    if progress is not None:
        yield progress
    elif Bars.are_seen():
        with Bars() as bars:
            yield bars
    else:
        yield lambda phase, done, total: None


@contextmanager
def counted(tell: Tell | None, phase: str, total: int, progress: Progress | None = None) -> Iterator[Tell]:
    """The same for what is told in steps (`Tell`)."""
    if tell is not None:
        yield tell
        return
    done = 0
    with shown(progress) as show:
        show(phase, done, total)

        def add(count: int) -> None:
            nonlocal done
            done += count
            show(phase, done, total)

        yield add


def say(line: str) -> None:
    """Print a line on stderr. That it is closed, or that nobody reads it any more, is no reason to end the work."""
    if sys.stderr is not None:  # None if it was closed from the start; `print` would take stdout
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{line}\n")  # in one piece, since a thread speaks too
            sys.stderr.flush()


class Lines:
    """Progress where there is no terminal: a line on stderr as a phase begins, then one every few seconds, come what may.

    Used as a context: a thread speaks while nobody calls, as while a model loads or kernels are compiled.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._said = seconds, time.monotonic()
        self._phases: dict[str, _Phase] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._speak, name="seedlm progress", daemon=True)

    def __enter__(self) -> "Lines":
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._ended.set()
        self._thread.join()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if phase not in self._phases:
                for other in [name for name, known in self._phases.items() if not known.total]:
                    del self._phases[other]  # what nobody knew the end of has ended
                self._phases[phase] = _Phase(phase, now, done, done, total)
                self._print(self._phases[phase].beginning(), now)
                return
            known = self._phases[phase]
            ended = known.done < known.total <= done
            known.done = done
            if ended and now - known.began >= self._seconds:
                self._print(known.ending(now), now)
            elif now - self._said >= self._seconds:
                self._tell(now)

    def _speak(self) -> None:
        while not self._ended.wait(max(0.05, self._seconds - (time.monotonic() - self._said))):
            with self._lock:
                if (now := time.monotonic()) - self._said >= self._seconds:
                    self._tell(now)

    def _tell(self, now: float) -> None:
        """How far the phase is that began last, of those that have not ended."""
        going = [known for known in self._phases.values() if not known.total or known.done < known.total]
        if going:
            self._print(going[-1].state(now), now)

    def _print(self, line: str, now: float) -> None:
        self._said = now
        say(f"seedlm: {line}")


@dataclass
class _Phase:
    """A phase as lines tell of it: when it began and at what, and how far it is."""

    name: str
    began: float
    start: int
    done: int
    total: int

    def _amount(self, count: int) -> str:
        _, prefix, unit = PHASES[self.name]
        number = f"{count / _SCALES[prefix]:,.1f}" if prefix else f"{count:,}"
        return " ".join(filter(None, (number, prefix, unit)))

    def _rate(self, now: float) -> float:
        return (self.done - self.start) / max(now - self.began, 1e-9)

    def _speed(self, now: float) -> str:
        _, prefix, unit = PHASES[self.name]
        return f"{self._rate(now) / _SCALES[prefix]:.3g} {prefix or unit}/s"

    def beginning(self) -> str:
        whole = f": {self._amount(self.total)}" if self.total else " ..."
        return PHASES[self.name][0] + whole + (f", of which {self._amount(self.start)} are done" if self.start else "")

    def state(self, now: float) -> str:
        label, passed = PHASES[self.name][0], now - self.began
        if not self.total:
            return f"{label}: {passed:.0f} s so far"
        share = f"{label}: {self._amount(self.done)} of {self._amount(self.total)} ({self.done / self.total:.0%})"
        if self.done <= self.start:
            return f"{share}, {passed:.0f} s so far; kernels are compiled at their first use"
        left = (self.total - self.done) / self._rate(now)
        return f"{share}, {self._speed(now)}, {_duration(left)} left"

    def ending(self, now: float) -> str:
        return f"{PHASES[self.name][0]}: {self._amount(self.total)} in {_duration(now - self.began)}, {self._speed(now)}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
