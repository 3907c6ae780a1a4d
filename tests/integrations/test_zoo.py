"""Every causal and conditional-generation architecture of transformers: what becomes of its weights, told by its own model.

A model of two layers is built on the meta device, its tensors are named as it would save them, and the source that this would
be is surveyed: every tensor must have a place, none may be missing, and codes must find the way back to all that is selected.
Nothing is computed, so all of them take half a minute; `test_architectures.py` runs the ones that people use.
"""

import math
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch.nn.modules import module as modules
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from seedlm.codes.registry import parse_format
from seedlm.modeling import blueprint
from seedlm.modeling.blueprint import _Surveyor
from seedlm.modeling.embedding import SeedEmbedding, replace_embedding
from seedlm.modeling.places import Names
from seedlm.storage.refusals import TRANSPOSED_MODELS
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.selection import matrices_of, select

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"}
LAYERS |= {"num_decoder_layers", "num_encoder_layers"}
LISTS = {"layer_types", "mlp_layer_types", "layers_block_type"}
LOSES_ITS_NORM = "DeepseekV4ForCausalLM"
"""transformers 5.24 saves its last norm under a name that it reads as another's."""
REARRANGED = {"HrmTextForCausalLM", "LaraMiniForCausalLM", "MiniMaxM3SparseForConditionalGeneration"}
REARRANGED |= {"Molmo2ForConditionalGeneration", "Nemotron3_5TranscribeForConditionalGeneration"}
REARRANGED |= {"InklingForConditionalGeneration"}
"""Whose linear layers are interleaved, split or joined on loading: what that happens to stays dense."""
FORMAT = parse_format("4", "block")


def architectures():
    """Class name -> model type, of all."""
    found = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).items():
            found.setdefault(names if isinstance(names, str) else names[0], kind)
    return dict(sorted(found.items()))


ALL = architectures()


def shrink(config):
    """Two layers, in all parts of a configuration."""
    for name, value in list(vars(config).items()):
        if name in LAYERS and isinstance(value, int):
            setattr(config, name, 2)
        elif name in LISTS and isinstance(value, list):
            setattr(config, name, value[:2])
        elif isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
    return config


def build(name):
    try:
        config = shrink(CONFIG_MAPPING[ALL[name]]())
        if name == "DbrxForCausalLM":  # without which its default is no model
            config.attn_config.rope_theta = 1e4
        with torch.device("meta"):
            return getattr(transformers, name)(config)
    except Exception as reason:
        pytest.skip(f"its default configuration makes no model of two layers here ({type(reason).__name__})")


@contextmanager
def counted():
    """What is put together meanwhile: [modules and parameters, numbers in them]."""
    count = [0, 0]

    def add(module, name, what):
        count[0] += 1
        count[1] += what.numel() if isinstance(what, torch.nn.Parameter) else 0

    hooks = [
        modules.register_module_module_registration_hook(add),
        modules.register_module_parameter_registration_hook(add),
    ]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def saved(model):
    """The tensors that it would be saved as."""
    state, seen = {}, set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        if id(parameters.get(name, tensor)) not in seen:
            state[name] = tensor
        seen.add(id(parameters.get(name, tensor)))
    return {
        name: TensorInfo("BF16" if tensor.is_floating_point() else "I64", tuple(tensor.shape))
        for name, tensor in revert_weight_conversion(model, state).items()
    }


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_has_its_place_and_codes_find_theirs(name):
    if ALL[name] in TRANSPOSED_MODELS or name == "GPT2LMHeadModel":
        pytest.skip("its layers are Conv1D, which is refused")
    with counted() as count:
        model = build(name)
    tensors = saved(model)
    assert count[0] <= blueprint.FOR_EACH_TENSOR * len(tensors)
    assert count[1] <= blueprint.FOR_EACH_WEIGHT * sum(math.prod(info.shape) for info in tensors.values())
    if name == LOSES_ITS_NORM:
        tensors["norm.weight"] = tensors.pop("model.norm.weight")
    survey = _Surveyor(model).survey(tensors)
    assert not survey.notes  # nothing without a place
    config = model.config.to_dict()
    chosen, left = select(tensors, config, FORMAT, survey=survey)
    assert chosen
    inside = {reason for tensor, reason in left.items() if "vision" not in tensor and "visual" not in tensor}
    assert name in REARRANGED or "rearranged on loading" not in inside
    assert "stacked experts of an unknown kind" not in inside
    names, filled = Names(model), {}
    for module, (tensor, shape, stack) in matrices_of(chosen, tensors, config, survey).items():
        place = names.place(module, stack)
        assert place is not None, module
        assert filled.setdefault(place.layer, module) == module
        if not place.projection:
            assert tuple(model.get_parameter(f"{place.name}.weight").shape) == shape, tensor
    if "embeddings" not in survey.tables.reasons:
        where = names.embedding(survey.tables.embeddings.removesuffix(".weight"))
        tied = replace_embedding(model, where, SeedEmbedding(model.get_submodule(where), FORMAT))
        model.tie_weights()
        assert not {f"{layer}.weight" for layer in tied} & model.all_tied_weights_keys.keys()
