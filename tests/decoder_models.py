"""Tiny models that decode by our own forward, and what its tests hold them against."""

import pytest
import torch
from transformers import StaticCache

from seedlm.integrations.transformers import decoder_reasons
from seedlm.integrations.transformers.decoder import fuse_decoding
from seedlm.integrations.transformers.decoder_steps import CACHE
from seedlm.modeling.quantize import compress_model
from tiny_models import SMALL, tiny_model

IDS = torch.arange(1, 13)[None]
KINDS = ["llama", "mistral", "qwen2"]
FORMATS = [None, SMALL, "3-fast"]
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def model_of(kind="llama", format=None, **changes):
    """A tiny model, packed where there is a format. Mistral's attention has no window."""
    model = tiny_model(kind, **changes)
    if kind == "mistral":
        model.config.sliding_window = None
    if format:
        compress_model(model, format)
    return model


def cache_of(model, ids=IDS, length=24):
    """A static cache that holds a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(input_ids=ids, use_cache=True, **{CACHE: cache})
    return cache


def tokens(count=6):
    return [torch.tensor([[number + 3]]) for number in range(count)]


def off(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def on(device, model):
    """In half precision on a GPU, whose products are no more exact."""
    return model.to(device, torch.float16 if device == "cuda" else torch.float32)


def theirs(model, token, cache, **more):
    """Logits by transformers' own forward."""
    return (
        decoder_reasons.original_class(type(model))
        .forward(model, input_ids=token, use_cache=True, **{CACHE: cache}, **more)
        .logits
    )


def fused(kind="llama", format=None, **changes):
    model = model_of(kind, format, **changes)
    fuse_decoding(model)
    return model


def written(model, ids=IDS, new=8, **options):
    """Tokens and logits of a greedy text."""
    options = {"cache_implementation": "static", "pad_token_id": 0, **options}
    found = model.generate(
        ids,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits)
