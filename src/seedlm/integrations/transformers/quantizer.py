"""transformers: packed folders load with `AutoModelForCausalLM.from_pretrained(folder)` once this is imported (by `hf_hook`).

Loading swaps each nn.Linear whose codes are in the files for a `SeedLinear` before any weight is read, and experts for
`SeedExperts` (`hf_places`). Which ones, and whether every part of them is there in the right shape, is taken from the files'
headers: transformers itself would start a missing tensor from random values. Afterwards every code is checked.

A folder must also fail where this package is missing, and transformers only warns about a quantisation method that it does not
know. Two guards see to that. The codes have the weights' own names, with other shapes (`checkpoint.stored_name`). And
config.json names, under ``fusion_config``, a fusion of layers that no transformers has: its name is the message, and the
ValueError about it comes before anything is loaded, whatever the arguments. Its value is false, "off", so that where
`register` has made the name known nothing happens.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import fusion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from seedlm.codes.base import Format
from seedlm.codes.registry import check_settings, family_of, format_from_dict, parse_format
from seedlm.errors import CheckpointError, FormatError, OutputError, SeedLMError
from seedlm.integrations.transformers.files import check_folder, open_files
from seedlm.integrations.transformers.loading import CodeNames, ExpertNames, Places, saved_names
from seedlm.modeling.embedding import SeedEmbedding
from seedlm.modeling.experts import PACKED, SeedExperts
from seedlm.modeling.linear import PackedModule, own_name
from seedlm.modeling.places import Names
from seedlm.modeling.quantize import (
    LISTENERS,
    compress_model,
    dense_names,
    dequantize_model,
    packed_modules,
)
from seedlm.storage.checkpoint import FORMAT_VERSION, QUANT_METHOD, PackedInfo, Stack, guarded, metadata, stored_name
from seedlm.storage.metadata import GUARDS, heading, written_version
from seedlm.storage.selection import DENSE, Wish


class SeedLMConfig(QuantizationConfigMixin):
    """How a model is packed: what stands in config.json, and what compresses a dense model while it is loaded.

    bits                     a preset by its bits per weight: 5, 4.5, 4, 3.5, 3, 2.5 or 2, unless `format` is given
    format                   a specification such as "block-k16-c8-p3-q4-e4", or the JSON form of a format
    modules_to_not_convert   linear layers to leave as they are: names, or glob patterns when compressing
    overrides                module name -> JSON form of its format, where it is not `format`
    embeddings, head         formats of the embeddings and the output head when compressing; dense without, as by "dense"
    settings                 of the format's family: ``rounding="nearest"`` is the paper's for the block code
    Raises FormatError for an unknown format or option, CheckpointError for a newer format version.
    """

    def __init__(
        self,
        bits: float | str | None = None,
        *,
        format: str | Mapping[str, Any] | None = None,
        modules_to_not_convert: list[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        embeddings: float | str | None = None,
        head: float | str | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **settings: Any,
    ) -> None:
        if "dequantize" in settings:
            raise FormatError("SeedLMConfig has no option dequantize; a loaded model is dequantized by model.dequantize()")
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"format_version must be 1 .. {FORMAT_VERSION}, got {format_version!r}; "
                f"a newer one needs: pip install -U seedlm"
            )
        if bits is not None and format is not None:
            raise FormatError("give bits or format, not both")
        if isinstance(format, Mapping):
            parsed = format_from_dict(format)
        else:
            bits = 4 if bits is None else bits
            parsed = parse_format(format if format is not None else bits)
        others = {name: format_from_dict(item) for name, item in (overrides or {}).items()}
        check_settings([parsed, *others.values()], settings)
        self.quant_method: Any = quant_method
        self.format_version = written_version(())  # of what is saved, unless what is packed needs another
        said = Wish.of(embeddings, head).said
        texts = {option: DENSE if each is None else each.spec for option, each in said.items()}
        self.embeddings, self.head = texts.get("embeddings"), texts.get("head")
        self.format = parsed.to_dict()
        self.settings = {**family_of(parsed).defaults, **settings}
        if not isinstance(modules_to_not_convert or [], list | tuple):
            raise FormatError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r:.80}")
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.overrides = {name: format.to_dict() for name, format in others.items()}

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """What a config.json holds; errors say so."""
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except SeedLMError as reason:
            raise type(reason)(f"config.json, quantization_config: {reason}") from None

    def format_of(self, module: str) -> Format:
        """The format of one compressed module."""
        return format_from_dict(self.overrides.get(module, self.format))

    def to_dict(self) -> dict[str, Any]:
        data = dict(super().to_dict())
        data |= data.pop("settings")
        del data["embeddings"], data["head"]  # a wish, which `overrides` has come true
        return data if data["overrides"] else {key: value for key, value in data.items() if key != "overrides"}


class SeedLMQuantizer(HfQuantizer):
    """Puts packed layers into a model that is being loaded: from a packed folder, or by compressing a dense one."""

    requires_calibration = False
    quantization_config: SeedLMConfig

    def update_attn_implementation(self, config):
        """Nothing of the kind: it is the first that is asked once the folder's name is known, before its files are opened."""
        if self.pre_quantized:
            check_folder(getattr(config, "name_or_path", None))
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model, checkpoint_files: list[str] | None = None, **kwargs: Any):
        if self.pre_quantized:
            self._places = Places.fill(model, open_files(checkpoint_files or []))
        return model

    def update_weight_conversions(self, weight_conversions, model=None):
        """Lead codes to the packed layers; newer transformers pass the model as well."""
        return self._places.conversions(weight_conversions) if self.pre_quantized else weight_conversions

    def _process_model_after_weight_loading(self, model, **kwargs: Any):
        if self.pre_quantized:
            self._places.check_codes()
            del self._places  # it has files and locks, which a model's copies have no use for
            self.quantization_config.format_version = written_version(_described(model).values())
            _set_guard(model.config, True)
            _fuse_decoding(model)
        else:
            config = self.quantization_config
            tables: dict[str, Any] = {"embeddings": config.embeddings, "head": config.head}
            format = format_from_dict(config.format)
            compress_model(model, format, exclude=config.modules_to_not_convert, **tables, **config.settings)
        return model

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        # Saving leaves config.dtype, which transformers passes on here, as a string.
        dequantize_model(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        return model

    def get_state_dict_and_metadata(self, model):
        """No state dict of its own; the safetensors metadata of a packed file, in which shapes are told.

        Asked before anything is written. Raises OutputError for codes that would not be saved as they are.
        """
        layers = dict(packed_modules(model))
        _check_names(model, layers)
        names = saved_names(model, layers)
        packed = {}
        for name, info in _described(model).items():
            if (stack := info.stack) is not None:  # by its name in this file, which may have the base model's prefix or not
                suffix = ".weight" if stack.tensor.endswith(".weight") else ""
                info = dataclasses.replace(
                    info, stack=dataclasses.replace(stack, tensor=names[name].rpartition(".")[0] + suffix)
                )
            packed[names[name]] = info
        return None, metadata(packed, _digests(names, layers, packed))

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
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(SeedLMConfig)
        auto.register_quantizer(QUANT_METHOD)(SeedLMQuantizer)
        for guard in GUARDS:
            getattr(fusion_mapping, "_FUSION_REGISTRY", {}).setdefault(guard, None)
    if _keep_books not in LISTENERS:
        LISTENERS.append(_keep_books)


def _keep_books(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Let every model of transformers in here say what it is, packed or not, so that it saves a folder that loads."""
    from transformers import PreTrainedModel  # which imports the registry, and that this module

    if not isinstance(model, PreTrainedModel):
        for child in model.children():
            _keep_books(child, settings)
    elif any(packed_modules(model)):
        _say_packed(model, settings)
        _fuse_decoding(model)
    elif isinstance(quantizer := getattr(model, "hf_quantizer", None), SeedLMQuantizer):
        quantizer.remove_quantization_config(model)
        _set_guard(model.config, False)


def _fuse_decoding(model: nn.Module) -> None:
    from seedlm.integrations.transformers.decoder import fuse_decoding  # imports what is being imported while this module is

    fuse_decoding(model)


def _say_packed(model: Any, settings: Mapping[str, Any]) -> None:
    """Give a model whose layers were packed in memory what one has that was loaded packed."""
    known = [each for each in getattr(model, "_weight_conversions", None) or [] if not isinstance(each, CodeNames)]
    model._weight_conversions = (
        known if any(isinstance(each, ExpertNames) for each in known) else [*known, *_expert_names(model)]
    )
    model._weight_conversions.append(CodeNames.of(model))
    layers = dict(packed_modules(model))
    formats = {name: layers[module].format for module, name in saved_names(model, layers).items()}
    leading, _ = Counter(formats.values()).most_common(1)[0]
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, SeedLMQuantizer):
        quantizer = SeedLMQuantizer(SeedLMConfig(format=leading.to_dict(), **settings))
    config = quantizer.quantization_config
    config.format = leading.to_dict()
    config.overrides = {name: format.to_dict() for name, format in formats.items() if format != leading}
    config.modules_to_not_convert = dense_names(model)
    config.format_version = written_version(_described(model).values())
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    model.is_quantized, model.quantization_method = True, config.quant_method
    _set_guard(model.config, True)


def _described(model: nn.Module) -> dict[str, PackedInfo]:
    """The packed layers of a model by name, stacks by the names that they were loaded under."""
    stacks: dict[str, Stack] = {}
    for experts, module in model.named_modules():
        if isinstance(module, SeedExperts):
            for part, whole in module.stacks.items():
                stacks |= dict.fromkeys((f"{experts}.{PACKED}.{part}.{n}" for n in range(whole.shape[0])), whole)
    return {
        name: PackedInfo(layer.format, layer.shape, stacks.get(name), isinstance(layer, SeedEmbedding))
        for name, layer in packed_modules(model)
    }


def _expert_names(model: nn.Module) -> list[ExpertNames]:
    """How the experts of a model that was compressed in memory are saved: as stacks, each under its tensor's name."""
    templates, names = {}, Names(model)
    for name, module in model.named_modules():
        if isinstance(module, SeedExperts):
            for projection, (part, *_) in module.parts.items():
                parameter = f"{name}.{projection}"
                stack = dataclasses.replace(module.stacks[part], tensor=saved_names(model, [parameter])[parameter])
                module.stacks[part], first = stack, names.renamed(f"{stack.base}.0.weight")  # the others come before
                templates[f"{first.removesuffix('.0.weight')}.*"] = f"{name}.{PACKED}.{part}.*"
    return [ExpertNames(templates)] if templates else []


def _check_names(model: Any, layers: Mapping[str, PackedModule]) -> None:
    """Raise OutputError for layers whose codes transformers takes, by their names, for weights to be rearranged on saving."""
    conversions = getattr(model, "_weight_conversions", None) or []
    converters = [each.reverse_transform() for each in conversions if isinstance(each, WeightConverter)]
    taken = [
        name
        for name, layer in layers.items()
        if any(each.rename_source_key(f"{name}.{own_name(part)}")[1] for part in layer.parts for each in converters)
    ]
    if taken:
        shown = f"{', '.join(taken[:3])}{' ...' if len(taken) > 3 else ''}"
        raise OutputError(
            f"{len(taken)} packed layers of {type(model).__name__} cannot be saved: transformers would rearrange their codes "
            f"as it does weights of these names ({shown}); compress the folder that it was loaded from instead "
            "(compress_checkpoint), or exclude these layers"
        )


def _digests(names: Mapping[str, str], layers: Mapping[str, PackedModule], packed: Mapping[str, PackedInfo]) -> dict[str, str]:
    """The digests of all codes in memory, by stored name. Dense tensors, which transformers may yet convert, have none.

    names    layer of the model -> module of the file
    packed   module -> what it is
    """
    found = {}
    for name, layer in layers.items():
        module = names[name]
        for part, info in packed[module].stored.items():
            tensor = layer.parts[part]
            if not tensor.is_meta:
                key = stored_name(module, part)
                digest = hashlib.sha256(heading(key, info, packed[module]))
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                found[key] = digest.hexdigest()
    return found


def _set_guard(config: Any, wanted: bool) -> None:
    """Put the guard into a model's configuration, or take it out."""
    fusions = dict(getattr(config, "fusion_config", None) or {})
    for guard in GUARDS:
        fusions.pop(guard, None)
    if wanted:
        fusions = guarded(fusions)
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config


register()
