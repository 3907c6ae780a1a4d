"""The header of a GGUF file, read before gguf-py or transformers see the file: what it declares, held against what is there.

gguf-py believes counts and offsets: a length of 2^32 keeps it busy for hours, offsets may overlap or wrap, and a model may
declare more layers than it has, which then start from random values. Here every length is held against the bytes that are left
before anything is walked, tensors must lie apart and inside the file, and those of a decoder must be all there, in the shapes
that the metadata gives.

    GGUF  version  tensors  keys | key: text, type, value | tensor: text, dimensions, type, offset | padding | data

A text is a 64-bit length and UTF-8. Numbers are little-endian.
"""

import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

from seedlm.errors import SourceError, extra
from seedlm.storage.untrusted import opened

_PART: Final = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MAX_DIMENSIONS: Final = 4
_MAX_TEXT: Final = 1 << 24
_MAX_SIZE: Final = 1 << 40
_MAX_KEYS, _MAX_LIST = 1024, 4096
"""Keys of a file, and entries of a list: what parses them after this takes 20 to 200 us for each."""
_MAX_TOKENS, _MAX_MERGES = 1 << 21, 4
"""Entries of a tokenizer's lists, and merges for each token: Llama 3 has 2.2."""
_LAYER: Final = re.compile(r"blk\.(\d{1,9})\.(.+)", re.ASCII)
_PLAIN: Final = frozenset({"llama", "qwen2", "qwen3"})
"""Architectures whose layers are `_decoder`."""
ROPE_FREQS: Final = "rope_freqs.weight"
_MERGES: Final = "tokenizer.ggml.merges"
_LISTS: Final = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


def gguf_sizes(path: Path) -> Mapping[Any, tuple[int, int]]:
    """Of the blocks of each type, as `read_gguf_header` takes them. Raises SourceError without the package that knows them."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise SourceError(f"{path}: reading a GGUF file needs the gguf package: {extra('gguf')}") from None
    return GGML_QUANT_SIZES


def gguf_parts(path: Path, count: int | None = None) -> list[Path]:
    """The files of a model of which `path` is one: ``NAME-00001-of-00003.gguf`` and so on, or `path` alone.

    count   how many there must be, if that is known. Raises SourceError for one that is not there.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        if count is not None and count > 1:
            raise SourceError(
                f"{path}: is one of {count} files of a model, which are known by names such as x-00001-of-00003.gguf"
            )
        return [path]
    parts = [path.with_name(f"{match[1]}-{number + 1:05d}-of-{match[2]}.gguf") for number in range(int(match[2]))]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise SourceError(f"{path}: is one of {len(parts)} files of a model, of which {', '.join(missing[:4])} are not there")
    if count is not None and count != len(parts):
        raise SourceError(f"{path}: is one of {count} files of a model by its metadata, of {len(parts)} by its name")
    return parts


@dataclass(frozen=True)
class GGUFTensor:
    """Rows first, as torch has shapes; the number of its type; where its bytes are in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a file declares: numbers and texts by key, the lengths of its lists, its tensors, and where their bytes begin."""

    path: Path
    fields: dict[str, Any]
    lengths: dict[str, int]
    tensors: dict[str, GGUFTensor]
    start: int

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer of the metadata. Raises SourceError for anything else, and if there is none and no default."""
        value = self.fields.get(key, default)
        if value is None and key not in self.lengths:
            raise SourceError(f"{self.path}: has no {key} in its metadata")
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            raise SourceError(
                f"{self.path}: {key} must be a positive integer, got {value if value is not None else 'a list'!r:.40}"
            )
        return value


class _Reader:
    """Goes through the bytes of a header; whatever would lead out of the file is a SourceError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self.position = path, data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise SourceError(f"{self._path}: truncated or damaged, {what} takes {count} bytes, {self.left} are left")
        self.position += count

    def number(self, kind: str, what: str) -> Any:
        start = self.position
        self.skip(struct.calcsize("<" + kind), what)
        return struct.unpack_from("<" + kind, self._data, start)[0]

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        start = self.position
        if length > _MAX_TEXT:
            raise SourceError(f"{self._path}: {what} has {length} bytes, at most {_MAX_TEXT} are read")
        self.skip(length, what)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise SourceError(f"{self._path}: {what} is not UTF-8") from None

    def list(self, what: str) -> int:
        """Pass over a list; returns its length."""
        kind, count = self.number("I", what), self.number("Q", what)
        most = _MAX_TOKENS if what.startswith("tokenizer.") else _MAX_LIST
        if count > most:
            raise SourceError(f"{self._path}: {what:.80} has {count} entries, at most {most} are read")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]), f"{what} with {count} entries")
        elif kind == _TEXT:
            if 8 * count > self.left:
                raise SourceError(f"{self._path}: truncated or damaged, {what} cannot have {count} texts in {self.left} bytes")
            for _ in range(count):
                self.skip(self.number("Q", what), what)
        else:
            raise SourceError(f"{self._path}: {what} is a list of an unknown type {kind}")
        return int(count)


def read_gguf_header(path: Path, sizes: Mapping[Any, tuple[int, int]]) -> GGUFHeader:
    """The header of a GGUF file. Raises SourceError unless it is whole and its tensors lie apart, inside the file.

    sizes   of the known types: number -> (weights of a block, bytes of a block)
    """
    with opened(path, SourceError) as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path}: not a readable GGUF file (it does not begin with GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, _Reader(path, data), sizes, len(data))


def _read(path: Path, reader: _Reader, sizes: Mapping[Any, tuple[int, int]], end: int) -> GGUFHeader:
    reader.skip(4, "the magic number")
    version = reader.number("I", "the version")
    if version not in (2, 3):
        kind = "big-endian files are not read" if version in (2 << 24, 3 << 24) else f"version {version}, 2 and 3 are read"
        raise SourceError(f"{path}: not a readable GGUF file ({kind})")
    count, keys = reader.number("Q", "the header"), reader.number("Q", "the header")
    if keys > _MAX_KEYS:
        raise SourceError(f"{path}: has {keys} keys, at most {_MAX_KEYS} are read")
    fields: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(keys):
        key = reader.text("the name of a key")
        kind = reader.number("I", key)
        if key in fields or key in lengths:
            raise SourceError(f"{path}: the key {key!r:.80} stands twice")
        if kind == _ARRAY:
            lengths[key] = reader.list(key)
        elif kind == _TEXT:
            fields[key] = reader.text(key)
        elif kind in _SCALARS:
            fields[key] = reader.number(_SCALARS[kind], key)
        else:
            raise SourceError(f"{path}: {key!r:.80} is of an unknown type {kind}")
    declared: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text("the name of a tensor")
        if name in declared:
            raise SourceError(f"{path}: holds {name!r:.80} twice")
        dimensions = reader.number("I", name)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise SourceError(f"{path}: {name!r:.80} has {dimensions} dimensions, 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(reader.number("Q", name) for _ in range(dimensions))[::-1]
        declared[name] = (shape, reader.number("I", name), reader.number("Q", name))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise SourceError(f"{path}: general.alignment must be a power of two, got {alignment!r:.40}")
    start = -(-reader.position // alignment) * alignment
    tensors = {name: _place(path, name, *found, sizes, start, alignment) for name, found in declared.items()}
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda pair: pair[1].start):
        if tensor.start < position:
            raise SourceError(f"{path}: {name!r} lies over the tensor before it")
        position = tensor.start + tensor.nbytes
        if position > end:
            raise SourceError(
                f"{path}: truncated, {name!r} ends at byte {position}, the file has {end}; was its download cut short?"
            )
    return GGUFHeader(path, fields, lengths, tensors, start)


def _place(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, sizes: Mapping[Any, Any], start: int, alignment: int
) -> GGUFTensor:
    if kind not in sizes:
        raise SourceError(f"{path}: {name!r:.80} is of an unknown type {kind}")
    weights, nbytes = sizes[kind]
    if any(not 0 < size < _MAX_SIZE for size in shape) or shape[-1] % weights:
        raise SourceError(f"{path}: {name!r:.80} has the impossible shape {[*shape]}")
    if offset % alignment:
        raise SourceError(f"{path}: {name!r:.80} starts at {offset}, which is no multiple of {alignment}")
    return GGUFTensor(shape, kind, start + offset, prod(shape) // weights * nbytes)


def check_decoder(files: Sequence[GGUFHeader]) -> None:
    """Raise SourceError unless a decoder is all there: layers with the same weights, in the shapes that the metadata gives.

    files   the headers of its files, that with the metadata first
    """
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if len(tensors) < sum(len(file.tensors) for file in files):
        raise SourceError(f"{files[0].path}: a tensor is in two of its files")
    header = replace(files[0], tensors=tensors)
    architecture = header.fields.get("general.architecture")

    def size(key: str, default: int | None = None) -> int:
        return header.size(f"{architecture}.{key}", default)

    width, layers = size("embedding_length"), size("block_count")
    _check_layers(header, layers)
    _check_vocabulary(header, f"{architecture}", width)
    heads = size("attention.head_count")
    shared = size("attention.head_count_kv", heads)
    if heads % shared:
        raise SourceError(f"{header.path}: {heads} attention heads cannot share {shared} of keys and values")
    if f"{architecture}.attention.key_length" not in header.fields and width % heads:
        raise SourceError(f"{header.path}: a width of {width} cannot be divided among {heads} attention heads")
    head = size("attention.key_length", width // heads)
    values = size("attention.value_length", head)
    if head % 2:
        raise SourceError(f"{header.path}: rotary embedding needs heads of even size, got {head}")
    _check_shape(header, ROPE_FREQS, (size("rope.dimension_count", head) // 2,), optional=True)
    if architecture in _PLAIN:
        shapes = _decoder(width, size("feed_forward_length"), heads * head, shared * head, shared * values, heads * values)
        for layer in range(layers):
            for part, shape in shapes.items():
                _check_shape(header, f"blk.{layer}.{part}.weight", shape)
                _check_shape(header, f"blk.{layer}.{part}.bias", shape[:1], optional=True)
            for part in ("attn_q_norm", "attn_k_norm"):
                _check_shape(header, f"blk.{layer}.{part}.weight", (head,), optional=True)


def _decoder(width: int, inner: int, queries: int, keys: int, values: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """The weights of a layer of the architectures in `_PLAIN`, by llama.cpp's names."""
    return {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (values, width),
        "attn_output": (width, outputs),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }


def _check_layers(header: GGUFHeader, count: int) -> None:
    """All layers that are declared and no other, each with what the first one has."""
    parts: dict[str, set[str]] = {}
    for name in header.tensors:
        if match := _LAYER.fullmatch(name):
            parts.setdefault(match[1], set()).add(match[2])
    if count != len(parts):
        raise SourceError(f"{header.path}: declares {count} layers, and has tensors of {len(parts)}")
    for layer in map(str, range(count)):
        if layer not in parts:
            raise SourceError(f"{header.path}: declares {count} layers, and has no tensor of number {layer}")
        if other := sorted(parts[layer] ^ parts["0"]):
            raise SourceError(f"{header.path}: layers 0 and {layer} do not have the same tensors: {other[0]}")


def _check_vocabulary(header: GGUFHeader, architecture: str, width: int) -> None:
    tokens = header.lengths.get("tokenizer.ggml.tokens")
    embedding = header.tensors.get("token_embd.weight")
    rows = header.size(f"{architecture}.vocab_size", tokens or (embedding.shape[0] if embedding else None))
    _check_shape(header, "token_embd.weight", (rows, width))
    _check_shape(header, "output.weight", (rows, width), optional=True)
    _check_shape(header, "output_norm.weight", (width,))
    if (tokens or 0) > rows:
        raise SourceError(f"{header.path}: has {tokens} tokens, for a vocabulary of {rows}")
    for key, count in header.lengths.items():
        most = max(_MAX_LIST, (tokens or 0) * (_MAX_MERGES if key == _MERGES else 1))
        if key.startswith("tokenizer.") and (count > most or (key in _LISTS and tokens not in (None, count))):
            raise SourceError(f"{header.path}: {key} has {count} entries, for {tokens or 0} tokens")


def _check_shape(header: GGUFHeader, name: str, shape: tuple[int, ...], optional: bool = False) -> None:
    found = header.tensors.get(name)
    if found is None and not optional:
        raise SourceError(f"{header.path}: lacks {name}, which its metadata declares")
    if found is not None and found.shape != shape:
        raise SourceError(f"{header.path}: {name} must be {[*shape]} by its metadata, got {[*found.shape]}")
