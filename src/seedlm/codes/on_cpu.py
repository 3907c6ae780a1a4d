"""What the families' CPU backends share: which dtypes kernels know, how work is cut, products of many tokens by tiles."""

import importlib.util
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final

import torch
from torch import Tensor

PIECE: Final = 1 << 15
"""Weights that a thread takes at a time: some microseconds."""

KINDS: Final = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that kernels read and write, and their numbers there; others are converted to float32."""

_TILE_BYTES: Final = 4 << 20
_kept: Final = threading.local()


def reason_unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend that numba compiles cannot run on a device; None if it can."""
    if device.type != "cpu":
        return f"backend {name!r} works on the CPU, the codes are on {device}"
    if not _has_numba():
        return f"backend {name!r} needs numba: pip install numba"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return f"backend {name!r} is compiled by numba, which NUMBA_DISABLE_JIT forbids"
    return None


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None  # looks into folders: 0.2 ms, and it is asked for each layer


@cache
def has_bfloat16_products() -> bool:
    """Whether torch multiplies bfloat16 by oneDNN here. By its own code it takes eight times as long as float32 (AVX2)."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def bits(value: float) -> int:
    """Of a float32, as jobs hold it."""
    found: int = struct.unpack("i", struct.pack("f", value))[0]
    return found


def tiled(x: Tensor, rows: int, step: int, form: Callable[[Tensor, int], None], bias: Tensor | None) -> Tensor:
    """The product x W^T + bias of x [..., in], a tile of W's rows at a time; in float32 where torch is slow in bfloat16.

    rows      of W
    step      a tile has a multiple of so many rows, but for the last
    form      form(tile, first) writes the rows of W from `first` on to a tile [.., in] of x's dtype, or of float32
    """
    if x.dtype == torch.bfloat16 and not has_bfloat16_products():
        return tiled(x.float(), rows, step, form, bias).to(x.dtype)
    most = max(1, _TILE_BYTES // (x.element_size() * x.shape[-1] * step)) * step
    size = min(most, rows) * x.shape[-1] * x.element_size()
    weight = scratch(size)[0][:size].view(x.dtype).view(-1, x.shape[-1])
    if bias is not None:
        bias = bias.to(x.dtype)
    parts = []
    for first in range(0, rows, most):
        tile = weight[: rows - first]
        form(tile, first)
        parts.append(torch.nn.functional.linear(x, tile, None if bias is None else bias[first : first + most]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def scratch(size: int) -> tuple[Tensor, int]:
    """Memory of so many bytes or more and its address, the same at every call of a thread.

    New memory costs more than what is written to it.
    """
    kept: tuple[Tensor, int, int] | None = getattr(_kept, "bytes", None)
    if kept is None or kept[2] < size:
        with torch.inference_mode(False):
            made = torch.empty(size, dtype=torch.uint8, device="cpu")
        kept = _kept.bytes = made, made.data_ptr(), size
    return kept[:2]


@contextmanager
def own_scratch() -> Iterator[None]:
    """In it, `scratch` is memory that this thread is given nowhere else."""
    before = vars(_kept).pop("bytes", None)
    try:
        yield
    finally:
        vars(_kept).pop("bytes", None)
        if before is not None:
            _kept.bytes = before
