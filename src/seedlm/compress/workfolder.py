"""Where an unfinished run lives: ``OUT.partial`` beside the output, so that OUT itself exists only when it is whole.

    lock            held while a run is at work; its content is a random number by which other machines know the folder
    plan.json       everything that the result depends on but the weights; a run goes on only if its own plan is equal
    text.safetensors, statistics.safetensors, statistics.json   the text that the model was observed on, what it was found to
                    be like, and from what (`statistics`)
    journal.jsonl   one line per finished tensor, written after its bytes have reached the disk: the SHA-256 of what was read,
                    and of what was written
    side/           the small files beside the weights, copied before the first tensor so that what cannot be is known then
    finishing       there from when every tensor is done: what else lies in ``model/`` is ours
    model/          the folder that becomes OUT, by one rename at the end

Every size is known from the plan, so each file under ``model/`` has a header of the right length and its full length before the
first tensor is written, and a tensor goes straight to its place. Nothing is moved or assembled, and going on after a kill at
any moment means writing the tensors that the journal does not name, or whose bytes are not those that it names. Digests come
into the headers at the end, where zeros kept their place. ``config.json`` is written last: until then no reader takes
``model/`` for a model.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from seedlm.errors import OutputError
from seedlm.storage.safetensors import Layout, digest
from seedlm.storage.written import check_writable

_PLAN: Final = "plan.json"
_JOURNAL: Final = "journal.jsonl"
_LOCK: Final = "lock"
_FINISHING: Final = "finishing"
_SIDE: Final = "side"
_MODEL: Final = "model"
_STATISTICS: Final = ("text.safetensors", "statistics.safetensors", "statistics.json", "spool")
_UNFINISHED: Final = ("text.safetensors.part", "statistics.safetensors.part", "statistics.json.new", f"{_PLAN}.new")


def check_absent(out: Path) -> None:
    """Raise OutputError if an output exists and no unfinished run lies beside it, which may have been about to end."""
    if os.path.lexists(out) and not (out.with_name(out.name + ".partial") / _PLAN).exists():
        raise OutputError(f"{out}: exists already; choose another output, or delete it")


def check_claimable(out: Path) -> None:
    """Raise OutputError as `WorkFolder.claim` would now: for an output that exists, is being written, or has no place."""
    check_absent(out)
    partial = out.with_name(out.name + ".partial")
    check_writable(partial)
    check_unlocked(partial / _LOCK, partial)


def check_unlocked(lock: Path, partial: Path | None = None) -> None:
    """Raise OutputError if another run holds the lock of an unfinished output, the file itself if no folder is given."""
    try:
        with open(lock, "r+b") as file:
            if not try_lock(file):
                raise OutputError(held(partial or lock))
    except FileNotFoundError:
        pass
    except OSError as reason:
        raise OutputError(f"{reason.filename or lock}: {reason.strerror or reason}") from None


def held(partial: Path) -> str:
    """What whoever finds another run at work is told."""
    return f"{partial}: another run is writing this output; wait for it, or stop it"


class WorkFolder:
    """The unfinished run of one output folder, ours alone while `claim` holds it.

    resumed     whether a plan was there, which is gone on with
    abandoned   whether a run was killed here before it had one
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.model = self.path / _MODEL
        self.token = secrets.token_hex(16)
        self.resumed = False
        self.abandoned = False
        self.done: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def claim(cls, out: Path) -> Iterator["WorkFolder"]:
        """Lock the run of this output. Raises OutputError if another run holds it or if the output exists already."""
        work = cls(out)
        with work._reporting(), work._locked():
            try:
                check_absent(out)
                yield work
            finally:
                if work.path.exists() and not (work.path / _PLAN).exists():  # nothing begun: leave no trace
                    (work.path / f"{_PLAN}.new").unlink(missing_ok=True)
                    (work.path / _LOCK).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):
                        work.path.rmdir()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn every failure of the system, such as a full disk, into one line that says what is kept."""
        try:
            yield
        except OSError as reason:
            kept = (
                f"; what is done is kept in {self.path}, the same command goes on from there"
                if self.done and self.path.exists()
                else ""
            )
            raise OutputError(f"{reason.filename or self.path}: {reason.strerror or reason}{kept}") from reason

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.abandoned = (self.path / _LOCK).exists() and not (self.path / _PLAN).exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK, "ab") as file:
            if not try_lock(file):
                raise OutputError(held(self.path))
            file.truncate(0)
            file.write(self.token.encode())
            file.flush()
            yield

    def begin(self, plan: Mapping[str, Any], layouts: Mapping[str, Layout], headings: Mapping[str, bytes]) -> bool:
        """Start the run that `plan` describes, or go on with it.

        layouts    file name -> what it will hold
        headings   stored name -> what its SHA-256 begins with (`metadata.heading`)
        returns   whether the run is finished already and only its remains were left to be removed
        Raises OutputError if an unfinished run has another plan, if a file lies in it that is not ours, or if the disk has no
        room for the rest.
        """
        plan = json.loads(json.dumps(plan))
        self.resumed = (self.path / _PLAN).exists()
        if self.resumed:
            self._compare(plan)
            if self.out.exists() and not self.model.exists():
                return True
            if self.out.exists():
                raise OutputError(f"{self.out}: exists already, and {self.path} holds an unfinished run; delete one of them")
        else:
            strangers = sorted(p.name for p in self.path.iterdir() if p.name not in (_LOCK, *_STATISTICS, *_UNFINISHED))
            if strangers:
                raise OutputError(f"{self.path}: holds {strangers[0]}, which is not from a run; move it away")
            self._check_space(sum(layout.nbytes for layout in layouts.values()))
            self._write_whole(self.path / _PLAN, json.dumps(plan, indent=1).encode())
        self._read_journal()
        self.model.mkdir(exist_ok=True)
        self._refuse_strangers(layouts)
        for name, layout in layouts.items():
            path = self.model / name
            if not (os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode) and os.lstat(path).st_size == layout.nbytes):
                path.unlink(missing_ok=True)
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.write(layout.header)
                file.truncate(layout.nbytes)
                sync(file)
        self._forget_damaged(layouts, headings)
        _sync_folder(self.model)
        return False

    def _refuse_strangers(self, layouts: Mapping[str, Layout]) -> None:
        """Raise OutputError for a file that no run put there; remove those of a run that died while finishing."""
        for path in sorted(self.model.iterdir()):
            if path.name in layouts:
                continue
            if not (self.path / _FINISHING).exists():
                raise OutputError(f"{self.model}: holds {path.name!r}, which is not from this run; move it away")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _forget_damaged(self, layouts: Mapping[str, Layout], headings: Mapping[str, bytes]) -> None:
        """Take out of what is done every tensor whose bytes are not those that were written."""
        places = {name: (file, layout) for file, layout in layouts.items() for name in layout.offsets}

        def is_whole(line: dict[str, Any]) -> bool:
            written = line.get("sha256")
            if not isinstance(written, dict) or not written or not written.keys() <= places.keys():
                return False
            for name, known in written.items():
                file, layout = places[name]
                offset, nbytes = layout.offsets[name], layout.tensors[name].nbytes
                if digest(self.model / file, offset, nbytes, headings[name], OutputError) != known:
                    return False
            facts = [line.get(fact, 0.0) for fact in ("squared_error", "squared_norm")]
            return all(isinstance(fact, float) and math.isfinite(fact) for fact in facts)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            whole = list(pool.map(is_whole, self.done.values()))
        self.done = {name: line for (name, line), sound in zip(self.done.items(), whole, strict=True) if sound}

    def _compare(self, plan: Mapping[str, Any]) -> None:
        try:
            old = json.loads((self.path / _PLAN).read_bytes())
        except (ValueError, RecursionError):
            raise OutputError(f"{self.path / _PLAN}: is damaged; delete {self.path} to start over") from None
        self._refuse(list(differences(old, plan)))

    def hold_against(self, old: Any, new: Any, where: str) -> None:
        """Raise OutputError if something is otherwise than it was when the run that is to be gone on with began."""
        if (self.path / _PLAN).exists():
            self._refuse(list(differences(old, new, where)))

    def _refuse(self, found: list[str]) -> None:
        """Raise OutputError if something differs."""
        if found:
            shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
            raise OutputError(
                f"{self.path}: holds an unfinished run that differs: {shown}. Repeat its command to go on, "
                f"or delete {self.path} to start over"
            )

    def _check_space(self, need: int) -> None:
        free = shutil.disk_usage(self.path).free
        if need > free:
            raise OutputError(f"{self.out}: needs {need:,} bytes, the disk has {free:,} free")

    def _read_journal(self) -> None:
        """Take over what is finished. A last line that was cut off by a kill does not count, and is cut off the file."""
        path = self.path / _JOURNAL
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
                sync(file)
        try:
            self.done = {line["tensor"]: line for line in map(json.loads, whole.splitlines())}
            if not all(isinstance(line, dict) and isinstance(name, str) for name, line in self.done.items()):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise OutputError(f"{path}: is damaged; delete {self.path} to start over") from None

    def finish_tensor(self, name: str, **facts: Any) -> None:
        """Note that all of a tensor is on disk, with what the report wants to know of it.

        The line itself is left to the system to write: should a power cut take it, its tensor is done once more, while waiting
        for the disk here would keep the workers waiting for their next one.
        """
        line = {"tensor": name, **facts}
        with open(self.path / _JOURNAL, "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        self.done[name] = line

    def expect(self, name: str, **facts: Any) -> None:
        """Raise OutputError if a finished tensor's facts are others."""
        self._refuse([text for key in facts for text in differences(self.done[name].get(key), facts[key], f"{key} {name}")])

    def write_json(self, name: str, data: Any) -> None:
        """Put a JSON file into the model folder, whole or not at all."""
        self.write_text(name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Put a text into the model folder, whole or not at all."""
        self._write_whole(self.model / name, text.encode())

    def stage(self, copy: Callable[[Path], None]) -> None:
        """Have all small files but ours put beside the run; if that fails, a run that has just begun leaves no trace."""
        side = self.path / _SIDE
        try:
            shutil.rmtree(side, ignore_errors=True)
            side.mkdir()
            copy(side)
        except BaseException:
            if not self.resumed:
                self.remove()
            raise

    def finish(self, layouts: Mapping[str, Layout]) -> None:
        """All tensors are done: put the final headers, as long as those before, into their files, and the small files beside.

        Raises OutputError if a file lies beside them that no run put there.
        """
        self._refuse_strangers(layouts)
        with open(self.path / _FINISHING, "wb") as file:
            sync(file)
        _sync_folder(self.path)
        for name, layout in layouts.items():
            with open(self.model / name, "r+b") as file:
                file.write(layout.header)
        for path in (self.path / _SIDE).iterdir():
            os.replace(path, self.model / path.name)

    def publish(self) -> None:
        """Make the model folder the output: the one step after which it exists."""
        for path in self.model.rglob("*"):
            if path.is_file():
                with open(path, "r+b") as file:
                    sync(file)
        _sync_folder(self.model)
        os.rename(self.model, self.out)
        _sync_folder(self.out.parent)

    def remove(self) -> None:
        """Delete what a finished run leaves; the plan last, since it tells a finished run from a stranger's folder."""
        (self.path / _JOURNAL).unlink(missing_ok=True)
        (self.path / _PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _write_whole(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".new")
        with open(temporary, "wb") as file:
            file.write(data)
            sync(file)
        os.replace(temporary, path)
        _sync_folder(path.parent)


@contextmanager
def writing(path: Path, offsets: Mapping[str, int], headings: Mapping[str, bytes]) -> Iterator["Writer"]:
    """Write tensors to their places in a file that is there."""
    with open(path, "r+b", buffering=0) as file:
        yield Writer(file, offsets, headings)


class Writer:
    """Puts bytes of tensors into their places in one file, each tensor's in order, and hashes them.

    headings   stored name -> what its SHA-256 begins with (`metadata.heading`)
    """

    def __init__(self, file: Any, offsets: Mapping[str, int], headings: Mapping[str, bytes]) -> None:
        self._file, self._offsets = file, offsets
        self._hashes = {name: hashlib.sha256(heading) for name, heading in headings.items()}
        self._ends = dict.fromkeys(headings, 0)

    def write(self, name: str, start: int, data: Any) -> None:
        """Write bytes of a tensor, from its byte number `start` on, where the last ones ended."""
        assert start == self._ends[name]
        self._file.seek(self._offsets[name] + start)
        view = memoryview(data)
        self._hashes[name].update(view)
        self._ends[name] += view.nbytes
        while view:
            view = view[self._file.write(view) :]

    @property
    def digests(self) -> dict[str, str]:
        """Stored name -> SHA-256 of heading and bytes."""
        return {name: found.hexdigest() for name, found in self._hashes.items()}


def is_held(folder: Path, token: str) -> bool:
    """Whether a work folder is the one that a run elsewhere has claimed, and not another disk's under the same path."""
    try:
        return (folder / _LOCK).read_bytes() == token.encode()
    except OSError:
        return False


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Where two plans differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{where} {key}".strip())
    elif old != new:
        yield f"{where} was {_short(old)}, is now {_short(new)}"


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:36] + "..."


def sync(file: BinaryIO | Any) -> None:
    """Wait until what was written to a file, by anybody, has reached the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames and new names in a folder last through a power cut; Windows has no such call and needs none."""
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def try_lock(file: Any) -> bool:
    """Lock an open file against other processes until it is closed or the process dies."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
