"""What stood in the way of people who tried the commands, each as a test: refused early, told in one line, stopped cleanly."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from seedlm.codes.registry import family_of, parse_format
from seedlm.compare import load_runs
from seedlm.compress import run as runs
from seedlm.errors import EvaluationError
from tiny_models import SMALL, STORIES, tiny_gguf

COMMAND = [sys.executable, "-m", "seedlm"]


def refused(done, message):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert message in done.stderr


def start(*arguments):
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    return process


GENERATE = ("generate", STORIES, "Once upon a time", "--raw", "--max-new-tokens", 450)


@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0], ids=str)
def test_generate_is_stopped_at_any_moment(seconds):
    """While it imports, loads or writes: never an abort of the process."""
    process = start(*GENERATE)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), said  # the second: before Python is up
    assert b"terminate called" not in said
    assert b"Traceback" not in said or process.returncode == -signal.SIGINT or seconds < 1


def test_generate_is_stopped_twice_in_a_row():
    process = start(*GENERATE)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in said, b"terminate" in said) == (130, False, False)
    assert shown.endswith(b"\n")


def test_an_output_that_is_there_is_refused_before_anything_is_read(tmp_path, here):
    (tmp_path / "there").touch()
    nosuch = tmp_path / "nosuch"
    refused(here("sensitivity", nosuch, "-o", tmp_path / "there"), "there: exists already")
    refused(here("compress", nosuch, tmp_path / "there"), "there: exists already")
    refused(here("rtl", "-o", tmp_path / "there"), "there: exists already")
    refused(here("compare", nosuch, nosuch, "-o", tmp_path / "there"), "there: exists already")


def test_a_chat_template_is_missed_before_the_model_is_loaded(tmp_path, here):
    for path in STORIES.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    refused(here("generate", tmp_path, "Hello", "--chat"), "has no chat template")  # there are no weights to load


def test_generate_takes_a_gguf_file(tmp_path, here):
    tiny_gguf(tmp_path / "m.gguf")
    done = here("generate", tmp_path / "m.gguf", "AB", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 3  # its tokens, which mean nothing


@pytest.mark.parametrize("command", [("generate", "Once"), ("compress", "OUT"), ("bench",)], ids=lambda c: c[0])
def test_an_unfinished_run_is_named_as_one(command, tmp_path, here):
    (tmp_path / "m.partial" / "model").mkdir(parents=True)
    name, *rest = command
    rest = [tmp_path / "out" if each == "OUT" else each for each in rest]
    refused(here(name, tmp_path / "m.partial", *rest), "is an unfinished run of `seedlm compress`; repeat its command")


def test_a_short_text_says_what_to_do(folders, tmp_path, here):
    (tmp_path / "short.txt").write_text("Once upon a time")
    refused(here("evaluate", folders[0], "--text", tmp_path / "short.txt"), "choose a shorter context (--context)")


def test_runs_over_two_texts_are_told_by_their_texts(two, tmp_path):
    results = json.loads(two[1].read_text())
    results["text"] |= {"sha256": "0" * 64, "path": "other.txt", "tokens": 1234}
    (tmp_path / "other.json").write_text(json.dumps(results))
    with pytest.raises(EvaluationError, match=r"different texts.* and other\.txt \(1,234 tokens") as found:
        load_runs([two[0], tmp_path / "other.json"])
    assert "000000" not in str(found.value)


@pytest.mark.parametrize("format", ["4", SMALL])
def test_a_slow_search_is_told_before_it_starts(format, monkeypatch):
    cpu = torch.device("cpu")
    assert family_of(parse_format(format)).reason_slow(cpu, parse_format(format)) is None
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("seedlm.codes.trellis.viterbi.numba", "seedlm.codes.trellis.viterbi.lanes", "seedlm.codes.simd"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = []
    runs._tell_slow([parse_format(format)], [cpu], "auto", told.append)
    assert len(told) == 1
    assert "pip install numba" in told[0]
