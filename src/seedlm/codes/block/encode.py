"""Rows in, packed words out: cuts a matrix into blocks, lets a search find every block's code, packs the codes.

A search is a function ``search(blocks, exponent_bias, format, rounding)`` over float32 [N, C] that yields (codes, scores) of
consecutive blocks as they are proved. All searches return the same bits (`codec`, tie rule), so which one ran is never
recorded. `reason_no_search` is the one place that knows where each can run.

Blocks run along a row, so the k-th blocks of all rows are a column step for error feedback (`codes.feedback`): they are
searched together, and what their codes miss goes into the blocks to their right. Without statistics all blocks are one search,
which is the method as published. A row's importance is of no use: it would scale every candidate of a block alike.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from seedlm.codes.base import CODES, EncodeOptions, Facts, RowErrors, row_sums
from seedlm.codes.block import codec, packing
from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.family import SEARCHES
from seedlm.codes.block.format import BlockFormat, Rounding
from seedlm.codes.block.search import torch_search
from seedlm.codes.feedback import Coefficients, feedback, feedback_for
from seedlm.errors import BackendError, TensorError
from seedlm.progress import Tell

Search = Callable[[Tensor, int, BlockFormat, Rounding], Iterator[tuple[BlockCodes, Tensor]]]

_LARGEST: Final = 1e30
"""Weights with errors fed back into them stay finite in float32 however ill-conditioned X'X is."""


class BlockEncoder:
    """Codes of one matrix (`base.Encoder`): for every block the seed, exponent and coefficients of least error."""

    def __init__(self, format: BlockFormat, facts: Facts, options: EncodeOptions, device: torch.device) -> None:
        self._format, self._backend = format, options.backend
        self._rounding: Rounding = options.settings.get("rounding", "best")  # type: ignore[assignment]  # checked by the family
        self._bias = codec.choose_exponent_bias(torch.tensor([facts.largest]), format)
        load_search(self._backend, device, format)
        self._given = feedback_for(facts, format, device)
        if self._given is not None and facts.largest > _LARGEST:
            raise TensorError(f"a weight of {facts.largest:g} is too large for error feedback, at most {_LARGEST:g} is allowed")

    def rows(self, weight: Tensor, tell: Tell) -> tuple[dict[str, Tensor], RowErrors]:
        words, errors = encode_rows(
            weight, self._bias, self._format, self._rounding, given=self._given, backend=self._backend, on_progress=tell
        )
        return {CODES: words}, errors

    def rest(self) -> dict[str, Tensor]:
        return {"exponent_bias": torch.tensor([self._bias], dtype=torch.int32)}


def encode_rows(
    rows: Tensor,
    exponent_bias: int,
    format: BlockFormat,
    rounding: Rounding = "best",
    *,
    given: Coefficients | None = None,
    backend: str = "auto",
    on_progress: Tell | None = None,
) -> tuple[Tensor, RowErrors]:
    """Compress rows of a matrix (paper Algorithm 3).

    rows       finite float32, float16 or bfloat16 [out, in]
    rounding   how coefficients are chosen (`format.Rounding`)
    given      error feedback from block to block of a row; None: each block by itself, as in the paper
    returns    words int32 [out, words] on the rows' device, and the rows' errors
    Raises BackendError for a backend that cannot run here.
    """
    find = load_search(backend, rows.device, format)
    tell = on_progress or (lambda weights: None)
    rows = rows.detach().float()
    if given is not None:
        codes, errors = _encode_with_feedback(rows, given, find, exponent_bias, format, rounding, tell)
        return packing.pack(*codes, format), errors
    out_features, in_features = rows.shape
    per_row = format.blocks_per_row(in_features)
    padding = per_row * format.block_size - in_features
    rows = _whole_blocks(rows, format)
    pieces, parts = [], []
    for codes, scores in find(rows.reshape(-1, format.block_size), exponent_bias, format, rounding):
        pieces.append(codes)
        parts.append(scores)
        tell(len(scores) * format.block_size)
    seeds, exponents, q = (torch.cat(fields) for fields in zip(*pieces, strict=True))
    codes = BlockCodes(
        seeds.view(out_features, per_row), exponents.view(out_features, per_row), q.view(out_features, per_row, -1)
    )
    words = packing.pack(*codes, format)
    beyond = rows[:, :0]
    if padding:
        beyond = codec.dequantize(BlockCodes(*(field[:, -1] for field in codes)), exponent_bias, format)[:, -padding:]
    summands = torch.cat(parts).view(out_features, per_row), rows.double().square_(), beyond.double().square_()
    scores, squares, tails = (row_sums(part).cpu() for part in summands)
    return words, RowErrors(scores / format.divisor**2 + squares - tails, squares)


def _encode_with_feedback(
    rows: Tensor,
    given: Coefficients,
    find: Search,
    exponent_bias: int,
    format: BlockFormat,
    rounding: Rounding,
    tell: Tell,
) -> tuple[BlockCodes, RowErrors]:
    """Codes [out, blocks of a row] of float32 rows [out, in], one block of all rows after another."""

    def column_of_blocks(target: Tensor, first: int) -> tuple[BlockCodes, Tensor]:
        found = find(_whole_blocks(target, format), exponent_bias, format, rounding)
        codes = BlockCodes(*(torch.cat(fields) for fields in zip(*(codes for codes, _ in found), strict=True)))
        tell(target.numel())
        return codes, codec.dequantize(codes, exponent_bias, format)[:, : target.shape[1]]

    found, coded = feedback(rows, given, column_of_blocks)
    summands = (coded.double() - rows.double()).square_(), rows.double().square_()
    codes = BlockCodes(*(torch.stack(fields, 1) for fields in zip(*found, strict=True)))
    return codes, RowErrors(*(row_sums(part).cpu() for part in summands))


def _whole_blocks(rows: Tensor, format: BlockFormat) -> Tensor:
    """Rows [out, in] padded with zeros to whole blocks."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % format.block_size))


def reason_no_search(backend: str, device: torch.device, format: BlockFormat | None = None) -> str | None:
    """Why a search cannot run for weights on `device` (in `format`, if given); None if it can. "auto" asks for any."""
    if backend == "auto":
        reasons = [reason_no_search(name, device, format) for name in SEARCHES]
        return "; ".join(filter(None, reasons)) if all(reasons) else None
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
            return "backend 'numba' needs numba: pip install numba"
        if format is not None and format.seed_bits > 16:
            return f"backend 'numba' takes at most 16 seed bits, not {format.seed_bits} ({format})"
        return None
    return f"unknown backend {backend!r}, known: auto, {', '.join(SEARCHES)}"


def _reason_no_triton(device: torch.device, format: BlockFormat | None) -> str | None:
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


def load_search(backend: str, device: torch.device, format: BlockFormat) -> Search:
    """A search by name; "auto" is the first that can run. Raises BackendError if it cannot."""
    if reason := reason_no_search(backend, device, format):
        raise BackendError(reason)
    name = next(name for name in SEARCHES if not reason_no_search(name, device, format)) if backend == "auto" else backend
    if name == "triton":
        from seedlm.codes.block.search import triton_search

        return triton_search.search
    if name == "numba":
        from seedlm.codes.block.search import numba_search

        return numba_search.search
    return torch_search.search
