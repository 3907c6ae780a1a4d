"""transformers: packed folders load with `AutoModelForCausalLM.from_pretrained(folder)` once this module is imported.

Loading swaps each nn.Linear whose codes are in the files for a `SeedLinear` before any weight is read. Which ones, and
whether every part of them is there in the right shape, is taken from the files' headers: transformers itself would start
a missing tensor from random values. Afterwards every code is checked.

A folder must also fail where this package is missing, and transformers only warns about a quantisation method that it does not
know. Two guards see to that. The codes have the weights' own names, with other shapes (`checkpoint.stored_name`). And
config.json names, under ``fusion_config``, a fusion of layers that no transformers has: its name is the message, and the
ValueError about it comes before anything is loaded, whatever the arguments. Its value is false, "off", so that where
`register` has made the name known nothing happens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import fusion_mapping
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from seedlm.checkpoint import FORMAT_VERSION, GUARD, QUANT_METHOD, PackedInfo, guarded, metadata, stored_name
from seedlm.codec import ROUNDINGS, Rounding
from seedlm.errors import CheckpointError, FormatError
from seedlm.format import Format, format_from_dict, parse_format
from seedlm.linear import SeedLinear, choose_modules, compress_model, expand_model, seed_linears


class SeedLMConfig(QuantizationConfigMixin):
    """How a model is packed: what stands in config.json, and what compresses a dense model while it is loaded.

    bits                     a preset by its bits per weight: 5, 4.5, 4, 3.5, 3, 2.5 or 2, unless `format` is given
    format                   a specification such as "block-k16-c8-p3-q4-e4", or the JSON form of a format
    rounding                 how coefficients are chosen (`codec.Rounding`)
    modules_to_not_convert   linear layers to leave as they are: names, or glob patterns when compressing
    overrides                module name -> JSON form of its format, where it is not `format`
    Raises FormatError for an unknown format or option, CheckpointError for a newer format version.
    """

    def __init__(
        self,
        bits: float | str | None = None,
        *,
        format: str | Mapping[str, Any] | None = None,
        rounding: Rounding = "best",
        modules_to_not_convert: list[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            hint = "; to expand a loaded model call model.dequantize()" if "dequantize" in unknown else ""
            raise FormatError(f"SeedLMConfig has no option {', '.join(unknown)}{hint}")
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"format_version must be 1 .. {FORMAT_VERSION}, got {format_version!r}; "
                f"a newer one needs: pip install -U seedlm"
            )
        if rounding not in ROUNDINGS:
            raise FormatError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if bits is not None and format is not None:
            raise FormatError("give bits or format, not both")
        if isinstance(format, Mapping):
            parsed = format_from_dict(format)
        else:
            bits = 4 if bits is None else bits
            parsed = parse_format(format if format is not None else bits if isinstance(bits, str) else f"{bits:g}")
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.format = parsed.to_dict()
        self.rounding = rounding
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.overrides = {name: format_from_dict(item).to_dict() for name, item in (overrides or {}).items()}

    def format_of(self, module: str) -> Format:
        """The format of one compressed module."""
        return format_from_dict(self.overrides.get(module, self.format))

    def to_dict(self) -> dict[str, Any]:
        data = dict(super().to_dict())
        return data if data["overrides"] else {key: value for key, value in data.items() if key != "overrides"}


class SeedLMQuantizer(HfQuantizer):
    """Puts packed layers into a model that is being loaded: from a packed folder, or by compressing a dense one."""

    requires_calibration = False
    quantization_config: SeedLMConfig

    def _process_model_before_weight_loading(self, model, checkpoint_files: list[str] | None = None, **kwargs: Any):
        if self.pre_quantized:
            _place_packed_layers(model, checkpoint_files or [], self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs: Any):
        if self.pre_quantized:
            for name, layer in seed_linears(model):
                layer.check_codes(name)
        else:
            _compress_loaded(model, self.quantization_config)
        _set_guard(model.config, True)
        return model

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        # Saving leaves config.dtype, which transformers passes on here, as a string.
        expand_model(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        _set_guard(model.config, False)
        return model

    def get_state_dict_and_metadata(self, model):
        """No state dict of its own; the safetensors metadata of a packed file, in which shapes are told."""
        packed = {name: PackedInfo(m.format, (m.out_features, m.in_features)) for name, m in seed_linears(model)}
        return None, metadata(packed)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients flow through packed layers, not into them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make the method, its configuration and the guard's name known to transformers. Calling it again does nothing.

    There is no public way to add a fusion. Its dictionary may move in a later transformers; folders would then be refused
    here too, and `from_pretrained(folder, fusion_config={})` would open them.
    """
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SeedLMConfig)
        register_quantizer(QUANT_METHOD)(SeedLMQuantizer)
        getattr(fusion_mapping, "_FUSION_REGISTRY", {}).setdefault(GUARD, None)


def _place_packed_layers(model: nn.Module, files: list[str], config: SeedLMConfig) -> None:
    """Swap every linear layer that is packed in these files for an empty `SeedLinear` on the same device."""
    stored = _read_headers(files)
    suffix = stored_name("", "exponent_bias")
    modules = [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]
    if not modules:
        raise CheckpointError(f"{', '.join(files) or 'a state dict'}: quant_method is {QUANT_METHOD!r} but no weight is packed")
    for module in modules:
        name = _name_in(model, module)
        if name is None:
            if any(part.isdigit() for part in module.split(".")):
                raise CheckpointError(f"{module} is packed, but {type(model).__name__} has no linear layer of that name")
            continue  # a head that this class does not have
        linear, format = model.get_submodule(name), config.format_of(module)
        assert isinstance(linear, nn.Linear)
        for part, expected in format.tensor_specs(linear.out_features, linear.in_features).items():
            found = stored.get(stored_name(module, part))
            if found != expected:
                raise CheckpointError(
                    f"{stored_name(module, part)} must be {expected} for a {format} weight {[*linear.weight.shape]}, "
                    f"got {found}"
                )
        layer = SeedLinear(
            linear.in_features,
            linear.out_features,
            format,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        model.set_submodule(name, layer.train(linear.training))


def _read_headers(files: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor in some safetensors files: name -> (dtype, shape), the dtype by torch's name if it is int32."""
    found = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file}: packed weights are stored as safetensors")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                dtype = part.get_dtype()
                found[name] = ("int32" if dtype == "I32" else dtype, tuple(part.get_shape()))
    return found


def _name_in(model: nn.Module, module: str) -> str | None:
    """A stored module's name in this model, which may have the base model's prefix more or less; None if it is not there."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (module, prefix + module, module.removeprefix(prefix)):
        try:
            if type(model.get_submodule(name)) is nn.Linear:
                return name
        except AttributeError:
            continue
    return None


def _compress_loaded(model: nn.Module, config: SeedLMConfig) -> None:
    """Compress a dense model that has just been loaded, and write down what was left as it is."""
    exclude, format = config.modules_to_not_convert, format_from_dict(config.format)
    names = choose_modules(model, format, exclude=exclude)
    total = sum(model.get_parameter(f"{name}.weight").numel() for name in names)
    with logging.tqdm(total=total, desc="Compressing", unit=" weights", unit_scale=True) as bar:
        compress_model(model, format, exclude=exclude, rounding=config.rounding, on_progress=bar.update)
    config.modules_to_not_convert = sorted(name for name, m in model.named_modules() if isinstance(m, nn.Linear))


def _set_guard(config: Any, wanted: bool) -> None:
    """Put the guard into a model's configuration, or take it out."""
    fusions = dict(getattr(config, "fusion_config", None) or {})
    fusions.pop(GUARD, None)
    if wanted:
        fusions = guarded(fusions)
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config
