"""Modules whose weight stays in codes: what they all are (`PackedModule`), and the linear layer.

A packed module holds the parts of its format as buffers, as they are stored. `SeedLinear` multiplies by them through
`inference.ops`; `embedding.SeedEmbedding` looks rows up.

    buffer               name in files           what
    weight_words         weight                  the codes: files have them under the weight's own name (`stored_name`)
    weight_<part>        weight_<part>           every other part

`weight` itself answers for the dense weight (`stand_in`). A state dict has the names of files, so that whatever writes it
out is refused by a reader that does not know the codes; `own_names` turns that off for loaders that go by the names of
buffers. Casts (`.half()`, `.to(dtype)`) change the bias and what `weight.dtype` says, never a part, float parts included.

What a backend makes of the parts is no part of the layer's state: it is made for the parts that are there when they are first
needed, and let go with them. Parts are replaced from many sides (`.to`, loaders, offloading hooks, which set buffers by name),
so every call looks whether they are still the same.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn

from seedlm.codes.base import Format, relative_error
from seedlm.codes.encoded import EncodedTensor, encode
from seedlm.codes.registry import family_of, parse_format
from seedlm.errors import CheckpointError, TensorError
from seedlm.inference import ops
from seedlm.modeling.stand_in import PackedWeight
from seedlm.storage.checkpoint import stored_name

_TWINS: Final = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear that compute the same, written out."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a `SeedLinear` can take a module's place: other subclasses of nn.Linear do something else with their weight."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in _TWINS)


def own_name(part: str) -> str:
    """The buffer that holds a part."""
    return f"weight_{part}"


def _file_name(part: str) -> str:
    return stored_name("", part).removeprefix(".")


class PackedModule(nn.Module):
    """A module that holds a weight in codes.

    shape        of the weight, (rows, columns)
    dtype        of the dense weight that it stands for; the default dtype if None
    backend      how to multiply, "auto" or a backend of the format's family by name (`inference.backend`)
    own_names    whether the state dict has the names of the buffers instead of those of files
    New codes are all zero, which may not be a valid weight: they are meant to be loaded.
    """

    own_names: bool = False

    def __init__(
        self,
        shape: tuple[int, int],
        format: Format,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.shape, self.format, self._backend = shape, format, backend
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        self._prepared: _Prepared | None = None
        expected = format.parts(*shape)
        self._names = {part: own_name(part) for part in expected}
        for part, kind in expected.items():
            self.register_buffer(own_name(part), torch.zeros(kind.shape, dtype=getattr(torch, kind.dtype), device=device))

    def take(self, encoded: EncodedTensor) -> None:
        """Hold these parts, of this format and shape."""
        for part, tensor in encoded.parts.items():
            self.register_buffer(own_name(part), tensor)

    @property
    def backend(self) -> str:
        """How to multiply: "auto" or a backend by name. Another one takes effect at the next call."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend, self._prepared = name, None

    @property
    def parts(self) -> dict[str, Tensor]:
        """The weight as it is stored: those of `format.parts`, in its order."""
        return {part: self.get_buffer(name) for part, name in self._names.items()}

    @property
    def weight(self) -> Tensor:
        """Dtype, shape and device of the dense weight, without values; compilers, which drop what is unused, see the values."""
        if torch.compiler.is_compiling():
            return self.dequantize(self._dtype)
        return PackedWeight(self.shape, self._dtype, self.device)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._buffers[next(iter(self._names.values()))].device  # type: ignore[union-attr]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [rows, columns]. Raises TensorError if the codes are not in memory."""
        self.check_in_memory()
        plan, prepared = self.prepare()
        return ops.dequantize(prepared, plan, dtype)

    def check_in_memory(self) -> None:
        """Raise TensorError if the codes are somewhere else."""
        if self.device.type == "meta":
            raise TensorError("the codes of this layer are not in memory (offloaded, or not loaded yet)")

    def check(self, where: str) -> None:
        """Raise CheckpointError, which begins with `where`, if parts that came from a file hold impossible values."""
        try:
            family_of(self.format).check(self.parts, self.format, self.shape)
        except TensorError as reason:
            raise CheckpointError(f"{where}: {reason}") from None

    def restore_dtypes(self) -> None:
        """Give parts that a loader has widened (transformers, in layers kept in float32) their own dtype again."""
        for part, kind in self.format.parts(*self.shape).items():
            tensor, dtype = self.get_buffer(self._names[part]), getattr(torch, kind.dtype)
            if tensor.dtype != dtype:
                self._buffers[self._names[part]] = tensor.to(dtype)

    def prepare(self) -> tuple[ops.Plan, list[Tensor]]:
        """The plan and the backend's tensors for the parts that are there; after the first time nothing is left to do.

        Loaders may call it to spend that time where they report progress. Raises BackendError for a backend that cannot run.
        """
        if torch.compiler.is_compiling():
            self._prepare_before_tracing()
            prepared = self._prepared
        else:
            prepared = self._prepared
            if prepared is None or not prepared.is_for(self._buffers):
                prepared = self._prepare()
        assert prepared is not None
        buffers: Any = self._buffers
        return prepared.plan, [buffers[each] if type(each) is str else each for each in prepared.tensors]

    def _prepare_before_tracing(self) -> bool:
        """A compiler runs this with the layer itself while it traces; what it left is then a constant of the graph."""
        if self._prepared is None or not self._prepared.is_for(self._buffers):
            for tensor in self._prepare().tensors:
                if not isinstance(tensor, str):
                    torch._dynamo.mark_static_address(tensor)
        return True

    # torch.compiler.assume_constant_result by hand: it would import the compiler, which takes seconds.
    _prepare_before_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _prepare(self) -> "_Prepared":
        with torch.inference_mode(False), torch.no_grad():
            parts = self.parts
            plan = ops.plan_for(self.format, self.shape, self.device, self.backend)
            tensors = plan.backend.prepare(parts, self.format, self.shape)
        names = {id(tensor): self._names[part] for part, tensor in parts.items()}
        layer = weakref.ref(self)

        def let_go(part: object) -> None:
            if (found := layer()) is not None and found._prepared is prepared:
                found._prepared = None

        prepared = _Prepared(plan, [names.get(id(tensor), tensor) for tensor in tensors])
        prepared.parts = [(self._names[part], weakref.ref(tensor, let_go), _version(tensor)) for part, tensor in parts.items()]
        self._prepared = prepared
        return prepared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        before = self.parts
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            after = self.get_buffer(self._names[part])
            if after.dtype != tensor.dtype:
                self._buffers[self._names[part]] = tensor.to(after.device)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=next(iter(before.values())).device)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        _refuse_unknown_owner()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.own_names:
            for part, name in self._names.items():
                destination[prefix + _file_name(part)] = destination.pop(prefix + name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        """Take the parts by either name. A tensor of another dtype is an error: copying it would convert it."""
        for part, tensor in self.parts.items():
            stored, own = prefix + _file_name(part), prefix + self._names[part]
            if stored in state_dict and own not in state_dict:
                state_dict[own] = state_dict.pop(stored)
            found = state_dict.get(own, tensor)
            if found.dtype != tensor.dtype:
                errors.append(f"{stored} must be {tensor.dtype}, got {found.dtype}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


class SeedLinear(PackedModule):
    """y = x W^T + bias with W in codes.

    bias    None or a parameter [out_features], of `dtype` if it is new
    """

    _shared: "tuple[SharedInput, int] | None" = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__((out_features, in_features), format, dtype=dtype, device=device, backend=backend)
        self.in_features, self.out_features = in_features, out_features
        empty = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def from_encoded(
        cls, encoded: EncodedTensor, bias: nn.Parameter | None = None, dtype: torch.dtype | None = None
    ) -> "SeedLinear":
        """A layer that holds this weight and this bias, in the place of a layer of `dtype` (the bias's if None)."""
        out_features, in_features = encoded.shape
        dtype = bias.dtype if dtype is None and bias is not None else dtype
        layer = cls(in_features, out_features, encoded.format, dtype=dtype, device="meta")
        layer.take(encoded)
        layer.register_parameter("bias", bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self._shared is not None:
            return self._shared[0].linear(x, self, self._shared[1])
        plan, prepared = self.prepare()
        return ops.linear(x, [], prepared, plan, self._bias())

    def _bias(self) -> Tensor | None:
        parameters: Any = self._parameters
        return parameters["bias"] if "bias" in parameters else self.bias  # type: ignore[return-value]  # noqa: SIM401 (self.bias takes 1 us)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary layer with the same weight, and this layer's bias. Raises TensorError if the codes are not in memory."""
        return dense_linear(nn.Parameter(self.dequantize(dtype), requires_grad=False), self)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format.spec}"


def dense_linear(weight: nn.Parameter, like: nn.Module) -> nn.Linear:
    """An ordinary layer with this weight, and the bias of the packed one whose place it takes."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", like._parameters["bias"])
    return layer.train(like.training)


def _refuse_unknown_owner() -> None:
    """Raise CheckpointError if a model of transformers is being saved that does not say that it is packed.

    That is one in which a layer was replaced by hand. Its folder would lack the configuration without which nothing loads it,
    and who is saving stands nowhere but on the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "save_pretrained" else None
        if hasattr(owner, "config") and not hasattr(owner, "peft_config") and getattr(owner, "hf_quantizer", None) is None:
            raise CheckpointError(
                f"{type(owner).__name__} has packed layers and does not know it, since they were put there by hand: a folder "
                "of it would not load; call seedlm.compress_model(model, exclude='*') first, which tells it"
            )
        frame = frame.f_back


class _Prepared:
    """What a backend wants for the parts that a layer had.

    tensors   in the backend's order; a part that it reads as it is stored is the name of its buffer
    parts     (buffer, reference to the tensor that was there, its version)
    """

    def __init__(self, plan: ops.Plan, tensors: list[Any]) -> None:
        self.plan, self.tensors = plan, tensors
        self.parts: list[tuple[str, weakref.ref[Tensor], int]] = []

    def is_for(self, buffers: Mapping[str, Tensor | None]) -> bool:
        """Whether a layer still has those parts, unchanged."""
        for name, part, version in self.parts:
            tensor = buffers[name]
            if part() is not tensor or (version >= 0 and tensor._version != version):  # type: ignore[union-attr]
                return False
        return True


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def prepared_of(layers: Sequence[SeedLinear]) -> tuple[list[ops.Plan], list[list[Tensor]], list[Tensor | None]]:
    """What `ops.linears` and `ops.fused` want of layers: their plans, prepared tensors and biases."""
    plans, weights, biases = [], [], []
    for layer in layers:
        plan, prepared = layer.prepare()
        plans.append(plan)
        weights.append(prepared)
        biases.append(layer._bias())
    return plans, weights, biases


class SharedInput:
    """Layers whose parent gives them the same tensor, unchanged: what can be done for all of them is done once.

    The first of them that is called does it: all the products, where a backend joins them (`ops.joins`), else what comes
    before each. Each of the others takes its part once, if it is given that very tensor, and the last lets go of it. A layer
    that comes again starts anew: a CUDA graph may have written to the tensor unseen. So does one after a change of the tensor
    or of whether gradients are wanted.

    What is kept is one tuple, read once and replaced whole: threads that run one model at a time each with its own tensor do
    each other's work anew, and never take another's result. Copies of a model know their layers from the first call on.
    """

    def __init__(self, count: int) -> None:
        self._all = (1 << count) - 1
        self._layers: list[weakref.ref[SeedLinear] | None] = [None] * count
        self._kept: tuple[Tensor, str, int, list[Tensor], tuple[int, bool] | None] | None = None

    def know(self, layer: SeedLinear, number: int) -> None:
        self._layers[number] = weakref.ref(layer)

    def linear(self, x: Tensor, layer: SeedLinear, number: int) -> Tensor:
        """The product of layer `number`."""
        kept, mine = self._kept, 1 << number
        now = None if torch.compiler.is_compiling() else (_version(x), torch.is_grad_enabled())
        if kept is not None and not (kept[0] is x and kept[2] & mine and kept[4] == now):
            kept = None
        if kept is not None and kept[1] == _PRODUCTS:
            self._keep(x, _PRODUCTS, kept[2] ^ mine, kept[3], now)
            return kept[3][number]
        if self._layers[number] is None and not torch.compiler.is_compiling():
            self.know(layer, number)
        if kept is None and (products := self._products(x)) is not None:
            self._keep(x, _PRODUCTS, self._all ^ mine, products, now)
            return products[number]
        plan, prepared = layer.prepare()
        if kept is not None and kept[1] == plan.input_text:
            waiting, transformed = kept[2], kept[3]
        else:
            waiting, transformed = self._all, ops.transform(x, plan, prepared)
        self._keep(x, plan.input_text, waiting ^ mine, transformed, now)
        return ops.linear(x, transformed, prepared, plan, layer._bias())

    def _keep(self, x: Tensor, what: str, waiting: int, tensors: list[Tensor], now: tuple[int, bool] | None) -> None:
        self._kept = (x, what, waiting, tensors, now) if waiting else None

    def _products(self, x: Tensor) -> list[Tensor] | None:
        """All layers' products, or None if they are not to be had at once."""
        layers = []
        for known in self._layers:
            each = known() if known is not None else None
            if each is None or each.device != x.device:
                return None
            layers.append(each)
        plans, weights, biases = prepared_of(layers)
        return ops.linears(x, weights, plans, biases) if ops.joins(x, plans, biases) else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_all": self._all, "_layers": [None] * len(self._layers), "_kept": None}


_PRODUCTS: Final = "products"
"""In the place of an `input_text`: what is kept are the products themselves."""


def share_input(*layers: SeedLinear) -> None:
    """Make layers known as reading the same tensor at every call of their parent (q, k, v; gate, up)."""
    shared = SharedInput(len(layers))
    for number, layer in enumerate(layers):
        layer._shared = shared, number
        shared.know(layer, number)


def compress_module(
    module: nn.Linear,
    format: Format | str | float = "4",
    *,
    backend: str = "auto",
    on_progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> tuple[SeedLinear, float]:
    """Compress one linear layer.

    format    a format, or anything `parse_format` reads; the other options are those of `encode`
    returns   the packed layer, which shares the bias, and ||W - W^||_F / ||W||_F (0 for a weight of zeros)
    """
    parsed = parse_format(format)
    weight = module.weight.detach()
    encoded, squared_error = encode(weight, parsed, backend=backend, on_progress=on_progress, **settings)
    error = relative_error(squared_error, float(weight.double().square().sum()))
    return SeedLinear.from_encoded(encoded, module.bias, weight.dtype).train(module.training), error
