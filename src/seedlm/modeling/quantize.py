"""The walks over a model: which of its layers are packed, packing them in place, and putting dense ones back.

compress_model(model)     every chosen linear layer, the experts of mixtures, and embeddings and head if asked for
dequantize_model(model)   every packed layer back to a dense one
set_backend(model, name)  how packed layers multiply
share_inputs(model)       packed layers that read the same tensor: what comes before their products is done once
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, cast

import torch
from torch import nn

from seedlm.codes.base import Format, relative_error
from seedlm.codes.encoded import encode
from seedlm.codes.registry import family_of, parse_format, reason_no_product
from seedlm.errors import BackendError, SourceError, TensorError
from seedlm.inference import backend as backends
from seedlm.modeling.embedding import SeedEmbedding, TiedLinear, find_tables, replace_embedding, unpack
from seedlm.modeling.experts import SeedExperts, compress_experts, stacks_of
from seedlm.modeling.linear import PackedModule, SeedLinear, compress_module, is_linear, share_input
from seedlm.progress import Tell, counted
from seedlm.storage.selection import Wish, as_patterns, groups_of, left_by_default

Listener = Callable[[nn.Module, Mapping[str, Any]], None]
"""Told of a model whose layers were packed or put back, and of the settings that they were packed with."""

LISTENERS: Final[list[Listener]] = []
"""What keeps books on a model besides its layers: transformers saves a packed folder only of a model that says it is one."""


def compress_model(
    model: nn.Module,
    format: Format | str | float = "4",
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    embeddings: Format | str | float | None = None,
    head: Format | str | float | None = None,
    backend: str = "auto",
    on_progress: Tell | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Replace linear layers and stacked experts of a model by packed ones, in place.

    include, exclude   glob patterns over module names, as in `choose_modules`
    embeddings, head   formats of the input embeddings and the output head, which stay dense without, as by "dense"; one serves
                       both if tied
    on_progress        told how many weights more are done; None shows a bar in a terminal or a notebook
    settings           of the format's family (`encoded.encode`)
    A model of transformers knows from then on that it is packed: `save_pretrained` writes a folder that loads.
    returns            module name -> relative error, of every matrix compressed; experts of a stack by their number
    Raises TensorError if a weight cannot be encoded or is shared with another module, naming it; SourceError and FormatError
    for embeddings and a head as `choose_tables` does.
    """
    parsed = parse_format(format)
    tables = choose_tables(model, embeddings, head, exclude)
    names = [name for name in choose_modules(model, parsed, include, exclude) if name not in tables]
    with counted(on_progress, "compress", sum(weights_of(model, name) for name in (*tables, *names))) as tell:
        errors = _pack_tables(model, tables, backend, tell, settings) | _pack(model, names, parsed, backend, tell, settings)
    share_inputs(model)
    for listener in LISTENERS:
        listener(model, settings)
    return errors


def _pack_tables(
    model: nn.Module, tables: Mapping[str, Format], backend: str, tell: Tell, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Replace what `choose_tables` named; the relative errors."""
    errors = {}
    for name, format in tables.items():
        try:
            errors[name] = compress_table(model, name, format, backend=backend, on_progress=tell, **settings)
        except TensorError as reason:
            raise TensorError(f"{name}.weight: {reason}") from None
    return errors


def _pack(
    model: nn.Module, names: Iterable[str], format: Format, backend: str, tell: Tell, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Replace what `choose_modules` named; the relative errors, by the names of matrices."""
    errors: dict[str, float] = {}
    known = stacks_of(model)
    stacks: dict[str, list[str]] = {}
    for name in names:
        if name in known:
            parent, projection, _ = known[name]
            stacks.setdefault(parent, []).append(projection)
            continue
        try:
            linear = cast(nn.Linear, model.get_submodule(name))
            layer, errors[name] = compress_module(linear, format, backend=backend, on_progress=tell, **settings)
        except TensorError as reason:
            raise TensorError(f"{name}.weight: {reason}") from None
        model.set_submodule(name, layer)
    for name, projections in stacks.items():
        try:
            experts, found = compress_experts(
                model.get_submodule(name), projections, format, backend=backend, on_progress=tell, **settings
            )
        except TensorError as reason:
            raise TensorError(f"{name}.{reason}") from None
        errors |= {f"{name}.{matrix}": error for matrix, error in found.items()}
        model.set_submodule(name, experts)
    return errors


def choose_tables(
    model: nn.Module,
    embeddings: Format | str | float | None,
    head: Format | str | float | None,
    exclude: Iterable[str] = (),
) -> dict[str, Format]:
    """The formats of the embeddings and the head that are asked for, by module; None leaves one as it is, as "dense" does.

    Raises SourceError for one that cannot be coded or is excluded, FormatError for two formats of one that is tied.
    """
    said = Wish.of(embeddings, head).said
    if not any(said.values()):
        return {}
    tables = find_tables(model).choose(said)
    for name, format in tables.items():
        shape = model.get_parameter(f"{name}.weight").shape
        if _matches(name, as_patterns(exclude)):
            raise SourceError(f"{name}.weight: is excluded, and a format is given for it; leave one of them out")
        if reason := format.reason_unfit(shape[0], shape[1]):
            raise SourceError(f"{name}.weight: {[*shape]} stays dense as {format.spec} ({reason})")
    return tables


def compress_table(
    model: nn.Module,
    name: str,
    format: Format,
    *,
    backend: str = "auto",
    on_progress: Tell | None = None,
    **settings: Any,
) -> float:
    """Compress one of `choose_tables`, with all that is tied to it, in place; the other options are those of `encode`.

    returns   ||W - W^||_F / ||W||_F
    """
    dense = model.get_submodule(name)
    if isinstance(dense, nn.Linear):
        layer, error = compress_module(dense, format, backend=backend, on_progress=on_progress, **settings)
        model.set_submodule(name, layer)
        return error
    assert isinstance(dense, nn.Embedding)
    weight = dense.weight.detach()
    encoded, squared_error = encode(weight, format, backend=backend, on_progress=on_progress, **settings)
    packed = SeedEmbedding(dense, format, device="meta")
    packed.take(encoded)
    replace_embedding(model, name, packed)
    return relative_error(squared_error, float(weight.double().square().sum()))


def choose_modules(model: nn.Module, format: Format, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[str]:
    """The linear layers and stacks of experts to compress: those that `selection` takes by default, if they become smaller.

    include   glob patterns of names to add whatever the default says
    exclude   glob patterns of names to leave out; they win
    returns   names of linear layers, and of the parameters that are stacks (``layers.0.mlp.experts.down_proj``)
    Weights that modules share stay dense. Raises TensorError for a pattern without a match, and for one that wants such a
    weight (a tied head).
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    shapes = dict(_weights(model))
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise TensorError(f"no linear layer matches the pattern {pattern!r}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    chosen = []
    for name, shape in shapes.items():
        default = format.reason_unfit(*shape) is None and left_by_default(name) is None
        if _matches(name, exclude) or not (default or _matches(name, include)):
            continue
        own = name if name in parameters else f"{name}.weight"
        shared = [owner for owner in owners[id(parameters[own])] if owner != own]
        if shared and not _matches(name, include):
            continue
        if shared:
            raise TensorError(f"{own} is shared with {', '.join(shared)} and cannot be compressed: exclude it")
        chosen.append(name)
    return chosen


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace every packed layer by an ordinary one, in place.

    dtype   of the weights; pass the model's own, since biases keep theirs
    """
    experts = [(name, module) for name, module in model.named_modules() if isinstance(module, SeedExperts)]
    for name, module in experts:
        model.set_submodule(name, module.to_dense(dtype))
    unpack(model, dtype)
    for name, layer in list(seed_linears(model)):
        model.set_submodule(name, layer.to_dense(dtype))
    for listener in LISTENERS:
        listener(model, {})


def seed_linears(model: nn.Module) -> Iterator[tuple[str, SeedLinear]]:
    """The packed layers of a model, those of experts among them, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SeedLinear))


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """All that hold codes in a model: `seed_linears`, and embeddings."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedModule))


def set_backend(model: nn.Module, name: str) -> int:
    """Let packed layers multiply by a backend from the next call on.

    name      "auto", or a backend that `seedlm bench MODEL --explain` lists: "cuda-int8" and "numba-int8" round the activations
              of few tokens to 8 bits, which is about 10 % faster, for a little loss (docs/log/quality.md)
    returns   for how many layers, those of embeddings among them: others are of a family that has none of that name
    Raises BackendError, with nothing changed, if nothing is packed, no layer has it, or one that has it cannot be served there.
    """
    found: list[PackedModule] = []
    families = set()
    for where, module in packed_modules(model):
        families.add(module.format.family)
        if name == backends.AUTO or name in family_of(module.format).products:
            if reason := backends.reason_no_backend(name, module.device, module.format, module.shape):
                raise BackendError(f"{where}: {reason}")
            found.append(module)
    if reason := reason_no_product(name, families):
        raise BackendError(reason)
    for module in found:
        module.backend = name
    return len(found)


def backends_used(model: nn.Module) -> dict[str, int]:
    """By which backends a model's packed layers multiply, how many by each. A head tied to embeddings in codes is one."""
    layers = [module for module in model.modules() if isinstance(module, SeedLinear | TiedLinear)]
    packed = [layer.codes if isinstance(layer, TiedLinear) else layer for layer in layers]
    return dict(Counter(backends.choose(each.backend, each.device, each.format, each.shape).name for each in packed))


def share_inputs(model: nn.Module) -> None:
    """Let packed layers that read the same tensor (q, k, v; gate, up) share what their backend does to it first."""
    layers = {name: layer for name, layer in seed_linears(model) if family_of(layer.format).fused}
    for group in groups_of(layers):
        share_input(*(layers[name] for name in group))


def weights_of(model: nn.Module, name: str) -> int:
    """How many weights a name of `choose_modules` stands for."""
    parent, _, leaf = name.rpartition(".")
    stack = model.get_submodule(parent)._parameters.get(leaf)
    return (model.get_parameter(f"{name}.weight") if stack is None else stack).numel()


def dense_names(model: nn.Module) -> list[str]:
    """What could be compressed and is not: linear layers, and stacks of experts."""
    return sorted(name for name, _ in _weights(model))


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """(out_features, in_features) of every linear layer, and of every stack of experts."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name, (module.out_features, module.in_features)
    for name, (_, _, form) in stacks_of(model).items():
        yield name, form.shape[1:]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
