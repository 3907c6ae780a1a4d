"""Text that models write by themselves."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from seedlm.calibration.own_text import OwnText, text_hash, write_text
from seedlm.errors import EvaluationError
from tiny_models import tiny_model

TEXT = OwnText(sequences=6, length=12)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", bos_token_id=5)


def test_the_same_seed_writes_the_same_text(model):
    text = write_text(model, TEXT)
    assert text.shape == (6, 12)
    assert text.dtype == torch.int64
    assert torch.equal(text, write_text(model, TEXT))
    assert not torch.equal(text, write_text(model, OwnText(sequences=6, length=12, seed=1)))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batches_make_no_difference(model, batch):
    assert torch.equal(write_text(model, TEXT, batch=batch), write_text(model, TEXT))


def test_fewer_tokens_are_the_beginning_of_more(model):
    """A sequence does not depend on how many come after it, which the numbers are drawn for in one go, first tokens apart."""
    assert torch.equal(write_text(model, OwnText(sequences=2, length=12)), write_text(model, TEXT)[:2])


def test_texts_begin_with_bos_or_with_any_token(model):
    assert (write_text(model, TEXT)[:, 0] == 5).all()
    bare = tiny_model("llama")
    bare.config.bos_token_id = bare.generation_config.bos_token_id = None
    first = write_text(bare, OwnText(sequences=40, length=2))[:, 0]
    assert len(first.unique()) > 15


def test_tokens_are_drawn_as_the_model_predicts():
    """2,000 second tokens against the model's own prediction, by their likelihood and by their counts."""
    model = tiny_model("llama", bos_token_id=5)
    model.lm_head.weight.data *= 20
    second = write_text(model, OwnText(sequences=2000, length=2), batch=500)[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(second, minlength=64) / 2000
    assert (counts - expected).abs().max() < 4 * (expected.max() / 2000) ** 0.5
    cold = write_text(model, OwnText(sequences=200, length=2, temperature=1e-3))[:, 1]
    assert (cold == expected.argmax()).all()


def test_the_cache_changes_nothing(model):
    text = write_text(model, TEXT)
    with torch.no_grad():
        logits = model(text).logits
    likelihood = logits[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None])
    assert likelihood.mean() > -torch.tensor(64.0).log() * 1.2


def test_models_without_a_cache_by_that_name_write_too():
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4, bos_token_id=1)
    assert write_text(MambaForCausalLM(config).eval(), OwnText(sequences=2, length=5)).shape == (2, 5)


def test_progress_counts_tokens(model):
    seen = []
    write_text(model, TEXT, batch=4, on_progress=lambda *state: seen.append(state))
    assert seen == [("text", done, 72) for done in (*range(0, 49, 4), *range(50, 73, 2))]


def test_there_is_more_text_where_it_costs_less():
    assert OwnText.for_device(torch.device("cpu")) == OwnText(sequences=64, length=256)
    assert OwnText.for_device(torch.device("cuda"), seed=3) == OwnText(sequences=256, length=256, seed=3)


def test_hashes_tell_texts_apart():
    text = torch.arange(6).reshape(2, 3)
    assert text_hash(text) == text_hash(text.int())
    assert len({text_hash(t) for t in (text, text.reshape(3, 2), text + 1)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sequences": 0}, "sequences"), ({"length": 1}, "length"), ({"seed": -1}, "seed"), ({"temperature": 0.0}, "temperature")],
)
def test_texts_that_cannot_be_are_refused(changes, message):
    with pytest.raises(EvaluationError, match=message):
        OwnText(**changes)


def test_a_text_longer_than_the_context_is_refused(model):
    with pytest.raises(EvaluationError, match="positions"):
        write_text(model, OwnText(sequences=1, length=model.config.max_position_embeddings + 1))


def test_predictions_that_are_not_finite_are_named():
    model = tiny_model("llama", bos_token_id=5)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(EvaluationError, match="not finite"):
        write_text(model, TEXT)
