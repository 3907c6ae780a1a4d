"""What evaluate, sensitivity and generate refuse to run on, instead of running on random weights or asking on stdin."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from seedlm.compress.feedback import Feedback
from seedlm.errors import CheckpointError, SourceError
from seedlm.integrations.transformers.generate import generate
from seedlm.integrations.transformers.models import load_model, longest_text
from seedlm.integrations.transformers.opening import open_language_model
from seedlm.modeling.quantize import seed_linears
from tiny_models import STORIES, run, tiny_llama, tiny_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64}


def without(source, folder, *names):
    """A copy of a folder that lacks some tensors."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with safe_open(source / "model.safetensors", "pt") as file:
        strings = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name not in names}
    save_file(tensors, folder / "model.safetensors", metadata=strings)
    return folder


@pytest.mark.parametrize("open_model", [open_language_model, lambda path: load_model(path, device=torch.device("cpu"))])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_model_with_a_weight_missing_is_refused_by_name(tmp_path, open_model, name):
    folder = without(STORIES, tmp_path / "model", name)
    with pytest.raises(SourceError, match=rf"lacks 1 weights of LlamaForCausalLM: {name}"):
        open_model(folder)


def test_text_is_not_generated_from_random_weights(tmp_path):
    folder = without(STORIES, tmp_path / "model", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(SourceError, match="lacks 1 weights"):
        next(generate(folder, "Once"))


def test_a_tied_head_is_not_missing(tmp_path):
    tiny_llama(tmp_path / "dense", tie_word_embeddings=True)
    run(tmp_path / "dense", tmp_path / "packed")
    for name in ("dense", "packed"):
        assert isinstance(open_language_model(tmp_path / name), LlamaForCausalLM)


def test_a_packed_model_with_a_dense_weight_missing_is_refused(tmp_path):
    tiny_llama(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed")
    folder = without(tmp_path / "packed", tmp_path / "model", "model.norm.weight")
    with pytest.raises((SourceError, CheckpointError), match=r"model\.norm\.weight"):
        open_language_model(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_has_no_perplexity(tmp_path, tied):
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="LlamaForSequenceClassification, a model without a language-model head"):
        open_language_model(tmp_path)


def test_a_base_model_without_its_head_says_so(tmp_path):
    tiny_llama(tmp_path).model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"has no language-model head \(lm_head.weight\)"):
        open_language_model(tmp_path)


def test_a_model_of_masked_tokens_is_refused(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="BertForMaskedLM, which predicts masked tokens"):
        open_language_model(tmp_path)


def test_an_encoder_and_decoder_says_what_opens_it(tmp_path):
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=64)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"T5ForConditionalGeneration, .* transformers\.AutoModelForSeq2SeqLM opens it"):
        open_language_model(tmp_path)


def test_another_class_than_the_packed_one_is_not_told_to_exclude(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 64}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}
    config = AutoConfig.for_model("whisper", **sizes, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(CheckpointError, match="the folder holds WhisperForConditionalGeneration, open it with that class"):
        transformers.WhisperForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(SourceError, match="AutoModelForSpeechSeq2Seq opens it"):
        open_language_model(tmp_path / "packed")
    assert any(seed_linears(transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "packed")))


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_model(folder, cache, monkeypatch):
    """A model whose class is in a file beside it; nothing may be asked on stdin."""
    tiny_llama(folder, layers=1)
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on stdin"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
    return folder


def test_code_of_its_own_runs_only_when_trusted_and_nothing_is_asked(tmp_path, monkeypatch):
    folder = own_model(tmp_path / "model", tmp_path / "cache", monkeypatch)
    with pytest.raises(SourceError, match=r"comes with code of its own .* --trust-remote-code"):
        open_language_model(folder)
    assert type(open_language_model(folder, trust_remote_code=True)).__name__ == "OwnForCausalLM"


def test_a_model_with_code_of_its_own_is_compressed_by_its_class_if_that_is_trusted(tmp_path, monkeypatch):
    folder = own_model(tmp_path / "model", tmp_path / "cache", monkeypatch)
    notes = []
    run(folder, tmp_path / "by-names", on_note=notes.append)
    assert "its own code is not run without --trust-remote-code" in notes[0]
    options = {"format": "3-fast", "backend": "auto", "feedback": Feedback("own", sequences=1), "on_note": notes.append}
    options |= {"embeddings": "dense", "head": "dense"}
    notes.clear()
    run(folder, tmp_path / "out", trust_remote_code=True, **options)
    assert notes == []
    assert (tmp_path / "out" / "own.py").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["feedback"] == "own text"
    model = open_language_model(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert len(list(seed_linears(model))) == 7


def test_the_context_limit_of_a_model_of_several_parts_is_its_text_parts(tmp_path):
    assert longest_text(tiny_model("llama", max_position_embeddings=77)) == 77
    unlimited = tiny_model("llama")
    unlimited.config.max_position_embeddings = -1  # as XLNet says it
    assert longest_text(unlimited) is None
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 55}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)
    with torch.device("meta"):
        from transformers import Gemma3ForConditionalGeneration

        assert longest_text(Gemma3ForConditionalGeneration(config)) == 55
