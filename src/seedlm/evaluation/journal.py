"""The files of a measurement: written whole or not at all, and until then a journal of what is done.

``OUT.partial`` holds the plan as a line of JSON, then the finished windows' records, fixed in size, as bytes, and after all of
them a line of JSON for each finished zero-shot task. A run with an equal plan goes on after the last whole batch or task.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seedlm.compress.workfolder import differences, held, try_lock
from seedlm.errors import OutputError


class Journal:
    """The windows' records and the tasks' answers so far, in memory and, if there is an output file, in ``OUT.partial``."""

    def __init__(self, path: Path | None, file: BinaryIO | None) -> None:
        self._path, self._file = path, file
        self.records: list[np.ndarray] = []
        self.tasks: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def claim(
        cls, out: Path | None, plan: Mapping[str, Any], window: np.dtype, windows: int, batch: int
    ) -> Iterator["Journal"]:
        """The journal of a plan's run, ours alone: a new one, or the one to go on with.

        window    dtype of one window's record
        windows   how many there will be
        batch     windows in a batch: a run goes on at the start of one, since sums in a GPU depend on the batch
        Raises OutputError if another run holds it, or if it is of another plan.
        """
        if out is None:
            yield cls(None, None)
            return
        path = out.with_name(out.name + ".partial")
        try:
            with open(path, "a+b") as file:
                if not try_lock(file):
                    raise OutputError(held(path))
                journal = cls(path, file)
                journal._read(plan, window, windows, batch)
                try:
                    yield journal
                finally:
                    if not journal.records:  # nothing begun: leave no trace
                        path.unlink()
        except OSError as reason:
            raise OutputError(f"{reason.filename or path}: {reason.strerror or reason}") from reason

    def _read(self, plan: Mapping[str, Any], window: np.dtype, windows: int, batch: int) -> None:
        assert self._file is not None
        self._file.seek(0)
        head, newline, body = self._file.read().partition(b"\n")
        if not newline:  # new, or stopped before the plan was whole
            self._file.truncate(0)
            self._append(json.dumps(plan).encode() + b"\n")
            return
        try:
            old = json.loads(head)
        except ValueError:
            raise OutputError(f"{self._path}: is not from a run, or damaged; move it away") from None
        found = list(differences(old, plan))
        if found:
            raise OutputError(
                f"{self._path}: holds an unfinished run that differs: {'; '.join(found[:3])}. Repeat its command to go on, or "
                "delete the file to start over"
            )
        whole = min(len(body) // window.itemsize, windows)
        whole -= whole % batch if whole < windows else 0
        body, rest = body[: whole * window.itemsize], body[whole * window.itemsize :]
        lines = rest[: rest.rfind(b"\n") + 1] if whole == windows else b""
        self._file.truncate(len(head) + 1 + len(body) + len(lines))
        if whole:
            assert window.subdtype is not None
            base, shape = window.subdtype
            self.records.append(np.frombuffer(body, base).reshape(whole, *shape))
        for line in lines.splitlines():
            self.tasks |= json.loads(line)

    def add(self, records: np.ndarray) -> None:
        """Take over a batch; on return it has reached the disk."""
        self.records.append(records)
        if self._file is not None:
            self._append(records.tobytes())

    def add_task(self, task: str, answers: Any) -> None:
        """Take over a task's answers, which JSON can hold, after all windows."""
        self.tasks[task] = answers
        if self._file is not None:
            self._append(json.dumps({task: answers}).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink()
