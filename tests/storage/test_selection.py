"""Which weights are compressed, unless told otherwise."""

import pytest

from seedlm.codes.registry import parse_format
from seedlm.errors import SourceError
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.safetensors import TensorInfo
from seedlm.storage.selection import select
from tiny_models import SMALL, run, tiny_llama

FORMAT = parse_format(SMALL)


class TestSelection:
    TENSORS = {  # noqa: RUF012
        name: TensorInfo("BF16", shape)
        for name, shape in {
            "model.embed_tokens.weight": (64, 8),
            "model.layers.0.self_attn.q_proj.weight": (8, 8),
            "model.layers.0.self_attn.q_proj.bias": (8,),
            "model.layers.0.input_layernorm.weight": (8,),
            "model.layers.0.mlp.gate.weight": (4, 8),
            "model.layers.0.mlp.shared_expert_gate.weight": (1, 8),
            "model.layers.0.mlp.gate_proj.weight": (8, 8),
            "model.layers.0.mlp.experts.3.up_proj.weight": (8, 8),
            "model.layers.0.mlp.experts.strange": (4, 8, 8),
            "model.layers.0.mlp.experts.mlp.w1": (32, 8),
            "model.layers.0.mlp.experts.up_proj_bias": (4, 8),
            "model.layers.0.conv1d.weight": (8, 1, 4),
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
            "vision_tower.layers.0.fc1.weight": (8, 8),
            "lm_head.weight": (64, 8),
        }.items()
    }
    DEFAULT = (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.experts.3.up_proj",
    )

    def test_default_is_the_linear_layers_of_the_decoder(self):
        chosen, left = select(self.TENSORS, {}, FORMAT)
        assert chosen == list(self.DEFAULT)
        assert left["model.layers.0.mlp.gate.weight"] == "a router"
        assert left["model.layers.0.mlp.experts.strange"] == "stacked experts of an unknown kind"
        assert left["model.layers.0.mlp.experts.mlp.w1"] == "stacked experts of an unknown kind"
        assert left["model.layers.0.mlp.experts.up_proj_bias"] == "not a weight"
        assert left["lm_head.weight"] == "an output head"
        assert left["model.embed_tokens.weight"] == "an embedding"
        assert len(chosen) + len(left) == len(self.TENSORS)

    @pytest.mark.parametrize(
        ("options", "added", "removed"),
        [
            ({"include": ["lm_head"]}, {"lm_head"}, set()),
            ({"include": ["*.gate"]}, {"model.layers.0.mlp.gate"}, set()),
            ({"include": ["model.embed_tokens"]}, set(), set()),
            ({"exclude": ["*.mlp.*"]}, set(), {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.experts.3.up_proj"}),
            ({"include": ["*gate*"], "exclude": ["*.gate", "*expert*"]}, set(), {"model.layers.0.mlp.experts.3.up_proj"}),
        ],
        ids=["head", "router", "never-embeddings", "exclude", "exclude-wins"],
    )
    def test_patterns_add_and_take_away(self, options, added, removed):
        chosen, _ = select(self.TENSORS, {}, FORMAT, **options)
        assert set(chosen) == (set(self.DEFAULT) | added) - removed

    @pytest.mark.parametrize(
        ("tensors", "config", "options", "message"),
        [
            ({}, {}, {"include": ["lm_haed"]}, "no module with a weight matches --include 'lm_haed'"),
            ({}, {}, {"exclude": ["layers.9.*"]}, "no module with a weight matches --exclude"),
            ({}, {}, {"exclude": ["*"]}, "nothing to compress"),
            ({}, {"tie_word_embeddings": True}, {"include": ["lm_head"]}, "is tied to the embeddings"),
            ({}, {"text_config": {"tie_word_embeddings": True}}, {"include": ["lm_head"]}, "is tied to the embeddings"),
            ({}, {"model_type": "gpt2"}, {}, r"'gpt2' store their matrices as \[in_features, out_features\]"),
            ({"h.0.attn.c_attn.weight": TensorInfo("F32", (8, 24))}, {}, {}, "Conv1D"),
            ({"model.layers.1.fc.weight": TensorInfo("F64", (8, 8))}, {}, {}, r"must be F32, F16 or BF16, got F64 \[8, 8\]"),
        ],
        ids=["typo-include", "typo-exclude", "nothing", "tied", "tied-in-a-part", "gpt2", "conv1d-by-shape", "float64"],
    )
    def test_what_cannot_be_meant_is_refused(self, tensors, config, options, message):
        with pytest.raises(SourceError, match=message):
            select({**self.TENSORS, **tensors}, config, FORMAT, **options)

    def test_what_would_not_get_smaller_is_left_unless_included(self):
        tensors = {"model.layers.0.narrow.weight": TensorInfo("BF16", (8, 1)), **self.TENSORS}
        _, left = select(tensors, {}, FORMAT)
        assert left["model.layers.0.narrow.weight"] == "no smaller as codes"
        assert "model.layers.0.narrow" in select(tensors, {}, FORMAT, include=["*.narrow"])[0]

    def test_an_included_head_is_compressed_and_left_off_the_dense_list(self, llama, tmp_path):
        run(llama, tmp_path / "out", include=["lm_head"], exclude=["*.self_attn.*"])
        checkpoint = Checkpoint.open(tmp_path / "out")
        assert "lm_head" in checkpoint.packed
        dense = checkpoint.config["quantization_config"]["modules_to_not_convert"]
        assert dense == sorted(f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo")

    def test_tied_weights_stay_tied(self, tmp_path):
        tiny_llama(tmp_path / "m", tie_word_embeddings=True)
        run(tmp_path / "m", tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out")
        assert "lm_head.weight" not in checkpoint.dense
        assert checkpoint.config["tie_word_embeddings"] is True
        assert checkpoint.config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
