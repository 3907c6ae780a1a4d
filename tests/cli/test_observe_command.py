"""``seedlm observe``, run as a user runs it."""

import json
import signal
import subprocess
import time

import pytest

from tiny_models import STORIES, told

SMALL = ["--sequences", 2, "--length", 32]


@pytest.fixture(scope="module")
def observed(tmp_path_factory, call):
    out = tmp_path_factory.mktemp("observe") / "s.safetensors"
    return out, call("observe", STORIES, out, *SMALL, "--json")


def test_the_summary_says_what_is_in_the_file(observed):
    out, done = observed
    assert (done.returncode, len(told(done.stderr))) == (0, 1)
    assert "layers saw fewer tokens than they have columns" in done.stderr
    summary = json.loads(done.stdout)
    assert summary.pop("seconds") > 0
    assert summary.pop("peak_host_bytes") > 1e8
    assert summary == {
        "file": str(out),
        "bytes": out.stat().st_size,
        "model": str(STORIES),
        "text": "own text",
        "data": False,
        "sequences": 2,
        "length": 32,
        "layers": 36,
        "inputs": 21,
        "fewest_tokens": 64,
        "peak_device_bytes": 0,
    }


def test_a_run_takes_the_file(observed, tmp_path, call):
    done = call("compress", STORIES, tmp_path / "out", "--bits", "3-fast", "--embeddings", "dense", "--feedback", observed[0])
    assert done.returncode == 0
    assert "35 tensors" in done.stdout


def test_a_text_of_the_users_is_said_to_be_data(tmp_path, call):
    (tmp_path / "t.txt").write_text("Once upon a time there was a girl. " * 20)
    done = call("observe", STORIES, tmp_path / "s.safetensors", *SMALL, "--text", tmp_path / "t.txt")
    assert done.returncode == 0
    assert "t.txt, 2 x 32 tokens: what is made with it has seen data" in done.stdout
    for line in ("statistics  ", "36, which read 21 inputs", "time  ", "memory"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: no such text file"),
        (["--text", __file__, "--writer", STORIES], "--text is a text, --writer a model that writes one: give one of them"),
        (["--device-memory", "much"], "--device-memory must be a positive number of bytes or a text such as '5GB', got 'much'"),
        (["--writer", "nowhere"], "nowhere: no such file or folder"),
        (["--length", "513"], "knows 512 positions, the text has 513 tokens"),
    ],
)
def test_what_is_mistyped_is_one_line(options, message, tmp_path, here):
    done = here("observe", STORIES, tmp_path / "s.safetensors", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_it_can_be_stopped_and_goes_on(tmp_path, forked, call):
    out = tmp_path / "s.safetensors"
    arguments = ["observe", STORIES, out, "--sequences", 64]
    process = subprocess.Popen(forked(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    text = tmp_path / "s.safetensors.partial" / "text.safetensors"
    while process.poll() is None and not text.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"run the same command again to go on ({text.parent} keeps the text)" in shown
    assert text.exists()
    assert not out.exists()
    assert call(*arguments).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("command", ["observe", "compress"])
def test_a_full_disk_is_one_line(command, tmp_path, forked):
    """Files end at 20 kB, which holds the text that the model writes and not its statistics."""
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from seedlm.cli import main; main()"
    arguments = [command, STORIES, tmp_path / "s.safetensors", "--sequences", 1]
    done = subprocess.run(forked(*arguments, code=code), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "File too large" in told(done.stderr)[-1]
    assert "Traceback" not in done.stderr
    assert "no error feedback" not in done.stderr


def test_a_text_longer_than_the_context_is_no_reason_for_a_warning(tmp_path, call):
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl. " * 80)
    done = call("observe", STORIES, tmp_path / "s.safetensors", *SMALL, "--text", tmp_path / "text.txt")
    assert done.returncode == 0, done.stderr
    assert "Token indices" not in done.stderr
