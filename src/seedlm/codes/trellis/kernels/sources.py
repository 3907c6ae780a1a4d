"""The texts of the trellis family's CUDA kernels, and which variant serves a format, a size and an architecture. Needs no GPU.

A kernel is its constants, the shared headers and its .cu file, one text after another; the .cu files say how they work and
what their tensors hold. Warps, stages and tiles are functions of rate, parts and architecture alone: nothing is tried at
run time.

    product      a few tokens by packed weights, from x as it is or from what `rotate` makes of it
    rotate       x -> int8 parts in the transformed basis, or halves for `gemm`
    gemm         many tokens, on Hopper's tensor cores
    dequantize   the weight itself
    rows         some of its rows, as an embedding looks them up
    transform    x in the transformed basis, for a weight formed there
"""

from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Final, Literal

from seedlm import nvrtc
from seedlm.codes import hadamard
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat

STEP: Final = 16
"""Columns of a step of `product`; packed weights are padded to whole steps."""

GROUP: Final = 256
"""Columns that share a scale of int8 activations."""

DEPTH: Final = 64
"""Columns of a stage of `gemm`."""

PANEL_ROWS: Final = 256
"""Rows of a panel, eight segments: what a warp of `product` decodes at once."""

MOST_PARTS: Final = 16
"""int8 parts of one product: its tokens, or twice that in exact mode."""

MOST_MEMBERS: Final = 4
"""Weights of one launch of `product`, at most."""

TRANSFORMS: Final = (8, 16, 32, 64, 128, 256, 512)
"""Largest Hadamard blocks that the kernels know."""

_SHARED_KIB: Final = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
_INT32: Final = (1 << 31) - 1
_LARGEST_VALUE: Final = 510
_WHOLE_VALUE_RATES: Final = (1, 2, 4, 8)

_LONG: Final = 144
"""Steps of a block from which on a third stage pays, and two steps a turn where states are masked."""

_OWN_NUMBERS: Final = 1 << 11
"""Activations up to which each block of `product` transforms them all."""

Origin = Literal["x", "norm", "gate"]
"""What `rotate` rotates: x; the RMS norm of a sum; silu(gate) * up."""

_ORIGINS: Final[dict[Origin, int]] = {"x": 0, "norm": 1, "gate": 2}

Defines = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Compile-time choices of `product`.

    tiles          tiles of eight B columns, 0 for the narrow form (up to 4 parts)
    warps          that decode, in a block; a block has a multiprocessor for itself
    finishers      threads beside them that finish rows
    stages         steps of a warp in flight or at work
    unroll         steps of a turn of the loop
    dots           one part, by products of bytes (dp4a) instead of tensor cores
    masks_by_dot   every how many rows a state is masked by the multiplying pipe; 0: none
    """

    tiles: int
    warps: int
    stages: int
    finishers: int = 128
    masks_by_dot: int = 0
    unroll: int = 1
    dots: bool = False


def levels(in_features: int) -> int:
    """Largest int8 magnitude of activations: 127, or less for rows so long that their sum could leave int32."""
    return min(127, _INT32 // (_LARGEST_VALUE * in_features))


def steps(in_features: int) -> int:
    return -(-in_features // STEP)


def panels(out_features: int) -> int:
    return -(-out_features // PANEL_ROWS)


def strip(format: TrellisFormat) -> int:
    """Segments of a full strip."""
    return format.sequence_rows // SEGMENT_ROWS


def needs_neighbours(format: TrellisFormat) -> bool:
    """Whether a segment's successor in its strip can lie in another panel."""
    return PANEL_ROWS % format.sequence_rows != 0


def most_shared(arch: int) -> int:
    """Bytes of dynamic shared memory that a block may ask for, a little left for what kernels declare themselves."""
    return _SHARED_KIB.get(arch, 99) * 1024 - 2048


def own_input(in_features: int, tokens: int) -> bool:
    """Whether `product` takes x as it is: where that is little work for each block (docs/log/products.md)."""
    return in_features * tokens <= _OWN_NUMBERS


def shared_bytes(format: TrellisFormat, variant: Variant, parts: int, own_steps: int = 0) -> int:
    """Dynamic shared memory of `product`: the ring of stages, two places for a panel's sums, and x if it is taken as it is."""
    pitch = 4 * (format.rate + (format.rate % 4 == 0)) + (format.rate % 4 == 2)  # in 16 bytes
    stage = (PANEL_ROWS // SEGMENT_ROWS * pitch + (32 if needs_neighbours(format) else 0)) * 16
    totals = variant.tiles * 32 * 65 * 4 if variant.tiles else variant.warps * parts * 8 * 36 * 4
    return variant.warps * variant.stages * stage + 2 * totals + own_steps * parts * STEP


def choose(format: TrellisFormat, parts: int, arch: int, steps: int = 1 << 30, own_steps: int = 0) -> Variant:
    """The variant for a format, a number of int8 parts, an architecture, the steps of a block, and own_steps of `shared_bytes`.

    Measured on an H100 and an H200 (docs/log/products.md).
    """
    tiles = 0 if parts <= 4 else 1 if parts <= 8 else 2
    even = format.rate in _WHOLE_VALUE_RATES and format.state_bits == 16
    narrow, dots, long = tiles == 0, parts == 1, steps >= _LONG
    if narrow:
        warps = 16 if format.rate <= 2 or (dots and long and format.rate == 3) else 12
    else:
        warps = 12 if tiles == 1 else 8 if format.rate <= 4 else 4
    deep = long and warps == 12
    stages, unroll = 2 if narrow and not deep else 3, 2 if narrow and deep and not even and not dots else 1
    finishers = 256 if narrow and warps == 12 and unroll == 1 and format.rate <= 4 else 128  # 6 and 8 bits would spill
    variant = Variant(
        tiles=tiles,
        warps=warps,
        stages=stages,
        finishers=finishers,
        unroll=unroll,
        masks_by_dot=0 if even or dots else 2,
        dots=dots,
    )
    most = most_shared(arch) - own_steps * parts * STEP
    while shared_bytes(format, variant, 4 if tiles == 0 else parts) > most and variant.warps > 1:
        if variant.stages > 2:
            variant = replace(variant, stages=variant.stages - 1)
        else:
            variant = replace(variant, warps=variant.warps // 2, stages=stages)
    return variant


def product_blocks(steps: int, processors: int, variant: Variant) -> int:
    """Blocks of the grid of `product`: one a multiprocessor, but no more than have a step for a quarter of their warps."""
    return min(processors, -(-steps // max(variant.warps // 4, 1)))


def gemm_tokens(tokens: int) -> int:
    """Tokens of a tile of `gemm`."""
    return 64 if tokens <= 64 else 128 if tokens <= 128 else 256


def gemm_stages(width: int, arch: int) -> int:
    """Stages of `gemm`, of 128 rows and `width` tokens, that shared memory holds."""
    return min(6, (most_shared(arch) - 1024) // gemm_stage_bytes(width))


def gemm_stage_bytes(width: int) -> int:
    return (128 + width) * DEPTH * 2


def gemm_division(out_features: int, in_features: int, tokens: int, processors: int) -> tuple[int, int, int]:
    """How `gemm` divides its tiles: how many there are, how many of them stay whole, into how many pieces the others are split.

    Tiles that fill all processors stay whole. What is left over would leave some idle: it is split into as many pieces as
    there are processors for, but none so short that adding up takes longer than what is saved (docs/log/products.md).
    """
    tiles, depths = -(-out_features // 128) * -(-tokens // gemm_tokens(tokens)), -(-in_features // DEPTH)
    whole = tiles // processors * processors
    rest = tiles - whole
    if not rest:
        return tiles, whole, 1
    return tiles, whole, max(1, min(processors // rest, isqrt(depths // 2)))


def pieces(transform: int, in_features: int) -> int:
    """Warps' registers that a token fills."""
    return -(-in_features // (32 * (16 if transform > 256 else 8)))


def rotate_blocks(transform: int, in_features: int, arch: int, few: bool) -> tuple[int, int, int]:
    """How `rotate` divides a token: blocks of a cluster, warps of a block, pieces of a warp. Many tokens need no cluster."""
    pieces_of_token = pieces(transform, -(-in_features // DEPTH) * DEPTH)
    cluster = 8 if few and arch >= 90 else 1
    warps = min(16 if cluster > 1 else 32, -(-pieces_of_token // cluster))
    return cluster, warps, -(-pieces_of_token // (cluster * warps))


def clearing_blocks(zeros: int, threads: int, cluster: int) -> int:
    """Blocks of `rotate`, whole clusters, that clear so many int32, four times four in a thread."""
    return -(-zeros // (16 * threads * cluster)) * cluster


@cache
def _text(name: str, headers: tuple[str, ...], defines: Defines) -> str:
    folder = Path(__file__).parent
    constants = "".join(f"#define {key} {value}\n" for key, value in defines)
    return (
        constants + nvrtc.common() + "".join((folder / file).read_text(encoding="utf-8") for file in (*headers, f"{name}.cu"))
    )


def _decoding(format: TrellisFormat, masks_by_dot: int = 0) -> Defines:
    return (
        ("RATE", format.rate),
        ("STATE_BITS", format.state_bits),
        ("MULTIPLIER", f"0x{format.multiplier:08X}u"),
        ("MASKS_BY_DOT", masks_by_dot),
    )


@cache
def _transforming(transform: int) -> Defines:
    """Constants of hadamard.cuh."""
    negative = (hadamard.signs(transform) < 0).int().tolist()
    words = [sum(bit << i for i, bit in enumerate(negative[at : at + 32])) for at in range(0, transform, 32)]
    others = "".join(f"(i) == {i} ? 0x{word:08X}u : " for i, word in enumerate(words) if i)
    return (
        ("HADAMARD", transform),
        ("LANE_NUMBERS", 16 if transform > 256 else 8),
        ("SIGN_WORD(i)", f"({others}0x{words[0]:08X}u)"),
    )


def half_base(in_features: int, parts_each: int) -> int:
    """What the upper part of a 16-bit activation counts; 0 where a token is one part."""
    return 2 * levels(in_features) + 1 if parts_each == 2 else 0


def _quantizing(transform: int, in_features: int, type: int, parts_each: int) -> Defines:
    """Constants of hadamard.cuh and quantize.cuh. type: one of `nvrtc.TYPES`."""
    base = half_base(in_features, parts_each)
    numbers = (("IN", in_features), ("TYPE", type), ("HALF_BASE", base), ("LEVELS", levels(in_features)))
    return (*_transforming(transform), *numbers)


def rotate_source(
    transform: int,
    in_features: int,
    type: int,
    parts_each: int,
    arch: int,
    halves: bool,
    few: bool = True,
    origin: Origin = "x",
) -> str:
    """The text of `rotate` for x of `in_features` and a type of `nvrtc.TYPES`.

    halves: for `gemm`, which takes x as it is; few: see `rotate_blocks`; origin: what is rotated.
    """
    cluster, warps, rounds = rotate_blocks(transform, in_features, arch, few)
    dividing = (
        ("WARPS", warps),
        ("CLUSTER", cluster),
        ("ROUNDS", rounds),
        ("GROUP", GROUP),
        ("HALVES", int(halves)),
        ("SOURCE", _ORIGINS[origin]),
    )
    defines = (*_decoding(TrellisFormat(rate=1)), *_quantizing(transform, in_features, type, parts_each), *dividing)
    return _text("rotate", ("decode.cuh", "hadamard.cuh", "quantize.cuh"), defines)


def product_source(
    format: TrellisFormat,
    variant: Variant,
    parts_each: int,
    members: int = 1,
    own_input: tuple[int, int] | None = None,
) -> str:
    """The text of `product`.

    parts_each: int8 parts of a token; own_input: in_features and type of the x that it takes as it is.
    """
    choices = (
        ("WARPS", variant.warps),
        ("FINISHERS", variant.finishers),
        ("STAGES", variant.stages),
        ("UNROLL", variant.unroll),
        ("TILES", variant.tiles),
        ("DOTS", int(variant.dots)),
        ("GROUPED", int(parts_each == 1)),
        ("GROUP", GROUP),
        ("MEMBERS", members),
        ("NEIGHBOURS", int(needs_neighbours(format))),
        ("OWN_INPUT", int(own_input is not None)),
    )
    defines = (*_decoding(format, variant.masks_by_dot), *choices)
    if own_input is None:
        return _text("product", ("decode.cuh",), defines)
    defines = (*defines, *_quantizing(format.transform, *own_input, parts_each))
    return _text("product", ("decode.cuh", "hadamard.cuh", "quantize.cuh"), defines)


def gemm_source(format: TrellisFormat, width: int, stages: int) -> str:
    """The text of `gemm` for tiles of `width` tokens, with its wgmma, which have to be spelled out.

    They are 128 tokens wide at most: for 256 the compiler wants more registers than each of 512 threads begins with.
    """
    piece, multiplies = min(width, 128), ""
    registers = ", ".join(f"%{i}" for i in range(piece // 2))
    inputs = f"%{piece // 2}, %{piece // 2 + 1}, 1, 1, 1, 0, 0"
    instruction = f"wgmma.mma_async.sync.aligned.m64n{piece}k16.f32.f16.f16 {{{registers}}}, {inputs};"
    for first in range(0, width, piece):
        outputs = ", ".join(f'"+f"(c[{i}])' for i in range(first // 2, (first + piece) // 2))
        multiplies += f'  asm volatile("{instruction}" : {outputs} : "l"(a), "l"(b + {first * DEPTH * 2 // 16}));\n'
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(width // 2))
    multiply = f"""
__device__ __forceinline__ void multiply_tile(float (&c)[{width // 2}], unsigned long long a, unsigned long long b) {{
{multiplies}}}
__device__ __forceinline__ void wait_for_multiplies(float (&c)[{width // 2}]) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" : {outputs} :: "memory");
}}
"""
    return multiply + _text("gemm", ("decode.cuh",), (*_decoding(format), ("TOKENS", width), ("STAGES", stages)))


def dequantize_source(format: TrellisFormat, original: bool) -> str:
    defines = (*_decoding(format), *_transforming(format.transform), ("ORIGINAL", int(original)))
    return _text("dequantize", ("decode.cuh", "hadamard.cuh"), defines)


def rows_source(format: TrellisFormat) -> str:
    return _text("rows", ("decode.cuh", "hadamard.cuh"), (*_decoding(format), *_transforming(format.transform)))


def transform_source(transform: int) -> str:
    return _text("transform", ("decode.cuh", "hadamard.cuh"), (*_decoding(TrellisFormat(rate=1)), *_transforming(transform)))
