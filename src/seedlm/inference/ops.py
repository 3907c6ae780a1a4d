"""torch operators over packed weights: what modules call, compilers keep whole, and kernels plug into.

    torch.ops.seedlm.decode(codes, in_features, format, dtype, backend)     -> the weight [out, in]
    torch.ops.seedlm.linear(x, codes, in_features, format, bias, backend)   -> x W^T + bias

`codes` are the tensors of `format.tensor_specs`, in its order, so that a second family of codes has the same two operators.
An operator is opaque to torch.compile, which would otherwise trace the tables' Python loops; its fake gives the shape. `linear`
keeps no weight for the backward pass but regrows it, and its codes have no gradient.

A backend is a function ``decode(words, exponent_bias, in_features, format)`` that returns float32 [out, in] with the bits of
the reference, `search.decode`. `reason_unavailable` is the one place that knows where each can run.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Literal

import torch
from torch import Tensor

from seedlm.codes.block import encode as search
from seedlm.codes.block.format import BlockFormat, Format, parse_format
from seedlm.errors import BackendError, TensorError

Backend = Literal["auto", "numba", "torch"]
BACKENDS: Final = ("numba", "torch")
"""Decoding backends, fastest first: ``auto`` takes the first that can run."""

Decode = Callable[[Tensor, int, int, BlockFormat], Tensor]

_REFERENCE_WEIGHTS = 1 << 20
"""The reference decodes this many weights at a time: its intermediate values take 60 bytes a weight."""


@torch.library.custom_op("seedlm::decode", mutates_args=())
def decode(codes: Sequence[Tensor], in_features: int, format: str, dtype: torch.dtype, backend: str) -> Tensor:
    """Regrow a weight.

    codes      the tensors of `format.tensor_specs(out, in_features)`, in its order
    format     `Format.spec`
    dtype      floating point; weights are formed in float32 and rounded to it once
    backend    "auto" or one of `BACKENDS`
    returns    [out, in_features] of `dtype`
    Raises TensorError for codes that do not fit the format, BackendError for a backend that cannot run here.
    """
    return _regrow(codes, in_features, format, dtype, backend)


@decode.register_fake
def _(codes, in_features, format, dtype, backend):
    _checked(codes, in_features, format, dtype)
    return codes[0].new_empty(codes[0].shape[0], in_features, dtype=dtype)


@torch.library.custom_op("seedlm::linear", mutates_args=())
def linear(x: Tensor, codes: Sequence[Tensor], in_features: int, format: str, bias: Tensor | None, backend: str) -> Tensor:
    """Multiply by a packed weight: `torch.nn.functional.linear` with the weight regrown in x's dtype.

    x          floating point [..., in_features]
    bias       None or [out], of x's dtype
    returns    [..., out] of x's dtype
    The other arguments and the errors are those of `decode`.
    """
    weight = _regrow(codes, in_features, format, x.dtype, backend)
    _check_input(x, in_features)
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(x, codes, in_features, format, bias, backend):
    _checked(codes, in_features, format, x.dtype)
    _check_input(x, in_features)
    return x.new_empty(*x.shape[:-1], codes[0].shape[0])


def _save_for_backward(ctx, inputs, output) -> None:
    _, codes, *ctx.arguments, bias, ctx.backend = inputs
    ctx.save_for_backward(*codes)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor):
    codes = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ decode(codes, *ctx.arguments, grad.dtype, ctx.backend)  # the operator, which compilers see
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, [None] * len(codes), None, None, grad_bias, None


linear.register_autograd(_backward, setup_context=_save_for_backward)


def reason_unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot decode codes on `device`; None if it can."""
    if backend == "torch":
        return None
    if backend == "numba":
        if device.type != "cpu":
            return f"backend 'numba' decodes on the CPU, the codes are on {device}"
        if importlib.util.find_spec("numba") is None:
            return "backend 'numba' needs numba: pip install 'seedlm[fast]'"
        return None
    return f"unknown backend {backend!r}, known: auto, {', '.join(BACKENDS)}"


@lru_cache(maxsize=64)
def _load(backend: str, device: torch.device) -> Decode:
    """The decode function of a backend; `auto` takes the first that can run."""
    names = BACKENDS if backend == "auto" else (backend,)
    reasons = [reason_unavailable(name, device) for name in names]
    if all(reasons):
        raise BackendError("; ".join(filter(None, reasons)))
    if names[reasons.index(None)] == "numba":
        from seedlm.codes.block.kernels import numba_decode

        return numba_decode.decode
    return _decode_reference


def _decode_reference(words: Tensor, exponent_bias: int, in_features: int, format: BlockFormat) -> Tensor:
    """`search.decode`, some rows at a time."""
    rows = max(1, _REFERENCE_WEIGHTS // in_features)
    return torch.cat([search.decode(part, exponent_bias, in_features, format) for part in words.split(rows)])


def _regrow(codes: Sequence[Tensor], in_features: int, format: str, dtype: torch.dtype, backend: str) -> Tensor:
    """What both operators do first."""
    parsed = _checked(codes, in_features, format, dtype)
    words, exponent_bias = codes
    return _load(backend, words.device)(words, int(exponent_bias), in_features, parsed).to(dtype)


_parse = lru_cache(maxsize=64)(parse_format)


def _checked(codes: Sequence[Tensor], in_features: int, format: str, dtype: torch.dtype) -> Format:
    """The parsed format; TensorError unless the codes are those of a weight with `in_features` columns."""
    parsed = _parse(format)
    if not dtype.is_floating_point:
        raise TensorError(f"weights and their inputs must be floating point, got {str(dtype).removeprefix('torch.')}")
    if in_features < 1:
        raise TensorError(f"in_features must be positive, got {in_features}")
    out_features = codes[0].shape[0] if codes and codes[0].dim() else 0
    expected = parsed.tensor_specs(out_features, in_features)
    found = [(str(code.dtype).removeprefix("torch."), tuple(code.shape)) for code in codes]
    if found != list(expected.values()):
        raise TensorError(f"a {format} weight of {in_features} columns is stored as {expected}, got {found}")
    if len({code.device for code in codes}) > 1:
        raise TensorError(f"codes must be on one device, got {[str(code.device) for code in codes]}")
    return parsed


def _check_input(x: Tensor, in_features: int) -> None:
    if not x.dim() or x.shape[-1] != in_features:
        raise TensorError(f"x must be [..., {in_features}], got {[*x.shape]}")
