"""`seedlm chat`, and the chat template in `generate`: turns come from a pipe, or from a terminal that Ctrl-C is typed at."""

import os
import pty
import re
import signal
import subprocess
import time

import pytest

from seedlm.errors import SourceError
from seedlm.integrations.transformers import generate
from tiny_models import STORIES

FEW = ["--max-new-tokens", "8"]


@pytest.fixture
def talk(call):
    return lambda folder, said, *arguments: call("chat", folder, *FEW, *arguments, input=said)


def test_turns_are_answered_and_remembered_until_reset(talking, talk):
    done = talk(talking, "Once upon a time\nOnce upon a time\n/reset\nOnce upon a time\n/what\n\n")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == third
    assert first != second  # it has read more
    assert done.stderr.count("/reset forgets") == 2  # at the start, and for what it does not know


def test_the_system_turn_stays_over_a_reset(talking, talk):
    done = talk(talking, "Once\n/reset\nOnce\n/exit\nOnce\n", "--system", "A story about a dog.")
    first, second = done.stdout.splitlines()
    assert first == second
    assert first != talk(talking, "Once\n").stdout.strip()


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(talking, talk):
    done = talk(talking, "Once upon a time there was a dog. " * 20 + "\n" + "The cat sat. " * 60 + "\n" + "x " * 600 + "\n")
    assert done.returncode == 0
    assert "its oldest turns are forgotten" in done.stderr
    assert "the model knows 512 positions" in done.stderr


DOG = "Once upon a time there was a dog. "
"""Ten tokens, and one at the start of a text."""


def test_an_answer_ends_where_the_positions_do(talking, call):
    done = call("chat", talking, "--max-new-tokens", 500, input=DOG * 50)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr.splitlines()[-1] == "seedlm: the answer ends where the model's 512 positions do"


@pytest.mark.parametrize("way", ["--chat", "--raw"])
def test_generate_ends_where_the_positions_do(way, talking, here):
    done = here("generate", talking, DOG * 50, way, "--max-new-tokens", 500, "--device", "cpu")
    assert done.returncode == 0
    ends, speed = done.stderr.splitlines()[-2:]
    assert ends == "seedlm: the text ends where the model's 512 positions do"
    left = int(speed.split()[0])
    assert 0 < left < 20
    done = here("generate", talking, DOG * 50, way, "--max-new-tokens", left, "--device", "cpu")
    assert "positions" not in done.stderr


@pytest.mark.parametrize(("way", "text"), [("--chat", "conversation"), ("--raw", "prompt")])
def test_generate_refuses_more_tokens_than_there_are_positions_in_a_line(way, text, talking, here):
    done = here("generate", talking, DOG * 52, way, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    loading, refused = done.stderr.splitlines()
    assert loading.endswith("loading")
    assert re.fullmatch(rf"seedlm: the {text} has 52\d tokens, the model knows 512 positions", refused)


def test_learned_positions_end_a_text_too(tmp_path, here):
    """Without that, torch would be asked for a row that its table does not have."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 512}
    config = AutoConfig.for_model("opt", **sizes, max_position_embeddings=24, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path)
    done = here("generate", tmp_path, DOG, "--max-new-tokens", 24, "--device", "cpu")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-2] == "seedlm: the text ends where the model's 24 positions do"


def test_a_model_without_a_template_is_refused(here):
    done = here("chat", STORIES)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "has no chat template, so it only goes on from a text" in done.stderr


def test_a_folder_of_a_gguf_file_is_that_file(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").touch()
    opened = []

    def opens(model, **options):
        opened.append(model)
        raise SourceError("far enough")

    monkeypatch.setattr(generate, "open_tokenizer", opens)
    with pytest.raises(SourceError, match="far enough"):
        generate.Writer(str(tmp_path))
    assert opened == [tmp_path / "m.gguf"]


def test_generate_answers_by_the_template_unless_it_is_raw(talking, here):
    answer = here("generate", talking, "Once upon a time", *FEW).stdout
    raw = here("generate", talking, "Once upon a time", *FEW, "--raw").stdout
    assert raw.startswith("Once upon a time")
    assert not answer.startswith("Once")


def test_ctrl_c_stops_an_answer_and_not_the_program(talking, forked):
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        forked("chat", talking, "--max-new-tokens", 480),
        stdin=secondary,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(secondary)
    assert process.stdout is not None
    os.write(primary, b"Once upon a time\n")
    shown = b""
    while shown.count(b" ") < 8:
        shown += os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.write(primary, b"/reset\n")
    os.write(primary, b"/exit\n")
    shown += process.stdout.read()
    assert process.wait(timeout=60) == 0
    os.close(primary)
    assert len(shown.split()) < 400


@pytest.mark.parametrize("command", ["chat", "serve", "run", "generate"])
def test_help(command, here):
    done = here(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
