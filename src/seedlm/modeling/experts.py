"""The experts of a mixture whose weights stay packed.

transformers holds the experts of a layer as stacks, one parameter for each projection. `SeedExperts` takes the place of such a
module. Each matrix in it is a `SeedLinear` of its own, `packed.PART.EXPERT`, and only those of experts that some token goes to
are dequantized. A part is a stack, or one of several that checkpoints hold apart and transformers joins:

    projection        parts when stacked on disk      parts when held expert by expert (Mixtral)
    gate_up_proj      gate_up_proj                    w1, w3: their outputs are concatenated
    down_proj         down_proj                       w2

All else of the module, its activation, gate and biases, is taken over as it is, so that the same class serves all
architectures whose experts follow transformers' `use_experts_implementation`, and those whose `Kind` stands here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Kind:
    """How a class of experts computes.

    reads        the projections of the hidden states, by the parameters' names; their outputs are concatenated
    writes       the one of what the gate or the activation makes of that; None if there is only the other (JetMoe)
    transposed   those whose matrices are [in_features, out_features]
    has_gate     whether half of the outputs are a gate
    has_bias     whether each projection has a bias, a parameter called after it
    flat         whether its parameters have two dimensions, the experts' matrices one below the other
    """

    reads: tuple[str, ...] = ("gate_up_proj",)
    writes: str | None = "down_proj"
    transposed: frozenset[str] = frozenset()
    has_gate: bool = True
    has_bias: bool = False
    flat: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        return self.reads if self.writes is None else (*self.reads, self.writes)


_PARALLEL: Final = "JetMoeParallelExperts"
"""One projection alone, called ``weight``, of tokens that come sorted by expert."""
_DBRX: Final = "DbrxExperts"
"""Its parameters are a child's."""
_UNMARKED: Final = {
    "Llama4TextExperts": Kind(transposed=frozenset({"gate_up_proj", "down_proj"})),
    "Step3p7Experts": Kind(),
    "LongcatFlashExperts": Kind(),
    "InklingSharedExperts": Kind(("gate_proj", "up_proj"), "down_proj"),
    _PARALLEL: Kind(("weight",), None, has_gate=False),
    _DBRX: Kind(("mlp.w1", "mlp.v1"), "mlp.w2", transposed=frozenset({"mlp.w2"}), flat=True),
}
"""The experts that do not use `use_experts_implementation`."""


@dataclass(frozen=True)
class Projection:
    """A parameter of a dense experts module that holds a matrix for each expert.

    shape        (experts, out_features, in_features)
    transposed   whether its matrices are [in_features, out_features]
    flat         whether it has two dimensions, the first two of the three in one
    """

    shape: tuple[int, int, int]
    transposed: bool
    flat: bool

    @property
    def stacked(self) -> tuple[int, int, int]:
        """The parameter's shape, in three dimensions."""
        experts, rows, columns = self.shape
        return (experts, columns, rows) if self.transposed else self.shape

    def matrices(self, parameter: Tensor) -> Tensor:
        """[experts, out_features, in_features], a view of the parameter."""
        stack = parameter.view(self.stacked)
        return stack.mT if self.transposed else stack

    def rows(self, values: Tensor) -> Tensor:
        """Numbers for each row of the matrices [experts, out_features], as `stacked` with one input feature."""
        return values[:, None] if self.transposed else values[:, :, None]

    def parameter(self, matrices: Sequence[Tensor]) -> Tensor:
        """The parameter that holds these, [out_features, in_features] each."""
        stack = torch.stack([matrix.T if self.transposed else matrix for matrix in matrices])
        return stack.flatten(0, 1) if self.flat else stack


def projections_of(module: Any) -> dict[str, Projection]:
    """The projections of a dense experts module, by the names of its parameters; empty if it is none."""
    kind = _kind_of(module)
    found: dict[str, Projection] = {}
    if kind is None:
        return found
    for name in kind.projections:
        parent, _, leaf = name.rpartition(".")
        parameter = module.get_submodule(parent)._parameters.get(leaf)
        if parameter is not None:
            stack = parameter.unflatten(0, (module.num_experts, -1)) if kind.flat else parameter
            experts, rows, columns = stack.mT.shape if name in kind.transposed else stack.shape
            found[name] = Projection((experts, rows, columns), name in kind.transposed, kind.flat)
    return found


def stacks_of(model: nn.Module) -> dict[str, tuple[str, str, Projection]]:
    """All such parameters of a model, by name: the name of the experts module, and `projections_of` it."""
    return {
        f"{name}.{projection}".removeprefix("."): (name, projection, form)
        for name, module in model.named_modules()
        for projection, form in projections_of(module).items()
    }


def _kind_of(module: nn.Module) -> Kind | None:
    """How a dense experts module computes; None if it is not one that `SeedExperts` can stand for."""
    if isinstance(module, SeedExperts):
        return None
    if type(module).__name__ in _UNMARKED:
        return _UNMARKED[type(module).__name__]
    marks: Any = module  # by `use_experts_implementation`
    if not isinstance(module._parameters.get("down_proj"), Tensor):
        return None
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return None
    reads = ("gate_up_proj" if marks.has_gate else "up_proj",)
    transposed = frozenset((*reads, "down_proj") if marks.is_transposed else ())
    return Kind(reads, "down_proj", transposed, marks.has_gate, marks.has_bias)


class SeedExperts(nn.Module):
    """Experts of transformers with packed matrices.

    dense    the module whose place it takes: everything but the packed projections is shared with it
    parts    projection -> parts of its output features, in order
    layers   part -> the layers of all experts
    stacks   part -> the tensor that a checkpoint's original holds it as, for those that are stacked there
    halves   of projections whose layers give outputs of two halves by turns (Inkling): which of them, in order, from 0
    Experts from number `identity_from` on hand back what they are given (LongCat).
    """

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
        halves: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        kind = _kind_of(dense)
        assert kind is not None
        super().__init__()
        _take_over(self, dense)
        self.dense_class, self.kind, self.projections = type(dense), kind, projections_of(dense)
        self.halves = dict(halves or {})
        self.identity_from = getattr(dense, "num_routed_experts", None) if hasattr(dense, "identity_expert") else None
        self.parts = {projection: tuple(names) for projection, names in parts.items()}
        self.stacks = dict(stacks)
        for projection in parts:
            parameters, leaf = _own(self, projection)
            del parameters[leaf]
        self.add_module(PACKED, nn.ModuleDict({part: nn.ModuleList(group) for part, group in layers.items()}))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Any = None,
        top_k_weights: Tensor | None = None,
        *,
        gammas: Tensor | None = None,
    ) -> Tensor:
        """What the dense module computes.

        hidden_states   [..., hidden]
        top_k_index     int64 [tokens, k], the experts of each token; one that does not exist stands for none
        top_k_weights   [tokens, k], how much each of them counts
        gammas          [..., experts], in place of these two (Inkling's shared experts): all tokens go to all experts
        returns         [..., hidden]
        Without index and weights (Llama 4): tokens come sorted by expert, as many for each. With a list in place of the index
        (JetMoe): as many for each as it says.
        """
        if self.dense_class.__name__ == _PARALLEL:
            groups = hidden_states.split(top_k_index)
            return torch.cat([self._project("weight", expert, x) for expert, x in enumerate(groups)])
        if gammas is not None:
            tokens, weights = hidden_states.flatten(0, -2), gammas.flatten(0, -2)
            shared = [self._expert(expert, tokens, weight) for expert, weight in enumerate(weights[..., None].unbind(1))]
            return torch.stack(shared).float().sum(0).to(tokens.dtype).view(hidden_states.shape)
        if top_k_index is None or top_k_weights is None:
            groups = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(expert, x) for expert, x in enumerate(groups)])
        real = self.num_experts if self.identity_from is None else self.identity_from
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        dtype = torch.result_type(tokens, top_k_weights)
        outputs = torch.zeros(*top_k_index.shape, tokens.shape[-1], dtype=dtype, device=tokens.device)
        for expert in top_k_index.unique().tolist():
            if expert < real or self.identity_from is not None:
                token, rank = torch.where(top_k_index == expert)
                x = tokens[token]
                outputs[token, rank] = (self._expert(expert, x) if expert < real else x) * top_k_weights[token, rank, None]
        return outputs.sum(1).to(tokens.dtype).view(hidden_states.shape)

    def _expert(self, expert: int, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """One expert's output for some tokens [n, hidden], whose weights [n, 1] count before the last product if given."""
        read = _joined([self._project(projection, expert, x) for projection in self.kind.reads])
        apply_gate: Any = getattr(self.dense_class, "_apply_gate", _apply_gate)
        inner = apply_gate(self, read) if self.kind.has_gate else self.act_fn(read)
        assert self.kind.writes is not None
        out = self._project(self.kind.writes, expert, inner if weight is None else inner * weight)
        return self.post_expert_norm(out) if getattr(self, "has_post_expert_norm", False) else out

    def _project(self, projection: str, expert: int, x: Tensor) -> Tensor:
        if projection in self.parts:
            out = _joined([layers[expert](x) for layers in self._layers(projection)])
            if halves := self.halves.get(projection):
                out = _joined([out[..., half::2] for half in halves])
        else:
            out = nn.functional.linear(x, self.projections[projection].matrices(self.get_parameter(projection))[expert])
        return out + getattr(self, f"{projection}_bias")[expert] if self.kind.has_bias else out

    def _layers(self, projection: str) -> list[Any]:
        packed: Any = getattr(self, PACKED)
        return [packed[part] for part in self.parts[projection]]

    def to_dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The dense module again, with the same weights."""
        dense = self.dense_class.__new__(self.dense_class)
        _take_over(dense, self, but=("dense_class", "kind", "projections", "parts", "stacks", "halves", "identity_from"))
        del dense._modules[PACKED]
        for projection, form in self.projections.items():
            if projection not in self.parts:
                continue
            matrices = [
                torch.cat([layer.dequantize(dtype) for layer in expert])
                for expert in zip(*self._layers(projection), strict=True)
            ]
            if halves := self.halves.get(projection):
                matrices = [torch.cat([matrix[half::2] for half in halves]) for matrix in matrices]
            parameters, leaf = _own(dense, projection)
            parameters[leaf] = nn.Parameter(form.parameter(matrices), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        return f"{self.dense_class.__name__}, {', '.join(self.parts)}"


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
    forms = projections_of(module)
    parts = {projection: projection.rpartition(".")[2] for projection in projections}
    layers: dict[str, list[SeedLinear]] = {part: [] for part in parts.values()}
    stacks, errors = {}, {}
    for projection, part in parts.items():
        form = forms[projection]
        stacks[part] = Stack(projection, form.stacked, form.transposed, form.flat)
        for expert, weight in enumerate(form.matrices(module.get_parameter(projection).detach())):
            try:
                encoded, squared_error = encode(
                    weight.contiguous(), format, backend=backend, on_progress=on_progress, **settings
                )
            except TensorError as reason:
                raise TensorError(f"{projection}.{expert}: {reason}") from None
            layers[part].append(SeedLinear.from_encoded(encoded, dtype=weight.dtype))
            norm = float(weight.double().square().sum())
            errors[f"{projection}.{expert}"] = relative_error(squared_error, norm)
    joined = {projection: (part,) for projection, part in parts.items()}
    return SeedExperts(module, joined, layers, stacks).train(module.training), errors


def _take_over(module: nn.Module, other: nn.Module, but: Sequence[str] = ()) -> None:
    """Give a module everything that another one holds: its parameters, buffers, children, hooks and plain attributes.

    The objects are shared, the dicts that hold them are not, so that each module can replace or drop entries of its own. The
    constructor of experts is not called, since each architecture's wants a configuration of its own and makes full weights.
    """
    held = {name: value for name, value in vars(other).items() if name not in but}
    vars(module).update({name: value.copy() if isinstance(value, dict) else value for name, value in held.items()})


def _own(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a parameter, of a module or of its children, which become copies, and its name there."""
    *children, leaf = name.split(".")
    for child in children:
        other = module.get_submodule(child)
        own: Any = type(other).__new__(type(other))
        _take_over(own, other)
        own._is_hf_initialized = True  # or transformers would start weights anew in it, by names that may be gone
        module._modules[child] = module = own
    return module._parameters, leaf


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat([*outputs], -1)


def _apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * (experts.mlp.activation_fn if experts.dense_class.__name__ == _DBRX else experts.act_fn)(gate)
