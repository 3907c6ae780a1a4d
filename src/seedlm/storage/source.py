"""Where a model is read from: a folder of safetensors, a GGUF file, or a Hub repository, all behind one interface.

A source lists its tensors before reading any, then gives out row ranges, so what is held in memory does not depend on the
size of the model or of a tensor. No model is ever built, and nothing that can run code is opened: pickles are refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from seedlm.errors import SourceError
from seedlm.storage.card import CARD_NAME, read_card
from seedlm.storage.gguf_check import gguf_parts
from seedlm.storage.refusals import no_weights, refuse_pickle, refuse_quantized
from seedlm.storage.safetensors import INDEX_NAME, SINGLE_NAME, TensorFiles, TensorInfo
from seedlm.storage.side_files import PICKLE_SUFFIXES, SIDE_SUFFIXES, SideFiles
from seedlm.storage.untrusted import opened, read_config

if TYPE_CHECKING:
    from torch import Tensor

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PARTIAL: Final = ".partial"
"""Ends the name of the folder of an unfinished run (`compress.workfolder`)."""


class Source(Protocol):
    """A model to be read.

    config        its config.json
    tensors       name -> dtype and shape, in the order of the files
    nbytes        bytes of the weights' files on disk
    notes         what a user should know before it is compressed, a line each
    about         what its card says that holds for a compressed one too (`card.KEPT`): its licence
    fingerprint   what must not change while a run over this source is going on, as JSON: headers, sizes, other files'
                  content. The weights' own content is not in it; a run checks that tensor by tensor.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    nbytes: int
    notes: list[str]
    about: dict[str, Any]
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
        """Put what belongs beside the weights into a folder: tokenizer, generation settings, chat templates, licence."""
        ...


class FolderSource:
    """A folder as `save_pretrained` leaves it and the Hub serves it: config.json and safetensors, sharded or not."""

    def __init__(self, folder: Path) -> None:
        if not (folder / SINGLE_NAME).exists() and not (folder / INDEX_NAME).exists():
            raise SourceError(no_weights(folder))
        self.folder = folder
        self.config = read_config(folder, SourceError)
        self._files = TensorFiles.open(folder, SourceError)
        self.tensors = {name: entry.info for name, entry in self._files.entries.items()}
        self.nbytes = self._files.nbytes
        self.rows = self._files.read
        self.chunks = self._files.chunks
        self._side_files = SideFiles(folder)
        self.notes = self._side_files.notes
        self.about = read_card(folder)
        self.fingerprint = {
            "config.json": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            **self._side_files.digests(),
            **{path.name: _header_digest(path) for path in self._files.metadata},
        }

    def copy_side_files(self, folder: Path) -> None:
        self._side_files.copy(folder)


def open_source(source: str | Path, *, revision: str | None = None) -> Source:
    """Open a model by whatever `locate` understands.

    Raises SourceError if there is no such model, if it is damaged, or if it is in a kind of file that is refused.
    """
    path = locate(source, revision=revision)
    if path.is_file():
        from seedlm.storage.source_gguf import GGUFSource

        return GGUFSource(path)
    found = FolderSource(path)
    refuse_quantized(str(source), found.config, found.tensors)
    return found


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder or GGUF file of a model: a local path, or a Hub repository (``owner/name``, downloaded to the Hub's cache).

    revision   branch, tag or commit of a Hub repository
    Raises SourceError if there is none, or if it is another kind of file.
    """
    path = Path(source)
    if not os.path.exists(path):
        if is_repository(source):
            return _download(str(source), revision)
        raise SourceError(f"{path}: no such file or folder (a Hub repository is written owner/name)")
    if revision is not None:
        raise SourceError(f"{path}: a revision belongs to a Hub repository, this is a local path")
    if path.suffix == _PARTIAL and path.is_dir() and not os.path.lexists(path / "config.json"):
        whole = path.with_suffix("")
        raise SourceError(
            f"{path}: is an unfinished run of `seedlm compress`; repeat its command, and {whole} will be the model"
        )
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise SourceError(refuse_pickle(path))
        if path.suffix != ".gguf":
            raise SourceError(f"{path}: a source is a folder of safetensors, a .gguf file or a Hub repository, not this file")
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1 and ggufs != gguf_parts(ggufs[0]):
            raise SourceError(f"{path}: has {len(ggufs)} GGUF files, name one of them: {', '.join(p.name for p in ggufs)}")
        return ggufs[0]
    return path


def is_repository(source: str | Path) -> bool:
    """Whether this may name a Hub repository, ``owner/name``."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None


def _download(repository: str, revision: str | None) -> Path:
    """A Hub repository's config, tokenizer and safetensors, in the Hub's own cache. Pickles are never fetched."""
    from huggingface_hub import snapshot_download

    patterns = [
        "*.safetensors",
        CARD_NAME,
        "LICENSE*",
        "LICENCE*",
        "NOTICE*",
        *(f"*{suffix}" for suffix in sorted(SIDE_SUFFIXES)),
    ]
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


def _header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's length and header: every name, dtype, shape and place in it."""
    with opened(path, SourceError) as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    return hashlib.sha256(length + header).hexdigest()
