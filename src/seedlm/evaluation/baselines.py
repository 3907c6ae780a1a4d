"""Other ways to store a weight in few bits, as baselines: by their own libraries, on our modules, measured by our harness.

A baseline is a method and a number of bits, ``hqq-3``. It takes the linear layers that `quantize.choose_modules` would take,
quantises each with the library's own code, and puts the dequantised weight back, so that everything after it is the same for
all. Embeddings and heads stay as they are.

Bits are what the method must store: codes at their nominal width even where a library pads them (HQQ keeps 3-bit codes ten to
a word), scales and offsets at the width in which the library keeps them in a file, tables and padded columns included.

EXL3 pads both sides of a matrix to multiples of 128, and what is padded is stored too.

Groups run along a row and are the largest divisor of the row that is not above the method's own size: of 576 weights,
groups of "128" hold 96.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from types import FunctionType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from seedlm.codes.registry import parse_format
from seedlm.errors import EvaluationError
from seedlm.evaluation.exl3 import quantize_layers
from seedlm.evaluation.methods import parse_baseline
from seedlm.modeling.quantize import choose_modules

RoundTrip = Callable[[Tensor, int], tuple[Tensor, int]]
"""A weight float32 [out_features, in_features] and a number of bits -> the dequantised weight, and all bits stored for it."""

CALIBRATION_WINDOWS: Final = 128
"""At most so many windows of text are shown to a calibrated method: GPTQ's and AWQ's own number. AWQ's are of 512 tokens.
EXL3's converter takes 250 windows of texts of its own."""


@torch.no_grad()
def round_trip(weight: Tensor, baseline: str) -> tuple[Tensor, int]:
    """One weight [out_features, in_features] through a data-free baseline: the dequantised weight, and all bits stored."""
    name, method, bits = parse_baseline(baseline)
    if method.calibrated:
        raise EvaluationError(f"{baseline} is calibrated: it needs a model and text, not one weight")
    found, stored = _ROUND_TRIPS[name](weight.float(), int(bits))
    return found.to(weight.dtype), stored


@torch.no_grad()
def apply_baseline(model: Any, baseline: str, windows: Tensor | None = None, tokenizer: Any = None) -> dict[str, Any]:
    """Quantise a model's linear layers with a baseline, in place.

    windows, tokenizer   for a calibrated method: int64 [windows, tokens], and what made them
    returns              method, library versions, options, calibrated, bits_per_weight with all overhead, and the relative
                         error ||W - W^||_F / ||W||_F over all weights (None for AWQ, which rescales them)
    """
    name, method, bits = parse_baseline(baseline)
    linears = {module: layer for module, layer in model.named_modules() if type(layer) is nn.Linear}
    chosen = choose_modules(model, parse_format("4", "block"))
    if stacks := [module for module in chosen if module not in linears]:
        raise EvaluationError(f"{stacks[0]} is a stack of experts: baselines take linear layers only")
    layers = {module: linears[module] for module in chosen}
    originals = {module: layer.weight.detach().clone() for module, layer in layers.items()}
    stored = 0
    if not method.calibrated:
        for module, layer in layers.items():
            found, size = _ROUND_TRIPS[name](originals[module].float(), int(bits))
            model.set_submodule(module, _dense(layer, found))
            stored += size
    else:
        if windows is None:
            raise EvaluationError(f"{baseline} is calibrated: give it text with --calibration FILE")
        windows = windows[:CALIBRATION_WINDOWS, : 512 if name == "awq" else None]
        if name == "exl3":
            stored = quantize_layers(model, layers, windows, bits)
        else:
            stored = _calibrate(model, name, int(bits), layers, windows, tokenizer)
    pairs = [(weight, model.get_parameter(f"{module}.weight")) for module, weight in originals.items()]
    error = sum(float((old.double() - new.double()).square().sum()) for old, new in pairs)
    norm = sum(float(old.double().square().sum()) for old, _ in pairs)
    weights = sum(weight.numel() for weight in originals.values())
    return {
        "name": baseline,
        "libraries": method.versions,
        "options": method.options,
        "calibrated": method.calibrated,
        "calibration_tokens": windows.numel() if windows is not None and method.calibrated else None,
        "bits_per_weight": stored / weights,
        "weights": weights,
        "relative_error": None if name == "awq" else (error / norm) ** 0.5,
    }


def divisor(features: int, largest: int) -> int:
    """The largest divisor of a row's length that is not above the group size wanted."""
    return next(size for size in range(min(features, largest), 0, -1) if features % size == 0)


def _dense(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """An ordinary layer with this weight, in the old layer's dtype, and its bias."""
    new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    new.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    new.register_parameter("bias", layer._parameters["bias"])
    return new.train(layer.training)


# ---- one weight, one library ----


def _nf4(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = [codes, state.absmax, state.state2.absmax, state.offset]
    return dequantize_4bit(codes, state), sum(8 * part.nbytes for part in stored)


def _hqq(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    from hqq.core.quantize import Quantizer

    group = divisor(weight.shape[1], 64)
    options = {"nbits": bits, "group_size": group, "axis": 1, "device": str(weight.device)}
    codes, meta = Quantizer.quantize(weight, **options)
    # A file holds scale and zero in float16.
    meta |= {"scale": meta["scale"].half().float(), "zero": meta["zero"].half().float(), "compute_dtype": torch.float32}
    return Quantizer.dequantize(codes, meta), weight.numel() * bits + 16 * (meta["scale"].numel() + meta["zero"].numel())


def _higgs(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """Transformers' own `quantize_with_higgs`, up to the codes.

    What follows there is FLUTE's packing, whose newest wheel is built for torch 2.5 and CUDA 12; it moves codes and changes no
    value. Nor does the Hadamard transform, here a matrix product in the place of fast-hadamard-transform, which has no wheel.
    """
    from transformers.integrations import higgs

    size = next((size for size in (512, 256, 128) if weight.shape[1] % size == 0), 64)
    group = min(size, 256)
    matrix = _hadamard(size).to(weight)

    def keep(codes: Tensor, scales: Tensor, grid: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        return codes, scales, grid, grid, None

    def transform(x: Tensor, scale: float) -> Tensor:
        return x @ matrix * scale

    # Its code with these in the place of what the module imports from two libraries that need not be there.
    names = {**vars(higgs), "prepare_data_transposed": keep, "hadamard_transform": transform}
    quantize = FunctionType(higgs.quantize_with_higgs.__code__, names)
    parts = quantize(weight, bits=bits, p=2, group_size=group, hadamard_size=size)
    codes, scales, grid = parts["weight"], parts["scales"], parts["tables"]
    rows = grid[codes.long()].reshape(len(weight), -1, size) * scales[:, :: size // group, None]
    found = (rows @ matrix * size**-0.5).reshape(len(weight), -1)[:, : weight.shape[1]]
    return found, codes.numel() * 2 * bits + 16 * (scales.numel() + grid.numel())


def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of signs, float32 [size, size], size a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


# ---- llm-compressor: integers with a scale for each row or group, with and without calibration ----


def _round(weight: Tensor, bits: int, *, method: str) -> tuple[Tensor, int]:
    """One weight by llm-compressor's observer and compressed-tensors' rounding."""
    with _llm_compressor():
        from compressed_tensors.quantization import initialize_module_for_quantization
        from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        initialize_module_for_quantization(layer, _scheme(method, bits, weight.shape[1], ["Linear"]))
        initialize_observer(layer, "weight")
        observe(layer, "weight")
        update_qparams(layer, "weight")
        return _read_layer(layer)


def _calibrate(model: Any, method: str, bits: int, layers: Mapping[str, nn.Linear], windows: Tensor, tokenizer: Any) -> int:
    """GPTQ or AWQ on a whole model, in place; all bits stored."""
    with _llm_compressor(), tempfile.TemporaryDirectory() as folder:
        from compressed_tensors.offload import remove_dispatch
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        widths = {layer.in_features for layer in layers.values()}
        groups = {
            f"rows_of_{width}": _scheme(method, bits, width, [name for name in layers if layers[name].in_features == width])
            for width in sorted(widths)
        }
        recipe = {
            "gptq": lambda: [GPTQModifier(config_groups=groups)],
            "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(config_groups=groups)],
        }[method]()
        model.config.save_pretrained(folder)  # oneshot reads the configuration from disk, and a GGUF file has none
        model.config._name_or_path = folder
        inputs: Any = [{"input_ids": batch} for batch in windows.split(8)]
        batches: Any = torch.utils.data.DataLoader(inputs, batch_size=None)
        device = model.device
        with torch.enable_grad():
            oneshot(model=model, processor=tokenizer, dataset=batches, recipe=recipe, num_calibration_samples=len(inputs))
        remove_dispatch(model, onload_tensors=True).to(device)  # it leaves weights wherever it last had them
    stored = 0
    for name, layer in layers.items():
        found, size = _read_layer(cast(nn.Linear, model.get_submodule(name)))
        model.set_submodule(name, _dense(layer, found))
        stored += size
    return stored


def _scheme(method: str, bits: int, in_features: int, targets: list[str]) -> Any:
    """Groups of 128 with a rounded offset, as the tables of GPTQ, AWQ and OmniQuant have them; the clipped grid without one."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    options: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": False, "observer": "memoryless_minmax"}
    options |= {"strategy": "group", "group_size": divisor(in_features, 128)}
    if method == "rtn-channel":
        options |= {"strategy": "channel", "group_size": None}
    if method == "mse":  # the clip with the least squared error, of 80 between the largest weight and a fifth of it
        search = {"norm": 2.0, "maxshrink": 0.8, "grid": 100, "patience": 100}
        options |= {"symmetric": True, "observer": "memoryless_mse", "observer_kwargs": search}
    return QuantizationScheme(targets=targets, weights=QuantizationArgs(**options))


def _read_layer(layer: nn.Linear) -> tuple[Tensor, int]:
    """The dequantised weight of a layer that llm-compressor has quantised, and its bits: codes, 16-bit scales, offsets."""
    from compressed_tensors.quantization import fake_quantize

    scheme: Any = layer.quantization_scheme
    scale, zero = cast(Tensor, layer.weight_scale), cast(Tensor | None, getattr(layer, "weight_zero_point", None))
    found = fake_quantize(layer.weight, scale, zero, scheme.weights)
    offset = 0 if scheme.weights.symmetric else scheme.weights.num_bits
    return found, layer.weight.numel() * scheme.weights.num_bits + scale.numel() * (16 + offset)


@contextmanager
def _llm_compressor() -> Iterator[None]:
    """Keep its log and its bars from standard error, where nobody asked for them."""
    import llmcompressor  # noqa: F401  (switches its log on)
    from loguru import logger

    logger.disable("llmcompressor")
    logger.disable("compressed_tensors")
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):  # a bar for every layer
        yield


_ROUND_TRIPS: Final[Mapping[str, RoundTrip]] = {
    "rtn-channel": partial(_round, method="rtn-channel"),
    "rtn": partial(_round, method="rtn"),
    "mse": partial(_round, method="mse"),
    "nf4": _nf4,
    "hqq": _hqq,
    "higgs": _higgs,
}
"""What the data-free `METHODS` do with one weight."""
