"""What the command line shows of other people's texts, and how it says that it was stopped."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from seedlm.cli import main
from seedlm.cli.console import Terminated, printable
from seedlm.codes.registry import parse_format
from seedlm.compress.plan import parse_size
from seedlm.compress.run import compress_checkpoint
from seedlm.device import choose_device
from seedlm.errors import BackendError, FormatError, OutputError, SourceError, TensorError
from tiny_models import SMALL, join, save_tensors, split, tiny_llama


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ö 漢", "plain ö 漢"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb\r", "a\\nb\\r"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("\x00\x9b", "\\x00\\x9b"),
    ],
    ids=ascii,
)
def test_what_is_not_printable_is_shown_as_its_escape(text, shown):
    assert printable(text) == shown


def test_an_error_that_quotes_a_file_does_not_command_the_terminal(tmp_path, capsys):
    folder = save_tensors(tmp_path / "m", {"x.weight": torch.ones(2, 2)})
    header, data = split(folder / "model.safetensors")
    header["a\x1b[2J\nforged"] = {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]}
    (folder / "model.safetensors").write_bytes(join(header, data + bytes(4)))
    with pytest.raises(SystemExit):
        main(["compress", str(folder), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.endswith("has a control character in its name\n")
    assert "\x1b" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("size", ["9" * 400, "9" * 400 + "GB", "0", "-1", "x", True, 0])
def test_a_shard_size_that_is_none_is_refused(size):
    with pytest.raises(OutputError, match="a shard size must be"):
        parse_size(size)


@pytest.mark.parametrize(
    "value", [10**400, 10**5000, float("nan"), float("inf"), "\ud800", None, [4]], ids=lambda v: str(type(v))
)
def test_what_is_no_format_is_refused(value):
    with pytest.raises(FormatError, match="unknown format"):
        parse_format(value)


def test_the_device_without_numbers_is_refused():
    with pytest.raises(BackendError, match="'meta' holds no numbers"):
        choose_device("meta")


def test_the_root_is_no_place_for_a_folder(llama):
    with pytest.raises(OutputError, match="is no place for a new folder"):
        compress_checkpoint(llama, "/", format=SMALL)


def before_the_search(source, out, **options):
    """Whatever is raised, no weight has been searched."""
    counted = []
    with pytest.raises((SourceError, TensorError)) as caught:
        compress_checkpoint(
            source, out, format=SMALL, backend="torch", on_progress=lambda p, d, t: counted.append((p, d)), **options
        )
    assert not any(phase == "compress" and done for phase, done in counted)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x.weight", torch.ones(2, 2, dtype=torch.int32), "x.weight: would be taken for a part of a compressed weight"),
        ("x.weight_exponent_bias", torch.ones(2), "x.weight_exponent_bias: would be taken for a part"),
    ],
    ids=["int32", "bias"],
)
def test_a_tensor_that_looks_like_codes_is_refused_before_the_search(tmp_path, name, tensor, message):
    weight = torch.randn(16, 16)
    folder = save_tensors(tmp_path / "m", {"layers.0.up.weight": weight, name: tensor})
    assert message in before_the_search(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama", "fusion_config": [1]}', "fusion_config must be an object"),
        ('{"model_type": ["llama"]}', "model_type must be a text"),
        ('{"model_type": "llama", "x": "\\ud800"}', "half of a surrogate pair"),
        ('{"model_type": "llama", "x": 1, "x": 2}', "the key 'x' stands twice"),
    ],
    ids=["fusions", "type", "surrogate", "twice"],
)
def test_a_config_that_could_not_be_written_is_refused_before_the_search(tmp_path, text, message):
    folder = save_tensors(tmp_path / "m", {"layers.0.up.weight": torch.randn(16, 16)})
    (folder / "config.json").write_text(text)
    assert message in before_the_search(folder, tmp_path / "out")


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.float32, 3.4e38)], ids=str)
def test_codes_that_would_dequantize_to_infinity_are_refused(tmp_path, dtype, largest):
    weight = torch.full((16, 16), largest).to(dtype)
    folder = save_tensors(tmp_path / "m", {"layers.0.up.weight": weight})
    with pytest.raises(TensorError, match=r"would dequantize to infinity in torch.float"):
        compress_checkpoint(folder, tmp_path / "out", format=SMALL, backend="torch")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_side_files_that_are_none_do_not_hang(tmp_path):
    tiny_llama(tmp_path / "m", layers=1)
    os.mkfifo(tmp_path / "m" / "tokenizer.json")
    (tmp_path / "m" / "vocab.json").symlink_to("/dev/zero")
    compress_checkpoint(tmp_path / "m", tmp_path / "out", format=SMALL, backend="torch")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_a_signal_to_end_says_what_ctrl_c_says(llama, tmp_path, forked):
    script = (
        "import time, sys\nfrom seedlm.compress import worker\nreal = worker.Worker.run\n"
        "worker.Worker.run = lambda *a, **k: (time.sleep(0.2), real(*a, **k))[1]\n"
        "from seedlm.cli import main\nmain()"
    )
    out = tmp_path / "out"
    command = forked("compress", llama, out, "--format", SMALL, "--backend", "torch", code=script)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.endswith(f"seedlm: stopped; run the same command again to go on ({out}.partial holds what is done)\n")


@pytest.mark.parametrize("where", ["typer.core.TyperGroup.make_context", "typer.main.get_command"])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_before_a_command_begins_says_so_too(error, code, where, monkeypatch, here):
    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr(where, interrupted)
    done = here("inspect", "folder")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "seedlm: stopped\n")


def test_what_inspect_check_finds(llama, tmp_path, capsys):
    compress_checkpoint(llama, tmp_path / "out", format=SMALL, backend="torch")
    main_or_exit = lambda *arguments: main(list(map(str, arguments)))  # noqa: E731
    with pytest.raises(SystemExit) as ended:
        main_or_exit("inspect", tmp_path / "out", "--check", "--json")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["tensors"]
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        main_or_exit("inspect", tmp_path / "out", "--check")
    assert ended.value.code == 2
    assert "is not what was written (its SHA-256 differs" in capsys.readouterr().err
