"""The command line, run as a user runs it: what goes to which stream, and with which exit code."""

import json
import os
import pty
import shutil
import signal
import subprocess
import time

import pytest
import torch

import seedlm
from seedlm.progress import Lines
from tiny_models import SMALL, STORIES, folder_bytes, save_tensors, told

FAST = ["--format", SMALL, "--backend", "torch"]


@pytest.fixture(scope="module")
def compressed(llama, tmp_path_factory, call):
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, call("compress", llama, out, *FAST)


def test_version(call):
    done = call("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"seedlm {seedlm.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "-h"], ["inspect", "--help"]], ids=" ".join)
def test_help(arguments, call):
    done = call(*arguments, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0
    assert "Usage" in done.stdout
    if arguments[0] == "compress":
        for option in ("--bits", "--include", "--exclude", "--max-shard-size", "--json", "--backend", "--rounding"):
            assert option in done.stdout


def test_compress_ends_with_a_summary_and_says_what_it_does_in_a_few_lines_when_not_a_terminal(compressed):
    _, done = compressed
    assert (done.returncode, told(done.stderr)) == (0, [])
    first, *phases = done.stderr.splitlines()
    assert " weights in 21 tensors; compressing to 3 bits a weight into " in first
    assert phases[0] == "seedlm: Opening the model ..."
    assert [line for line in phases if line.startswith("seedlm: Encoding: ")]
    for word in ("size", "bits each", "relative error", "time", "weights/s", "seedlm chat", "at 5 bits", "--reference SOURCE"):
        assert word in done.stdout


def test_what_to_do_next_is_what_the_model_can_do(tmp_path, here):
    """It has no chat template, which `seedlm chat` refuses; and its 32 bits were not 16 before, as every card once said."""
    done = here("compress", STORIES, tmp_path / "out", *FAST)
    assert done.returncode == 0, done.stderr
    assert f"seedlm generate {tmp_path / 'out'} TEXT" in done.stdout
    assert "seedlm chat" not in done.stdout
    assert "16 before" not in (tmp_path / "out" / "README.md").read_text()


def test_other_sizes_are_of_the_layers_own_code(tmp_path, here):
    """Beside the block code's layers the embeddings, which come first in the file, have another code, of other bits."""
    table = ("--embeddings", "trellis-r6-l12-t256-h128", "--feedback", "none", "--device", "cpu")
    done = here("compress", STORIES, tmp_path / "out", "--code", "block", "--bits", "2", *table)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("other sizes")]
    assert line.endswith("--bits takes 2 to 5")
    assert " at 5 bits" in line
    assert " at 6 bits" not in line


def test_tables_in_codes_are_told_from_layers_unless_they_are_dense(tmp_path, here):
    options = ("--bits", "2-fast", "--feedback", "none", "--device", "cpu")
    done = here("compress", STORIES, tmp_path / "out", *options)
    assert "\n                  model.embed_tokens in 6.2510, the layers in 2.3298\n" in done.stdout
    inspected = here("inspect", tmp_path / "out")
    assert "model.embed_tokens in 6.2510, the layers in 2.3298" in inspected.stdout
    done = here("compress", STORIES, tmp_path / "dense", *options, "--embeddings", "dense")
    assert "compressed        35 tensors" in done.stdout
    assert "model.embed_tokens in" not in done.stdout
    done = here("compress", STORIES, tmp_path / "both", *options, "--embeddings", "dense", "--head", "6")
    assert "--embeddings dense and --head trellis-r6-l16-t256-h128 must be the same" in done.stderr


def test_compress_json_is_inspect_json_and_the_run(llama, compressed, tmp_path, call):
    done = call("compress", llama, tmp_path / "out", *FAST, "--json")
    report = json.loads(done.stdout)
    assert report.pop("seconds") > 0
    assert report.pop("weights_per_second") > 0
    assert report.pop("folder") == str(tmp_path / "out")
    assert (report.pop("devices"), report.pop("peak_device_bytes")) == (["cpu"], 0)
    assert 1e8 < report.pop("peak_host_bytes") < 1e10
    assert set(report.pop("phase_seconds")) == {"prepare", "compress", "finish"}
    inspected = json.loads(call("inspect", compressed[0], "--json").stdout)
    inspected.pop("folder")
    assert report == inspected
    assert len(report["tensors"]) == 14
    assert set(report["tensors"][0]) == {"module", "shape", "format", "bits_per_weight", "relative_error"}


def test_inspect_prints_a_row_per_tensor(compressed, here):
    done = here("inspect", compressed[0], "--check")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["module", "shape", "format", "bits", "error"]
    row = next(line for line in lines if line.startswith("model.layers.1.mlp.down_proj"))
    assert row.split()[1:6] == ["32", "x", "44", SMALL, "3.659"]
    assert "14 tensors" in done.stdout


def test_inspect_knows_no_errors_without_the_report(compressed, tmp_path, here):
    folder = shutil.copytree(compressed[0], tmp_path / "copy")
    (folder / "seedlm_report.json").unlink()
    report = json.loads(here("inspect", folder, "--json").stdout)
    assert (report["relative_error"], report["source_bytes"]) == (None, None)
    assert "relative error" not in here("inspect", folder).stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must have format_version 1"),
        ('{"format_version": 1, "source_bytes": 1, "tensors": {"x": {}}}', "'x' is not a compressed module with its errors"),
    ],
    ids=["keys", "module"],
)
def test_a_wrong_report_is_refused(compressed, tmp_path, content, message, here):
    folder = shutil.copytree(compressed[0], tmp_path / "copy")
    (folder / "seedlm_report.json").write_text(content)
    done = here("inspect", folder)
    assert done.returncode == 2
    assert message in done.stderr


def one_line(done, message):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("\n")
    assert len([line for line in told(done.stderr) if "decided by names alone" not in line]) == 1
    assert done.stderr.startswith("seedlm: ")
    assert message in done.stderr


def test_errors_are_one_line(llama, compressed, tmp_path, here, call):
    one_line(call("compress", llama, compressed[0], *FAST), "exists already")
    one_line(here("compress", tmp_path / "nix", tmp_path / "o"), "no such file or folder")
    one_line(here("generate", tmp_path / "nix", "Once"), "no such file or folder")
    one_line(here("compress", llama, tmp_path / "o", "--bits", "9.5"), "from 2 to 8, got 9.5")
    one_line(here("compress", llama, tmp_path / "o", "--bits", "3.7", "--code", "block"), "are a mixture of formats")
    one_line(here("compress", llama, tmp_path / "o", "--exclude", "typo"), "no module with a weight matches")
    one_line(here("inspect", llama), "has no quantization_config")
    bad = save_tensors(tmp_path / "m", {"layers.0.a.weight": torch.full((2, 8), float("nan"))})
    one_line(here("compress", bad, tmp_path / "o", *FAST), "layers.0.a.weight: a weight must be finite, got 16 NaN")
    (tmp_path / "p.bin").write_bytes(b"\x80")
    one_line(here("compress", tmp_path / "p.bin", tmp_path / "o"), "is a pickle")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_one_line(llama, tmp_path, call):
    (tmp_path / "locked").mkdir(mode=0o500)
    one_line(call("compress", llama, tmp_path / "locked" / "out", *FAST), "Permission denied")


def test_a_full_disk_is_one_line_and_nothing_is_lost(llama, compressed, tmp_path, call, forked):
    """A real limit of the system: files of this process end at 12 kB."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000)); from seedlm.cli import main; main()"
    arguments = ["compress", llama, tmp_path / "out", *FAST]
    done = subprocess.run(forked(*arguments, code=limit), capture_output=True, text=True, timeout=120)
    one_line(done, "File too large")
    assert call(*arguments).returncode == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(compressed[0])


def test_ctrl_c_says_how_to_go_on(llama, compressed, tmp_path, call, forked):
    slow = (
        "import time; from seedlm.compress import workfolder; real = workfolder.WorkFolder.finish_tensor\n"
        "def finish(*a, **k): real(*a, **k); time.sleep(0.2)\n"
        "workfolder.WorkFolder.finish_tensor = finish\nfrom seedlm.cli import main; main()"
    )
    arguments = ["compress", llama, tmp_path / "out", *FAST]
    process = subprocess.Popen(forked(*arguments, code=slow), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "out.partial" / "journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert len(told(stderr)) == 1
    assert "run the same command again to go on" in stderr
    assert call(*arguments).returncode == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(compressed[0])


def test_progress_is_shown_on_a_terminal(llama, tmp_path, forked):
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        forked("compress", llama, tmp_path / "out", *FAST),
        stdout=subprocess.PIPE,
        stderr=secondary,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            piece = os.read(primary, 4096)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=60) == 0
    os.close(primary)
    assert shown.index(b"Opening the model") < shown.index(b"Encoding")  # before anything slow is imported
    assert b"M weights" in shown
    assert process.stdout is not None
    assert b"relative error" in process.stdout.read()
    process.stdout.close()


def test_bits_say_their_range_and_sequences_need_a_text(llama, tmp_path, call):
    done = call("compress", llama, tmp_path / "out", "--bits", 9)
    assert (done.returncode, done.stderr) == (2, "seedlm: --bits must be a number from 2 to 8, got 9\n")
    done = call("compress", llama, tmp_path / "out", "--feedback", "none", "--sequences", 4)
    assert done.returncode == 2
    assert "--sequences says on how much text" in done.stderr


def test_a_size_is_met_or_refused_with_what_there_can_be(llama, tmp_path, here):
    for arguments, message in (
        (["--size", "4GB", "--bits", "3"], "--size says how many bits there can be: give it without --bits and --format"),
        (["--size", "big"], "--size must be a positive number of bytes or a text such as '5GB', got 'big'"),
        (["--size", "4GB", "--code", "block"], "where bits matter: add --feedback own, or measure"),
        (["--size", "4GB"], "the weight files of this model can have "),
        (["--size", "30kB", "--feedback", "none"], "a size is met by a mixture of formats, which needs to know where bits"),
    ):
        done = here("compress", llama, tmp_path / "out", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())


def test_inspect_check_says_what_it_checked(compressed, call):
    done = call("inspect", compressed[0], "--check")
    assert done.returncode == 0
    assert "tensors match their SHA-256" in done.stderr


def test_progress_has_lines_where_there_is_no_terminal(capsys):
    lines = Lines(seconds=-1.0)
    lines("open", 0, 0)
    lines("compress", 1_500_000, 3_000_000)
    assert capsys.readouterr().err == (
        "seedlm: Opening the model ...\nseedlm: Encoding: 3.0 M weights, of which 1.5 M weights are done\n"
    )


def test_generating_can_be_stopped_at_any_token(forked):
    arguments = forked("generate", STORIES, "Once upon a time", "--max-new-tokens", 450)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    loading, stopped = shown.splitlines()
    assert (process.returncode, stopped) == (130, b"seedlm: stopped")
    assert loading.endswith(b"; loading")
