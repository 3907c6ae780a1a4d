"""Where the tensors of a file belong in a model of transformers, whose names and layout differ from the files'.

On loading, transformers first renames tensors, then joins some: Mixtral's ``block_sparse_moe.experts.7.w1.weight`` becomes
``mlp.experts.7.w1.weight`` and then a part of ``mlp.experts.gate_up_proj``. Codes follow the renaming, and stop before the
joining: in `SeedExperts` every matrix has a place of its own. `ExpertNames` (integrations/transformers/loading.py) is the
renaming that leads there, after all others and before any joining; saving reverses it like the others, so that a saved folder
has the names of the loaded one. transformers is imported inside: it may be what imports this package (its hook).

    mlp.experts.7.w1             <->   mlp.experts.packed.w1.7
    mlp.experts.gate_up_proj.7   <->   mlp.experts.packed.gate_up_proj.7
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from seedlm.modeling.embedding import is_embedding
from seedlm.modeling.experts import PACKED, projections_of
from seedlm.modeling.linear import is_linear
from seedlm.storage.checkpoint import Stack

LAST_NUMBER: Final = re.compile(r"(.*)\.(\d+)((?:\.[^.\d][^.]*)*)")
_JOINED_MATRICES: Final = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
"""What transformers may do to matrices, one for each expert, so that rows stay rows."""
_JOINED_STACKS: Final[tuple[list[tuple[str, int | None]], ...]] = ([], [("Transpose", None)], [("Concatenate", 1)])
"""And to stacks of them. How a stack lies on the disk is in its description, whatever its parameter is like."""


@dataclass(frozen=True)
class Place:
    """Where a packed module belongs: a linear layer of the model, or one matrix of an experts module.

    name         the linear layer, or the experts module
    projection   of the experts, "" for a linear layer
    part         the part of that projection's outputs, which is number `order` of `count`
    expert       number of the expert
    stored       the module's name after renaming, as `ExpertNames` finds it
    """

    name: str
    projection: str = ""
    part: str = ""
    order: int = 0
    count: int = 1
    expert: int = 0
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
        self._experts = {name: found for name, module in model.named_modules() if (found := projections_of(module))}

    def embedding(self, module: str) -> str | None:
        """The embedding that a module of a file is; None if the model has none there that a `SeedEmbedding` can stand for."""
        found = self.module(module)
        return found if found is not None and is_embedding(self._modules[found]) else None

    def module(self, module: str) -> str | None:
        """The module of the model, of whatever kind, that one of a file is called after; None if there is none."""
        return self._find(self.renamed(f"{module}.weight").removesuffix(".weight"), self._modules)

    def place(self, module: str, stack: Stack | None) -> Place | None:
        """Where a module of a file belongs; None if the model has no such place."""
        renamed = self.renamed(f"{module}.weight").removesuffix(".weight")
        if linear := self._find(renamed, self._linears):
            return Place(linear)
        match = LAST_NUMBER.fullmatch(module if stack else renamed)
        if match is None:
            return None
        key = self.renamed(stack.tensor) if stack else f"{renamed}.weight"
        converter, order = self.converter(key)
        steps = _steps(converter) if converter else []
        count = len(converter.source_patterns) if converter else 1
        name, _, projection = (converter.rename_source_key(key)[0] if converter else key).rpartition(".")
        if stack is None:
            if steps not in _JOINED_MATRICES:
                return None
            part = match[3].lstrip(".").replace(".", "_")
        else:
            if steps not in _JOINED_STACKS:
                return None
            part = projection if count == 1 else stack.tensor.removesuffix(".weight").rpartition(".")[2]
        experts = self._find(name, self._experts)
        if experts is None or projection not in self._experts[experts]:
            return None
        return Place(experts, projection, part, order, count, int(match[2]), renamed)

    def template(self, place: Place) -> dict[str, str]:
        """The entries of `ExpertNames` for a place in experts: with and without the base model's prefix, as files have it."""
        match = LAST_NUMBER.fullmatch(place.stored)
        assert match is not None
        old, new = f"{match[1]}.*{match[3]}", f"{place.name}.{PACKED}.{place.part}.*"
        bare = (old.removeprefix(self._prefix), new.removeprefix(self._prefix))
        return {bare[0]: bare[1], self._prefix + bare[0]: self._prefix + bare[1]}

    def converter(self, key: str) -> tuple[Any, int]:
        """What would convert a renamed tensor, and which of its sources the tensor is."""
        for converter in self._converters:
            _, pattern = converter.rename_source_key(key)
            if pattern is not None:
                return converter, converter.source_patterns.index(pattern)
        return None, 0

    def renamed(self, key: str) -> str:
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def _find(self, name: str, names: Iterable[str]) -> str | None:
        """A name in the model, which may have the base model's prefix more or less."""
        return next((n for n in (name, self._prefix + name, name.removeprefix(self._prefix)) if n in names), None)


def _steps(converter: Any) -> list[tuple[str, Any]]:
    return [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
