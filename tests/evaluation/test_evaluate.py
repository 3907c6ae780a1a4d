"""Evaluation runs: held against a float64 computation, and stopped, resumed and misused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlm import inspect_checkpoint
from seedlm.errors import BackendError, EvaluationError, OutputError, SourceError
from seedlm.evaluation import perplexity
from seedlm.evaluation import run as evaluate
from seedlm.evaluation.run import Settings
from seedlm.evaluation.text import Text
from seedlm.integrations.transformers import models
from seedlm.modeling.linear import SeedLinear
from straightforward import straightforward
from tiny_models import SMALL, STORY, tiny_gguf, tiny_llama

CPU = {"device": "cpu"}


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
        assert set(record) == {"token_ids", *perplexity.PAIR_RECORD.names}
        assert (record["token_ids"] == windows.numpy()).all()
        for column, field in enumerate(perplexity.PAIR_RECORD.names):
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

    def test_packed_layers_give_the_same_and_stay_packed(self, folders, story):
        runs, layers = [], []
        for packed in (False, True):
            called = set()

            def note(module, inputs, output, called=called):
                if isinstance(module, SeedLinear):
                    called.add(module)

            with register_module_forward_hook(note):
                settings = Settings(context=64, limit=2, packed=packed, **CPU)
                runs.append(evaluate.evaluate(str(folders[1]), story, settings))
            layers.append(len(called))
        assert layers == [0, 35]
        assert [run["run"]["backends"] for run in runs] == [None, {"numba": 35}]
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
        tiny_gguf(tmp_path / "m.gguf")
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
        results = evaluate.evaluate(*arguments, **options, on_progress=lambda phase, done, total: seen.append((phase, done)))
        assert next(done for phase, done in seen if phase == "evaluate") == windows * 32
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
            evaluate.evaluate(str(folders[0]), story, Settings(device=device, context=64))

    def test_a_model_without_a_tokenizer(self, story, tmp_path):
        tiny_llama(tmp_path / "m")
        with pytest.raises(SourceError, match="m: has no tokenizer that can be opened"):
            evaluate.evaluate(str(tmp_path / "m"), story, Settings(context=64))

    def test_a_text_shorter_than_a_window(self, folders, tmp_path):
        (tmp_path / "short").write_text("Once upon a time " * 4)
        with pytest.raises(EvaluationError, match=r"the text has \d+ tokens, one window needs 64"):
            evaluate.evaluate(str(folders[0]), Text.from_file(tmp_path / "short"), Settings(context=64))

    def test_a_reference_with_another_tokenizer(self, folders, tmp_path):
        pytest.importorskip("gguf")
        tiny_gguf(tmp_path / "m.gguf")
        (tmp_path / "text").write_text("ABCDEFGHIJ" * 5)
        with pytest.raises(EvaluationError, match="turn the text into different tokens"):
            evaluate.evaluate(
                str(folders[0]), Text.from_file(tmp_path / "text"), Settings(context=8), reference=str(tmp_path / "m.gguf")
            )


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
