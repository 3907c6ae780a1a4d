"""Sensitivities: held against the KL of noisy weights on a real model, the file, the command."""

import json
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from seedlm.calibration.sensitivity import OwnText, measure_sensitivity, own_text
from seedlm.cli import app
from seedlm.codes.block.family import FAMILY
from seedlm.codes.registry import parse_format
from seedlm.compress import allocate
from seedlm.compress.run import compress_checkpoint
from seedlm.errors import EvaluationError
from seedlm.integrations.transformers import models
from seedlm.storage.inspect import inspect_checkpoint
from seedlm.storage.sensitivity import read_sensitivity, write_sensitivity
from tiny_models import SMALL, STORIES, tiny_llama, tiny_model

TEXT = OwnText(sequences=8, length=128)
FINE = "block-k8-c4-p3-q4-e4"


def load(folder):
    return models.load_model(folder, device=torch.device("cpu"), dtype="float32")


@pytest.fixture(scope="module")
def stories():
    return load(STORIES)


@pytest.fixture(scope="module")
def measured(stories):
    return measure_sensitivity(stories, TEXT)


def test_it_is_the_kl_that_noise_in_a_weight_causes(stories, measured):
    """On the same text; 35 weights, noise of 0.1 % of each row's energy."""
    nmse, windows = 1e-3, torch.stack(list(own_text(stories, TEXT)))

    @torch.inference_mode()
    def predict():
        return stories(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1)

    reference, ratios = predict(), {}
    torch.manual_seed(0)
    for name, sensitivity in measured.items():
        weight = stories.get_submodule(name).weight
        kept = weight.detach().clone()
        weight.data += torch.randn_like(kept) * (nmse * kept.square().mean(1, keepdim=True)).sqrt()
        kl = (reference.exp() * (reference - predict())).sum(-1).mean()
        weight.data.copy_(kept)
        ratios[name] = float(kl) / (sensitivity * nmse)
    mean = sum(ratios.values()) / len(ratios)
    assert 0.8 < mean < 1.25
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios


def test_the_same_seed_writes_the_same_text_and_file_content(stories, measured):
    assert measure_sensitivity(stories, TEXT) == measured
    other = measure_sensitivity(stories, OwnText(sequences=8, length=128, seed=1))
    assert other != measured
    assert other.keys() == measured.keys()


def test_sequences_are_a_token_of_any_kind_and_what_the_model_says(stories):
    texts = torch.stack(list(own_text(stories, OwnText(sequences=20, length=16))))
    assert texts.shape == (20, 16)
    assert len(texts[:, 0].unique()) > 15
    with torch.inference_mode():
        likelihood = stories(input_ids=texts, use_cache=False).logits[:, :-1].softmax(-1).gather(2, texts[:, 1:, None])
    assert likelihood.log().mean() > torch.tensor(1 / 32).log()  # of 512 tokens


def test_a_model_comes_back_as_it_was(stories, measured):
    assert all(parameter.requires_grad and parameter.grad is None for parameter in stories.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in stories.parameters())


def test_a_tied_head_is_left_out(tmp_path):
    text = OwnText(sequences=1, length=4)
    tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    tiny_llama(tmp_path / "head", tie_word_embeddings=False)
    tied, head = (measure_sensitivity(load(tmp_path / name), text) for name in ("tied", "head"))
    assert head.keys() - tied.keys() == {"lm_head"}
    assert len(tied) == 14


@pytest.mark.parametrize(
    ("model_type", "part", "inputs", "stored"),
    [
        ("mixtral", slice(44), 1, "model.layers.0.block_sparse_moe.experts.1.w1"),  # the first half of gate_up_proj's rows
        ("gpt_oss", slice(None), 0, "model.layers.0.mlp.experts.gate_up_proj.1"),  # stacked, its rows are columns
    ],
)
def test_experts_have_sensitivities_of_their_own_by_the_names_on_disk(model_type, part, inputs, stored, tmp_path):
    tiny_model(model_type, num_local_experts=3, num_experts_per_tok=2).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    text = OwnText(sequences=1, length=16)
    found = measure_sensitivity(model, text)

    tokens = next(own_text(model, text))
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum").backward()
    energy = stack[1].detach().square().mean(inputs)
    expected = (stack.grad[1].square().sum(inputs) * energy)[part].sum() / (2 * 15)
    assert found[stored] == pytest.approx(float(expected), rel=1e-4)

    mixture = allocate.Mixture(bits=5.0, sensitivity=found, formats={parse_format(SMALL): 0.1, parse_format(FINE): 0.02})
    compress_checkpoint(tmp_path / "dense", tmp_path / "packed", format=mixture, backend="torch")
    assert {tensor.format for tensor in inspect_checkpoint(tmp_path / "packed").tensors} == {SMALL, FINE}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        kept = packed(tokens[None]).logits
        torch.testing.assert_close(packed.dequantize()(tokens[None]).logits, kept, rtol=1e-5, atol=1e-6)


def test_a_model_that_keeps_its_state_otherwise_is_measured_too():
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    measured = measure_sensitivity(MambaForCausalLM(config).eval(), OwnText(sequences=2, length=8))
    assert measured.keys() == {f"backbone.layers.0.mixer.{part}_proj" for part in ("in", "x", "dt", "out")}


def test_a_text_longer_than_the_context_is_refused(stories):
    with pytest.raises(EvaluationError, match="knows 512 positions"):
        measure_sensitivity(stories, OwnText(length=513))


def test_predictions_that_are_not_finite_are_refused(tmp_path):
    model = tiny_llama(tmp_path, dtype=torch.float32).eval()
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, float("inf"))
    with pytest.raises(EvaluationError, match="predictions are not finite"):
        measure_sensitivity(model, OwnText(sequences=1, length=4))


@pytest.mark.parametrize("change", [{"sequences": 0}, {"length": 1}], ids=str)
def test_a_text_of_nothing_is_refused(change):
    with pytest.raises(EvaluationError, match="must be at least"):
        OwnText(**change)


def test_the_file_gives_back_what_was_measured(measured, tmp_path):
    path = tmp_path / "sensitivity.json"
    write_sensitivity(path, "stories", TEXT, measured)
    assert read_sensitivity(path) == ("stories", measured)
    with pytest.raises(EvaluationError, match="File exists"):
        write_sensitivity(path, "stories", TEXT, measured)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sensitivity": {}}, "must have sensitivity_version 1"),
        ({"sensitivity_version": 1, "model": "m"}, "must have sensitivity_version 1"),
        ({"sensitivity_version": 1, "model": 1, "sensitivity": {}}, "must have sensitivity_version 1, model"),
        (
            {"sensitivity_version": 1, "model": "m", "sensitivity": {"a": -1.0}},
            "a finite number, 0 or more, got -1.0",
        ),
        ({"sensitivity_version": 1, "model": "m", "sensitivity": {"a": True}}, "of a must be a finite number"),
        ({"sensitivity_version": 1, "model": "m", "sensitivity": {"a": float("inf")}}, "Infinity|finite"),
    ],
    ids=["no version", "no values", "no model", "negative", "no number", "infinite"],
)
def test_a_file_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=message):
        read_sensitivity(path)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_commands_measure_and_mix(tmp_path, monkeypatch):
    formats = {parse_format("block-k8-c12-p3-q4-e4"): 0.4, parse_format("block-k8-c4-p2-q4-e4"): 0.05}
    monkeypatch.setattr(FAMILY, "mixture", formats)
    tiny_llama(tmp_path / "dense", hidden_size=48, intermediate_size=96)
    file = tmp_path / "sensitivity.json"
    result = run("sensitivity", tmp_path / "dense", "-o", file, "--sequences", 2, "--length", 8)
    assert result.exit_code == 0, result.output
    assert len(read_sensitivity(file)[1]) == 15

    out = tmp_path / "out"
    options = ("compress", tmp_path / "dense", out, "--backend", "torch")
    refused = run(*options, "--bits", "3.7", "--code", "block")
    assert "seedlm sensitivity" in str(refused.exception)
    assert "one of your own is not mixed" in str(run(*options, "--format", "4", "--sensitivity", file).exception)
    result = run(*options, "--bits", "3.7", "--code", "block", "--sensitivity", file)
    assert result.exit_code == 0, result.output
    assert "was measured on" not in result.output
    report = inspect_checkpoint(out)
    assert 3.2 < report.bits_per_weight <= 3.7
    assert Counter(tensor.format for tensor in report.tensors).keys() == {format.spec for format in formats}

    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "another"}))
    options = ("compress", tmp_path / "dense", tmp_path / "again", "--backend", "torch")
    result = run(*options, "--bits", "3.7", "--code", "block", "--sensitivity", file)
    assert result.exit_code == 0, result.output
    assert "was measured on 'another', and says little of any other model" in result.output
