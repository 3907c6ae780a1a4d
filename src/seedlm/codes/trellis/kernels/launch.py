"""The trellis family's CUDA kernels as functions of tensors.

    plan = product_plan(format, shapes, tokens, dtype, kind, device index)
    product([y], [parts], plan, x, [bias])                         few tokens by weights that share x, if plan.own_input

    inputs = input_plan(format.transform, in_features, tokens, dtype, kind, device index)
    work = torch.empty(inputs.size, dtype=torch.int32, device=...)
    rotate(x, inputs, work)                                        what all products of this x share, else
    product([y], [parts], plan, work, [bias], inputs)              the same, or of many tokens by one weight

A plan holds all that calls of one shape have in common (loaded kernels, grids, offsets), so that a call only launches. On
Hopper each kernel may start while the one before it ends: a product fetches its first weights while `rotate` is at work.

The workspace of `kind` "exact" or "int8" holds x_parts, x_scale, x_sum and the multiples of groups, which products only read.
That of kind "halves", for `gemm`, holds halves, x_scale, and counters, which `rotate` clears and each `gemm` leaves clear:
those of one workspace may follow each other on one stream, not run at once on two. What blocks of a product leave for each
other is new memory of each call.

A weight that was formed in the transformed basis (`dequantize`) is multiplied by what `transform` makes of x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.kernels import sources
from seedlm.codes.trellis.kernels.sources import DEPTH, PANEL_ROWS, STEP, Variant

Kind = Literal["exact", "int8", "halves"]
"""What activations become: 16-bit integers in two int8 parts, or halves, with a scale a token; int8 with one a group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InputPlan:
    """How x [tokens, in] is rotated. Offsets into the workspace are in bytes, its size in int32."""

    tokens: int
    in_features: int
    kind: Kind
    kernel: nvrtc.Kernel
    grid: tuple[int]
    block: int
    numbers: tuple[int, ...]
    x_scale: int
    x_sum: int
    counters: int
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ProductPlan:
    """How x, or a workspace, is multiplied by packed weights that share it."""

    kernel: nvrtc.Kernel
    grid: tuple[int]
    block: int
    numbers: tuple[int, ...]
    shared: int
    members: tuple[tuple[int, int, int, int], ...] = ()
    """Of each weight of `product`: rows, segments, the first of its panels in the line, panels."""
    own_input: bool = False
    """Whether `product` takes x as it is."""
    partials: int = 0
    """32-bit numbers that the blocks of a kernel leave for each other."""


def parts_of_token(kind: Kind) -> int:
    return 2 if kind == "exact" else 1


@lru_cache(maxsize=4096)
def workspace(in_features: int, tokens: int, kind: Kind, index: int) -> tuple[int, int, int, int]:
    """Byte offsets of x_scale, x_sum and counters, and the size in int32. Asks the device for its multiprocessors only."""
    if kind == "halves":
        width = sources.gemm_tokens(tokens)
        x_scale = -(-in_features // DEPTH) * (-(-tokens // width) * width) * DEPTH * 2
        counters = x_scale + -(-4 * tokens // 16) * 16
        return x_scale, 0, counters, counters // 4 + -(-nvrtc.processors(index) // 2) * 4
    parts = tokens * parts_of_token(kind)
    x_scale = sources.steps(in_features) * parts * STEP
    x_sum = x_scale + -(-4 * tokens // 16) * 16
    multiples = x_sum + 32 * parts
    end = multiples + (-(-in_features // sources.GROUP) * -(-4 * tokens // 16) * 16 if kind == "int8" else 0)
    return x_scale, x_sum, end, end // 4


@lru_cache(maxsize=4096)
def input_plan(
    transform: int,
    in_features: int,
    tokens: int,
    dtype: torch.dtype,
    kind: Kind,
    index: int,
    overlap: bool = True,
    origin: sources.Origin = "x",
) -> InputPlan:
    """The plan to rotate x [tokens, in_features] of `dtype`, or what comes of it, on device `index`.

    Raises BackendError if it cannot be compiled.
    """
    halves = kind == "halves"
    x_scale, x_sum, counters, size = workspace(in_features, tokens, kind, index)
    width = sources.gemm_tokens(tokens)
    zeros = size - counters // 4
    few = tokens <= sources.MOST_PARTS
    cluster, warps, _ = sources.rotate_blocks(transform, in_features, nvrtc.architecture(index), few)
    text = sources.rotate_source(
        transform, in_features, nvrtc.TYPES[dtype], parts_of_token(kind), nvrtc.architecture(index), halves, few, origin
    )
    return InputPlan(
        tokens=tokens,
        in_features=in_features,
        kind=kind,
        kernel=nvrtc.load(text, "rotate", "PPPPPPPiiif", device=torch.device("cuda", index), overlap=overlap),
        grid=(tokens * cluster + sources.clearing_blocks(zeros, warps * 32, cluster),),
        block=warps * 32,
        numbers=(zeros, tokens, -(-tokens // width) * width),
        x_scale=x_scale,
        x_sum=x_sum,
        counters=counters,
        size=size,
    )


@lru_cache(maxsize=4096)
def product_plan(
    format: TrellisFormat,
    shapes: tuple[tuple[int, int], ...],
    tokens: int,
    dtype: torch.dtype,
    kind: Kind,
    index: int,
    variant: Variant | None = None,
    overlap: bool = True,
    own_input: bool | None = None,
) -> ProductPlan:
    """The plan of y [tokens, out] = x W^T for weights of these shapes on device `index`, y of `dtype`.

    Several weights share x and so in_features; "halves" take one at a time. variant, overlap, own_input: for benchmarks. Raises
    BackendError if it cannot be compiled.
    """
    out_features, in_features = shapes[0]
    arch, device = nvrtc.architecture(index), torch.device("cuda", index)
    steps = sources.steps(in_features)
    if kind == "halves":
        common = (out_features, steps, format.segments(out_features), sources.strip(format), tokens)
        width = sources.gemm_tokens(tokens)
        stages = sources.gemm_stages(width, arch)
        text = sources.gemm_source(format, width, stages)
        most, processors = sources.most_shared(arch), nvrtc.processors(index)
        tiles, whole, splits = sources.gemm_division(out_features, in_features, tokens, processors)
        pieces = (tiles - whole) * splits
        return ProductPlan(
            kernel=nvrtc.load(text, "gemm", "PPPPPPPPPiiiiiiii", device=device, shared=most, specific=True, overlap=overlap),
            grid=(min(whole + pieces, processors),),
            block=512,
            numbers=(*common, nvrtc.TYPES[dtype], whole, splits),
            shared=stages * sources.gemm_stage_bytes(width) + 1024,
            partials=pieces * 128 * width if splits > 1 else 0,
        )
    parts = tokens * parts_of_token(kind)
    own = sources.own_input(in_features, tokens) if own_input is None else own_input
    own_steps = steps if own else 0
    members, panels = [], 0
    for out_features, _ in shapes:
        members.append((out_features, format.segments(out_features), panels, sources.panels(out_features)))
        panels += sources.panels(out_features)
    variant = variant or sources.choose(format, parts, arch, panels * steps // nvrtc.processors(index), own_steps)
    blocks = sources.product_blocks(panels * steps, nvrtc.processors(index), variant)
    run, longer = divmod(panels * steps, blocks)
    inverse = min((1 << 32) // steps, (1 << 32) - 1)
    return ProductPlan(
        kernel=nvrtc.load(
            sources.product_source(
                format, variant, parts // tokens, len(shapes), (in_features, nvrtc.TYPES[dtype]) if own else None
            ),
            "product",
            f"{{{'PPPPPiiii' * len(shapes)}}}PPPPiiiiiIII",
            device=device,
            shared=sources.most_shared(arch),
            overlap=overlap,
        ),
        grid=(blocks,),
        block=variant.warps * 32 + variant.finishers,
        numbers=(
            steps,
            sources.strip(format),
            tokens,
            sources.half_base(in_features, parts // tokens),
            nvrtc.TYPES[dtype],
            run,
            longer,
            inverse,
        ),
        shared=sources.shared_bytes(format, variant, parts, own_steps),
        members=tuple(members),
        own_input=own,
        partials=2 * min(panels, blocks) * (1 + tokens * PANEL_ROWS),
    )


def rotate(
    x: Tensor,
    plan: InputPlan,
    work: Tensor,
    also: Tensor | None = None,
    weight: Tensor | None = None,
    epsilon: float = 0.0,
) -> None:
    """Fill the workspace of x [tokens, in], contiguous, or of what the plan's origin makes of it.

    also, weight, epsilon: see rotate.cu. A norm adds `also` to x.
    """
    at = work.data_ptr()
    places = at, at + plan.x_scale, at + plan.x_sum, at + plan.counters
    plan.kernel(plan.grid, plan.block, x, also, weight, *places, *plan.numbers, epsilon)


def product(
    ys: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    plan: ProductPlan,
    x: Tensor,
    biases: Sequence[Tensor | None],
    inputs: InputPlan | None = None,
) -> None:
    """Write x W^T + bias to each y [tokens, out], contiguous. weights: parts, see `padded`.

    x is [tokens, in], contiguous, if the plan takes its own input; else the workspace that `inputs` describes.
    """
    partials = torch.empty(plan.partials, dtype=torch.int32, device=x.device) if plan.partials else None
    x_scale = x_sum = 0
    if inputs is not None:
        at = x.data_ptr()
        x_scale, x_sum = at + inputs.x_scale, at + inputs.x_sum
        if inputs.kind == "halves":
            ((words, scales, scale),) = weights
            tensors = (words, at, x_scale, scales, scale, *biases, *ys, partials, at + inputs.counters)
            plan.kernel(plan.grid, plan.block, *tensors, *plan.numbers, shared=plan.shared)
            return
    together = zip(ys, weights, biases, plan.members, strict=True)
    members = [each for y, parts, bias, sizes in together for each in (*parts, bias, y, *sizes)]
    plan.kernel(plan.grid, plan.block, *members, x, x_scale, x_sum, partials, *plan.numbers, shared=plan.shared)


def padded(words: Tensor, format: TrellisFormat, in_features: int) -> Tensor:
    """`words` [S, in * R] with columns up to a whole step, contiguous; the same object where it is so already (mostly)."""
    missing = sources.steps(in_features) * STEP - in_features
    return torch.nn.functional.pad(words, (0, missing * format.rate)) if missing else words.contiguous()


def dequantize(weight: Tensor, parts: Sequence[Tensor], format: TrellisFormat, original: bool) -> None:
    """Write a packed weight to `weight` [out, in], in the model's basis or the transformed one. parts: see `padded`."""
    words, scales, scale = parts
    out_features, in_features = weight.shape
    kernel = nvrtc.load(sources.dequantize_source(format, original), "dequantize", "PPPPiiiiii", device=weight.device)
    lane_numbers = 16 if format.transform > 256 else 8
    kernel(
        (-(-in_features // (4 * 32 * lane_numbers)), words.shape[0]),
        128,
        words,
        scales,
        scale,
        weight,
        out_features,
        in_features,
        sources.steps(in_features),
        words.shape[0],
        sources.strip(format),
        nvrtc.TYPES[weight.dtype],
    )


def rows(parts: Sequence[Tensor], format: TrellisFormat, shape: tuple[int, int], indices: Tensor) -> Tensor:
    """float32 [*indices.shape, in_features], rows in the model's basis; NaN for an index out of range. parts: as stored."""
    words, scales, scale = parts
    out_features, in_features = shape
    y = torch.empty((*indices.shape, in_features), device=words.device)
    if not y.numel():
        return y
    kernel = nvrtc.load(sources.rows_source(format), "rows", "PPPPPiiii", device=words.device)
    chunks = -(-sources.pieces(format.transform, in_features) // 4)
    sizes = out_features, in_features, words.shape[0], sources.strip(format)
    kernel((indices.numel(), chunks), 128, words.contiguous(), scales, scale, indices.to(torch.int64).contiguous(), y, *sizes)
    return y


def transform(x: Tensor, block: int) -> Tensor:
    """Transform x [..., in], contiguous, not empty, by blocks of `block`, in its own dtype."""
    y, width = torch.empty_like(x), x.shape[-1]
    tokens = x.numel() // width
    kernel = nvrtc.load(sources.transform_source(block), "transform", "PPiii", device=x.device)
    kernel((-(-tokens * sources.pieces(block, width) // 8),), 256, x, y, width, tokens, nvrtc.TYPES[x.dtype])
    return y
