"""The block code's backend that serves everything: plain torch, which dequantizes (`torch_dequantize`)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from seedlm.codes.base import CODES, Format
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.dequantizing import DequantizingBackend


class TorchBackend(DequantizingBackend):
    """Prepared: both parts as they are stored, and the register's tables on their device."""

    name: ClassVar[str] = "torch"

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        return None

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        from seedlm.codes.block.kernels import torch_dequantize

        assert isinstance(format, BlockFormat)
        words = parts[CODES]
        return [words, parts["exponent_bias"], *torch_dequantize.tables(format.seed_bits, words.device)]

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from seedlm.codes.block.kernels import torch_dequantize

        assert isinstance(format, BlockFormat)
        words, exponent_bias, cycle, positions = prepared
        return torch_dequantize.dequantize(words, exponent_bias, cycle, positions, shape[1], format, dtype)
