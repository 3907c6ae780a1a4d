"""`generate`'s loop ahead of its answer: the tokens, the random numbers and the cache of transformers' own loop."""

import copy
import weakref
from types import FunctionType

import pytest
import torch
from transformers import StaticCache, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from decoder_models import DEVICES, IDS, KINDS, SMALL, model_of, on
from seedlm.integrations.transformers import decoder_reasons, decoder_steps, sampling
from seedlm.integrations.transformers.decoder import fuse_decoding
from seedlm.integrations.transformers.decoder_steps import CACHE


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
    monkeypatch.setattr(decoder_reasons, "PACKED", ())
    monkeypatch.setattr(sampling, "AHEAD", ("cpu", "cuda"))
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


def test_positions_go_on_where_the_prompt_ended(monkeypatch, ahead):
    model, given, step = model_of("llama"), [], decoder_steps.step
    fuse_decoding(model)
    monkeypatch.setattr(decoder_steps, "step", lambda *args: given.append(args[3].item()) or step(*args))
    model.generate(IDS, do_sample=False, max_new_tokens=5, pad_token_id=0, cache_implementation="static")
    assert given == [12, 13, 14, 15]
    assert len(ahead) == 1


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


def test_a_reader_has_the_first_token_before_the_step_that_may_be_captured(monkeypatch, ahead):
    model, steps, step = model_of("llama"), [], decoder_steps.step
    fuse_decoding(model)
    monkeypatch.setattr(decoder_steps, "step", lambda *args: steps.append(1) or step(*args))

    class Counts(Streamer):
        def put(self, value):
            self.heard.append(len(steps))

    Counts.__module__ = "seedlm.evaluation.speed"
    streamer = Counts()
    asked = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "cache_implementation": "static"}
    model.generate(IDS, streamer=streamer, **asked)
    assert streamer.heard == [0, 0, 2, 3, 4, 4, "end"]  # the prompt, the first token, three with a step ahead, the last
    assert len(ahead) == 1


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
    monkeypatch.setattr(decoder_reasons, "DEVICES", ("cuda",))
    model.eval().generate(IDS, **asked)
    assert not ahead


class Own(StoppingCriteria):
    """Stops at a length. Not transformers', and not ours."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **more):
        return torch.full((1,), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.fixture
def copies(monkeypatch):
    """Graphs that compute, as real ones do, by the weights that were there at their capture; how often they were replayed."""
    replayed = []

    class Graph:
        at_work = True

        def __init__(self, token, positions):
            pass

        def capture(self, model, cache):
            self.model, self.cache = copy.deepcopy(model), weakref.ref(cache)

        def replay(self, token, positions):
            replayed.append(1)
            return decoder_steps.step(self.model, token, self.cache(), positions)

    monkeypatch.setattr(decoder_steps, "_can_capture", lambda device: True)
    monkeypatch.setitem(decoder_steps._GRAPHS, "cpu", Graph)
    return replayed


@pytest.mark.parametrize("change", ["weight", "scaling", "none"])
def test_a_model_that_changed_between_two_texts_of_a_cache(monkeypatch, ahead, copies, change):
    model = model_of("llama")
    fuse_decoding(model)
    cache = StaticCache(config=model.config, max_cache_len=60)
    asked = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    text = model.generate(IDS, **asked, **{CACHE: cache})
    if change == "weight":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight), requires_grad=False)
    elif change == "scaling":
        for layer in model.model.layers:
            layer.self_attn.scaling *= 30
    more = torch.cat((text, IDS[:, :3]), dim=1)
    found = model.generate(more, **asked, **{CACHE: cache})
    monkeypatch.setattr(decoder_reasons, "DEVICES", ())
    assert len(ahead) == 2
    assert len(copies) >= 10
    assert torch.equal(found, model.generate(more, **asked))


def test_a_graph_is_replayed_without_looking_where_only_known_are_called(monkeypatch, ahead, copies):
    model = model_of("llama")
    fuse_decoding(model)
    looks, unchanged = [], decoder_steps._Read.unchanged
    monkeypatch.setattr(decoder_steps._Read, "unchanged", lambda self: looks.append(1) or unchanged(self))
    asked = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "cache_implementation": "static"}

    def theirs(input_ids, scores, **more):
        return torch.zeros(1, dtype=torch.bool)

    theirs.__module__ = "seedlm.integrations"  # as `functools.wraps` would have it
    ours = FunctionType(theirs.__code__, {**globals(), "__name__": "seedlm.integrations"})
    prefix = {"prefix_allowed_tokens_fn": lambda batch, ids: [*range(64)]}
    for more, known in (
        ({}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"stopping_criteria": [ours]}, True),
        ({"stopping_criteria": [theirs]}, False),
        ({"stopping_criteria": [Own(40)]}, False),
        ({"streamer": Streamer()}, False),
        (prefix, False),
    ):
        looks.clear()
        model.generate(IDS, **asked, **more)
        assert (len(looks) <= 4) == known, more
    assert len(ahead) == 7


@pytest.mark.parametrize("streamer", [None, Streamer()])
@pytest.mark.parametrize("length", [15, 16, 40])
def test_a_full_cache_is_asked_for_no_more_than_by_transformers(monkeypatch, ahead, length, streamer):
    """A text that ends where the cache is full; with 15 places none is left for the 16th of 40 tokens."""
    model = model_of("llama")
    fuse_decoding(model)
    found = []
    for understood in (sampling.is_understood, lambda *args: False):
        with monkeypatch.context() as context:
            context.setattr(sampling, "is_understood", understood)
            cache, heard = StaticCache(config=model.config, max_cache_len=15), copy.deepcopy(streamer)
            asked = {"do_sample": False, "max_new_tokens": 28, "pad_token_id": 0, "stopping_criteria": [Own(length)]}
            try:
                text = model.generate(IDS, streamer=heard, **asked, **{CACHE: cache}).tolist()
            except IndexError:
                text = None
            lengths = [int(layer.cumulative_length) for layer in cache.layers]
            found.append((text, heard and heard.heard, text and lengths))
    assert found[0] == found[1]
    assert (found[0][0] is None) == (length == 40)
    assert len(ahead) == 1


def test_an_exception_of_a_streamer_leaves_the_cache_as_it_would_be(monkeypatch, ahead):
    class Full(TextStreamer):
        def put(self, value):
            self.heard = [*getattr(self, "heard", []), value]
            if len(self.heard) == 4:
                raise KeyboardInterrupt

    Full.__module__ = "transformers.generation.streamers"
    model = model_of("llama")
    fuse_decoding(model)
    lengths = []
    for understood in (sampling.is_understood, lambda *args: False):
        with monkeypatch.context() as context:
            context.setattr(sampling, "is_understood", understood)
            cache = StaticCache(config=model.config, max_cache_len=40)
            asked = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
            with pytest.raises(KeyboardInterrupt):
                model.generate(IDS, streamer=Full(None), **asked, **{CACHE: cache})
            lengths.append([int(layer.cumulative_length) for layer in cache.layers])
    assert lengths[0] == lengths[1]
    assert len(ahead) == 1


def test_a_streamer_that_is_not_known_hears_of_a_token_before_the_next_step(monkeypatch, ahead):
    """So what it does to the model counts from the next token on."""
    weight, texts = torch.randn(64, 32), []
    for understood in (sampling.is_understood, lambda *args: False):
        model = model_of("llama")
        fuse_decoding(model)

        class Changes(Streamer):
            def put(self, value, model=model):
                super().put(value)
                if len(self.heard) == 4:
                    model.lm_head.weight.copy_(weight[: model.config.vocab_size, : model.config.hidden_size])

        with monkeypatch.context() as context:
            context.setattr(sampling, "is_understood", understood)
            asked = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "cache_implementation": "static"}
            texts.append(model.generate(IDS, streamer=Changes(), **asked))
    assert torch.equal(*texts)
    assert len(ahead) == 1


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
def test_what_was_replaced_in_a_model_is_called(ahead, name):
    model = model_of("llama")
    fuse_decoding(model)
    called, original = [], getattr(model, name)
    setattr(model, name, lambda *args, **more: called.append(1) or original(*args, **more))
    model.generate(IDS, do_sample=False, max_new_tokens=6, pad_token_id=0, cache_implementation="static")
    assert len(called) >= 5
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
