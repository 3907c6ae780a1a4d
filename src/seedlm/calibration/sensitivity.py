"""How much a model's predictions suffer from an error in each of its weights, found without any data.

An error d in weight W changes the predictions by KL(model || compressed) = 1/2 d'F d, to second order, with F the Fisher
information. The error of a code is noise with a share `nmse` of each row's energy, which leaves on average

    KL  =  sensitivity * nmse,     sensitivity  =  1/2 sum over rows r of  mean(W_r^2) * E |gradient_r|^2

nats a token. The gradient is that of -log p(token | text before it), the token drawn from the model's own prediction; so the
text is the model's own, too: after a random first token, each is drawn as the model predicts it. Gradients of tokens drawn
like this are uncorrelated, as each has mean zero given the text before it. The expected square of their sum is the sum of
their expected squares: one backward pass over a sequence counts all its tokens, and gives every weight its share. Each matrix
of a stack of experts is a weight; one to which no token went counts 0 (and `allocate` takes it as the least of the others).

What else was tried, and how well each agrees with the true KL of a real model on real text, is in
docs/log/mixed-precision.md: this as well as one compression and evaluation per weight, and nothing that can be read off the
weights alone, norms and gains included, nearly.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from seedlm.calibration.amount import SensitivityText as OwnText
from seedlm.calibration.amount import check_length
from seedlm.calibration.own_text import OVERFLOW, predict
from seedlm.errors import EvaluationError
from seedlm.integrations.transformers.models import longest_text
from seedlm.modeling.experts import stacks_of
from seedlm.progress import Progress, shown

_BATCH: Final = 16
"""Sequences written at a time."""


@dataclass(frozen=True)
class _Weight:
    """A parameter, its shape with a dimension for experts if it is a stack, and which of these counts input features."""

    parameter: Tensor
    shape: tuple[int, ...]
    inputs: int


def measure_sensitivity(model: Any, text: OwnText | None = None, on_progress: Progress | None = None) -> dict[str, float]:
    """The sensitivity of every linear layer's weight, and of every expert's: KL in nats a token, per unit of relative squared
    error.

    model     a causal language model as transformers makes it, in evaluation mode
    on_progress   told how far it is (`progress.Progress`); None shows a bar in a terminal or a notebook
    returns   module name -> sensitivity, six digits, by the names that the model is saved under, an expert of a stack by its
              number; layers that share their weight (a tied head) are left out
    Raises EvaluationError for text longer than the model's context, without linear layers, or if gradients are not finite.
    """
    text = text or OwnText()
    check_length(longest_text(model), text.length)
    weights = _weights(model)
    if not weights:
        raise EvaluationError(f"{type(model).__name__} has no linear layer with a weight of its own")
    done, total = 0, text.sequences * text.length
    with shown(on_progress) as progress, _squared_gradients(model, weights) as rows:
        progress("sensitivity", done, total)
        for tokens in own_text(model, text):
            with torch.enable_grad():
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
                nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
            done += len(tokens)
            progress("sensitivity", done, total)
    predictions = text.sequences * (text.length - 1)
    found = {name: float(f"{float(square) / (2 * predictions):.6g}") for name, square in _as_saved(model, rows)}
    for name, value in found.items():
        if not math.isfinite(value):
            raise EvaluationError(f"{name}: the gradient is not finite; {OVERFLOW}")
    return found


def _weights(model: nn.Module) -> dict[str, _Weight]:
    """The weights of linear layers and stacks of experts, by the parameters' names."""
    layers = ((name, layer.weight) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    found = {f"{name}.weight": _Weight(weight, weight.shape, 1) for name, weight in layers}
    for name, (_, _, form) in stacks_of(model).items():
        found[name] = _Weight(model.get_parameter(name), form.stacked, 1 if form.transposed else 2)
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    return {name: weight for name, weight in found.items() if owners[id(weight.parameter)] == 1}


def _as_saved(model: Any, rows: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Totals of numbers per row, for each matrix that a checkpoint holds: what experts are joined from, and under which names.

    rows   parameter name -> that weight's shape, but for input features, of which there is 1
    """
    for name, values in revert_weight_conversion(model, rows).items():
        module = name.removesuffix(".weight")
        if values.dim() == 3:
            yield from ((f"{module}.{expert}", total) for expert, total in enumerate(values.sum((1, 2))))
        else:
            yield module, values.sum()


def own_text(model: Any, text: OwnText) -> Iterator[Tensor]:
    """Sequences int64 [length] on the model's device: a random token, then what the model says."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = torch.randint(vocabulary, (text.sequences, 1), generator=torch.Generator().manual_seed(text.seed))
    random = torch.Generator(model.device).manual_seed(text.seed)
    for start in first.to(model.device).split(_BATCH):
        tokens, cache = [start], None
        with torch.no_grad():
            for _ in range(text.length - 1):
                before = tokens[-1] if cache is not None else torch.cat(tokens, 1)  # Mamba's cache has another name
                logits, cache = predict(model, before, cache)
                tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=random))
        yield from torch.cat(tokens, 1)


@contextmanager
def _squared_gradients(model: nn.Module, weights: Mapping[str, _Weight]) -> Iterator[dict[str, Tensor]]:
    """Name -> mean(W_r^2) |gradient_r|^2 of every row r, summed over backward passes, float64, filled in as they run.

    A gradient is dropped as soon as it is counted, so that there is never more than one in memory.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    energies = {
        name: each.parameter.detach().float().view(each.shape).square().mean(each.inputs, keepdim=True)
        for name, each in weights.items()
    }
    rows = {name: torch.zeros_like(energy, dtype=torch.float64) for name, energy in energies.items()}

    def count(name: str, each: _Weight) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            rows[name] += weight.grad.float().view(each.shape).square().sum(each.inputs, keepdim=True) * energies[name]
            weight.grad = None

        return hook

    model.requires_grad_(False)
    hooks = [
        each.parameter.requires_grad_().register_post_accumulate_grad_hook(count(name, each)) for name, each in weights.items()
    ]
    try:
        yield rows
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
