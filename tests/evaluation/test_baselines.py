"""Baselines: the libraries' own numbers on normal weights, bits counted to the last table, and only our modules touched.

The reference errors are squared errors of N(0,1) measured by independent code for the same quantisers.
"""

import importlib.util
import sys

import pytest
import torch

from seedlm.codes.block.format import PRESETS
from seedlm.errors import EvaluationError
from seedlm.evaluation.baselines import apply_baseline, divisor, round_trip
from seedlm.evaluation.methods import METHODS, baseline_names, parse_baseline
from seedlm.evaluation.perplexity import perplexity
from seedlm.evaluation.run import Settings, evaluate
from seedlm.evaluation.text import Text
from seedlm.integrations.transformers import models
from seedlm.modeling.quantize import choose_modules
from tiny_models import STORIES

NORMAL_ERRORS = {
    "rtn-4": 0.0101,
    "rtn-3": 0.0464,
    "rtn-2": 0.253,
    "mse-4": 0.0104,
    "nf4-4": 0.0085,
    "hqq-4": 0.0074,
    "higgs-4": 0.0080,
    "higgs-3": 0.0299,
    "higgs-2": 0.1080,
}
MODULES = {"llmcompressor": "llmcompressor", "bitsandbytes": "bitsandbytes", "hqq": "hqq", "transformers": "transformers"}


def stored_bits(name: str, rows: int, columns: int) -> float:
    """Bits of a weight [rows, columns], columns a multiple of 512, by each method's own definition."""
    method, _, bits = name.rpartition("-")
    codes, numbers = int(bits) * rows * columns, rows * columns
    return {
        "rtn": codes + numbers / 128 * (16 + int(bits)),
        "mse": codes + numbers / 128 * 16,
        "nf4": codes + numbers / 64 * 8 + numbers / 64 / 256 * 32 + 32,
        "hqq": codes + numbers / 64 * 32,
        "higgs": codes + numbers / 256 * 16 + 4 ** int(bits) * 2 * 16,
    }[method]


def needs_library(name: str) -> None:
    for library in METHODS[name.rpartition("-")[0]].libraries:
        module = MODULES.get(library, library.replace("-", "_"))
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("name", NORMAL_ERRORS)
def test_normal_weights_lose_what_the_quantiser_must(name):
    needs_library(name)
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(1))
    found, bits = round_trip(weight, name)
    error = float((found - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(NORMAL_ERRORS[name], rel=0.06)
    assert bits == stored_bits(name, 128, 1024)


def test_rows_of_any_length_keep_their_shape_and_their_scale():
    weight = torch.randn(5, 172, generator=torch.Generator().manual_seed(2)) * 1e-3
    found, bits = round_trip(weight, "higgs-4")
    assert found.shape == weight.shape
    assert float((found - weight).norm() / weight.norm()) < 0.12
    assert bits == 5 * 192 * 4 + 16 * (5 * 3 + 512)  # padded to blocks of 64


def test_only_the_modules_that_we_compress_are_touched():
    model = models.load_model(STORIES, device=torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    facts = apply_baseline(model, "higgs-3")
    chosen = {f"{name}.weight" for name in choose_modules(model, PRESETS["4"])}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == chosen
    error = sum(float((before[name] - model.get_parameter(name)).square().sum()) for name in chosen)
    norm = sum(float(before[name].square().sum()) for name in chosen)
    assert facts["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-5)
    assert facts["weights"] == sum(before[name].numel() for name in chosen)
    assert facts["calibrated"] is False


@pytest.mark.parametrize(("features", "largest", "expected"), [(4096, 128, 128), (576, 128, 96), (172, 128, 86), (7, 128, 7)])
def test_groups_divide_the_row(features, largest, expected):
    assert divisor(features, largest) == expected


@pytest.mark.parametrize("name", ["nf4-3", "nf4", "hqq-8", "4", ""])
def test_an_unknown_baseline_is_refused_with_the_known_ones(name):
    with pytest.raises(EvaluationError, match=r"unknown baseline .*known are rtn-channel-4"):
        parse_baseline(name)


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """All libraries of all baselines, as far as their metadata goes."""
    for library in {library for method in METHODS.values() for library in method.libraries}:
        folder = tmp_path / f"{library.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # where metadata of packages is looked for
    for name in baseline_names():
        with pytest.raises(EvaluationError, match=r"needs [a-z0-9-]+: pip install '\.\[baselines\]' in a copy"):
            parse_baseline(name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["awq-4", "exl3-3.5"])
def test_what_needs_a_gpu_says_so(libraries, name):
    with pytest.raises(EvaluationError, match=f"{name} needs a GPU"):
        parse_baseline(name)


def test_bits_are_read_as_they_are_written(libraries, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert [parse_baseline(name)[2] for name in ("exl3-4", "exl3-3.5", "gptq-3")] == [4, 3.5, 3]
    for name in ("exl3-3.0", "exl3-", "exl3-1.5"):
        with pytest.raises(EvaluationError, match="unknown baseline"):
            parse_baseline(name)


def test_calibration_text_is_asked_for_exactly_where_it_is_used(libraries):
    with pytest.raises(EvaluationError, match="gptq-4 takes a calibration text"):
        Settings(baseline="gptq-4")
    with pytest.raises(EvaluationError, match="higgs-4 takes no calibration text"):
        Settings(baseline="higgs-4", calibration="text")
    with pytest.raises(EvaluationError, match="none was chosen"):
        Settings(calibration="text")
    assert Settings(baseline="gptq-4", calibration="text").baseline == "gptq-4"


def test_a_calibrated_baseline_has_no_single_weight(libraries):
    with pytest.raises(EvaluationError, match="gptq-4 is calibrated"):
        round_trip(torch.ones(2, 8), "gptq-4")


def test_evaluate_measures_the_quantised_model_and_says_how_it_was_made(tmp_path):
    (tmp_path / "text").write_text("Once upon a time there was a little girl named Lily. " * 12)
    settings = Settings(context=32, limit=2, device="cpu", dtype="float32", baseline="higgs-3")
    results = evaluate(str(STORIES), Text.from_file(tmp_path / "text"), settings, reference=str(STORIES))
    model = models.load_model(STORIES, device=torch.device("cpu"))
    facts = apply_baseline(model, "higgs-3")
    token_ids = torch.tensor(models.load_tokenizer(STORIES)((tmp_path / "text").read_text())["input_ids"])
    assert results["metrics"]["perplexity"]["mean"] == pytest.approx(perplexity(model, token_ids, context=32, limit=2).mean)
    assert results["metrics"]["kl"]["mean"] > 0.01
    assert results["run"]["baseline"] == facts
