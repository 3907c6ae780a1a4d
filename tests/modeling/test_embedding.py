"""Embeddings in codes, and what is tied to them, in memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import toy_family  # noqa: F401 (registers its family)
from seedlm import compress_model, dequantize_model
from seedlm.codes.registry import parse_format
from seedlm.errors import FormatError, SourceError, TensorError
from seedlm.modeling.embedding import SeedEmbedding, TiedEmbedding, TiedLinear, find_tables
from seedlm.modeling.linear import SeedLinear
from tiny_models import SMALL, tiny_model

TOY = "toy-4"
IDS = torch.arange(1, 13).view(2, 6)
IN_15_BITS = {"rtol": 1e-3, "atol": 1e-4}  # how a CPU's products of trellis codes read their input


def llama(tied, **changes):
    return tiny_model("llama", tie_word_embeddings=tied, **changes)


def packed(tied=True, embeddings=TOY, **changes):
    model = llama(tied, **changes)
    compress_model(model, TOY, embeddings=embeddings)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("spec", [TOY, "trellis-r3-l12-t32-h8", SMALL])
def test_tied_embeddings_and_head_are_one_set_of_codes(spec):
    model = llama(True)
    errors = compress_model(model, TOY, embeddings=spec)
    assert 0 < errors["model.embed_tokens"] < 0.7
    embedding, head = model.model.embed_tokens, model.lm_head
    assert (type(embedding), type(head)) == (SeedEmbedding, TiedLinear)
    weight = embedding.dequantize()
    assert torch.equal(embedding(IDS), weight[IDS])
    x = torch.randn(3, 32)
    torch.testing.assert_close(head(x), x @ weight.T, **IN_15_BITS)
    assert [name for name in model.state_dict() if "head" in name] == []
    found = logits(model)
    dequantize_model(model)
    assert (type(model.model.embed_tokens), type(model.lm_head)) == (nn.Embedding, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weight)
    torch.testing.assert_close(logits(model), found, **IN_15_BITS)


def test_what_is_not_tied_has_codes_of_its_own():
    model = llama(False)
    compress_model(model, TOY, embeddings="toy-3", head=TOY)
    assert model.model.embed_tokens.format.spec == "toy-3"
    assert isinstance(model.lm_head, SeedLinear)
    assert model.lm_head.format.spec == TOY
    alone = llama(False)
    compress_model(alone, TOY, head=TOY)
    assert isinstance(alone.model.embed_tokens, nn.Embedding)
    assert torch.equal(alone.lm_head.dequantize(), model.lm_head.dequantize())


def test_dense_is_the_word_for_nothing_and_contradicts_a_format_of_what_is_tied():
    model = llama(True)
    compress_model(model, TOY, embeddings="dense", head="dense")
    assert not any(isinstance(module, SeedEmbedding) for module in model.modules())
    with pytest.raises(FormatError, match="--embeddings dense and --head toy-3 must be the same"):
        compress_model(llama(True), TOY, embeddings="dense", head="toy-3")


@pytest.mark.parametrize("option", ["embeddings", "head"])
def test_one_option_decides_for_both_that_are_tied(option):
    model = llama(True)
    compress_model(model, TOY, **{option: "toy-3"})
    assert model.lm_head.format is model.model.embed_tokens.format


REFUSED = {
    "two formats of one weight": (True, {"embeddings": "toy-3", "head": TOY}, FormatError, "must be the same, or one of them"),
    "excluded": (False, {"head": TOY, "exclude": ["lm_head"]}, SourceError, "lm_head.weight: is excluded"),
    "no smaller": (False, {"embeddings": "8"}, SourceError, "stays dense as trellis-r8"),
    "unknown": (False, {"embeddings": "7.5"}, FormatError, "unknown format '7.5'"),
}


@pytest.mark.parametrize(("tied", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_any_work(tied, options, error, message):
    model = llama(tied, hidden_size=8, head_dim=2, vocab_size=9, pad_token_id=0) if "8" in options.values() else llama(tied)
    with pytest.raises(error, match=message):
        compress_model(model, TOY, **options)
    assert not any(isinstance(module, SeedLinear | SeedEmbedding) for module in model.modules())


def test_an_embedding_that_does_more_than_look_up_is_refused():
    class Normed(nn.Embedding):
        pass

    class MoreScaledWordEmbedding(nn.Embedding):
        """As T5Gemma 2's."""

        def __init__(self):
            super().__init__(64, 32)
            self.eoi_embedding = nn.Parameter(torch.zeros(32))

    for replaced, message in (
        (MoreScaledWordEmbedding(), "MoreScaledWordEmbedding does more than look rows up"),
        (Normed(64, 32), "Normed does more than look rows up"),
        (nn.Embedding(64, 32, max_norm=1.0), "max_norm changes rows"),
    ):
        model = llama(False)
        model.model.embed_tokens = replaced
        with pytest.raises(SourceError, match=message):
            compress_model(model, TOY, embeddings=TOY)


def test_a_model_without_embeddings_says_so():
    with pytest.raises(SourceError, match="--embeddings: Sequential has none"):
        compress_model(nn.Sequential(nn.Linear(32, 32)), TOY, embeddings=TOY)


def test_it_is_copied_pickled_and_cast_as_one():
    model = packed()
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert other.lm_head.codes is other.model.embed_tokens is not model.model.embed_tokens
    parts = {name: part.clone() for name, part in model.model.embed_tokens.parts.items()}
    model.to(torch.bfloat16)
    assert model.model.embed_tokens(IDS).dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    after = model.model.embed_tokens.parts
    assert all(torch.equal(after[name], part) and after[name].dtype == part.dtype for name, part in parts.items())


def test_a_state_dict_fills_another_model_tied_head_included():
    one, other = packed(), packed(seed=1)
    assert not torch.equal(logits(one), logits(other))
    parts = ("words", "scales", "unit")
    assert {name for name in one.state_dict() if "embed" in name} == {f"model.embed_tokens.weight_{part}" for part in parts}
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(one), logits(other))


def test_tying_again_changes_nothing_until_the_model_is_dense():
    model = packed()
    expected = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    assert isinstance(model.lm_head, TiedLinear)
    dequantize_model(model)
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_resizing_is_refused_before_anything_is_changed():
    model = packed()
    expected = logits(model)
    with pytest.raises(TypeError, match="SeedEmbedding"):
        model.resize_token_embeddings(80)
    assert torch.equal(logits(model), expected)


def test_codes_that_are_not_in_memory_are_asked_for():
    model = packed()
    model.model.embed_tokens.to("meta")
    with pytest.raises(TensorError, match="embeddings, which this module is tied to, are not in memory"):
        model.lm_head(torch.randn(1, 32))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("spec", [TOY, "trellis-r3-l12-t32-h8", SMALL])
def test_rows_of_codes_without_values_have_none_wherever_indices_are(spec, device):
    """As torch's own embedding has it."""
    dense = nn.Embedding(64, 32, dtype=torch.bfloat16, device="meta")
    found, expected = SeedEmbedding(dense, parse_format(spec))(IDS.to(device)), dense(IDS.to(device))
    assert (found.device, found.dtype, found.shape) == (expected.device, expected.dtype, expected.shape)
    assert found.is_meta


def test_rows_of_indices_without_values_have_none():
    """Where torch's embedding gives memory that nobody has written to."""
    embedding = packed().model.embed_tokens
    assert embedding(IDS.to("meta")).is_meta


def test_gradients_reach_adapters_in_front_of_a_tied_head():
    model = packed()
    x = torch.randn(2, 32, requires_grad=True)
    model.lm_head(x).sum().backward()
    torch.testing.assert_close(x.grad, model.model.embed_tokens.dequantize().sum(0).expand(2, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2", "bart"])
def test_rows_are_scaled_as_the_dense_embedding_scales_them(kind, dtype):
    """Gemma 3 rounds its factor to the rows' dtype, Bart does not, Gemma 2 multiplies outside."""
    options = {"scale_embedding": True, "d_model": 48} if kind == "bart" else {"hidden_size": 48}
    model = tiny_model(kind, **options).to(dtype)
    name = find_tables(model).embeddings
    dense = copy.deepcopy(model.get_submodule(name))
    compress_model(model, TOY, embeddings=TOY)
    embedding = model.get_submodule(name)
    assert isinstance(embedding, SeedEmbedding)
    dense.weight = nn.Parameter(embedding.dequantize(dtype))
    assert torch.equal(embedding(IDS), dense(IDS))
    dequantize_model(model, dtype)
    again = model.get_submodule(name)
    assert type(again) is type(dense)
    assert torch.equal(again(IDS), dense(IDS))
    assert (again.num_embeddings, again.padding_idx) == (dense.num_embeddings, dense.padding_idx)


def test_an_encoder_and_a_decoder_look_up_in_the_same_codes():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes)).eval()
    compress_model(model, TOY, embeddings=TOY)
    assert isinstance(model.shared, SeedEmbedding)
    assert isinstance(model.encoder.embed_tokens, TiedEmbedding)
    assert isinstance(model.decoder.embed_tokens, TiedEmbedding)
    assert model.decoder.embed_tokens.codes is model.shared
    assert isinstance(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias, nn.Embedding)
    with torch.no_grad():
        found = model(input_ids=IDS, decoder_input_ids=IDS).logits
        dequantize_model(model)
        torch.testing.assert_close(model(input_ids=IDS, decoder_input_ids=IDS).logits, found)
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_compiler_holds_look_up_and_tied_head():
    torch.compiler.reset()
    model = packed(embeddings="trellis-r3-l12-t32-h8", num_hidden_layers=1)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = model.model.embed_tokens, model.lm_head

        def forward(self, ids):
            return self.head(self.embedding(ids))

    both = Both()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(IDS), both(IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_nothing_but_matrices_keeps_its_embeddings(tied):
    model = tiny_model("olmo", tie_word_embeddings=tied, eos_token_id=1)
    with pytest.raises(SourceError, match="--embeddings: OlmoForCausalLM has neither norms with weights nor biases"):
        compress_model(model, TOY, embeddings=TOY)
    compress_model(model, TOY, **({} if tied else {"head": TOY}))
    assert model.device.type == "cpu"
    assert model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2).shape == (1, 4)


def test_tables_are_told_by_the_model():
    tables = find_tables(llama(False))
    assert (tables.embeddings, tables.head, tables.reasons) == ("model.embed_tokens", "lm_head", {})
    tied = find_tables(llama(True))
    assert tied.head == tied.embeddings == "model.embed_tokens"
    base = find_tables(llama(False).model)
    assert (base.embeddings, base.head, base.absent) == ("embed_tokens", None, {"head"})
    with pytest.raises(SourceError, match="--head: LlamaModel has none"):
        base.choose({"head": parse_format(TOY)})
