"""The block code's backend on NVIDIA GPUs: products without weights in memory.

By the number of tokens, for the presets (`batch`: but 2.5; `wide`: 4 and 3); weights of other formats are formed:

    1              `vector`: bits of the seeds against 16-bit integer activations on int8 tensor cores
    2 to 16        `batch`: weights formed in half precision on tensor cores
    more           on Hopper `wide`, the same for tiles of tokens, where that is faster (`sources.wide_pays`: tall matrices,
                   up to some hundred tokens); else the weight is formed in x's dtype for torch's product

Relative errors against float64 are 1e-3 and less, outlier channels of a hundred sigma included; a bfloat16 output's own
rounding comes on top. The code has no rotation of the inputs, so activations keep 16 bits. Other formats' weights are formed.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes.base import CODES, Format
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.block.kernels import launch
from seedlm.codes.dequantizing import DequantizingBackend

_FUSED: Final = frozenset(PRESETS.values())
_BATCHED: Final = _FUSED - {PRESETS["2.5"]}
_WIDE: Final = frozenset(PRESETS[bits] for bits in ("4", "3"))
"""What the products, those of more tokens than one, and the one of many, have been held against float64 for on a GPU. Weights
that are formed from seeds of 14 bits are off to one side by 6e-5, which half precision has no place for, and products of an
input that is all alike by up to 3e-3 (docs/log/products_block.md)."""


class CudaBackend(DequantizingBackend):
    """Fused products on devices of compute capability 8.0 and more. Prepared: both parts as they are stored."""

    name: ClassVar[str] = "cuda"

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        if device.type != "cuda":
            return f"backend 'cuda' needs a CUDA device, this is {device}"
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
            return "backend 'cuda' needs an NVIDIA GPU of compute capability 8.0 or more"
        return nvrtc.reason_unavailable()

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        words = parts[CODES]
        launch.counters(nvrtc.index_of(words.device))
        return [words.contiguous(), parts["exponent_bias"]]

    def linear(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        format: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        transformed: Sequence[Tensor] = (),
    ) -> Tensor:
        assert isinstance(format, BlockFormat)
        words, exponent_bias = prepared
        rows = x.reshape(-1, shape[1]).contiguous()
        if len(rows) and rows.dtype in nvrtc.TYPES and format in _FUSED:
            index, vector_loads = nvrtc.index_of(x.device), launch.has_vector_loads(words, format)
            if len(rows) == 1 or (len(rows) <= launch.sources.MOST_BATCH and format in _BATCHED):
                if few := launch.plan(format, shape, len(rows), index, vector_loads):
                    return launch.product(rows, words, exponent_bias, few, bias).view(*x.shape[:-1], shape[0])
            elif (
                format in _WIDE
                and launch.sources.wide_pays(shape, len(rows), nvrtc.processors(index))
                and (many := launch.wide_plan(format, shape[1], len(rows), index, vector_loads))
            ):
                return launch.wide_product(rows, words, exponent_bias, many, bias).view(*x.shape[:-1], shape[0])
        return torch.nn.functional.linear(x, self.dequantize(prepared, format, shape, x.dtype), bias)

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert isinstance(format, BlockFormat)
        words, exponent_bias = prepared
        kernel_dtype = dtype if dtype in nvrtc.TYPES else torch.float32
        weight = torch.empty(shape, dtype=kernel_dtype, device=words.device)
        if weight.numel():
            launch.dequantize(weight, words, exponent_bias, format)
        return weight.to(dtype)
