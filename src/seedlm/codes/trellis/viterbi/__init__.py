"""The encoder's core: the cyclic streams whose values come nearest to some targets, by the Viterbi algorithm.

The same bits come out on every device, for any split of a batch: costs are integers (`cost`), ties go to the smallest bits.
"""

import importlib
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.family import SEARCHES
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat
from seedlm.codes.trellis.viterbi.cost import row_roots
from seedlm.errors import BackendError, TensorError

OVERLAPS: Final = {16: 64, 12: 32}
"""By state bits: rows on each side of a stream's seam that decide which state it closes with. On N(0,1) 64 rows leave 1 % less
error than 32 for 17 % more work; with 12-bit states 0.4 % (docs/log/encoder.md)."""


def viterbi(
    targets: Tensor,
    valid: int,
    format: TrellisFormat,
    *,
    row_weights: Tensor | None = None,
    overlap: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Encode sequences: one per column and strip of a matrix.

    targets     float32 [N, T'], finite: transformed weights over their row's scale, in units of the state values
                (standard deviation about 148); T' a multiple of 32
    valid       rows from here on may take any value, 1 .. T'
    row_weights float32 [T'] or [N, T'], what a row's squared error counts, None for 1 each. The usual one should be about 1:
                roots are rounded to eighths from 1/8 to 8
    overlap     at most this many rows on each side of the seam are looked at before, `OVERLAPS` if None; at most T' / 2 are
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
    overlap = OVERLAPS[format.state_bits] if overlap is None else overlap
    if overlap < 8 or overlap % 8:
        raise ValueError(f"overlap must be a multiple of 8 from 8 up, got {overlap}")
    overlap = min(overlap, targets.shape[1] // 2)
    search = search_backend(backend, targets.device)
    roots = _roots(targets, valid, row_weights)
    if hasattr(search, "encode"):
        return search.encode(targets, roots, format.trellis, overlap)
    words = codec.pack(search.search(targets, roots, format.trellis, overlap), format.rate)
    return words, codec.decode_streams(words, format.trellis)


def _roots(targets: Tensor, valid: int, row_weights: Tensor | None) -> Tensor:
    """Roots float32 [N, T'] of the rows' weights, 0 from row `valid` on."""
    if row_weights is None:
        roots = torch.ones(targets.shape[1], device=targets.device)
    elif row_weights.dtype != torch.float32 or row_weights.shape not in (targets.shape, targets.shape[1:]):
        raise TensorError(
            f"row_weights must be float32 {[*targets.shape[1:]]} or {[*targets.shape]}, "
            f"got {row_weights.dtype} {[*row_weights.shape]}"
        )
    else:
        roots = row_roots(row_weights)
    if valid < targets.shape[1]:
        roots[..., valid:] = 0
    return roots.expand(targets.shape)


def search_backend(backend: str, device: torch.device) -> ModuleType:
    """The module that searches, by its name or "auto". Raises BackendError with the reason if it cannot run."""
    if backend != "auto" and backend not in SEARCHES:
        raise BackendError(f"unknown backend {backend!r}; known: auto, {', '.join(SEARCHES)}")
    name = choose(device) if backend == "auto" else backend
    if (reason := reason_no_search(name, device)) is not None:
        raise BackendError(f"the {name} search cannot run here: {reason}")
    return _load(name)


def choose(device: torch.device) -> str:
    """The fastest search that runs on tensors of a device."""
    return next(name for name in SEARCHES if reason_no_search(name, device) is None)


def reason_no_search(name: str, device: torch.device) -> str | None:
    """Why a search cannot run on tensors of a device, or None."""
    if name == "reference":
        return None
    try:
        return _load(name).reason_unavailable(device)
    except ImportError as error:
        return f"{error.name} is not installed (pip install {error.name})"


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
