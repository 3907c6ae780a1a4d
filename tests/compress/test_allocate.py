"""Formats under a budget of bits: the greedy choice against all there are, and a model compressed by it."""

import itertools
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from seedlm.codes.block.search import torch_search
from seedlm.codes.registry import parse_format
from seedlm.compress.allocate import Mixture, allocate
from seedlm.compress.run import compress_checkpoint
from seedlm.errors import FormatError, OutputError
from seedlm.modeling.quantize import seed_linears
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.inspect import inspect_checkpoint
from tiny_models import folder_bytes, tiny_llama

LOW, MIDDLE, HIGH = map(parse_format, ("block-k8-c12-p3-q4-e4", "block-k8-c8-p3-q4-e4", "block-k8-c4-p2-q4-e4"))
FORMATS = {LOW: 0.4, MIDDLE: 0.2, HIGH: 0.05}
"""2, 3 and 5 bits a weight; 255 seeds, so that a search takes no time. The errors are made up."""

CONVEX = [(2, 0.12), (3, 0.047), (4, 0.0147), (5, 0.005)]


def problem(seed, convex):
    """Choices of five weights of all sizes and sensitivities; if not convex, errors that follow no order."""
    rng = random.Random(seed)
    choices = []
    for _ in range(5):
        size, sensitivity = rng.randint(1, 9), 10 ** rng.uniform(-2, 2)
        choices.append([(bits * size, sensitivity * (error if convex else rng.random())) for bits, error in CONVEX])
    return choices


def totals(choices, chosen):
    bits, losses = zip(*(options[choice] for options, choice in zip(choices, chosen, strict=True)), strict=True)
    return sum(bits), sum(losses)


def brute_force(choices):
    """The least loss for every budget up to the largest."""
    least = {}
    for chosen in itertools.product(*(range(len(options)) for options in choices)):
        bits, loss = totals(choices, chosen)
        least[bits] = min(loss, least.get(bits, loss))
    budgets = range(min(least), max(least) + 1)
    return dict(zip(budgets, itertools.accumulate((least.get(bits, float("inf")) for bits in budgets), min), strict=True))


@pytest.mark.parametrize("convex", [True, False], ids=["convex", "any"])
@pytest.mark.parametrize("seed", range(5))
def test_every_budget_is_kept_and_missed_by_less_than_one_upgrade(seed, convex):
    choices = problem(seed, convex)
    upgrade = max(max(loss for _, loss in options) - min(loss for _, loss in options) for options in choices)
    exact = 0
    for budget, least in brute_force(choices).items():
        bits, loss = totals(choices, allocate(choices, budget))
        assert bits <= budget
        assert least <= loss * (1 + 1e-12)
        assert loss <= least + upgrade
        exact += loss <= least * (1 + 1e-12)
    assert exact >= 5  # the states that the greedy way passes through before something no longer fits


def test_where_every_upgrade_fits_the_choice_is_the_best_there_is():
    """Weights of equal size: no budget leaves a gap."""
    rng = random.Random(0)
    for _ in range(5):
        sensitivities = [10 ** rng.uniform(-2, 2) for _ in range(5)]
        choices = [[(bits, sensitivity * error) for bits, error in CONVEX] for sensitivity in sensitivities]
        for budget, least in brute_force(choices).items():
            bits, loss = totals(choices, allocate(choices, budget))
            assert bits == budget
            assert loss == pytest.approx(least, rel=1e-12)


def test_a_budget_below_the_smallest_choices_is_refused():
    with pytest.raises(ValueError, match="1 bits short"):
        allocate([[(3, 1.0)], [(4, 1.0)]], 6)


def test_bits_go_where_they_matter():
    shapes = dict.fromkeys("abcd", (8, 96))
    sensitivity = {"a": 0.0, "b": 100.0, "c": 1.0, "d": 1.1}
    assert Mixture(bits=3.2, sensitivity=sensitivity, formats=FORMATS).assign(shapes) == {
        "a": LOW,
        "b": HIGH,
        "c": LOW,
        "d": MIDDLE,
    }


@pytest.mark.parametrize("bits", [1.9, 2.04, 5.05])
def test_a_number_of_bits_out_of_reach_is_refused(bits):
    """The exponent bias of a tensor counts: its 32 bits are a twenty-fourth of a bit for each of these weights."""
    with pytest.raises(FormatError, match=r"has 2\.0417 to 5\.0417 bits a weight, got"):
        Mixture(bits=bits, sensitivity={"a": 1.0}, formats=FORMATS).assign({"a": (8, 96)})


def test_a_weight_without_a_sensitivity_is_named():
    with pytest.raises(FormatError, match=r"^b: has no sensitivity"):
        Mixture(bits=3, sensitivity={"a": 1.0}, formats=FORMATS).assign(dict.fromkeys("ab", (8, 96)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(folder, hidden_size=48, intermediate_size=96)
    return folder


@pytest.fixture(scope="module")
def mixture(dense):
    """Sensitivities that no order of names or shapes explains."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    sensitivity = {name: 10 ** random.Random(name).uniform(-2, 2) for name in names}
    return Mixture(bits=3.5, sensitivity=sensitivity, formats=FORMATS)


@pytest.fixture(scope="module")
def packed(dense, mixture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    compress_checkpoint(dense, folder, format=mixture, backend="torch")
    return folder


def test_a_mixture_meets_its_size(packed, mixture):
    report = inspect_checkpoint(packed)
    assert {tensor.format for tensor in report.tensors} == {format.spec for format in FORMATS}
    largest_step = 3 * 96 * 48 / report.compressed_weights
    assert 3.5 - largest_step < report.bits_per_weight <= 3.5
    formats = mixture.assign({tensor.module: tensor.shape for tensor in report.tensors})
    assert {tensor.module: tensor.format for tensor in report.tensors} == {name: f.spec for name, f in formats.items()}


def weight_files(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def answers():
    return {}


@pytest.fixture
def searched(answers, monkeypatch):
    """The search, which gives its answer again where it was asked the same before: sizes are what is looked at."""

    def search(blocks, *rest, real=torch_search.search):
        key = blocks.numpy().tobytes(), *rest
        if key not in answers:
            answers[key] = list(real(blocks, *rest))
        return iter(answers[key])

    monkeypatch.setattr(torch_search, "search", search)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 6000}, {"dtype": "float32"}], ids=["one", "shards", "dtype"])
def test_a_size_is_met_from_below_by_every_byte_of_the_weight_files(dense, mixture, tmp_path, options):
    """No further upgrade would have fitted; at both ends there are the smallest and the largest folder."""
    ends = []
    for name, format in (("low", LOW), ("high", HIGH)):
        compress_checkpoint(dense, tmp_path / name, format=format, backend="torch", **options)
        ends.append(weight_files(tmp_path / name))
    step = 3 * 96 * 48 // 8 + 100  # a matrix from 2 to 5 bits, and what the header then says of it
    for size in (*ends, *(ends[0] + (ends[1] - ends[0]) * part // 7 for part in range(1, 7))):
        out = tmp_path / str(size)
        compress_checkpoint(
            dense, out, format=Mixture(size=size, sensitivity=mixture.sensitivity, formats=FORMATS), backend="torch", **options
        )
        assert size - step < weight_files(out) <= size
        if size in ends:
            assert weight_files(out) == size
    for size in (ends[0] - 1, ends[1] + 1):
        asked = Mixture(size=size, sensitivity=mixture.sensitivity, formats=FORMATS)
        with pytest.raises(FormatError, match=rf"have {ends[0]:,} to {ends[1]:,} bytes, got {size:,}"):
            compress_checkpoint(dense, tmp_path / "no", format=asked, backend="torch", **options)
    assert not list(tmp_path.glob("no*"))


def test_a_mixture_has_bits_or_a_size():
    for both in ({}, {"bits": 3.5, "size": 1000}):
        with pytest.raises(FormatError, match="either bits or a size"):
            Mixture(**both)


def test_what_is_out_of_reach_is_refused_before_the_model_is_observed(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("seedlm.compress.run.gather", lambda *_: pytest.fail("observed"))
    for asked in (Mixture(size=10_000), Mixture(size=10**9), Mixture(bits=2.001), Mixture(bits=12)):
        with pytest.raises(FormatError, match=r"have .* bytes, got|has .* bits a weight, got"):
            compress_checkpoint(dense, tmp_path / "out", format=asked)
    assert not list(tmp_path.iterdir())


def test_a_mixture_loads_through_transformers(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    checkpoint = Checkpoint.open(packed)
    layers = dict(seed_linears(model))
    assert layers.keys() == checkpoint.packed.keys()
    for name, layer in layers.items():
        assert layer.format == checkpoint.packed[name].format
        assert torch.equal(layer.dequantize(), checkpoint.tensor(name).dequantize())
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_stopped_run_keeps_its_formats(dense, mixture, packed, tmp_path):
    def stop(phase, done, total):
        if phase == "compress" and done > total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(dense, out, format=mixture, backend="torch", on_progress=stop)
    other = Mixture(bits=3.5, sensitivity=dict.fromkeys(mixture.sensitivity, 1.0), formats=FORMATS)
    with pytest.raises(OutputError, match="overrides"):
        compress_checkpoint(dense, out, format=other, backend="torch")
    compress_checkpoint(dense, out, format=mixture, backend="torch")
    assert folder_bytes(out) == folder_bytes(packed)


def test_the_majority_of_modules_need_no_override(packed):
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert len(config["overrides"]) < 14
    assert config["format"] not in config["overrides"].values()


def test_a_weight_that_counted_for_nothing_counts_as_the_least_of_the_others():
    shapes = dict.fromkeys("abcd", (12, 24))
    named = {"a": 9.0, "b": 3.0, "c": 1.0}
    for bits in (3, 3.5, 4, 4.5):
        with_zero = Mixture(bits=bits, sensitivity={**named, "d": 0.0}, formats=FORMATS).assign(shapes)
        assert with_zero == Mixture(bits=bits, sensitivity={**named, "d": 1.0}, formats=FORMATS).assign(shapes)
    nothing = Mixture(bits=5, sensitivity=dict.fromkeys("abcd", 0.0), formats=FORMATS).assign(shapes)
    assert LOW not in nothing.values()  # bits that are there are spent


@pytest.mark.parametrize("bits", [5, 7])
@pytest.mark.parametrize("turned", [False, True])
def test_a_mixture_of_two_families_opens_by_whichever_leads(dense, mixture, tmp_path, turned, bits):
    formats = {MIDDLE: 0.2, parse_format("6-fast"): 0.0005}
    formats = dict(reversed(formats.items())) if turned else formats
    both = Mixture(bits=bits, sensitivity=mixture.sensitivity, formats=formats)
    compress_checkpoint(dense, tmp_path / "out", format=both, feedback="none", backend="auto", device="cpu")
    families = {packed.format.family for packed in Checkpoint.open(tmp_path / "out").packed.values()}
    assert families == {"block", "trellis"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.arange(8)[None]).logits.isfinite().all()
