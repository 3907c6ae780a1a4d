"""The encoder's core: the cyclic streams whose values come nearest to some targets, by the Viterbi algorithm.

The same bits come out on every device, for any split of a batch: costs are integers (`cost`), ties go to the smallest bits.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat
from seedlm.errors import BackendError, TensorError

OVERLAP = 32
"""Rows on each side of a stream's seam that decide which state it closes with."""

_BACKENDS = ("cuda", "numba", "reference")
"""Fastest first; modules of this package with `search` and, but for the reference, `reason_unavailable`."""


def viterbi(
    targets: Tensor, valid: int, format: TrellisFormat, *, overlap: int = OVERLAP, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Encode sequences: one per column and strip of a matrix.

    targets     float32 [N, T'], finite: transformed weights over their row's scale, in units of the state values
                (standard deviation about 148); T' a multiple of 32
    valid       rows from here on may take any value, 1 .. T'
    overlap     at most this many rows on each side of the seam are looked at before; at most T' / 2 are
    backend     "cuda", "numba", "reference", or "auto": the fastest that runs where the targets are
    returns     words int32 [N, T' * R / 32] and their values int16 [N, T'], on the device of the targets; on a GPU without
                waiting for it

    Raises TensorError for other inputs, BackendError with the reason if the backend cannot run.
    """
    if targets.dtype != torch.float32 or targets.dim() != 2 or targets.shape[1] % SEGMENT_ROWS or not targets.shape[1]:
        raise TensorError(
            f"targets must be float32 [N, T'] with T' a multiple of {SEGMENT_ROWS}, got {targets.dtype} {tuple(targets.shape)}"
        )
    if not 1 <= valid <= targets.shape[1]:
        raise TensorError(f"valid rows must be 1 .. {targets.shape[1]}, got {valid}")
    if overlap < 8 or overlap % 8:
        raise ValueError(f"overlap must be a multiple of 8 from 8 up, got {overlap}")
    if backend != "auto" and backend not in _BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; known: auto, {', '.join(_BACKENDS)}")
    overlap = min(overlap, targets.shape[1] // 2)
    name = choose(targets.device) if backend == "auto" else backend
    if (reason := reason_unavailable(name, targets.device)) is not None:
        raise BackendError(f"the {name} search cannot run here: {reason}")
    if name == "cuda":
        return _load(name).encode(targets, valid, format.trellis, overlap)
    words = codec.pack(_load(name).search(targets, valid, format.trellis, overlap), format.rate)
    return words, codec.decode_streams(words, format.trellis)


def choose(device: torch.device) -> str:
    """The fastest search that runs on tensors of a device."""
    return next(name for name in _BACKENDS if reason_unavailable(name, device) is None)


def reason_unavailable(name: str, device: torch.device) -> str | None:
    """Why a search cannot run on tensors of a device, or None."""
    if name == "reference":
        return None
    try:
        return _load(name).reason_unavailable(device)
    except ImportError as error:
        return f"{error.name} is not installed"


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
