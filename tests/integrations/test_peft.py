"""LoRA on packed layers of both families: trained, saved, loaded again, merged."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from seedlm.errors import TensorError
from seedlm.modeling.quantize import compress_model, seed_linears
from tiny_models import SMALL, run, tiny_model

peft = pytest.importorskip("peft")
from seedlm.integrations.peft import for_packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("dequantizing")

IDS = torch.arange(1, 13).view(2, 6)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module", params=[SMALL, "3-fast"], ids=["block", "trellis"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=False, mlp_bias=True).save_pretrained(folder / "dense")
    feedback = {} if request.param == SMALL else {"feedback": "none", "backend": "auto"}
    run(folder / "dense", folder / "packed", format=request.param, **feedback)
    return folder


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def trained(folder):
    """An adapted model after a few steps, in which every adapter has moved."""
    torch.manual_seed(0)
    config = for_packed(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=True))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "packed"), config)
    before = logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before, losses


def test_adapters_of_packed_layers_are_trained_and_the_codes_are_not(folder):
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed")
    codes = [part.clone() for _, layer in seed_linears(packed) for part in layer.parts.values()]
    model, before, losses = trained(folder)
    assert torch.equal(before, logits(packed))
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(model), before)
    after = [part for _, layer in seed_linears(model) for part in layer.parts.values()]
    assert len(after) == len(codes)
    assert all(map(torch.equal, after, codes))
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_a_saved_adapter_is_loaded_again(folder, tmp_path):
    model, _, _ = trained(folder)
    model.save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed")
    again = peft.PeftModel.from_pretrained(packed, tmp_path, config=for_packed(tmp_path))
    assert torch.equal(logits(again), logits(model))


def test_merging_makes_the_adapted_layers_dense_and_leaves_the_others_packed(folder, tmp_path):
    model, _, _ = trained(folder)
    expected = logits(model)
    merged = model.merge_and_unload()
    names = {name.rpartition(".")[2] for name, _ in seed_linears(merged)}
    assert names == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged), rtol=0, atol=0)
    dense = merged.dequantize()
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


def test_unloading_gives_the_packed_layers_back(folder):
    model, before, _ = trained(folder)
    assert torch.equal(logits(model.unload()), before)


def test_merging_in_place_is_refused_with_the_way_out(folder):
    model, _, _ = trained(folder)
    with pytest.raises(TensorError, match=r"merge_and_unload\(\) makes the adapted layers dense"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(use_dora=True), "DoRA scales by the norms"),
        (peft.LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' starts from the values"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "LoRA alone, got a IA3Config"),
    ],
    ids=["dora", "pissa", "ia3"],
)
def test_what_needs_the_values_of_the_weight_is_refused(config, message):
    with pytest.raises(TensorError, match=message):
        for_packed(config)


@pytest.mark.parametrize(("tied", "target"), [(True, "lm_head"), (True, "embed_tokens"), (False, "embed_tokens")], ids=str)
def test_embeddings_in_codes_and_heads_that_are_tied_to_them_take_no_adapter(tied, target):
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=tied)
    compress_model(model, SMALL, embeddings=SMALL, backend="torch")
    with pytest.raises(ValueError, match=f"Target module {'TiedLinear' if target == 'lm_head' else 'SeedEmbedding'}"):
        peft.get_peft_model(model, for_packed(peft.LoraConfig(target_modules=[target])))


def test_layers_and_a_head_of_its_own_are_adapted_beside_packed_embeddings():
    model = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    compress_model(model, SMALL, embeddings=SMALL, head=SMALL, backend="torch")
    before = logits(model)
    adapted = peft.get_peft_model(model, for_packed(peft.LoraConfig(target_modules=["q_proj", "lm_head"])))
    assert torch.equal(logits(adapted), before)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name)
