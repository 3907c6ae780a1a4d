"""What `SeedLinear.weight` answers: a tensor that has everything the dense weight's has but its values.

Code around a layer asks a weight for its dtype, device or shape (T5 casts to `wo.weight.dtype`, DeepSeek-V3.2's indexer to
`weights_proj.weight.dtype`). Those are right here, nothing is allocated, and tensors like it can be made. Whatever wants the
values is refused with what to do instead; it would otherwise compute with packed words, or dequantize at every step unasked.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from seedlm.errors import TensorError

_LIKE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"})
_LIKE_NEW = frozenset({"new_empty", "new_zeros", "new_ones", "new_full"})


class PackedWeight(Tensor):
    """A weight without values. It has no gradient: `requires_grad` is False, and cannot be changed."""

    _is_hf_initialized = True
    """Models of transformers initialise weights of their layers by name after loading (T5), except those that are marked."""

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "PackedWeight":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        name = func.overloadpacket.__name__
        if name in ("detach", "alias"):
            return args[0]
        if name in _LIKE or name in _LIKE_NEW:
            weight = args[0]
            empty = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
            return func(empty, *args[1:], **(kwargs or {}))
        _refuse(name)

    def numpy(self, *, force: bool = False) -> NoReturn:
        _refuse("numpy")

    def tolist(self) -> NoReturn:
        _refuse("tolist")

    def data_ptr(self) -> NoReturn:
        _refuse("data_ptr")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={[*self.shape]}, dtype={self.dtype}, device={str(self.device)!r})"


def _refuse(what: str) -> NoReturn:
    raise TensorError(
        f"{what} needs the values of a weight that is stored as codes: layer.dequantize(dtype) returns them, "
        f"layer.to_dense(dtype) an ordinary linear layer to put in its place"
    )
