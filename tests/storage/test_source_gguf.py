"""GGUF files as sources, held against transformers' own reading of them, and against what that passes over."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from seedlm.errors import SourceError
from seedlm.integrations.transformers.opening import open_language_model
from seedlm.modeling.blueprint import survey
from seedlm.storage.gguf_rope import rope_parameters
from seedlm.storage.source import open_source
from tiny_models import GGUF_LAYERS, folder_bytes, run, tiny_gguf

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
LLAMA_32 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_32 |= {"original_max_position_embeddings": 8192}


def read(path, config):
    # Its own reading of the metadata passes over head_dim for qwen3, and fails where that is not 128.
    config = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, config=config
    )


@pytest.mark.parametrize("architecture", GGUF_LAYERS)
def test_tensors_equal_transformers_reading(tmp_path, architecture):
    tiny_gguf(tmp_path / "m.gguf", architecture)
    source = open_source(tmp_path / "m.gguf")
    assert survey(source.config, source.tensors).name.endswith("ForCausalLM")
    if architecture == "qwen3moe":  # whose experts' width transformers passes over: it fails where that is not 768
        names = {name for name in source.tensors if ".experts." in name}
        assert len(names) == 9
        gguf = pytest.importorskip("gguf")
        stack = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_down_exps.weight")
        whole = torch.from_numpy(gguf.dequantize(stack.data, stack.tensor_type))
        assert torch.equal(source.rows("model.layers.0.mlp.experts.2.down_proj.weight", 5, 40), whole[2, 5:40])
        return
    model = read(tmp_path / "m.gguf", source.config)
    expected = revert_weight_conversion(model, model.state_dict())
    assert source.tensors.keys() == expected.keys() - {"lm_head.weight"}  # tied
    for name, info in source.tensors.items():
        tensor = source.rows(name, 0, info.shape[0])
        assert torch.equal(tensor.float(), expected[name]), name
        assert b"".join(source.chunks(name)) == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_types_that_are_floats_keep_their_dtype(tmp_path):
    tiny_gguf(tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    kinds = {name: source.tensors[f"model.layers.0.{name}.weight"].dtype for name in ("self_attn.v_proj", "self_attn.o_proj")}
    assert kinds == {"self_attn.v_proj": "F16", "self_attn.o_proj": "BF16"}
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F32"


def test_config_and_tokenizer_come_along(tmp_path):
    tiny_gguf(tmp_path / "m.gguf")
    source = open_source(tmp_path)  # a folder with one GGUF file will do
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert source.config["tie_word_embeddings"] is True
    out = tmp_path / "out"
    out.mkdir()
    source.copy_side_files(out)
    (out / "config.json").write_text(json.dumps(source.config))
    assert AutoConfig.from_pretrained(out).num_key_value_heads == 2
    assert AutoTokenizer.from_pretrained(out)("EFGE").input_ids == [4, 31, 4]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_tokenizer_is_the_one_that_transformers_chooses(tmp_path, architecture):
    tiny_gguf(tmp_path / "m.gguf", architecture)
    for folder in ("out", "expected"):
        (tmp_path / folder).mkdir()
    open_source(tmp_path / "m.gguf").copy_side_files(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").save_pretrained(tmp_path / "expected")
    found = folder_bytes(tmp_path / "out")
    del found["generation_config.json"]
    assert found == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32768},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({}, {"rope_type": "default"}),
    ],
    ids=["linear", "older-linear", "yarn", "none", "absent"],
)
def test_scaled_rotary_embeddings_are_carried_over(tmp_path, metadata, expected):
    tiny_gguf(tmp_path / "m.gguf", metadata={**metadata, "rope.freq_base": 500000.0})
    source = open_source(tmp_path / "m.gguf")
    config = AutoConfig.for_model(**source.config)
    assert {key: config.rope_parameters[key] for key in expected} == expected
    assert config.rope_parameters["rope_theta"] == 500000.0


def test_a_model_of_a_gguf_file_computes_with_what_its_metadata_says(tmp_path):
    tiny_gguf(tmp_path / "plain.gguf")
    tiny_gguf(tmp_path / "scaled.gguf", metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    plain, scaled = (open_language_model(tmp_path / f"{name}.gguf").model.rotary_emb for name in ("plain", "scaled"))
    torch.testing.assert_close(scaled.inv_freq, plain.inv_freq / 4)


def test_a_model_in_several_files_is_not_run_by_halves(tmp_path):
    paths, _ = split_gguf(tmp_path)
    with pytest.raises(SourceError, match="is one of several files of a model, which transformers does not join"):
        open_language_model(paths[0])


def test_gemma_3_scales_its_global_layers_alone(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", "gemma3", metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    parameters = open_source(tmp_path / "m.gguf").config["rope_parameters"]
    assert (parameters["full_attention"]["rope_type"], parameters["full_attention"]["factor"]) == ("linear", 8.0)
    assert parameters["sliding_attention"]["rope_type"] == "default"


def inverse_frequencies(parameters, theta, half, positions=131072):
    config = AutoConfig.for_model("llama", head_dim=2 * half, max_position_embeddings=positions)
    config.rope_parameters = {"rope_theta": theta, **parameters}
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")[0]


def test_llama_3_1s_table_of_frequencies_is_its_formula():
    plain = torch.tensor([500000.0 ** (-n / 64) for n in range(64)])
    table = plain / inverse_frequencies(LLAMA_32, 500000.0, 64)
    assert rope_parameters({}, table.tolist(), 500000.0, 131072, "m") == LLAMA_32


def test_another_table_of_frequencies_is_kept_as_a_table():
    table = [1.0 + n / 7 for n in range(64)]
    found = rope_parameters({}, table, 10000.0, 4096, "m")
    assert found["rope_type"] == "longrope"
    expected = torch.tensor([10000.0 ** (-n / 64) / table[n] for n in range(64)])
    torch.testing.assert_close(inverse_frequencies(found, 10000.0, 64, 4096), expected, rtol=1e-5, atol=0)


def test_a_file_of_llama_3_1_compresses_and_keeps_its_frequencies(tmp_path):
    plain = torch.tensor([500000.0 ** (-n / 8) for n in range(8)])
    table = (plain / inverse_frequencies(LLAMA_32, 500000.0, 8)).numpy().astype(np.float32)
    tiny_gguf(tmp_path / "m.gguf", metadata={"rope.freq_base": 500000.0}, **{"rope_freqs.weight": table})
    run(tmp_path / "m.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / torch.from_numpy(table), rtol=1e-5, atol=0)


def test_llama_cpps_attention_factor_is_on_top_of_yarns_own():
    found = rope_parameters({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 0.5}, None, 1e4, 64, "m")
    assert found["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4.0) + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "command-r"}, "architecture 'command-r' are not read here.*original model's safetensors"),
        ({"blk.0.strange.weight": ((8, 8), 0)}, "'blk.0.strange.weight' that is not known for llama"),
        ({"metadata": {"rope.scaling.type": "longrope"}}, r"\(longrope\) that is not carried over"),
        (
            {"metadata": {"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}},
            "rope.scaling.yarn_log_multiplier",
        ),
        ({"metadata": {"attention.scale": 0.5}}, "attention.scale 0.5, which transformers does not read"),
    ],
    ids=["architecture", "unknown-tensor", "longrope", "yarn-unknown", "scale"],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, change, message):
    tiny_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "m.gguf")


def split_gguf(folder):
    """One model in two files, as llama.cpp's gguf-split leaves them: embeddings and norms, and the layer."""
    gguf = pytest.importorskip("gguf")
    tiny_gguf(folder / "whole.gguf")
    reader = gguf.GGUFReader(folder / "whole.gguf")
    layer = [tensor.name for tensor in reader.tensors if tensor.name.startswith("blk")]
    others = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("blk")]
    arrays = {tensor.name: tensor for tensor in reader.tensors}
    paths = [folder / f"model-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for number, (path, names) in enumerate(zip(paths, (others, layer), strict=True)):
        writer = gguf.GGUFWriter(str(path), "llama")
        if number == 0:
            copied = {"context_length": 64, "block_count": 1, "embedding_length": 64, "feed_forward_length": 96}
            for key, value in {**copied, "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 32}.items():
                writer.add_uint32(f"llama.{key}", value)
            writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list([*(chr(65 + n) for n in range(30)), "DE", "FG"])
            writer.add_token_merges(["D E", "F G"])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for name in names:
            writer.add_tensor(name, arrays[name].data, raw_dtype=arrays[name].tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole = folder / "whole.gguf"
    return paths, whole


@pytest.mark.parametrize("which", ["first", "last", "folder"])
def test_a_model_in_several_files_is_read_whole(tmp_path, which):
    paths, whole = split_gguf(tmp_path)
    expected = open_source(whole)
    tensors = {name: expected.rows(name, 0, info.shape[0]).clone() for name, info in expected.tensors.items()}
    whole.unlink()
    source = open_source({"first": paths[0], "last": paths[1], "folder": tmp_path}[which])
    assert source.tensors.keys() == tensors.keys()
    assert source.config == expected.config
    assert all(torch.equal(source.rows(name, 0, len(tensor)), tensor) for name, tensor in tensors.items())


def test_a_model_in_several_files_of_which_one_is_missing_is_refused(tmp_path):
    paths, _ = split_gguf(tmp_path)
    paths[1].unlink()
    with pytest.raises(SourceError, match=r"one of 2 files of a model, of which model-00002-of-00002.gguf are not there"):
        open_source(paths[0])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(SourceError, match="is one of 2 files of a model"):
        open_source(tmp_path / "renamed.gguf")


def test_a_file_that_lacks_a_tensor_of_its_layers_is_refused(tmp_path):
    tiny_gguf(tmp_path / "m.gguf", leave_out=("blk.0.ffn_up.weight",))
    with pytest.raises(SourceError, match=r"lacks blk.0.ffn_up.weight, which its metadata declares"):
        run(tmp_path / "m.gguf", tmp_path / "out")


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    with pytest.raises(SourceError, match="not a readable GGUF file"):
        open_source(tmp_path / "m.gguf")
