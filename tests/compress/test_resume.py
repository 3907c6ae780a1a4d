"""Runs of `compress_checkpoint` that are killed, and gone on from."""

import json
import os
import signal
import subprocess
import time

import pytest

from seedlm.compress.workfolder import WorkFolder, Writer
from seedlm.errors import CheckpointError, OutputError, SourceError
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.safetensors import TensorFiles
from tiny_models import SMALL, folder_bytes, run, tiny_llama


class Crash(BaseException):
    """Stands for the process dying: nothing may catch it."""


class TestResume:
    def test_a_crash_at_every_step_is_gone_on_from_to_the_same_bytes(self, tmp_path, monkeypatch):
        """Dies at the first, second, third .. write, sync or rename, then runs again."""
        tiny_llama(tmp_path / "m", hidden_size=8, intermediate_size=12, layers=1, num_attention_heads=2, vocab_size=8)
        options = {"max_shard_size": "1KB", "exclude": ["*.[kvo]_proj", "*.up_proj", "*.gate_proj"]}
        run(tmp_path / "m", tmp_path / "whole", **options)
        expected = folder_bytes(tmp_path / "whole")
        monkeypatch.setattr(os, "fsync", lambda fd: None)  # half of this test's time
        left = -1

        def step(real):
            def wrapped(*args, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Crash
                return real(*args, **options)

            return wrapped

        for owner, name in (
            (os, "fsync"),
            (Writer, "write"),
            (os, "replace"),
            (os, "rename"),
            (WorkFolder, "remove"),
        ):
            monkeypatch.setattr(owner, name, step(getattr(owner, name)))

        crash_at, crashes = 1, 0
        while True:
            out = tmp_path / f"out{crash_at}"
            left = crash_at
            try:
                run(tmp_path / "m", out, **options)
                break
            except Crash:
                crashes += 1
            assert not out.exists() or folder_bytes(out) == expected
            for half in (out.with_name(out.name + ".partial"), out.with_name(out.name + ".partial") / "model"):
                if not (half / "config.json").exists():
                    with pytest.raises(CheckpointError, match=r"no config.json|no such folder"):
                        Checkpoint.open(half)
            left = -1
            run(tmp_path / "m", out, **options)
            assert folder_bytes(out) == expected
            assert not out.with_name(out.name + ".partial").exists()
            crash_at += 1
        assert crashes > 40

    def test_a_killed_process_is_gone_on_from(self, llama, finished, tmp_path, forked):
        out = tmp_path / "out"
        script = (
            "import os, sys, time\nfrom seedlm.compress.run import compress_checkpoint\nprint(os.getpid(), flush=True)\n"
            f"slow = lambda phase, done, total: time.sleep(0.05 * (phase == 'compress'))\n"
            f"compress_checkpoint(sys.argv[1], sys.argv[2], format={SMALL!r}, backend='torch', on_progress=slow)\n"
        )
        process = subprocess.Popen(forked(llama, out, code=script), stdout=subprocess.PIPE)
        pid = int(process.stdout.readline())
        journal = tmp_path / "out.partial" / "journal.jsonl"
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"squared_error") >= 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = journal.read_bytes().count(b"\n")
        assert done < 21
        assert not out.exists()
        starts = []
        run(llama, out, on_progress=lambda phase, done, total: starts.append(done) if phase == "compress" else None)
        assert starts[0] > 0  # went on, did not start again
        assert folder_bytes(out) == folder_bytes(finished[0])

    @pytest.fixture
    def halfway(self, llama, tmp_path, monkeypatch):
        """A run that died when some of its tensors were finished, and others not."""
        monkeypatch.setattr(os, "fsync", lambda fd: None)  # a slow disk would finish tensors after the last is encoded
        out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.jsonl"

        def look(phase, done, total):
            time.sleep(0.01 * (phase == "compress"))
            if journal.exists() and journal.read_bytes().count(b"\n") > 4:
                raise Crash

        with pytest.raises(Crash):
            run(llama, out, on_progress=look)
        return out

    def test_a_torn_journal_line_does_not_count(self, llama, finished, halfway):
        journal = halfway.with_name("out.partial") / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
        run(llama, halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    @pytest.mark.parametrize("damage", ["flip", "zero", "cut", "link", "header"])
    def test_what_was_damaged_since_is_made_again(self, llama, finished, halfway, tmp_path, damage):
        work = halfway.with_name("out.partial")
        path = work / "model" / "model.safetensors"
        name = next(iter(json.loads((work / "journal.jsonl").read_text().splitlines()[2])["sha256"]))
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        start, end = (8 + length + n for n in json.loads(data[8 : 8 + length])[name]["data_offsets"])
        if damage == "flip":
            data[start] ^= 4
        elif damage == "zero":
            data[start:end] = bytes(end - start)
        elif damage == "cut":
            del data[end:]
        elif damage == "header":
            data[20] ^= 1
        path.write_bytes(data)
        if damage == "link":
            os.replace(path, tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        run(llama, halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])
        assert not (halfway / "model.safetensors").is_symlink()

    @pytest.mark.parametrize("name", ["stranger.json", "config.json", "model-00001-of-00002.safetensors"])
    def test_a_strangers_file_is_not_published(self, llama, finished, halfway, name):
        stranger = halfway.with_name("out.partial") / "model" / name
        stranger.write_text("{}")
        with pytest.raises(OutputError, match=f"holds '{name}', which is not from this run; move it away"):
            run(llama, halfway)
        stranger.unlink()
        run(llama, halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    @pytest.mark.parametrize("line", ['{"tensor": []}', "[1]", "{}", '{"tensor": "x"}', '{"tensor": "x", "sha256": {"x": 1}}'])
    def test_a_journal_that_is_none_is_refused_or_does_not_count(self, llama, finished, halfway, line):
        journal = halfway.with_name("out.partial") / "journal.jsonl"
        sound = journal.read_bytes()
        journal.write_bytes(sound + line.encode() + b"\n")
        try:
            run(llama, halfway)
        except OutputError as error:
            assert "is damaged; delete" in str(error)  # noqa: PT017 (either is right)
            journal.write_bytes(sound)
            run(llama, halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    def test_a_lost_weight_file_is_made_again(self, llama, finished, halfway):
        (halfway.with_name("out.partial") / "model" / "model.safetensors").write_bytes(b"short")
        run(llama, halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "block-k8-c8-p2-q4-e4"}, "arguments format was .block-k8-c8-p3-q4-e4., is now .block-k8-c8-p2-q4-e4"),
            ({"rounding": "nearest"}, 'arguments rounding was "best", is now "nearest"'),
            ({"exclude": ["*.0.mlp.*"]}, "arguments exclude was"),
            ({"include": ["lm_head"]}, "arguments include was"),
            ({"max_shard_size": "1GB"}, "arguments max_shard_size was 5000000000, is now 1000000000"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_arguments_are_refused(self, llama, finished, halfway, options, message):
        with pytest.raises(OutputError, match=rf"{message}.*delete .*out.partial to start over"):
            run(llama, halfway, **options)
        run(llama, halfway)  # nothing was lost
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    @pytest.fixture
    def changed(self, tmp_path):
        """A copy of the source, to be changed in one byte of a tensor; sizes and times stay."""

        def change(name):
            folder = tmp_path / "copy"
            tiny_llama(folder)
            entry = TensorFiles.open(folder, SourceError).entries[name]
            times, data = entry.path.stat(), bytearray(entry.path.read_bytes())
            data[entry.offset] ^= 1
            entry.path.write_bytes(data)
            os.utime(entry.path, ns=(times.st_atime_ns, times.st_mtime_ns))
            return folder

        return change

    def test_a_finished_tensor_that_changed_is_refused(self, llama, finished, halfway, changed):
        journal = halfway.with_name("out.partial") / "journal.jsonl"
        name = json.loads(journal.read_text().splitlines()[2])["tensor"].removesuffix("_words")
        with pytest.raises(OutputError, match=rf"content {name}\S* was \"\w+\.\.\., is now"):
            run(changed(name), halfway)
        run(llama, halfway)  # nothing was lost
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    def test_a_tensor_that_changed_before_it_was_finished_is_taken_as_it_is_now(self, halfway, changed, tmp_path):
        source = changed("model.layers.1.mlp.up_proj.weight")
        run(source, halfway)
        run(source, tmp_path / "whole")
        assert folder_bytes(halfway) == folder_bytes(tmp_path / "whole")

    def test_a_moved_source_is_the_same_source(self, llama, finished, halfway, tmp_path):
        tiny_llama(tmp_path / "elsewhere")
        run(tmp_path / "elsewhere", halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])
