"""Files that a command creates: refused before it works if they are there already, and written whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from seedlm.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


def check_free(path: Path) -> None:
    """Raise OutputError if a file or folder is there already, or no folder for it."""
    if os.path.lexists(path):
        raise OutputError(f"{path}: exists already; choose another output, or delete it")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder")
    check_writable(path.parent)


def check_writable(path: Path) -> None:
    """Raise OutputError if a folder cannot be made there, or files in it if it is there."""
    above = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not above.is_dir():
        raise OutputError(f"{above}: is not a folder, so {path} cannot be made")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{above}: nothing can be written there (permission denied, or a disk that is read-only)")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a file of safetensors whole or not at all. Raises OutputError, for a full disk too."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    try:
        save_file(dict(tensors), part, metadata=dict(metadata))
        os.replace(part, path)
    except (OSError, SafetensorError) as reason:  # of a write that failed, safetensors makes an error of its own
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({getattr(reason, 'strerror', None) or reason})") from None
