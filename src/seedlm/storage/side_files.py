"""The small files beside a model's weights: which of them still mean something beside other weights.

Tokenizer, generation settings, chat templates, custom code and licences do. So does all that a sentence-transformers model is
made of, folders with weights of their own included, and an adapter that loading would put on top, if its weights are there.
What describes weights that are no longer there does not: indexes, settings of another quantisation.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from seedlm.errors import SourceError
from seedlm.storage.untrusted import MAX_JSON_BYTES, file_digest, opened, parse_json, read_bytes, stays_inside

SIDE_SUFFIXES: Final = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".py"})
PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

_SIDE_NAMES: Final = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\..*)?", re.IGNORECASE)
_MAX_SIDE_BYTES: Final = 1 << 30
_SIDE_PATTERNS: Final = ("*", "additional_chat_templates/*.jinja")
_NOT_KEPT: Final = re.compile(
    r"config\.json|.*\.index\.json|seedlm_report\.json|quantize_config\.json|quant_config\.json|hf_quant_config\.json"
)
"""What describes the weights that were there before."""
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SENTENCES: Final = "modules.json"
_PICKLE_STARTS: Final = (b"\x80", b"PK")


class SideFiles:
    """The files beside a folder's weights.

    paths   those to be copied
    notes   what a user should know about others, a line each
    Raises SourceError for a link out of the folder, and for a sentence-transformers model that is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []
        self.paths = [*self._beside(), *self._of_sentences()]

    def digests(self) -> dict[str, str]:
        """Name -> SHA-256 of the content."""
        return {str(path.relative_to(self._folder)): file_digest(path, SourceError) for path in self.paths}

    def copy(self, target: Path) -> None:
        for path in self.paths:
            copied = target / path.relative_to(self._folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(read_bytes(path, _MAX_SIDE_BYTES, SourceError))

    def _beside(self) -> Iterator[Path]:
        adapted = (self._folder / _ADAPTER_WEIGHTS).is_file()
        for path in sorted(path for pattern in _SIDE_PATTERNS for path in self._folder.glob(pattern)):
            wanted = path.suffix in SIDE_SUFFIXES or _SIDE_NAMES.fullmatch(path.name) or path.name == _ADAPTER_WEIGHTS
            if not wanted or _NOT_KEPT.fullmatch(path.name) or not path.is_file():
                continue
            if path.name == _ADAPTER and not adapted:
                self.notes.append(f"{_ADAPTER} is left out: the adapter's weights, {_ADAPTER_WEIGHTS}, are not there")
            elif path.name != _ADAPTER_WEIGHTS or (self._folder / _ADAPTER).is_file():
                self._check_link(path)
                if not _is_pickle(path):  # a tokenizer.model may be anything
                    yield path

    def _of_sentences(self) -> Iterator[Path]:
        """What the modules of a sentence-transformers model hold, in folders of their own."""
        path = self._folder / _SENTENCES
        if not path.is_file():
            return
        modules = parse_json(read_bytes(path, MAX_JSON_BYTES, SourceError), str(path), SourceError)
        names = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
        for name in dict.fromkeys(name for name in names if isinstance(name, str) and name):
            if not {"", ".", ".."}.isdisjoint(name.split("/")):  # the model's own would bring its weights along
                raise SourceError(f"{path}: names the folder {name!r:.80}; its own and others are not copied")
            if not os.path.isdir(self._folder / name) or not stays_inside(self._folder / name, self._folder):
                raise SourceError(f"{path}: names the folder {name!r:.80}, which is not there; sentence-transformers needs it")
            for part in sorted(part for part in (self._folder / name).rglob("*") if part.is_file()):
                self._check_link(part)
                if part.suffix in PICKLE_SUFFIXES:
                    raise SourceError(
                        f"{part}: is a pickle, which can run code when opened, and is not copied; let sentence-transformers "
                        f"write safetensors: SentenceTransformer(folder).save_pretrained(other)"
                    )
                yield part

    def _check_link(self, path: Path) -> None:
        if not stays_inside(path, self._folder):
            raise SourceError(f"{path}: links to {path.resolve()}, outside of the folder")


def _is_pickle(path: Path) -> bool:
    with opened(path, SourceError) as file:
        return file.read(2).startswith(_PICKLE_STARTS)
