"""What the commands share: a progress bar on stderr, numbers as people read them, and other people's texts made harmless.

Names of modules, tasks and files come from models, and a terminal obeys what is printed: a name may hold a command to it, or a
line end that forges a row of a table. So whatever is not printable is shown as its escape.
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final, NoReturn

from seedlm.storage.untrusted import printable

_SAY_EVERY: Final = 30.0
"""Seconds between lines of progress where there is no terminal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which asks for the same as Ctrl-C."""


def on_sigterm(number: int, frame: object) -> NoReturn:
    """A handler that lets a command end as after Ctrl-C."""
    raise Terminated


def stopped(error: KeyboardInterrupt, kept: str = "") -> NoReturn:
    """Say that a command was stopped, and what is kept; exit as a shell expects it."""
    print(printable(f"seedlm: stopped{kept}"), file=sys.stderr)
    sys.exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT))


def show(line: str) -> None:
    """Print a line that may hold texts of others."""
    print(printable(line))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@contextmanager
def show_progress() -> Iterator[tuple[Any, Any]]:
    """Progress on stderr, a bar on a terminal and else a line every half minute: its callback, and the rate of encoding."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            prefix, unit = task.fields["unit"]
            scale = {"M": 1e6, "k": 1e3}[prefix]
            speed = task.finished_speed or task.speed
            rate = f" {speed / scale:6.3f} {prefix}/s" if speed else ""
            return Text(f"{task.completed / scale:.1f} / {(task.total or 0) / scale:.1f} {prefix} {unit}{rate}")

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Amount(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    labels = {
        "text": ("Writing a text", ("k", "tokens")),
        "statistics": ("Observing layers", ("k", "tokens")),
        "read": ("Reading the source", ("M", "bytes")),
        "compress": ("Encoding", ("M", "weights")),
        "evaluate": ("Scoring", ("k", "tokens")),
        "sensitivity": ("Measuring", ("k", "tokens")),
    }
    said = [time.monotonic()]
    tasks: dict[str, Any] = {}
    started: dict[str, tuple[float, int]] = {}
    latest: dict[str, tuple[float, int]] = {}

    def on_progress(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            label, unit = labels[phase]
            tasks[phase] = bar.add_task(label, total=total, completed=done, unit=unit)
            started[phase] = (time.monotonic(), done)
        latest[phase] = (time.monotonic(), done)
        if not console.is_terminal and latest[phase][0] - said[0] > _SAY_EVERY:
            what, (prefix, amount) = labels[phase]
            scale = {"M": 1e6, "k": 1e3}[prefix]
            said[0] = latest[phase][0]
            print(f"seedlm: {what}: {done / scale:.1f} / {total / scale:.1f} {prefix} {amount}", file=sys.stderr, flush=True)
        bar.update(tasks[phase], completed=done)

    def rate() -> float | None:
        """Weights per second of this run's search; None if nothing was left to search."""
        if "compress" not in started:
            return None
        seconds, weights = (end - begin for end, begin in zip(latest["compress"], started["compress"], strict=True))
        return weights / seconds if weights and seconds > 0 else None

    with bar if console.is_terminal else nullcontext():
        yield on_progress, rate
