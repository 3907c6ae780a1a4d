"""Evaluation: held against a float64 computation that shares nothing with it, and stopped, resumed and misused."""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import test_source
from seedlm import compress_checkpoint, evaluate, inspect_checkpoint, layers, measure, models, prompts, records
from seedlm.errors import BackendError, EvaluationError, OutputError, SourceError
from seedlm.evaluate import Settings, Text
from tiny_models import SMALL, tiny_llama

STORIES = Path(__file__).parent / "data" / "stories260k"
COMMAND = [sys.executable, "-m", "seedlm", "evaluate"]
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
CPU = {"device": "cpu"}


def straightforward(model, windows, reference=None):
    """Per prediction, in plain float64: nll, top1, and against a reference kl, reference_nll, reference_top1."""
    records = []
    for window in windows.tolist():
        distributions = []
        for network in (model, reference) if reference is not None else (model,):
            with torch.no_grad():
                logits = copy.deepcopy(network).double()(torch.tensor([window])).logits[0].numpy()
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            distributions.append(weights / weights.sum(axis=1, keepdims=True))
        rows = []
        for place, token in enumerate(window[1:]):
            ours = distributions[0][place]
            row = [-math.log(ours[token]), int(np.argmax(ours))]
            if reference is not None:
                theirs = distributions[1][place]
                kl = sum(p * math.log(p / q) for p, q in zip(theirs.tolist(), ours.tolist(), strict=True))
                row += [kl, -math.log(theirs[token]), int(np.argmax(theirs))]
            rows.append(row)
        records.append(rows)
    return np.array(records)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two random Llamas of one vocabulary."""
    folder = tmp_path_factory.mktemp("pair")
    return [tiny_llama(folder / str(seed), dtype=torch.float32, seed=seed).eval() for seed in (0, 1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """stories260K, and the same compressed with few seeds: near enough to compare, far enough to differ."""
    packed = tmp_path_factory.mktemp("models") / "packed"
    compress_checkpoint(STORIES, packed, format=SMALL, backend="torch")
    return STORIES, packed


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY * 8)
    return Text.from_file(path)


class TestMeasure:
    @pytest.mark.parametrize("chunk", [measure._CHUNK, 1, 64 * 3], ids=["one-chunk", "row-by-row", "three-rows"])
    @pytest.mark.parametrize(("context", "batch_size"), [(7, 1), (7, 3), (2, 9), (30, 2)])
    def test_records_are_those_of_float64(self, pair, context, batch_size, chunk, monkeypatch):
        monkeypatch.setattr(measure, "_CHUNK", chunk)
        windows = measure.cut_windows(torch.randint(64, (61,), generator=torch.Generator().manual_seed(2)), context)
        scored = measure.score_windows(pair[0], windows, reference=pair[1], batch_size=batch_size)
        records = np.concatenate([records for records, _ in scored])
        expected = straightforward(pair[0], windows, pair[1])
        assert records.shape == expected.shape[:2] == (61 // context, context - 1)
        for column, field in enumerate(measure.PAIR_RECORD.names):
            np.testing.assert_allclose(records[field], expected[..., column], rtol=2e-6, atol=2e-6, err_msg=field)
        alone = np.concatenate([records for records, _ in measure.score_windows(pair[0], windows, batch_size=batch_size)])
        assert alone.dtype == measure.RECORD
        assert all((alone[field] == records[field]).all() for field in measure.RECORD.names)

    def test_means_and_errors(self, pair):
        windows = measure.cut_windows(torch.randint(64, (50,), generator=torch.Generator().manual_seed(3)), 10)
        expected = straightforward(pair[0], windows, pair[1])
        records = np.concatenate([records for records, _ in measure.score_windows(pair[0], windows, reference=pair[1])])
        found = measure.summarize(records)

        def check(name, per_window, exponential=False):
            mean, error = statistics.mean(per_window), statistics.stdev(per_window) / math.sqrt(5)
            if exponential:
                mean, error = math.exp(mean), math.exp(mean) * error
            assert (found[name].mean, found[name].standard_error) == pytest.approx((mean, error), rel=1e-5, abs=1e-7)

        nll, _, kl, other, _ = expected.mean(axis=1).T.tolist()
        check("nll", nll)
        check("perplexity", nll, exponential=True)
        check("kl", kl)
        check("reference_nll", other)
        check("reference_perplexity", other, exponential=True)
        check("perplexity_ratio", [a - b for a, b in zip(nll, other, strict=True)], exponential=True)
        check("top1_agreement", (expected[..., 1] == expected[..., 4]).mean(axis=1).tolist())
        assert found.keys() == {"nll", "perplexity", "kl", "reference_nll", "reference_perplexity", "perplexity_ratio"} | {
            "top1_agreement"
        }

    def test_perplexity_is_gptqs(self, pair):
        """GPTQ's arithmetic: each window's mean loss times the context, summed, over windows times context."""
        tokens = torch.randint(64, (35,), generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            losses = [pair[0](w[None], labels=w[None]).loss * 8 for w in tokens[:32].view(4, 8)]
        expected = math.exp(sum(losses) / (4 * 8))
        assert measure.perplexity(pair[0], tokens, context=8).mean == pytest.approx(expected, rel=1e-5)
        fewer = math.exp(sum(losses[:2]) / (2 * 8))
        assert measure.perplexity(pair[0], tokens, context=8, limit=2).mean == pytest.approx(fewer, rel=1e-5)

    def test_one_window_has_no_error(self, pair):
        assert measure.perplexity(pair[0], torch.arange(9), context=8).standard_error is None

    def test_a_model_equals_itself(self, pair):
        records = next(measure.score_windows(pair[0], torch.arange(12).view(2, 6), reference=pair[0], batch_size=2))[0]
        found = measure.summarize(records)
        assert (found["kl"].mean, found["top1_agreement"].mean, found["perplexity_ratio"].mean) == (0.0, 1.0, 1.0)
        assert found["perplexity_ratio"].standard_error == 0.0

    def test_predictions_that_are_not_finite_are_refused(self, tmp_path):
        model = tiny_llama(tmp_path / "m", dtype=torch.float32).eval()
        model.lm_head.weight.data[5, 0] = math.inf
        with pytest.raises(EvaluationError, match="window 3: the model's log likelihood is not finite; float16 overflows"):
            list(measure.score_windows(model, torch.arange(20).view(5, 4), start=3))

    def test_other_vocabularies_are_refused(self, pair, tmp_path):
        other = tiny_llama(tmp_path / "m", dtype=torch.float32, vocab_size=70).eval()
        with pytest.raises(EvaluationError, match="the reference scores 70 tokens, the model 64"):
            list(measure.score_windows(pair[0], torch.arange(8).view(2, 4), reference=other))

    @pytest.mark.parametrize(
        ("context", "limit", "message"),
        [(1, None, "at least 2 tokens"), (5, 0, "at least 1 window"), (11, None, "has 10 tokens, one window needs 11")],
    )
    def test_impossible_windows_are_refused(self, context, limit, message):
        with pytest.raises(EvaluationError, match=message):
            measure.cut_windows(torch.arange(10), context, limit)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_a_gpu_gives_the_same(self, pair):
        windows = torch.randint(64, (6, 9), generator=torch.Generator().manual_seed(5))
        expected = straightforward(pair[0], windows, pair[1])
        try:
            scored = measure.score_windows(pair[0].cuda(), windows, reference=pair[1].cuda(), batch_size=4)
            records = np.concatenate([records for records, _ in scored])
        finally:
            pair[0].cpu(), pair[1].cpu()
        for column, field in enumerate(measure.PAIR_RECORD.names):
            np.testing.assert_allclose(records[field], expected[..., column], rtol=1e-5, atol=1e-5, err_msg=field)


class Foreign(torch.nn.Module):
    """Another library's layer: it computes like a linear one and has nothing else in common with it."""

    def __init__(self, linear):
        super().__init__()
        self.hidden = [linear.weight.detach().double(), None if linear.bias is None else linear.bias.detach().double()]

    def forward(self, x):
        return torch.nn.functional.linear(x.double(), *self.hidden).to(x.dtype)


class TestLayers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("foreign", [False, True], ids=["linear", "foreign"])
    def test_errors_are_those_of_the_definition(self, tmp_path, monkeypatch, foreign, dtype):
        monkeypatch.setattr(layers, "_PROBE", 44 * 7)
        reference = tiny_llama(tmp_path / "m", dtype=dtype, attention_bias=True).eval()
        for name, parameter in reference.named_parameters():
            if name.endswith("bias"):
                parameter.data.uniform_(-100, 100)
        model = copy.deepcopy(reference)
        torch.manual_seed(7)
        changed = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.k_proj", "mlp.down_proj")]
        for name in changed:
            linear = model.get_submodule(name)
            linear.weight.data += 0.1 * linear.weight.std() * torch.randn_like(linear.weight)
            if foreign:
                model.set_submodule(name, Foreign(linear))
        windows = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))
        given, states = {}, []
        for network in (model, reference):
            if network is reference:
                for name in changed:
                    network.get_submodule(name).register_forward_hook(
                        lambda module, inputs, output, name=name: given.setdefault(name, []).append((inputs[0], output))
                    )
            with torch.no_grad():
                found = [network(w[None], output_hidden_states=True).hidden_states[1:] for w in windows]
            states.append([torch.cat(layer)[:, 1:].double() for layer in zip(*found, strict=True)])
        result = layers.compare_layers(model, reference, windows)
        rows = {row.pop("module"): row for row in result["linears"]}
        assert len(rows) == 15  # the head too
        assert rows["model.layers.0.mlp.down_proj"]["shape"] == [32, 44]
        for name, row in rows.items():
            if name not in changed:
                assert (row["weight_error"], row["output_error"]) == (0.0, 0.0)
                continue
            theirs, ours = reference.get_submodule(name), model.get_submodule(name)
            weight = theirs.weight.double()
            difference = (ours.hidden[0] if foreign else ours.weight.double()) - weight
            expected = float((difference.norm() / weight.norm()).detach())
            assert row["weight_error"] == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.02)
            with torch.no_grad():
                outputs = [(ours(x).double()[0, 1:], y.double()[0, 1:]) for x, y in given[name]]
            top, bottom = (
                sum(float(y.square().sum()) for y in part) for part in ([a - b for a, b in outputs], [b for _, b in outputs])
            )
            assert row["output_error"] == pytest.approx((top / bottom) ** 0.5, rel=1e-5)
        expected = [float((a - b).norm() / b.norm()) for a, b in zip(*states, strict=True)]
        assert result["hidden"] == pytest.approx(expected, rel=1e-5)
        assert not any(reference.get_submodule(name)._forward_hooks for name in rows if name not in changed)


class TestRecords:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, folders, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        (folder / "text").write_text(STORY * 8)
        settings = Settings(context=32, prompts=("Once upon a time", "Lily"), new_tokens=5, layers=1, **CPU)
        results = evaluate.evaluate(
            str(folders[1]),
            Text.from_file(folder / "text"),
            settings,
            reference=str(folders[0]),
            out=folder / "run.json",
            tokens_out=folder / "run.npz",
        )
        return folder, results

    def test_they_hold_what_was_seen(self, run, folders):
        folder, results = run
        found = records.read_records(results, folder / "run.json")
        every = np.load(folder / "run.npz")
        for field in ("token_ids", "top1", "reference_top1"):
            assert (np.array(found["tokens"][field]) == every[field]).all()
        for field in ("nll", "kl", "reference_nll"):
            np.testing.assert_allclose(found["tokens"][field], every[field], rtol=1e-3)
        pieces = found["tokens"]["pieces"]
        assert "".join(pieces[str(token)] for token in every["token_ids"].ravel()[1:]).startswith(f" {STORY}")
        changes = every["nll"] - every["reference_nll"]
        histogram = found["distributions"]["nll_change"]
        assert sum(histogram["counts"]) == sum(found["distributions"]["kl"]["counts"]) == every["kl"].size
        assert histogram["counts"][-1] == (changes >= histogram["edges"][-2]).sum()
        errors = {row["module"]: row["weight_error"] for row in found["layers"]["linears"]}
        for tensor in inspect_checkpoint(folders[1]).tensors:
            assert errors[tensor.module] == pytest.approx(tensor.relative_error, rel=1e-4)
        assert errors["lm_head"] == 0
        assert len(found["layers"]["hidden"]) == 5
        first = found["prompts"][0]
        assert (first["prompt"], first["reference_text"]) == ("Once upon a time", ", there was a little")
        assert first["text"] != first["reference_text"]

    def test_another_file_is_refused_and_a_missing_one_is_none(self, run, tmp_path):
        folder, results = run
        assert records.read_records(results, tmp_path / "run.json") is None
        assert records.read_records({**results, "records": None}, folder / "run.json") is None
        (tmp_path / "run.records.json.gz").write_bytes(records.pack_records({}))
        with pytest.raises(EvaluationError, match=r"is not the file that .*run.json names \(its SHA-256 differs\)"):
            records.read_records(results, tmp_path / "run.json")

    def test_without_a_reference_they_say_less(self, folders, story, tmp_path):
        settings = Settings(context=32, limit=1, prompts=("Lily",), new_tokens=2, **CPU)
        results = evaluate.evaluate(str(folders[0]), story, settings, out=tmp_path / "run")
        found = records.read_records(results, tmp_path / "run")
        assert found["layers"] is None
        assert found["distributions"] == {}
        assert found["prompts"][0]["reference_text"] is None
        assert found["tokens"].keys() == {"token_ids", "top1", "nll", "pieces"}

    def test_prompts_from_a_file(self, tmp_path):
        (tmp_path / "prompts").write_text("One\n\n Two \n")
        assert prompts.read_prompts(tmp_path / "prompts") == ("One", " Two ")
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(EvaluationError, match="holds no prompts, one is expected on every line"):
            prompts.read_prompts(tmp_path / "empty")


class TestText:
    def test_wikitext_is_joined_as_the_papers_do(self, tmp_path):
        r"""Rows of the data set: "", " = A = \n", "", " One @-@ two . \n", " Three \n", ""."""
        path = tmp_path / "wiki.test.raw"
        path.write_bytes(b" \n = A = \n \n One @-@ two . \n Three \xc2\x85 \n \n")
        text = Text.from_wikitext(path)
        assert text.content == "\n\n = A = \n\n\n\n\n One @-@ two . \n\n\n Three \x85 \n\n\n"
        assert "joined by a blank line" in text.form
        assert Text.from_file(path).content == path.read_bytes().decode()
        assert Text.from_file(path).form == "the file as it is"

    def test_what_is_not_text_is_refused(self, tmp_path):
        with pytest.raises(EvaluationError, match="cannot be read \\(No such file"):
            Text.from_file(tmp_path / "none")
        (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
        with pytest.raises(EvaluationError, match="is not UTF-8 text \\(byte 3\\)"):
            Text.from_wikitext(tmp_path / "latin")


class TestRun:
    def test_a_packed_model_against_its_original(self, folders, story, tmp_path):
        source, packed = folders
        settings = Settings(context=32, batch_size=3, **CPU)
        out, tokens = tmp_path / "run.json", tmp_path / "tokens.npz"
        results = evaluate.evaluate(str(packed), story, settings, reference=str(source), out=out, tokens_out=tokens)
        assert json.loads(out.read_text()) == results
        assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.new"))

        ids = AutoTokenizer.from_pretrained(source)(STORY * 8)["input_ids"]
        windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
        models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (packed, source)]
        models[0] = models[0].dequantize()
        expected = straightforward(models[0], windows, models[1])
        record = np.load(tokens)
        assert set(record) == {"token_ids", *measure.PAIR_RECORD.names}
        assert (record["token_ids"] == windows.numpy()).all()
        for column, field in enumerate(measure.PAIR_RECORD.names):
            np.testing.assert_allclose(record[field], expected[..., column], rtol=1e-4, atol=1e-4, err_msg=field)
        metrics = {name: estimate["mean"] for name, estimate in results["metrics"].items()}
        assert metrics["nll"] == pytest.approx(expected[..., 0].mean(), rel=1e-5)
        assert metrics["kl"] == pytest.approx(expected[..., 2].mean(), rel=1e-4)
        assert metrics["kl"] > 0.1
        assert metrics["perplexity_ratio"] > 1.1
        assert 0.3 < metrics["top1_agreement"] < 1

        report = inspect_checkpoint(packed)
        described = results["model"]
        assert described["format"] == SMALL
        assert described["bits_per_weight"] == report.bits_per_weight
        assert described["model_bits_per_weight"] == report.model_bits_per_weight
        assert described["bytes"] == (packed / "model.safetensors").stat().st_size
        assert results["reference"]["format"] == "float32"
        assert results["reference"]["bits_per_weight"] == 32
        assert results["reference"]["weights"] == 260_032 == described["weights"]
        assert results["text"]["tokens"] == len(ids)
        assert results["text"]["windows"] == len(windows) == results["text"]["predictions"] // 31
        assert results["text"]["starts_with_bos"] is True
        assert results["run"]["dtype"] == results["run"]["reference_dtype"] == "float32"
        assert results["run"]["tokens_per_second"] > 0
        assert results["run"]["peak_memory_bytes"] > 1e7
        assert results["environment"]["device"] == "cpu"

    def test_packed_layers_give_the_same_and_stay_packed(self, folders, story, monkeypatch):
        from seedlm import models
        from seedlm.walk import seed_linears

        kept = []
        load = models.load_model
        monkeypatch.setattr(models, "load_model", lambda *a, **k: kept.append(load(*a, **k)) or kept[-1])
        runs = [
            evaluate.evaluate(str(folders[1]), story, Settings(context=64, limit=2, packed=packed, **CPU))
            for packed in (False, True)
        ]
        assert [len(list(seed_linears(model))) for model in kept] == [0, 35]
        assert runs[0]["metrics"]["nll"]["mean"] == pytest.approx(runs[1]["metrics"]["nll"]["mean"], rel=1e-6)

    def test_dtype_and_limit(self, folders, story):
        exact, rough = (
            evaluate.evaluate(str(folders[0]), story, Settings(context=32, limit=3, dtype=dtype, **CPU))
            for dtype in ("auto", "bfloat16")
        )
        assert (exact["run"]["dtype"], rough["run"]["dtype"]) == ("float32", "bfloat16")
        assert rough["text"]["windows"] == 3
        assert 0 < abs(exact["metrics"]["nll"]["mean"] - rough["metrics"]["nll"]["mean"]) < 0.05

    def test_the_same_run_gives_the_same_numbers(self, folders, story):
        first, second = (evaluate.evaluate(str(folders[0]), story, Settings(context=32, **CPU)) for _ in range(2))
        del first["run"], second["run"]
        assert first == second

    def test_a_gguf_file(self, tmp_path, capsys):
        pytest.importorskip("accelerate")
        test_source.TestGGUF.write(tmp_path / "m.gguf")
        (tmp_path / "text").write_text("ABCDEFGHIJ" * 5)
        results = evaluate.evaluate(str(tmp_path / "m.gguf"), Text.from_file(tmp_path / "text"), Settings(context=8, **CPU))
        assert "GGUF" not in capsys.readouterr().err
        assert results["model"]["format"] == "gguf Q4_1"
        assert results["model"]["bits_per_weight"] == 5.0
        assert results["run"]["dtype"] == "float32"
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
        model.is_quantized = False  # what forbids transformers to turn it to float64
        ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")("ABCDEFGHIJ" * 5)["input_ids"]
        expected = straightforward(model, torch.tensor(ids[: len(ids) // 8 * 8]).view(-1, 8))[..., 0].mean()
        assert results["metrics"]["nll"]["mean"] == pytest.approx(expected, rel=1e-5)


class Stop(Exception):
    """A user's hand."""


class TestResume:
    @pytest.fixture
    def stopped(self, folders, story, tmp_path):
        """A run stopped after two of its batches: its arguments."""
        arguments = [str(folders[1]), story, Settings(context=32, batch_size=2, **CPU)]
        options = {"reference": str(folders[0]), "out": tmp_path / "run.json", "tokens_out": tmp_path / "run.npz"}

        def stop(phase, done, total):
            if done == 2 * 2 * 32:
                raise Stop

        with pytest.raises(Stop):
            evaluate.evaluate(*arguments, **options, on_progress=stop)
        assert not options["out"].exists()
        return arguments, options

    @pytest.mark.parametrize(("cut", "windows"), [(0, 4), (100, 2), (10**9, 0)], ids=["whole", "torn-window", "torn-plan"])
    def test_a_stopped_run_goes_on_to_the_same_results(self, stopped, folders, tmp_path, cut, windows):
        arguments, options = stopped
        partial = tmp_path / "run.json.partial"
        content = partial.read_bytes()
        partial.write_bytes(content[:-cut] if 0 < cut < len(content) else content[:50] if cut else content)
        seen = []
        results = evaluate.evaluate(*arguments, **options, on_progress=lambda phase, done, total: seen.append(done))
        assert seen[0] == windows * 32
        assert results["run"]["resumed_windows"] == windows
        assert not partial.exists()
        elsewhere = {"out": tmp_path / "whole.json", "tokens_out": tmp_path / "whole.npz"}
        whole = evaluate.evaluate(*arguments, **{**options, **elsewhere})
        assert results["records"].pop("file") == "run.records.json.gz"
        assert whole["records"].pop("file") == "whole.records.json.gz"
        assert {**results, "run": None} == {**whole, "run": None}
        assert (tmp_path / "whole.npz").read_bytes() == options["tokens_out"].read_bytes()

    def test_other_arguments_are_refused(self, stopped, folders):
        (model, text, _), options = stopped
        with pytest.raises(OutputError, match="differs: settings context was 32, is now 16"):
            evaluate.evaluate(model, text, Settings(context=16, batch_size=2, **CPU), **options)
        with pytest.raises(OutputError, match="differs: model name was"):
            evaluate.evaluate(str(folders[0]), text, Settings(context=32, batch_size=2, **CPU), **options)

    def test_another_model_of_the_same_name_is_refused(self, stopped, folders, tmp_path):
        """Only weights differ, so every header is the same."""
        (_, text, settings), options = stopped
        shutil.copytree(folders[0], tmp_path / "m")
        options = {"out": tmp_path / "other.json"}

        def stop(phase, done, total):
            raise Stop

        for _ in range(2):
            with pytest.raises(Stop):
                evaluate.evaluate(
                    str(tmp_path / "m"), text, settings, **options, on_progress=lambda p, d, t: d and stop(p, d, t)
                )
        weights = tmp_path / "m" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(OutputError, match="differs: model fingerprint was"):
            evaluate.evaluate(str(tmp_path / "m"), text, settings, **options)

    def test_two_runs_do_not_share_an_output(self, stopped, tmp_path):
        fcntl = pytest.importorskip("fcntl")
        arguments, options = stopped
        with open(tmp_path / "run.json.partial", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(OutputError, match="another run is writing this output"):
                evaluate.evaluate(*arguments, **options)

    def test_a_strangers_file_is_left_alone(self, folders, story, tmp_path):
        (tmp_path / "run.json.partial").write_text("my notes\nmore notes\n")
        with pytest.raises(OutputError, match="is not from a run, or damaged"):
            evaluate.evaluate(str(folders[0]), story, Settings(context=32, **CPU), out=tmp_path / "run.json")
        assert (tmp_path / "run.json.partial").read_text() == "my notes\nmore notes\n"

    def test_an_existing_output_is_refused(self, folders, story, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(OutputError, match="exists already; choose another output"):
            evaluate.evaluate(str(folders[0]), story, out=tmp_path / "run.json")
        with pytest.raises(OutputError, match="no such folder"):
            evaluate.evaluate(str(folders[0]), story, tokens_out=tmp_path / "none" / "t.npz")

    def test_a_run_that_never_began_leaves_no_trace(self, folders, story, tmp_path):
        story = Text(story.content * 4, story.path, story.form)
        with pytest.raises(EvaluationError, match="the model knows 512 positions, a window has 600"):
            evaluate.evaluate(str(folders[0]), story, Settings(context=600, **CPU), out=tmp_path / "run.json")
        assert not list(tmp_path.glob("run.json*"))


class TestRefusals:
    def test_settings(self):
        for wrong, message in [
            ({"context": 1}, "context must be at least 2, got 1"),
            ({"limit": 0}, "limit must be at least 1, got 0"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ]:
            with pytest.raises(EvaluationError, match=message):
                Settings(**wrong)

    @pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
    def test_a_device_that_is_not_there(self, folders, story, device):
        with pytest.raises(BackendError, match=f"device '{device}' cannot be used here"):
            evaluate.evaluate(str(folders[0]), story, Settings(device=device))

    def test_a_model_without_a_tokenizer(self, story, tmp_path):
        tiny_llama(tmp_path / "m")
        with pytest.raises(SourceError, match="m: has no tokenizer that can be opened"):
            evaluate.evaluate(str(tmp_path / "m"), story)

    def test_a_text_shorter_than_a_window(self, folders, tmp_path):
        (tmp_path / "short").write_text("Once upon a time")
        with pytest.raises(EvaluationError, match="the text has 5 tokens, one window needs 64"):
            evaluate.evaluate(str(folders[0]), Text.from_file(tmp_path / "short"), Settings(context=64))

    def test_a_reference_with_another_tokenizer(self, folders, tmp_path):
        pytest.importorskip("gguf")
        test_source.TestGGUF.write(tmp_path / "m.gguf")
        (tmp_path / "text").write_text("ABCDEFGHIJ" * 5)
        with pytest.raises(EvaluationError, match="turn the text into different tokens"):
            evaluate.evaluate(
                str(folders[0]), Text.from_file(tmp_path / "text"), Settings(context=8), reference=str(tmp_path / "m.gguf")
            )


class TestCommand:
    @staticmethod
    def call(*arguments):
        return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)

    def test_summary(self, folders, story, tmp_path):
        done = self.call(
            folders[1], "--text", story.path, "--reference", folders[0], "--context", 32, "--limit", 4, "--device", "cpu"
        )
        assert (done.returncode, done.stderr) == (0, "")
        lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        assert SMALL in lines["model"]
        assert "4 windows of 32 tokens" in lines["protocol"]
        for line in ("perplexity", "KL", "same"):
            assert " +- " in lines[line]

    def test_progress_is_shown_on_a_terminal(self, folders, story):
        pty = pytest.importorskip("pty")
        primary, secondary = pty.openpty()
        arguments = [folders[0], "--text", story.path, "--context", "32", "--limit", "4"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=secondary, env=environment)
        os.close(secondary)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
            while piece := os.read(primary, 4096):
                shown += piece
        os.close(primary)
        assert process.wait(timeout=60) == 0
        assert b"Scoring" in shown
        assert b"0.1 / 0.1 k tokens" in shown

    def test_ctrl_c_says_how_to_go_on(self, folders, tmp_path):
        (tmp_path / "text").write_text(STORY * 400)
        out, partial = tmp_path / "run.json", tmp_path / "run.json.partial"
        arguments = [folders[0], "--text", tmp_path / "text", "--context", "64", "--out", out]
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (partial.exists() and len(partial.read_bytes().partition(b"\n")[2]) > 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout, stderr.count("\n")) == (130, "", 1)
        assert f"run the same command again to go on ({partial} holds what is done)" in stderr
        assert partial.exists()
        assert not out.exists()

    def test_json(self, folders, story, tmp_path):
        done = self.call(
            folders[0], "--wikitext", story.path, "--context", 32, "--limit", 2, "--out", tmp_path / "r.json", "--json"
        )
        assert done.returncode == 0
        assert json.loads(done.stdout) == json.loads((tmp_path / "r.json").read_text())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give a text: --wikitext FILE"),
            (["--text", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
            (["--text", __file__, "--dtype", "int4"], "dtype must be one of"),
        ],
        ids=["no-text", "missing-text", "dtype"],
    )
    def test_errors_are_one_line(self, arguments, message):
        done = self.call(STORIES, *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("seedlm: ")
        assert message in done.stderr


def test_bits_of_another_librarys_folder_are_counted_from_its_architecture(tmp_path):
    """Codes of 4 bits, a float32 for every 32 of them, and a table: 5 bits a weight and the table."""
    model = tiny_llama(tmp_path, layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(tensors[f"model.{name}.weight"].numel() for name in packed)
    for name in packed:
        count = tensors[f"model.{name}.weight"].numel()
        tensors[f"model.{name}.weight"] = torch.zeros(count // 2, 1, dtype=torch.uint8)
        tensors[f"model.{name}.weight.absmax"] = torch.zeros(count // 32)
    tensors[f"model.{packed[0]}.weight.quant_map"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))

    info = models.describe("theirs", tmp_path)
    assert (info.format, info.weights) == ("bitsandbytes", model.num_parameters())
    assert info.bits_per_weight == pytest.approx(5 + 16 * 32 / weights)
    assert info.model_bits_per_weight == 8 * info.bytes / model.num_parameters()

    tensors["somewhere.else.codes"] = tensors.pop(f"model.{packed[0]}.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert models.describe("theirs", tmp_path).bits_per_weight is None
