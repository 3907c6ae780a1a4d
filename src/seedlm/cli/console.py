"""What the commands share: a progress bar on stderr, numbers as people read them, and other people's texts made harmless.

Names of modules, tasks and files come from models, and a terminal obeys what is printed: a name may hold a command to it, or a
line end that forges a row of a table. So whatever is not printable is shown as its escape.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from seedlm.progress import Bars, Lines, Progress, say
from seedlm.storage.untrusted import printable

NOTHING_KEPT = "nothing is kept yet: the same command begins again, a text that the model was writing too"
"""Of a run that was stopped before its text was whole."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which asks for the same as Ctrl-C."""


def on_sigterm(number: int, frame: object) -> NoReturn:
    """A handler that lets a command end as after Ctrl-C."""
    raise Terminated


def stopped(error: KeyboardInterrupt, kept: str = "") -> NoReturn:
    """Say that a command was stopped, and what is kept; exit as a shell expects it."""
    note(f"stopped{kept}")
    sys.exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT))


def kept(out: Path, what: str, writing: str = "") -> str:
    """What a command that was stopped leaves behind for the same command to go on with.

    what      OUT.partial holds
    writing   said where nothing is kept: what was under way and begins again
    """
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        return f"; run the same command again to go on ({partial} {what})"
    return f"; {writing}" if writing else ""


def show(line: str) -> None:
    """Print a line that may hold texts of others."""
    print(printable(line))


def note(text: str) -> None:
    """Print a line that is no result, on stderr."""
    say(printable(f"seedlm: {text}"))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@contextmanager
def show_progress() -> Iterator[tuple[Progress, Callable[[], float | None]]]:
    """Progress on stderr, bars on a terminal and else lines (`Lines`): its callback, and the rate of encoding."""
    started: dict[str, tuple[float, int]] = {}
    latest: dict[str, tuple[float, int]] = {}

    def rate() -> float | None:
        """Weights per second of this run's search; None if nothing was left to search."""
        if "compress" not in started:
            return None
        seconds, weights = (end - begin for end, begin in zip(latest["compress"], started["compress"], strict=True))
        return weights / seconds if weights and seconds > 0 else None

    with Bars() if Bars.are_seen() else Lines() as show_it:

        def on_progress(phase: str, done: int, total: int) -> None:
            latest[phase] = (time.monotonic(), done)
            started.setdefault(phase, latest[phase])
            show_it(phase, done, total)

        yield on_progress, rate
