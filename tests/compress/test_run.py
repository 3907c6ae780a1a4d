"""Whole runs: what comes out, what is left alone, and runs that are doomed."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from seedlm.codes.block.codec import choose_exponent_bias
from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format
from seedlm.compress import worker
from seedlm.compress.plan import parse_size
from seedlm.compress.workfolder import WorkFolder
from seedlm.errors import BackendError, FormatError, OutputError, SourceError, TensorError
from seedlm.storage.checkpoint import GUARD, Checkpoint
from tiny_models import SMALL, folder_bytes, run, save_tensors, tiny_llama


class TestResult:
    def test_dtype_converts_what_is_not_compressed(self, llama, finished, tmp_path):
        run(llama, tmp_path / "out", dtype="float32")
        checkpoint, original = Checkpoint.open(tmp_path / "out"), Checkpoint.open(finished[0])
        assert checkpoint.config["dtype"] == "float32"
        for name in original.dense:
            assert torch.equal(checkpoint.dense_tensor(name), original.dense_tensor(name).float())
        for module in original.packed:
            assert torch.equal(checkpoint.tensor(module).parts["words"], original.tensor(module).parts["words"])

    def test_dtype_is_said_in_every_part_of_the_configuration(self, tmp_path):
        part = {"dtype": "float16", "torch_dtype": "float16", "width": 3}
        save_tensors(tmp_path / "m", {"model.layers.0.a.weight": torch.randn(8, 64)}, text_config=part, torch_dtype="float16")
        run(tmp_path / "m", tmp_path / "out", dtype="float32")
        config = Checkpoint.open(tmp_path / "out").config
        assert config["text_config"] == {"dtype": "float32", "torch_dtype": "float32", "width": 3}
        assert config["dtype"] == config["torch_dtype"] == "float32"

    def test_dtype_too_small_for_a_number_is_refused(self, tmp_path):
        weights = {"model.layers.0.a.weight": torch.randn(8, 32), "model.norm.weight": torch.tensor([1.0, -7e4])}
        source = save_tensors(tmp_path / "source", weights)
        with pytest.raises(TensorError, match=r"model.norm.weight: holds 70000, too large for F16"):
            run(source, tmp_path / "out", dtype="float16")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        with pytest.raises(FormatError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
            run(source, tmp_path / "out", dtype="int8")

    def test_each_linear_layer_is_what_encode_gives(self, llama, finished):
        state = load_file(llama / "model.safetensors")
        checkpoint = Checkpoint.open(finished[0])
        assert len(checkpoint.packed) == 14
        for module in checkpoint.packed:
            expected, _ = encode(state[f"{module}.weight"], parse_format(SMALL), backend="torch")
            found = checkpoint.tensor(module)
            assert found.shape == expected.shape
            for part, tensor in expected.parts.items():
                assert torch.equal(found.parts[part], tensor)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_the_largest_magnitude_counts_whatever_its_sign(self, tmp_path, dtype):
        values = torch.randn(4, 8).abs() + 0.1
        both = torch.cat([values, -3 * values])
        weights = {"minus": -values, "plus": values, "minus_wins": both, "plus_wins": -both, "zero": -torch.zeros(4, 8)}
        tensors = {f"model.layers.0.{name}.weight": (100 * weight).to(dtype) for name, weight in weights.items()}
        run(save_tensors(tmp_path / "m", tensors), tmp_path / "out")
        checkpoint = Checkpoint.open(tmp_path / "out")
        for name, weight in tensors.items():
            found = checkpoint.tensor(name.removesuffix(".weight")).parts["exponent_bias"]
            assert int(found) == choose_exponent_bias(weight, parse_format(SMALL))

    def test_everything_else_is_bit_for_bit_the_source(self, llama, finished):
        state = load_file(llama / "model.safetensors")
        checkpoint = Checkpoint.open(finished[0])
        assert "lm_head.weight" in checkpoint.dense
        assert "model.embed_tokens.weight" in checkpoint.dense
        assert checkpoint.dense.keys() | {f"{m}.weight" for m in checkpoint.packed} == state.keys()
        for name in checkpoint.dense:
            tensor = checkpoint.dense_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, state[name])

    def test_config_keeps_the_sources_and_adds_the_quantization(self, llama, finished):
        source = json.loads((llama / "config.json").read_text())
        config = json.loads((finished[0] / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config.pop("fusion_config") == {GUARD: False}
        assert config == source
        assert config["dtype"] == "bfloat16"
        assert quantization == {
            "quant_method": "seedlm",
            "format_version": 2,
            "format": parse_format(SMALL).to_dict(),
            "rounding": "best",
            "modules_to_not_convert": ["lm_head"],
        }

    def test_the_report_counts_what_is_on_disk_and_measures_the_error(self, llama, finished):
        out, report = finished
        state = load_file(llama / "model.safetensors")
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
        assert report.source_bytes == (llama / "model.safetensors").stat().st_size
        assert report.compressed_weights + report.dense_weights == sum(t.numel() for t in state.values())
        down = next(
            t for t in report.tensors if t.module == "model.layers.0.mlp.down_proj"
        )  # 44 = 5.5 blocks: 24 bits x 6, 5 words
        assert down.bits_per_weight == 32 * (5 * 32 + 1) / (44 * 32)
        assert report.model_bits_per_weight == 8 * report.bytes / (report.compressed_weights + report.dense_weights)

    def test_shards_hold_the_same_tensors_and_stay_under_their_size(self, llama, finished, tmp_path):
        run(llama, tmp_path / "out", max_shard_size="8KB")
        names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
        assert len(names) > 2
        assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
        sharded, single = Checkpoint.open(tmp_path / "out"), Checkpoint.open(finished[0])
        assert (sharded.packed, sharded.dense) == (single.packed, single.dense)
        for module in single.packed:
            assert torch.equal(sharded.tensor(module).parts["words"], single.tensor(module).parts["words"])
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
        monkeypatch.setitem(worker.PIECE_WEIGHTS, "cpu", rows * 32)
        run(llama, tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(finished[0])  # the errors in the report too

    def test_a_source_in_other_shards_gives_the_same_tensors(self, llama, finished, tmp_path):
        tiny_llama(tmp_path / "m", shard="10KB")
        run(tmp_path / "m", tmp_path / "out")
        one, other = Checkpoint.open(finished[0]), Checkpoint.open(tmp_path / "out")
        assert set(one.packed) == set(other.packed)
        for module in one.packed:
            assert torch.equal(one.tensor(module).parts["words"], other.tensor(module).parts["words"])

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
        report = run(llama, tmp_path / "out", on_progress=lambda *call: calls.append(call))
        for phase, total in (
            ("read", sum(t.nbytes for t in load_file(llama / "model.safetensors").values())),
            ("compress", report.compressed_weights),
        ):
            done = [call[1] for call in calls if call[0] == phase]
            assert {call[2] for call in calls if call[0] == phase} == {total}
            assert (done[0], done[-1]) == (0, total)
            assert done == sorted(done)


class TestRefusals:
    def test_an_existing_output_is_left_alone(self, llama, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        with pytest.raises(OutputError, match="out: exists already"):
            run(llama, tmp_path / "out")
        assert folder_bytes(tmp_path) == {"out/precious": b"x"}

    def test_a_strangers_partial_folder_is_left_alone(self, llama, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("x")
        with pytest.raises(OutputError, match=r"holds thesis\.txt, which is not from a run"):
            run(llama, tmp_path / "out")
        assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "x"

    def test_two_runs_at_once_are_refused(self, llama, tmp_path):
        with WorkFolder.claim(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing this output"):
            run(llama, tmp_path / "out")
        run(llama, tmp_path / "out")

    def test_nan_and_inf_are_named_and_counted_and_nothing_is_left(self, tmp_path):
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
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, the disk has 1,000 free"):
            run(llama, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_is_full_halfway_loses_nothing(self, llama, finished, tmp_path, monkeypatch):
        """A limit of the system that is met when the first tensors are finished: this process's files end at one byte."""
        resource = pytest.importorskip("resource")
        monkeypatch.setattr(os, "fsync", lambda fd: None)  # a slow disk would finish tensors after the last is encoded
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        journal = tmp_path / "out.partial" / "journal.jsonl"

        def look(phase, done, total):
            time.sleep(0.01 * (phase == "compress"))
            if journal.exists() and journal.stat().st_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))

        try:
            with pytest.raises(OutputError, match=r"File too large; what is done is kept in .*out.partial"):
                run(llama, tmp_path / "out", on_progress=look)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        run(llama, tmp_path / "out")
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
            run(llama, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    def test_a_name_that_a_part_would_take_is_refused(self, tmp_path):
        tensors = {"layers.0.a.weight": torch.randn(4, 8), "layers.0.a.weight_exponent_bias": torch.zeros(1)}
        with pytest.raises(SourceError, match=r"layers.0.a.weight_exponent_bias: would be taken for a part"):
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
        "import resource, sys, torch\nfrom seedlm.codes.block import encode as search\n"
        "from seedlm.compress.run import compress_checkpoint\n"
        "def find(blocks, bias, format, rounding):\n"
        "    n = len(blocks)\n"
        "    codes = search.BlockCodes(torch.ones(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int8),"
        " torch.zeros(n, 1, dtype=torch.int8))\n"
        "    yield codes, torch.zeros(n, dtype=torch.float64)\n"
        "search.load_search = lambda *_: find\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "compress_checkpoint(sys.argv[1], sys.argv[2], format='block-k8-c64-p1-q8-e8')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200, done.stdout
