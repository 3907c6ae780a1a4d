"""A linear layer whose weight stays packed.

`SeedLinear` holds the tensors of `format.tensor_specs` as buffers under the names they have in a checkpoint, so its state
dict is what is stored, and regrows the weight in every forward pass. `.to(dtype)` and `.half()` move the bias and leave the
codes alone. Mind that its `weight` is therefore the packed words, int32; the weight itself is `decode()`.
"""

from typing import Final, TypeGuard

import torch
from torch import Tensor, nn

from seedlm.codes.block.encode import Backend, EncodedTensor, Progress, encode
from seedlm.codes.block.format import Format, Rounding, parse_format
from seedlm.inference import ops
from seedlm.storage.checkpoint import PackedInfo, check_codes, stored_name

_TWINS: Final = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear that compute the same, written out."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a `SeedLinear` can take a module's place: other subclasses of nn.Linear do something else with their weight."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in _TWINS)


class SeedLinear(nn.Module):
    """y = x W^T + bias with W regrown from its codes.

    bias      None or a parameter [out_features]
    backend   how to decode (`ops.BACKENDS`), "auto" or by name
    New codes are all zero, which is not a valid weight: they are meant to be loaded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: ops.Backend = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format, self.backend = in_features, out_features, format, backend
        specs = format.tensor_specs(out_features, in_features)
        self._names = [stored_name("", part).removeprefix(".") for part in specs]
        for name, (code_dtype, shape) in zip(self._names, specs.values(), strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, code_dtype), device=device))
        empty = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def from_encoded(cls, encoded: EncodedTensor, bias: nn.Parameter | None = None) -> "SeedLinear":
        """A layer that holds this weight and this bias."""
        out_features, in_features = encoded.shape
        layer = cls(in_features, out_features, encoded.format, device="meta")
        for name, tensor in zip(layer._names, encoded.tensors.values(), strict=True):
            layer.register_buffer(name, tensor)
        layer.register_parameter("bias", bias)
        return layer

    @property
    def codes(self) -> list[Tensor]:
        """The tensors of `format.tensor_specs`, in its order."""
        return [self.get_buffer(name) for name in self._names]

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.seedlm.linear(x, self.codes, self.in_features, self.format.spec, self.bias, self.backend)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features]."""
        return torch.ops.seedlm.decode(self.codes, self.in_features, self.format.spec, dtype, self.backend)

    def expand(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary layer with the same weight, and this layer's bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.decode(dtype), requires_grad=False)
        layer.register_parameter("bias", self._parameters["bias"])
        return layer.train(self.training)

    def check_codes(self, where: str) -> None:
        """Raise CheckpointError if codes that came from a file are not valid: bias out of range, zero seeds, padding set."""
        info = PackedInfo(self.format, (self.out_features, self.in_features))
        check_codes(where, info, dict(zip(info.stored, self.codes, strict=True)))

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format}"


def compress_module(
    module: nn.Linear,
    format: Format | str | float = "4",
    *,
    rounding: Rounding = "best",
    backend: Backend = "auto",
    on_progress: Progress | None = None,
) -> tuple[SeedLinear, float]:
    """Compress one linear layer.

    format    a format, or anything `parse_format` reads; the other options are those of `search.encode`
    returns   the packed layer, which shares the bias, and ||W - W^||_F / ||W||_F (0 for a weight of zeros)
    """
    parsed = parse_format(format)
    weight = module.weight.detach()
    encoded, squared_error = encode(weight, parsed, rounding=rounding, backend=backend, on_progress=on_progress)
    norm = float(weight.double().square().sum())
    error = (squared_error / norm) ** 0.5 if norm else 0.0
    return SeedLinear.from_encoded(encoded, module.bias).train(module.training), error
