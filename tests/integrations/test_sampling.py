"""`generate`'s loop ahead of its answer: the tokens, the random numbers and the cache of transformers' own loop."""

import pytest
import torch
from test_decoder import DEVICES, IDS, KINDS, SMALL, model_of, on
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from seedlm.integrations.transformers import decoder, sampling
from seedlm.integrations.transformers.decoder import CACHE, fuse_decoding


class Streamer(BaseStreamer):
    """Keeps what it hears."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.fixture
def ahead(monkeypatch):
    """Lets a CPU's models decode so, and counts texts."""
    texts, sample = [], sampling.sample
    monkeypatch.setattr(decoder, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(sampling, "sample", lambda *args: texts.append(1) or sample(*args))
    return texts


def both(monkeypatch, model, ids, **asked):
    """What the loop ahead writes, and what transformers' does over the same steps; each from the same random numbers."""
    asked = {"cache_implementation": "static", "attention_mask": torch.ones_like(ids), "pad_token_id": 0, **asked}
    found = []
    for understood in (sampling.is_understood, lambda *args: False):
        with monkeypatch.context() as context:
            context.setattr(sampling, "is_understood", understood)
            torch.manual_seed(5)
            found.append(model.generate(ids, **asked))
        found.append(torch.rand(1, device=ids.device))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 3.0, "top_k": 20},
        {"do_sample": True, "repetition_penalty": 1.3, "min_new_tokens": 5, "eos_token_id": list(range(2, 90))},
        {"do_sample": True, "eos_token_id": list(range(2, 40))},
        {"do_sample": False, "max_new_tokens": 1},
        {"do_sample": False, "max_new_tokens": 2},
    ],
)
def test_the_same_tokens_and_random_numbers(monkeypatch, ahead, kind, asked, device):
    model = on(device, model_of(kind, SMALL))
    fuse_decoding(model)
    mine, after, theirs, then = both(monkeypatch, model, IDS.to(device), **{"max_new_tokens": 12, **asked})
    assert len(ahead) == 1
    assert torch.equal(mine, theirs)
    assert torch.equal(after, then)


def test_an_end_in_the_middle_is_found(monkeypatch, ahead):
    model = model_of("llama")
    fuse_decoding(model)
    whole, *_ = both(monkeypatch, model, IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    end = whole[0, IDS.shape[1] + 3].item()
    first = whole[0, IDS.shape[1] :].tolist().index(end)
    mine, _, theirs, _ = both(monkeypatch, model, IDS, max_new_tokens=8, do_sample=False, eos_token_id=end)
    assert torch.equal(mine, theirs)
    assert mine.shape[1] == IDS.shape[1] + first + 1 < whole.shape[1]


@pytest.mark.parametrize("end", [False, True])
def test_a_cache_holds_all_but_the_last_token(ahead, end):
    """So that a user who keeps it goes on where the text ended."""
    model = model_of("llama")
    fuse_decoding(model)
    asked = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    if end:
        text = model.generate(IDS, cache_implementation="static", **asked)
        asked["eos_token_id"] = text[0, -2].item()
    cache = StaticCache(config=model.config, max_cache_len=40)
    text = model.generate(IDS, **asked, **{CACHE: cache})
    assert len(ahead) == 1 + end
    assert all(layer.cumulative_length == text.shape[1] - 1 for layer in cache.layers)
    more = torch.cat((text, IDS[:, :3]), dim=1)
    found = model.generate(more, **asked, **{CACHE: cache})
    assert torch.equal(found, model.generate(more, **asked))


def test_a_streamer_hears_what_it_would_hear(monkeypatch, ahead):
    model = model_of("llama")
    fuse_decoding(model)
    for more in ({}, {"eos_token_id": list(range(2, 60))}):
        heard = []
        for understood in (sampling.is_understood, lambda *args: False):
            with monkeypatch.context() as context:
                context.setattr(sampling, "is_understood", understood)
                streamer, asked = Streamer(), {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **more}
                model.generate(IDS, cache_implementation="static", streamer=streamer, **asked)
                heard.append(streamer.heard)
        assert heard[0] == heard[1]
    assert len(ahead) == 2


def test_what_it_does_not_understand_is_left_to_transformers(monkeypatch, ahead):
    model = model_of("llama")
    fuse_decoding(model)
    padded = torch.ones_like(IDS)
    padded[0, :2] = 0
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    for ids, more in (
        (IDS, {"cache_implementation": None}),
        (IDS, {"attention_mask": padded}),
        (IDS, {"return_dict_in_generate": True}),
        (IDS, {"num_beams": 2}),
        (IDS, {"use_cache": False, "cache_implementation": None}),
        (IDS.repeat(2, 1), {}),
    ):
        model.generate(ids, **{**asked, **more})
    model.train()
    model.generate(IDS, **asked)
    assert not ahead
    monkeypatch.setattr(decoder, "DEVICES", ("cuda",))
    model.eval().generate(IDS, **asked)
    assert not ahead


@pytest.mark.parametrize("count", [1, 31, 32, 33, 512, 1024, 1031, 2048, 49152, 128256])
def test_most_likely_is_argmax(count):
    torch.manual_seed(count)
    for dtype in (torch.float16, torch.float32):
        scores = torch.randn(1, count).to(dtype)
        assert torch.equal(sampling.most_likely(scores), scores.argmax(-1, keepdim=True))
    ties = torch.zeros(1, count)
    assert sampling.most_likely(ties) == ties.argmax()
    ties[0, -1] = torch.nan
    assert sampling.most_likely(ties) == ties.argmax()
