"""What a model's files tell before anything of it is loaded, and before torch is imported, which takes seconds.

Nothing is guessed: where the files do not tell, whatever loads the model does.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from seedlm.codes.registry import names, reason_no_product
from seedlm.errors import BackendError, EvaluationError, SeedLMError, SourceError
from seedlm.integrations.transformers.files import check_model, is_packed
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.gguf_check import gguf_sizes, read_gguf_header
from seedlm.storage.source import is_repository, locate, open_source
from seedlm.storage.untrusted import read_config, read_json

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_OWN_WAYS: Final = ("tekken.json", "processor_config.json")
"""Files of tokenizers that may have a template elsewhere."""


def check_dtype(name: str) -> None:
    """Raise EvaluationError for a dtype that no model is opened in."""
    if name not in DTYPES:
        raise EvaluationError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r:.80}")


def check_backend(name: str, path: Path | None = None, *, dequantized: bool = False) -> None:
    """Raise BackendError for a backend by which no packed layer can multiply; whether it runs here, its layers will tell.

    path          the model, whose codes have to know it; None if it is not known yet, and all codes count
    dequantized   all layers will be
    """
    if name == "auto":
        return
    if dequantized:
        raise BackendError(
            f"a backend multiplies by packed weights, which are dequantized here: no --dequantize with {name!r:.80}"
        )
    families = names() if path is None else []
    if path is not None and is_packed(path):
        families = [info.format.family for info in Checkpoint.open(path).packed.values()]
    if reason := reason_no_product(name, families):
        raise BackendError(reason if path is None else f"{path}: {reason}")


@dataclass(frozen=True)
class Found:
    """A model: where it is, and how many tensors it has, numbers in them, and bytes of its weight files."""

    path: Path
    tensors: int
    weights: int
    nbytes: int

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e9:.2f} GB" if self.nbytes >= 1e9 else f"{self.nbytes / 1e6:.2f} MB"
        weights = f"{self.weights / 1e6:,.1f} million" if self.weights >= 1e6 else f"{self.weights:,}"
        return f"{size}, {weights} weights in {self.tensors:,} tensors"


def find(model: str, revision: str | None = None, tell: Callable[[str], None] | None = None) -> Found:
    """A model, its headers read. Raises SourceError or CheckpointError for what could not be loaded.

    tell   told before anything is fetched from the Hub
    """
    path = _locate(model, revision, tell)
    sizes = check_model(path) or []
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return Found(path, len(sizes), sum(sizes), sum(file.stat().st_size for file in files))


def find_source(source: str, revision: str | None = None, tell: Callable[[str], None] | None = None) -> Found:
    """The same of a model that is to be read tensor by tensor (`storage.source`), not loaded."""
    path = _locate(source, revision, tell)
    if path.is_file():  # whose configuration only transformers makes
        return find(str(path))
    opened = open_source(path)
    return Found(path, len(opened.tensors), sum(prod(info.shape) for info in opened.tensors.values()), opened.nbytes)


def _locate(model: str, revision: str | None, tell: Callable[[str], None] | None) -> Path:
    if tell is not None and is_repository(model) and not os.path.exists(model):
        tell(f"fetching {model} from the Hub, as far as it is not here")
    return locate(model, revision=revision)


def longest_text(path: Path) -> int | None:
    """Tokens that a model has positions for, as `models.longest_text` would say it; None if its files do not."""
    if path.is_file():
        fields = _gguf_fields(path)
        longest = fields.get(f"{fields.get('general.architecture')}.context_length")
    else:
        config = read_config(path, SourceError)
        text = config.get("text_config")
        longest = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest > 0 else None


def check_new_tokens(path: Path, count: int) -> None:
    """Raise SourceError for more new tokens than a model has positions for, prompt or no prompt."""
    longest = longest_text(path)
    if longest is not None and count > longest:
        raise SourceError(f"the model knows {longest} positions, new tokens are {count}: fewer --max-new-tokens")


def has_chat_template(path: Path) -> bool | None:
    """Whether a model answers turns; None if its files do not say."""
    if path.is_file():
        return bool(_gguf_fields(path).get("tokenizer.chat_template"))
    if any((path / name).exists() for name in _TEMPLATES):
        return True
    try:
        settings = read_json(path / "tokenizer_config.json", SourceError, infinite=True)
    except SeedLMError:
        return None
    if settings.get("chat_template"):
        return True
    return None if "auto_map" in settings or any((path / name).exists() for name in _OWN_WAYS) else False


def check_chat(model: str, path: Path) -> None:
    """Raise SourceError for a model without a chat template."""
    if has_chat_template(path) is False:
        raise SourceError(no_template(model))


def no_template(model: object) -> str:
    """Why a model does not answer turns, and what it does."""
    return f"{model} has no chat template, so it only goes on from a text: seedlm generate {model} TEXT"


def _gguf_fields(path: Path) -> dict[str, Any]:
    return read_gguf_header(path, gguf_sizes(path)).fields
