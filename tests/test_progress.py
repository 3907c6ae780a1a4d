"""Bars: shown in a terminal or a notebook unless a caller listens itself, in Python calls as in commands."""

import io
import os
import threading
import time

import pytest

import seedlm
from seedlm import progress
from seedlm.cli import console
from tiny_models import SMALL, tiny_model


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_for(monkeypatch):
    """Stderr as a terminal; what is shown on it. In the test, since pytest puts its own there after the fixtures."""
    found = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", found)
    return found


def test_a_python_call_shows_a_bar_in_a_terminal(monkeypatch):
    terminal = terminal_for(monkeypatch)
    seedlm.compress_model(tiny_model("llama"), SMALL)
    assert "Encoding" in terminal.getvalue()
    assert "M weights" in terminal.getvalue()


def test_whoever_listens_is_told_and_nothing_is_shown(monkeypatch):
    terminal = terminal_for(monkeypatch)
    model, told = tiny_model("llama"), []
    seedlm.compress_model(model, SMALL, on_progress=told.append)
    assert sum(told) >= 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32)  # rows of 44 are padded
    assert terminal.getvalue() == ""


def test_nothing_is_shown_where_nobody_looks(capsys):
    seedlm.compress_model(tiny_model("llama"), SMALL)
    assert capsys.readouterr().err == ""


def test_a_phase_without_an_end_goes_when_the_next_begins(monkeypatch):
    terminal = terminal_for(monkeypatch)
    with progress.Bars() as bars:
        bars("open", 0, 0)
        bars("load", 0, 0)
        bars("text", 10, 100)
        bars("text", 100, 100)
    last = terminal.getvalue().rpartition("\x1b[?25h")[0].splitlines()[-1]
    assert "Writing a text" in last
    assert "Opening" not in last


def test_bars_leave_the_cursor_to_be_seen_after_an_interrupt(monkeypatch):
    terminal = terminal_for(monkeypatch)

    def interrupted():
        with progress.shown(None) as tell:
            tell("compress", 1, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = terminal.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


class TestLines:
    """Where nobody looks at a terminal: a line as a phase begins, then one every few seconds."""

    def test_a_phase_tells_amount_rate_and_time_left(self, monkeypatch, capsys):
        now = 100.0
        monkeypatch.setattr("seedlm.progress.time.monotonic", lambda: now)
        lines = progress.Lines(seconds=10.0)
        lines("compress", 0, 4_000_000)
        now = 105.0
        lines("compress", 1_000_000, 4_000_000)  # too soon
        now = 120.0
        lines("compress", 2_000_000, 4_000_000)
        now = 125.0
        lines("read", 500_000, 500_000)  # ended as it began
        now = 140.0
        lines("compress", 4_000_000, 4_000_000)
        assert capsys.readouterr().err.splitlines() == [
            "seedlm: Encoding: 4.0 M weights",
            "seedlm: Encoding: 2.0 M weights of 4.0 M weights (50%), 0.1 M/s, 20 s left",
            "seedlm: Reading the source: 0.5 M bytes, of which 0.5 M bytes are done",
            "seedlm: Encoding: 4.0 M weights in 40 s, 0.1 M/s",
        ]

    def test_it_speaks_while_nobody_calls(self, capsys):
        with progress.Lines(seconds=0.02) as lines:
            lines("load", 0, 0)
            wait_for(lambda: "so far" in capsys.readouterr().err)
            lines("compress", 0, 10)
            wait_for(lambda: "(0%), 0 s so far; kernels are compiled at their first use" in capsys.readouterr().err)
        assert not [thread for thread in threading.enumerate() if thread.name == "seedlm progress"]

    def test_what_goes_on_names_what_is_done(self, capsys):
        progress.Lines()("text", 1_000, 4_000)
        assert capsys.readouterr().err == "seedlm: Writing a text: 4.0 k tokens, of which 1.0 k tokens are done\n"

    def test_nobody_who_reads_is_no_reason_to_end_the_work(self, monkeypatch, capsys):
        with open(os.devnull) as unwritable:
            for closed in (None, unwritable):
                monkeypatch.setattr("sys.stderr", closed)
                with console.show_progress() as (tell, _):
                    tell("compress", 0, 10)
                    console.note("a note")
                    tell("compress", 10, 10)
        assert capsys.readouterr().out == ""


def wait_for(seen):
    deadline = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)
