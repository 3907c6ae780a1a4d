"""Whole runs: what comes out, what is left alone, and runs that are killed, repeated, changed or doomed."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from seedlm import search, units, workfolder
from seedlm.checkpoint import GUARD, Checkpoint
from seedlm.codec import choose_exponent_bias
from seedlm.compress import compress_checkpoint, parse_size
from seedlm.errors import BackendError, CheckpointError, FormatError, OutputError, SourceError, TensorError
from seedlm.format import parse_format
from seedlm.selection import select
from seedlm.tensorfile import TensorInfo
from seedlm.workfolder import WorkFolder
from tiny_models import SMALL, folder_bytes, save_tensors, tiny_llama

FORMAT = parse_format(SMALL)


def run(source, out, **options):
    return compress_checkpoint(source, out, **{"format": SMALL, "backend": "torch", **options})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    return folder, tiny_llama(folder)


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(llama[0], out)


class TestResult:
    def test_dtype_converts_what_is_not_compressed(self, llama, finished, tmp_path):
        run(llama[0], tmp_path / "out", dtype="float32")
        checkpoint, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(finished[0])
        assert checkpoint.config["dtype"] == "float32"
        for name in original.dense:
            assert torch.equal(checkpoint.dense_tensor(name), original.dense_tensor(name).float())
        for module in original.packed:
            assert torch.equal(checkpoint.tensor(module).tensors["words"], original.tensor(module).tensors["words"])

    def test_dtype_too_small_for_a_number_is_refused(self, tmp_path):
        weights = {"model.layers.0.a.weight": torch.randn(8, 32), "model.norm.weight": torch.tensor([1.0, -7e4])}
        source = save_tensors(tmp_path / "source", weights)
        with pytest.raises(TensorError, match=r"model.norm.weight: holds 70000, too large for F16"):
            run(source, tmp_path / "out", dtype="float16")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]  # refused before anything was begun
        with pytest.raises(FormatError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
            run(source, tmp_path / "out", dtype="int8")

    def test_each_linear_layer_is_what_encode_gives(self, llama, finished):
        state = llama[1].state_dict()
        checkpoint = Checkpoint.open(finished[0])
        assert len(checkpoint.packed) == 14
        for module in checkpoint.packed:
            expected, _ = search.encode(state[f"{module}.weight"], parse_format(SMALL), backend="torch")
            found = checkpoint.tensor(module)
            assert found.shape == expected.shape
            for part, tensor in expected.tensors.items():
                assert torch.equal(found.tensors[part], tensor)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_the_largest_magnitude_counts_whatever_its_sign(self, tmp_path, dtype):
        values = torch.randn(4, 8).abs() + 0.1
        both = torch.cat([values, -3 * values])
        weights = {"minus": -values, "plus": values, "minus_wins": both, "plus_wins": -both, "zero": -torch.zeros(4, 8)}
        tensors = {f"model.layers.0.{name}.weight": (100 * weight).to(dtype) for name, weight in weights.items()}
        run(save_tensors(tmp_path / "m", tensors), tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out")
        for name, weight in tensors.items():
            found = checkpoint.tensor(name.removesuffix(".weight")).tensors["exponent_bias"]
            assert int(found) == choose_exponent_bias(weight, FORMAT)

    def test_everything_else_is_bit_for_bit_the_source(self, llama, finished):
        state = llama[1].state_dict()
        checkpoint = Checkpoint.open(finished[0])
        assert "lm_head.weight" in checkpoint.dense
        assert "model.embed_tokens.weight" in checkpoint.dense
        assert checkpoint.dense.keys() | {f"{m}.weight" for m in checkpoint.packed} == state.keys()
        for name in checkpoint.dense:
            tensor = checkpoint.dense_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, state[name])

    def test_config_keeps_the_sources_and_adds_the_quantization(self, llama, finished):
        source = json.loads((llama[0] / "config.json").read_text())
        config = json.loads((finished[0] / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config.pop("fusion_config") == {GUARD: False}
        assert config == source
        assert config["dtype"] == "bfloat16"
        assert quantization == {
            "quant_method": "seedlm",
            "format_version": 1,
            "format": parse_format(SMALL).to_dict(),
            "rounding": "best",
            "modules_to_not_convert": ["lm_head"],
        }

    def test_the_report_counts_what_is_on_disk_and_measures_the_error(self, llama, finished):
        out, report = finished
        state = llama[1].state_dict()
        rebuilt = dict(Checkpoint.open(out).weights())
        squares = norms = 0.0
        for tensor in report.tensors:
            weight = state[f"{tensor.module}.weight"].double()
            error = (weight - rebuilt[f"{tensor.module}.weight"].double()).square().sum()
            assert tensor.relative_error == pytest.approx(math.sqrt(error / weight.square().sum()), rel=1e-5)
            squares, norms = squares + float(error), norms + float(weight.square().sum())
        assert report.relative_error == pytest.approx(math.sqrt(squares / norms), rel=1e-5)
        assert 0.2 < report.relative_error < 0.4
        assert report.bytes == (out / "model.safetensors").stat().st_size
        assert report.source_bytes == (llama[0] / "model.safetensors").stat().st_size
        assert report.compressed_weights + report.dense_weights == sum(t.numel() for t in state.values())
        down = next(
            t for t in report.tensors if t.module == "model.layers.0.mlp.down_proj"
        )  # 44 = 5.5 blocks: 24 bits x 6, 5 words
        assert down.bits_per_weight == 32 * (5 * 32 + 1) / (44 * 32)
        assert report.model_bits_per_weight == 8 * report.bytes / (report.compressed_weights + report.dense_weights)

    def test_shards_hold_the_same_tensors_and_stay_under_their_size(self, llama, finished, tmp_path):
        run(llama[0], tmp_path / "out", max_shard_size="8KB")
        names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
        assert len(names) > 2
        assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
        sharded, single = Checkpoint.open(tmp_path / "out"), Checkpoint.open(finished[0])
        assert (sharded.packed, sharded.dense) == (single.packed, single.dense)
        for module in single.packed:
            assert torch.equal(sharded.tensor(module).tensors["words"], single.tensor(module).tensors["words"])
        for name in names:
            held = [e.info.nbytes for e in sharded.files.entries.values() if e.path.name == name]
            assert sum(held) <= 8000 or len(held) == 1

    def test_the_safetensors_library_reads_it_too(self, finished):
        from safetensors.torch import load_file

        tensors = load_file(finished[0] / "model.safetensors")
        checkpoint = Checkpoint.open(finished[0])
        for name, tensor in tensors.items():
            assert torch.equal(tensor, checkpoint.files.read(name))

    @pytest.mark.parametrize("rows", [7, 100], ids=str)
    def test_pieces_of_any_size_give_the_same_bytes(self, llama, finished, tmp_path, monkeypatch, rows):
        monkeypatch.setitem(units.PIECE_WEIGHTS, "cpu", rows * 32)
        run(llama[0], tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(finished[0])  # the errors in the report too

    def test_a_source_in_other_shards_gives_the_same_tensors(self, llama, finished, tmp_path):
        tiny_llama(tmp_path / "m", shard="10KB")
        run(tmp_path / "m", tmp_path / "out")
        one, other = Checkpoint.open(finished[0]), Checkpoint.open(tmp_path / "out")
        assert set(one.packed) == set(other.packed)
        for module in one.packed:
            assert torch.equal(one.tensor(module).tensors["words"], other.tensor(module).tensors["words"])

    def test_biases_integers_and_odd_dtypes_survive(self, tmp_path):
        tensors = {
            "model.layers.0.q_proj.weight": torch.randn(4, 16).half(),
            "model.layers.0.q_proj.bias": torch.randn(4).half(),
            "model.layers.0.table": torch.arange(6, dtype=torch.int64).view(2, 3),
            "model.flags": torch.tensor([True, False, True]),
            "model.byte": torch.tensor(7, dtype=torch.uint8),
            "model.norm.weight": torch.randn(16, dtype=torch.float64),
            "model.empty": torch.zeros(0, 4),
            "model.infinite": torch.tensor([float("inf"), float("nan")]),
        }
        run(save_tensors(tmp_path / "m", tensors), tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out")
        assert list(checkpoint.packed) == ["model.layers.0.q_proj"]
        for name in checkpoint.dense:
            found, expected = checkpoint.dense_tensor(name), tensors[name]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.view(-1).view(torch.uint8).tolist() == expected.view(-1).view(torch.uint8).tolist()

    def test_progress_counts_every_weight_once(self, llama, tmp_path):
        calls = []
        report = run(llama[0], tmp_path / "out", on_progress=lambda *call: calls.append(call))
        for phase, total in (
            ("read", sum(t.nbytes for t in llama[1].state_dict().values())),
            ("compress", report.compressed_weights),
        ):
            done = [call[1] for call in calls if call[0] == phase]
            assert {call[2] for call in calls if call[0] == phase} == {total}
            assert (done[0], done[-1]) == (0, total)
            assert done == sorted(done)


class TestSelection:
    TENSORS = {  # noqa: RUF012
        name: TensorInfo("BF16", shape)
        for name, shape in {
            "model.embed_tokens.weight": (64, 8),
            "model.layers.0.self_attn.q_proj.weight": (8, 8),
            "model.layers.0.self_attn.q_proj.bias": (8,),
            "model.layers.0.input_layernorm.weight": (8,),
            "model.layers.0.mlp.gate.weight": (4, 8),
            "model.layers.0.mlp.shared_expert_gate.weight": (1, 8),
            "model.layers.0.mlp.gate_proj.weight": (8, 8),
            "model.layers.0.mlp.experts.3.up_proj.weight": (8, 8),
            "model.layers.0.mlp.experts.strange": (4, 8, 8),
            "model.layers.0.conv1d.weight": (8, 1, 4),
            "block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
            "vision_tower.layers.0.fc1.weight": (8, 8),
            "lm_head.weight": (64, 8),
        }.items()
    }
    DEFAULT = (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.experts.3.up_proj",
    )

    def test_default_is_the_linear_layers_of_the_decoder(self):
        chosen, left = select(self.TENSORS, {}, FORMAT)
        assert chosen == list(self.DEFAULT)
        assert left["model.layers.0.mlp.gate.weight"] == "a router"
        assert left["model.layers.0.mlp.experts.strange"] == "stacked experts of an unknown kind"
        assert left["lm_head.weight"] == "an output head"
        assert left["model.embed_tokens.weight"] == "an embedding"
        assert len(chosen) + len(left) == len(self.TENSORS)

    @pytest.mark.parametrize(
        ("options", "added", "removed"),
        [
            ({"include": ["lm_head"]}, {"lm_head"}, set()),
            ({"include": ["*.gate"]}, {"model.layers.0.mlp.gate"}, set()),
            ({"include": ["model.embed_tokens"]}, set(), set()),
            ({"exclude": ["*.mlp.*"]}, set(), {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.experts.3.up_proj"}),
            ({"include": ["*gate*"], "exclude": ["*.gate", "*expert*"]}, set(), {"model.layers.0.mlp.experts.3.up_proj"}),
        ],
        ids=["head", "router", "never-embeddings", "exclude", "exclude-wins"],
    )
    def test_patterns_add_and_take_away(self, options, added, removed):
        chosen, _ = select(self.TENSORS, {}, FORMAT, **options)
        assert set(chosen) == (set(self.DEFAULT) | added) - removed

    @pytest.mark.parametrize(
        ("tensors", "config", "options", "message"),
        [
            ({}, {}, {"include": ["lm_haed"]}, "no module with a weight matches --include 'lm_haed'"),
            ({}, {}, {"exclude": ["layers.9.*"]}, "no module with a weight matches --exclude"),
            ({}, {}, {"exclude": ["*"]}, "nothing to compress"),
            ({}, {"tie_word_embeddings": True}, {"include": ["lm_head"]}, "is tied to the embeddings"),
            ({}, {"model_type": "gpt2"}, {}, r"'gpt2' store their matrices as \[in_features, out_features\]"),
            ({"h.0.attn.c_attn.weight": TensorInfo("F32", (8, 24))}, {}, {}, "Conv1D"),
            ({"model.layers.1.fc.weight": TensorInfo("F64", (8, 8))}, {}, {}, r"must be F32, F16 or BF16, got F64 \[8, 8\]"),
        ],
        ids=["typo-include", "typo-exclude", "nothing", "tied", "gpt2", "conv1d-by-shape", "float64"],
    )
    def test_what_cannot_be_meant_is_refused(self, tensors, config, options, message):
        with pytest.raises(SourceError, match=message):
            select({**self.TENSORS, **tensors}, config, FORMAT, **options)

    def test_what_would_not_get_smaller_is_left_unless_included(self):
        tensors = {"model.layers.0.narrow.weight": TensorInfo("BF16", (8, 1)), **self.TENSORS}
        _, left = select(tensors, {}, FORMAT)
        assert left["model.layers.0.narrow.weight"] == "no smaller as codes"
        assert "model.layers.0.narrow" in select(tensors, {}, FORMAT, include=["*.narrow"])[0]

    def test_an_included_head_is_compressed_and_left_off_the_dense_list(self, llama, tmp_path):
        run(llama[0], tmp_path / "out", include=["lm_head"], exclude=["*.self_attn.*"])
        checkpoint = Checkpoint.open(tmp_path / "out")
        assert "lm_head" in checkpoint.packed
        dense = checkpoint.config["quantization_config"]["modules_to_not_convert"]
        assert dense == sorted(f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo")

    def test_tied_weights_stay_tied(self, tmp_path):
        tiny_llama(tmp_path / "m", tie_word_embeddings=True)
        run(tmp_path / "m", tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out")
        assert "lm_head.weight" not in checkpoint.dense
        assert checkpoint.config["tie_word_embeddings"] is True
        assert checkpoint.config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


class Crash(BaseException):
    """Stands for the process dying: nothing may catch it."""


class TestResume:
    def test_a_crash_at_every_step_is_gone_on_from_to_the_same_bytes(self, tmp_path, monkeypatch):
        """Dies at the first, second, third .. write, sync or rename, then runs again."""
        tiny_llama(tmp_path / "m", hidden_size=8, intermediate_size=12, layers=1, num_attention_heads=2, vocab_size=8)
        options = {"max_shard_size": "1KB", "exclude": ["*.[kvo]_proj", "*.up_proj", "*.gate_proj"]}
        run(tmp_path / "m", tmp_path / "whole", **options)
        expected = folder_bytes(tmp_path / "whole")
        monkeypatch.setattr(workfolder.os, "fsync", lambda fd: None)  # half of this test's time
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
            (workfolder, "_sync"),
            (workfolder, "_sync_folder"),
            (workfolder.Writer, "write"),
            (workfolder.os, "replace"),
            (workfolder.os, "rename"),
            (workfolder.WorkFolder, "remove"),
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

    def test_a_killed_process_is_gone_on_from(self, llama, finished, tmp_path):
        out = tmp_path / "out"
        script = (
            "import sys, time\nfrom seedlm.compress import compress_checkpoint\n"
            f"slow = lambda phase, done, total: time.sleep(0.05 * (phase == 'compress'))\n"
            f"compress_checkpoint(sys.argv[1], sys.argv[2], format={SMALL!r}, backend='torch', on_progress=slow)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(llama[0]), str(out)])
        journal = tmp_path / "out.partial" / "journal.jsonl"
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = journal.read_bytes().count(b"\n")
        assert done < 21
        assert not out.exists()
        starts = []
        run(llama[0], out, on_progress=lambda phase, done, total: starts.append(done) if phase == "compress" else None)
        assert starts[0] > 0  # went on, did not start again
        assert folder_bytes(out) == folder_bytes(finished[0])

    @pytest.fixture
    def halfway(self, llama, tmp_path, monkeypatch):
        """A run that died after its fifth tensor."""
        out, real, count = tmp_path / "out", WorkFolder.finish_tensor, 0

        def finish_tensor(*args, **facts):
            nonlocal count
            real(*args, **facts)
            count += 1
            if count == 5:
                raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(WorkFolder, "finish_tensor", finish_tensor)
            with pytest.raises(Crash):
                run(llama[0], out)
        return out

    def test_a_torn_journal_line_does_not_count(self, llama, finished, halfway):
        journal = halfway.with_name("out.partial") / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
        run(llama[0], halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    def test_a_lost_weight_file_is_made_again(self, llama, finished, halfway):
        (halfway.with_name("out.partial") / "model" / "model.safetensors").write_bytes(b"short")
        run(llama[0], halfway)
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
            run(llama[0], halfway, **options)
        run(llama[0], halfway)  # nothing was lost
        assert folder_bytes(halfway) == folder_bytes(finished[0])

    def test_a_changed_source_is_refused_even_at_the_same_size_and_time(self, llama, halfway, tmp_path):
        copy = tmp_path / "copy"
        tiny_llama(copy)
        path = copy / "model.safetensors"
        times, data = path.stat(), bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(OutputError, match=r"content \S+ was \"\w+\.\.\., is now"):
            run(copy, halfway)

    def test_a_moved_source_is_the_same_source(self, llama, finished, halfway, tmp_path):
        tiny_llama(tmp_path / "elsewhere")
        run(tmp_path / "elsewhere", halfway)
        assert folder_bytes(halfway) == folder_bytes(finished[0])


class TestRefusals:
    def test_an_existing_output_is_left_alone(self, llama, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        with pytest.raises(OutputError, match="out: exists already"):
            run(llama[0], tmp_path / "out")
        assert folder_bytes(tmp_path) == {"out/precious": b"x"}

    def test_a_strangers_partial_folder_is_left_alone(self, llama, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("x")
        with pytest.raises(OutputError, match=r"holds thesis\.txt, which is not from a run"):
            run(llama[0], tmp_path / "out")
        assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "x"

    def test_two_runs_at_once_are_refused(self, llama, tmp_path):
        with WorkFolder.claim(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing this output"):
            run(llama[0], tmp_path / "out")
        run(llama[0], tmp_path / "out")

    def test_nan_and_inf_are_named_and_counted_before_anything_is_written(self, tmp_path):
        bad = torch.randn(4, 8)
        bad[1, 2] = bad[3, 4] = float("nan")
        bad[0, 0] = -float("inf")
        bad[2, 2] = -bad[1, 2]  # NaN with a sign
        tensors = {"layers.0.a.weight": torch.randn(4, 8), "layers.0.b.weight": bad, "layers.0.c.weight": bad.clone()}
        folder = save_tensors(tmp_path / "m", tensors)
        with pytest.raises(TensorError, match=r"^layers.0.b.weight: .* got 3 NaN and 1 Inf values; and 1 more tensors like it"):
            run(folder, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        run(folder, tmp_path / "out", exclude=["*.b", "*.c"])
        assert torch.equal(Checkpoint.open(tmp_path / "out").dense_tensor("layers.0.b.weight").isnan(), bad.isnan())

    def test_a_disk_too_small_is_refused_at_the_start(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(
            workfolder.shutil, "disk_usage", lambda path: os.statvfs_result and type("Usage", (), {"free": 1000})
        )
        with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, the disk has 1,000 free"):
            run(llama[0], tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_loses_nothing(self, llama, finished, tmp_path, monkeypatch):
        real, count = workfolder.Writer.write, 0

        def write(self, *args):
            nonlocal count
            count += 1
            if count == 9:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(workfolder.Writer, "write", write)
            with pytest.raises(OutputError, match=r"No space left on device; what is done is kept in .*out.partial"):
                run(llama[0], tmp_path / "out")
        run(llama[0], tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(finished[0])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"format": "5.5"}, FormatError, "unknown format '5.5'"),
            ({"rounding": "worst"}, FormatError, "rounding must be one of best, nearest, got 'worst'"),
            ({"backend": "abacus"}, BackendError, "unknown backend 'abacus'"),
            ({"max_shard_size": "much"}, OutputError, "a shard size must be"),
            ({"max_shard_size": 0}, OutputError, "a shard size must be"),
        ],
        ids=["format", "rounding", "backend", "size-text", "size-zero"],
    )
    def test_wrong_arguments_leave_no_trace(self, llama, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            run(llama[0], tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    def test_a_name_that_a_part_would_take_is_refused(self, tmp_path):
        tensors = {"layers.0.a.weight": torch.randn(4, 8), "layers.0.a.weight_exponent_bias": torch.zeros(1)}
        with pytest.raises(SourceError, match=r"would both be stored as layers.0.a.weight_exponent_bias"):
            run(save_tensors(tmp_path / "m", tensors), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("10kb", 10_000), ("77", 77), (12, 12)], ids=str
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """A 256 MiB matrix that is compressed and one that is copied, in less than either above the imports."""
    folder = tmp_path / "m"
    folder.mkdir()
    shape, size = [1 << 15, 1 << 12], 1 << 28
    header = {
        "layers.0.a.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]},
        "embed.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [size, 2 * size]},
    }
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * size)
    (folder / "config.json").write_text("{}")
    script = (
        "import resource, sys, torch\nfrom seedlm import search\nfrom seedlm.compress import compress_checkpoint\n"
        "def find(blocks, bias, format, rounding):\n"
        "    n = len(blocks)\n"
        "    codes = search.BlockCodes(torch.ones(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int8),"
        " torch.zeros(n, 1, dtype=torch.int8))\n"
        "    yield codes, torch.zeros(n, dtype=torch.float64)\n"
        "search._load = lambda *_: find\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "compress_checkpoint(sys.argv[1], sys.argv[2], format='block-k8-c64-p1-q8-e8')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200, done.stdout
