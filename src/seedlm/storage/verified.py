"""Which weight files were held against their digests already and have not changed since: a note for each, in the user's cache.

SHA-256 takes half as long as loading a file that is in memory already, and little beside reading one from a disk
(docs/integrity.md). So a file is verified when it is new, and again when anything about it has changed: the system notes each
change in its inode, and nobody can set that time back. A disk that loses bits without a write is found by `inspect --check`,
which takes nobody's word.

A cache that cannot be read or written means that files are verified each time.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seedlm" / "verified"


def state(path: Path) -> list[int]:
    """What changes whenever a file does: device, inode, size, times of the last write and change in nanoseconds."""
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def is_known(path: Path) -> bool:
    """Whether this very file, unchanged, was verified before."""
    try:
        return bool(json.loads(_note(path).read_bytes()) == state(path))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody has a home
        return False


def remember(path: Path, before: list[int]) -> None:
    """Note that a file was verified; `before` is its state when that began, without which nothing is noted."""
    with contextlib.suppress(OSError, RuntimeError):
        if state(path) == before:
            note = _note(path)
            note.parent.mkdir(parents=True, exist_ok=True)
            new = note.with_name(f"{note.name}.{os.getpid()}")
            new.write_text(json.dumps(before))
            os.replace(new, note)


def _note(path: Path) -> Path:
    return _folder() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
