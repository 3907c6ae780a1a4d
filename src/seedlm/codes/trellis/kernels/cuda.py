"""The trellis family's backend on NVIDIA GPUs: products without weights in memory.

By the number of tokens:

    to 8 (16 in int8)   `product`: decoded and multiplied on int8 tensor cores; activations as 16-bit integers with a scale for
                        each token (relative error 1e-4 and less), or int8 with one for each 256 columns ("cuda-int8", about
                        6e-3); made by the same launch where they are few
    to 1023, on Hopper  `gemm`, for 16-bit x: decoded into tensor-core tiles, activations rounded to half precision in the
                        transformed basis
    all others          the weight is formed in the transformed basis, in x's dtype, for torch's product
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Literal, cast

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes.base import CODES, Format, Gated, Normed
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.kernels import launch, sources
from seedlm.codes.trellis.kernels.launch import Kind

_GEMM_ARCHITECTURE: Final = 90
_GEMM_TOKENS: Final = 1023
"""From there on forming the weight costs less than `gemm` is slower than cuBLAS (docs/log/products.md)."""


class CudaBackend:
    """Fused products on devices of compute capability 8.0 and more, activations in 16 bits."""

    name: ClassVar[str] = "cuda"
    few: ClassVar[Kind] = "exact"
    """What the activations of a few tokens become."""
    fuses: ClassVar[tuple[torch.dtype, ...]] = tuple(nvrtc.TYPES)

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        if device.type != "cuda":
            return f"CUDA kernels need a CUDA device, this is {device}"
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
            return "CUDA kernels need an NVIDIA GPU of compute capability 8.0 or more"
        assert isinstance(format, TrellisFormat)
        if format.transform not in sources.TRANSFORMS:
            return (
                f"CUDA kernels know transforms of {', '.join(map(str, sources.TRANSFORMS))}, this format has {format.transform}"
            )
        return nvrtc.reason_unavailable()

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        """Words, scales, scale as stored; words of a width that is no multiple of 16 are a padded copy."""
        assert isinstance(format, TrellisFormat)
        return [launch.padded(parts[CODES], format, shape[1]), parts["scales"], parts["scale"]]

    def empty_transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        tokens = x.numel() // in_features
        if (kind := self._shared_kind(x, tokens, in_features)) is None:
            return []
        if kind == "formed":
            return [torch.empty(x.shape, dtype=x.dtype, device=x.device)]
        size = launch.workspace(in_features, tokens, kind, nvrtc.index_of(x.device))[-1]
        return [torch.empty(size, dtype=torch.int32, device=x.device)]

    def transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        """The workspace of `launch`, or x in the transformed basis; [] where products take x as it is, for no tokens and other
        dtypes.
        """
        tokens = x.numel() // in_features
        if (kind := self._shared_kind(x, tokens, in_features)) is None:
            return []
        block = cast(TrellisFormat, format).transform
        if kind == "formed":
            return [launch.transform(x.contiguous(), block)]
        plan = launch.input_plan(block, in_features, tokens, x.dtype, kind, nvrtc.index_of(x.device))
        work = torch.empty(plan.size, dtype=torch.int32, device=x.device)
        launch.rotate(x.contiguous(), plan, work)
        return [work]

    def linear(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        format: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        transformed: Sequence[Tensor] = (),
    ) -> Tensor:
        kind = self._kind(x, x.numel() // shape[1])
        if kind is None:
            return torch.nn.functional.linear(x, self.dequantize(prepared, format, shape, x.dtype), bias)
        transformed = transformed or self.transform(x, format, shape[1])
        if kind != "formed":
            return self._products(x, [prepared], format, (shape,), [bias], kind, transformed)[0]
        weight = torch.empty(shape, dtype=x.dtype, device=x.device)
        launch.dequantize(weight, prepared, cast(TrellisFormat, format), original=False)
        return torch.nn.functional.linear(transformed[0], weight, bias)

    def linears(
        self,
        x: Tensor,
        prepared: Sequence[Sequence[Tensor]],
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """`linear` by several weights: x is transformed once, and one kernel multiplies by all where tokens are few."""
        kind, transformed = self._kind(x, x.numel() // shapes[0][1]), self.transform(x, format, shapes[0][1])
        if kind in ("exact", "int8") and len(shapes) <= sources.MOST_MEMBERS:
            return self._products(x, prepared, format, shapes, biases, cast(Kind, kind), transformed)
        each = zip(prepared, shapes, biases, strict=True)
        return [self.linear(x, weight, format, shape, bias, transformed) for weight, shape, bias in each]

    def fused(
        self,
        source: Tensor | Normed | Gated,
        prepared: Sequence[Sequence[Tensor]],
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """The norm, or the gate, in the kernel that rotates."""
        in_features, block = shapes[0][1], cast(TrellisFormat, format).transform
        origin: sources.Origin
        more: tuple[Tensor | None, Tensor | None, float]
        if isinstance(source, Normed):
            x, origin, more = source.h, "norm", (source.delta, source.weight, source.epsilon)
        elif isinstance(source, Gated):
            x, origin, more = source.gate, "gate", (source.up, None, 0.0)
        else:
            x, origin, more = source, "x", (None, None, 0.0)
        plan = launch.input_plan(block, in_features, 1, x.dtype, self.few, nvrtc.index_of(x.device), origin=origin)
        work = torch.empty(plan.size, dtype=torch.int32, device=x.device)
        launch.rotate(x, plan, work, *more)
        ys: list[Tensor] = []
        for at in range(0, len(shapes), sources.MOST_MEMBERS):
            some = slice(at, at + sources.MOST_MEMBERS)
            ys += self._products(x, prepared[some], format, shapes[some], biases[some], self.few, [work], own_input=False)
        return ys

    def _products(
        self,
        x: Tensor,
        prepared: Sequence[Sequence[Tensor]],
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: Sequence[Tensor | None],
        kind: Kind,
        transformed: Sequence[Tensor],
        own_input: bool | None = None,
    ) -> list[Tensor]:
        trellis, index, in_features = cast(TrellisFormat, format), nvrtc.index_of(x.device), shapes[0][1]
        tokens = x.numel() // in_features
        plan = launch.product_plan(trellis, shapes, tokens, x.dtype, kind, index, own_input=own_input)
        ys = [torch.empty((*x.shape[:-1], out), dtype=x.dtype, device=x.device) for out, _ in shapes]
        if plan.own_input:
            launch.product(ys, prepared, plan, x.contiguous(), biases)
        else:
            inputs = launch.input_plan(trellis.transform, in_features, tokens, x.dtype, kind, index)
            launch.product(ys, prepared, plan, transformed[0], biases, inputs)
        return ys

    def _shared_kind(self, x: Tensor, tokens: int, in_features: int) -> Kind | Literal["formed"] | None:
        """What products of one x share; None for no tokens, other dtypes, and where each product takes x as it is."""
        kind = self._kind(x, tokens)
        few = kind in ("exact", "int8")
        return None if few and sources.own_input(in_features, tokens) else kind

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert isinstance(format, TrellisFormat)
        kernel_dtype = dtype if dtype in nvrtc.TYPES else torch.float32
        weight = torch.empty(shape, dtype=kernel_dtype, device=prepared[0].device)
        if weight.numel():
            launch.dequantize(weight, prepared, format, original=True)
        return weight.to(dtype)

    def _kind(self, x: Tensor, tokens: int) -> Kind | Literal["formed"] | None:
        """How activations are multiplied; None if kernels do not know them, and torch multiplies by the weight."""
        if x.dtype not in nvrtc.TYPES or tokens == 0:
            return None
        if tokens * launch.parts_of_token(self.few) <= sources.MOST_PARTS:
            return self.few
        gemm = x.dtype != torch.float32 and nvrtc.architecture(nvrtc.index_of(x.device)) == _GEMM_ARCHITECTURE
        return "halves" if gemm and tokens <= _GEMM_TOKENS else "formed"


class CudaInt8Backend(CudaBackend):
    """The same with int8 activations, for up to twice the tokens at a price."""

    name: ClassVar[str] = "cuda-int8"
    few: ClassVar[Kind] = "int8"
