"""EXL3, the trellis code of exllamav3, by its own quantiser and with its converter's defaults, on a transformers model.

As its converter does, numbered layers are taken one after the other: a layer's inputs are those that it has with all layers
before it quantised, and each of its matrices is quantised with the products X'X of its inputs (`quantize_exl3`). Matrices are
padded with zeros to multiples of 128, its Hadamard blocks, and are stored padded: 640 x 640 for 576 x 576.

What is other here: the text, which all calibrated baselines share, in the place of its own mixture of texts; activations in the
model's dtype, not float16; the scales of rows and columns before they are rounded to 16 bits, a relative 2^-12 at most.

The package is used as installed, but for its `__init__`, which imports an inference engine and compiles 177 files for it: the
quantiser's modules are imported alone, and of the kernels those compiled that it calls, at the first use.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from seedlm.calibration.placement import numbered_layers
from seedlm.errors import EvaluationError, extra

Quantize = Callable[[Tensor, dict[str, Any], dict[str, Any], bool], tuple[Tensor, float, dict[str, Tensor]]]
"""exllamav3's `quantize_exl3`: weight [in, out], what was seen of its inputs, options, True -> the dequantised weight, an error
that is not used here, and the tensors that a file holds.
"""

_BLOCK: Final = 128
_BATCH: Final = 8
"""Windows in one forward pass."""


def quantize_layers(model: Any, layers: Mapping[str, nn.Linear], windows: Tensor, bits: float) -> int:
    """Quantise linear layers of a model in place; all bits stored.

    windows   int64 [windows, tokens] of calibration text
    bits      1 to 8, or 1.5, 2.5 or 3.5
    """
    quantize, stored = load_quantizer(), 0
    blocks = {prefix: [name for name in layers if name.startswith(f"{prefix}.")] for prefix in numbered_layers(model)}
    if outside := set(layers).difference(*blocks.values()):
        raise EvaluationError(f"{min(outside)} is in no numbered layer, which EXL3 goes by here")
    for number, (prefix, names) in enumerate(blocks.items()):
        if not names:
            continue
        seen = _observe(model, prefix, {name: layers[name] for name in names}, windows)
        with _full_precision():
            for name in names:
                layer, inputs = layers[name], seen[name]
                weight, products = _pad(layer.weight.float().T), _pad(inputs.products)
                data = {"H": products, "count": inputs.rows, "finalized": False, "first_key": name, "L": None}
                options = {
                    "seed": number,
                    "K": bits,
                    "devices": [weight.device],
                    "device_ratios": None,
                    "apply_out_scales": None,  # it decides
                    "mul1": True,  # the code that its converter takes by default
                    **({"out_sensitivity": inputs.sensitivity} if inputs.sensitivity is not None else {}),
                }
                found, _, tensors = quantize(weight, data, options, True)
                layer.weight.copy_(found[: layer.in_features, : layer.out_features].T)
                stored += sum(8 * tensor.nbytes for tensor in tensors.values())
    return stored


def _pad(matrix: Tensor) -> Tensor:
    """A copy in float32, with zeros to multiples of 128."""
    rows, columns = (-(-length // _BLOCK) * _BLOCK for length in matrix.shape)
    padded = torch.zeros(rows, columns, device=matrix.device)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in float32, whatever was allowed: a Cholesky decomposition comes of them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- what is seen of a layer ----


@dataclass
class _Inputs:
    """Of one matrix: float32 [in, in] sums of X'X, and over how many rows.

    sensitivity   of a gate or up projection, float32 [out]: how much an error of each of its outputs moves the output of the
                  down projection behind it
    """

    products: Tensor
    rows: int = 0
    sensitivity: Tensor | None = None

    def add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1]).float()
        with _full_precision():
            self.products.addmm_(inputs.T, inputs)
        self.rows += len(inputs)


@dataclass
class _Gate:
    """act(gate) * up: the mean squares of its slopes along the two, times what the down projection makes of each."""

    act: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    squares: dict[nn.Module, Tensor] = field(default_factory=dict)
    rows: int = 0

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs[module] = output.detach().reshape(-1, output.shape[-1]).float()

    def add(self, module: nn.Module, args: Any) -> None:
        gate, up = self.outputs.pop(self.gate).requires_grad_(), self.outputs.pop(self.up)
        with torch.enable_grad():
            active = self.act(gate)
            (slope,) = torch.autograd.grad(active.sum(), gate)
        for layer, along in ((self.up, active.detach()), (self.gate, up * slope)):
            found = along.double().square().sum(0)
            self.squares[layer] = self.squares[layer] + found if layer in self.squares else found
        self.rows += len(gate)

    def sensitivity(self, layer: nn.Module) -> Tensor:
        energy = self.down.weight.double().square().sum(0)
        return (self.squares[layer] / self.rows * energy).float()


class _Seen(Exception):
    """Nothing behind this layer needs to run."""


def _observe(model: Any, prefix: str, layers: Mapping[str, nn.Linear], windows: Tensor) -> dict[str, _Inputs]:
    """What the matrices of one numbered layer are given by a text."""
    block = model.get_submodule(prefix)
    found = {
        name: _Inputs(torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device))
        for name, layer in layers.items()
    }
    gates = list(_gates(block, set(layers.values())))

    def stop(*_: Any) -> None:
        raise _Seen

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(found[name].add).remove)
        for gate in gates:
            hooks.callback(gate.gate.register_forward_hook(gate.note).remove)
            hooks.callback(gate.up.register_forward_hook(gate.note).remove)
            hooks.callback(gate.down.register_forward_pre_hook(gate.add).remove)
        hooks.callback(block.register_forward_hook(stop).remove)
        for batch in windows.split(_BATCH):
            try:
                model(input_ids=batch.to(model.device), use_cache=False)
            except _Seen:
                continue
            raise EvaluationError(f"{prefix} was not passed through by a text")
    names = {layer: name for name, layer in layers.items()}
    for gate in gates:
        for layer in (gate.gate, gate.up):
            found[names[layer]].sensitivity = gate.sensitivity(layer)
    return found


def _gates(block: nn.Module, layers: set[nn.Linear]) -> Iterator[_Gate]:
    for module in block.modules():
        parts = [getattr(module, f"{part}_proj", None) for part in ("gate", "up", "down")]
        if isinstance(act := getattr(module, "act_fn", None), nn.Module) and all(part in layers for part in parts):
            yield _Gate(act, *parts)  # type: ignore[arg-type]


# ---- exllamav3's quantiser without its engine ----


@cache
def load_quantizer() -> Quantize:
    """exllamav3's `quantize_exl3`. Raises EvaluationError where its kernels cannot be compiled."""
    if "exllamav3" not in sys.modules:
        spec = importlib.util.find_spec("exllamav3")
        if spec is None or not spec.submodule_search_locations:
            raise EvaluationError(f"EXL3 needs exllamav3: {extra('baselines')}")
        root = Path(spec.submodule_search_locations[0])
        kernels = ModuleType("exllamav3.ext")
        kernels.exllamav3_ext = _compile(root / "exllamav3_ext")  # type: ignore[attr-defined]
        for name in ("exllamav3", "exllamav3.modules", "exllamav3.modules.quant"):
            package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
        sys.modules["exllamav3.ext"] = kernels
    quantize: Quantize = importlib.import_module("exllamav3.modules.quant.exl3_lib.quantize").quantize_exl3
    return quantize


def _compile(folder: Path) -> Any:
    """The kernels of the quantiser, with the package's own options; kept in torch's cache folder."""
    from torch.utils.cpp_extension import load

    parts = [folder / "quant" / f"{name}.cu" for name in ("quantize", "pack", "frac", "exl3_devctx")]
    parts += sorted((folder / "quant" / "comp_units").glob("quantize_tiles_*.cu"))
    quiet = [word for number in (177, 20012) for word in ("-Xcudafe", f"--diag_suppress={number}")]
    build = partial(load, "seedlm_exl3", [str(Path(__file__).with_suffix(".cpp")), *map(str, parts)])
    try:
        return build(extra_include_paths=[str(folder)], extra_cuda_cflags=["-O3", "--use_fast_math", *quiet])
    except (RuntimeError, OSError, ImportError) as reason:
        raise EvaluationError(f"exllamav3's kernels cannot be compiled: {' '.join(str(reason).split())[:300]}") from reason
