"""What a packed checkpoint is: sizes, bits and errors, read back from the checkpoint itself.

Shapes, formats and sizes come from the files. The errors of the weights cannot be recomputed without the original, so a
run leaves them in ``seedlm_report.json`` beside the weights: squared error and squared norm of each compressed weight, and the
bytes of the original's files. A checkpoint without that file is as good, only its errors are unknown.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from seedlm.codes.registry import FEEDBACK
from seedlm.errors import CheckpointError
from seedlm.storage.checkpoint import Checkpoint, PackedInfo
from seedlm.storage.selection import is_numbered
from seedlm.storage.untrusted import read_json

OWN_TEXT: Final = "own text"
REPORT_NAME: Final = "seedlm_report.json"
_REPORT_VERSION: Final = 1
_MOST: Final = 1e280
"""Of a squared error or norm: squares of float32, 2^62 of them, stay far below, and a folder's sum below float64's end."""


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One compressed weight: bits_per_weight counts all bits of its parts, relative_error is ||W - W^||_F / ||W||_F."""

    module: str
    shape: tuple[int, int]
    format: str
    bits_per_weight: float
    relative_error: float | None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        return self.bits_per_weight * self.weights


@dataclass(frozen=True, kw_only=True)
class Report:
    """A packed checkpoint in numbers.

    source_bytes            the original's weight files on disk; None if not recorded
    bytes                   this checkpoint's weight files on disk, headers included
    compressed_weights      weights that are stored as codes
    dense_weights           numbers that are stored as they were
    bits_per_weight         of the compressed weights, every bit of their tensors counted
    model_bits_per_weight   of the whole model, every byte of the files counted
    relative_error          over all compressed weights together; None if not recorded
    feedback                what errors were weighed by: "none", "own text", with who wrote it if that was another model, or the
                            name of a text that was data; None where nothing is recorded, as of the block code where none was
                            asked for
    """

    folder: str
    source_bytes: int | None
    bytes: int
    compressed_weights: int
    dense_weights: int
    bits_per_weight: float
    model_bits_per_weight: float
    relative_error: float | None
    feedback: str | None
    tensors: list[TensorReport]

    @property
    def outside(self) -> list[TensorReport]:
        """The compressed weights that are in no numbered layer: embeddings, output head and what was included."""
        return [tensor for tensor in self.tensors if not is_numbered(tensor.module)]

    @property
    def calibrated(self) -> bool:
        """Whether this model has seen data that it did not write."""
        own = (
            self.feedback is None or self.feedback in ("none", OWN_TEXT) or self.feedback.startswith(f"{OWN_TEXT}, written by ")
        )
        return not own

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunReport(Report):
    """A packed checkpoint and the run that made it.

    devices             that took part, as torch names them; on a cluster after the machine's name
    phase_seconds       where the time went: ``prepare``, ``compress`` (reading ahead too), ``finish``
    peak_host_bytes     most memory that a process had resident
    peak_device_bytes   most memory that a process held on its GPU
    """

    devices: list[str]
    phase_seconds: dict[str, float]
    peak_host_bytes: int
    peak_device_bytes: int


def recorded(source_bytes: int, errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The content of ``seedlm_report.json``.

    errors   module -> (squared error, squared norm), of which six digits are kept: nobody reads more
    """
    return {
        "format_version": _REPORT_VERSION,
        "source_bytes": source_bytes,
        "tensors": {
            module: {"squared_error": float(f"{error:.6g}"), "squared_norm": float(f"{norm:.6g}")}
            for module, (error, norm) in errors.items()
        },
    }


def inspect_checkpoint(folder: str | Path) -> Report:
    """Describe a packed checkpoint from its headers. Raises CheckpointError if it is damaged; no code is read."""
    checkpoint = Checkpoint.open(folder)
    source_bytes, errors = _read_recorded(Path(folder) / REPORT_NAME, checkpoint.packed)
    weights = sum(info.weights for info in checkpoint.packed.values())
    dense = sum(math.prod(info.shape) for info in checkpoint.dense.values())
    total_bytes = checkpoint.files.nbytes
    feedback = checkpoint.config["quantization_config"].get(FEEDBACK)
    known = bool(checkpoint.packed) and errors.keys() == checkpoint.packed.keys()
    return Report(
        folder=str(folder),
        source_bytes=source_bytes,
        bytes=total_bytes,
        compressed_weights=weights,
        dense_weights=dense,
        bits_per_weight=8 * sum(info.nbytes for info in checkpoint.packed.values()) / weights if weights else 0.0,
        model_bits_per_weight=8 * total_bytes / (weights + dense) if weights + dense else 0.0,
        relative_error=_ratio(*map(math.fsum, zip(*errors.values(), strict=True))) if known else None,
        feedback=feedback if isinstance(feedback, str) else None,
        tensors=[
            TensorReport(
                module=module,
                shape=info.shape,
                format=info.format.spec,
                bits_per_weight=8 * info.nbytes / info.weights,
                relative_error=_ratio(*errors[module]) if module in errors else None,
            )
            for module, info in checkpoint.packed.items()
        ],
    )


def _ratio(squared_error: float, squared_norm: float) -> float:
    """A tensor of zeros is stored exactly."""
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def _read_recorded(path: Path, packed: Mapping[str, PackedInfo]) -> tuple[int | None, dict[str, tuple[float, float]]]:
    if not os.path.lexists(path):
        return None, {}
    data = read_json(path, CheckpointError)
    source_bytes, tensors = data.get("source_bytes"), data.get("tensors")
    if (
        data.get("format_version") != _REPORT_VERSION
        or type(source_bytes) is not int
        or source_bytes < 0
        or not isinstance(tensors, dict)
    ):
        raise CheckpointError(
            f"{path}: must have format_version {_REPORT_VERSION}, source_bytes and tensors; it may be deleted"
        )
    errors = {}
    for module, item in tensors.items():
        values: list[Any] = [item.get("squared_error"), item.get("squared_norm")] if isinstance(item, dict) else [None]
        if module not in packed or not all(type(v) in (float, int) and 0 <= v <= _MOST for v in values):
            raise CheckpointError(f"{path}: {module!r} is not a compressed module with its errors; the file may be deleted")
        errors[module] = (float(values[0]), float(values[1]))
    return source_bytes, errors
