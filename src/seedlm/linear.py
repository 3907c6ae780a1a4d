"""A linear layer whose weight stays packed, and the walk that puts it in the place of torch's.

`SeedLinear` holds the tensors of `format.tensor_specs` as buffers under the names they have in a checkpoint, so its state
dict is what is stored, and regrows the weight in every forward pass. `.to(dtype)` and `.half()` move the bias and leave the
codes alone. Mind that its `weight` is therefore the packed words, int32; the weight itself is `decode()`.

    compress_module(linear)   nn.Linear -> SeedLinear, a new module
    compress_model(model)     every chosen nn.Linear of a model, in place
    expand_model(model)       every SeedLinear back to nn.Linear, in place
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from seedlm import ops
from seedlm.checkpoint import PackedInfo, check_codes, stored_name
from seedlm.codec import Rounding
from seedlm.errors import TensorError
from seedlm.format import Format, parse_format
from seedlm.search import Backend, EncodedTensor, Progress, encode
from seedlm.selection import gets_smaller, left_by_default


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
    format: Format | str = "4",
    *,
    rounding: Rounding = "best",
    backend: Backend = "auto",
    on_progress: Progress | None = None,
) -> tuple[SeedLinear, float]:
    """Compress one linear layer.

    format    a format, or anything `parse_format` reads; the other options are those of `search.encode`
    returns   the packed layer, which shares the bias, and ||W - W^||_F / ||W||_F (0 for a weight of zeros)
    """
    parsed = parse_format(format) if isinstance(format, str) else format
    weight = module.weight.detach()
    encoded, squared_error = encode(weight, parsed, rounding=rounding, backend=backend, on_progress=on_progress)
    norm = float(weight.double().square().sum())
    error = (squared_error / norm) ** 0.5 if norm else 0.0
    return SeedLinear.from_encoded(encoded, module.bias).train(module.training), error


def compress_model(
    model: nn.Module,
    format: Format | str = "4",
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    rounding: Rounding = "best",
    backend: Backend = "auto",
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """Replace linear layers of a model by packed ones, in place.

    include, exclude   glob patterns over module names, as in `choose_modules`
    returns            module name -> relative error, of every layer compressed
    Raises TensorError if a weight cannot be encoded or is shared with another module, naming it.
    """
    parsed = parse_format(format) if isinstance(format, str) else format
    errors = {}
    for name in choose_modules(model, parsed, include, exclude):
        try:
            layer, errors[name] = compress_module(
                cast(nn.Linear, model.get_submodule(name)), parsed, rounding=rounding, backend=backend, on_progress=on_progress
            )
        except TensorError as reason:
            raise TensorError(f"{name}.weight: {reason}") from None
        model.set_submodule(name, layer)
    return errors


def choose_modules(model: nn.Module, format: Format, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[str]:
    """The linear layers to compress: those that `selection` takes by default, if they become smaller.

    include   glob patterns of names to add whatever the default says
    exclude   glob patterns of names to leave out; they win
    Raises TensorError for a pattern without a match and for a chosen weight that another module shares (a tied head).
    """
    include, exclude = tuple(include), tuple(exclude)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise TensorError(f"no linear layer matches the pattern {pattern!r}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    chosen = []
    for name, module in linears.items():
        default = gets_smaller(format, *module.weight.shape) and left_by_default(name) is None
        if _matches(name, exclude) or not (default or _matches(name, include)):
            continue
        shared = [owner for owner in owners[id(module.weight)] if owner != f"{name}.weight"]
        if shared:
            raise TensorError(f"{name}.weight is shared with {', '.join(shared)} and cannot be compressed: exclude it")
        chosen.append(name)
    return chosen


def expand_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace every packed layer of a model by an ordinary one with weights of `dtype`, in place."""
    for name, layer in list(seed_linears(model)):
        model.set_submodule(name, layer.expand(dtype))


def seed_linears(model: nn.Module) -> Iterator[tuple[str, SeedLinear]]:
    """The packed layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SeedLinear))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
