"""What lies between the products of a decoder layer, for one token: joined with them where a backend can, else by torch.

`normed_linears`: a residual stream takes a layer's part, and layers read its RMS norm. `gated_linear`: a layer reads
silu(gate) * up. `attended_linear`: a layer reads what attention read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from seedlm.codes.base import Gated, Normed
from seedlm.inference import ops
from seedlm.modeling.linear import SeedLinear, prepared_of


def normed_linears(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Add `delta` to `h` in place; the products of layers that read its RMS norm, in their order.

    h, delta     [1, 1, in_features] of one dtype, contiguous
    weight       [in_features], of the norm
    """
    found = _fused(Normed(h=h, delta=delta, weight=weight, epsilon=eps), h, layers)
    if found is not None:
        return found
    if delta is not None:
        h += delta
    x = h.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = weight * x.to(h.dtype)
    return [layer(x) for layer in layers]


def gated_linear(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """The product of silu(gate) * up: all [1, 1, features], contiguous."""
    found = _fused(Gated(gate=gate, up=up), gate, [layer])
    return found[0] if found is not None else layer(functional.silu(gate) * up)


def attended_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """The product of x [1, 1, features], contiguous."""
    found = _fused(x, x, [layer])
    return found[0] if found is not None else layer(x)


def _fused(source: Tensor | Normed | Gated, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """The products by the layers' backend, or None if it cannot make their input itself."""
    packed = [layer for layer in layers if type(layer) is SeedLinear]
    if len(packed) < len(layers):
        return None
    plans, weights, biases = prepared_of(packed)
    return ops.fused(source, weights, plans, biases) if ops.fuses(x, plans) else None
