"""Models and runs that several test files share. They are made once, so no test may change them.

What takes seconds is imported inside: tests that need none of it do not wait for it.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from synthetic_runs import original_run, synthetic, write

os.environ.setdefault("SEEDLM_VERIFY", "1")  # every load is verified, and nothing is noted in the user's cache

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the processors: threads of OpenMP that outnumber them spin against each other, 37 s instead of 0.5 s for a
    # pass over a tiny model. Set before torch is imported, and for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_configure(config):
    """Compiled code in one folder for all workers, the processes that they start, and later runs.

    Numba asks only whether the file of a function has changed, not what it calls in others: another version of any compiled
    module is another folder. Set before numba is imported.
    """
    if {"NUMBA_CACHE_DIR", "SEEDLM_CACHE"} <= {*os.environ} or not hasattr(config, "cache"):
        return
    texts = [path.read_bytes() for path in sorted((config.rootpath / "src").rglob("*.py"))]
    compiled = [text for text in texts if re.search(rb"^(from|import) (numba|llvmlite)", text, re.MULTILINE)]
    digest = hashlib.sha256(b"".join(compiled)).hexdigest()[:16]
    folder = config.cache.mkdir("numba")
    for name in ("NUMBA_CACHE_DIR", "SEEDLM_CACHE"):
        os.environ.setdefault(name, str(folder / digest))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for other in folder.iterdir():
            if other.name != digest:
                shutil.rmtree(other, ignore_errors=True)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The folder of a tiny Llama in bfloat16."""
    from tiny_models import tiny_llama

    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def finished(llama, tmp_path_factory):
    """The folder that it is compressed to, and the run's report."""
    from tiny_models import run

    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(llama, out)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """stories260K, and the same compressed with few seeds: near enough to compare, far enough to differ."""
    from tiny_models import STORIES, run

    packed = tmp_path_factory.mktemp("models") / "packed"
    run(STORIES, packed)
    return STORIES, packed


@pytest.fixture(scope="session")
def talking(folders, tmp_path_factory):
    """The packed stories260K with a chat template: the turns, one after the other."""
    folder = shutil.copytree(folders[1], tmp_path_factory.mktemp("talking") / "packed")
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn['content'] }} {% endfor %}")
    return folder


@pytest.fixture(scope="session")
def mismatched(talking, tmp_path_factory):
    """The same folder, whose tokenizer was given a token, ``<cat>``, that the model was not."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(talking, tmp_path_factory.mktemp("mismatched") / "packed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<cat>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forked():
    """What to start for a command line in a process of its own that has its imports behind it (`forked.py`).

    code   what runs instead of the command line, with these arguments in sys.argv
    bare   whether nothing of transformers, of the Hub's client and of ours is imported yet
    """
    script = str(Path(__file__).with_name("forked.py"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "socket")
        server = subprocess.Popen([sys.executable, script, "serve", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"

        def command(*arguments, code="from seedlm.cli import main; main()", bare=False):
            return [sys.executable, "-IS", script, "run", f"{path}.bare" if bare else path, code, *map(str, arguments)]

        yield command
        server.communicate(timeout=60)
        assert server.returncode == 0


@pytest.fixture(scope="session")
def call(forked):
    """Such a process, from arguments to its end."""

    def finished(*arguments, **options):
        return subprocess.run(forked(*arguments), capture_output=True, text=True, timeout=120, **options)

    return finished


@pytest.fixture
def here(capfd):
    """The command line without a process of its own, which spends seconds on imports: arguments to a finished process."""
    from seedlm.cli import main

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        return subprocess.CompletedProcess(arguments, stopped.value.code or 0, *capfd.readouterr())

    yield call
    if (transformers := sys.modules.get("transformers")) is not None:  # commands quieten it for their process
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_progress_bar()


@pytest.fixture
def story(tmp_path):
    """A short text for a model of stories."""
    from seedlm.evaluation.text import Text
    from tiny_models import STORY

    path = tmp_path / "story.txt"
    path.write_text(STORY * 8)
    return Text.from_file(path)


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Results of two compressed models and of their original."""
    folder = tmp_path_factory.mktemp("two")
    return [
        write(folder, "4bit", *synthetic(0)),
        write(folder, "3bit", *synthetic(5)),
        write(folder, "original", *original_run()),
    ]


@pytest.fixture(scope="session")
def forty(tmp_path_factory):
    """Results of forty compressed models."""
    folder = tmp_path_factory.mktemp("forty")
    return [write(folder, f"run{number:02}", *synthetic(number)) for number in range(40)]


@pytest.fixture
def dequantizing(monkeypatch):
    """Layers form their weights by the definition, so that a packed model can be held against a dense one to the bit."""
    from seedlm.codes.block.kernels.cpu import NumbaBackend

    monkeypatch.setattr(NumbaBackend, "reason_unavailable", lambda *_: "this test compares to the bit")
