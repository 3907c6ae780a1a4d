"""What each linear layer's inputs look like, and how much its outputs matter: X'X and squared gradients over a text.

A pass over the text, forwards and backwards. Forwards, each input x is kept; backwards comes the gradient g of the text's
negative log-likelihood at each output, and the sums

    over tokens  t x x'     with t = root of the layer's mean over rows of  g_r^2 / E[g_r^2]
    over tokens  g_r^2      for each row r

are added to. Tokens that the predictions depend on count more (GuidedQuant, Kim et al. 2025, arXiv 2505.07004, takes the
square itself: that needs several times the text for the same accuracy), and an encoder that knows E[g_r^2] lets rows that
matter little have the errors. On a model's own text the gradients are the Fisher information's (see `sensitivity`). Without
`gradients` there is only the forward pass, and every token counts the same.

Layers that are given one and the same tensor (q, k and v; gate and up) share its sums, each adding its own t. Experts have
sums of their own, of the tokens that reach them, stacked or not. Products are float32, totals float64. E[g_r^2] is what the
tokens before have shown, so the order of the text matters a little, and the batch.

The backward pass goes layer by layer (`layer_by_layer`), so that there is one layer's activations and sums at a time: the
sums of all layers of an 8B model are 65 GB. A model whose layers are no chain goes backwards as a whole.
"""

import hashlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from seedlm.calibration.layer_by_layer import NotAChainError, layer_by_layer
from seedlm.calibration.own_text import OVERFLOW, text_hash
from seedlm.calibration.placement import is_away
from seedlm.calibration.spool import keep
from seedlm.errors import EvaluationError
from seedlm.modeling.experts import SeedExperts, projections_of, stacks_of
from seedlm.progress import Progress
from seedlm.storage.inspect import OWN_TEXT
from seedlm.storage.statistics import InputStatistics, Statistics, StatisticsFacts

_SAMPLES: Final = 1024
_TINY: Final = 1e-300


def measure_statistics(
    model: Any,
    tokens: Tensor,
    *,
    gradients: bool = True,
    layers: Collection[str] | None = None,
    batch: int = 8,
    source: str = OWN_TEXT,
    spool: Path | None = None,
    on_progress: Progress | None = None,
) -> Statistics:
    """The statistics of a causal language model's linear layers, experts included, on a text.

    model      in evaluation mode; layers of it may be away (`placement`) if they are a chain
    tokens     int64 [sequences, length], such as `write_text` returns
    gradients  whether tokens and rows are weighted by squared gradients; takes four times as long
    layers     names to observe, all by default
    batch      sequences at a time
    source     what the text is, for whoever reads the statistics
    spool      a folder on whose disk to keep inputs and finished sums; None keeps them in memory
    returns    by the names that the model is saved under, an expert of a stack by its number
    The model comes back as it was. Raises EvaluationError if there is nothing to observe, or for activations and gradients
    that are not finite.
    """
    progress = on_progress or (lambda phase, done, total: None)
    pieces = tokens.split(batch)

    def step(share: float) -> None:
        progress("statistics", int(share * tokens.numel()), tokens.numel())

    watch = _Watch(gradients, spool)
    try:
        with _watched(model, watch, layers):
            if gradients:
                layer_by_layer(model, pieces, _loss, watch, spool, step)
            else:
                _at_once(model, pieces, watch, step)
    except NotAChainError as reason:
        if is_away(model):
            raise EvaluationError(f"it must fit the device as a whole, for {reason}") from None
        watch = _Watch(gradients, spool)
        with _watched(model, watch, layers):
            _at_once(model, pieces, watch, step)
    step(1)
    facts = StatisticsFacts(
        model=model_fingerprint(model),
        text=text_hash(tokens),
        source=source,
        sequences=len(tokens),
        length=tokens.shape[1],
        weighting="gradient" if gradients else "none",
    )
    return _finished(model, watch, facts)


def _loss(model: Any, piece: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens [sequences, length], in nats, summed up."""
    logits = model(input_ids=piece, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), piece[:, 1:].flatten(), reduction="sum")


def _at_once(model: Any, pieces: Sequence[Tensor], watch: "_Watch", step: Callable[[float], None]) -> None:
    """All layers together, backwards too if there are gradients."""
    for number, piece in enumerate(pieces):
        step(number / len(pieces))
        with torch.set_grad_enabled(watch.gradients):
            loss = _loss(model, piece.to(model.device))
            if watch.gradients:
                loss.backward()
        watch.settle()


def model_fingerprint(model: nn.Module) -> str:
    """What tells one model from another: SHA-256 of its parameters' names and shapes, and of 1024 values of each."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {[*parameter.shape]}\n".encode())
        places = torch.arange(min(_SAMPLES, flat.numel()), device=flat.device) * max(flat.numel() // _SAMPLES, 1)
        digest.update(flat[places].float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


class _Watch:
    """The sums, by keys of matrices (`_matrices`), and who reads what.

    reads      matrix -> the one that reads the same input first
    products   of those: float64 [in, in], sum of t x x'
    weights    of those: float64 scalar, sum of t
    tokens     of those: how many
    rows       matrix -> float64 [out], sum of squared gradients
    seen       matrix -> tokens in that sum
    inputs     what has become of the products of those whose sums are complete
    """

    def __init__(self, gradients: bool, spool: Path | None = None) -> None:
        self.gradients, self.spool = gradients, spool
        self.paused = self.waiting = False
        self.inputs: dict[str, InputStatistics] = {}
        self.reads: dict[str, str] = {}
        self.products: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.rows: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self._now: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def note(self, matrix: str, given: Tensor, output: Tensor) -> None:
        """A matrix has been multiplied by an input [..., in], which gave an output [..., out]."""
        x = given.detach().reshape(-1, given.shape[-1])
        if not x.isfinite().all():
            raise EvaluationError(f"{matrix}: its input is not finite; {OVERFLOW}")
        if self.paused:
            return
        first = self._first_reader(matrix, given)
        if first == matrix:
            self.tokens[first] = self.tokens.get(first, 0) + len(x)
        if self.gradients and output.requires_grad:
            self.waiting = True
            output.register_hook(lambda gradient: self._backwards(matrix, first, x, gradient))
        elif first == matrix:
            self._add(first, x, torch.ones(len(x), device=x.device))

    def settle(self) -> None:
        """A pass over the model, or a layer, is over."""
        self._now.clear()
        self.waiting = False

    def conclude(self, prefix: str = "") -> None:
        """The sums of matrices below this name are complete."""
        for name in [name for name in self.products if name.startswith(prefix)]:
            mean = self.products.pop(name).div_(self.weights[name].clamp_min(_TINY))
            found = InputStatistics.of(mean, self.tokens[name])
            self.inputs[name] = InputStatistics(found.scale, keep(found.correlation, self.spool), found.tokens)

    def _backwards(self, matrix: str, first: str, x: Tensor, gradient: Tensor) -> None:
        squares = gradient.detach().reshape(len(x), -1).float().square()
        if not squares.isfinite().all():
            raise EvaluationError(f"{matrix}: the gradient is not finite; {OVERFLOW}")
        self.rows[matrix] = squares.sum(0, dtype=torch.float64) + self.rows.get(matrix, 0)
        self.seen[matrix] = self.seen.get(matrix, 0) + len(x)
        mean = (self.rows[matrix] / self.seen[matrix]).float()
        self._add(first, x, torch.where(mean > 0, squares / mean, 0.0).mean(1).sqrt())

    def _first_reader(self, matrix: str, given: Tensor) -> str:
        """The matrix that has read this very tensor first."""
        known = self._now.get(id(given))
        first = known[1] if known is not None and known[0]() is given else matrix
        if first == matrix:
            self._now[id(given)] = (weakref.ref(given), matrix)
        before = self.reads.setdefault(matrix, first)
        if before != first:
            raise EvaluationError(f"{matrix}: reads what {first} reads, but before it read what {before} did")
        return first

    def _add(self, name: str, x: Tensor, weight: Tensor) -> None:
        """Sum up t x x', [tokens, in] and [tokens]."""
        x, width = x.float(), x.shape[1]
        if name not in self.products:
            self.products[name] = torch.zeros(width, width, dtype=torch.float64, device=x.device)
            self.weights[name] = torch.zeros((), dtype=torch.float64, device=x.device)
        self.products[name] += (x * weight[:, None]).T @ x
        self.weights[name] += weight.sum(dtype=torch.float64)


class _WatchedExperts(SeedExperts):
    """Dense experts that say what each of them reads."""

    def __init__(self, dense: nn.Module, name: str, watch: _Watch) -> None:
        super().__init__(dense, {}, {}, {})
        self.stacks_name, self.watch = name, watch

    def _project(self, projection: str, expert: int, x: Tensor) -> Tensor:
        output = super()._project(projection, expert, x)
        if len(x):
            self.watch.note(_member(f"{self.stacks_name}.{projection}", expert), x, output)
        return output


def _member(parameter: str, expert: int) -> str:
    return f"{parameter}.{expert}"


@contextmanager
def _watched(model: Any, watch: _Watch, layers: Collection[str] | None) -> Iterator[None]:
    """While hooks are in place, and gradients reach outputs but no parameter. Raises EvaluationError without a matrix."""
    keys = list(_matrices(model))
    numbers = _as_saved(model, {key: torch.full((rows,), float(i)) for i, (key, rows) in enumerate(_matrices(model).items())})
    wanted = {keys[int(n)] for name, values in numbers.items() if layers is None or name in layers for n in values.unique()}
    if not wanted:
        raise EvaluationError(f"{type(model).__name__} has no linear layer to observe")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modules, handles, experts = dict(model.named_modules()), [], {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and f"{name}.weight" in wanted:
            handles.append(module.register_forward_hook(_linear_hook(f"{name}.weight", watch), with_kwargs=True))
        stacks = projections_of(module)
        if any(_member(f"{name}.{stack}", i) in wanted for stack, form in stacks.items() for i in range(form.shape[0])):
            experts[name] = module
    try:
        for name, module in experts.items():
            model.set_submodule(name, _WatchedExperts(module, name, watch).train(module.training))
        model.requires_grad_(False)
        if watch.gradients:
            handles.append(model.get_input_embeddings().register_forward_hook(_with_gradient))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in experts.items():
            model.set_submodule(name, module)
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def _with_gradient(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    """Embeddings that gradients reach, and that a model may change in place."""
    return output.detach().requires_grad_().clone()


def _linear_hook(matrix: str, watch: _Watch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor):  # and not a router's choice
            watch.note(matrix, args[0] if args else kwargs["input"], output)

    return hook


def _matrices(model: nn.Module) -> dict[str, int]:
    """Key -> rows, of every linear layer's weight and of every expert's: the parameter's name, and the expert's number."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = module.weight.shape[0]
    for name, (_, _, form) in stacks_of(model).items():
        found.update({_member(name, expert): form.shape[1] for expert in range(form.shape[0])})
    return found


def _as_saved(model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers for each row, float [out], by the names of the layers that a checkpoint holds; stacks' are PARAMETER.NUMBER.

    values   by keys of `_matrices`; what is missing is NaN
    """
    parameters = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows = torch.full((module.weight.shape[0],), torch.nan)
            parameters[f"{name}.weight"] = values.get(f"{name}.weight", rows)[:, None]
    for name, (_, _, form) in stacks_of(model).items():
        rows = torch.full((form.shape[1],), torch.nan)
        parameters[name] = form.rows(torch.stack([values.get(_member(name, i), rows) for i in range(form.shape[0])]))
    saved = {}
    for name, value in revert_weight_conversion(model, parameters).items():
        layer = name.removesuffix(".weight")
        if value.dim() == 3:
            saved.update({_member(layer, expert): rows.flatten() for expert, rows in enumerate(value)})
        else:
            saved[layer] = value.flatten()
    return saved


def _finished(model: Any, watch: _Watch, facts: StatisticsFacts) -> Statistics:
    """Means, by the names that a checkpoint has."""
    watch.conclude()
    matrices, firsts = _matrices(model), list(watch.inputs)
    numbers = {
        key: torch.full((matrices[key],), float(firsts.index(first))) for key, first in watch.reads.items() if first in firsts
    }
    reads = {}
    for layer, found in _as_saved(model, numbers).items():
        if len(found) and bool((found == found[0]).all()):  # all rows read the same, and did
            reads[layer] = firsts[int(found[0])]
    names: dict[str, str] = {}
    for layer, first in reads.items():
        names.setdefault(first, layer)
    inputs = {names[first]: found for first, found in watch.inputs.items() if first in names}
    means = {key: (total / watch.seen[key]).float().cpu() for key, total in watch.rows.items()}
    rows = {layer: values for layer, values in _as_saved(model, means).items() if layer in reads and values.isfinite().all()}
    return Statistics(facts, inputs, {layer: names[first] for layer, first in reads.items()}, rows)
