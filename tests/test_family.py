"""The seam: a family that only tests know goes through everything that the package does with codes."""

import json
import signal
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

import toy_family
from seedlm import Mixture, compress_checkpoint, compress_model, dequantize_model, encode, inspect_checkpoint
from seedlm.codes.base import stored_bits
from seedlm.codes.registry import family, parse_format
from seedlm.errors import CheckpointError, FormatError
from seedlm.evaluation.run import Settings, evaluate
from seedlm.evaluation.text import Text
from seedlm.integrations.transformers.quantizer import SeedLMConfig
from seedlm.storage.checkpoint import Checkpoint
from tiny_models import STORIES, STORY, folder_bytes, tiny_llama

TOY = toy_family.ToyFormat(4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "dense"
    tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense):
    compress_checkpoint(dense, dense.with_name("packed"), format=TOY, device="cpu")
    return dense.with_name("packed")


def test_a_matrix_is_encoded_and_dequantized():
    weight = torch.randn(6, 20) * 1e-6
    encoded, error = encode(weight, "toy-4")
    assert error == pytest.approx(float((encoded.dequantize() - weight).square().sum()), rel=1e-4)
    assert error < 0.02 * float(weight.square().sum())


def test_a_checkpoint_holds_parts_of_rows_and_of_tensors_in_their_dtypes(packed, dense):
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["flavour"] == "plain"
    assert "rounding" not in config
    report = inspect_checkpoint(packed)
    assert {tensor.format for tensor in report.tensors} == {"toy-4"}
    assert all(8 < tensor.bits_per_weight < 11 for tensor in report.tensors)  # int8 stands for 4 bits in a toy
    assert 0 < report.relative_error < 0.2
    opened = Checkpoint.open(packed)
    module = report.tensors[0].module
    assert [str(part.dtype) for part in opened.tensor(module).parts.values()] == [
        "torch.int8",
        "torch.float32",
        "torch.float32",
    ]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(dense, packed, tmp_path, forked):
    script = (
        "import os, signal, toy_family; from seedlm import compress_checkpoint\n"
        "from seedlm.compress.workfolder import WorkFolder\n"
        "real = WorkFolder.finish_tensor\n"
        "def finish(self, *arguments, **facts):\n"
        "    real(self, *arguments, **facts)\n"
        "    if len(self.done) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "WorkFolder.finish_tensor = finish\n"
        f"compress_checkpoint({str(dense)!r}, {str(tmp_path / 'out')!r}, format='toy-4', device='cpu')\n"
    )
    killed = subprocess.run(forked(code=script), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    compress_checkpoint(dense, tmp_path / "out", format=TOY, device="cpu")
    assert folder_bytes(tmp_path / "out") == folder_bytes(packed)


def test_it_loads_generates_saves_and_loads_again(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = model(ids).logits
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
    for name, part in Checkpoint.open(packed).files.entries.items():
        assert torch.equal(Checkpoint.open(packed).files.read(name), Checkpoint.open(tmp_path / "saved").files.read(name)), part
    dequantize_model(again, again.dtype)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, logits)


@pytest.mark.parametrize("spec", ["toy-4", "toy-3"])
def test_float_parts_survive_half_and_bfloat16(dense, tmp_path, spec):
    compress_checkpoint(dense, tmp_path / "packed", format=spec, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    opened = Checkpoint.open(tmp_path / "packed")
    module = next(iter(opened.packed))
    stored = opened.tensor(module).parts
    for converted in (model, torch.nn.Module.half(model), torch.nn.Module.double(model)):
        parts = converted.get_submodule(module).parts
        assert all(torch.equal(parts[name], stored[name]) and parts[name].dtype == stored[name].dtype for name in stored)


def test_it_compresses_in_memory_and_while_loading(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    errors = compress_model(model, "toy-3")
    assert all(0 < error < 0.5 for error in errors.values())
    loaded = AutoModelForCausalLM.from_pretrained(dense, quantization_config=SeedLMConfig(format="toy-3"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_mixture_gives_modules_of_one_input_one_format(dense, packed, tmp_path):
    modules = Checkpoint.open(packed).packed
    sensitivity = {module: float(number) for number, module in enumerate(modules, 1)}
    shapes = [info.shape for info in modules.values()]
    weights = sum(rows * columns for rows, columns in shapes)
    bits = sum(stored_bits(format, *shape) for format in toy_family.FAMILY.mixture for shape in shapes) / 2 / weights
    mixture = Mixture(bits=bits, sensitivity=sensitivity, formats=toy_family.FAMILY.mixture)
    compress_checkpoint(dense, tmp_path / "out", format=mixture, device="cpu")
    formats = {tensor.module: tensor.format for tensor in inspect_checkpoint(tmp_path / "out").tensors}
    assert set(formats.values()) == {"toy-3", "toy-4"}
    for layer in {module.rpartition(".self_attn")[0] for module in formats if ".self_attn." in module}:
        assert len({formats[f"{layer}.self_attn.{leaf}_proj"] for leaf in "qkv"}) == 1
        assert len({formats[f"{layer}.mlp.{leaf}_proj"] for leaf in ("gate", "up")}) == 1


@pytest.mark.parametrize("settings", [{"flavour": "hot"}, {"rounding": "best"}], ids=str)
def test_settings_of_other_families_are_refused(dense, tmp_path, settings):
    with pytest.raises(FormatError, match=next(iter(settings))):
        compress_checkpoint(dense, tmp_path / "out", format=TOY, **settings)


def test_values_out_of_range_are_refused_by_the_family(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLM_VERIFY", "0")
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(packed / "model.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(name for name in tensors if name.endswith("weight_scales"))
    tensors[name][0] = 0
    for path in packed.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(CheckpointError, match="scales must be positive"):
        Checkpoint.open(tmp_path).tensor(name.removesuffix(".weight_scales"))
    with pytest.raises(CheckpointError, match="scales must be positive"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_name_is_given_once():
    assert family("toy") is toy_family.FAMILY
    assert parse_format("4", "toy") == TOY
    with pytest.raises(FormatError, match="exists already"):
        toy_family.registry.register(toy_family.ToyFamily())


def test_it_is_evaluated_against_the_original(tmp_path):
    compress_checkpoint(STORIES, tmp_path / "packed", format=TOY, device="cpu")
    text = Text(STORY * 8, "story.txt", "a story")
    found = evaluate(str(tmp_path / "packed"), text, Settings(context=64, limit=2, device="cpu"), reference=str(STORIES))
    assert found["model"]["format"] == "toy-4"
    assert 0 < found["metrics"]["kl"]["mean"] < 0.5
