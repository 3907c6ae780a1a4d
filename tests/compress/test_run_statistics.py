"""Statistics in a run: made once, kept with it, held against its arguments, and refused where they are another model's."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import toy_family
from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format
from seedlm.compress import worker, workers
from seedlm.compress.allocate import Mixture
from seedlm.compress.feedback import Feedback
from seedlm.compress.run import compress_checkpoint
from seedlm.compress.workfolder import WorkFolder
from seedlm.errors import FormatError, OutputError, SourceError
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.inspect import inspect_checkpoint
from seedlm.storage.source import FolderSource
from seedlm.storage.statistics import Statistics
from tiny_models import STORIES, STORY, folder_bytes, tiny_llama

FORMAT, BLOCK = "trellis-r4-l12-t32-h32", "block-k8-c8-p3-q4-e4"
OWN = Feedback("own", sequences=1)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics") / "dense"
    tiny_llama(folder, max_position_embeddings=512)
    return folder


def compress(dense, out, feedback=OWN, format=FORMAT, device="cpu", **options):
    """The layers alone."""
    tables = {"embeddings": "dense", "head": "dense"}
    return compress_checkpoint(dense, out, format=format, feedback=feedback, device=device, **tables, **options)


@pytest.fixture(scope="module", params=[FORMAT, BLOCK], ids=["trellis", "block"])
def format(request):
    return request.param


@pytest.fixture
def stopped(dense, format, tmp_path, monkeypatch):
    """A run that died after three tensors."""
    real = WorkFolder.finish_tensor

    def finish(self, *arguments, **facts):
        real(self, *arguments, **facts)
        if len(self.done) == 3:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "finish_tensor", finish)
        with pytest.raises(StoppedError):
            compress(dense, tmp_path / "out", format=format)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(dense, format, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(dense, out, format=format)
    return out


def test_a_run_goes_on_with_the_statistics_that_it_made(dense, format, stopped, whole, monkeypatch):
    monkeypatch.setattr("seedlm.compress.statistics._observe", lambda *_: pytest.fail("observed again"))
    compress(dense, stopped, format=format)
    assert folder_bytes(stopped) == folder_bytes(whole)


@pytest.mark.parametrize("damage", ["statistics", "note cut", "note empty", "note deep", "note gone"])
def test_statistics_that_are_damaged_are_made_again(dense, format, stopped, whole, damage):
    work = stopped.with_name("out.partial")
    statistics, note = work / "statistics.safetensors", work / "statistics.json"
    if damage == "statistics":  # of other numbers, which a reader cannot tell
        found = Statistics.load(statistics)
        for read in found.inputs.values():
            read.scale[::2] *= 3
        found.save(statistics)
    elif damage == "note gone":
        note.unlink()
    else:
        note.write_text({"note cut": note.read_text()[:40], "note empty": "", "note deep": "[" * 100_000}[damage])
    compress(dense, stopped, format=format)
    assert folder_bytes(stopped) == folder_bytes(whole)


def test_a_run_that_died_while_observing_goes_on_with_its_text(dense, format, whole, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("seedlm.calibration.statistics.measure_statistics", stop)
        with pytest.raises(StoppedError):
            compress(dense, tmp_path / "out", format=format)
    for name in ("text.safetensors.part", "statistics.safetensors.part", "spool/left"):  # as a kill leaves them
        (tmp_path / "out.partial" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out.partial" / name).write_bytes(b"half")
    monkeypatch.setattr("seedlm.calibration.own_text.write_text", lambda *_, **__: pytest.fail("written again"))
    compress(dense, tmp_path / "out", format=format)
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_matrices_at_once_leave_the_same_bytes(dense, format, whole, tmp_path, monkeypatch):
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
            compress(dense, tmp_path / f"{count}", format=format)
        finally:
            torch.set_num_threads(before)
    assert at_once == [12, 36]
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3") == folder_bytes(whole)


def test_pieces_of_rows_and_processes_leave_the_same_bytes(dense, format, whole, statistics, tmp_path, monkeypatch):
    compress(dense, tmp_path / "two", statistics, format, device="cpu,cpu")
    taken, real = [], worker.pieces

    def pieces(source, name, target, weights, pinned=False):
        for piece in real(source, name, target, 1, pinned):
            taken.append(len(piece))
            yield piece

    monkeypatch.setattr(worker, "pieces", pieces)
    compress(dense, tmp_path / "pieces", statistics, format)
    assert max(taken) == parse_format(format).row_step
    assert len(taken) > 14  # matrices
    assert folder_bytes(tmp_path / "pieces") == folder_bytes(tmp_path / "two") == folder_bytes(whole)


def test_a_run_with_other_statistics_does_not_go_on(dense, format, stopped, whole):
    for other in (Feedback("own", sequences=2), Feedback("own", sequences=1, seed=7)):
        with pytest.raises(OutputError, match=r"holds an unfinished run that differs: statistics (sequences|seed) was"):
            compress(dense, stopped, other, format)
    compress(dense, stopped, format=format)
    assert folder_bytes(stopped) == folder_bytes(whole)


def record(folder):
    """What config.json, `inspect` and the card say of feedback."""
    report, kept = inspect_checkpoint(folder), json.loads((folder / "config.json").read_text())["quantization_config"]
    line = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| errors were weighed by"))
    return kept.get("feedback"), report.feedback, report.calibrated, line.split("|")[2].strip()


def test_the_folder_says_what_errors_were_weighed_by(dense, format, whole, tmp_path):
    text = tmp_path / "story.txt"
    text.write_text(STORY * 40)
    compress(STORIES, tmp_path / "data", Feedback("text", text, sequences=1), format)
    compress(dense, tmp_path / "none", "none", format)
    assert record(whole) == ("own text", "own text", False, "a text that the model wrote itself, no other data")
    assert record(tmp_path / "data") == ("story.txt", "story.txt", True, "a text, `story.txt`")
    none = "none" if format == FORMAT else None  # which a reader expects of the block code
    assert record(tmp_path / "none") == (none, none, False, "the weights alone, no data")
    one, other = Checkpoint.open(whole), Checkpoint.open(tmp_path / "none")
    assert any(not one.tensor(name).parts["words"].equal(other.tensor(name).parts["words"]) for name in one.packed)


def test_a_model_that_is_loaded_and_saved_says_it_still(whole, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path)
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (whole, tmp_path)]
    assert configs[0] == configs[1]
    assert configs[0]["feedback"] == "own text"


def test_the_block_code_goes_by_the_weights_alone_unless_asked(dense, tmp_path, monkeypatch):
    """Codes and config.json are those of before it could: the method as published."""
    monkeypatch.setattr("seedlm.compress.statistics._observe", lambda *_: pytest.fail("observed"))
    for kind in ("auto", "none"):
        compress(dense, tmp_path / kind, kind, BLOCK)
    assert folder_bytes(tmp_path / "auto") == folder_bytes(tmp_path / "none")
    config = json.loads((tmp_path / "auto" / "config.json").read_text())["quantization_config"]
    assert list(config) == ["quant_method", "format_version", "format", "rounding", "modules_to_not_convert"]
    opened = Checkpoint.open(tmp_path / "auto")
    for module in opened.packed:
        weight = FolderSource(dense).rows(f"{module}.weight", 0, opened.packed[module].shape[0])
        assert torch.equal(opened.tensor(module).parts["words"], encode(weight, BLOCK)[0].parts["words"])


def test_a_mixture_of_block_formats_goes_by_the_statistics(dense, statistics, tmp_path):
    """Which matrices get more bits, and then their codes: by a file of sensitivities, or without one."""
    formats = {parse_format(spec): error for spec, error in ((BLOCK, 0.02), ("block-k9-c12-p4-q4-e4", 0.06))}
    shapes = {module: info.shape for module, info in packed_of(dense, tmp_path).items()}
    for name, known in (("without", {}), ("file", dict.fromkeys(shapes, 1.0))):
        mixture = Mixture(bits=3.1, sensitivity=known, formats=formats)
        compress(dense, tmp_path / name, statistics, mixture)
        report = inspect_checkpoint(tmp_path / name)
        assert (report.feedback, report.bits_per_weight <= 3.1) == ("own text", True)
        assert {parse_format(tensor.format) for tensor in report.tensors} == set(formats)
        for tensor in report.tensors:
            facts = Statistics.load(statistics).facts_of(tensor.module, 0.0)
            weight = FolderSource(dense).rows(f"{tensor.module}.weight", 0, tensor.shape[0])
            alone, _ = encode(weight, tensor.format, hessian=facts.hessian, tokens=facts.tokens)
            assert torch.equal(Checkpoint.open(tmp_path / name).tensor(tensor.module).parts["words"], alone.parts["words"])
    with pytest.raises(FormatError, match="add --feedback own, or measure the model with `seedlm sensitivity"):
        compress(dense, tmp_path / "out", "auto", Mixture(bits=3.1, formats=formats))


def packed_of(dense, tmp_path):
    compress(dense, tmp_path / "shapes", "none", BLOCK)
    return Checkpoint.open(tmp_path / "shapes").packed


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


def test_a_file_of_statistics_gives_the_same_codes(dense, format, whole, statistics, tmp_path):
    compress(dense, tmp_path / "out", statistics, format)
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
    with pytest.raises(FormatError, match="toy takes no error feedback"):
        compress(dense, tmp_path / "out", "own", toy_family.ToyFormat(4))
    with pytest.raises(FormatError, match="there is no file 'nix'"):
        compress(dense, tmp_path / "out", "nix")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("none", "--feedback none observes none"), ("auto", "block code looks at the weights .* add --feedback own")],
)
def test_sequences_want_a_text(dense, tmp_path, kind, reason):
    with pytest.raises(FormatError, match=rf"--sequences says on how much text .* {reason}"):
        compress(dense, tmp_path / "out", Feedback(kind, sequences=2), BLOCK)
