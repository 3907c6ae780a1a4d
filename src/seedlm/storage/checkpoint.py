"""A packed checkpoint: a model folder in which some weights are codes. What is in it, and every check on an untrusted one.

On disk it is an ordinary Hugging Face folder. Three things make it a packed one (FORMAT.md, "The checkpoint"):

- ``config.json`` has a ``quantization_config`` with the method, version and format;
- each compressed module M stores its `Format.parts` under the names that `stored_name` gives;
- the safetensors metadata key ``seedlm`` tells, for each such module, the shape and format of the weight it stands for.

Experts that the original holds as one stack [experts, ...] are stored as what they are, one matrix for each expert, under the
stack's name and the expert's number; the metadata tells which of them make up a stack (`Stack`).

`Checkpoint.open` stands before every way in: inspecting, loading, evaluating, generating. It reads headers only, without torch,
and checks that these agree with each other and with the sizes of the files before anything is allocated. `Checkpoint.tensor`
reads one weight's codes and checks each of them, `Checkpoint.verify` holds tensors against their digests.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from seedlm.codes.base import Format
from seedlm.codes.registry import family_of
from seedlm.errors import CheckpointError, TensorError
from seedlm.storage.metadata import (
    FORMAT_VERSION,
    GUARD,
    QUANT_METHOD,
    PackedInfo,
    Stack,
    check_since,
    check_stacks,
    guarded,
    heading,
    metadata,
    quantization_config,
    read_metadata,
    read_quantization_config,
    reason_like_part,
    side_endings,
    stored_name,
    version_of,
)
from seedlm.storage.refusals import no_packed_folder
from seedlm.storage.safetensors import TensorFiles, TensorInfo, digest
from seedlm.storage.untrusted import read_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from seedlm.codes.encoded import EncodedTensor

__all__ = [
    "FORMAT_VERSION",
    "GUARD",
    "QUANT_METHOD",
    "Checkpoint",
    "PackedInfo",
    "Stack",
    "check_codes",
    "guarded",
    "metadata",
    "quantization_config",
    "stored_name",
    "version_of",
]

_VERIFYING_THREADS: Final = 16


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
    digests    name -> SHA-256 that a tensor must have, of those that have one (`metadata.heading`)
    """

    folder: Path
    config: dict[str, Any]
    format: Format
    packed: dict[str, PackedInfo]
    dense: dict[str, TensorInfo]
    digests: dict[str, str]
    files: TensorFiles

    @classmethod
    def open(cls, folder: str | Path, files: TensorFiles | None = None) -> "Checkpoint":
        """Open a packed checkpoint. Raises CheckpointError if it is not exactly what FORMAT.md describes.

        files   its weight files, if they are not those that the folder's index names
        """
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise CheckpointError(no_packed_folder(folder))
        if not os.path.lexists(folder / "config.json"):
            raise CheckpointError(f"{folder}: has no config.json; it is not a model folder, or a run that has not finished")
        config = read_config(folder, CheckpointError)
        format, overrides = read_quantization_config(config, f"{folder / 'config.json'}")
        files = files or TensorFiles.open(folder, CheckpointError)
        packed, digests = _join_metadata(files)
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
        check_stacks(packed, found, f"{folder}")
        check_since(packed, config, f"{folder}")
        for module in overrides:
            if module not in packed:
                raise CheckpointError(f"{folder}: config.json gives {module} a format, but it is not a compressed module")
        endings = side_endings({format, *overrides.values()})
        for name, dense in found.items():
            if reason := reason_like_part(name, dense, endings):
                raise CheckpointError(
                    f"{folder}: {name} looks like part of a compressed weight that no metadata describes: {reason}"
                )
        for name in digests:
            if name not in files.entries:
                raise CheckpointError(f"{folder}: {name} is missing, the metadata has its SHA-256")
        return cls(folder, config, format, packed, found, digests, files)

    def verify(self, names: Iterable[str] | None = None, threads: int | None = None) -> None:
        """Hold tensors against their digests. Raises CheckpointError naming one that is not what was written.

        names   of tensors; all by default. One without a digest passes
        """
        owners = {stored_name(module, part): info for module, info in self.packed.items() for part in info.stored}

        def check(name: str) -> None:
            entry = self.files.entries[name]
            known = heading(name, entry.info, owners.get(name))
            if digest(entry.path, entry.offset, entry.info.nbytes, known, CheckpointError) != self.digests[name]:
                raise CheckpointError(
                    f"{entry.path}: {name} is not what was written (its SHA-256 differs from the one in the metadata); "
                    "fetch the file again"
                )

        wanted = sorted(
            (name for name in (self.digests if names is None else names) if name in self.digests),
            key=lambda name: -self.files.entries[name].info.nbytes,
        )
        with ThreadPoolExecutor(threads or min(_VERIFYING_THREADS, os.cpu_count() or 1)) as pool:
            try:
                for _ in pool.map(check, wanted):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)

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
            elif info.stack.expert(module) == 0:
                matrices = torch.stack([self.tensor(expert).dequantize(dtype) for expert in info.stack.modules])
                matrices = matrices.mT.contiguous() if info.stack.transposed else matrices
                yield info.stack.tensor, matrices.view(info.stack.stored_shape)
        for name in self.dense:
            yield name, self.files.read(name)


def _join_metadata(files: TensorFiles) -> tuple[dict[str, PackedInfo], dict[str, str]]:
    """The compressed modules and digests that all files together describe. CheckpointError if two contradict each other."""
    packed: dict[str, PackedInfo] = {}
    digests: dict[str, str] = {}
    for path, strings in files.metadata.items():
        described = read_metadata(strings, f"{path}, metadata")
        for module, info in described.packed.items():
            if packed.setdefault(module, info) != info:
                raise CheckpointError(f"{path}: describes {module} otherwise than another shard does")
        for name, known in described.digests.items():
            if digests.setdefault(name, known) != known:
                raise CheckpointError(f"{path}: has another SHA-256 of {name} than another shard")
    return packed, digests
