"""Where the tensors of a file belong in a model of transformers, whose names and layout differ from the files'.

On loading, transformers first renames tensors, then joins some: Mixtral's ``block_sparse_moe.experts.7.w1.weight`` becomes
``mlp.experts.7.w1.weight`` and then a part of ``mlp.experts.gate_up_proj``. Codes follow the renaming, and stop before the
joining: in `SeedExperts` every matrix has a place of its own. `ExpertNames` (integrations/transformers/loading.py) is the
renaming that leads there, after all others and before any joining; saving reverses it like the others, so that a saved folder
has the names of the loaded one. transformers is imported inside: it may be what imports this package (its hook).

    mlp.experts.7.w1             <->   mlp.experts.packed.w1.7
    mlp.experts.gate_up_proj.7   <->   mlp.experts.packed.gate_up_proj.7
    ffn.experts.mlp.w1.7         <->   ffn.experts.packed.w1.7                    DBRX, whose parameters are a child's
    mlp.experts.71.gate_proj     <->   mlp.vision_moe.experts.packed.gate_proj.7  Ernie 4.5 VL, the second half of 128
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from seedlm.modeling.embedding import is_embedding
from seedlm.modeling.experts import PACKED, Projection, stacks_of
from seedlm.modeling.linear import is_linear
from seedlm.storage.checkpoint import Stack

LAST_NUMBER: Final = re.compile(r"(.*)\.(\d+)((?:\.[^.\d][^.]*)*)")
_Steps = list[tuple[str, int | None]]
_SHARED_OUT: Final[_Steps] = [("ErnieFuseAndSplitTextVisionExperts", None)]
"""Half of the matrices go to one module, half to another, each joined like the others'."""
_JOINED_MATRICES: Final[tuple[_Steps, ...]] = (
    [("MergeModulelist", 0)],
    [("MergeModulelist", 0), ("Concatenate", 1)],
    _SHARED_OUT,
)
"""What transformers may do to matrices, one for each expert, so that rows stay rows."""
_BY_TURNS: Final[tuple[_Steps, ...]] = ([("Interleave", 1)], [("Interleave", 1), ("Chunk", 1)])
"""Rows 0, 2, 4 and so on of a stack's matrices become the first half of a parameter's and the others the second, or each half a
parameter of its own."""
_JOINED_STACKS: Final[tuple[_Steps, ...]] = ([], [("Transpose", None)], [("Concatenate", 1)], *_BY_TURNS)
"""And to stacks of them. How a stack lies on the disk is in its description, whatever its parameter is like."""
_EXPANDS: Final = ("Inkling2LoopDequantizeExperts", None)
"""Makes floats of a stack and its scales, and leaves one alone that has none."""


@dataclass(frozen=True)
class Place:
    """Where a packed module belongs: a linear layer of the model, or one matrix of an experts module.

    name         the linear layer, or the experts module
    projection   of the experts, "" for a linear layer
    part         the part of that projection's outputs, which is number `order` of `count`
    expert       number of the expert
    halves       if its rows are of two halves of the outputs by turns, the projection of each (`SeedExperts`)
    stored       the module's name after renaming, as `ExpertNames` finds it
    """

    name: str
    projection: str = ""
    part: str = ""
    order: int = 0
    count: int = 1
    expert: int = 0
    halves: tuple[str, ...] = ()
    stored: str = ""

    @property
    def layer(self) -> str:
        """The name of the packed layer in the model."""
        return f"{self.name}.{PACKED}.{self.part}.{self.expert}" if self.projection else self.name


class Names:
    """Finds the places in one model of transformers, which may be without weights."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._linears = {name for name, module in model.named_modules() if is_linear(module)}
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._stacks = stacks_of(model)

    def embedding(self, module: str) -> str | None:
        """The embedding that a module of a file is; None if the model has none there that a `SeedEmbedding` can stand for."""
        found = self.module(module)
        return found if found is not None and is_embedding(self._modules[found]) else None

    def module(self, module: str) -> str | None:
        """The module of the model, of whatever kind, that one of a file is called after; None if there is none."""
        return self._find(self.renamed(f"{module}.weight").removesuffix(".weight"), self._modules)

    def place(self, module: str, stack: Stack | None) -> Place | None:
        """Where a module of a file belongs; None if the model has no such place, or not all parts of codes would go there."""
        renamed = self.renamed(f"{module}.weight").removesuffix(".weight")
        if self.renamed(f"{module}.weight_x") != f"{renamed}.weight_x":
            return None
        if linear := self._find(renamed, self._linears):
            return Place(linear)
        match = LAST_NUMBER.fullmatch(module if stack else renamed)
        if match is None:
            return None
        key = self.renamed(stack.tensor) if stack else f"{renamed}.weight"
        converter, order = self.converter(key)
        steps, count = _steps(converter)
        found = [where for target in self.targets(key) if (where := self.projection(target))]
        if steps not in (_JOINED_MATRICES if stack is None else _JOINED_STACKS) or not found:
            return None
        other, expert = divmod(int(match[2]), found[0][2].shape[0]) if steps == _SHARED_OUT else (0, int(match[2]))
        if other >= len(found):
            return None
        name, projection, _ = found[other]
        halves = tuple(each for _, each, _ in (found if len(found) > 1 else 2 * found)) if steps in _BY_TURNS else ()
        if stack is None:
            part = match[3].lstrip(".").replace(".", "_")
        else:
            part = (projection if count == 1 else stack.base).rpartition(".")[2]
        return Place(name, projection, part, order, count, expert, halves, renamed)

    def template(self, place: Place) -> dict[str, str]:
        """The entries of `ExpertNames` for a place in experts: with and without the base model's prefix, as files have it."""
        match = LAST_NUMBER.fullmatch(place.stored)
        assert match is not None
        old, new = f"{match[1]}.*{match[3]}", f"{place.name}.{PACKED}.{place.part}.*"
        if place.expert != int(match[2]):
            old, new = place.stored, place.layer
        bare = (old.removeprefix(self._prefix), new.removeprefix(self._prefix))
        return {bare[0]: bare[1], self._prefix + bare[0]: self._prefix + bare[1]}

    def converter(self, key: str) -> tuple[Any, int]:
        """What would convert a renamed tensor, and which of its sources the tensor is."""
        for converter in self._converters:
            _, pattern = converter.rename_source_key(key)
            if pattern is not None:
                return converter, converter.source_patterns.index(pattern)
        return None, 0

    def targets(self, key: str) -> list[str]:
        """What a renamed tensor becomes, or a part of."""
        converter, _ = self.converter(key)
        if converter is None:
            return [key]
        first, patterns = converter.rename_source_key(key)[0], converter.target_patterns
        return [first.replace(patterns[0], other) for other in patterns] if patterns[0] in first else [first]

    def projection(self, parameter: str) -> tuple[str, str, Projection] | None:
        """The experts module, and which of its projections a parameter is; None if it is none."""
        found = self._find(parameter, self._stacks)
        return self._stacks[found] if found is not None else None

    def renamed(self, key: str) -> str:
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def _find(self, name: str, names: Iterable[str]) -> str | None:
        """A name in the model, which may have the base model's prefix more or less."""
        return next((n for n in (name, self._prefix + name, name.removeprefix(self._prefix)) if n in names), None)


def _steps(converter: Any) -> tuple[_Steps, int]:
    """What a converter does, and to how many kinds of tensors; (nothing, 1) without one."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations] if converter else []
    if _EXPANDS in steps:
        return [step for step in steps if step != _EXPANDS], 1
    return steps, len(converter.source_patterns) if converter else 1
