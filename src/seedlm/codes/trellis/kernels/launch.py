"""The CUDA kernels of the trellis family as functions: sources put together, variants chosen, arguments laid out.

`rotate` turns activations into int8 parts in the transformed basis, `product` multiplies them with a packed weight, and
`dequantize` writes the weight out. The .cu files say how they work and what the tensors hold. What is chosen here (warps,
stages, blocks) is a function of rate, parts and device alone; nothing is tried at run time.
"""

from dataclasses import dataclass
from functools import cache
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
    """Dynamic shared memory of a product: the ring of stages, and the place where a block's warps add up."""
    totals = variant.tiles * 8192 if variant.tiles else variant.warps * parts * 8 * 36 * 4
    return variant.warps * variant.stages * stage_bytes(format) + totals


def choose(format: TrellisFormat, parts: int, arch: int) -> Variant:
    """The product's variant for a format, a number of int8 parts and an architecture. Measured on an H100."""
    tiles = 0 if parts <= 4 else 1 if parts <= 8 else 2
    warps = {0: 16, 1: 12, 2: 8}[tiles]
    wanted = {1: 6, 2: 6, 3: 5, 4: 4}.get(format.rate, 3)
    masks = 3 if format.rate in (3, 5, 6, 7) or format.state_bits != 16 else 0
    for stages in range(wanted, 1, -1):
        variant = Variant(tiles=tiles, warps=warps, stages=stages, masks_by_dot=masks)
        if shared_bytes(format, variant, 4 if tiles == 0 else parts) <= _MOST_SHARED.get(arch, 99) * 1024:
            return variant
    return Variant(tiles=tiles, warps=8, stages=2, masks_by_dot=masks)


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


def rotate_source(format: TrellisFormat, in_features: int, arch: int) -> tuple[str, int, int]:
    """Text, blocks of a token, and warps of a block of the input transform."""
    cluster = 8 if arch >= 90 else 1
    lane = 16 if format.transform > 256 else 8
    pieces = -(-steps(in_features) * STEP // (32 * lane))
    warps = min(16 if cluster > 1 else 32, -(-pieces // cluster))
    rounds = -(-pieces // (cluster * warps))
    defines = (*_decoding(TrellisFormat(rate=1)), *_transforming(format.transform))
    defines += (("WARPS", warps), ("CLUSTER", cluster), ("ROUNDS", rounds))
    return source("rotate", ("decode.cuh", "hadamard.cuh"), defines), cluster, warps


def dequantize_source(format: TrellisFormat, original: bool) -> str:
    defines = (*_decoding(format), *_transforming(format.transform), ("ORIGINAL", int(original)))
    return source("dequantize", ("decode.cuh", "hadamard.cuh"), defines)


def padded(words: Tensor, format: TrellisFormat, in_features: int) -> Tensor:
    """`words` [S, in * R] with columns up to a whole step; the same tensor where that is so already (nearly always)."""
    missing = steps(in_features) * STEP - in_features
    return torch.nn.functional.pad(words, (0, missing * format.rate)) if missing else words


@dataclass(frozen=True)
class Workspace:
    """Where the parts of a product's int32 workspace start, in elements, and how many there are.

    x_parts [steps, parts, 16] as int8, x_scale float [tokens], x_sum [parts], sums [parts, panels * 256], arrived [panels];
    the last two have to be zero before a product and are zero again after it.
    """

    x_scale: int
    x_sum: int
    sums: int
    arrived: int
    size: int

    @staticmethod
    @cache
    def of(out_features: int, in_features: int, tokens: int, parts: int) -> "Workspace":
        x_scale = steps(in_features) * parts * STEP // 4
        x_sum = x_scale + tokens
        sums = x_sum + parts
        arrived = sums + parts * panels(out_features) * 256
        return Workspace(x_scale, x_sum, sums, arrived, arrived + panels(out_features))


def rotate(x: Tensor, format: TrellisFormat, work: Tensor, where: Workspace, exact: bool) -> None:
    """Fill a workspace from x [tokens, in]: its int8 parts in the transformed basis, their scales and sums, and zeros."""
    tokens, in_features = x.shape
    text, cluster, warps = rotate_source(format, in_features, nvrtc.architecture(x.device))
    kernel = nvrtc.load(text, "rotate", "PPPPPiiiiii", device=x.device)
    limit = levels(in_features)
    base = work.data_ptr()
    kernel(
        (tokens * cluster,),
        warps * 32,
        x,
        base,
        base + 4 * where.x_scale,
        base + 4 * where.x_sum,
        base + 4 * where.sums,
        in_features,
        steps(in_features),
        2 * limit + 1 if exact else 0,
        limit,
        TYPES[x.dtype],
        where.size - where.sums,
    )


def product(
    y: Tensor,
    parts: list[Tensor],
    format: TrellisFormat,
    in_features: int,
    work: Tensor,
    where: Workspace,
    exact: bool,
    bias: Tensor | None,
    variant: Variant | None = None,
) -> None:
    """Y [tokens, out] = x W^T + bias from a filled workspace. parts: words [S, steps * 16 * R], scales, scale."""
    words, scales, scale = parts
    tokens, out_features = y.shape
    count = tokens * (2 if exact else 1)
    arch = nvrtc.architecture(y.device)
    variant = variant or choose(format, count, arch)
    shared = shared_bytes(format, variant, count)
    kernel = nvrtc.load(
        product_source(format, variant),
        "product",
        "PPPPPPPPPPiiiiiii",
        device=y.device,
        shared=_MOST_SHARED.get(arch, 99) * 1024,
    )
    base = work.data_ptr()
    processors = torch.cuda.get_device_properties(y.device).multi_processor_count
    grid = min(processors * variant.blocks, -(-panels(out_features) * steps(in_features) // (variant.warps // 4)))
    kernel(
        (grid,),
        variant.warps * 32,
        words,
        base,
        base + 4 * where.x_scale,
        base + 4 * where.x_sum,
        scales,
        scale,
        bias,
        y,
        base + 4 * where.sums,
        base + 4 * where.arrived,
        out_features,
        steps(in_features),
        words.shape[0],
        format.sequence_rows // SEGMENT_ROWS,
        tokens,
        2 * levels(in_features) + 1 if exact else 0,
        TYPES[y.dtype],
        shared=shared,
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
