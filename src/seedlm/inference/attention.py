"""Attention of one new token over a static cache, with its rotary embedding and the cache's writing.

    attend(q, k, v, cos, sin, keys, values, position, scaling)

By one kernel where there is one (CUDA, numba), else by torch.
"""

from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from seedlm import nvrtc
from seedlm.codes import on_cpu
from seedlm.codes.threads import kernel

_WIDTHS: Final = (64, 128, 256)
"""Of heads that the kernel knows."""
_WARPS: Final = 8
_BLOCK_NUMBERS: Final = 128
"""Numbers of queries that a block holds, but at least one head's."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
) -> Tensor:
    """What one token's heads read from the cache, which holds its own key and value afterwards.

    q                 [1, 1, heads * d] of float16, bfloat16 or float32, before rotary embedding
    k, v              [1, 1, kv heads * d], of its dtype as all that follow; heads / kv heads neighbours share a key
    cos, sin          [1, 1, d]: of halves that are rotated into each other, as Llama's
    keys, values      [1, kv heads, length, d], contiguous
    position          int64 [1]: how many tokens came before; it is less than length, which on a GPU nobody looks at
    returns           [1, 1, heads * d]

    On a GPU the position and what the cache holds of earlier ones are read before the kernel before this one has ended, if
    that lets its successor begin: an ordinary kernel, as torch's are, has to lie between what wrote them and this.
    """
    _, heads, length, width = keys.shape
    if _by_kernel(q, keys, values):
        run, blocks = _kernel(q.dtype, width, q.shape[-1] // (heads * width), nvrtc.index_of(q.device))
        out = torch.empty_like(q)
        run((heads * blocks,), 32 * _WARPS, q, k, v, cos, sin, keys, values, position, out, length, scaling)
        return out

    if _by_numba(q, keys, values):
        return _on_cpu(q, k, v, cos, sin, keys, values, position, scaling)

    def rotated(x: Tensor) -> Tensor:
        x = x.view(heads, -1, width)
        swapped = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * cos.view(width) + swapped * sin.view(width)

    keys.index_copy_(2, position, rotated(k)[None])
    values.index_copy_(2, position, v.view(1, heads, 1, width))
    later = torch.arange(length, device=q.device) > position
    scores = torch.bmm(rotated(q) * scaling, keys[0].transpose(1, 2)).float()  # scaled first: float16 ends at 65504
    weights = scores.masked_fill(later, -torch.inf).softmax(-1).to(q.dtype)
    return torch.bmm(weights, values[0]).view(1, 1, -1)


def _by_kernel(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in nvrtc.TYPES
        and keys.shape[3] in _WIDTHS
        and torch.version.cuda is not None
        and keys.is_contiguous()
        and values.is_contiguous()
        and nvrtc.reason_unavailable() is None
        and nvrtc.architecture(nvrtc.index_of(q.device)) >= 80
    )


def _by_numba(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in on_cpu.KINDS
        and keys.is_contiguous()
        and values.is_contiguous()
        and _reason_no_numba() is None
    )


@cache
def _reason_no_numba() -> str | None:
    return on_cpu.reason_unavailable("numba", torch.device("cpu"))


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float
) -> Tensor:
    _, heads, length, width = keys.shape
    check_position(position, length)
    group, out = q.shape[-1] // (heads * width), torch.empty(q.shape, dtype=q.dtype, device="cpu")
    work = on_cpu.scratch(4 * heads * _floats(group, width, length))[1]
    tensors = [each.contiguous() for each in (position.to(torch.int64), q, k, v, cos, sin, keys, values, out)]
    sizes = heads, group, width, length, on_cpu.bits(scaling), on_cpu.KINDS[q.dtype]
    kernel("seedlm.inference.attend_numba", "attend").share((*sizes, *(each.data_ptr() for each in tensors), work), heads)
    return out


def check_position(position: Tensor, length: int) -> None:
    """Raise IndexError for a position [1] that a cache of this length does not have."""
    if not 0 <= (place := int(position)) < length:
        raise IndexError(f"position {place} is none of a cache of {length}")


def _floats(group: int, width: int, length: int) -> int:
    """That a key head is worked with: queries, scores, cosines and sines, a line and another."""
    return group * (width + length) + 4 * width


def source(type: int, width: int, heads: int, arch: int) -> str:
    """The text of the kernel for numbers of a type of `nvrtc.TYPES`, heads of `width`, `heads` of which share a key."""
    group = -(-heads // _groups(width, heads))
    defines = {"TYPE": type, "WIDTH": width, "HEADS": heads, "GROUP": group, "CLUSTER": _cluster(arch), "WARPS": _WARPS}
    return "".join(f"#define {key} {value}\n" for key, value in defines.items()) + nvrtc.common() + _text()


def _groups(width: int, heads: int) -> int:
    """Into how many groups the query heads of a key head are divided."""
    return -(-heads // max(1, _BLOCK_NUMBERS // width))


def _cluster(arch: int) -> int:
    """Blocks of a key head and its group."""
    return 4 if arch >= 90 else 1


@cache
def _text() -> str:
    return (Path(__file__).parent / "attend.cu").read_text(encoding="utf-8")


@cache
def _kernel(dtype: torch.dtype, width: int, heads: int, index: int) -> tuple[nvrtc.Kernel, int]:
    """The kernel, and its blocks for a key head."""
    arch = nvrtc.architecture(index)
    text = source(nvrtc.TYPES[dtype], width, heads, arch)
    loaded = nvrtc.load(text, "attend", "PPPPPPPPPif", device=torch.device("cuda", index), overlap=True)
    return loaded, _groups(width, heads) * _cluster(arch)
