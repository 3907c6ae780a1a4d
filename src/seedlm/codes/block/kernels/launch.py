"""The block code's CUDA kernels as functions of tensors.

A plan holds all that calls of one kind have in common (loaded kernels, grids, sizes), so that a call only allocates and
launches. On Hopper each product may start while the kernel before it in the stream ends: it fetches its first weights and
builds its tables meanwhile.

The thread blocks of `vector` and `batch` that share rows count their arrivals in a few integers, zero before and after each
product. Every stream has its own; so two products at once on one stream's integers cannot happen, but for two CUDA graphs
that were captured on the same stream and are replayed at the same time on different ones.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.block.kernels import sources

_STREAMS: Final = 64
_COUNTERS: Final = 512
"""Integers of a stream: more than there are ranges of rows on any device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A product of `tokens` tokens with a weight of one shape, on one device. batch: of which kernel."""

    kernel: nvrtc.Kernel
    division: sources.Division
    batch: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class WidePlan:
    """A product of many tokens. stride: columns of the image."""

    arrange: nvrtc.Kernel
    product: nvrtc.Kernel
    width: int
    chunks: int
    stride: int
    shared: int


@lru_cache(maxsize=64)
def counters(index: int) -> Tensor:
    """The integers of a device's streams. Made by `prepare`, so that no graph's memory pool holds them."""
    with torch.inference_mode(False):
        return torch.zeros(_STREAMS * _COUNTERS, dtype=torch.int32, device=torch.device("cuda", index))


_slots: dict[int, int] = {}


def _own_counters(index: int) -> int:
    """Address of the current stream's integers."""
    stream = torch.cuda.current_stream(index).cuda_stream
    slot = _slots.setdefault(stream, len(_slots) % _STREAMS)
    return counters(index).data_ptr() + slot * _COUNTERS * 4


@lru_cache(maxsize=4096)
def plan(
    format: BlockFormat, shape: tuple[int, int], tokens: int, index: int, vector_loads: bool, overlap: bool = True
) -> Plan | None:
    """The plan for 1 to 16 tokens; None where no kernel serves the format. overlap: for benchmarks.

    vector_loads: see `has_vector_loads`. Raises BackendError if a kernel cannot be compiled.
    """
    arch, device = nvrtc.architecture(index), torch.device("cuda", index)
    if tokens == 1 and sources.reason_no_vector(format) is None:
        division = sources.divide_vector(format, shape, arch, nvrtc.processors(index))
        if division is None:
            return None
        text = sources.vector_source(format, division.warps, vector_loads)
        kernel = nvrtc.load(text, "product", "PPPPPPPiiiiii", device=device, shared=division.shared, overlap=overlap)
        return Plan(kernel=kernel, division=division, batch=False)
    if tokens > sources.MOST_BATCH or sources.reason_no_halves(format) is not None:
        return None
    division = sources.divide_batch(format, shape, tokens, arch, nvrtc.processors(index))
    if division is None:
        return None
    text = sources.batch_source(format, division.warps, vector_loads, tokens)
    kernel = nvrtc.load(text, "product", "PPPPPPPiiiiiii", device=device, shared=division.shared, overlap=overlap)
    return Plan(kernel=kernel, division=division, batch=True)


@lru_cache(maxsize=4096)
def wide_plan(format: BlockFormat, in_features: int, tokens: int, index: int, vector_loads: bool) -> WidePlan | None:
    """The plan for many tokens; None where no kernel serves format or device."""
    if nvrtc.architecture(index) != sources.WIDE_ARCHITECTURE or sources.reason_no_halves(format) is not None:
        return None
    width = sources.wide_tokens(tokens)
    text, device = sources.wide_source(format, vector_loads, width), torch.device("cuda", index)
    shared, chunks = sources.wide_shared(format, width), sources.chunks(format, in_features)
    return WidePlan(
        arrange=nvrtc.load(text, "arrange", "PPPiiii", device=device, specific=True),
        product=nvrtc.load(text, "product", "PPPPPPiiiii", device=device, shared=shared, specific=True),
        width=width,
        chunks=chunks,
        stride=chunks * sources.CHUNK_BLOCKS * format.block_size,
        shared=shared,
    )


def has_vector_loads(words: Tensor, format: BlockFormat) -> bool:
    """Whether four blocks are always 16 aligned bytes."""
    return format.block_bits == 32 and words.shape[1] % 4 == 0 and words.data_ptr() % 16 == 0


def product(x: Tensor, words: Tensor, exponent_bias: Tensor, chosen: Plan, bias: Tensor | None) -> Tensor:
    """The product of x [tokens, in] with a weight: [tokens, out]. All contiguous; bias [out] of x's dtype."""
    rows, row_words = words.shape
    tokens, columns = x.shape
    index = chosen.kernel.device
    division = chosen.division
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    part = torch.empty(division.splits, tokens, rows, dtype=torch.float32, device=x.device)
    numbers = (rows, columns, row_words, division.splits, division.row_splits, nvrtc.TYPES[x.dtype])
    chosen.kernel(
        (division.splits * division.row_splits,),
        division.warps * 32,
        words,
        exponent_bias,
        x,
        bias,
        y,
        part,
        _own_counters(index),
        *numbers,
        *((tokens,) if chosen.batch else ()),
        shared=division.shared,
    )
    return y


def wide_product(x: Tensor, words: Tensor, exponent_bias: Tensor, chosen: WidePlan, bias: Tensor | None) -> Tensor:
    """The same for many tokens."""
    rows, row_words = words.shape
    tokens, columns = x.shape
    tiles = -(-tokens // chosen.width)
    image = torch.empty(tiles * chosen.width, chosen.stride, dtype=torch.float16, device=x.device)
    scales = torch.empty(tiles * chosen.width, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    kind = nvrtc.TYPES[x.dtype]
    chosen.arrange((tiles * chosen.width,), 256, x, image, scales, columns, chosen.chunks, tokens, kind)
    chosen.product(
        (-(-rows // sources.WIDE_ROWS) * 2, tiles),
        384,
        words,
        exponent_bias,
        image,
        scales,
        bias,
        y,
        rows,
        row_words,
        chosen.chunks,
        tokens,
        kind,
        shared=chosen.shared,
    )
    return y


def dequantize(weight: Tensor, words: Tensor, exponent_bias: Tensor, format: BlockFormat) -> None:
    """Write the weight to `weight` [out, in], contiguous, of a dtype in `nvrtc.TYPES`."""
    rows, columns = weight.shape
    kernel = nvrtc.load(
        sources.dequantize_source(format, nvrtc.TYPES[weight.dtype]), "dequantize", "PPPIIIi", device=weight.device
    )
    tasks = rows * -(-columns // (32 * format.block_size))
    whole = columns * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    blocks = min(-(-tasks // 4), 16 * nvrtc.processors(kernel.device))
    kernel((blocks,), 128, words, exponent_bias, weight, rows, columns, words.shape[1], int(whole))
