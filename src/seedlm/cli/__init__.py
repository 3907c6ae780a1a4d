"""The command line: a module for every command. What takes time to import is imported inside the commands.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 refused with one line that says why, 130 stopped by
Ctrl-C, 143 by SIGTERM.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from seedlm.cli.bench import bench
from seedlm.cli.chat import chat
from seedlm.cli.compare import compare
from seedlm.cli.compress import compress, inspect
from seedlm.cli.console import note, on_sigterm, stopped
from seedlm.cli.design import design
from seedlm.cli.evaluate import evaluate
from seedlm.cli.generate import generate
from seedlm.cli.observe import observe
from seedlm.cli.rtl import rtl
from seedlm.cli.sensitivity import sensitivity
from seedlm.cli.serve import run, serve
from seedlm.errors import SeedLMError
from seedlm.version import __version__

app = typer.Typer(
    name="seedlm",
    help="Large language models whose weights are regrown from seeds: a quarter of the memory, no calibration data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _stoppable(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that says in one line that it was stopped, if it does not say more itself."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as error:
            stopped(error)

    return call


for _command in (compress, inspect, generate, chat, serve, bench, evaluate, compare, observe, sensitivity, design, rtl):
    app.command()(_stoppable(_command))
# What follows the program's name is the program's, --help too.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(_stoppable(run))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors that have a message are one line, anything else is a bug and keeps its traceback.

    arguments   what follows the program's name; None takes them from the command line
    """
    if sys.stderr is None:  # closed by whoever started this (2>&-); `print` would take stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if arguments is None:
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        app(arguments, standalone_mode=True)
    except SeedLMError as error:
        note(str(error))
        sys.exit(2)
    except KeyboardInterrupt as error:
        stopped(error)
    except SystemExit as end:  # typer makes 130 of every KeyboardInterrupt before a command begins, and says nothing
        reason = end.__context__.__cause__ if end.__context__ else None
        if isinstance(reason, KeyboardInterrupt):
            stopped(reason)
        _flush_results()
        raise
    except OSError:
        _flush_results("\n")  # what could not be written is forgotten, so that there has to be more
        raise


def _flush_results(more: str = "") -> None:
    """End with one line where standard output takes no more, since its disk is full, say. A closed pipe is no error."""
    try:
        if sys.stdout is not None:
            sys.stdout.write(more)
            sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        note(f"standard output: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again at its end
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"seedlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
