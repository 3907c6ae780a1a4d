"""Bars: shown in a terminal or a notebook unless a caller listens itself, in Python calls as in commands."""

import io

import pytest

import seedlm
from seedlm import progress
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
