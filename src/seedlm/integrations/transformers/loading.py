"""Empty packed layers in a model that is being loaded, wherever codes of its files belong (`modeling.places`), and checks
that exactly these codes came to fill them.

Last, `CodeNames` leads codes, which in files have the weight's name, to the buffer that holds them. transformers and accelerate
go by names of buffers, so the layers of a model that they manage have those in its state dict (`SeedLinear.own_names`).

    mlp.experts.packed.w1.7.weight   <->   mlp.experts.packed.w1.7.weight_words
"""

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from seedlm.codes.base import CODES
from seedlm.errors import CheckpointError
from seedlm.integrations.transformers.files import Verification
from seedlm.modeling.embedding import SeedEmbedding, replace_embedding
from seedlm.modeling.experts import PACKED, SeedExperts, projections_of
from seedlm.modeling.linear import PackedModule, SeedLinear, own_name
from seedlm.modeling.places import LAST_NUMBER, Names, Place
from seedlm.modeling.quantize import packed_modules, share_inputs
from seedlm.storage.checkpoint import QUANT_METHOD, Checkpoint, Stack, stored_name


class ExpertNames(WeightRenaming):
    """Renames the tensors of packed experts, and nothing else.

    templates   name of a matrix with its expert's number as ``*`` -> the new name with the number as ``*``; or whole names,
                where the number is another one
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        super().__init__("experts.*", f"experts.{PACKED}.*")
        self.templates = dict(templates)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        module, _, leaf = source_key.rpartition(".")
        renamed = self.module(module)
        if renamed == module:
            return source_key, None
        self._was_used = True
        return f"{renamed}.{leaf}", self.source_patterns[0]

    def module(self, name: str) -> str:
        if name in self.templates:
            return self.templates[name]
        match = LAST_NUMBER.fullmatch(name)
        template = self.templates.get(f"{match[1]}.*{match[3]}") if match else None
        return name if match is None or template is None else template.replace("*", match[2])

    def reverse_transform(self) -> "ExpertNames":
        return ExpertNames({new: old for old, new in self.templates.items()})


class CodeNames(WeightRenaming):
    """Renames the codes of packed layers between the weight's name and their buffer's, and nothing else.

    layers   names of the layers, with and without the base model's prefix
    """

    def __init__(self, layers: Iterable[str], old: str = "weight", new: str = own_name(CODES)) -> None:
        super().__init__(old, new)
        self.layers, self.old, self.new = frozenset(layers), old, new

    @classmethod
    def of(cls, model: nn.Module) -> "CodeNames":
        """Of all packed layers of a model, whose state dict from now on has the names of buffers."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        names: set[str] = set()
        for name, layer in packed_modules(model):
            layer.own_names = True
            names |= {name, prefix + name, name.removeprefix(prefix)}
        return cls(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        layer, _, leaf = source_key.rpartition(".")
        if leaf != self.old or layer not in self.layers:
            return source_key, None
        self._was_used = True
        return f"{layer}.{self.new}", self.source_patterns[0]

    def reverse_transform(self) -> "CodeNames":
        return CodeNames(self.layers, self.new, self.old)


class Places:
    """The packed layers of a model that is being loaded, and which modules of its files fill them."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, modules: dict[str, str], names: list[WeightRenaming]) -> None:
        self._model, self._checkpoint, self._modules, self._names = weakref.ref(model), checkpoint, modules, names
        self._verification = Verification(checkpoint)

    @classmethod
    def fill(cls, model: nn.Module, checkpoint: Checkpoint) -> "Places":
        """Swap all linear layers, experts and embeddings that are packed in a folder for empty packed ones on the same device.

        Raises CheckpointError unless the codes are those of weights in the right shapes, and no other codes are there.
        """
        described = checkpoint.packed
        if not described:
            raise CheckpointError(f"{checkpoint.folder}: quant_method is {QUANT_METHOD!r} but no weight is packed")

        def check_shape(module: str, shape: tuple[int, int]) -> None:
            found = described[module].shape
            if found != shape:
                raise CheckpointError(f"{module} must be {[*shape]} in this model, {checkpoint.folder} has {[*found]}")

        def empty(module: str, shape: tuple[int, int], like: Tensor, bias: bool = False) -> SeedLinear:
            check_shape(module, shape)
            format = described[module].format
            dtype = torch.float32 if kept.search(f"{module}.weight") else like.dtype
            layer = SeedLinear(shape[1], shape[0], format, bias=bias, dtype=dtype, device=like.device)
            layer.own_names = True
            return layer

        names, kept = Names(model), _kept_in_float32(model)
        filled: dict[str, str] = {}
        tied: dict[str, str] = {}
        for module in (module for module, info in described.items() if info.embedding):
            where = names.embedding(module)
            if where is None:
                raise CheckpointError(
                    f"{module} is packed as an embedding, and {type(model).__name__} has no embedding of that name that only "
                    f"looks rows up"
                )
            if filled.setdefault(where, module) != module or where in tied:
                raise CheckpointError(f"{module} and {filled.get(where, tied.get(where))} are packed, both for {where}")
            dense: Any = model.get_submodule(where)
            check_shape(module, (dense.num_embeddings, dense.embedding_dim))
            dtype = torch.float32 if kept.search(f"{module}.weight") else dense.weight.dtype
            packed = SeedEmbedding(dense, described[module].format, dtype=dtype)
            tied |= dict.fromkeys(replace_embedding(model, where, packed), module)
        for name in (name.removesuffix(".weight") for name in [*checkpoint.dense, *described] if tied):
            if (where := names.module(name)) in tied and name != tied[where]:
                raise CheckpointError(
                    f"{name}.weight is stored, and {type(model).__name__} ties it to {tied[where]}, whose codes serve both"
                )
        experts: dict[str, dict[str, Place]] = defaultdict(dict)
        stacks = {module: info.stack for module, info in described.items() if info.stack}
        for module in (module for module, info in described.items() if not info.embedding):
            stack = stacks.get(module)
            place = names.place(module, stack)
            if place is None:
                if (other := names.module(module)) and isinstance(model.get_submodule(other), nn.Embedding):
                    raise CheckpointError(
                        f"{module} is packed as a linear layer, and is an embedding in {type(model).__name__}"
                    )
                if any(part.isdigit() for part in module.split(".")):
                    pattern = stack.tensor.removesuffix(".weight") if stack else module
                    made = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
                    if made != type(model).__name__:
                        raise CheckpointError(
                            f"{module} is packed, and {type(model).__name__} has no place for it: the folder holds {made}, "
                            f"open it with that class"
                        )
                    raise CheckpointError(
                        f"{module} is packed, but {type(model).__name__} has no linear layer and no experts of that name; "
                        f"compressed with --exclude {pattern!r} it stays as it is"
                    )
                continue  # a head that this class does not have
            if filled.setdefault(place.layer, module) != module:
                raise CheckpointError(f"{module} and {filled[place.layer]} are packed, both for {place.layer}")
            if place.projection:
                experts[place.name][module] = place
                continue
            linear = model.get_submodule(place.name)
            assert isinstance(linear, nn.Linear)
            layer = empty(module, (linear.out_features, linear.in_features), linear.weight, linear.bias is not None)
            model.set_submodule(place.name, layer.train(linear.training))
        templates: dict[str, str] = {}
        for name, places in experts.items():
            for place in places.values():
                templates |= names.template(place)
            model.set_submodule(name, _empty_experts(model.get_submodule(name), places, stacks, empty))
        share_inputs(model)
        return cls(model, checkpoint, filled, [*([ExpertNames(templates)] if templates else []), CodeNames.of(model)])

    def conversions(self, others: Iterable[Any]) -> list[Any]:
        """All conversions that transformers is to make, from its own.

        Raises CheckpointError unless by all of them together exactly the places are filled, each by its own codes.
        """
        model = self._model()
        assert model is not None
        conversions = [*others, *self._names]
        renamings = [t for t in conversions if isinstance(t, WeightRenaming)]
        converters = [t for t in conversions if isinstance(t, WeightConverter)]
        prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
        for layer, module in self._modules.items():
            for part in _parts(model, layer):
                key, wanted = stored_name(module, part), f"{layer}.{own_name(part)}"
                target, _ = rename_source_key(key, renamings, converters, prefix, state)
                if target != wanted:
                    raise CheckpointError(f"{key}: transformers would load it as {target}, it belongs to {wanted}")
        return conversions

    def check_codes(self) -> None:
        """Raise CheckpointError for codes that are not valid or not what was written, once all are loaded.

        Those that were left on the disk are held against the files: transformers 5.10 rounds them to floats on their way back.
        """
        self._verification.finish()
        model = self._model()
        assert model is not None
        for layer, module in self._modules.items():
            packed = model.get_submodule(layer)
            assert isinstance(packed, PackedModule)
            hook: Any = getattr(packed, "_hf_hook", None) if any(part.is_meta for part in packed.parts.values()) else None
            if hook is not None:
                hook.pre_forward(packed)
                stored = [self._checkpoint.files.read(stored_name(module, part)) for part in _parts(model, layer)]
                if not all(
                    torch.equal(code.cpu(), original) for code, original in zip(packed.parts.values(), stored, strict=True)
                ):
                    raise CheckpointError(f"{layer}: this transformers changes codes that it leaves on the disk; update it")
            packed.restore_dtypes()
            packed.check(layer)
            if hook is not None:
                hook.post_forward(packed, None)


def _kept_in_float32(model: Any) -> re.Pattern[str]:
    """What matches the names of weights that a model keeps in float32 whatever its dtype (T5's `wo`)."""
    plan = model._get_dtype_plan(model.dtype) if hasattr(model, "_get_dtype_plan") else {}
    return re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in plan) or r"(?!)")


def _parts(model: nn.Module, layer: str) -> Iterable[str]:
    packed = model.get_submodule(layer)
    assert isinstance(packed, PackedModule)
    return packed.format.parts(*packed.shape)


def saved_names(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """The names under which packed modules of a model are saved."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [t.reverse_transform() for t in reversed(conversions) if isinstance(t, WeightRenaming)]
    names = {}
    for module in modules:
        key = f"{module}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        names[module] = key.removesuffix(".weight")
    return names


def _empty_experts(
    dense: nn.Module,
    places: Mapping[str, Place],
    stacks: Mapping[str, Stack],
    empty: Callable[[str, tuple[int, int], Tensor], SeedLinear],
) -> SeedExperts:
    """Experts without codes, once all their matrices are there. CheckpointError naming what is not.

    places   stored module -> its place, of the modules that belong to this one
    empty    makes the layer of a stored module, from its shape and the parameter that it takes part in
    """
    shapes = projections_of(dense)
    found = {(place.projection, place.part, place.expert): module for module, place in places.items()}
    order = {(place.projection, place.order): place.part for place in places.values()}
    parts: dict[str, list[str]] = {}
    layers: dict[str, list[SeedLinear]] = {}
    whole: dict[str, Stack] = {}
    for projection, (count, wide) in {
        place.projection: (place.count, max(1, len({*place.halves}))) for place in places.values()
    }.items():
        experts, rows, columns = shapes[projection].shape
        if any((projection, number) not in order for number in range(count)) or rows % count:
            raise CheckpointError(
                f"{min(places)} is packed, but not all that {type(dense).__name__}.{projection} is joined from; "
                f"it must be packed as a whole or not at all"
            )
        parts[projection] = [order[projection, number] for number in range(count)]
        for part in parts[projection]:
            modules = [found.get((projection, part, expert)) for expert in range(experts)]
            if None in modules or (projection, part, experts) in found:
                number = modules.index(None) if None in modules else experts
                raise CheckpointError(
                    f"{min(places)} is packed, and {type(dense).__name__}.{projection} has {experts} experts, "
                    f"but the codes of {part} for expert {number} are {'missing' if None in modules else 'there too'}"
                )
            weight = dense.get_parameter(projection)
            group = [empty(module, (rows * wide // count, columns), weight) for module in modules if module]
            layers[part] = [layer.train(dense.training) for layer in group]
            if (stack := stacks.get(f"{modules[0]}")) is not None:
                whole[part] = stack
    halves: dict[str, list[int]] = {}
    for place in {place.part: place for place in places.values() if place.halves}.values():
        for half, projection in enumerate(place.halves):
            parts[projection] = parts[place.projection]
            halves.setdefault(projection, []).append(half)
    return SeedExperts(dense, parts, layers, whole, halves).train(dense.training)
