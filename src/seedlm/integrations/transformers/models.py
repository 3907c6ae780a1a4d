"""Any causal language model, opened to be run: a folder, packed or not, a GGUF file, or a Hub repository.

What a model is (`describe`) is read from its files alone, so that a run can be planned, refused or gone on with before
anything large is loaded.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedlm.errors import SourceError
from seedlm.integrations.transformers.before import DTYPES as DTYPES
from seedlm.modeling.blueprint import bounded
from seedlm.modeling.quantize import dequantize_model, seed_linears
from seedlm.storage.checkpoint import QUANT_METHOD
from seedlm.storage.gguf_check import gguf_sizes, read_gguf_header
from seedlm.storage.inspect import inspect_checkpoint
from seedlm.storage.safetensors import DTYPE_BITS, TORCH_NAMES, TensorInfo
from seedlm.storage.source import FolderSource

_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 12


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model on disk.

    name                    as it was given
    format                  our format, a GGUF type, another library's method, or the dtype: of most of its weights
    bits_per_weight         of the weights in that format, all overhead counted; None where another library's files do not
                            tell (`_foreign_size`)
    model_bits_per_weight   of the whole model, every byte of its weight files counted
    weights                 numbers that the files stand for
    bytes                   its weight files
    fingerprint             of its headers, its side files, and samples of its weights
    calibrated              whether it has seen data; None for a model that is not packed
    """

    name: str
    format: str
    bits_per_weight: float | None
    model_bits_per_weight: float | None
    weights: int | None
    bytes: int
    fingerprint: str
    calibrated: bool | None = None


def describe(name: str, path: Path) -> ModelInfo:
    """What the model is that `source.locate` found at `path`. Raises SourceError or CheckpointError if it is damaged."""
    if path.is_file():
        return _describe_gguf(name, path)
    files = FolderSource(path)
    paths = sorted(path.glob("*.safetensors"))
    fingerprint = _fingerprint(paths, files.fingerprint)
    section = files.config.get("quantization_config")
    if section is not None:
        method = str(section.get("quant_method")) if isinstance(section, dict) else "unknown"
        if method != QUANT_METHOD:
            bits, count = _foreign_size(path, files.tensors)
            return _info(name, method, bits, count, files.nbytes, fingerprint)
        report = inspect_checkpoint(path)
        formats = ", ".join(sorted({tensor.format for tensor in report.tensors}))
        weights = report.compressed_weights + report.dense_weights
        found = _info(name, formats, report.bits_per_weight, weights, report.bytes, fingerprint)
        return replace(found, calibrated=report.calibrated)
    sizes: Counter[str] = Counter()
    for info in files.tensors.values():
        sizes[info.dtype] += prod(info.shape)
    if not sizes:
        raise SourceError(f"{path}: holds no tensors")
    dtype = sizes.most_common(1)[0][0]
    return _info(name, TORCH_NAMES[dtype], float(DTYPE_BITS[dtype]), sizes.total(), files.nbytes, fingerprint)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model at `path`. Raises SourceError if it has none."""
    from seedlm.integrations.transformers.opening import open_tokenizer

    return open_tokenizer(path, trust_remote_code=trust_remote_code)


def load_model(
    path: Path, *, device: torch.device, dtype: str = "auto", packed: bool = False, trust_remote_code: bool = False
) -> Any:
    """The model at `path`, in evaluation mode.

    dtype               "auto" (as stored; float32 for a GGUF file) or another of `DTYPES`
    packed              leave packed weights packed: the least memory, but they are dequantized in every forward pass
    trust_remote_code   run code that comes with the model
    Raises SourceError if it cannot be loaded, lacks a weight, or is no language model.
    """
    from seedlm.integrations.transformers.opening import open_language_model

    try:
        model = open_language_model(path, dtype=dtype, trust_remote_code=trust_remote_code).to(device)
        if not packed and any(seed_linears(model)):
            dequantize_model(model, model.dtype)
    except torch.OutOfMemoryError:
        raise SourceError(f"{path}: does not fit into the memory of {device}") from None
    return model


def longest_text(model: Any) -> int | None:
    """Tokens that a model has positions for; None if it does not say. A model of several parts says it of its text part."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def vocabulary(model: Any) -> int:
    """How many tokens a model knows: the rows of its input embeddings, packed or not. Their ids begin at 0."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_tokens(model: Any, ids: Tensor | Sequence[int], text: object, where: object) -> None:
    """Raise SourceError for tokens that a model does not know: torch would say so from within, on a GPU by ending the process.

    ids     integers of any shape, or a list of them
    text    what they are the tokens of, as a user knows it
    where   the model is
    """
    known, ids = vocabulary(model), torch.as_tensor(ids).flatten()
    unknown = ((ids < 0) | (ids >= known)).nonzero()
    if len(unknown):
        place = int(unknown[0])
        raise SourceError(
            f"{text}: its token {place + 1} has the id {int(ids[place])}, and {where} knows the ids 0 to {known - 1}, the rows "
            "of its embeddings: the tokenizer is another model's, or was given tokens that the model was not"
        )


def _foreign_size(path: Path, tensors: Mapping[str, TensorInfo]) -> tuple[float | None, int | None]:
    """Bits of a weight that another library has quantised, all that it stores for them counted, and all of a model's weights.

    Files do not tell how many weights a code stands for; the architecture does. What stands in the files as the architecture
    has it, in a dtype of floats, is dense; all other bytes stand for all other weights.
    returns   None for bits if the files' names are not the architecture's; None for both if it cannot be built
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"), bounded(4 * info.nbytes for info in tensors.values()):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # without the word, it asks on stdin
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # code of its own, a class that is not known: transformers raises whatever it led to
        return None, None
    parameters = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    dense = {name for name, info in tensors.items() if info.dtype in _FLOATS and parameters.get(name) == info.shape}
    codes = {name: info for name, info in tensors.items() if name not in dense and name != "lm_head.weight"}
    quantized = {name: prod(shape) for name, shape in parameters.items() if name not in dense}
    owners = {name.rpartition(".")[0] + "." for name in quantized}
    ours = all(any(name.startswith(owner) for owner in owners) for name in codes)
    nbytes, weights = sum(info.nbytes for info in codes.values()), sum(quantized.values())
    return (8 * nbytes / weights if weights and ours else None), sum(map(prod, parameters.values()))


def _describe_gguf(name: str, path: Path) -> ModelInfo:
    sizes = gguf_sizes(path)
    import gguf

    weights: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in read_gguf_header(path, sizes).tensors.values():
        kind = gguf.GGMLQuantizationType(tensor.kind).name
        weights[kind] += prod(tensor.shape)
        nbytes[kind] += tensor.nbytes
    if not weights:
        raise SourceError(f"{path}: holds no tensors")
    kind = weights.most_common(1)[0][0]
    bits = 8 * nbytes[kind] / weights[kind]
    return _info(name, f"gguf {kind}", bits, weights.total(), path.stat().st_size, _fingerprint([path], {}))


def _info(name: str, format: str, bits: float | None, weights: int | None, nbytes: int, fingerprint: str) -> ModelInfo:
    return ModelInfo(
        name=name,
        format=format,
        bits_per_weight=bits,
        model_bits_per_weight=8 * nbytes / weights if weights else None,
        weights=weights,
        bytes=nbytes,
        fingerprint=fingerprint,
    )


def _fingerprint(paths: list[Path], facts: dict[str, Any]) -> str:
    """SHA-256 of some facts, and of each file's length and 64 evenly spaced pieces of 4 KiB, its first and last included.

    Enough to tell two models apart that only differ in their weights, without reading a hundred gigabytes.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
