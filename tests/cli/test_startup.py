"""What is imported when: torch and transformers only where they are used, and packed folders are known all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {"torch", "transformers", "numba"}


def python(code: str, *arguments: object, command: list[str] | None = None) -> str:
    """What a process of its own prints that runs this code, with these arguments in sys.argv."""
    done = subprocess.run(
        command or [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def packed(finished):
    return finished[0]


@pytest.fixture
def with_torch(forked):
    """`python` where torch has been imported before, which takes most of the seconds: for what comes after it."""
    return lambda code, *arguments: python(code, command=forked(*arguments, code=code, bare=True))


def test_the_package_itself_imports_nothing_slow():
    assert not SLOW & {*python("import seedlm, sys; print(*sys.modules)").split()}


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("compress --help", 0),
        ("inspect PACKED", 0),
        ("inspect nosuch", 2),
        ("compress nosuch out", 2),
        ("compress PACKED out --bits 9.5", 2),
        ("sensitivity nosuch -o out", 2),
    ],
)
def test_help_headers_and_typing_errors_import_nothing_slow(packed, arguments, exit_code):
    command = """
import sys
from pathlib import Path
from seedlm.cli import main
try:
    main()
except SystemExit as end:
    print(end.code or 0, *sys.modules)
"""
    printed = python(command, *arguments.replace("PACKED", str(packed)).split())
    code, *modules = printed.splitlines()[-1].split()
    assert (int(code), SLOW & {*modules}) == (exit_code, set())


def test_a_search_does_not_import_transformers():
    modules = python("import seedlm, sys; seedlm.encode; seedlm.compress_checkpoint; print(*sys.modules)").split()
    assert SLOW & {*modules} == {"torch"}


LOAD = """
from transformers import AutoModelForCausalLM, logging
logging.disable_progress_bar()
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.parametrize(
    "imports", ["from transformers import LlamaForCausalLM; import seedlm", "import seedlm.integrations.transformers.quantizer"]
)
def test_packed_folders_load_whatever_is_imported_first(packed, imports, with_torch):
    assert with_torch(f"import sys; {imports}{LOAD}", packed) == "SeedLinear\n"


def test_two_threads_may_import_what_needs_the_other(packed):
    threads = """
import sys, threading, seedlm, transformers
thread = threading.Thread(target=lambda: transformers.LlamaForCausalLM)
thread.start()
print(seedlm.SeedLMConfig.__name__)
thread.join()
"""
    assert python(threads + LOAD, packed) == "SeedLMConfig\nSeedLinear\n"


def test_a_registry_that_is_imported_later_and_then_again_is_told_each_time(packed, with_torch):
    again = """
import importlib
from transformers.quantizers import auto
importlib.reload(seedlm)
importlib.reload(auto)
print(sum(type(finder).__module__ == "seedlm.integrations.transformers.hook" for finder in sys.meta_path))
print(type(auto.__loader__).__name__, auto.__spec__.loader is auto.__loader__)
"""
    printed = with_torch(f"import seedlm, sys, transformers{LOAD}{again}{LOAD}", packed)
    assert printed == "SeedLinear\n1\nSourceFileLoader True\nSeedLinear\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="asks for a disk that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_results_that_nothing_takes_are_one_line(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "seedlm", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "seedlm: standard output: No space left on device\n")


def test_results_that_are_not_taken_at_the_end_are_one_line(tmp_path):
    """A file's are kept back until there is nothing more."""
    resource = pytest.importorskip("resource")
    with open(tmp_path / "results", "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "seedlm", "--version"],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    assert (done.returncode, done.stderr) == (2, "seedlm: standard output: File too large\n")
