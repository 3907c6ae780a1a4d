"""An embedding whose weight stays in codes, and the modules that share its codes as tied modules share a parameter.

`SeedEmbedding` looks rows up: each is decoded from its own codes, the matrix is never formed (`Family.rows`). A model whose
output head is tied to its embeddings multiplies by the same codes: `TiedLinear` takes the head's place. It holds the packed
embedding outside of torch's lists of children, parameters and buffers, so that codes are stored, moved, copied and saved once,
as the embedding's. `TiedEmbedding` does the same for further look-ups (T5's encoder and decoder).

`replace_embedding` puts a packed embedding into a model, `unpack` takes it out again, each with all that is tied to it.
transformers ties parameters by their names whenever it is asked to; it is told not to look for those that are codes.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn

from seedlm.codes.base import Format
from seedlm.errors import TensorError
from seedlm.inference import ops
from seedlm.modeling.linear import PackedModule, dense_linear, is_linear
from seedlm.storage.selection import Tables

_SCALED: Final = "ScaledWordEmbedding"
"""How the names of transformers' embeddings end that multiply what they look up by their `embed_scale`."""
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def reason_no_embedding(module: nn.Module) -> str | None:
    """Why no `SeedEmbedding` can take a module's place; None if one can."""
    if not isinstance(module, nn.Embedding):
        return f"{type(module).__name__} is no embedding"
    scaled = type(module).__name__.endswith(_SCALED) and module._parameters.keys() == {"weight"}  # T5Gemma 2's has another row
    if type(module) is not nn.Embedding and not scaled:
        return f"{type(module).__name__} does more than look rows up"
    return "max_norm changes rows as they are looked up" if module.max_norm is not None else None


def is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a `SeedEmbedding` can take a module's place."""
    return reason_no_embedding(module) is None


class _Lookup:
    """What an embedding does besides holding a weight.

    kind     the class of the dense module
    scales   by dtype, what rows are multiplied by; None by nothing. Bart's embeddings multiply by a number, Gemma's by one
             that is rounded to the rows' dtype first
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    kind: Any
    scales: Mapping[torch.dtype, float] | None

    def use_like(self: Any, dense: "nn.Embedding | _Lookup") -> None:
        """Look up as this module does, packed or not."""
        self.num_embeddings, self.embedding_dim, self.padding_idx = dense.num_embeddings, dense.embedding_dim, dense.padding_idx
        if isinstance(dense, _Lookup):
            self.kind, self.scales = dense.kind, dense.scales
            return
        self.kind, self.scales = type(dense), None
        scale: Any = getattr(dense, "embed_scale", None)
        if isinstance(scale, Tensor):
            known: Any = getattr(dense, "scalar_embed_scale", scale)  # on the meta device, which has no values, it is there
            self.scales = {dtype: float(torch.tensor(float(known), dtype=dtype, device="cpu")) for dtype in _DTYPES}
        elif scale is not None:
            self.scales = dict.fromkeys(_DTYPES, float(scale))

    def scaled(self: Any, rows: Tensor) -> Tensor:
        return rows if self.scales is None else rows * self.scales[rows.dtype]

    def dense(self: Any, weight: nn.Parameter) -> nn.Embedding:
        """An ordinary embedding with this weight in its place."""
        scale = {} if self.scales is None else {"embed_scale": self.scales[torch.float64]}
        dense: nn.Embedding = self.kind(1, 1, None, **scale).to(weight.device)
        dense.num_embeddings, dense.embedding_dim, dense.padding_idx = self.num_embeddings, self.embedding_dim, self.padding_idx
        dense.weight = weight
        return dense.train(self.training)

    def extra_repr(self: Any) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format.spec}"


class SeedEmbedding(_Lookup, PackedModule):
    """Rows of a weight [num_embeddings, embedding_dim] in codes, in the place of a dense embedding.

    dtype, device   of the dense weight if None
    """

    def __init__(
        self, like: nn.Embedding, format: Format, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        shape, device = (like.num_embeddings, like.embedding_dim), like.weight.device if device is None else device
        super().__init__(shape, format, dtype=dtype or like.weight.dtype, device=device)
        self._code = f"{format.spec} {shape[0]}x{shape[1]}"
        self.use_like(like)
        self.train(like.training)

    def forward(self, input: Tensor) -> Tensor:
        """Rows [*input.shape, embedding_dim] of the dense weight's dtype. Raises TensorError or IndexError as `ops.rows`."""
        buffers: Any = self._buffers
        parts = [buffers[name] for name in self._names.values()]
        return self.scaled(ops.rows(input, parts, self._code, self._dtype))


class _Tied(nn.Module):
    """A module that uses a packed embedding's codes."""

    _held: tuple[SeedEmbedding]

    def __init__(self, codes: SeedEmbedding, like: nn.Module) -> None:
        super().__init__()
        self._held = (codes,)
        self.train(like.training)

    @property
    def codes(self) -> SeedEmbedding:
        """The embedding that holds them. In a tuple it is no child of this module."""
        return self._held[0]

    @property
    def format(self) -> Format:
        return self.codes.format

    @property
    def weight(self) -> Tensor:
        """As of `SeedLinear`: everything but the values."""
        return self.codes.weight

    def _check(self) -> None:
        if self.codes.device.type == "meta":
            raise TensorError(
                "the codes of the embeddings, which this module is tied to, are not in memory (offloaded, or not loaded yet): "
                "leave them in memory, or compress with --embeddings dense"
            )


class TiedLinear(_Tied):
    """y = x W^T + bias with the codes of a packed embedding: an output head that is tied to it."""

    def __init__(self, codes: SeedEmbedding, like: nn.Linear) -> None:
        super().__init__(codes, like)
        self.out_features, self.in_features = codes.shape
        self.register_parameter("bias", like.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check()
        plan, prepared = self.codes.prepare()
        bias: Any = self.bias
        return ops.linear(x.to(self.codes.device), [], prepared, plan, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.spec}"


class TiedEmbedding(_Lookup, _Tied):
    """Rows of a packed embedding, looked up from another place in the model."""

    def __init__(self, codes: SeedEmbedding, like: nn.Embedding) -> None:
        super().__init__(codes, like)
        self.use_like(like)

    def forward(self, input: Tensor) -> Tensor:
        self._check()
        codes = self.codes
        return self.scaled(ops.rows(input.to(codes.device), list(codes.parts.values()), codes._code, codes._dtype))


def find_tables(model: nn.Module) -> Tables:
    """A model's input embeddings and its output head, by the names of their modules."""
    reasons: dict[str, str] = {}
    names: dict[str, str] = {}
    absent = []
    for option, ask in (("embeddings", "get_input_embeddings"), ("head", "get_output_embeddings")):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError):
            module = None
        name = next((name for name, each in model.named_modules() if each is module), None) if module is not None else None
        if name is None:
            reasons[option] = f"{type(model).__name__} has none"
            absent.append(option)
            continue
        names[option] = name
        if option == "embeddings":
            reason = reason_no_embedding(module) or _reason_tied(model, name) or _reason_last(model)
        else:
            reason = None if is_linear(module) else f"{type(module).__name__} is no plain linear layer"
        if reason:
            reasons[option] = reason
    embeddings, head = names.get("embeddings"), names.get("head")
    tied = embeddings is not None and head is not None and head in _sharing(model, embeddings)
    if tied and embeddings is not None and "embeddings" in reasons:
        reasons["head"] = reasons["embeddings"]
    return Tables(embeddings, embeddings if tied else head, reasons, head, frozenset(absent))


def replace_embedding(model: nn.Module, name: str, packed: SeedEmbedding) -> list[str]:
    """Put a packed embedding in the place of the dense one of that name, and of all that are tied to it.

    returns   names of the modules that are tied to it from now on
    """
    dense = model.get_submodule(name)
    others = {other: model.get_submodule(other) for other in _sharing(model, name)}
    _forget(model, others)
    for other, module in others.items():
        tied: nn.Module
        if module is dense:
            tied = packed
        elif is_linear(module):
            tied = TiedLinear(packed, module)
        else:
            assert is_embedding(module)
            tied = TiedEmbedding(packed, module)
        model.set_submodule(other, tied)
    model.set_submodule(name, packed)
    return list(others)


def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense embeddings in the places of all packed ones, with what is tied to them."""
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
    dense: dict[SeedEmbedding, nn.Embedding] = {}

    def weight_of(module: _Tied) -> Any:
        return dense[module.codes].weight

    for name, module in found:
        if isinstance(module, SeedEmbedding):
            if module not in dense:
                dense[module] = module.dense(nn.Parameter(module.dequantize(dtype), requires_grad=False))
            model.set_submodule(name, dense[module])
    for name, module in found:
        if isinstance(module, TiedLinear):
            model.set_submodule(name, dense_linear(weight_of(module), module))
        elif isinstance(module, TiedEmbedding):
            model.set_submodule(name, module.dense(weight_of(module)))
    if dense:
        _remember(model)


def _sharing(model: nn.Module, name: str) -> list[str]:
    """The other places in a model where an embedding's parameter is the weight, by the names of their modules.

    While transformers loads a model it has not tied it yet, and says what it is going to.
    """
    own, weight = f"{name}.weight".removeprefix("."), model.get_submodule(name)._parameters.get("weight")
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = ties.get(own, own)
    known = {target for target, each in ties.items() if each == source} | {source}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = (other for other, parameter in parameters.items() if parameter is weight or other in known)
    return [other.rpartition(".")[0] for other in found if other != own]


def _reason_tied(model: nn.Module, name: str) -> str | None:
    """Why codes cannot stand for all that is tied to an embedding; None if they can."""
    for other in _sharing(model, name):
        module = model.get_submodule(other)
        if not is_linear(module) and not is_embedding(module):
            return f"they are tied to {other}, and {type(module).__name__} is neither a plain linear layer nor an embedding"
    return None


def _reason_last(model: nn.Module) -> str | None:
    """Why a model must keep its embeddings, whose parameters may else all be in codes (OLMo 1); None if it need not."""
    if any(parameter.dim() < 2 for parameter in model.parameters()):
        return None
    return f"{type(model).__name__} has neither norms with weights nor biases, and transformers tells its device by a parameter"


def _known_ties(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Of a model of transformers and its parts: prefix, part, and the names of what they know of tied parameters."""
    for prefix, module in model.named_modules():
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            if isinstance(getattr(module, attribute, None), dict):
                yield f"{prefix}." if prefix else "", module, attribute


def _forget(model: nn.Module, tied: Any) -> None:
    """Let a model of transformers tie the weights of these modules no more."""
    for prefix, module, attribute in _known_ties(model):
        own = [f"{name.removeprefix(prefix)}.weight" for name in tied if name.startswith(prefix)]
        known: dict[str, str] = getattr(module, attribute)
        kept = {key: value for key, value in known.items() if not any(re.fullmatch(key, name) for name in own)}
        if kept != known:
            setattr(module, attribute, kept)


def _remember(model: nn.Module) -> None:
    """Undo `_forget`."""
    parts = [module for _, module, attribute in _known_ties(model) if attribute == "_tied_weights_keys"]
    for module in parts:
        vars(module).pop("_tied_weights_keys", None)
    for module in parts:
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
