"""What a packed folder says of its weights: config.json's ``quantization_config``, and the ``seedlm`` metadata of each file.

Both are written and read here (FORMAT.md, "config.json" and "Metadata"). Work is bounded by the text's length: a stack claims
up to 65,536 matrices, and none is counted that is not described.

Version 2 of the metadata has a SHA-256 for each tensor, of its bytes and of a heading that says what they are (`heading`): a
tensor that was damaged, exchanged, renamed or relabelled is found. It stands in the header of the file that holds the tensor,
not in a file beside it: what transformers and the Hub's client fetch are weight files, and shards stay whole by themselves. 64
digits are 64 digits, so a header has its length before the digests are known.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from seedlm.codes.base import CODES, Format
from seedlm.codes.registry import check_settings, family_of, format_from_dict, parse_format
from seedlm.errors import CheckpointError, FormatError
from seedlm.storage.safetensors import CONTROL, TensorInfo
from seedlm.storage.untrusted import parse_json

QUANT_METHOD: Final = "seedlm"
FORMAT_VERSION: Final = 4
"""The newest version that is read. Version 1 has no digests; what is written has the lowest of the others that can hold it."""
_DIGESTS_SINCE: Final = 2
_EMBEDDINGS_SINCE: Final = 3
_FLAT_SINCE: Final = 4
METADATA_KEY: Final = "seedlm"
_FIRST_GUARD: Final = (
    "none. This model's weights are packed by seedlm: `pip install seedlm`, then `import seedlm` before loading it"
)
GUARD: Final = _FIRST_GUARD + ", or start the program by `seedlm run PROGRAM ...`, a server by `seedlm serve FOLDER`"
"""The key in config.json's ``fusion_config`` that transformers quotes when it refuses a folder (`quantizer`)."""
GUARDS: Final = (GUARD, _FIRST_GUARD)
"""The keys that folders have: of the second kind are those that were written before 2026-11-28."""
UNKNOWN_DIGEST: Final = "0" * 64
"""Stands where a digest will, while a file is being written."""

_MAX_FEATURES: Final = 1 << 31
_MAX_EXPERTS: Final = 1 << 16
_EXPERT: Final = re.compile(r"0|[1-9][0-9]{0,4}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_STORED_DTYPES: Final = {"int32": "I32", "float32": "F32", "float16": "F16", "int16": "I16", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class Stack:
    """A tensor of the original that holds the matrices of all experts.

    tensor       its name
    shape        (experts, out_features, in_features), or (experts, in_features, out_features) if it is transposed
    flat         whether it has two dimensions, the first two of these in one: the matrices lie one below the other
    """

    tensor: str
    shape: tuple[int, int, int]
    transposed: bool
    flat: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The tensor's own shape."""
        experts, rows, columns = self.shape
        return (experts * rows, columns) if self.flat else self.shape

    @property
    def matrix(self) -> tuple[int, int]:
        """(out_features, in_features) of every expert."""
        _, rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def base(self) -> str:
        """What its modules' names begin with, before the expert's number."""
        return self.tensor.removesuffix(".weight")

    @property
    def modules(self) -> list[str]:
        """The modules that its matrices are stored as, by expert."""
        return [f"{self.base}.{expert}" for expert in range(self.shape[0])]

    def expert(self, module: str) -> int:
        """The number of one of its modules."""
        return int(module.rpartition(".")[2])

    def span(self, expert: int) -> tuple[int, int]:
        """Where an expert's matrix begins and ends in the tensor's first dimension."""
        rows = self.shape[1] if self.flat else 1
        return expert * rows, (expert + 1) * rows


@dataclass(frozen=True)
class PackedInfo:
    """A compressed weight, before any of it is read.

    format      how it is stored
    shape       (out_features, in_features) of the weight that it stands for; of an embedding (its rows, their length)
    stack       the original's tensor that it is one matrix of; None if it has a tensor of its own
    embedding   whether its rows are looked up, rather than its module a linear layer
    """

    format: Format
    shape: tuple[int, int]
    stack: Stack | None = None
    embedding: bool = False

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

    @property
    def since_version(self) -> int:
        """The lowest version, of those with digests, that can describe it."""
        if self.stack is not None and self.stack.flat:
            return _FLAT_SINCE
        return _EMBEDDINGS_SINCE if self.embedding else _DIGESTS_SINCE


def stored_name(module: str, part: str) -> str:
    """The name under which a part of a compressed module's weight is stored.

    The codes take the weight's own name: a reader that does not know this format then finds a tensor of the wrong
    shape and fails, where under a new name it would find nothing and start from random weights.
    """
    return f"{module}.weight" if part == CODES else f"{module}.weight_{part}"


@dataclass(frozen=True)
class Described:
    """What one file's metadata says.

    packed    module -> its compressed weight
    digests   stored name -> SHA-256 in hexadecimal digits; of all tensors, some, or none in version 1
    """

    packed: dict[str, PackedInfo]
    digests: dict[str, str]


def heading(name: str, info: TensorInfo, module: PackedInfo | None) -> bytes:
    """What is hashed before a tensor's bytes: a line of JSON that says what they are.

    module   the compressed weight that it is a part of; None for a dense tensor
    """
    facts: list[Any] = [name, info.dtype, list(info.shape)]
    if module is not None:
        facts += [module.format.spec, list(module.shape)]
        if stack := module.stack:
            facts += [stack.tensor, list(stack.stored_shape), stack.transposed]
        if module.embedding:
            facts.append("embedding")
    return json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def quantization_config(
    format: Format,
    settings: Mapping[str, str],
    dense: list[str],
    overrides: Mapping[str, Format] | None = None,
    version: int = _DIGESTS_SINCE,
) -> dict[str, Any]:
    """The ``quantization_config`` of a packed checkpoint.

    settings    how it was encoded (`Family.defaults`), for the record: decoding does not depend on it
    dense       linear modules that are not compressed
    overrides   module -> format, where it is not `format`
    version     `written_version` of all that is compressed
    """
    config = {
        "quant_method": QUANT_METHOD,
        "format_version": version,
        "format": format.to_dict(),
        **settings,
        "modules_to_not_convert": sorted(dense),
    }
    if overrides:
        config["overrides"] = {module: overrides[module].to_dict() for module in sorted(overrides)}
    return config


def version_of(formats: "Iterable[Format]") -> int:
    """The lowest version that can hold these formats."""
    return max((family_of(format).since_version for format in formats), default=1)


def written_version(packed: "Iterable[PackedInfo]") -> int:
    """The version of what is written: the lowest that describes all of it, so that older packages read all that they can."""
    return max((info.since_version for info in packed), default=_DIGESTS_SINCE)


def guarded(fusions: Mapping[str, Any] | None) -> dict[str, Any]:
    """A model's ``fusion_config`` with the guard in it, which is off: its value is false."""
    return {**{name: value for name, value in (fusions or {}).items() if name not in GUARDS}, GUARD: False}


def metadata(packed: Mapping[str, PackedInfo], digests: Mapping[str, str]) -> dict[str, str]:
    """The safetensors metadata of a file that holds these compressed modules.

    digests   stored name -> SHA-256 of its `heading` and bytes, of any tensors
    """
    table: dict[str, Any] = {
        "format_version": written_version(packed.values()),
        "tensors": {
            name: {"shape": list(info.shape), "format": info.format.spec, **({"embedding": True} if info.embedding else {})}
            for name, info in packed.items()
        },
    }
    stacks = {info.stack.tensor: info.stack for info in packed.values() if info.stack}
    if stacks:
        table["stacks"] = {
            name: {
                "shape": list(stack.stored_shape),
                "transposed": stack.transposed,
                **({"experts": stack.shape[0]} if stack.flat else {}),
            }
            for name, stack in stacks.items()
        }
    table["sha256"] = dict(digests)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    return {"format": "pt", METADATA_KEY: text}


_KEYS: Final = ("quant_method", "format_version", "format", "modules_to_not_convert", "overrides")
"""Of quantization_config, beside settings of encoding."""


def read_quantization_config(config: Mapping[str, Any], where: str) -> tuple[Format, dict[str, Format]]:
    """The format and its overrides from a config.json, CheckpointError unless it is as `quantization_config` writes it."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: has no quantization_config; this is not a compressed model")
    where += ", quantization_config"
    if section.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{where}: quant_method must be {QUANT_METHOD!r}, got {section.get('quant_method')!r:.80}")
    _check_version(section.get("format_version"), where)
    if any((config.get("fusion_config") or {}).get(guard, False) is not False for guard in GUARDS):
        raise CheckpointError(f"{where}: the guard in fusion_config must be false")
    dense = section.get("modules_to_not_convert")
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        raise CheckpointError(f"{where}: modules_to_not_convert must be a list of names")
    overrides = section.get("overrides", {})
    if not isinstance(overrides, dict):
        raise CheckpointError(f"{where}: overrides must map modules to formats")
    if odd := next(filter(CONTROL.search, overrides), None):
        raise CheckpointError(f"{where}: {odd!r:.80} has a control character in it")
    try:
        format = format_from_dict(section.get("format"))
        others = {name: format_from_dict(data) for name, data in overrides.items()}
        formats = list({format, *others.values()})
        family = family_of(format)  # version 1 had to have them
        known = {name: section.get(name) for name in family.defaults if name in section or family.since_version == 1}
        known |= {name: value for name, value in section.items() if name not in (*known, *_KEYS)}
        check_settings(formats, known)
    except FormatError as reason:
        raise CheckpointError(f"{where}: {reason}") from None
    if section["format_version"] < version_of(formats):
        raise CheckpointError(
            f"{where}: format_version must be {version_of(formats)} for {format.spec}, got {section['format_version']}"
        )
    return format, others


def read_metadata(strings: Mapping[str, str], where: str) -> Described:
    """What one file's metadata describes; nothing if it has no such key. Raises CheckpointError."""
    if METADATA_KEY not in strings:
        return Described({}, {})
    data = parse_json(strings[METADATA_KEY], f"{where}, {METADATA_KEY}", CheckpointError)
    if not isinstance(data, dict) or not {"format_version", "tensors"} <= set(data):
        raise CheckpointError(f"{where}: {METADATA_KEY} must have format_version and tensors, and may have stacks and sha256")
    _check_version(data["format_version"], where)
    known = {"format_version", "tensors", "stacks"} | ({"sha256"} if data["format_version"] > 1 else set())
    if not set(data) <= known:
        raise CheckpointError(f"{where}: {METADATA_KEY} must not have {min(set(data) - known)!r:.80}")
    if not all(isinstance(data.get(key, {}), dict) for key in known - {"format_version"}):
        raise CheckpointError(f"{where}: {METADATA_KEY}'s tensors, stacks and sha256 must map names to what they are")
    for name in (name for key in known - {"format_version"} for name in data.get(key, {})):
        if CONTROL.search(name):
            raise CheckpointError(f"{where}: {name!r:.80} has a control character in it")
    stacks = _read_stacks(data.get("stacks", {}), data["format_version"], where)
    packed: dict[str, PackedInfo] = {}
    formats: dict[str, Format] = {}
    for module, item in data["tensors"].items():
        if not isinstance(item, dict) or set(item) - {"embedding"} != {"shape", "format"}:
            raise CheckpointError(f"{where}: {module} must have shape and format")
        embedding = "embedding" in item
        if embedding and (item["embedding"] is not True or data["format_version"] < _EMBEDDINGS_SINCE):
            raise CheckpointError(
                f"{where}: {module}: embedding must be true, and is known from format_version {_EMBEDDINGS_SINCE} on"
            )
        shape, spec = _read_shape(item["shape"], 2, module, where), item["format"]
        text = spec if isinstance(spec, str) else f"{spec!r:.80}"
        if text not in formats:
            formats[text] = _read_format(text, module, where)
        if formats[text].spec != spec:
            raise CheckpointError(f"{where}: {module}: the format must be written {formats[text].spec!r}, got {spec!r:.80}")
        stack = _stack_of(module, stacks)
        if stack and stack.matrix != shape:
            raise CheckpointError(f"{where}: {module} must be {[*stack.matrix]}, as in {stack.tensor}, got {[*shape]}")
        if stack and embedding:
            raise CheckpointError(f"{where}: {module} is a matrix of the stack {stack.tensor}, and no embedding")
        packed[module] = PackedInfo(formats[text], (shape[0], shape[1]), stack, embedding)
    for stack in set(stacks.values()) - {info.stack for info in packed.values()}:
        raise CheckpointError(f"{where}: describes the stack {stack.tensor}, but none of its matrices")
    digests = data.get("sha256", {})
    for name, digest in digests.items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"{where}: the sha256 of {name} must be 64 digits of 0-9a-f, got {digest!r:.80}")
    return Described(packed, digests)


def _read_format(text: str, module: str, where: str) -> Format:
    try:
        return parse_format(text)
    except FormatError as reason:
        raise CheckpointError(f"{where}: {module}: {reason}") from None


def _read_stacks(data: Mapping[str, Any], version: int, where: str) -> dict[str, Stack]:
    """The stacks that one file describes, by what their modules' names begin with."""
    stacks: dict[str, Stack] = {}
    for name, item in data.items():
        keys = set(item) if isinstance(item, dict) else set()
        if keys - {"experts"} != {"shape", "transposed"} or type(item["transposed"]) is not bool:
            raise CheckpointError(f"{where}: the stack {name} must have shape and transposed")
        flat = "experts" in keys
        if flat and (type(item["experts"]) is not int or item["experts"] < 1 or version < _FLAT_SINCE):
            raise CheckpointError(
                f"{where}: the stack {name}: experts must be a positive integer, and is known from format_version "
                f"{_FLAT_SINCE} on, got {item['experts']!r:.80} in version {version}"
            )
        *leading, rows, columns = _read_shape(item["shape"], 2 if flat else 3, name, where)
        experts = item["experts"] if flat else leading[0]
        if experts > _MAX_EXPERTS:
            raise CheckpointError(f"{where}: the stack {name} must have at most {_MAX_EXPERTS} matrices, got {experts!r:.80}")
        if flat and rows % experts:
            raise CheckpointError(
                f"{where}: the rows of the stack {name} must be a multiple of its {experts} experts, got {rows}"
            )
        stack = Stack(name, (experts, rows // experts if flat else rows, columns), item["transposed"], flat)
        if stacks.setdefault(stack.base, stack) != stack:
            raise CheckpointError(f"{where}: the stacks {name} and {stacks[stack.base].tensor} have the same matrices")
    return stacks


def _stack_of(module: str, stacks: Mapping[str, Stack]) -> Stack | None:
    """The stack that a module is a matrix of, by its name."""
    base, _, number = module.rpartition(".")
    stack = stacks.get(base)
    return stack if stack and _EXPERT.fullmatch(number) and int(number) < stack.shape[0] else None


def check_stacks(packed: Mapping[str, PackedInfo], dense: Iterable[str], where: str) -> None:
    """Raise CheckpointError unless every stack has all of its matrices, and nothing else has its name."""
    names = set(dense)
    for stack, count in Counter(info.stack for info in packed.values() if info.stack).items():
        if count < stack.shape[0]:  # as many names as matrices were all of them
            members = {module for module, info in packed.items() if info.stack == stack}
            missing = next(module for module in (f"{stack.base}.{n}" for n in range(count + 1)) if module not in members)
            raise CheckpointError(f"{where}: {missing} is missing, a matrix of the stack {stack.tensor}")
        if stack.tensor in names:
            raise CheckpointError(f"{where}: has {stack.tensor} twice, as a tensor and as codes")


def check_since(packed: Mapping[str, PackedInfo], config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a compressed weight of a kind that the version in config.json did not have.

    Older packages would begin to read such a folder.
    """
    version = config["quantization_config"]["format_version"]
    newer = {module: info for module, info in packed.items() if info.since_version > max(version, _DIGESTS_SINCE)}
    for module, info in newer.items():
        kind = "an embedding in codes" if info.embedding else "a matrix of a stack of two dimensions"
        raise CheckpointError(
            f"{where}: {module} is {kind}, for which config.json's format_version must be {info.since_version}, got {version}"
        )


def side_endings(formats: Iterable[Format]) -> tuple[str, ...]:
    """What the names of these formats' parts end in, but for codes, which have the weight's name."""
    endings = {stored_name("", part) for format in formats for part in format.parts(1, 1)}
    return tuple(sorted(endings - {stored_name("", CODES)}))


def reason_like_part(name: str, info: TensorInfo, endings: tuple[str, ...]) -> str | None:
    """Why a dense tensor would be taken for a part of a compressed weight; None if it would not.

    endings   the `side_endings` of all formats of its model
    """
    if name.endswith(endings):
        return f"its name ends in {next(end for end in endings if name.endswith(end))}"
    if info.dtype == "I32" and name.endswith(stored_name("", CODES)):
        return f"its name ends in {stored_name('', CODES)} and it holds {info.dtype}"
    return None


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
        raise CheckpointError(f"{where}: format_version must be a positive integer, got {version!r:.80}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {version} is newer than this package reads ({FORMAT_VERSION}): pip install -U seedlm"
        )
