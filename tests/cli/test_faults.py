"""What stood in the way of people who tried the commands, each as a test: refused early, told in one line, stopped cleanly."""

import json
import shutil
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
from tiny_models import SMALL, STORIES, STORY, tiny_gguf, told

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


def unknown(folder, text, place):
    return (
        f"seedlm: {text}: its token {place} has the id 512, and {folder} knows the ids 0 to 511, the rows of its embeddings: "
        "the tokenizer is another model's, or was given tokens that the model was not"
    )


@pytest.mark.parametrize(("how", "text", "place"), [("--raw", "the prompt", 3), ("--chat", "the conversation", 2)])
def test_a_prompt_of_tokens_that_the_model_does_not_know_is_refused(how, text, place, mismatched, here):
    done = here("generate", mismatched, "Once <cat>", how, "--max-new-tokens", 2)
    assert (done.returncode, done.stdout, told(done.stderr)) == (2, "", [unknown(mismatched, text, place)])
    assert here("generate", mismatched, "Once", how, "--max-new-tokens", 2).returncode == 0


def test_a_turn_of_tokens_that_the_model_does_not_know_is_refused_and_forgotten(mismatched, call):
    done = call("chat", mismatched, "--max-new-tokens", 2, input="Once\n<cat>\nOnce\n")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    assert any(unknown(mismatched, "the conversation", place) in done.stderr.splitlines() for place in range(2, 9))
    assert "too long" not in done.stderr


@pytest.mark.parametrize("what", ["text", "prompts"])
def test_texts_of_tokens_that_a_model_does_not_know_are_not_scored(what, mismatched, tmp_path, here):
    files = {"text": STORY * 8, "prompts": "Once\n"}
    files[what] = "<cat> " + files[what]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = ["--text", tmp_path / "text", "--prompts", tmp_path / "prompts", "--context", 32, "--limit", 1]
    done = here("evaluate", mismatched, *options, "--out", tmp_path / "run.json")
    named = tmp_path / "text" if what == "text" else "the prompt '<cat> Once'"
    assert (done.returncode, done.stdout, told(done.stderr)) == (2, "", [unknown(mismatched, named, 2)])


@pytest.mark.parametrize("command", ["compress", "observe"])
def test_a_model_is_not_observed_on_tokens_that_it_does_not_know(command, mismatched, tmp_path, here):
    (tmp_path / "text").write_text(f"<cat> {STORY}" * 20)
    source = shutil.copytree(STORIES, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mismatched / name, source)
    options = ("--feedback", tmp_path / "text", "--bits", "2-fast") if command == "compress" else ("--text", tmp_path / "text")
    done = here(command, source, tmp_path / "out.safetensors", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert told(done.stderr) == [
        unknown(source, "text", 2).replace("seedlm: ", "seedlm: no statistics for error feedback: ", 1)
    ]


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
