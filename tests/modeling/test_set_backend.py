"""How packed layers of a model multiply, by a backend that somebody names."""

import re

import pytest
import torch
from torch import nn

from seedlm.codes.registry import parse_format
from seedlm.errors import BackendError
from seedlm.inference.backend import reason_no_backend
from seedlm.modeling.quantize import backends_used, compress_model, seed_linears, set_backend
from tiny_models import tiny_model

FORMAT = "trellis-r4-l16-t256-h32"
REASON = reason_no_backend("numba-int8", torch.device("cpu"), parse_format(FORMAT), (96, 64))
INT8 = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def packed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32, bias=False))
    compress_model(model, FORMAT)
    return model


@INT8
def test_layers_multiply_by_it_until_another_is_set(packed):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    before = packed(x)
    assert set_backend(packed, "numba-int8") == 2
    rounded = packed(x)
    assert not torch.equal(rounded, before)
    assert (rounded - before).norm() < 0.03 * before.norm()
    assert set_backend(packed, "auto") == 2
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numba-int9", "no packed layer has a backend 'numba-int9', known: auto, cuda, cuda-int8, numba, numba-int8, torch"),
        ("cuda-int8", "0: CUDA kernels need a CUDA device, this is cpu"),
    ],
)
def test_one_that_cannot_be_had_is_refused_and_nothing_changes(packed, name, message):
    with pytest.raises(BackendError, match=f"^{re.escape(message)}$"):
        set_backend(packed, name)
    assert {layer.backend for _, layer in seed_linears(packed)} == {"auto"}


@INT8
def test_layers_of_a_family_that_has_none_of_that_name_stay_as_they_are(packed):
    compress_model(packed.append(nn.Linear(32, 16)), "block-k8-c8-p3-q4-e4")
    assert set_backend(packed, "numba-int8") == 2
    assert [layer.backend for _, layer in seed_linears(packed)] == ["numba-int8", "numba-int8", "auto"]


def test_a_dense_model_has_none():
    with pytest.raises(BackendError, match=r"^nothing is packed here that a backend could multiply by, so none can be 'auto'$"):
        set_backend(nn.Linear(8, 8), "auto")


def test_what_multiplies_is_counted_with_heads_tied_to_embeddings():
    model = tiny_model("llama", tie_word_embeddings=True)
    compress_model(model, "trellis-r4-l16-t32-h32", embeddings="trellis-r6-l12-t32-h32")
    linears = len(list(seed_linears(model)))
    assert backends_used(model) == {"numba": linears + 1}
    model.lm_head.codes.backend = "torch"
    assert backends_used(model) == {"numba": linears, "torch": 1}
    assert backends_used(nn.Linear(8, 8)) == {}
