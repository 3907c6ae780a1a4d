"""Weights in, encoded tensor out: cuts a matrix into blocks, lets a backend find every block's code, packs the codes.

A search backend is a function ``search(blocks, exponent_bias, format, rounding)`` over float32 [N, C] that yields
(codes, scores) of consecutive blocks as they are proved. All backends return the same bits (`codec`, tie rule), so which one
ran is never recorded. `reason_unavailable` is the one place that knows where each can run.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from seedlm.codes.block import codec, packing
from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import EXPONENT_BIAS_RANGE, ROUNDINGS, BlockFormat, Format, Rounding, parse_format
from seedlm.codes.block.search import torch_search
from seedlm.errors import BackendError, TensorError

Backend = Literal["auto", "triton", "numba", "torch"]
BACKENDS: Final = ("triton", "numba", "torch")
"""Search backends, fastest first: ``auto`` takes the first that can run."""

Search = Callable[[Tensor, int, BlockFormat, Rounding], Iterator[tuple[BlockCodes, Tensor]]]
Progress = Callable[[int], None]
"""Told the number of weights just finished, any number of times."""


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A weight as it is stored.

    format     how
    shape      (out_features, in_features) of the weight it stands for
    tensors    `format.tensor_specs(*shape)`, name -> tensor
    """

    format: Format
    shape: tuple[int, int]
    tensors: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        specs = self.format.tensor_specs(*self.shape)
        found = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in self.tensors.items()}
        if found != specs:
            raise TensorError(f"a {self.format} weight {[*self.shape]} is stored as {specs}, got {found}")

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] in `dtype`, rebuilt in float32 and rounded once."""
        return decode(self.tensors["words"], int(self.tensors["exponent_bias"]), self.shape[1], self.format).to(dtype)


def decode(words: Tensor, exponent_bias: int, in_features: int, format: BlockFormat) -> Tensor:
    """Rebuild rows from packed words: the reference that every kernel is held against.

    words      int32 [out, words]
    returns    float32 [out, in_features]
    """
    codes = BlockCodes(*packing.unpack(words, format.blocks_per_row(in_features), format))
    return codec.decode(codes, exponent_bias, format).flatten(1)[:, :in_features]


def encode(
    weight: Tensor,
    format: Format | str | float,
    *,
    rounding: Rounding = "best",
    exponent_bias: int | None = None,
    backend: Backend = "auto",
    on_progress: Progress | None = None,
) -> tuple[EncodedTensor, float]:
    """Compress one matrix: for every block the seed, exponent and coefficients of least error (paper Algorithm 3).

    weight          floating point [out_features, in_features], finite, not float64
    format          a format, or anything `parse_format` reads
    rounding        how coefficients are chosen (`format.Rounding`)
    exponent_bias   None picks it from the largest magnitude; 0 is the paper's absolute exponent range
    returns         the encoded tensor, on the weight's device, and ||W - W^||_F^2
    Raises TensorError for a weight that cannot be encoded, BackendError for a backend that cannot run here.
    """
    check_weight(weight)
    format = parse_format(format)
    if rounding not in ROUNDINGS:
        raise TensorError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    low, high = EXPONENT_BIAS_RANGE
    bias = codec.choose_exponent_bias(weight, format) if exponent_bias is None else exponent_bias
    if not low <= bias <= high:
        raise TensorError(f"exponent bias must be {low} .. {high}, got {bias}")
    words, sums = encode_rows(weight, bias, format, rounding, backend=backend, on_progress=on_progress)
    tensors = {"words": words, "exponent_bias": torch.tensor([bias], dtype=torch.int32, device=weight.device)}
    return EncodedTensor(format, (weight.shape[0], weight.shape[1]), tensors), totals([sums], format)[0]


@dataclass(frozen=True, eq=False)
class RowSums:
    """What is known of some rows' errors, float64 [rows] on the CPU, the same bits from every device.

    scores    sum of the row's scores (`codec.score`)
    squares   sum of its squared weights
    tails     sum of the squares that its last block decodes to beyond its end
    """

    scores: Tensor
    squares: Tensor
    tails: Tensor


def encode_rows(
    rows: Tensor,
    exponent_bias: int,
    format: Format,
    rounding: Rounding = "best",
    *,
    backend: Backend = "auto",
    on_progress: Progress | None = None,
) -> tuple[Tensor, RowSums]:
    """Compress rows of a matrix: `encode` without its checks, for a matrix that comes in pieces.

    rows      finite float32, float16 or bfloat16 [out, in]
    returns   words int32 [out, words] on the rows' device, and what `totals` adds up
    Raises BackendError for a backend that cannot run here.
    """
    find = _load(backend, rows.device, format)
    out_features, in_features = rows.shape
    per_row = format.blocks_per_row(in_features)
    padding = per_row * format.block_size - in_features
    rows = rows.detach().float()
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    pieces, parts = [], []
    for codes, scores in find(rows.reshape(-1, format.block_size), exponent_bias, format, rounding):
        pieces.append(codes)
        parts.append(scores)
        if on_progress is not None:
            on_progress(len(scores) * format.block_size)
    seeds, exponents, q = (torch.cat(fields) for fields in zip(*pieces, strict=True))
    codes = BlockCodes(
        seeds.view(out_features, per_row), exponents.view(out_features, per_row), q.view(out_features, per_row, -1)
    )
    words = packing.pack(*codes, format)
    beyond = rows[:, :0]
    if padding:
        beyond = codec.decode(BlockCodes(*(field[:, -1] for field in codes)), exponent_bias, format)[:, -padding:]
    summands = torch.cat(parts).view(out_features, per_row), rows.double().square_(), beyond.double().square_()
    return words, RowSums(*(_row_sums(part).cpu() for part in summands))


def totals(parts: Iterable[RowSums], format: Format) -> tuple[float, float]:
    """Squared error and squared norm of a matrix from all its rows, in whatever order and pieces: sums rounded once."""
    parts = list(parts)
    scores = math.fsum(x for part in parts for x in part.scores.tolist())
    norm = math.fsum(x for part in parts for x in part.squares.tolist())
    tails = math.fsum(x for part in parts for x in part.tails.tolist())
    return max(scores / format.divisor**2 + norm - tails, 0.0), norm


def _row_sums(x: Tensor) -> Tensor:
    """Sums of the rows of float64 [rows, n], which is overwritten: halves are added until one column is left.

    An order of additions that is written out is the same everywhere, which `Tensor.sum` does not promise of any two devices.
    """
    while x.shape[1] > 1:
        few = x.shape[1] // 2
        x[:, :few] += x[:, -few:]
        x = x[:, : x.shape[1] - few]
    return x.sum(1)


def check_weight(weight: Tensor) -> None:
    """Raise TensorError unless this is a finite, non-empty float32, float16 or bfloat16 matrix."""
    if weight.dim() != 2 or not weight.numel():
        raise TensorError(f"a weight must be a non-empty matrix [out_features, in_features], got shape {[*weight.shape]}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TensorError(f"a weight must be float32, float16 or bfloat16, got {str(weight.dtype).removeprefix('torch.')}")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        nan = int(torch.isnan(weight).sum())
        raise TensorError(f"a weight must be finite, got {nan} NaN and {int((~finite).sum()) - nan} Inf values")


def reason_unavailable(backend: str, device: torch.device, format: Format | None = None) -> str | None:
    """Why a search backend cannot run for weights on `device` (in `format`, if given); None if it can."""
    if backend == "torch":
        if format is not None and format.seed_bits > 20:
            return f"backend 'torch' takes at most 20 seed bits, not {format.seed_bits}: tables too large ({format})"
        return None
    if backend == "triton":
        return _reason_no_triton(device, format)
    if backend == "numba":
        if device.type != "cpu":
            return f"backend 'numba' searches on the CPU, the weight is on {device}"
        if importlib.util.find_spec("numba") is None:
            return "backend 'numba' needs numba: pip install 'seedlm[fast]'"
        if format is not None and format.seed_bits > 16:
            return f"backend 'numba' takes at most 16 seed bits, not {format.seed_bits} ({format})"
        return None
    return f"unknown backend {backend!r}, known: auto, {', '.join(BACKENDS)}"


def _reason_no_triton(device: torch.device, format: Format | None) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"backend 'triton' searches on an NVIDIA GPU, the weight is on {device}"
    if importlib.util.find_spec("triton") is None:
        return "backend 'triton' needs triton, which PyTorch's CUDA builds for Linux install"
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"backend 'triton' needs compute capability 8.0 (Ampere) or newer, {device} is a {name}"
    if format is not None:
        limits = {"seed bits": (format.seed_bits, 16), "weights a block": (format.block_size, 16)}
        limits |= {"coefficients": (format.num_coefficients, 4)}
        beyond = [f"{most} {name}, not {value}" for name, (value, most) in limits.items() if value > most]
        if beyond:
            return f"backend 'triton' takes formats of at most {', '.join(beyond)} ({format})"
    return None


def _load(backend: str, device: torch.device, format: Format) -> Search:
    """The search function of a backend; `auto` takes the first that can run."""
    names = BACKENDS if backend == "auto" else (backend,)
    reasons = [reason_unavailable(name, device, format) for name in names]
    if all(reasons):
        raise BackendError("; ".join(filter(None, reasons)))
    name = names[reasons.index(None)]
    if name == "triton":
        from seedlm.codes.block.search import triton_search

        return triton_search.search
    if name == "numba":
        from seedlm.codes.block.search import numba_search

        return numba_search.search
    return torch_search.search
