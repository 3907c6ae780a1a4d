"""The trellis code's backend in plain torch: it dequantizes by the definition, anywhere."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from seedlm.codes.base import Format
from seedlm.codes.dequantizing import DequantizingBackend
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import TrellisFormat


class TorchBackend(DequantizingBackend):
    """Prepared: the parts as they are stored."""

    name: ClassVar[str] = "torch"

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        return None

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        return [parts[name] for name in format.parts(*shape)]

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert isinstance(format, TrellisFormat)
        words, scales, scale = prepared
        return codec.dequantize(words, scales, scale, format, shape).to(dtype)
