"""Models that transformers lists under images or sound and not under text alone: opened, observed and asked by text."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from seedlm.calibration.statistics import measure_statistics
from seedlm.compress.feedback import Feedback
from seedlm.compress.observe import observe_checkpoint
from seedlm.compress.run import compress_checkpoint
from seedlm.errors import SourceError
from seedlm.integrations.transformers.opening import open_language_model
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import Checkpoint
from tiny_models import STORIES, told

TEXT = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
TEXT |= {"num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A random Llava that sees images of four patches, with the tokenizer of stories260K."""
    folder = tmp_path_factory.mktemp("seeing") / "model"
    tower = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **TOWER}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **TEXT}, vision_config=tower, image_token_index=511)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, folder)
    return folder


def test_its_statistics_are_those_of_the_language_model_in_it(seeing):
    model, tokens = open_language_model(seeing), torch.arange(3, 67).view(4, 16)
    assert type(model) is LlavaForConditionalGeneration
    alone = LlamaForCausalLM(model.config.text_config).eval()
    states = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    alone.load_state_dict({**states, "lm_head.weight": model.lm_head.weight})
    expected, found = measure_statistics(alone, tokens), measure_statistics(model, tokens)
    assert {name.removeprefix("language_model.") for name in found.reads} == expected.reads.keys()
    for name in expected.reads:
        theirs, ours = expected.input_of(name), found.input_of(f"language_model.{name}")
        torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.correlation, theirs.correlation, rtol=0, atol=2e-3)
        torch.testing.assert_close(found.rows[f"language_model.{name}"], expected.rows[name], rtol=1e-4, atol=1e-12)


def test_mixed_rates_are_found_by_its_own_text(seeing, tmp_path, here):
    out = tmp_path / "out"
    layers = ("--embeddings", "dense", "--head", "dense")
    done = here("compress", seeing, out, "--bits", "3.5", "--sequences", 2, "--device", "cpu", *layers)
    assert done.returncode == 0, done.stderr
    assert "feedback          own text" in done.stdout
    packed = Checkpoint.open(out).packed
    assert len({info.format for info in packed.values()}) > 1
    assert all("language_model" in name for name in packed)
    assert "model = LlavaForConditionalGeneration.from_pretrained" in (out / "README.md").read_text()
    assert len(list(seed_linears(open_language_model(out)))) == len(packed)
    asked = here("generate", out, "Once upon a time", "--max-new-tokens", 4)
    assert (asked.returncode, told(asked.stderr)[:-1]) == (0, [])
    assert asked.stdout.startswith("Once upon a time")


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "blip",
            {"text_config": TEXT, "vision_config": TOWER},
            "BlipForConditionalGeneration, which takes more than text",
        ),
        ("qwen2_5_omni", {}, "Qwen2_5OmniForConditionalGeneration, which does not go on from a text token by token"),
    ],
)
def test_what_does_not_go_by_text_alone_is_refused_before_it_is_loaded(kind, config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(transformers.AutoConfig.for_model(kind, **config).to_dict()))
    with pytest.raises(SourceError, match=message):
        open_language_model(tmp_path)


def test_one_that_refuses_text_without_an_image_is_coded_by_its_weights(seeing, tmp_path, monkeypatch):
    def forward(self, input_ids=None, **_):
        raise ValueError("You have to specify pixel_values")

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    notes = []
    report = compress_checkpoint(seeing, tmp_path / "out", format="2-fast", device="cpu", on_note=notes.append)
    assert report.feedback == "none"
    assert "no error feedback: the model cannot be run here (You have to specify pixel_values)" in notes
    with pytest.raises(SourceError, match="no statistics for error feedback: You have to specify pixel_values"):
        observe_checkpoint(seeing, tmp_path / "s.safetensors", text=Feedback("own"), device="cpu")
