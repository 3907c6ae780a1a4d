"""Statistics in a run: made once, kept with it, held against its arguments, and refused where they are another model's."""

import json

import pytest
import torch

from seedlm.compress import workers
from seedlm.compress.feedback import Feedback
from seedlm.compress.run import compress_checkpoint
from seedlm.compress.workfolder import WorkFolder
from seedlm.errors import FormatError, OutputError, SourceError
from seedlm.storage.checkpoint import Checkpoint
from tiny_models import STORIES, folder_bytes, tiny_llama

FORMAT = "trellis-r4-l12-t32-h32"
OWN = Feedback("own", sequences=1)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics") / "dense"
    tiny_llama(folder, max_position_embeddings=512)
    return folder


def compress(dense, out, feedback=OWN, **options):
    return compress_checkpoint(dense, out, format=FORMAT, feedback=feedback, device="cpu", **options)


@pytest.fixture
def stopped(dense, tmp_path, monkeypatch):
    """A run that died after three tensors."""
    real = WorkFolder.finish_tensor

    def finish(self, *arguments, **facts):
        real(self, *arguments, **facts)
        if len(self.done) == 3:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "finish_tensor", finish)
        with pytest.raises(StoppedError):
            compress(dense, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(dense, out)
    return out


def test_a_run_goes_on_with_the_statistics_that_it_made(dense, stopped, whole, monkeypatch):
    monkeypatch.setattr("seedlm.compress.statistics._observe", lambda *_: pytest.fail("observed again"))
    compress(dense, stopped)
    assert folder_bytes(stopped) == folder_bytes(whole)


def test_a_run_that_died_while_observing_goes_on_with_its_text(dense, whole, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("seedlm.calibration.statistics.measure_statistics", stop)
        with pytest.raises(StoppedError):
            compress(dense, tmp_path / "out")
    for name in ("text.safetensors.part", "statistics.safetensors.part", "spool/left"):  # as a kill leaves them
        (tmp_path / "out.partial" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out.partial" / name).write_bytes(b"half")
    monkeypatch.setattr("seedlm.calibration.own_text.write_text", lambda *_, **__: pytest.fail("written again"))
    compress(dense, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_matrices_at_once_leave_the_same_bytes(dense, whole, tmp_path, monkeypatch):
    """A dozen for each thread, on a CPU with error feedback: their columns are searched together."""
    before, at_once = torch.get_num_threads(), []
    real = workers.Threads.__init__

    def start(self, *arguments):
        real(self, *arguments)
        at_once.append(len(self._threads))

    monkeypatch.setattr(workers.Threads, "__init__", start)
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            compress(dense, tmp_path / f"{count}")
        finally:
            torch.set_num_threads(before)
    assert at_once == [12, 36]
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3") == folder_bytes(whole)


def test_a_run_with_other_statistics_does_not_go_on(dense, stopped, whole):
    for other in (Feedback("own", sequences=2), Feedback("own", sequences=1, seed=7)):
        with pytest.raises(OutputError, match=r"holds an unfinished run that differs: statistics (sequences|seed) was"):
            compress(dense, stopped, other)
    compress(dense, stopped)
    assert folder_bytes(stopped) == folder_bytes(whole)


def test_the_folder_says_what_errors_were_weighed_by(dense, whole, tmp_path):
    assert json.loads((whole / "config.json").read_text())["quantization_config"]["feedback"] == "own text"
    compress(dense, tmp_path / "none", "none")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["quantization_config"]["feedback"] == "none"
    one, other = Checkpoint.open(whole), Checkpoint.open(tmp_path / "none")
    assert any(not one.tensor(name).parts["words"].equal(other.tensor(name).parts["words"]) for name in one.packed)


@pytest.fixture(scope="module")
def statistics(dense, tmp_path_factory):
    """The file that a run makes."""
    out = tmp_path_factory.mktemp("file") / "out"
    real = WorkFolder.remove
    kept = out.with_name("kept.safetensors")

    def remove(self):
        kept.write_bytes((self.path / "statistics.safetensors").read_bytes())
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "remove", remove)
        compress(dense, out)
    return kept


def test_a_file_of_statistics_gives_the_same_codes(dense, whole, statistics, tmp_path):
    compress(dense, tmp_path / "out", statistics)
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)


def test_another_models_statistics_are_refused(statistics, tmp_path):
    tiny_llama(tmp_path / "wide", hidden_size=48, max_position_embeddings=512)
    with pytest.raises(SourceError, match=r"kept\.safetensors: model\.layers\.0.* has 32 outputs there, its weight has 48"):
        compress(tmp_path / "wide", tmp_path / "out", statistics)


def test_layers_without_statistics_are_said(statistics, tmp_path):
    tiny_llama(tmp_path / "deep", layers=3, max_position_embeddings=512)
    notes = []
    compress(tmp_path / "deep", tmp_path / "out", statistics, on_note=notes.append)
    assert any(note.startswith("no statistics of 7 of 21 layers") for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "is not UTF-8 text .byte 3"), (b"Once upon a time " * 20, "at least 256 are needed")],
    ids=["latin", "short"],
)
def test_a_text_that_will_not_do_is_named(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(SourceError, match=rf"t\.txt: .*{message}"):
        compress(STORIES, tmp_path / "out", tmp_path / "t.txt")
    assert not (tmp_path / "out").exists()


def test_codes_without_feedback_refuse_it(dense, tmp_path):
    with pytest.raises(FormatError, match="block takes no error feedback"):
        compress_checkpoint(dense, tmp_path / "out", format="block-k8-c8-p3-q4-e4", feedback="own", device="cpu")
    with pytest.raises(FormatError, match="there is no file 'nix'"):
        compress(dense, tmp_path / "out", "nix")
