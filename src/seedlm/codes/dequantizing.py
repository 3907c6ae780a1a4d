"""What a backend inherits that only knows how to dequantize: the product is torch's, with a weight that is formed for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seedlm.codes.base import Format


class DequantizingBackend:
    """The rest of a `base.LinearBackend` whose `prepare` and `dequantize` are there."""

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def empty_transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        """None: x is read as it is."""
        return []

    def transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        return []

    def linear(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        format: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        transformed: Sequence[Tensor] = (),
    ) -> Tensor:
        """`torch.nn.functional.linear` with the weight in x's dtype."""
        return torch.nn.functional.linear(x, self.dequantize(prepared, format, shape, x.dtype), bias)
