"""Safetensors files, read and laid out by their bytes: the one container that models come in and go out as.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes with no gap. The reader here exists
because a file is hostile until checked (every size is arithmetic on the header before anything is allocated, and every way
of being wrong has its message) and because rows are read one range at a time. The writer side needs no more than `layout`:
sizes are known before the first weight is encoded, so each tensor has its place in the file from the start.

Only what gives out tensors imports torch, inside: headers alone are read in no time.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from seedlm.errors import SeedLMError
from seedlm.storage.untrusted import MAX_JSON_BYTES, check_inside, opened, parse_json, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"

DTYPE_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Element types of the container, by its own names."""

TORCH_NAMES: Final[Mapping[str, str]] = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"U16": "uint16", "U32": "uint32", "U64": "uint64"},
    **{"F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"},
    **{"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64"},
}
"""Their names in torch."""

_CHUNK_BYTES: Final = 1 << 24
_HASH_BYTES: Final = 1 << 20
_CUT_SHORT: Final = "; was its download cut short?"
CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII | re.DOTALL)
_NOT_PLAIN: Final = re.compile(r"[\\/:\x00-\x1f]")
"""CONTROL, in a name: what would end a line or command a terminal: no module of a model has it in its name."""


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, before any of it is read: dtype by its safetensors name, shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype} {[*self.shape]}"


@dataclass(frozen=True)
class Entry:
    """A tensor and where its bytes start in its file."""

    info: TensorInfo
    path: Path
    offset: int


@dataclass(frozen=True)
class TensorFiles:
    """All tensors of a model folder, checked against the files' sizes and ready to be read a row range at a time.

    entries    tensor name -> where it is, in file order
    metadata   file -> its ``__metadata__`` strings
    error      the class of every error raised: whose fault a bad folder is depends on who reads it
    """

    folder: Path
    error: type[SeedLMError]
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[Path, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, error: type[SeedLMError]) -> "TensorFiles":
        """Open ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

        Raises `error` unless every file is whole and index and shards list exactly the same tensors.
        """
        files = cls(folder, error)
        single, index = folder / SINGLE_NAME, folder / INDEX_NAME
        if os.path.lexists(single) and os.path.lexists(index):
            raise error(f"{folder}: has both {SINGLE_NAME} and {INDEX_NAME}; which one is the model cannot be told, remove one")
        if os.path.lexists(single):
            files._add(_inside(folder, SINGLE_NAME, error))
            return files
        if not os.path.lexists(index):
            raise error(f"{folder}: has no {SINGLE_NAME} and no {INDEX_NAME}")
        listing = read_json(index, error)
        weight_map = listing.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise error(f"{index}: weight_map must map tensor names to file names")
        if not weight_map:
            raise error(f"{index}: weight_map lists no tensor")
        if not isinstance(listing.get("metadata", {}), dict):
            raise error(f"{index}: metadata must be an object")
        _check_numbers(set(weight_map.values()), index, error)
        for name in sorted(set(weight_map.values())):
            files._add(_inside(folder, name, error))
        for tensor, name in weight_map.items():
            if tensor not in files.entries or files.entries[tensor].path.name != name:
                raise error(f"{index}: places {tensor!r} in {name}, which does not hold it")
        for tensor, entry in files.entries.items():
            if tensor not in weight_map:
                raise error(f"{entry.path}: holds {tensor!r}, which {index.name} does not list")
        return files

    @classmethod
    def of(cls, paths: Iterable[Path], error: type[SeedLMError]) -> "TensorFiles":
        """Open some files of one folder that no index of ours lists, such as those of a variant."""
        paths = list(paths)
        files = cls(paths[0].parent, error)
        for path in paths:
            files._add(_inside(files.folder, path.name if path.parent == files.folder else str(path), error))
        return files

    def _add(self, path: Path) -> None:
        entries, self.metadata[path] = read_header(path, self.error)
        for name, entry in entries.items():
            if name in self.entries:
                raise self.error(f"{path}: holds {name!r}, which {self.entries[name].path.name} holds too")
            self.entries[name] = entry

    @property
    def nbytes(self) -> int:
        """Bytes of all files on disk, headers included."""
        return sum(path.stat().st_size for path in self.metadata)

    def read(self, name: str, start: int = 0, stop: int | None = None, into: "Tensor | None" = None) -> "Tensor":
        """Rows start .. stop of a tensor (its first dimension; all of it by default), in its own dtype.

        into   uint8 [n], n no less than their bytes, where they are put: memory that is new costs more than the reading
        """
        import torch

        info = self.entries[name].info
        begin, count, shape = 0, info.nbytes, info.shape
        if start or stop is not None:
            rows = range(shape[0])[start:stop]
            row_bytes = info.nbytes // shape[0] if shape[0] else 0
            begin, count, shape = rows.start * row_bytes, len(rows) * row_bytes, (len(rows), *shape[1:])
        data = torch.empty(count, dtype=torch.uint8) if into is None else into[:count]
        self._fill(name, begin, data.numpy().data)
        return data.view(torch_dtype(info.dtype)).view(shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, in pieces of at most 16 MiB, each gone when the next is asked for."""
        total = self.entries[name].info.nbytes
        into = memoryview(bytearray(min(_CHUNK_BYTES, total)))
        for start in range(0, total, _CHUNK_BYTES):
            piece = into[: total - start]
            self._fill(name, start, piece)
            yield piece

    def _fill(self, name: str, start: int, into: memoryview) -> None:
        """Put a tensor's bytes from `start` on into some memory."""
        entry = self.entries[name]
        with opened(entry.path, self.error) as file:
            file.seek(entry.offset + start)
            done = 0
            while done < len(into):
                got = file.readinto(into[done:])
                if not got:
                    raise self.error(f"{entry.path}: ends inside {name!r}; it was cut short while being read")
                done += got


def torch_dtype(name: str) -> "torch.dtype":
    """What an element type of the container is in torch."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def read_header(path: Path, error: type[SeedLMError]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and metadata of one safetensors file, in the order of their bytes.

    Raises `error` for a file that is truncated, overlong, or whose header contradicts itself.
    """
    with opened(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise error(f"{path}: truncated, {size} bytes cannot hold a safetensors header")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON_BYTES:
            raise error(f"{path}: not a safetensors file, it claims a header of {length} bytes, at most {MAX_JSON_BYTES}")
        if length > size - 8:
            raise error(f"{path}: truncated, a header of {length} bytes does not fit a file of {size}{_CUT_SHORT}")
        text = file.read(length)
    header = parse_json(text, f"{path}, header", error)
    if not isinstance(header, dict):
        raise error(f"{path}: the header must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{path}: __metadata__ must map strings to strings")

    spans = sorted(((*_span(name, item, path, error), name) for name, item in header.items()), key=lambda s: (s[0], s[1]))
    entries, position = {}, 0
    for begin, end, info, name in spans:
        if begin != position:
            raise error(f"{path}: {name!r} starts at byte {begin}, the tensors before it end at {position}")
        entries[name] = Entry(info, path, 8 + length + begin)
        position = end
    if position != size - 8 - length:
        kind, why = ("truncated", _CUT_SHORT) if position > size - 8 - length else ("overlong", "")
        raise error(f"{path}: {kind}, its header describes {8 + length + position} bytes, the file has {size}{why}")
    return entries, metadata


def _span(name: str, item: object, path: Path, error: type[SeedLMError]) -> tuple[int, int, TensorInfo]:
    """The byte range and type of one header entry, checked against each other."""
    where = f"{path}: tensor {name!r:.200}"
    if CONTROL.search(name):
        raise error(f"{where} has a control character in its name")
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise error(f"{where} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or len(shape) > 64:
        raise error(f"{where} has the impossible shape {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise error(f"{where} has the impossible data_offsets {offsets!r:.80}")
    info = TensorInfo(dtype, tuple(shape))
    if offsets[1] - offsets[0] != info.nbytes:
        raise error(f"{where} is {info}, which takes {info.nbytes} bytes, its data_offsets span {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1], info


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _inside(folder: Path, name: str, error: type[SeedLMError]) -> Path:
    """The file of that name in the folder, refused if the name or a link leads elsewhere."""
    plain = name == os.path.basename(name) and not _NOT_PLAIN.search(name)
    if not plain or not name.endswith(".safetensors"):
        raise error(f"{folder}: {name!r} is not the plain name of a .safetensors file; paths are refused")
    path = folder / name
    check_inside(path, folder, error)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise error(f"{path}: is missing or not a file")
    return path


def digest(path: Path, offset: int, nbytes: int, heading: bytes, error: type[SeedLMError]) -> str:
    """SHA-256, in hexadecimal digits, of a heading and of the bytes from `offset` on in a file, as many as there are."""
    found, into = hashlib.sha256(heading), memoryview(bytearray(min(_HASH_BYTES, max(1, nbytes))))
    with opened(path, error) as file:
        file.seek(offset)
        while nbytes and (got := file.readinto(into[: min(nbytes, len(into))])):
            found.update(into[:got])
            nbytes -= got
    return found.hexdigest()


def _check_numbers(names: Set[str], index: Path, error: type[SeedLMError]) -> None:
    """Raise `error` if files are numbered, as in ``model-00001-of-00003.safetensors``, and some number is not listed."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), found in numbers.items():
        if len(found) != count or min(found) != 1 or max(found) != count:
            raise error(f"{index}: lists {len(found)} of the {count} files that {name} is said to have by their names")


@dataclass(frozen=True)
class Layout:
    """A file to be written: its header's bytes, and of each tensor the dtype and shape, and its offset in the file."""

    header: bytes
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    nbytes: int


def layout(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Layout:
    """Place tensors in a file: widest elements first, so that each is aligned to its own size, else in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, starts = 0, {}
    for name in sorted(tensors, key=lambda n: -DTYPE_BITS[tensors[n].dtype]):
        info = tensors[name]
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        starts[name] = position
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return Layout(
        header=len(text).to_bytes(8, "little") + text,
        tensors=dict(tensors),
        offsets={name: start + offset for name, offset in starts.items()},
        nbytes=start + position,
    )
