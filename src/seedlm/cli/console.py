"""What the commands share: a progress bar on stderr, and numbers as people read them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@contextmanager
def show_progress() -> Iterator[tuple[Any, Any]]:
    """A progress bar on stderr, only if that is a terminal: the callback for it, and the rate of the search so far."""
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
        "compress": ("Searching seeds", ("M", "weights")),
        "evaluate": ("Scoring", ("k", "tokens")),
        "sensitivity": ("Measuring", ("k", "tokens")),
    }
    tasks: dict[str, Any] = {}
    started: dict[str, tuple[float, int]] = {}
    latest: dict[str, tuple[float, int]] = {}

    def on_progress(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            label, unit = labels[phase]
            tasks[phase] = bar.add_task(label, total=total, completed=done, unit=unit)
            started[phase] = (time.monotonic(), done)
        latest[phase] = (time.monotonic(), done)
        bar.update(tasks[phase], completed=done)

    def rate() -> float | None:
        """Weights per second of this run's search; None if nothing was left to search."""
        if "compress" not in started:
            return None
        seconds, weights = (end - begin for end, begin in zip(latest["compress"], started["compress"], strict=True))
        return weights / seconds if weights and seconds > 0 else None

    with bar:
        yield on_progress, rate
