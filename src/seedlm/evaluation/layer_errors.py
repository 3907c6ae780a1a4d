"""Where in a model the errors are: each linear layer's weights and outputs, and the hidden state after each decoder layer.

A layer of the model is taken to be the one of the same name in the reference, of whatever class: it is only called. Its
weights are what it makes of unit vectors, and its output error is that for the inputs which the reference's layer gets, so
that it is the layer's own and not that of those before it. What all layers together do is in the hidden states, where each
model runs by itself. All errors are ||Y^ - Y||_F / ||Y||_F. The first token of every window is left out: many models keep
values there that are thousands of times as large as all others.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

_PROBE: Final = 1 << 24
"""64 MB of outputs."""

_SCALE: Final = 1024.0
"""Length of the unit vectors: what a bias in 16 bits rounds away is divided by it again. Larger ones would overflow float16."""


@torch.inference_mode()
def compare_layers(model: Any, reference: Any, windows: Tensor, *, probe: int = _PROBE) -> dict[str, Any]:
    """Relative errors of a model's layers.

    model, reference   causal language models as transformers makes them, in evaluation mode, of one architecture
    windows            int64 [windows, tokens], on the CPU
    probe              outputs of unit vectors formed at a time
    returns            linears: of every linear layer of the reference that the model has too, its module, shape [out, in],
                       weight_error and output_error; hidden: the error after each decoder layer, the last one normed
    """
    pairs = {}
    theirs = dict(model.named_modules())
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and callable(theirs.get(name)):
            pairs[name] = (theirs[name], module)
    outputs = {name: _Ratio() for name in pairs}
    hooks = [
        module.register_forward_hook(_make_hook(partner, outputs[name], model.device, model.dtype))
        for name, (partner, module) in pairs.items()
    ]
    try:
        states = [_hidden_states(reference, window) for window in windows]
    finally:
        for hook in hooks:
            hook.remove()
    hidden = [_Ratio() for _ in states[0]]
    for window, expected in zip(windows, states, strict=True):
        for ratio, ours, target in zip(hidden, _hidden_states(model, window), expected, strict=True):
            ratio.add(ours, target)
    return {
        "linears": [
            {
                "module": name,
                "shape": [module.out_features, module.in_features],
                "weight_error": _weight_error(partner, module, model, reference, probe),
                "output_error": outputs[name].value,
            }
            for name, (partner, module) in pairs.items()
        ],
        "hidden": [ratio.value for ratio in hidden],
    }


class _Ratio:
    """||found - expected|| / ||expected||, added up; six digits of it, None if both are not finite."""

    def __init__(self) -> None:
        self._error = self._norm = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        wide = expected.double()
        self._error += float((found.to(expected.device).double() - wide).square().sum())
        self._norm += float(wide.square().sum())

    @property
    def value(self) -> float | None:
        ratio = math.sqrt(self._error / self._norm) if self._norm else 0.0
        return float(f"{ratio:.6g}") if math.isfinite(ratio) else None


def _make_hook(partner: nn.Module, ratio: _Ratio, device: torch.device, dtype: torch.dtype) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0].to(device, dtype)
        if output.shape[-2] > 1:  # a head may be asked for the last position alone
            ratio.add(partner(given)[..., 1:, :], output[..., 1:, :])

    return hook


def _hidden_states(model: Any, window: Tensor) -> list[Tensor]:
    """[tokens - 1, width] after each decoder layer."""
    states = model(input_ids=window[None].to(model.device), use_cache=False, output_hidden_states=True).hidden_states
    return [state[0, 1:] for state in states[1:]]


def _weight_error(partner: nn.Module, module: nn.Linear, model: Any, reference: Any, probe: int) -> float | None:
    ratio = _Ratio()
    rows = max(1, probe // max(module.in_features, module.out_features))
    for start in range(0, module.in_features, rows):
        stop = min(start + rows, module.in_features)
        ratio.add(
            _columns(partner, start, stop, module.in_features, model),
            _columns(module, start, stop, module.in_features, reference),
        )
    return ratio.value


def _columns(module: nn.Module, start: int, stop: int, width: int, owner: Any) -> Tensor:
    """Columns of a layer's weight, as rows [stop - start, out]."""
    weight = getattr(module, "weight", None)
    if type(module) is nn.Linear and type(weight) is nn.Parameter:
        return weight[:, start:stop].T
    probe = torch.zeros(1, stop - start + 1, width, dtype=owner.dtype, device=owner.device)
    places = torch.arange(stop - start, device=owner.device)
    probe[0, places, start + places] = _SCALE
    found = module(probe)[0].double()
    return (found[:-1] - found[-1]) / _SCALE
