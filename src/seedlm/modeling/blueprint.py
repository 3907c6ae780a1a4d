"""What transformers would make of a source, told from its config.json before anything is searched.

The config's model is built on the meta device, where weights take no memory, and every tensor of the source is given its place
in it by the renamings and joinings that transformers makes on loading (`places`). That tells

    what no code can stand for    tensors that the model has no place for (layers of multi-token prediction), weights of modules
                                  that are no plain linear layer, weights that several modules share
    how stacks of experts lie     from the parameter that each becomes
    embeddings and output head    which tensors they are, and whether one serves as both
    what is not there             weights of the model that no tensor of the source fills: half of a model is refused

Importing transformers and building a model takes 2 to 5 seconds on two cores, whatever the model's size.
"""

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.modules import module as registration

from seedlm.errors import SourceError
from seedlm.modeling.embedding import find_tables
from seedlm.modeling.experts import Projection
from seedlm.modeling.linear import is_linear
from seedlm.storage.checkpoint import Stack
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.selection import Survey, Tables

FOR_EACH_TENSOR, _FREE = 7, 5_000
"""Modules and parameters that a model may be built of, for each tensor of its source and besides: 5.5 is the most there is."""
FOR_EACH_WEIGHT, _FREE_WEIGHTS = 8, 1 << 24
"""And numbers in them, of tied embeddings once more for each: 6.6. What a source lacks would be made before it is missed."""
_SHOWN: Final = 3
_OPTIONAL: Final = re.compile(r".*(pooler|head|classifier|score|qa_outputs).*|.*bias")
"""Parameters that a source may lack: transformers starts them anew, and a model is whole without them."""


def survey(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], code: Path | None = None) -> Survey:
    """What the model of a config.json tells about a source's tensors.

    code      the source's folder, if code that came with it (``auto_map``) is to be run
    returns   one without a name, and with the reason as its note, if the model cannot be built here
    Raises SourceError if the source lacks weights of its model, or has some in another shape.
    """
    try:
        with bounded(math.prod(info.shape) for info in tensors.values()):
            model = _build(config, code)
    except _NotBuiltError as reason:
        unknown = dict.fromkeys(("embeddings", "head"), f"what they are is told by the model's class, and {reason}")
        return Survey(notes=(f"{reason}: what is compressed is decided by names alone",), tables=Tables(reasons=unknown))
    return _Surveyor(model).survey(tensors)


class _NotBuiltError(Exception):
    pass


@contextmanager
def bounded(sizes: Iterable[int]) -> Iterator[None]:
    """Ends the building of a model that is far larger than its source: SourceError, from within the model's constructor.

    sizes   numbers in each tensor of the source, whose config.json may say anything
    """
    sizes = list(sizes)
    most, largest = FOR_EACH_TENSOR * len(sizes) + _FREE, FOR_EACH_WEIGHT * sum(sizes) + _FREE_WEIGHTS
    count = weights = 0

    def add(module: object, name: str, what: object) -> None:
        nonlocal count, weights
        count += 1
        weights += what.numel() if isinstance(what, torch.nn.Parameter) else 0
        if count > most or weights > largest:
            far = f"{most:,} modules and tensors" if count > most else f"{largest:,} weights"
            raise SourceError(
                f"config.json describes a model of more than {far}; the source has {len(sizes):,} tensors, "
                f"{sum(sizes):,} weights"
            )

    hooks = [
        registration.register_module_module_registration_hook(add),
        registration.register_module_parameter_registration_hook(add),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build(config: Mapping[str, Any], code: Path | None = None) -> Any:
    """The model of a config.json, on the meta device. Raises _NotBuiltError, with the reason."""
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise _NotBuiltError("config.json names no model_type and no architectures")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    own = config.get("auto_map")
    trusted = code if isinstance(own, Mapping) else None
    if kind not in CONFIG_MAPPING and trusted is None:
        hint = ", and its own code is not run without --trust-remote-code" if own else ""
        raise _NotBuiltError(f"transformers {transformers.__version__} has no model_type {kind!r:.80}{hint}")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if trusted is not None:
            parsed, build = _own_class(own, trusted)
        else:
            parsed = CONFIG_MAPPING[kind].from_dict(dict(config))
            build = getattr(transformers, names[0], None)
            if not isinstance(build, type) or not issubclass(build, transformers.PreTrainedModel):
                build = transformers.AutoModelForCausalLM._model_mapping.get(type(parsed), None)
            if build is None or not isinstance(parsed, getattr(build, "config_class", None) or type(parsed)):
                raise _NotBuiltError(f"transformers {transformers.__version__} has no class {names[0]!r:.80} for {kind}")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(parsed)
    except (_NotBuiltError, SourceError):
        raise
    except Exception as reason:  # whatever a wrong config, a missing library or a class's own arithmetic led to
        text = " ".join(str(reason).split())[:160]
        raise _NotBuiltError(f"{names[0]} cannot be built ({type(reason).__name__}: {text})") from reason
    finally:
        logging.set_verbosity(level)


def _own_class(names: Any, folder: Path) -> tuple[Any, Any]:
    """The configuration of a model whose code came with it, and what makes the model of it. This runs that code."""
    import transformers

    autos = [name for name in names if name.startswith("AutoModel")]
    if not autos:
        raise _NotBuiltError("auto_map names no model")
    auto = getattr(transformers, "AutoModelForCausalLM" if "AutoModelForCausalLM" in autos else autos[0])
    parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return parsed, partial(auto.from_config, trust_remote_code=True)


class _Surveyor:
    """One model, and what a source has for it."""

    def __init__(self, model: Any) -> None:
        from seedlm.modeling.places import Names

        self._model, self._kind, self._names = model, type(model).__name__, Names(model)
        self._prefix = getattr(model, "base_model_prefix", "")
        self._state: dict[str, torch.Tensor] = model.state_dict()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._owners: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            self._owners[id(parameter)].append(name)
        self._fills: dict[str, list[str]] = defaultdict(list)
        """Parameter -> the tensors that fill it."""
        self._found: dict[str, Counter[str]] = defaultdict(Counter)
        """Parameter -> how many tensors fill it, by the pattern of those that are joined."""

    def survey(self, tensors: Mapping[str, TensorInfo]) -> Survey:
        dense, stacks = {}, {}
        for name, info in tensors.items():
            reason = self._reason(name, info)
            if isinstance(reason, Stack):
                stacks[name] = reason
            elif reason is not None:
                dense[name] = reason
        self._refuse_missing()
        homeless = [name for name, reason in dense.items() if reason == self._no_place]
        notes: tuple[str, ...] = ()
        if homeless:
            shown = ", ".join(homeless[:_SHOWN]) + (" ..." if len(homeless) > _SHOWN else "")
            notes = (f"{self._kind} has no place for {len(homeless)} tensors, which are kept as they are: {shown}",)
        return Survey(name=self._kind, dense=dense, stacks=stacks, notes=notes, tables=self._tables(dense))

    def _tables(self, dense: Mapping[str, str]) -> Tables:
        """The tensors of the embeddings and the head, which are one where the model ties them."""
        tables = find_tables(self._model)
        tensors, reasons = {}, dict(tables.reasons)
        for option, module in (("embeddings", tables.embeddings), ("head", tables.head)):
            if module is None or option in reasons:
                continue
            owners = self._owners[id(self._parameters[f"{module}.weight"])]
            filling = [name for owner in owners for name in self._fills[owner]]
            if len(filling) != 1:
                stored = f"stored {len(filling)} times ({', '.join(filling)})" if filling else "not stored"
                reasons[option] = f"{module}.weight is {stored}, and codes stand for one tensor alone"
                continue
            tensor = tensors[option] = filling[0]
            if module == tables.embeddings:
                if self._names.embedding(tensor.removesuffix(".weight")) is None:
                    reasons[option] = f"{module}.weight is stored as {tensor}, under a name that is no embedding's"
            elif tensor in dense:
                reasons[option] = f"{tensor}: {dense[tensor]}"
        return Tables(tensors.get("embeddings"), tensors.get("head"), reasons, tables.layer, tables.absent)

    @property
    def _no_place(self) -> str:
        return f"{self._kind} has no place for it"

    def _reason(self, name: str, info: TensorInfo) -> str | Stack | None:
        """Why no code can stand for a tensor, or, of a stack of experts, how its matrices lie in it."""
        key, module = self._names.renamed(name), name.removesuffix(".weight")
        converter, order = self._names.converter(key)
        place = self._names.place(module, None) if module != name and len(info.shape) == 2 else None
        if place is not None and place.projection:
            targets = [f"{place.name}.{place.projection}"]
        else:
            targets = list(self._in_state(self._names.targets(key)))
        if not targets:
            return self._no_place
        for target in targets:
            self._fills[target].append(name)
            self._found[target][converter.source_patterns[order] if converter else ""] += 1
        if converter is None and info.shape != tuple(self._state[targets[0]].shape):
            raise SourceError(
                f"{name}: is {[*info.shape]} in the source, and {[*self._state[targets[0]].shape]} in {self._kind}, which "
                f"config.json describes"
            )
        found = self._names.projection(targets[0])
        if len(info.shape) == 3 or (found is not None and found[2].flat):
            return self._stack(name, info, found)
        if module == name or len(info.shape) != 2:
            return None
        if place is None:
            owner = self._model.get_submodule(targets[0].rpartition(".")[0])
            if converter is not None:
                return "rearranged on loading"
            kind = type(owner).__name__
            return "renamed on loading as codes would not be" if is_linear(owner) else f"{kind} is no plain linear layer"
        own = f"{place.name}.{place.projection or 'weight'}"
        shared = [owner for owner in self._owners[id(self._parameters[own])] if owner != own]
        return f"shared with {shared[0]}" if shared else None

    def _stack(self, name: str, info: TensorInfo, found: tuple[str, str, Projection] | None) -> str | Stack | None:
        """A stack as it lies in the source.

        found   the projection of experts that it becomes, or a part of; None if it becomes something else
        """
        if found is None:
            return "stacked experts of an unknown kind" if "expert" in name else None
        _, projection, form = found
        first, second, third = form.stacked
        stack = Stack(name, form.stacked, form.transposed, form.flat)
        place = self._names.place(f"{stack.base}.0", stack)
        converter, _ = self._names.converter(self._names.renamed(name))
        scaled = converter is not None and place is not None and len(converter.source_patterns) > place.count
        if place is None or (scaled and not re.match(r"B?F\d+$", info.dtype)):
            return "rearranged on loading"
        turned = converter is not None and type(converter.operations[0]).__name__ == "Transpose"
        straight = (first, second * len({*place.halves, projection}) // place.count, third)
        if form.flat or (info.shape == straight and not (turned and not getattr(converter.operations[0], "check_dims", False))):
            return replace(stack, shape=straight)
        if turned and info.shape == (first, third, second):
            return replace(stack, shape=(first, third, second), transposed=not form.transposed)
        raise SourceError(f"{name}: is {[*info.shape]} in the source, and {[*straight]} in {self._kind}'s {projection}")

    def _in_state(self, names: Iterable[str]) -> Iterator[str]:
        """The entries of the model's state of these names, with the base model's prefix or without."""
        for name in names:
            for candidate in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
                if candidate in self._state:
                    yield candidate
                    break

    def _refuse_missing(self) -> None:
        """Raise SourceError for weights of the model that no tensor fills, by name."""
        ignored = [re.compile(pattern) for pattern in getattr(self._model, "_keys_to_ignore_on_load_missing", None) or ()]
        missing = []
        for name, parameter in self._parameters.items():
            if any(owner in self._found for owner in self._owners[id(parameter)]):
                continue
            if not _OPTIONAL.fullmatch(name) and not any(pattern.search(name) for pattern in ignored):
                missing.append(name)
        for name, counts in self._found.items():
            if "" not in counts and name in self._parameters and self._parameters[name].dim() == 3:
                module = self._model.get_submodule(name.rpartition(".")[0])
                experts = min(stack.shape[0] for stack in module._parameters.values() if stack is not None and stack.dim() == 3)
                missing += [f"{name} ({n} of {experts} from {pattern})" for pattern, n in _fewer(counts, experts)]
        if missing:
            raise SourceError(
                f"the source lacks {len(missing)} weights of {self._kind}, which config.json describes: {_listed(missing)}"
            )


def _fewer(counts: Mapping[str, int], experts: int) -> Iterable[tuple[str, int]]:
    return ((pattern, count) for pattern, count in counts.items() if 1 < count < experts)


def _listed(names: list[str]) -> str:
    """Some names in short; layers that lack everything as one."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = re.match(r"(.*?\.\d+)\.", name)
        layers[match[1] if match else name].append(name)
    shown = [f"{layer}.*" if len(found) > 3 else found[0] for layer, found in layers.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
