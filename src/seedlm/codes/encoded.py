"""One matrix in codes: weights in, encoded tensor out, in whatever family's format."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seedlm.codes.base import EncodeOptions, Facts, Format, totals
from seedlm.codes.registry import FEEDBACK, check_settings, family_of, parse_format
from seedlm.errors import FormatError, TensorError


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A weight as it is stored.

    format   how
    shape    (out_features, in_features) of the weight it stands for
    parts    those of `format.parts(*shape)`, name -> tensor
    Raises TensorError for a part of another dtype or shape.
    """

    format: Format
    shape: tuple[int, int]
    parts: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        check_parts(self.format, self.shape, self.parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] in `dtype`, formed in float32 and rounded once."""
        return family_of(self.format).dequantize(self.parts, self.format, self.shape).to(dtype)


def check_parts(format: Format, shape: tuple[int, int], parts: dict[str, Tensor]) -> None:
    """Raise TensorError unless these are the parts of such a weight, by name, dtype and shape, on one device."""
    expected = {name: (part.dtype, part.shape) for name, part in format.parts(*shape).items()}
    found = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in parts.items()}
    if found != expected:
        raise TensorError(f"a {format.spec} weight {[*shape]} is stored as {expected}, got {found}")
    if len({tensor.device for tensor in parts.values()}) > 1:
        raise TensorError(f"codes must be on one device, got {[str(tensor.device) for tensor in parts.values()]}")


def encode(
    weight: Tensor,
    format: Format | str | float,
    *,
    backend: str = "auto",
    hessian: Tensor | None = None,
    tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> tuple[EncodedTensor, float]:
    """Compress one matrix.

    weight     floating point [out_features, in_features], finite, not float64
    format     a format, or anything `parse_format` reads
    hessian    mean of x x' over the layer's inputs, [in_features, in_features], for error feedback, where the format's family
               takes it; None goes by the weights alone
    tokens     how many inputs it is a mean of; None stands for plenty, a hundred for each column
    settings   of the format's family: ``rounding="nearest"`` is the paper's for the block code
    returns    the encoded tensor, on the weight's device, and ||W - W^||_F^2
    Raises TensorError for a weight that cannot be encoded, BackendError for a backend that cannot run here, FormatError.
    """
    check_weight(weight)
    parsed = parse_format(format)
    check_settings([parsed], settings)
    if hessian is None and settings.get(FEEDBACK, "none") != "none":
        raise FormatError("errors are fed back by statistics, which `seedlm compress` gathers: leave out feedback here")
    shape = (weight.shape[0], weight.shape[1])
    largest = float(weight.detach().abs().max())
    if hessian is None:
        facts = Facts(largest)
    elif not family_of(parsed).feedback:
        raise FormatError(f"{parsed.family} codes take no error feedback")
    elif hessian.shape != (shape[1], shape[1]):
        raise TensorError(f"hessian must be {[shape[1], shape[1]]} for a weight {[*shape]}, got {[*hessian.shape]}")
    else:
        facts = Facts(largest, hessian, 100 * shape[1] if tokens is None else tokens)
    encoder = family_of(parsed).encoder(parsed, shape, facts, EncodeOptions(backend, settings), weight.device)
    parts, errors = encoder.rows(weight.detach(), on_progress or (lambda weights: None))
    parts |= encoder.rest()
    ordered = {name: parts[name].to(weight.device) for name in parsed.parts(*shape)}
    return EncodedTensor(parsed, shape, ordered), totals([errors])[0]


def check_weight(weight: Tensor) -> None:
    """Raise TensorError unless this is a finite, non-empty float32, float16 or bfloat16 matrix."""
    if weight.dim() != 2 or not weight.numel():
        raise TensorError(f"a weight must be a non-empty matrix [out_features, in_features], got shape {[*weight.shape]}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TensorError(f"a weight must be float32, float16 or bfloat16, got {str(weight.dtype).removeprefix('torch.')}")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        nan = int(torch.isnan(weight).sum())
        raise TensorError(f"a weight must be finite, got {nan} NaN and {int((~finite).sum()) - nan} Inf values")
