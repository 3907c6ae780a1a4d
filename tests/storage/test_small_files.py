"""Work is bounded by a file's size: hostile files of less than a megabyte are refused in 2 s of a processor and 200 MB.

These are bounds, not speeds: what they forbid took from 5 s to for ever, and up to 8 GB.
"""

import json
import os
import subprocess
import sys

import pytest

import small_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
pytest.importorskip("gguf")
fcntl = pytest.importorskip("fcntl")

NAMES = [
    *(f"packed-{name}" for name in small_files.PACKED),
    *(f"source-{name}" for name in (*small_files.SOURCES, *small_files.GGUF)),
    *(f"load-{name}" for name in (*small_files.SOURCES, *small_files.GGUF) if "folder" not in name),
    *(f"runs-{name}" for name in small_files.RECORDS),
    *(f"statistics-{name}" for name in ("rows", "long", "tokens")),
    *(f"{kind}-{name}" for kind in ("text", "prompts") for name in ("fifo", "zero")),
    *(f"sensitivity-{name}" for name in ("long", "large")),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Name -> what came of it, seconds, kilobytes, message. Of several workers the first to come does it for all."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "small_files.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = base / "small_files.jsonl"
        if not lines.exists():
            lines.write_text(_measure(tmp_path_factory.mktemp("small")))
    return {name: found for name, *found in map(json.loads, lines.read_text().splitlines())}


def _measure(folder):
    small_files.write(folder)
    for path in [*folder.glob("*-*"), *folder.glob("*-*/*")]:
        assert not path.is_file() or path.stat().st_size < 1_000_000, path
    command = [sys.executable, small_files.__file__, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_small_file_makes_little_work(measured, name):
    result, seconds, kilobytes, message = measured[name]
    assert result == "refused"
    assert len(message) <= 2000
    assert seconds < 2
    assert kilobytes < 200_000
