"""The block code's backends that dequantize: numba on the CPU, plain torch everywhere. Their code is beside this file."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from seedlm.codes.base import CODES, Format
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.dequantizing import DequantizingBackend


class NumbaBackend(DequantizingBackend):
    """On the CPU (`numba_dequantize`). Prepared: the words as they are stored, the scale of every exponent."""

    name: ClassVar[str] = "numba"

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        if device.type != "cpu":
            return f"backend 'numba' works on the CPU, the codes are on {device}"
        if importlib.util.find_spec("numba") is None:
            return "backend 'numba' needs numba: pip install 'seedlm[fast]'"
        return None

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        from seedlm.codes.block.kernels import numba_dequantize

        assert isinstance(format, BlockFormat)
        return [parts[CODES], numba_dequantize.scales(int(parts["exponent_bias"]), format)]

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from seedlm.codes.block.kernels import numba_dequantize

        assert isinstance(format, BlockFormat)
        words, scales = prepared
        return numba_dequantize.dequantize(words, scales, shape[1], format).to(dtype)


class TorchBackend(DequantizingBackend):
    """Anywhere (`torch_dequantize`). Prepared: both parts as they are stored, and the register's tables on their device."""

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
