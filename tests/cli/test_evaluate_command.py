"""``seedlm evaluate`` as a user runs it."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

from tiny_models import SMALL, STORIES, STORY, told


class TestCommand:
    def test_summary(self, folders, story, call):
        options = ["--text", story.path, "--reference", folders[0], "--context", 32, "--limit", 4, "--device", "cpu"]
        done = call("evaluate", folders[1], *options)
        assert (done.returncode, told(done.stderr)) == (0, [])
        lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        assert SMALL in lines["model"]
        assert "4 windows of 32 tokens" in lines["protocol"]
        for line in ("perplexity", "KL", "same"):
            assert " +- " in lines[line]

    def test_progress_is_shown_on_a_terminal(self, folders, story, forked):
        pty = pytest.importorskip("pty")
        primary, secondary = pty.openpty()
        arguments = ["evaluate", folders[0], "--text", story.path, "--context", "32", "--limit", "4"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen(forked(*arguments), stdout=subprocess.DEVNULL, stderr=secondary, env=environment)
        os.close(secondary)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
            while piece := os.read(primary, 4096):
                shown += piece
        os.close(primary)
        assert process.wait(timeout=60) == 0
        assert b"Scoring" in shown
        assert b"0.1 / 0.1 k tokens" in shown

    def test_ctrl_c_says_how_to_go_on(self, folders, tmp_path, forked):
        (tmp_path / "text").write_text(STORY * 400)
        out, partial = tmp_path / "run.json", tmp_path / "run.json.partial"
        arguments = ["evaluate", folders[0], "--text", tmp_path / "text", "--context", "64", "--out", out]
        process = subprocess.Popen(forked(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (partial.exists() and len(partial.read_bytes().partition(b"\n")[2]) > 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout, len(told(stderr))) == (130, "", 1)
        assert f"run the same command again to go on ({partial} holds what is done)" in stderr
        assert partial.exists()
        assert not out.exists()

    def test_json(self, folders, story, tmp_path, here):
        options = ["--context", 32, "--limit", 2, "--out", tmp_path / "r.json", "--json"]
        done = here("evaluate", folders[0], "--wikitext", story.path, *options)
        assert done.returncode == 0
        assert json.loads(done.stdout) == json.loads((tmp_path / "r.json").read_text())

    def test_the_model_multiplies_by_a_backend_by_name_and_the_reference_does_not(self, folders, story, here, monkeypatch):
        from seedlm.evaluation import perplexity
        from seedlm.modeling.quantize import seed_linears

        used, score = [], perplexity.score_windows

        def scoring(model, *args, reference, **more):
            used.extend({layer.backend for _, layer in seed_linears(each)} for each in (model, reference))
            return score(model, *args, reference=reference, **more)

        monkeypatch.setattr(perplexity, "score_windows", scoring)
        options = ["--text", story.path, "--reference", folders[1], "--context", 32, "--limit", 2, "--device", "cpu"]
        options += ["--packed", "--backend"]
        done = here("evaluate", folders[1], *options, "torch", "--json")
        results = json.loads(done.stdout)
        assert results["settings"]["backend"] == "torch"
        assert (results["run"]["backends"], list(results["run"]["reference_backends"])) == ({"torch": 35}, ["numba"])
        assert used == [{"torch"}, {"auto"}]
        done = here("evaluate", folders[1], *options, "tosch")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("seedlm: no packed layer has a backend 'tosch', known: auto, cuda, ")
        done = here("evaluate", folders[1], *options, "cuda")
        assert (done.returncode, done.stdout, len(told(done.stderr))) == (2, "", 1)
        assert len(used) == 2

    def test_the_table_names_the_backend_that_multiplied(self, folders, story, here):
        options = ["--text", story.path, "--reference", folders[1], "--context", 32, "--limit", 1, "--device", "cpu"]
        shown = here("evaluate", folders[1], *options, "--packed", "--backend", "torch").stdout
        assert "multiplied by     torch (35 layers)\nthe reference     numba (35 layers)\n" in shown
        options[3] = folders[0]
        shown = here("evaluate", folders[1], *options).stdout
        assert "multiplied by     torch, its weights dequantized after loading\ntime" in shown

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give a text: --wikitext FILE"),
            (["--text", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
            (["--text", __file__, "--dtype", "int4"], "dtype must be one of"),
        ],
        ids=["no-text", "missing-text", "dtype"],
    )
    def test_errors_are_one_line(self, arguments, message, here):
        done = here("evaluate", STORIES, *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("seedlm: ")
        assert message in done.stderr
