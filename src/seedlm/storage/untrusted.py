"""What comes from outside, before anybody knows what it is: regular files of a bounded size, and JSON that means one thing.

Every reader of this package opens files through here. A device, a FIFO or a socket is not opened at all, since reading one may
never end; a link is followed only to a place inside the model's folder, or to the blobs of the same repository in the Hub's
cache. Work and memory are bounded by the size of the file, never by a number that stands in it.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Final, NoReturn

from seedlm.errors import SeedLMError

MAX_JSON_BYTES: Final = 100_000_000
"""Longest header (the limit of the safetensors library itself), index or config that is read at all."""
_COUNTS: Final = (
    (re.compile(r"(\w+_)?(layers?|blocks|stages)|depths?"), 1024),
    (re.compile(r"(n|num|number)_(\w+_)?(labels|classes|codebooks|experts|heads|groups)"), 1 << 20),
)
"""Settings of a config.json that a model's class counts up to, by their names, and how far: known models have 126 layers."""
MAX_TEXT_BYTES: Final = 1 << 30
"""Longest text to be predicted, and longest file of questions once it is unpacked."""

_ADDED: Final = 8
"""Tokens that a tokenizer may add to a text: one or two are known."""


@contextmanager
def opened(path: Path, error: type[SeedLMError]) -> Iterator[FileIO]:
    """A regular file, unbuffered, for reading. Raises `error` for anything else, and for what goes wrong while it is open."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise error(f"{path}: is not a regular file")
        # Should it have become a FIFO meanwhile, opening does not wait, and the second look finds it.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        raise error(f"{path}: cannot be read ({getattr(reason, 'strerror', None) or reason})") from None
    try:
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise error(f"{path}: is not a regular file")
            yield file
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason})") from None


def read_bytes(path: Path, limit: int, error: type[SeedLMError], what: str = "bytes") -> bytes:
    """All of a regular file. Raises `error` if it has more than `limit` bytes."""
    with opened(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}: {size} bytes of {what}, at most {limit} are read")
        data = bytearray()
        while piece := file.read(size + 1 - len(data)):
            data += piece
            if len(data) > size:
                raise error(f"{path}: grew while it was read")
        return bytes(data)


def read_text(path: str | Path, error: type[SeedLMError]) -> str:
    """All of a regular UTF-8 file, for people's own texts. Raises `error`, also for more than 1 GiB."""
    try:
        return read_bytes(Path(path), MAX_TEXT_BYTES, error, "text").decode()
    except UnicodeDecodeError as reason:
        raise error(f"{path}: is not UTF-8 text (byte {reason.start})") from None


def check_text(text: str, tokens: int, error: type[SeedLMError], path: str | Path, remedy: str = "take a longer text") -> None:
    """Raise `error` for a text that cannot have so many tokens: one is a byte at least, but for some that are added."""
    if (size := len(text.encode())) + _ADDED < tokens:
        raise error(f"{path}: the text has {size} bytes, and so fewer tokens than the {tokens} that are needed: {remedy}")


def file_digest(path: Path, error: type[SeedLMError]) -> str:
    """The SHA-256 of a whole file. Raises `error` for one that cannot be read."""
    with opened(path, error) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: bytes | str, where: str, error: type[SeedLMError], *, infinite: bool = False) -> Any:
    """JSON with nothing ambiguous in it.

    infinite   let ``Infinity`` and ``NaN`` pass, which Python writes and JSON does not have: configurations hold them
    Raises `error` for what is not UTF-8 JSON, for a key that stands twice, and for half of a surrogate pair in a text.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{where}: the key {twice!r:.80} stands twice")
        return result

    def no_constants(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        text = text if isinstance(text, str) else text.decode()
        data = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=None if infinite else no_constants)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where}: not valid JSON (a text holds half of a surrogate pair)") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON ({reason})") from None
    return data


def read_json(path: Path, error: type[SeedLMError], *, infinite: bool = False) -> dict[str, Any]:
    """A JSON object from a file of bounded size that lies where it seems to lie."""
    check_inside(path, path.parent, error)
    data = parse_json(read_bytes(path, MAX_JSON_BYTES, error, "JSON"), str(path), error, infinite=infinite)
    if not isinstance(data, dict):
        raise error(f"{path}: must be a JSON object, got {type(data).__name__}")
    return data


def read_config(folder: Path, error: type[SeedLMError]) -> dict[str, Any]:
    """A model folder's config.json. Raises `error` for one that transformers could not take, or that could not be written."""
    path = folder / "config.json"
    config = read_json(path, error, infinite=True)
    for key, kind, what in (
        ("model_type", str, "a text"),
        ("architectures", list, "a list of names"),
        ("fusion_config", dict, "an object"),
    ):
        value = config.get(key)
        if value is not None and (not isinstance(value, kind) or not all(isinstance(item, str) for item in value)):
            raise error(f"{path}: {key} must be {what}, got {value!r:.80}")
    _check_counts(config, path, error)
    return config


def _check_counts(config: dict[str, Any], path: Path, error: type[SeedLMError]) -> None:
    """Raise `error` for more layers, or more of anything, than models have: transformers would count up to there."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, item) for item in value)
        elif type(value) is int:
            most = next((most for pattern, most in _COUNTS if pattern.fullmatch(key)), None)
            if most is not None and value > most:
                raise error(f"{path}: {key:.80} must be at most {most:,}, got {f'{value:,}':.40}")


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, is in the folder, or among the Hub cache's blobs if the folder is a snapshot there."""
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs")


def check_inside(path: Path, folder: Path, error: type[SeedLMError]) -> None:
    """Raise `error` if a link at `path` leads out of the folder, or nowhere."""
    if not stays_inside(path, folder):
        target = os.readlink(path) if path.is_symlink() else path
        raise error(f"{path}: links to {target}, outside of the folder")


def printable(text: str) -> str:
    """A text on one line, whatever is not printable as its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
