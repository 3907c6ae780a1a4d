"""A loss' gradients at every layer's outputs, with one layer's weights and activations on the device at a time.

Forwards, each piece of the text goes through the model as ever, without a graph, and what each numbered layer was given is
kept on the CPU. The loss and what follows the last layer give the gradient at that layer's output. Then backwards, layer by
layer: each is given its inputs again, piece by piece, and hands the gradient down to the layer before.

This holds where layers are a chain: each is given, besides what none of them made, the very tensor that the one before has
returned, and nobody else uses that. Whether it is so is seen in every forward pass, not taken from a list of architectures.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from seedlm.calibration.placement import held, numbered_layers
from seedlm.calibration.spool import keep
from seedlm.errors import EvaluationError

_HIDDEN: Final = "hidden_states"
_PLAIN: Final = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


class NotAChainError(EvaluationError):
    """Layers of a model depend on each other in other ways than one after another."""


class Observer(Protocol):
    """Whoever watches the layers' modules.

    paused    to be set while what runs is to be passed over
    waiting   whether it waits for a gradient at something that has run
    """

    paused: bool
    waiting: bool

    def settle(self) -> None:
        """A pass over the model, or a layer, is over."""

    def conclude(self, prefix: str) -> None:
        """The modules below this name will not be passed through again."""


@dataclass
class _Call:
    """A layer was called: with what, besides the hidden state."""

    name: str
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's new hidden state."""
        if _HIDDEN in self.kwargs:
            return _first(layer(*self.args, **{**self.kwargs, _HIDDEN: hidden}))
        return _first(layer(hidden, *self.args[1:], **self.kwargs))


def layer_by_layer(
    model: Any,
    pieces: Sequence[Tensor],
    loss: Callable[[Any, Tensor], Tensor],
    observer: Observer,
    spool: Path | None,
    step: Callable[[float], None],
) -> None:
    """Run a loss forwards and backwards over pieces of a text.

    model     its parameters need no gradients; some of its layers may be away (`placement`)
    pieces    int64 [sequences, length] each
    loss      of the model and a piece, a scalar
    observer  paused while layers run without a graph
    spool     a folder on whose disk what is kept may lie; None keeps it in memory
    step      told the share of the work that is done
    Raises NotAChainError if the layers are none.
    """
    layers = numbered_layers(model)
    runs, gradients = [], []
    for number, piece in enumerate(pieces):
        step(number / len(pieces) / 4)
        with _recorded(layers, observer, spool) as run:
            loss(model, piece.to(model.device)).backward()
        observer.settle()
        runs.append(run)
        gradients.append(run.gradient().cpu())
        if [call.name for call in run.calls] != [call.name for call in runs[0].calls]:
            raise NotAChainError("its layers run in another order with another text")
    order = [call.name for call in runs[0].calls]
    while order:
        name = order.pop()
        with held(layers[name]):
            for number, run in enumerate(runs):
                call = run.calls.pop()
                hidden = call.hidden.to(model.device).detach().requires_grad_()
                with torch.enable_grad():
                    output = call.again(layers[name], hidden)
                    output.backward(gradients[number].to(output.device))
                assert hidden.grad is not None
                gradients[number] = hidden.grad.cpu()
                observer.settle()
                step(1 - 0.75 * (len(order) + 1 - (number + 1) / len(runs)) / len(run.returned))
        if name not in order:
            observer.conclude(f"{name}.")
    for run, gradient in zip(runs, gradients, strict=True):
        if run.start is not None:
            run.start.backward(gradient.to(run.start.device))


class _Run:
    """One pass forwards: the calls so far, what they returned, and what was made of the embeddings if somebody waits for it."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.returned: list[list[Tensor]] = []
        self.start: Tensor | None = None
        self._given: list[tuple[Any, list[int]]] = []

    def give(self, *values: Any) -> None:
        """Take note of what a layer is given. Raises NotAChainError if something that one before was given has changed."""
        for value, items in self._given:
            if items != [id(item) for item in tree_leaves(value)]:
                raise NotAChainError("its layers leave something behind for others")
        mutable = [value for value in values if isinstance(value, dict | list)]
        self._given += [(value, [id(item) for item in tree_leaves(value)]) for value in mutable]

    def gradient(self) -> Tensor:
        """Of the loss, at the last layer's output."""
        self.give()
        if not self.calls:
            raise NotAChainError("it has no numbered layers")
        *before, (last, *more) = self.returned
        if last.grad is None or any(tensor.grad is not None for outputs in (*before, more) for tensor in outputs):
            raise NotAChainError("what its layers return is used elsewhere, too")
        self.returned = [[] for _ in self.returned]
        return last.grad


@contextmanager
def _recorded(layers: dict[str, nn.Module], observer: Observer, spool: Path | None) -> Iterator[_Run]:
    """While layers run without a graph, and their calls are recorded."""
    run = _Run()
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["forward"] = _recorder(name, layer.forward, run, observer, spool)
    try:
        yield run
    except RuntimeError as reason:
        if "in-place" in str(reason):
            raise NotAChainError("what its layers return is changed outside of them") from reason
        raise
    finally:
        for name, layer in layers.items():
            del vars(layer)["forward"]
            if before[name] is not None:
                vars(layer)["forward"] = before[name]


def _recorder(name: str, forward: Callable[..., Any], run: _Run, observer: Observer, spool: Path | None) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs[_HIDDEN] if _HIDDEN in kwargs else args[0] if args else None
        if not isinstance(hidden, Tensor) or (run.calls and hidden is not run.returned[-1][0]):
            raise NotAChainError(f"{name} is given something else than what the layer before it returned")
        rest = [value for value in tree_leaves((args, kwargs)) if value is not hidden]
        if not all(isinstance(value, _PLAIN) for value in rest):
            raise NotAChainError(f"{name} is given more than tensors")
        if any(isinstance(value, Tensor) and value.requires_grad for value in rest):
            raise NotAChainError(f"{name} is given more than one thing that depends on layers or embeddings")
        run.give(*args, *kwargs.values())
        if not run.calls and observer.waiting:
            run.start = hidden
        free = tree_map(lambda value: None if value is hidden else value, (args, kwargs))
        run.calls.append(_Call(name, keep(hidden.detach(), spool), *free))
        observer.paused, paused = True, observer.paused
        try:
            with torch.no_grad():
                output = forward(*args, **kwargs)
        finally:
            observer.paused = paused
        output = tree_map(_leaf, output)
        found = [value for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad]
        if not found or found[0] is not _first(output):
            raise NotAChainError(f"{name} returns no hidden state")
        run.returned.append(found)
        return output

    return record


def _leaf(value: Any) -> Any:
    """A tensor of which it will be known whether anything depends on it."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first(output: Any) -> Any:
    """The hidden state of what a layer returns."""
    return output[0] if isinstance(output, tuple | list) else output
