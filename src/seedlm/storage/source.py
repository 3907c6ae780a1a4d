"""Where a model is read from: a folder of safetensors, a GGUF file, or a Hub repository, all behind one interface.

A source lists its tensors before reading any, then gives out row ranges, so what is held in memory does not depend on the
size of the model or of a tensor. No model is ever built, and nothing that can run code is opened: pickles are refused.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from seedlm.errors import SourceError
from seedlm.storage.safetensors import INDEX_NAME, SINGLE_NAME, TensorFiles, TensorInfo
from seedlm.storage.untrusted import opened, read_bytes, read_config, stays_inside

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

_SIDE_SUFFIXES: Final = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".py"})
_SIDE_NAMES: Final = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\..*)?", re.IGNORECASE)
_SIDE_PATTERNS: Final = ("*", "additional_chat_templates/*.jinja")
_MAX_SIDE_BYTES: Final = 1 << 30
_PICKLE_STARTS: Final = (b"\x80", b"PK")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Source(Protocol):
    """A model to be read.

    config        its config.json
    tensors       name -> dtype and shape, in the order of the files
    nbytes        bytes of the weights' files on disk
    fingerprint   what must not change while a run over this source is going on, as JSON: headers, sizes, other files'
                  content. The weights' own content is not in it; a run checks that tensor by tensor.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    nbytes: int
    fingerprint: dict[str, Any]

    def rows(self, name: str, start: int, stop: int, into: "Tensor | None" = None) -> "Tensor":
        """Rows start .. stop of a tensor [rows, ...], in its dtype. Raises SourceError if they cannot be read.

        into   uint8 [n], memory that they may be put into if it is large enough
        """
        ...

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """A tensor's bytes, row-major and little-endian, in pieces of bounded size, each gone when the next is asked for."""
        ...

    def copy_side_files(self, folder: Path) -> None:
        """Put everything but config and weights into a folder: tokenizer, generation settings, chat templates, licence."""
        ...


class FolderSource:
    """A folder as `save_pretrained` leaves it and the Hub serves it: config.json and safetensors, sharded or not."""

    def __init__(self, folder: Path) -> None:
        if not (folder / SINGLE_NAME).exists() and not (folder / INDEX_NAME).exists():
            raise SourceError(_no_weights(folder))
        self.folder = folder
        self.config = read_config(folder, SourceError)
        self._files = TensorFiles.open(folder, SourceError)
        self.tensors = {name: entry.info for name, entry in self._files.entries.items()}
        self.nbytes = self._files.nbytes
        self.rows = self._files.read
        self.chunks = self._files.chunks
        self._side_files = _side_files(folder)
        self.fingerprint = {
            "config.json": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            **{str(path.relative_to(folder)): _digest(path) for path in self._side_files},
            **{path.name: _header_digest(path) for path in self._files.metadata},
        }

    def copy_side_files(self, folder: Path) -> None:
        for path in self._side_files:
            target = folder / path.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(read_bytes(path, _MAX_SIDE_BYTES, SourceError))


def open_source(source: str | Path, *, revision: str | None = None) -> Source:
    """Open a model by whatever `locate` understands.

    Raises SourceError if there is no such model, if it is damaged, or if it is in a kind of file that is refused.
    """
    path = locate(source, revision=revision)
    if path.is_file():
        from seedlm.storage.source_gguf import GGUFSource

        return GGUFSource(path)
    return _check(FolderSource(path), str(source))


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder or GGUF file of a model: a local path, or a Hub repository (``owner/name``, downloaded to the Hub's cache).

    revision   branch, tag or commit of a Hub repository
    Raises SourceError if there is none, or if it is another kind of file.
    """
    path = Path(source)
    if not path.exists():
        if is_repository(source):
            return _download(str(source), revision)
        raise SourceError(f"{path}: no such file or folder (a Hub repository is written owner/name)")
    if revision is not None:
        raise SourceError(f"{path}: a revision belongs to a Hub repository, this is a local path")
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise SourceError(_refuse_pickle(path, path.parent))
        if path.suffix != ".gguf":
            raise SourceError(f"{path}: a source is a folder of safetensors, a .gguf file or a Hub repository, not this file")
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise SourceError(f"{path}: has {len(ggufs)} GGUF files, name one of them: {', '.join(p.name for p in ggufs)}")
        return ggufs[0]
    return path


def is_repository(source: str | Path) -> bool:
    """Whether this may name a Hub repository, ``owner/name``."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None


def _check(source: FolderSource, name: str) -> Source:
    """Refuse what is already quantized: its integer weights are codes of another format."""
    quantized = source.config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else "an unknown method"
        raise SourceError(f"{name}: is already quantized ({method}); start from the original fp32, fp16 or bf16 weights")
    return source


def _download(repository: str, revision: str | None) -> Path:
    """A Hub repository's config, tokenizer and safetensors, in the Hub's own cache. Pickles are never fetched."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "LICENSE*", "LICENCE*", "NOTICE*", *(f"*{suffix}" for suffix in sorted(_SIDE_SUFFIXES))]
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            # Repositories often hold the same weights again in other layouts: consolidated files, sub-folders.
            ignore_patterns=["consolidated*", "original/*", "onnx/*", "openvino/*", "*.bin.index.json"],
        )
    except Exception as reason:  # the Hub client raises a dozen unrelated classes, from requests', httpx's and its own
        summary = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
        raise SourceError(f"{repository}: no local folder of that name, and the Hub did not give it ({summary})") from reason
    return Path(folder)


def _no_weights(folder: Path) -> str:
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        return _refuse_pickle(pickles[0], folder)
    return f"{folder}: has no {SINGLE_NAME}, no {INDEX_NAME} and no .gguf file"


def _refuse_pickle(path: Path, folder: Path) -> str:
    return (
        f"{path}: is a pickle, which can run code when opened, and is not read; convert it once, if you trust it: "
        f"""python -c "from transformers import AutoModelForCausalLM as M; """
        f"""M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""""
    )


def _side_files(folder: Path) -> list[Path]:
    """Small files that belong to the model whatever its weights are stored as."""
    found = []
    for path in sorted(path for pattern in _SIDE_PATTERNS for path in folder.glob(pattern)):
        wanted = path.suffix in _SIDE_SUFFIXES or _SIDE_NAMES.fullmatch(path.name)
        if not wanted or path.name == "config.json" or path.name.endswith(".index.json") or not path.is_file():
            continue
        if not stays_inside(path, folder):
            raise SourceError(f"{path}: links to {path.resolve()}, outside of the folder")
        with opened(path, SourceError) as file:
            if file.read(2).startswith(_PICKLE_STARTS):  # a tokenizer.model may be anything
                continue
        found.append(path)
    return found


def _digest(path: Path) -> str:
    with opened(path, SourceError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's length and header: every name, dtype, shape and place in it."""
    with opened(path, SourceError) as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    return hashlib.sha256(length + header).hexdigest()
