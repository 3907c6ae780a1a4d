"""The input transform: a Hadamard matrix in blocks along the inputs, with signs from the paper's register.

A width n is cut greedily: blocks of the largest size B while they fit, then what is left in descending powers of two (576
with B = 256 is 256 + 256 + 64; 100 with 64 is 64 + 32 + 4). A block x of size b becomes

    H_b (sign * x) / sqrt(b)          H_b the Hadamard matrix in Sylvester's order, H[i, j] = (-1)^popcount(i & j)

and sign[i] belongs to the position in the block, so that every slice of columns that starts at a block is transformed alike.
sign[i] is -1 where bit i of the 16-bit register's stream from seed 0xACE1 is set; the first recorded bit is the lowest bit of
the state after one step (paper Algorithm 1).

The transform is orthogonal: applied to the inputs and to a weight's rows it leaves products as they are.
"""

import functools

import torch
from torch import Tensor

from seedlm.codes.block.lfsr import states

SIGN_REGISTER_BITS = 16
SIGN_SEED = 0xACE1


def block_sizes(width: int, largest: int) -> list[int]:
    """The blocks that a width is cut into, in order; `largest` is a power of two."""
    sizes = [largest] * (width // largest)
    rest = width % largest
    return sizes + [1 << bit for bit in reversed(range(largest.bit_length())) if rest >> bit & 1]


@functools.lru_cache(maxsize=64)
def _signs(size: int, device: torch.device) -> Tensor:
    """`signs`, kept for each device: copying them at every call would stop CUDA graphs."""
    with torch.inference_mode(False):
        bits = torch.tensor(states(SIGN_SEED, size, SIGN_REGISTER_BITS), device="cpu") & 1
        return (1 - 2 * bits).to(device, torch.float32)


def signs(size: int) -> Tensor:
    """float32 [size] of +1 and -1: what a block's inputs are multiplied by before the Hadamard matrix."""
    return _signs(size, torch.device("cpu")).clone()


def _butterflies(x: Tensor) -> Tensor:
    """H_b x / sqrt(b) along the last dimension, a power of two: sums and differences at strides 1, 2, 4, ..."""
    size = x.shape[-1]
    stride = 1
    while stride < size:
        pairs = x.unflatten(-1, (size // (2 * stride), 2, stride))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        stride *= 2
    return x * size**-0.5


def _blockwise(x: Tensor, largest: int, before: bool) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"the transform takes floating point, got {x.dtype}")
    out, first = torch.empty_like(x), 0
    sizes = block_sizes(x.shape[-1], largest)
    for size in sorted(set(sizes), reverse=True):
        width = size * sizes.count(size)
        part = x[..., first : first + width].unflatten(-1, (-1, size))
        sign = _signs(size, x.device).to(x.dtype)
        part = _butterflies(part * sign) if before else _butterflies(part) * sign
        out[..., first : first + width] = part.flatten(-2)
        first += width
    return out


def forward(x: Tensor, largest: int) -> Tensor:
    """Transform the last dimension; of activations, or of a weight [out, in].

    x           floating point [..., n]; computed in its own dtype
    largest     the largest block, a power of two
    returns     the same shape and dtype
    """
    return _blockwise(x, largest, before=True)


def inverse(x: Tensor, largest: int) -> Tensor:
    """Undo `forward`, up to rounding. Shapes and dtypes as there."""
    return _blockwise(x, largest, before=False)
