"""What a thing is that is no source, and what opens it: the messages that a refused file or folder gets."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from seedlm.errors import CheckpointError, SeedLMError, SourceError
from seedlm.storage.safetensors import INDEX_NAME, SINGLE_NAME, TensorInfo
from seedlm.storage.side_files import PICKLE_SUFFIXES
from seedlm.storage.untrusted import opened, read_config, read_json

TRANSPOSED_MODELS: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Architectures whose linear layers are transformers' Conv1D, which stores [in_features, out_features]."""

_CODES: Final = frozenset({"qweight", "weight_packed", "gate_up_proj_blocks", "down_proj_blocks", "Wq_packed"})
"""Names of other libraries' codes."""
_SCALES: Final = frozenset({"weight_scale", "weight_scale_inv", "weight_scale_2", "scales", "SCB", "absmax"})
"""And of what stands beside them, by other names: scales of a weight that is itself no float of 16 or 32 bits."""
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_KINDS: Final = (
    (b"\x80", None),
    (b"PK\x03\x04", None),
    (b"GGUF", "a GGUF file by another name; call it .gguf"),
    (b"lmgg", "a GGML file, which llama.cpp read before GGUF; start from the original safetensors"),
    (b"tjgg", "a GGML file, which llama.cpp read before GGUF; start from the original safetensors"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run: git lfs pull"),
)
_SHOWN: Final = 4


def refuse_quantized(name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise SourceError for a model that is quantized already: its integers are codes of another format."""
    way_out = "start from the original fp32, fp16 or bf16 weights"
    for section in _sections(config, "quantization_config", "compression_config"):
        method = section.get("quant_method", "an unknown method") if isinstance(section, dict) else "an unknown method"
        raise SourceError(f"{name}: is already quantized ({method}); {way_out}")
    codes = []
    for tensor in tensors:
        module, _, leaf = tensor.rpartition(".")
        beside = tensors.get(f"{module}.weight") or tensors.get(module)
        if leaf in _CODES or (leaf in _SCALES and beside is not None and beside.dtype not in _FLOATS):
            codes.append(tensor)
    if codes:
        shown = ", ".join(codes[:_SHOWN]) + (f" and {len(codes) - _SHOWN} more" if len(codes) > _SHOWN else "")
        raise SourceError(f"{name}: is already quantized, though its config.json does not say so ({shown}); {way_out}")


def _sections(config: Mapping[str, Any], *keys: str) -> Iterator[Any]:
    """The values of some keys that are set, at any depth of objects."""
    left = [config]
    while left:
        for key, value in left.pop().items():
            if key in keys and value is not None:
                yield value
            elif isinstance(value, Mapping):
                left.append(value)


def no_weights(folder: Path) -> str:
    """Why a folder without safetensors under the usual names is no source."""
    names = sorted(path.name for path in folder.iterdir())
    for name in (SINGLE_NAME, INDEX_NAME):
        if (folder / name).is_symlink():
            return f"{folder / name}: is a link to {os.readlink(folder / name)}, which is not there"
    if "adapter_config.json" in names:
        return _refuse_adapter(folder)
    others = [name for name in names if name.endswith(".safetensors")]
    if any("-of-" in name for name in others):
        return f"{folder}: has parts of a model ({_listed(others)}), but not {INDEX_NAME}, which says what is in which"
    if others:
        return f"{folder}: has {_listed(others)}; weights are read from {SINGLE_NAME}: rename it, if it is all of the model"
    pickles = [name for name in names if (folder / name).suffix in PICKLE_SUFFIXES and (folder / name).is_file()]
    if pickles:
        return refuse_pickle(folder / pickles[0])
    below = [name for name in names if (folder / name / "config.json").exists() and (folder / name / SINGLE_NAME).exists()]
    if below:
        return f"{folder}: holds no model itself, the folder {below[0]} in it does"
    return f"{folder}: has no {SINGLE_NAME}, no {INDEX_NAME} and no .gguf file"


def no_packed_folder(path: Path) -> str:
    """Why what is no folder is no compressed model: what it is, and what is one. CheckpointError if it cannot be read."""
    if not os.path.lexists(path):
        return f"{path}: no such folder"
    wanted = "a compressed model is a folder of config.json and safetensors"
    if not os.path.exists(path):
        return f"{path}: is a link to nothing that is there; {wanted}"
    if not os.path.isfile(path):
        return f"{path}: is neither a folder nor a file; {wanted}"
    with opened(path, CheckpointError) as file:
        start = file.read(4)
    if start == b"GGUF":
        return f"{path}: is a GGUF file; {wanted}, which `seedlm compress {path} OUT` makes of it"
    if path.suffix != ".safetensors":
        return f"{path}: is a file; {wanted}"
    if os.path.isfile(path.parent / "config.json"):
        return f"{path}: is a safetensors file; name its folder, {path.parent}"
    return f"{path}: is a safetensors file without a config.json beside it; {wanted}"


def refuse_pickle(path: Path) -> str:
    """Why a file with a pickle's suffix is not read, by what it really is, and how to go on."""
    with opened(path, SourceError) as file:
        start = file.read(32)
    kind = next((what for magic, what in _KINDS if start.startswith(magic)), "unknown")
    if kind == "unknown" and path.name == "model.bin" and start[1:4] == b"\0\0\0":
        kind = "a model of CTranslate2, in its own format; start from the model that it was converted from"
    if kind is not None and kind != "unknown":
        return f"{path}: is {kind}"
    try:
        config = read_config(path.parent, SourceError)
    except SeedLMError:
        config = {}
    if config.get("model_type") in TRANSPOSED_MODELS:
        return (
            f"{path}: is a pickle, which is not read, of a {config['model_type']} model, which could not be compressed as "
            f"safetensors either: its layers are Conv1D, stored as [in_features, out_features]"
        )
    names = config.get("architectures") or ["AutoModel"]
    chosen = names[0] if names[0].isidentifier() else "AutoModel"
    return (
        f"{path}: is a pickle, which can run code when opened, and is not read; convert it once, if you trust it: "
        f"""python -c "from transformers import {chosen} as M; """
        f"""M.from_pretrained('{path.parent}', dtype='auto').save_pretrained('{path.parent}-safetensors')\""""
    )


def _refuse_adapter(folder: Path) -> str:
    try:
        base = read_json(folder / "adapter_config.json", SourceError).get("base_model_name_or_path")
    except SeedLMError:
        base = None
    return (
        f"{folder}: is an adapter{f' of {base}' if isinstance(base, str) else ''}, not a model; merge it first: "
        f"""python -c "from peft import AutoPeftModelForCausalLM as M; """
        f"""M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\", copy the tokenizer's files"""
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
