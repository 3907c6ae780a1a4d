"""Packed folders in transformers: loading, saving, refusing."""

import json
import os
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from seedlm.codes.encoded import encode
from seedlm.codes.registry import family, parse_format
from seedlm.errors import CheckpointError, FormatError
from seedlm.integrations.transformers import quantizer as hf
from seedlm.modeling.linear import SeedLinear
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import GUARD, stored_name

pytestmark = pytest.mark.usefixtures("dequantizing")

FORMAT = parse_format("block-k8-c8-p3-q4-e4")
IDS = torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize(("bits", "name"), [(None, "4"), (4, "4"), (3.0, "3"), ("2-fast", "2-fast")])
def test_bits_name_a_preset_as_a_number_or_as_text(bits, name):
    assert hf.SeedLMConfig(bits).format == family("trellis").presets[name].to_dict()


def test_bits_without_a_preset_are_refused():
    with pytest.raises(FormatError, match=r"unknown format '2\.7'; presets are 2, "):
        hf.SeedLMConfig(2.7)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small random Llama with biases and tied embeddings, as transformers saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The same model packed, in version 1 of the format and written without the package's own writer."""
    tensors, described = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if name.endswith("proj.weight"):
            encoded, _ = encode(tensor, FORMAT, backend="torch")
            module = name.removesuffix(".weight")
            described[module] = {"shape": list(tensor.shape), "format": FORMAT.spec}
            tensors |= {stored_name(module, part): codes for part, codes in encoded.parts.items()}
        else:
            tensors[name] = tensor
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "seedlm",
        "format_version": 1,
        "format": FORMAT.to_dict(),
        "rounding": "best",
        "modules_to_not_convert": ["lm_head"],
    }
    config["fusion_config"] = {GUARD: False}
    metadata = {"seedlm": json.dumps({"format_version": 1, "tensors": described})}
    return write(tmp_path_factory.mktemp("packed"), config, tensors, metadata)


def write(folder, config, tensors, metadata):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    return folder


def read(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def metadata_of(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.metadata()


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_packed_folder_loads_packed_and_generates(packed):
    model = load(packed)
    layers = dict(seed_linears(model))
    assert len(layers) == 14
    assert all(layer.parts["words"].dtype == torch.int32 for layer in layers.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert layers["model.layers.0.self_attn.q_proj"].bias.shape == (64,)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 10)
    logits = model(IDS).logits
    assert torch.equal(model.dequantize()(IDS).logits, logits)


def test_saving_and_loading_again_changes_no_bit(packed, tmp_path):
    model = load(packed)
    model.save_pretrained(tmp_path)
    (config, tensors), (config_again, tensors_again) = read(packed), read(tmp_path)
    assert config_again["quantization_config"] == {**config["quantization_config"], "format_version": 2}
    codes = {name for name, tensor in tensors.items() if tensor.dtype == torch.int32}
    assert json.loads(metadata_of(tmp_path)["seedlm"])["sha256"].keys() == codes
    assert config_again["fusion_config"] == config["fusion_config"]
    assert tensors.keys() == tensors_again.keys()
    assert all(t.dtype == tensors_again[n].dtype and torch.equal(t, tensors_again[n]) for n, t in tensors.items())
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_that_of_everything_but_the_codes(packed, dtype):
    model = load(packed, dtype=dtype, device_map="cpu")
    state = model.state_dict()
    codes = {name for name, t in state.items() if t.dtype == torch.int32}
    assert len(codes) == 28
    assert {state[name].dtype for name in state.keys() - codes} == {dtype}
    assert model(IDS).logits.dtype == dtype


def test_other_classes_find_their_layers_in_the_same_folder(packed):
    base = AutoModel.from_pretrained(packed)
    assert len(list(seed_linears(base))) == 14
    assert torch.equal(base(IDS).last_hidden_state, load(packed).model(IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(packed)
    assert isinstance(classifier.score, torch.nn.Linear)


def test_a_dequantized_model_is_an_ordinary_one(packed, tmp_path):
    model = load(packed)
    logits = model(IDS).logits
    model.dequantize().save_pretrained(tmp_path)
    config, tensors = read(tmp_path)
    assert "quantization_config" not in config
    assert not config.get("fusion_config")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    plain = load(tmp_path)
    assert not any(isinstance(m, SeedLinear) for m in plain.modules())
    assert torch.equal(plain(IDS).logits, logits)


def test_a_dense_folder_is_compressed_while_it_loads(dense, packed, tmp_path):
    model = load(dense, quantization_config=hf.SeedLMConfig(format=FORMAT.spec))
    assert torch.equal(model(IDS).logits, load(packed)(IDS).logits)
    model.save_pretrained(tmp_path)
    assert read(tmp_path)[0]["quantization_config"] == {**read(packed)[0]["quantization_config"], "format_version": 2}
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


def test_adapters_and_compilers_find_a_model_they_can_work_on(packed):
    model = load(packed)
    assert (model.hf_quantizer.is_trainable, model.hf_quantizer.is_serializable()) == (True, True)
    hidden = torch.randn(1, 3, 64, requires_grad=True)
    model.model.layers[0](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(3)[None]))[0].sum().backward()
    assert hidden.grad.abs().sum() > 0


Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, t: t[f"{Q_PROJ}.weight"][3].zero_(), f"{Q_PROJ}: .* seed 0, the first at row 3"),
        (lambda c, t: t[f"{Q_PROJ}.weight_exponent_bias"].fill_(500), f"{Q_PROJ}: exponent bias must be"),
        (lambda c, t: t.pop(f"{Q_PROJ}.weight"), rf"{Q_PROJ}\.weight is missing, it holds the words"),
        (lambda c, t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:, 1:].contiguous()}), r"got I32 \[64, 5\]"),
        (lambda c, t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].float()}), "got .*F32"),
        (lambda c, t: t.update({"model.layers.7.up.weight_exponent_bias": torch.zeros(1)}), "layers.7.up.* looks like"),
        (lambda c, t: [t.pop(n) for n in list(t) if "exponent" in n], "_exponent_bias is missing"),
        (lambda c, t: c["quantization_config"].update(format_version=5), "format_version must be 1 .. 4, got 5"),
        (lambda c, t: c["quantization_config"].update(surprise=1), "config.json, quantization_config: .*no option 'surprise'"),
        (lambda c, t: c["quantization_config"]["format"].update(seed_bits=99), "seed_bits must be"),
    ],
    ids=["seed", "bias", "missing", "width", "dtype", "stranger", "nothing", "version", "option", "format"],
)
def test_a_damaged_folder_is_refused(packed, tmp_path, damage, message):
    config, tensors = read(packed)
    damage(config, tensors)
    with pytest.raises((CheckpointError, FormatError), match=message):
        load(write(tmp_path, config, tensors, metadata_of(packed)))


def test_an_option_that_transformers_would_ignore_says_what_to_do():
    with pytest.raises(FormatError, match=r"no option dequantize; .*model\.dequantize\(\)"):
        hf.SeedLMConfig(dequantize=True)


PLAIN = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline
ways = {
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "class": lambda folder: LlamaForCausalLM.from_pretrained(folder),
    "base": lambda folder: AutoModel.from_pretrained(folder),
    "dtype": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"),
    "mismatched": lambda folder: LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
    "pipeline": lambda folder: pipeline("text-generation", model=folder),
}
for folder in sys.argv[1:]:
    for name, way in ways.items():
        try:
            way(folder)
            print(folder, "LOADED", name)
        except Exception as error:
            print(folder, "FAILED", name, " ".join(str(error).split()))
assert "seedlm" not in sys.modules
"""


@pytest.fixture(scope="module")
def plain(packed, tmp_path_factory, forked):
    """What transformers says when it opens the packed folder, and it without its guard, every way without this package."""
    config, tensors = read(packed)
    del config["fusion_config"]
    bare = write(tmp_path_factory.mktemp("bare"), config, tensors, metadata_of(packed))
    run = subprocess.run(
        forked(packed, bare, code=PLAIN, bare=True),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    said = [line.partition(" ") for line in run.stdout.splitlines()]
    return [[text for place, _, text in said if place == str(folder)] for folder in (packed, bare)]


def test_without_the_import_every_way_of_loading_fails_and_says_what_to_install(plain):
    lines = plain[0]
    assert len(lines) == 6
    for line in lines:
        assert line.startswith("FAILED")
        assert "pip install seedlm" in line
        assert "import seedlm" in line


def test_without_the_guard_the_shapes_still_keep_random_weights_out(plain):
    lines = plain[1]
    assert len(lines) == 6
    assert [line.split()[:2] for line in lines if line.startswith("LOADED")] == [["LOADED", "mismatched"]]


def test_registering_again_does_nothing():
    hf.register()
    hf.register()
