"""A model on a device that it may not fit: layers for which there is no room lie elsewhere and come while they are used.

The numbered layers of a model are nearly all of it, and one runs at a time. Those that stay elsewhere, on the CPU, are copied
to the device before their forward pass and dropped after it; `held` keeps one there over several passes. A model that was
opened on the CPU as it is stored is mapped from its files, so what does not fit the memory either is read from the disk.

Backward passes through such layers need `layer_by_layer`: autograd would hold on to every copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seedlm.errors import EvaluationError
from seedlm.modeling.experts import stacks_of


def numbered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost module lists, by name, that hold matrices."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    members = {f"{name}.{number}": layer for name, stack in stacks.items() for number, layer in enumerate(stack)}
    return {name: layer for name, layer in members.items() if _matrices(layer)}


def nbytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in _tensors(module))


def workspace(model: Any, sequences: int, length: int, batch: int) -> int:
    """Bytes that it takes besides the weights to write a text, or to observe the model on one; from above.

    sequences   written at a time
    batch       sequences observed at a time
    """
    layers = numbered_layers(model).values()
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    cache = sequences * length * model.dtype.itemsize * sum(_cached(layer) or 2 * hidden for layer in layers)
    writing = cache + sequences * vocabulary * 32  # probabilities and their sums in float64
    most = 0
    for layer in layers:
        shapes = _matrices(layer)
        sums = sum(count * width**2 * 8 for count, _, width in shapes) + max((width**2 for *_, width in shapes), default=0) * 4
        most = max(most, sums + batch * length * sum(out + width for _, out, width in shapes) * 6)
    passing = batch * length * (vocabulary * 16 + len(layers) * hidden * model.dtype.itemsize)  # logits, loss; layers' outputs
    return max(writing, most, passing)


def kept(model: Any, tokens: int) -> int:
    """Bytes of all layers' inputs."""
    return len(numbered_layers(model)) * tokens * model.get_input_embeddings().weight.shape[1] * model.dtype.itemsize


def place(model: nn.Module, device: torch.device, room: int | None = None, host: int = 0) -> int:
    """Put a model on a device: first all but its numbered layers, then these in order, as long as there is room.

    room      bytes for weights; None for as many as it takes
    host      bytes of the processor's memory that may be locked, from where layers come to a GPU some times as fast
    returns   bytes of the layers that stay where they are, and come when they are used from now on
    Raises EvaluationError if there is no room for a single layer.
    """
    if room is None or nbytes(model) <= room:
        model.to(device)
        return 0
    layers = list(numbered_layers(model).values())
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    outside = [tensor for tensor in _tensors(model) if id(tensor) not in inside]
    room -= sum(tensor.nbytes for tensor in outside) + max(map(nbytes, layers), default=0)
    if room < 0 or not layers:
        raise EvaluationError(f"a layer of it takes {-room / 1e9:.3g} GB more than there is room for on {device}")
    for tensor in outside:
        tensor.data = tensor.data.to(device)
    away = []
    for layer in layers:
        room -= nbytes(layer)
        if room >= 0:
            layer.to(device)
        else:
            away.append(layer)
    size = sum(map(nbytes, away))
    for layer in away:
        if device.type == "cuda" and size < host:
            for tensor in _tensors(layer):
                tensor.data = tensor.data.pin_memory()
        _visits[layer] = _Visit(layer, device)
    return size


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """While a layer's weights are on its model's device."""
    visit = _visits.get(layer)
    if visit is None:
        yield
        return
    visit.come()
    try:
        yield
    finally:
        visit.go()


def is_away(model: nn.Module) -> bool:
    """Whether some layers of a model come to its device only while they are used."""
    return any(module in _visits for module in model.modules())


class _Visit:
    """A layer's tensors, where they are at home, and the hooks that bring them."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.device, self.depth = device, 0
        self.tensors = _tensors(layer)
        self.home = [tensor.data for tensor in self.tensors]
        layer.register_forward_pre_hook(lambda *_: self.come())
        layer.register_forward_hook(lambda *_: self.go(), always_call=True)

    def come(self) -> None:
        self.depth += 1
        if self.depth == 1:
            for tensor, home in zip(self.tensors, self.home, strict=True):
                tensor.data = home.to(self.device, copy=True, non_blocking=True)

    def go(self) -> None:
        self.depth -= 1
        if not self.depth:
            for tensor, home in zip(self.tensors, self.home, strict=True):
                tensor.data = home


_visits: WeakKeyDictionary[nn.Module, _Visit] = WeakKeyDictionary()


def _cached(layer: nn.Module) -> int:
    """Numbers that a layer keeps of a token for those to come, as far as its modules' names tell; else 0."""
    linears = [(name, part) for name, part in layer.named_modules() if isinstance(part, nn.Linear)]
    return sum(part.out_features for name, part in linears if name.endswith((".k_proj", ".v_proj", ".kv_b_proj")))


def _matrices(module: nn.Module) -> list[tuple[int, int, int]]:
    """(how many, out_features, in_features) of all linear layers and stacks of experts."""
    found = [(1, part.out_features, part.in_features) for part in module.modules() if isinstance(part, nn.Linear)]
    return found + [form.shape for _, _, form in stacks_of(module).values()]


def _tensors(module: nn.Module) -> list[Any]:
    """Parameters and buffers, each once."""
    found: dict[int, Tensor] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return list(found.values())
