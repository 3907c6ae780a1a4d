"""Commands as the documents write them exist, and every option's help says what is done without it."""

import re
from pathlib import Path

import pytest
import typer.main

from seedlm.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "seedlm.ipynb"]
NOT_ASKED = {"FILE", "FOLDER", "GLOB", "MODEL", "NAME", "NAMES", "SPEC", "TEXT"}
"""What an option that is left out does not name: without one nothing is read, written or chosen."""


def options(command):
    return {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_commands_of_the_documents_exist_with_their_options(path):
    written = re.findall(r"(?:^\s*!?|`|&& |\")seedlm ([a-z]+)\b([^`\n&|;\"]*)", path.read_text(), re.MULTILINE)
    unknown = sorted({command for command, _ in written} - set(COMMANDS))
    assert not unknown
    for command, rest in written:
        named = set(re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*|-[a-z]\b)", rest))
        assert command == "run" or not named - options(command), command + rest


def test_the_readme_names_every_command():
    assert set(COMMANDS) <= set(re.findall(r"seedlm ([a-z]+)", (ROOT / "README.md").read_text()))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_is_and_what_holds_without_it(command):
    for option in COMMANDS[command].params:
        assert option.name == "help" or option.help, option.name
        if option.param_type_name == "option" and option.default is None and not option.required:
            told = re.search("default|instead", option.help, re.IGNORECASE)
            assert told or option.metavar in NOT_ASKED, f"{command} {option.opts[0]}: {option.help}"
