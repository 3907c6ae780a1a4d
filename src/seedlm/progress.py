"""How work that takes long tells how far it is, and how that is shown."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

Progress = Callable[[str, int, int], None]
"""Told (phase, done, total), in the unit of the phase: tokens of ``text``, ``statistics``, ``sensitivity`` and ``evaluate``,
bytes of ``read``, weights of ``compress``. A phase's first call says where it starts, which is not 0 when an earlier run is
gone on with; a total of 0 is one that nobody knows, as of ``open`` and ``load``. From several threads, one call at a time."""

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
        if "ipykernel" not in sys.modules and not sys.stderr.isatty():
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
def counted(tell: Tell | None, phase: str, total: int) -> Iterator[Tell]:
    """The same for what is told in steps (`Tell`)."""
    if tell is not None:
        yield tell
        return
    done = 0
    with shown(None) as progress:

        def add(count: int) -> None:
            nonlocal done
            done += count
            progress(phase, done, total)

        yield add


class Lines:
    """Progress where there is no terminal: a line on stderr every half minute."""

    def __init__(self, seconds: float = 30.0) -> None:
        self._seconds, self._said = seconds, time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not total or time.monotonic() - self._said <= self._seconds:
            return
        self._said = time.monotonic()
        label, prefix, unit = PHASES[phase]
        scale = _SCALES[prefix]
        print(f"seedlm: {label}: {done / scale:.1f} / {total / scale:.1f} {prefix} {unit}", file=sys.stderr, flush=True)
