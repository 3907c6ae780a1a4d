"""What is copied beside the weights, and what is said of a folder or a file that is no source."""

import json
import os

import pytest
import torch

from seedlm.errors import SourceError
from seedlm.storage.source import open_source
from tiny_models import run, save_tensors, tiny_llama


@pytest.fixture
def model(tmp_path):
    tiny_llama(tmp_path / "m")
    return tmp_path / "m"


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_that_a_sentence_transformers_model_is_made_of_comes_along(model, tmp_path):
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (model / "modules.json").write_text(json.dumps(modules))
    for name, content in (("1_Pooling/config.json", "{}"), ("2_Dense/config.json", "{}"), ("2_Dense/model.safetensors", "x")):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    run(model, tmp_path / "out")
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= files_of(
        tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("path", "file", "message"),
    [
        ("1_Pooling", None, "names the folder '1_Pooling', which is not there"),
        ("../elsewhere", "../elsewhere/config.json", r"names the folder '\.\./elsewhere'; its own and others are not copied"),
        (".", None, r"names the folder '\.'; its own and others are not copied"),
        ("1_Pooling/..", "1_Pooling/config.json", r"names the folder '1_Pooling/\.\.'; its own and others are not copied"),
        ("2_Dense", "2_Dense/pytorch_model.bin", "is a pickle, .* is not copied; let sentence-transformers write"),
    ],
    ids=["missing", "outside", "own", "own-by-a-detour", "pickle"],
)
def test_a_sentence_transformers_model_that_cannot_be_copied_whole_is_refused(model, path, file, message):
    (model / "modules.json").write_text(json.dumps([{"path": path}]))
    if file:
        (model / file).parent.mkdir(exist_ok=True)
        (model / file).write_text("x")
    with pytest.raises(SourceError, match=message):
        open_source(model)


def test_an_adapter_comes_along_with_its_weights_or_not_at_all(model, tmp_path):
    (model / "adapter_config.json").write_text("{}")
    notes = []
    run(model, tmp_path / "without", on_note=notes.append)
    assert "adapter_config.json" not in files_of(tmp_path / "without")
    assert any("adapter_config.json is left out" in note for note in notes)
    (model / "adapter_model.safetensors").write_text("x")
    run(model, tmp_path / "with")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files_of(tmp_path / "with")


def test_what_describes_another_quantization_stays_behind(model, tmp_path):
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "seedlm_report.json"):
        (model / name).write_text('{"bits": 4}')
    run(model, tmp_path / "out")
    assert not {"quantize_config.json", "quant_config.json", "hf_quant_config.json"} & files_of(tmp_path / "out")
    assert "bits" not in json.loads((tmp_path / "out" / "seedlm_report.json").read_text())


QUANTIZED = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"text_config": {"quantization_config": QUANTIZED}}, {}, r"already quantized \(compressed-tensors\)"),
        ({"llm_config": {"deep": {"compression_config": {}}}}, {}, r"already quantized \(an unknown method\)"),
        (
            {},
            {"m.0.q_proj.weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
            r"not say so \(m.0.q_proj.weight_packed\)",
        ),
        ({}, {"m.0.q_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}, "m.0.q_proj.qweight"),
        (
            {},
            {"m.0.q.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "m.0.q.weight_scale_inv": torch.zeros(1, 1)},
            "m.0.q.weight_scale_inv",
        ),
        ({}, {"m.0.q.weight": torch.zeros(4, 4, dtype=torch.int8), "m.0.q.SCB": torch.zeros(4)}, "m.0.q.SCB"),
    ],
    ids=["nested", "deeper", "packed", "qweight", "fp8", "int8"],
)
def test_what_is_quantized_already_is_refused_wherever_that_is_said(tmp_path, config, tensors, message):
    folder = save_tensors(tmp_path / "m", {"m.0.k.weight": torch.zeros(8, 8), **tensors}, **config)
    with pytest.raises(SourceError, match=message):
        open_source(folder)


def test_a_parameter_that_is_called_a_scale_is_none_of_other_codes(tmp_path):
    tensors = {"m.0.q.weight": torch.zeros(8, 8), "m.0.q.weight_scale": torch.zeros(8), "m.0.scales": torch.zeros(3)}
    assert open_source(save_tensors(tmp_path / "m", tensors)).tensors.keys() == tensors.keys()


def touch(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".").replace("_of_", "-of-")).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config__json": b'{"base_model_name_or_path": "some/base"}', "adapter_model__safetensors": b""},
            r"is an adapter of some/base, not a model; merge it first: .*merge_and_unload",
        ),
        ({"weights__safetensors": b""}, "has weights.safetensors; weights are read from model.safetensors: rename it"),
        ({"model-00001_of_00002__safetensors": b""}, "has parts of a model .* but not model.safetensors.index.json"),
        ({"model__bin": b"\x06\x00\x00\x00\x16\x00", "config__json": b"{}"}, "is a model of CTranslate2, in its own format"),
        ({"pytorch_model__bin": b"version https://git-lfs.github.com"}, "pointer of Git LFS.* git lfs pull"),
        ({"ggml-model__bin": b"lmgg\x00"}, "is a GGML file"),
        ({"pytorch_model__bin": b"GGUF\x03"}, "a GGUF file by another name; call it .gguf"),
        (
            {"pytorch_model__bin": b"PK\x03\x04", "config__json": b'{"architectures": ["BertForMaskedLM"]}'},
            "from transformers import BertForMaskedLM as M",
        ),
        ({"pytorch_model__bin": b"PK\x03\x04"}, "from transformers import AutoModel as M"),
        (
            {"pytorch_model__bin": b"PK\x03\x04", "config__json": b'{"model_type": "gpt2"}'},
            "of a gpt2 model, which could not be compressed as safetensors either",
        ),
    ],
    ids=["lora", "name", "parts", "ctranslate2", "lfs", "ggml", "gguf", "class", "no-class", "gpt2"],
)
def test_a_folder_without_weights_says_what_is_there(tmp_path, files, message):
    with pytest.raises(SourceError, match=message):
        open_source(touch(tmp_path / "m", **files))


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    os.symlink("/not/there/model.safetensors", touch(tmp_path / "m") / "model.safetensors")
    with pytest.raises(SourceError, match=r"is a link to /not/there/model.safetensors, which is not there"):
        open_source(tmp_path / "m")


def test_a_folder_with_the_model_below_names_that(tmp_path):
    tiny_llama(touch(tmp_path / "m") / "0_Transformer")
    with pytest.raises(SourceError, match="holds no model itself, the folder 0_Transformer in it does"):
        open_source(tmp_path / "m")
