"""A packed checkpoint: a model folder in which some weights are codes. What is in it, and every check on an untrusted one.

On disk it is an ordinary Hugging Face folder. Three things make it a packed one (FORMAT.md, "The checkpoint"):

- ``config.json`` has a ``quantization_config`` with the method, version and format;
- each compressed module M stores its `Format.parts` under the names that `stored_name` gives;
- the safetensors metadata key ``seedlm`` tells, for each such module, the shape and format of the weight it stands for.

Experts that the original holds as one stack [experts, ...] are stored as what they are, one matrix for each expert, under the
stack's name and the expert's number; the metadata tells which of them make up a stack (`Stack`).

`Checkpoint.open` reads headers only, without torch, and checks that these agree with each other and with the sizes of the
files before it allocates anything; `Checkpoint.tensor` reads one weight's codes and checks each of them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from seedlm.codes.base import CODES, Format
from seedlm.codes.registry import check_settings, family_of, format_from_dict, parse_format
from seedlm.errors import CheckpointError, FormatError, TensorError
from seedlm.storage.safetensors import TensorFiles, TensorInfo, parse_json, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from seedlm.codes.encoded import EncodedTensor

QUANT_METHOD: Final = "seedlm"
FORMAT_VERSION: Final = 2
"""The newest version that is read. A folder is written with the lowest that holds its families (`Family.since_version`)."""
METADATA_KEY: Final = "seedlm"
GUARD: Final = "none. This model's weights are packed by seedlm: `pip install seedlm`, then `import seedlm` before loading it"
"""The key in config.json's ``fusion_config`` that transformers quotes when it refuses a folder (`hf`)."""

_MAX_FEATURES: Final = 1 << 31
_MAX_EXPERTS: Final = 1 << 16
_STORED_DTYPES: Final = {"int32": "I32", "float32": "F32", "float16": "F16", "int16": "I16", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class Stack:
    """A tensor of the original that holds the matrices of all experts.

    tensor       its name
    shape        (experts, out_features, in_features), or (experts, in_features, out_features) if it is transposed
    """

    tensor: str
    shape: tuple[int, int, int]
    transposed: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """(out_features, in_features) of every expert."""
        _, rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def modules(self) -> list[str]:
        """The modules that its matrices are stored as, by expert."""
        return [f"{self.tensor.removesuffix('.weight')}.{expert}" for expert in range(self.shape[0])]

    def expert(self, module: str) -> int:
        """The number of one of its modules."""
        return int(module.rpartition(".")[2])


@dataclass(frozen=True)
class PackedInfo:
    """A compressed weight, before any of it is read.

    format   how it is stored
    shape    (out_features, in_features) of the weight that it stands for
    stack    the original's tensor that it is one matrix of; None if it has a tensor of its own
    """

    format: Format
    shape: tuple[int, int]
    stack: Stack | None = None

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """Its parts as they are stored: part -> dtype and shape."""
        return {
            name: TensorInfo(_STORED_DTYPES[part.dtype], part.shape) for name, part in self.format.parts(*self.shape).items()
        }

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.stored.values())

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def stored_name(module: str, part: str) -> str:
    """The name under which a part of a compressed module's weight is stored.

    The codes take the weight's own name: a reader that does not know this format then finds a tensor of the wrong
    shape and fails, where under a new name it would find nothing and start from random weights.
    """
    return f"{module}.weight" if part == CODES else f"{module}.weight_{part}"


def quantization_config(
    format: Format, settings: Mapping[str, str], dense: list[str], overrides: Mapping[str, Format] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of a packed checkpoint.

    settings    how it was encoded (`Family.defaults`), for the record: decoding does not depend on it
    dense       linear modules that are not compressed
    overrides   module -> format, where it is not `format`
    """
    config = {
        "quant_method": QUANT_METHOD,
        "format_version": version_of([format, *(overrides or {}).values()]),
        "format": format.to_dict(),
        **settings,
        "modules_to_not_convert": sorted(dense),
    }
    if overrides:
        config["overrides"] = {module: overrides[module].to_dict() for module in sorted(overrides)}
    return config


def version_of(formats: "Iterable[Format]") -> int:
    """The version that a checkpoint with these formats is written as."""
    return max((family_of(format).since_version for format in formats), default=1)


def guarded(fusions: Mapping[str, Any] | None) -> dict[str, Any]:
    """A model's ``fusion_config`` with the guard in it, which is off: its value is false."""
    return {**(fusions or {}), GUARD: False}


def metadata(packed: Mapping[str, PackedInfo]) -> dict[str, str]:
    """The safetensors metadata of a file that holds these compressed modules."""
    table: dict[str, Any] = {
        "format_version": version_of(info.format for info in packed.values()),
        "tensors": {name: {"shape": list(info.shape), "format": info.format.spec} for name, info in packed.items()},
    }
    stacks = {info.stack.tensor: info.stack for info in packed.values() if info.stack}
    if stacks:
        table["stacks"] = {name: {"shape": list(stack.shape), "transposed": stack.transposed} for name, stack in stacks.items()}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    return {"format": "pt", METADATA_KEY: text}


def check_codes(module: str, info: PackedInfo, parts: "Mapping[str, Tensor]") -> None:
    """Raise CheckpointError if a stored value is out of its range (`Family.check`).

    parts   the tensors of `info.stored`, shapes and dtypes already checked
    """
    try:
        family_of(info.format).check(parts, info.format, info.shape)
    except TensorError as reason:
        raise CheckpointError(f"{module}: {reason}") from None


@dataclass(frozen=True)
class Checkpoint:
    """A packed checkpoint whose headers have been checked.

    config     its config.json
    format     the format of every compressed weight that has none of its own
    packed     module -> its compressed weight, in file order
    dense      name -> every other tensor
    """

    folder: Path
    config: dict[str, Any]
    format: Format
    packed: dict[str, PackedInfo]
    dense: dict[str, TensorInfo]
    files: TensorFiles

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Open a packed checkpoint. Raises CheckpointError if it is not exactly what FORMAT.md describes."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json; it is not a model folder, or a run that has not finished")
        config = read_json(folder / "config.json", CheckpointError)
        format, overrides = _read_config(config, f"{folder / 'config.json'}")
        files = TensorFiles.open(folder, CheckpointError)
        packed: dict[str, PackedInfo] = {}
        for path, strings in files.metadata.items():
            for module, info in read_metadata(strings, f"{path}, metadata").items():
                if packed.setdefault(module, info) != info:
                    raise CheckpointError(f"{path}: describes {module} otherwise than another shard does")
        found = {name: entry.info for name, entry in files.entries.items()}
        for module, info in packed.items():
            if info.format != overrides.get(module, format):
                raise CheckpointError(
                    f"{folder}: {module} is stored as {info.format}, config.json says {overrides.get(module, format)}"
                )
            for part, expected in info.stored.items():
                name = stored_name(module, part)
                if name not in found:
                    raise CheckpointError(f"{folder}: {name} is missing, it holds the {part} of {module}")
                if found[name] != expected:
                    raise CheckpointError(
                        f"{folder}: {name} must be {expected} for a weight {[*info.shape]}, got {found[name]}"
                    )
                del found[name]
        _check_stacks(packed, found, f"{folder}")
        for module in overrides:
            if module not in packed:
                raise CheckpointError(f"{folder}: config.json gives {module} a format, but it is not a compressed module")
        kinds = {format, *overrides.values()}
        side_parts = tuple(stored_name("", part) for kind in kinds for part in kind.parts(1, 1) if part != CODES)
        for name, dense in found.items():
            module = name.rpartition(".weight")[0]
            if name.endswith(side_parts) or (dense.dtype == "I32" and name == stored_name(module, CODES)):
                raise CheckpointError(f"{folder}: {name} looks like part of a compressed weight that no metadata describes")
        return cls(folder, config, format, packed, found, files)

    def tensor(self, module: str) -> "EncodedTensor":
        """A module's compressed weight, every code checked. Raises CheckpointError."""
        from seedlm.codes.encoded import EncodedTensor

        if module not in self.packed:
            raise CheckpointError(f"{self.folder}: has no compressed module {module!r}")
        info = self.packed[module]
        parts = {part: self.files.read(stored_name(module, part)) for part in info.stored}
        check_codes(f"{self.folder}: {module}", info, parts)
        return EncodedTensor(info.format, info.shape, parts)

    def dense_tensor(self, name: str) -> "Tensor":
        """A tensor that is not compressed, in its own dtype. Raises CheckpointError."""
        if name not in self.dense:
            raise CheckpointError(f"{self.folder}: has no dense tensor {name!r}")
        return self.files.read(name)

    def weights(self, dtype: "torch.dtype | None" = None) -> "Iterator[tuple[str, Tensor]]":
        """All tensors under their original names, compressed ones dequantized to `dtype`, float32 if None.

        Together they are the ordinary checkpoint that this one stands for.
        """
        import torch

        dtype = dtype or torch.float32
        for module, info in self.packed.items():
            if info.stack is None:
                yield f"{module}.weight", self.tensor(module).dequantize(dtype)
            elif module == info.stack.modules[0]:
                matrices = torch.stack([self.tensor(expert).dequantize(dtype) for expert in info.stack.modules])
                yield info.stack.tensor, matrices.mT.contiguous() if info.stack.transposed else matrices
        for name in self.dense:
            yield name, self.files.read(name)


def _check_stacks(packed: Mapping[str, PackedInfo], dense: Mapping[str, TensorInfo], where: str) -> None:
    """Raise CheckpointError unless every stack has all of its matrices, and nothing else has its name."""
    for stack in {info.stack for info in packed.values() if info.stack}:
        for module in stack.modules:
            if module not in packed or packed[module].stack != stack:
                raise CheckpointError(f"{where}: {module} is missing, a matrix of the stack {stack.tensor}")
        if stack.tensor in dense:
            raise CheckpointError(f"{where}: has {stack.tensor} twice, as a tensor and as codes")


def _read_config(config: Mapping[str, Any], where: str) -> tuple[Format, dict[str, Format]]:
    """The format and its overrides from a config.json, CheckpointError unless it is as `quantization_config` writes it."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: has no quantization_config; this is not a compressed model")
    where += ", quantization_config"
    if section.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{where}: quant_method must be {QUANT_METHOD!r}, got {section.get('quant_method')!r}")
    _check_version(section.get("format_version"), where)
    dense = section.get("modules_to_not_convert")
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        raise CheckpointError(f"{where}: modules_to_not_convert must be a list of names")
    overrides = section.get("overrides", {})
    if not isinstance(overrides, dict):
        raise CheckpointError(f"{where}: overrides must map modules to formats")
    try:
        format = format_from_dict(section.get("format"))
        others = {name: format_from_dict(data) for name, data in overrides.items()}
        formats = list({format, *others.values()})
        check_settings(formats, {name: section.get(name) for name in family_of(format).defaults})
    except FormatError as reason:
        raise CheckpointError(f"{where}: {reason}") from None
    if section["format_version"] < version_of(formats):
        raise CheckpointError(
            f"{where}: format_version must be {version_of(formats)} for {format.spec}, got {section['format_version']}"
        )
    return format, others


def read_metadata(strings: Mapping[str, str], where: str) -> dict[str, PackedInfo]:
    """The compressed modules that one file's metadata describes; none if it has no such key."""
    if METADATA_KEY not in strings:
        return {}
    data = parse_json(strings[METADATA_KEY], f"{where}, {METADATA_KEY}", CheckpointError)
    if not isinstance(data, dict) or not {"format_version", "tensors"} <= set(data) <= {"format_version", "tensors", "stacks"}:
        raise CheckpointError(f"{where}: {METADATA_KEY} must have format_version and tensors, and may have stacks")
    _check_version(data["format_version"], where)
    if not isinstance(data["tensors"], dict) or not isinstance(data.get("stacks", {}), dict):
        raise CheckpointError(f"{where}: {METADATA_KEY}'s tensors and stacks must map names to what they are")
    stacks = _read_stacks(data.get("stacks", {}), data["tensors"], where)
    packed = {}
    for module, item in data["tensors"].items():
        if not isinstance(item, dict) or set(item) != {"shape", "format"}:
            raise CheckpointError(f"{where}: {module} must have shape and format")
        shape, spec = _read_shape(item["shape"], 2, module, where), item["format"]
        try:
            format = parse_format(spec if isinstance(spec, str) else repr(spec))
        except FormatError as reason:
            raise CheckpointError(f"{where}: {module}: {reason}") from None
        if format.spec != spec:
            raise CheckpointError(f"{where}: {module}: the format must be written {format.spec!r}, got {spec!r}")
        stack = stacks.get(module)
        if stack and stack.matrix != shape:
            raise CheckpointError(f"{where}: {module} must be {[*stack.matrix]}, as in {stack.tensor}, got {[*shape]}")
        packed[module] = PackedInfo(format, (shape[0], shape[1]), stack)
    return packed


def _read_stacks(data: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> dict[str, Stack]:
    """The stack that each module is a matrix of, from one file's metadata."""
    stacks: dict[str, Stack] = {}
    for name, item in data.items():
        if not isinstance(item, dict) or set(item) != {"shape", "transposed"} or type(item["transposed"]) is not bool:
            raise CheckpointError(f"{where}: the stack {name} must have shape and transposed")
        experts, rows, columns = _read_shape(item["shape"], 3, name, where)
        if experts > _MAX_EXPERTS:
            raise CheckpointError(f"{where}: the stack {name} must have at most {_MAX_EXPERTS} matrices, got {experts}")
        stack = Stack(name, (experts, rows, columns), item["transposed"])
        stacks |= dict.fromkeys(stack.modules, stack)
        if tensors.keys().isdisjoint(stack.modules):
            raise CheckpointError(f"{where}: describes the stack {name}, but none of its matrices")
    return stacks


def _read_shape(shape: object, dims: int, name: str, where: str) -> tuple[int, ...]:
    if (
        not isinstance(shape, list)
        or len(shape) != dims
        or not all(type(size) is int and 1 <= size < _MAX_FEATURES for size in shape)
    ):
        raise CheckpointError(f"{where}: {name} has the impossible shape {shape!r:.80}")
    return tuple(shape)


def _check_version(version: object, where: str) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format_version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {version} is newer than this package reads ({FORMAT_VERSION}): pip install -U seedlm"
        )
