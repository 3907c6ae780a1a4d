"""The CUDA kernels of the trellis family as functions: sources put together, variants chosen, arguments laid out.

`rotate` turns activations into int8 parts in the transformed basis, `product` multiplies them with a packed weight, and
`dequantize` writes the weight out. The .cu files say how they work and what the tensors hold. What is chosen here (warps,
stages, blocks) is a function of rate, parts and device alone; nothing is tried at run time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes import hadamard
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat

STEP: Final = 16
"""Columns of a step; packed weights are padded to whole steps."""

PANEL_SEGMENTS: Final = 8
MOST_PARTS: Final = 16
"""int8 parts of one product: tokens, or twice the tokens in exact mode."""

TRANSFORMS: Final = (8, 16, 32, 64, 128, 256, 512)
"""Largest Hadamard blocks that the kernels know."""

TYPES: Final = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MOST_SHARED: Final = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one block may have, by architecture."""

_INT32: Final = (1 << 31) - 1
_LARGEST_VALUE: Final = 510


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Compile-time choices of the product kernel.

    tiles: tiles of eight B columns, 0 for the narrow form (up to 4 parts); warps of a block; stages: steps that a warp has
    in flight or at work; blocks: how many share a multiprocessor.
    """

    tiles: int
    warps: int
    stages: int
    blocks: int = 1
    masks_by_dot: int = 0


def levels(in_features: int) -> int:
    """Largest int8 magnitude of activations: 127, or less for rows so long that their sum could leave int32."""
    return min(127, _INT32 // (_LARGEST_VALUE * in_features))


def steps(in_features: int) -> int:
    return -(-in_features // STEP)


def panels(out_features: int) -> int:
    return -(-out_features // (SEGMENT_ROWS * PANEL_SEGMENTS))


def needs_neighbours(format: TrellisFormat) -> bool:
    """Whether a segment's successor in its strip can lie in another panel."""
    return PANEL_SEGMENTS % (format.sequence_rows // SEGMENT_ROWS) != 0


def stage_bytes(format: TrellisFormat) -> int:
    pitch = 4 * format.rate + (format.rate in (2, 6))
    return (PANEL_SEGMENTS * pitch + (32 if needs_neighbours(format) else 0)) * 16


def shared_bytes(format: TrellisFormat, variant: Variant, parts: int) -> int:
    """Dynamic shared memory of a product: the ring of stages, and two places for a panel's sums."""
    totals = variant.tiles * 8192 if variant.tiles else variant.warps * parts * 8 * 36 * 4
    return variant.warps * variant.stages * stage_bytes(format) + 2 * totals


def most_shared(arch: int) -> int:
    """Bytes of dynamic shared memory that a block may ask for, a little left for what kernels declare themselves."""
    return _MOST_SHARED.get(arch, 99) * 1024 - 2048


def choose(format: TrellisFormat, parts: int, arch: int) -> Variant:
    """The product's variant for a format, a number of int8 parts and an architecture. Measured on an H100."""
    tiles = 0 if parts <= 4 else 1 if parts <= 8 else 2
    warps = {0: 12, 1: 12, 2: 4}[tiles]
    wanted = {1: 6, 2: 6, 3: 5, 4: 4}.get(format.rate, 3)
    masks = 3 if format.rate in (3, 5, 6, 7) or format.state_bits != 16 else 0
    for stages in range(wanted, 1, -1):
        variant = Variant(tiles=tiles, warps=warps, stages=stages, masks_by_dot=masks)
        if shared_bytes(format, variant, 4 if tiles == 0 else parts) <= most_shared(arch):
            return variant
    return Variant(tiles=tiles, warps=4, stages=2, masks_by_dot=masks)


@cache
def source(name: str, headers: tuple[str, ...], defines: tuple[tuple[str, str | int], ...]) -> str:
    """One kernel's whole text: its constants, its headers, and the .cu file."""
    folder = Path(__file__).parent
    constants = "".join(f"#define {key} {value}\n" for key, value in defines)
    return constants + "".join((folder / file).read_text(encoding="utf-8") for file in (*headers, f"{name}.cu"))


def _decoding(format: TrellisFormat, masks_by_dot: int = 0) -> tuple[tuple[str, str | int], ...]:
    return (
        ("RATE", format.rate),
        ("STATE_BITS", format.state_bits),
        ("MULTIPLIER", f"0x{format.multiplier:08X}u"),
        ("MASKS_BY_DOT", masks_by_dot),
    )


@cache
def _transforming(transform: int) -> tuple[tuple[str, str | int], ...]:
    """Constants of hadamard.cuh."""
    negative = (hadamard.signs(transform) < 0).int().tolist()
    words = [sum(bit << i for i, bit in enumerate(negative[at : at + 32])) for at in range(0, transform, 32)]
    return (
        ("HADAMARD", transform),
        ("LANE_NUMBERS", 16 if transform > 256 else 8),
        ("SIGN_WORDS", ", ".join(f"0x{word:08X}u" for word in words)),
    )


def product_source(format: TrellisFormat, variant: Variant) -> str:
    defines = (
        *_decoding(format, variant.masks_by_dot),
        ("WARPS", variant.warps),
        ("STAGES", variant.stages),
        ("BLOCKS", variant.blocks),
        ("TILES", variant.tiles),
        ("NEIGHBOURS", int(needs_neighbours(format))),
    )
    return source("product", ("decode.cuh",), defines)


def rotate_source(format: TrellisFormat, in_features: int, arch: int, halves: bool = False) -> tuple[str, int, int]:
    """Text, blocks of a token, and warps of a block of the input transform."""
    cluster = 8 if arch >= 90 else 1
    lane = 16 if format.transform > 256 else 8
    pieces = -(-steps(in_features) * STEP // (32 * lane))
    warps = min(16 if cluster > 1 else 32, -(-pieces // cluster))
    rounds = -(-pieces // (cluster * warps))
    defines = (*_decoding(TrellisFormat(rate=1)), *_transforming(format.transform))
    defines += (("WARPS", warps), ("CLUSTER", cluster), ("ROUNDS", rounds), ("HALVES", int(halves)))
    return source("rotate", ("decode.cuh", "hadamard.cuh"), defines), cluster, warps


def dequantize_source(format: TrellisFormat, original: bool) -> str:
    defines = (*_decoding(format), *_transforming(format.transform), ("ORIGINAL", int(original)))
    return source("dequantize", ("decode.cuh", "hadamard.cuh"), defines)


def padded(words: Tensor, format: TrellisFormat, in_features: int) -> Tensor:
    """`words` [S, in * R] with columns up to a whole step; the same tensor where that is so already (nearly always)."""
    missing = steps(in_features) * STEP - in_features
    return torch.nn.functional.pad(words, (0, missing * format.rate)) if missing else words


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a product of some shape on some device needs, worked out once, so that a call only launches.

    The int32 workspace of a call holds, from these elements on: int8 x_parts [steps, parts, 16] at 0, float x_scale [tokens],
    int32 x_sum [parts], int64 sums [tokens, slots * 256]; the last are zero before a product and after it.
    """

    rotate: nvrtc.Kernel
    rotate_grid: tuple[int]
    rotate_block: int
    rotate_numbers: tuple[int, ...]
    product: nvrtc.Kernel
    product_grid: tuple[int]
    product_block: int
    product_numbers: tuple[int, ...]
    product_shared: int
    x_scale: int
    x_sum: int
    sums: int
    size: int


@lru_cache(maxsize=4096)
def plan(
    format: TrellisFormat,
    shape: tuple[int, int],
    tokens: int,
    exact: bool,
    dtype: torch.dtype,
    index: int,
    variant: Variant | None = None,
    overlap: bool = True,
) -> Plan:
    """The plan for y = x W^T with x [tokens, in] of `dtype` on a device. variant, overlap: for benchmarks."""
    out_features, in_features = shape
    device = torch.device("cuda", index)
    arch = nvrtc.architecture(device)
    parts = tokens * (2 if exact else 1)
    variant = variant or choose(format, parts, arch)
    limit = levels(in_features)
    half_base = 2 * limit + 1 if exact else 0
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    grid = blocks_of_product(panels(out_features), steps(in_features), processors * variant.blocks, variant)
    x_scale = steps(in_features) * parts * STEP // 4
    x_sum = x_scale + tokens
    sums = (x_sum + parts + 1) // 2 * 2
    size = sums + tokens * min(panels(out_features), grid) * 256 * 2
    text, cluster, warps = rotate_source(format, in_features, arch)
    numbers = (in_features, steps(in_features) * STEP, half_base, limit, TYPES[dtype], size - sums, 0)
    strip = format.sequence_rows // SEGMENT_ROWS
    return Plan(
        rotate=nvrtc.load(text, "rotate", "PPPPPiiiiiii", device=device, overlap=overlap),
        rotate_grid=(tokens * cluster,),
        rotate_block=warps * 32,
        rotate_numbers=numbers,
        product=nvrtc.load(
            product_source(format, variant),
            "product",
            "PPPPPPPPPiiiiiii",
            device=device,
            shared=most_shared(arch),
            overlap=overlap,
        ),
        product_grid=(grid,),
        product_block=variant.warps * 32 + 128,
        product_numbers=(
            out_features,
            steps(in_features),
            format.segments(out_features),
            strip,
            tokens,
            half_base,
            TYPES[dtype],
        ),
        product_shared=shared_bytes(format, variant, parts),
        x_scale=4 * x_scale,
        x_sum=4 * x_sum,
        sums=4 * sums,
        size=size,
    )


def blocks_of_product(panels: int, steps: int, most: int, variant: Variant) -> int:
    """Blocks of a product's grid: all that run at once, but no more than have a step for a quarter of their warps."""
    return min(most, -(-panels * steps // (variant.warps // 4)))


def rotate(x: Tensor, plan: Plan, work: Tensor) -> None:
    """Fill a workspace from x [tokens, in], contiguous: int8 parts in the transformed basis, their scales, sums, and zeros."""
    at = work.data_ptr()
    plan.rotate(
        plan.rotate_grid, plan.rotate_block, x, at, at + plan.x_scale, at + plan.x_sum, at + plan.sums, *plan.rotate_numbers
    )


def product(y: Tensor, parts: Sequence[Tensor], plan: Plan, work: Tensor, bias: Tensor | None) -> None:
    """Write x W^T + bias to y [tokens, out] from a filled workspace. parts: words [S, steps * 16 * R], scales, scale."""
    words, scales, scale = parts
    at = work.data_ptr()
    plan.product(
        plan.product_grid,
        plan.product_block,
        words,
        at,
        at + plan.x_scale,
        at + plan.x_sum,
        scales,
        scale,
        bias,
        y,
        at + plan.sums,
        *plan.product_numbers,
        shared=plan.product_shared,
    )


def dequantize(weight: Tensor, parts: list[Tensor], format: TrellisFormat, original: bool) -> None:
    """Write a packed weight to `weight` [out, in]: in the model's basis if `original`, else in the transformed one."""
    words, scales, scale = parts
    out_features, in_features = weight.shape
    kernel = nvrtc.load(dequantize_source(format, original), "dequantize", "PPPPiiiiii", device=weight.device)
    lane = 16 if format.transform > 256 else 8
    grid = (-(-in_features // (4 * 32 * lane)), words.shape[0])
    strip = format.sequence_rows // SEGMENT_ROWS
    kernel(
        grid,
        128,
        words,
        scales,
        scale,
        weight,
        out_features,
        in_features,
        steps(in_features),
        words.shape[0],
        strip,
        TYPES[weight.dtype],
    )


def gemm_tokens(tokens: int) -> int:
    """Tokens of a tile."""
    return 64 if tokens <= 64 else 128 if tokens <= 128 else 256


def gemm_source(format: TrellisFormat, width: int, stages: int) -> str:
    count = width // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    instruction = (
        f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.f16.f16 {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
    )
    multiply = f"""
__device__ __forceinline__ void multiply_tile(float (&c)[{count}], unsigned long long a, unsigned long long b) {{
  asm volatile("{instruction}" : {outputs} : "l"(a), "l"(b));
}}
__device__ __forceinline__ void wait_for_multiplies(float (&c)[{count}]) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" : {outputs} :: "memory");
}}
"""
    return multiply + source("gemm", ("decode.cuh",), (*_decoding(format), ("TOKENS", width), ("STAGES", stages)))


def gemm(y: Tensor, x: Tensor, parts: list[Tensor], format: TrellisFormat, bias: Tensor | None) -> None:
    """Fill y [tokens, out] with x W^T + bias, for many tokens."""
    words, scales, scale = parts
    (tokens, out_features), in_features = y.shape, x.shape[1]
    width = gemm_tokens(tokens)
    padded_tokens = -(-tokens // width) * width
    depths = -(-in_features // 64)
    work = torch.empty(depths * padded_tokens * 32 + tokens, dtype=torch.int32, device=y.device)
    base, x_scale = work.data_ptr(), work.data_ptr() + depths * padded_tokens * 128
    arch = nvrtc.architecture(y.device)
    text, cluster, warps = rotate_source(format, in_features, arch, halves=True)
    kernel = nvrtc.load(text, "rotate", "PPPPPiiiiiii", device=x.device)
    kernel(
        (tokens * cluster,),
        warps * 32,
        x,
        base,
        x_scale,
        0,
        0,
        in_features,
        depths * 64,
        0,
        0,
        TYPES[x.dtype],
        0,
        padded_tokens,
    )
    stage = (128 + width) * 128
    stages = min(6, (most_shared(arch) - 1024) // stage)
    kernel = nvrtc.load(
        gemm_source(format, width, stages), "gemm", "PPPPPPPiiiiii", device=y.device, shared=most_shared(arch), specific=True
    )
    tiles = -(-words.shape[0] // 4) * (padded_tokens // width)
    strip = format.sequence_rows // SEGMENT_ROWS
    kernel(
        (min(tiles, torch.cuda.get_device_properties(y.device).multi_processor_count),),
        384,
        words,
        base,
        x_scale,
        scales,
        scale,
        bias,
        y,
        out_features,
        steps(in_features),
        words.shape[0],
        strip,
        tokens,
        TYPES[y.dtype],
        shared=stages * stage + 1024,
    )
