"""`observe_checkpoint`: statistics that runs take, of a model that fits, of one that does not, and on another's text."""

import json
import shutil

import pytest

from seedlm.calibration.placement import nbytes, numbered_layers, workspace
from seedlm.compress import statistics as module
from seedlm.compress.feedback import Feedback
from seedlm.compress.observe import observe_checkpoint
from seedlm.compress.run import compress_checkpoint
from seedlm.errors import BackendError, FormatError, OutputError, SourceError
from seedlm.integrations.transformers.models import describe
from seedlm.integrations.transformers.opening import open_language_model
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.inspect import inspect_checkpoint
from seedlm.storage.statistics import Statistics
from tiny_models import STORIES, folder_bytes, tiny_llama, tiny_model

FORMAT = "trellis-r4-l12-t32-h32"
TEXT = Feedback("own", sequences=2, length=32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observe") / "dense"
    tiny_llama(folder, max_position_embeddings=512, layers=3)
    return folder


@pytest.fixture(scope="module")
def observed(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("observed") / "statistics.safetensors"
    observe_checkpoint(dense, out, text=TEXT, device="cpu")
    return out


def compress(dense, out, feedback, **options):
    return compress_checkpoint(dense, out, format=FORMAT, feedback=feedback, device="cpu", **options)


def little(dense, sequences=2, length=32):
    """Memory for all of the model but its layers, and for one of these."""
    model = open_language_model(dense)
    layers = numbered_layers(model).values()
    outside = nbytes(model) - sum(map(nbytes, layers))
    return workspace(model, sequences, length, 8) + outside + max(map(nbytes, layers))


def test_a_run_with_the_file_is_the_run_that_observes_itself(dense, observed, tmp_path):
    compress(dense, tmp_path / "own", TEXT)
    compress(dense, tmp_path / "file", observed)
    assert folder_bytes(tmp_path / "own") == folder_bytes(tmp_path / "file")
    assert Statistics.load(observed).facts.source == "own text"
    assert [path.name for path in observed.parent.iterdir()] == [observed.name]


def test_it_serves_other_bits_too(dense, observed, tmp_path):
    for bits in ("2-fast", "3-fast"):
        compress_checkpoint(dense, tmp_path / bits, format=bits, feedback=observed, device="cpu")
        assert Checkpoint.open(tmp_path / bits).packed


def test_a_model_that_does_not_fit_gives_the_same_file(dense, observed, tmp_path):
    notes, out = [], tmp_path / "s.safetensors"
    text = Feedback("own", sequences=2, length=32, memory=little(dense))
    observe_checkpoint(dense, out, text=text, device="cpu", on_note=notes.append)
    assert any("do not fit the" in note and "come from the memory one at a time" in note for note in notes)
    assert out.read_bytes() == observed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_model_of_which_no_layer_fits_is_said(dense, tmp_path):
    small = Feedback("own", sequences=2, length=32, memory=little(dense) - 1000)
    with pytest.raises(
        SourceError, match=r"no statistics for error feedback: a layer of it takes .* more than there is room for"
    ):
        observe_checkpoint(dense, tmp_path / "s.safetensors", text=small, device="cpu")
    notes = []
    compress(dense, tmp_path / "out", Feedback(memory=10), on_note=notes.append)
    assert any(note.startswith("no error feedback: the model cannot be run here (a layer of it takes") for note in notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["feedback"] == "none"


def test_a_model_that_would_be_read_from_the_disk_for_every_token_does_not_write_by_default(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_host_memory", lambda: 1000)
    notes = []
    compress(dense, tmp_path / "auto", "auto", on_note=notes.append)
    assert any("would be read from the disk 255 times to write a text" in note for note in notes)
    observe_checkpoint(dense, tmp_path / "s.safetensors", text=TEXT, device="cpu")


@pytest.mark.parametrize("where", ["measure", "save"])
def test_a_text_that_is_written_is_not_written_again(dense, observed, tmp_path, monkeypatch, where):
    """Whatever stops a run after that: here while layers are observed, or while the file is written."""
    out = tmp_path / "s.safetensors"
    place = {"measure": "seedlm.calibration.statistics.measure_statistics", "save": "seedlm.storage.statistics.Statistics.save"}

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place[where], stop)
        with pytest.raises(KeyboardInterrupt):
            observe_checkpoint(dense, out, text=TEXT, device="cpu")
    assert not out.exists()
    assert [path.name for path in (tmp_path / "s.safetensors.partial").iterdir()] == ["text.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr("seedlm.calibration.own_text.write_text", lambda *_, **__: pytest.fail("written again"))
        observe_checkpoint(dense, out, text=TEXT, device="cpu")
    assert out.read_bytes() == observed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_another_text_is_not_taken_for_it(dense, tmp_path, monkeypatch):
    out = tmp_path / "s.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("seedlm.calibration.statistics.measure_statistics", lambda *_, **__: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            observe_checkpoint(dense, out, text=TEXT, device="cpu")
    other = Feedback("own", sequences=2, length=32, seed=1)
    found = observe_checkpoint(dense, out, text=other, device="cpu")
    shutil.rmtree(tmp_path / "s.safetensors.partial", ignore_errors=True)
    fresh = observe_checkpoint(dense, tmp_path / "fresh.safetensors", text=other, device="cpu")
    assert found.facts == fresh.facts


def test_a_damaged_text_is_written_again(dense, observed, tmp_path):
    out, partial = tmp_path / "s.safetensors", tmp_path / "s.safetensors.partial"
    partial.mkdir()
    (partial / "text.safetensors").write_bytes(b"nothing")
    observe_checkpoint(dense, out, text=TEXT, device="cpu")
    assert out.read_bytes() == observed.read_bytes()


def test_its_compressed_version_may_write(tmp_path):
    dense = tmp_path / "dense"
    model = tiny_llama(dense, max_position_embeddings=512)
    model.lm_head.weight.data *= 100  # decided, so that what is lost shows
    model.save_pretrained(dense)
    compress(dense, tmp_path / "packed", "none")
    text = Feedback("own", sequences=2, length=32, writer=tmp_path / "packed")
    found = observe_checkpoint(dense, tmp_path / "s.safetensors", text=text, device="cpu")
    assert found.facts.source == "own text, written by packed"
    own = observe_checkpoint(dense, tmp_path / "own.safetensors", text=TEXT, device="cpu")
    assert found.facts.model == own.facts.model
    assert found.facts.text != own.facts.text
    compress(dense, tmp_path / "out", tmp_path / "s.safetensors")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["feedback"] == "own text, written by packed"
    assert not inspect_checkpoint(tmp_path / "out").calibrated
    assert describe("packed", tmp_path / "out").calibrated is False
    assert describe("dense", dense).calibrated is None


def test_a_text_of_the_users_is_data(tmp_path):
    (tmp_path / "wiki.txt").write_text("Once upon a time there was a girl. " * 40)
    text = Feedback("text", tmp_path / "wiki.txt", sequences=3, length=64)
    found = observe_checkpoint(STORIES, tmp_path / "s.safetensors", text=text, device="cpu")
    assert (found.facts.source, found.facts.sequences, found.facts.length) == ("wiki.txt", 3, 64)
    compress(STORIES, tmp_path / "out", tmp_path / "s.safetensors")
    assert (inspect_checkpoint(tmp_path / "out").feedback, inspect_checkpoint(tmp_path / "out").calibrated) == (
        "wiki.txt",
        True,
    )
    assert describe("packed", tmp_path / "out").calibrated


def test_what_cannot_be_is_refused_and_leaves_nothing(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("seedlm.calibration.own_text.write_text", lambda *_, **__: pytest.fail("work has begun"))
    tiny_llama(tmp_path / "other", vocab_size=40)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    for options, error, message in (
        ({"out": "s.json"}, OutputError, r"s\.json: statistics are a file of safetensors"),
        ({"out": "there.safetensors"}, OutputError, r"there\.safetensors: exists already"),
        ({"text": Feedback("own", length=513)}, SourceError, "knows 512 positions, the text has 513 tokens"),
        ({"text": Feedback("own", writer=tmp_path / "other")}, FormatError, "other: knows 40 tokens, .* observed 64"),
        ({"text": Feedback("none")}, FormatError, "not on 'none'"),
        ({"text": Feedback("own", sequences=0)}, SourceError, "sequences must be at least 1"),
        ({"device": "cuda:77"}, BackendError, "cuda:77"),
        ({"source": tmp_path / "nowhere"}, SourceError, "no such file or folder"),
    ):
        arguments = {"source": dense, "out": "s.safetensors", "device": "cpu", **options}
        with pytest.raises(error, match=message):
            observe_checkpoint(**{**arguments, "out": tmp_path / arguments["out"]})
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_experts_that_hardly_any_token_reaches_are_said_and_never_nan(tmp_path):
    """An expert without a token is coded as by its weights alone, one with a few nearly so, and all are finite."""
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=1, bos_token_id=5)
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight.data
        gate[3] = gate[:2].mean(0)  # never above both
        gate[2] = gate[3] + 0.05 * gate[2]  # seldom
    model.save_pretrained(tmp_path / "dense")
    notes, file, text = [], tmp_path / "s.safetensors", Feedback("own", sequences=8, length=32)
    found = observe_checkpoint(tmp_path / "dense", file, text=text, device="cpu", on_note=notes.append)
    experts = [f"model.layers.1.block_sparse_moe.experts.{number}.w2" for number in range(4)]
    tokens = [read.tokens if (read := found.input_of(name)) else 0 for name in experts]
    assert 0 < tokens[2] < 32 < tokens[0]
    assert tokens[3] == 0
    assert sum(tokens) == 256
    assert any(note.startswith("no statistics of 6 of 32 layers, which go by their weights alone: ") for note in notes)
    assert any("layers saw fewer tokens than they have columns, the fewest" in note for note in notes)
    reports = {
        name: compress(tmp_path / "dense", tmp_path / name, feedback) for name, feedback in (("file", file), ("none", "none"))
    }
    errors = {name: {t.module: t.relative_error for t in report.tensors} for name, report in reports.items()}
    assert all(error == error and error < 0.2 for report in errors.values() for error in report.values())
    one, other = (Checkpoint.open(tmp_path / name) for name in reports)
    same = [one.tensor(name).parts["words"].equal(other.tensor(name).parts["words"]) for name in experts]
    assert same == [False, False, False, True]
    few, many = (errors["file"][name] / errors["none"][name] for name in (experts[2], experts[0]))
    assert few < many  # the weights' own error, which feedback and rows of unequal importance raise


def test_a_text_that_a_killed_run_had_begun_is_said_to_be_written_again(dense, observed, tmp_path):
    notes = []
    (tmp_path / "s.safetensors.partial").mkdir()
    (tmp_path / "s.safetensors.partial" / "lock").touch()
    observe_checkpoint(dense, tmp_path / "s.safetensors", text=TEXT, device="cpu", on_note=notes.append)
    assert notes[0] == "an earlier run was stopped before its text was whole; none of it was kept, and it is written again"
    assert (tmp_path / "s.safetensors").read_bytes() == observed.read_bytes()
