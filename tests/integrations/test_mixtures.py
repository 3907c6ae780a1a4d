"""Mixtures whose experts follow no common interface of transformers: compressed, loaded, run, made dense again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import seedlm
from seedlm.modeling.experts import SeedExperts
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import Checkpoint
from tiny_models import SMALL, run, tiny_model

IDS = torch.arange(1, 13).view(2, 6)
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CASES = {
    # Experts of attention too; one projection to a module, tokens sorted by expert.
    "jetmoe": ({"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}, 8),
    # Experts that hand back what they are given.
    "longcat_flash": (
        {
            **LATENT,
            **{"num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 24},
            **{"num_key_value_heads": 4, "ffn_hidden_size": 44, "qk_head_dim": 16, "head_dim": 8},
        },
        1,
    ),
}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("model_type", CASES)
def test_experts_of_their_own_kind_compute_what_their_dense_weights_do(tmp_path, model_type):
    config, modules = CASES[model_type]
    tiny_model(model_type, **config).save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    packed = Checkpoint.open(tmp_path / "packed").packed
    assert len(list(seed_linears(model))) == len(packed)
    assert sum(isinstance(module, SeedExperts) for module in model.modules()) == modules
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").packed.keys() == packed.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), before)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-5, atol=1e-6)

    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=seedlm.SeedLMConfig(format=SMALL), dtype=torch.float32
    )
    torch.testing.assert_close(logits(quantized), before, rtol=1e-5, atol=1e-6)
    quantized.save_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")), before, rtol=1e-5, atol=1e-6
    )


def test_weights_that_rwkv_scales_by_itself_stay_dense(tmp_path):
    tiny_model(
        "rwkv", attention_hidden_size=32, num_attention_heads=None, num_key_value_heads=None, head_dim=None
    ).save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "packed")
    names = {name.partition("blocks.")[2][2:] for name in Checkpoint.open(tmp_path / "packed").packed}
    assert names == {"attention.key", "attention.receptance", "attention.value", "feed_forward.key", "feed_forward.receptance"}
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()).isfinite().all()
