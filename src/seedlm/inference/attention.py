"""Attention of one new token over a static cache, with its rotary embedding and the cache's writing.

    attend(q, k, v, cos, sin, keys, values, position, scaling)

By one kernel where there is one (`reason_unavailable`), else by torch.
"""

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float
) -> Tensor:
    """What one token's heads read from the cache, which holds its own key and value afterwards.

    q                 [1, 1, heads * d] of float16, bfloat16 or float32, before rotary embedding
    k, v              [1, 1, kv heads * d], of its dtype as all that follow; heads / kv heads neighbours share a key
    cos, sin          [1, 1, d]: of halves that are rotated into each other, as Llama's
    keys, values      [1, kv heads, length, d], contiguous
    position          int64 [1]: how many tokens came before; it is less than length
    returns           [1, 1, heads * d]
    """
    _, heads, length, width = keys.shape

    def rotated(x: Tensor) -> Tensor:
        x = x.view(heads, -1, width)
        swapped = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * cos.view(width) + swapped * sin.view(width)

    keys.index_copy_(2, position, rotated(k)[None])
    values.index_copy_(2, position, v.view(1, heads, 1, width))
    later = torch.arange(length, device=q.device) > position
    scores = torch.bmm(rotated(q), keys[0].transpose(1, 2)).float() * scaling
    weights = scores.masked_fill(later, -torch.inf).softmax(-1).to(q.dtype)
    return torch.bmm(weights, values[0]).view(1, 1, -1)
