"""The block code's backend on CPUs, compiled by numba at the first use.

By the number of tokens, for formats that `lanes` serves (all presets):

    to `_FEW`   decoded and multiplied in registers, in float32
    more       a tile of rows at a time is formed in x's dtype for torch's product

For other formats the weight is formed by `numba_dequantize`, in x's dtype.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Final, NamedTuple, cast

import torch
from torch import Tensor

from seedlm.codes import on_cpu
from seedlm.codes.base import CODES, Format
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.block.kernels import lanes
from seedlm.codes.dequantizing import DequantizingBackend
from seedlm.codes.on_cpu import KINDS, PIECE
from seedlm.codes.threads import Kernel, kernel

_MAKERS: Final = "seedlm.codes.block.kernels.numba_product"

_FEW: Final = 8
"""Tokens that are multiplied in registers; for more a tile of rows at a time is formed for torch's product."""

_AT_ONCE: Final = 4
"""Of them, those that share the decoding of a weight: more have no registers for their sums."""


class NumbaBackend(DequantizingBackend):
    """Prepared: the words as they are stored, the scale of every exponent."""

    name: ClassVar[str] = "numba"

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        return on_cpu.reason_unavailable(self.name, device)

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        assert isinstance(format, BlockFormat)
        scales = lanes.scales(int(parts["exponent_bias"]), format)
        return [parts[CODES], torch.nn.functional.pad(scales, (0, max(0, 16 - len(scales))))]

    def empty_transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        tokens, plan = x.numel() // in_features, _plan(cast(BlockFormat, format), in_features)
        if plan is None or tokens == 0:
            return []
        dtype = x.dtype if tokens > _FEW and x.dtype in KINDS else torch.float32
        return [torch.empty((*x.shape[:-1], plan.width), dtype=dtype, device=x.device)]

    def transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        """X as `numba_product` reads it."""
        x = x.contiguous() if x.dtype in KINDS else x.float().contiguous()
        made, plan = self.empty_transform(x, format, in_features), _plan(cast(BlockFormat, format), in_features)
        if made and plan:
            tokens, (y,) = x.numel() // in_features, made
            numbers = (tokens, x.data_ptr(), KINDS[x.dtype], in_features, plan.groups, plan.size, y.data_ptr(), KINDS[y.dtype])
            plan.arrange.share(numbers, tokens)
        return made

    def linear(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        format: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        transformed: Sequence[Tensor] = (),
    ) -> Tensor:
        plan, tokens = _plan(cast(BlockFormat, format), shape[1]), x.numel() // shape[1]
        if plan is None or tokens == 0:
            return super().linear(x, prepared, format, shape, None if bias is None else bias.to(x.dtype))
        if x.dtype not in KINDS:
            wide = None if bias is None else bias.float()
            return self.linear(x.float(), prepared, format, shape, wide, transformed).to(x.dtype)
        (inputs,) = transformed or self.transform(x, format, shape[1])
        if tokens > _FEW:
            return self._wide(inputs, prepared, plan, shape, bias)
        y, words = x.new_empty(*x.shape[:-1], shape[0]), prepared[0].contiguous()
        bias = None if bias is None else bias.to(y.dtype).contiguous()
        places = (words.data_ptr(), prepared[1].data_ptr(), plan.tables.data_ptr(), 0 if bias is None else bias.data_ptr())
        pieces = max(1, min(shape[0], shape[0] * shape[1] // PIECE))
        for first in range(0, tokens, _AT_ONCE):
            multiply = _product(plan.format, min(_AT_ONCE, tokens - first))
            at = (inputs.data_ptr() + 4 * plan.width * first, y.data_ptr() + first * shape[0] * y.element_size())
            multiply.share((pieces, shape[0], words.shape[1], plan.groups, *places, *at, KINDS[y.dtype]), pieces)
        return y

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from seedlm.codes.block.kernels import numba_dequantize

        assert isinstance(format, BlockFormat)
        words, scales = prepared
        return numba_dequantize.dequantize(words, scales, shape[1], format).to(dtype)

    def _wide(
        self, x: Tensor, prepared: Sequence[Tensor], plan: "_Plan", shape: tuple[int, int], bias: Tensor | None
    ) -> Tensor:
        words, rows = prepared[0].contiguous(), _product(plan.format, 0)

        def form(tile: Tensor, first: int) -> None:
            pieces = min(len(tile), 64)
            scratch = torch.empty(pieces * plan.width, dtype=torch.float32, device=tile.device)
            places = (words[first:].data_ptr(), prepared[1].data_ptr(), plan.tables.data_ptr(), 0, scratch.data_ptr())
            numbers = (pieces, len(tile), words.shape[1], plan.groups)
            rows.share((*numbers, *places, tile.data_ptr(), KINDS[tile.dtype]), pieces)

        return on_cpu.tiled(x, shape[0], 1, form, bias)


class _Plan(NamedTuple):
    """What calls of one format and width have in common. width: of an arranged input, in elements."""

    format: BlockFormat
    arrange: Kernel
    tables: Tensor
    groups: int
    size: int
    width: int


@lru_cache(maxsize=1024)
def _plan(format: BlockFormat, in_features: int) -> _Plan | None:
    """None for a format whose weight is formed."""
    if not lanes.serves(format):
        return None
    groups = lanes.groups(format, in_features)
    with torch.inference_mode(False):
        tables = torch.from_numpy(lanes.tables(format))
    return _Plan(format, kernel(_MAKERS, "arrangement"), tables, groups, format.block_size, groups * 16 * format.block_size)


def _product(format: BlockFormat, tokens: int) -> Kernel:
    numbers = format.seed_bits, format.block_size, format.num_coefficients, format.coefficient_bits, format.exponent_bits
    return kernel(_MAKERS, "product", *numbers, tokens)
