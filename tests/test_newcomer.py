"""What README.md tells a newcomer to type, typed: its blocks of Python and of shell, word for word, in an empty home.

The model that they name comes from a stand-in of the Hub and is a tiny one. The notebook's cells follow.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub import Hub
from tiny_models import STORIES, tiny_llama

ROOT = Path(__file__).parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory, forked):
    """An empty home with the command `seedlm` on its path, and the environment to run in, while the Hub answers.

    Python is a process that imports all it needs. The commands, which ask the Hub for nothing, have their imports behind them.
    """
    home, hub = tmp_path_factory.mktemp("home"), Hub()
    source = home / "source"
    tiny_llama(source, hidden_size=64, intermediate_size=96, layers=1, vocab_size=512, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, source)
    (source / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn['content'] }} {% endfor %}")
    hub.files[MODEL] = {path.name: path.read_bytes() for path in source.iterdir()}
    shutil.rmtree(source)
    (home / "bin").mkdir()
    command = home / "bin" / "seedlm"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(forked())} "$@"\n')
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name in ("NUMBA_CACHE_DIR", "OMP_NUM_THREADS")}
    with hub.serving() as address:
        yield (
            home,
            {
                **kept,
                "HOME": str(home),
                "PATH": f"{home / 'bin'}:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT / "src"),
                "HF_ENDPOINT": address,
            },
        )


def run(home, kind, text):
    folder, environment = home
    command = [sys.executable, "-c", text] if kind == "python" else ["/bin/sh", "-ec", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"
    return done.stdout


def test_what_the_readme_says_to_type_works(home):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [kind for kind, _ in blocks] == ["python", "bash"]
    said = [run(home, *block) for block in blocks]
    assert len(said[0].strip()) > len("Once upon a time")
    for expected in ("bits each", "tokens/s"):
        assert expected in said[1]
    assert (home[0] / "smollm2-4bit" / "README.md").exists()


def test_the_notebook_runs(home):
    cells = json.loads((ROOT / "docs" / "seedlm.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "%pip" in code[0]
    shutil.rmtree(home[0] / "smollm2-4bit", ignore_errors=True)
    said = run(home, "python", "\n".join(code[1:]))
    assert re.search(r"KL on this prompt: \d+\.\d{4} nats a token", said)
    assert "original: " in said
    assert "packed: " in said
