"""The texts of the block code's CUDA kernels, which formats they serve, and how work is divided. Needs no GPU.

A kernel is its constants, the shared headers and its .cu file, one text after another; the .cu files say how they work and
what their tensors hold. Warps, stages and tiles are functions of format, shape and architecture: nothing is tried at run time.

    dequantize   the weight itself; every format
    vector       the product with one token, on int8 tensor cores
    batch        with up to 16 tokens, weights formed in half precision
    wide         with many tokens, on Hopper's tensor cores; `arrange` prepares its activations
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from seedlm.codes.block.format import BlockFormat
from seedlm.codes.block.kernels import tables
from seedlm.codes.block.lfsr import TAPS

CHUNK_BLOCKS: Final = 16
"""Blocks of columns that a warp owns at a time."""

TILE_ROWS: Final = 16
"""Rows of a warp's tile."""

GROUP_TOKENS: Final = 8
"""Tokens of a column group of `batch`."""

MOST_BATCH: Final = 16
"""Tokens that `batch` takes."""

WIDE_ARCHITECTURE: Final = 90
WIDE_ROWS: Final = 256
"""Rows of two thread blocks of `wide`, which form a cluster."""

_TABLE_BYTES: Final = 1 << 16
_SHARED_KIB: Final = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_LARGEST_ACTIVATION: Final = 32512
_INT32: Final = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a product's work is shared out.

    warps        of a thread block; a block owns `warps` chunks of columns
    splits       blocks that share rows
    row_splits   ranges of rows; the grid has splits * row_splits blocks
    shared       bytes of dynamic shared memory
    """

    warps: int
    splits: int
    row_splits: int
    shared: int


def most_shared(arch: int) -> int:
    """Bytes of dynamic shared memory that a block may ask for, a little left for what kernels declare themselves."""
    return _SHARED_KIB.get(arch, 99) * 1024 - 1024


def _common_reason(format: BlockFormat) -> str | None:
    if format.block_size not in (4, 8, 12, 16) or format.block_bits % 2:
        return "blocks of 4, 8, 12 or 16 weights in an even number of bits"
    if format.num_coefficients > 4 or format.exponent_bits > 4:
        return "at most 4 coefficients and 4 exponent bits"
    return None


def reason_no_vector(format: BlockFormat) -> str | None:
    """What `vector` wants that a format has not; None if it can be multiplied."""
    k, p = format.seed_bits, format.num_coefficients
    if reason := _common_reason(format):
        return reason
    if not 9 <= k <= 16 or 16 - k > p:
        return f"registers of {max(9, 16 - p)} to 16 bits"
    largest = _LARGEST_ACTIVATION * (1 - 2.0**-p)
    if largest * 128 * format.block_size * p * -format.coefficient_range[0] > _INT32:
        return "sums of a block within 32 bits"
    return None


def reason_no_halves(format: BlockFormat) -> str | None:
    """What `batch` and `wide` want that a format has not; None if they can form its weights."""
    if reason := _common_reason(format):
        return reason
    if not 12 <= format.seed_bits <= 16 or format.num_coefficients < 2:
        return "registers of 12 to 16 bits and at least 2 coefficients"
    return None


def chunks(format: BlockFormat, in_features: int) -> int:
    return -(-format.blocks_per_row(in_features) // CHUNK_BLOCKS)


def _planes(format: BlockFormat) -> int:
    """Tables of half words: one for each 8 weights."""
    return -(-format.block_size // 8)


def _divide(
    format: BlockFormat, shape: tuple[int, int], arch: int, processors: int, tables: int, per_warp: int
) -> Division | None:
    """The number of warps that leaves fewest idle, and as many ranges of rows as fill the device; None if none fits."""
    count, tiles = chunks(format, shape[1]), -(-shape[0] // TILE_ROWS)
    best, best_busy = None, 0.0
    for warps in (16, 8, 4):
        shared = tables + warps * per_warp
        if shared > most_shared(arch):
            continue
        splits = -(-count // warps)
        resident = 2 if warps < 16 and 2 * (shared + 2048) <= most_shared(arch) else 1
        busy = count / splits * resident
        if busy > best_busy * 1.02:
            ranges = min(tiles, max(1, processors * resident // splits))
            best, best_busy = Division(warps=warps, splits=splits, row_splits=ranges, shared=shared), busy
    return best


def divide_vector(format: BlockFormat, shape: tuple[int, int], arch: int, processors: int) -> Division | None:
    """Two buffers of 64 rows' sums, four a warp, lie beside the table; lines are padded by four."""
    return _divide(format, shape, arch, processors, _TABLE_BYTES + 2 * 64 * 4 * 4, 2 * 64 * 4 * 4)


def divide_batch(format: BlockFormat, shape: tuple[int, int], tokens: int, arch: int, processors: int) -> Division | None:
    """Two buffers of two tiles' sums lie beside the tables, in lines of 20 a token."""
    per_warp = 2 * 2 * _groups(tokens) * GROUP_TOKENS * 20 * 4
    return _divide(format, shape, arch, processors, _planes(format) * _TABLE_BYTES, per_warp)


def _groups(tokens: int) -> int:
    return -(-tokens // GROUP_TOKENS)


def wide_tokens(tokens: int) -> int:
    """Tokens of a tile of `wide`."""
    return 64 if tokens <= 64 else 128 if tokens <= 128 else 256


def wide_stages(format: BlockFormat, width: int) -> int:
    """Stages of `wide` that shared memory holds."""
    return min(8, (most_shared(WIDE_ARCHITECTURE) - 1024 - _planes(format) * _TABLE_BYTES) // (width * 128 + 16))


def wide_shared(format: BlockFormat, width: int) -> int:
    return 1024 + _planes(format) * _TABLE_BYTES + wide_stages(format, width) * (width * 128 + 16)


def wide_pays(shape: tuple[int, int], tokens: int, processors: int) -> bool:
    """Whether `wide` takes less time than forming the weight and torch's product. Rates in microseconds, measured on an H100.

    A thread block of `wide` takes 0.0215 a column whatever else; `dequantize` takes 1.08e-6 a weight; torch's product at
    least 7.1e-7 a weight (memory) or 3.1e-9 a weight and token.
    """
    weights = shape[0] * shape[1]
    blocks = -(-shape[0] // WIDE_ROWS) * 2 * -(-tokens // wide_tokens(tokens))
    return -(-blocks // processors) * shape[1] * 0.0215 < weights * (1.08e-6 + max(7.1e-7, 3.1e-9 * tokens))


def _text(format: BlockFormat, files: tuple[str, ...], others: dict[str, object], extra: str = "") -> str:
    values = {
        "K": format.seed_bits,
        "C": format.block_size,
        "P": format.num_coefficients,
        "QB": format.coefficient_bits,
        "EB": format.exponent_bits,
        **others,
    }
    constants = "".join(f"#define {name} {value}\n" for name, value in values.items())
    folder = Path(__file__).parent
    return constants + extra + "".join((folder / file).read_text(encoding="utf-8") for file in files)


@cache
def dequantize_source(format: BlockFormat, kind: int) -> str:
    """kind: of the weight, as in the kernels."""
    widest = 2 * format.num_seeds * -format.coefficient_range[0] * format.num_coefficients
    taps = ",".join(map(str, TAPS[format.seed_bits]))
    return _text(format, ("dequantize.cu",), {"TAPS": taps, "WIDE": int(widest > _INT32), "OUT": kind})


def _tabled(entries: list[list[int]], warps: int, vector_loads: bool) -> dict[str, object]:
    basis = tables.initializer(entries)
    return {"WARPS": warps, "VECTOR": int(vector_loads), "ENTRY": len(entries[0]), "BASIS": basis}


@cache
def vector_source(format: BlockFormat, warps: int, vector_loads: bool) -> str:
    return _text(format, ("common.cuh", "vector.cu"), _tabled(tables.byte_entries(format), warps, vector_loads))


@cache
def batch_source(format: BlockFormat, warps: int, vector_loads: bool, tokens: int) -> str:
    constants = _tabled(tables.half_entries(format), warps, vector_loads) | {"GROUPS": _groups(tokens)}
    return _text(format, ("common.cuh", "weights.cuh", "batch.cu"), constants)


@cache
def wide_source(format: BlockFormat, vector_loads: bool, width: int) -> str:
    """The texts of `wide` and `arrange` for tiles of `width` tokens, with the wgmma of that width, which is spelled out."""
    constants = _tabled(tables.half_entries(format), 12, vector_loads)
    constants |= {"TOKENS": width, "STAGES": wide_stages(format, width)}
    count = width // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    instruction = (
        f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.f16.f16 {{{accumulators}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"
    )
    wgmma = f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                      unsigned long long b) {{
    asm volatile("{instruction}" : {outputs} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}}
"""
    return _text(format, ("common.cuh", "weights.cuh", "wide.cu"), constants, wgmma)
