"""What lies between the products of a decoder layer, for one token: joined with them where a backend can, else by torch.

    normed_linears(h, delta, weight, eps, layers)    h += delta, and the layers' products of its RMS norm
    gated_linear(gate, up, layer)                    a layer's product of silu(gate) * up
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def normed_linears(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Add `delta` to `h` in place; the products of layers that read its RMS norm, in their order.

    h, delta     [1, 1, in_features] of one dtype
    weight       [in_features], of the norm
    """
    if delta is not None:
        h += delta
    x = h.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = weight * x.to(h.dtype)
    return [layer(x) for layer in layers]


def gated_linear(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """The product of silu(gate) * up: all [1, 1, features]."""
    return layer(functional.silu(gate) * up)
