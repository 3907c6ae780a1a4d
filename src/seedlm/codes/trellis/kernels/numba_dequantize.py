"""The trellis code on a CPU: words to weights in the transformed basis, bit for bit those of `codec.rotated_weight`.

A row of a segment has its window at the same place in every column, so the loop runs along the columns: one or two words, a
shift, the product that mixes, the sum of its bytes, the row's scale. The weight stays in the transformed basis, and the inputs
are transformed instead.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from seedlm.codes import hadamard
from seedlm.codes.base import Format
from seedlm.codes.trellis.format import TrellisFormat


class NumbaBackend:
    """Prepared: the parts as they are stored, the scale of every row."""

    name: ClassVar[str] = "numba"

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        if device.type != "cpu":
            return f"backend 'numba' works on the CPU, the codes are on {device}"
        if importlib.util.find_spec("numba") is None:
            return "backend 'numba' needs numba: pip install 'seedlm[fast]'"
        return None

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        return [parts["words"], parts["scales"].float() * parts["scale"]]

    def empty_transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        return [torch.empty(x.shape, dtype=torch.float32, device=x.device)]

    def transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        """X in the transformed basis, float32."""
        assert isinstance(format, TrellisFormat)
        return [hadamard.forward(x.float(), format.transform)]

    def linear(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        format: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        transformed: Sequence[Tensor] = (),
    ) -> Tensor:
        (rotated,) = transformed or self.transform(x, format, shape[1])
        product = torch.nn.functional.linear(rotated, self._rotated(prepared, format, shape)).to(x.dtype)
        return product if bias is None else product + bias

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert isinstance(format, TrellisFormat)
        return hadamard.inverse(self._rotated(prepared, format, shape), format.transform).to(dtype)

    def _rotated(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
        from seedlm.codes.threads import share_rows
        from seedlm.codes.trellis.kernels.numba_segments import segments

        assert isinstance(format, TrellisFormat)
        words, scales = prepared[0].contiguous().numpy(), prepared[1].numpy()
        weight = torch.empty(shape, dtype=torch.float32)
        strip = format.sequence_rows // 32

        def rows(first: int, last: int) -> None:
            numbers = (format.rate, format.state_bits, format.multiplier, strip)
            segments(words, scales, *numbers, first, last, weight.numpy())

        share_rows(rows, len(words), 32 * shape[1])
        return weight
