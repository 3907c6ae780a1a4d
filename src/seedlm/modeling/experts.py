"""The experts of a mixture whose weights stay packed.

transformers holds the experts of a layer as stacks, one parameter [experts, ...] for each projection. `SeedExperts` takes the
place of such a module. Each matrix in it is a `SeedLinear` of its own, `packed.PART.EXPERT`, and only those of experts that
some token goes to are dequantized. A part is a stack, or one of several that checkpoints hold apart and transformers joins:

    projection        parts when stacked on disk      parts when held expert by expert (Mixtral)
    gate_up_proj      gate_up_proj                    w1, w3: their outputs are concatenated
    down_proj         down_proj                       w2

All else of the module, its activation, gate and biases, is taken over as it is, so that the same class serves all
architectures whose experts follow transformers' `use_experts_implementation`, and Llama 4's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from seedlm.codes.base import Format, relative_error
from seedlm.codes.encoded import encode
from seedlm.errors import TensorError
from seedlm.modeling.linear import SeedLinear
from seedlm.progress import Tell
from seedlm.storage.checkpoint import Stack

PACKED: Final = "packed"
"""The child that holds the layers: no pattern by which transformers joins or splits experts' tensors matches below it."""

_PROJECTIONS: Final = ("gate_up_proj", "up_proj", "down_proj")
_PARALLEL: Final = "JetMoeParallelExperts"
"""One projection alone, called ``weight``, of tokens that come sorted by expert."""
_PLAIN: Final = {"has_gate": True, "has_bias": False, "is_transposed": False}
_UNMARKED: Final = {
    "Llama4TextExperts": {**_PLAIN, "is_transposed": True},
    "Step3p7Experts": _PLAIN,
    "LongcatFlashExperts": _PLAIN,
    _PARALLEL: {**_PLAIN, "has_gate": False},
}
"""What `use_experts_implementation` would have set on experts that do not use it."""


def projections_of(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The projections of a dense experts module: name -> (experts, out_features, in_features); empty if it is none."""
    traits = experts_traits(module)
    if traits is None:
        return {}
    names = ("weight",) if type(module).__name__ == _PARALLEL else _PROJECTIONS
    stacks = {name: module._parameters.get(name) for name in names}
    shapes = {
        name: stack.mT.shape if traits["is_transposed"] else stack.shape for name, stack in stacks.items() if stack is not None
    }
    return {name: (shape[0], shape[1], shape[2]) for name, shape in shapes.items()}


def experts_traits(module: nn.Module) -> dict[str, bool] | None:
    """How a dense experts module computes; None if it is not one that `SeedExperts` can stand for."""
    if isinstance(module, SeedExperts):
        return None
    if type(module).__name__ in _UNMARKED:
        return _UNMARKED[type(module).__name__]
    if not isinstance(module._parameters.get("down_proj"), Tensor):
        return None
    names = ("has_gate", "has_bias", "is_transposed")
    return {name: getattr(module, name) for name in names} if all(hasattr(module, name) for name in names) else None


class SeedExperts(nn.Module):
    """Experts of transformers with packed matrices.

    dense    the module whose place it takes: everything but the packed projections is shared with it
    parts    projection -> parts of its output features, in order
    layers   part -> the layers of all experts
    stacks   part -> the tensor that a checkpoint's original holds it as, for those that are stacked there
    Experts from number `identity_from` on hand back what they are given (LongCat).
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    num_experts: int
    identity_from: int | None
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(
        self,
        dense: nn.Module,
        parts: Mapping[str, Sequence[str]],
        layers: Mapping[str, Sequence[SeedLinear]],
        stacks: Mapping[str, Stack],
    ) -> None:
        traits = experts_traits(dense)
        assert traits is not None
        super().__init__()
        _take_over(self, dense)
        self.__dict__.update(traits)
        self.kind = type(dense)
        self.identity_from = getattr(dense, "num_routed_experts", None) if hasattr(dense, "identity_expert") else None
        self.parts = {projection: tuple(names) for projection, names in parts.items()}
        self.stacks = dict(stacks)
        for projection in parts:
            del self._parameters[projection]
        self.add_module(PACKED, nn.ModuleDict({part: nn.ModuleList(group) for part, group in layers.items()}))

    def forward(self, hidden_states: Tensor, top_k_index: Any = None, top_k_weights: Tensor | None = None) -> Tensor:
        """What the dense module computes.

        hidden_states   [tokens, hidden]
        top_k_index     int64 [tokens, k], the experts of each token; one that does not exist stands for none
        top_k_weights   [tokens, k], how much each of them counts
        returns         [tokens, hidden]
        Without index and weights (Llama 4): tokens come sorted by expert, as many for each. With a list in place of the index
        (JetMoe): as many for each as it says.
        """
        if self.kind.__name__ == _PARALLEL:
            groups = hidden_states.split(top_k_index)
            return torch.cat([self._project("weight", expert, x) for expert, x in enumerate(groups)])
        if top_k_index is None or top_k_weights is None:
            groups = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(expert, x) for expert, x in enumerate(groups)])
        real = self.num_experts if self.identity_from is None else self.identity_from
        dtype = torch.result_type(hidden_states, top_k_weights)
        outputs = torch.zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=dtype, device=hidden_states.device)
        for expert in top_k_index.unique().tolist():
            if expert < real or self.identity_from is not None:
                token, rank = torch.where(top_k_index == expert)
                x = hidden_states[token]
                outputs[token, rank] = (self._expert(expert, x) if expert < real else x) * top_k_weights[token, rank, None]
        return outputs.sum(1).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        """One expert's output for some tokens [n, hidden]."""
        if self.has_gate:
            apply_gate: Any = getattr(self.kind, "_apply_gate", _apply_gate)
            inner = apply_gate(self, self._project("gate_up_proj", expert, x))
        else:
            inner = self.act_fn(self._project("up_proj", expert, x))
        out = self._project("down_proj", expert, inner)
        return self.post_expert_norm(out) if getattr(self, "has_post_expert_norm", False) else out

    def _project(self, projection: str, expert: int, x: Tensor) -> Tensor:
        if projection in self.parts:
            outputs = [layers[expert](x) for layers in self._layers(projection)]
            out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        else:
            weight = getattr(self, projection)[expert]
            out = nn.functional.linear(x, weight.T if self.is_transposed else weight)
        return out + getattr(self, f"{projection}_bias")[expert] if self.has_bias else out

    def _layers(self, projection: str) -> list[Any]:
        packed: Any = getattr(self, PACKED)
        return [packed[part] for part in self.parts[projection]]

    def to_dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The dense module again, with the same weights."""
        dense = self.kind.__new__(self.kind)
        _take_over(dense, self, but=("kind", "parts", "stacks", "identity_from"))
        del dense._modules[PACKED]
        for projection in self.parts:
            matrices = [
                torch.cat([layer.dequantize(dtype) for layer in expert])
                for expert in zip(*self._layers(projection), strict=True)
            ]
            stack = torch.stack([matrix.T if self.is_transposed else matrix for matrix in matrices])
            dense.register_parameter(projection, nn.Parameter(stack, requires_grad=False))
        return dense

    def extra_repr(self) -> str:
        return f"{self.kind.__name__}, {', '.join(self.parts)}"


def compress_experts(
    module: nn.Module,
    projections: Sequence[str],
    format: Format,
    *,
    backend: str = "auto",
    on_progress: Tell | None = None,
    **settings: Any,
) -> tuple[SeedExperts, dict[str, float]]:
    """Compress the experts of one layer, matrix by matrix.

    projections   of `projections_of(module)`, those to be compressed
    returns       the packed module, and ||W - W^||_F / ||W||_F of each matrix, by projection and number
    Raises TensorError, naming the matrix, for one that cannot be encoded.
    """
    traits = experts_traits(module)
    assert traits is not None
    layers: dict[str, list[SeedLinear]] = {projection: [] for projection in projections}
    stacks, errors = {}, {}
    for projection in projections:
        experts, rows, columns = module.get_parameter(projection).shape
        stacks[projection] = Stack(projection, (experts, rows, columns), traits["is_transposed"])
        for expert, matrix in enumerate(module.get_parameter(projection).detach()):
            weight = matrix.T.contiguous() if traits["is_transposed"] else matrix
            try:
                encoded, squared_error = encode(weight, format, backend=backend, on_progress=on_progress, **settings)
            except TensorError as reason:
                raise TensorError(f"{projection}.{expert}: {reason}") from None
            layers[projection].append(SeedLinear.from_encoded(encoded, dtype=weight.dtype))
            norm = float(weight.double().square().sum())
            errors[f"{projection}.{expert}"] = relative_error(squared_error, norm)
    parts = {projection: (projection,) for projection in projections}
    return SeedExperts(module, parts, layers, stacks).train(module.training), errors


def _take_over(module: nn.Module, other: nn.Module, but: Sequence[str] = ()) -> None:
    """Give a module everything that another one holds: its parameters, buffers, children, hooks and plain attributes.

    The objects are shared, the dicts that hold them are not, so that each module can replace or drop entries of its own. The
    constructor of experts is not called, since each architecture's wants a configuration of its own and makes full weights.
    """
    held = {name: value for name, value in vars(other).items() if name not in but}
    vars(module).update({name: value.copy() if isinstance(value, dict) else value for name, value in held.items()})


def _apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)
