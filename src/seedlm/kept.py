"""Kernels that were compiled once, in files for later processes.

They are run as they are found, so a file is believed only if it is a plain one that belongs to this user (or to root), nobody
else may write to it, and it ends with the digest of its name and content. Any other is as if it were not there: it is made
again. A folder that cannot be read or written means that kernels are compiled by each process.
"""

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size
_PLAINLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""A link of somebody else's may lead to a file that this user fetched; to open a pipe waits for who writes to it."""


def folder() -> Path:
    """SEEDLM_CACHE, or the user's folder for caches, /kernels. It need not exist or be writable."""
    if chosen := os.environ.get("SEEDLM_CACHE"):
        return Path(chosen).expanduser() / "kernels"
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "seedlm" / "kernels"


def read(name: str) -> bytes | None:
    """What was written under a name; None if that is not to be had."""
    try:
        with open(folder() / name, "rb", opener=lambda path, flags: os.open(path, flags | _PLAINLY)) as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            found = file.read()
    except (OSError, RuntimeError):  # RuntimeError: nobody has a home
        return None
    content = found[:-_DIGEST]
    return content if found[-_DIGEST:] == _digest(name, content) else None


def write(name: str, content: bytes) -> None:
    """Write beside the target and rename, so that no reader sees half a file. A folder that takes nothing is no error."""
    try:
        path = folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False)  # noqa: SIM115
        try:
            with part:
                part.write(content + _digest(name, content))
            os.chmod(part.name, 0o644)  # what root keeps in an image serves its users
            os.replace(part.name, path)
        except OSError:
            os.unlink(part.name)
    except (OSError, RuntimeError):
        return


def _is_ours(found: os.stat_result) -> bool:
    if not hasattr(os, "geteuid"):
        return True
    own = found.st_uid in (os.geteuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return own and stat.S_ISREG(found.st_mode)


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
