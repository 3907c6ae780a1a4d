"""What can be refused is refused before work begins: in one line, and before torch is imported, which alone takes seconds."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys

import pytest

from tiny_models import STORIES

BLOCK = "known: auto, cuda, numba, torch"
"""Backends of the block code, in which the packed folder is."""
REFUSED = [
    ("compress SOURCE held", "held.partial: another run is writing this output"),
    ("compress SOURCE taken.txt/out", "taken.txt: is not a folder"),
    ("compress SOURCE out --size 1KB", "the weight files of this model can have 123,672 to 408,396 bytes, got 1,000"),
    ("compress SOURCE out --size 9GB", "bytes, got 9,000,000,000"),
    ("compress SOURCE out --size large", "--size must be a positive number of bytes or a text such as '5GB', got 'large'"),
    ("compress SOURCE out --size 0.3MB --feedback none", "a size is met by a mixture of formats, which needs to know"),
    ("compress SOURCE out --bits 3.5 --feedback none", "3.5 bits a weight are a mixture of formats"),
    ("compress SOURCE out --embeddings 99", "unknown format '99'"),
    ("compress SOURCE out --head 99", "unknown format '99'"),
    ("compress SOURCE out --feedback nosuch.txt", "there is no file 'nosuch.txt'"),
    ("compress SOURCE out --feedback nosuch.safetensors", "there is no file 'nosuch.safetensors'"),
    ("compress SOURCE out --feedback damaged.safetensors", "damaged.safetensors: truncated"),
    ("compress SOURCE out --feedback bytes.txt", "bytes.txt: is not UTF-8 text"),
    ("compress SOURCE out --feedback taken.txt", "taken.txt: the text has 5 bytes"),
    ("compress SOURCE out --code block --bits 3.7", "3.7 bits a weight are a mixture of formats, which needs to know"),
    ("compress SOURCE out --code block --bits 3.7 --feedback none", "where bits matter: add --feedback own, or measure"),
    ("compress SOURCE out --code block --bits 5.5", "--bits must be a number from 2 to 5, got 5.5"),
    ("compress SOURCE out --code block --sequences 8", "--sequences says on how much text to observe the model"),
    ("compress SOURCE out --sensitivity nosuch.json", "nosuch.json: cannot be read"),
    ("compress SOURCE out --rounding best", "trellis codes have no option 'rounding'"),
    ("compress SOURCE out --dtype int4", "dtype must be one of bfloat16, float16, float32, got 'int4'"),
    ("compress SOURCE out --include nosuch*", "no module with a weight matches --include 'nosuch*'"),
    ("compress SOURCE out --exclude nosuch*", "no module with a weight matches --exclude 'nosuch*'"),
    ("compress SOURCE out --max-shard-size large", "a shard size must be a positive number of bytes"),
    ("compress SOURCE out --device nowhere", "device 'nowhere' cannot be used here: known are auto, cpu, cuda"),
    ("compress SOURCE out --backend nosuch", "unknown backend 'nosuch'; known: auto, cuda, numba, reference"),
    ("observe SOURCE out.txt", "out.txt: statistics are a file of safetensors"),
    ("observe SOURCE damaged.safetensors", "damaged.safetensors: exists already"),
    ("observe SOURCE held.safetensors", "another run is writing this output"),
    ("observe SOURCE out.safetensors --text nosuch.txt", "nosuch.txt: no such text file"),
    ("observe SOURCE out.safetensors --text taken.txt", "taken.txt: the text has 5 bytes"),
    ("observe SOURCE out.safetensors --length 513", "the model knows 512 positions, the text has 513 tokens"),
    ("observe SOURCE out.safetensors --device-memory large", "--device-memory must be a positive number of bytes"),
    ("generate nosuch TEXT", "nosuch: no such file or folder"),
    ("generate SOURCE TEXT --chat", "has no chat template, so it only goes on from a text"),
    ("generate SOURCE TEXT --dtype int4", "dtype must be one of auto, float32, bfloat16, float16, got 'int4'"),
    ("generate SOURCE TEXT --device nowhere", "device 'nowhere' cannot be used here"),
    ("generate SOURCE TEXT --max-new-tokens 513", "the model knows 512 positions, new tokens are 513: fewer --max-new-tokens"),
    ("chat SOURCE --max-new-tokens 513", "the model knows 512 positions, new tokens are 513: fewer --max-new-tokens"),
    ("chat SOURCE", "has no chat template, so it only goes on from a text"),
    ("chat nosuch", "nosuch: no such file or folder"),
    ("serve nosuch", "nosuch: no such file or folder"),
    ("serve SOURCE --dtype int4", "dtype must be one of"),
    ("bench nosuch", "nosuch: no such file or folder"),
    ("bench SOURCE --tokens 600", "the model knows 512 positions, prompt and new tokens are 1112"),
    ("bench SOURCE --repeats 0", "repeats must be at least 1, got 0"),
    ("bench SOURCE --compile --device cpu", "transformers compiles for CUDA devices only, this is cpu"),
    ("bench SOURCE --explain", "has no quantization_config; this is not a compressed model"),
    ("inspect nosuch", "nosuch: no such folder"),
    ("inspect taken.txt", "taken.txt: is a file; a compressed model is a folder of config.json and safetensors"),
    ("inspect model.gguf", "model.gguf: is a GGUF file; a compressed model is a folder of config.json and safetensors, which"),
    ("inspect damaged.safetensors", "damaged.safetensors: is a safetensors file without a config.json beside it; a compressed"),
    ("inspect model/model.safetensors", "model/model.safetensors: is a safetensors file; name its folder, model"),
    ("inspect pipe --check", "pipe: is neither a folder nor a file; a compressed model is a folder"),
    ("inspect nowhere", "nowhere: is a link to nothing that is there; a compressed model is a folder"),
    ("evaluate SOURCE", "give a text: --wikitext FILE"),
    ("evaluate nosuch --text long.txt", "nosuch: no such file or folder"),
    ("evaluate SOURCE --text nosuch.txt", "nosuch.txt: cannot be read"),
    ("evaluate SOURCE --wikitext nosuch.txt", "nosuch.txt: cannot be read"),
    ("evaluate SOURCE --text taken.txt", "taken.txt: the text has 5 bytes"),
    ("evaluate SOURCE --text long.txt --context 513", "the model knows 512 positions, a window has 513"),
    ("evaluate SOURCE --text long.txt --reference nosuch", "nosuch: no such file or folder"),
    ("evaluate SOURCE --text long.txt --backend torch", "packed weights, which are dequantized here: add --packed"),
    ("evaluate SOURCE --text long.txt --packed --backend tosch", "no packed layer has a backend 'tosch', known: auto, cuda, "),
    ("evaluate SOURCE --text long.txt --packed --backend torch", "nothing is packed here that a backend could multiply by"),
    ("evaluate PACKED --text long.txt --packed --backend numba-int8", f"'numba-int8', {BLOCK}"),
    (
        "bench SOURCE --backend tosch",
        "no packed layer has a backend 'tosch', known: auto, cuda, cuda-int8, numba, numba-int8, torch",
    ),
    ("bench SOURCE --backend torch", "nothing is packed here that a backend could multiply by, so none can be 'torch'"),
    ("bench PACKED --backend numba-int8", f"packed: no packed layer has a backend 'numba-int8', {BLOCK}"),
    ("bench PACKED --explain --backend numba-int8", f"packed: no packed layer has a backend 'numba-int8', {BLOCK}"),
    ("generate PACKED TEXT --backend tosch", "no packed layer has a backend 'tosch', known: auto, cuda, "),
    ("generate PACKED TEXT --backend numba-int8", f"packed: no packed layer has a backend 'numba-int8', {BLOCK}"),
    ("generate PACKED TEXT --backend torch --dequantize", "are dequantized here: no --dequantize with 'torch'"),
    ("chat PACKED --backend tosch", "no packed layer has a backend 'tosch', known: auto, cuda, "),
    ("chat PACKED --backend numba-int8", f"packed: no packed layer has a backend 'numba-int8', {BLOCK}"),
    ("serve PACKED --backend tosch", "no packed layer has a backend 'tosch', known: auto, cuda, "),
    ("serve PACKED --backend numba-int8", f"packed: no packed layer has a backend 'numba-int8', {BLOCK}"),
    ("serve owner/name --backend tosch", "no packed layer has a backend 'tosch', known: auto, cuda, "),
    ("evaluate SOURCE --text long.txt --limit 0", "limit must be at least 1, got 0"),
    ("evaluate SOURCE --text long.txt --baseline nosuch", "unknown baseline 'nosuch'"),
    ("evaluate SOURCE --text long.txt --calibration nosuch.txt", "calibration text is for a baseline"),
    ("evaluate SOURCE --text long.txt --out taken.txt", "taken.txt: exists already"),
    ("evaluate SOURCE --text long.txt --out held.json", "held.json.partial: another run is writing this output"),
    ("evaluate SOURCE --text long.txt --tokens-out nosuch/out.npz", "nosuch: no such folder"),
    ("evaluate SOURCE --text long.txt --prompts nosuch.txt", "nosuch.txt: cannot be read"),
    ("sensitivity SOURCE -o taken.txt", "taken.txt: exists already"),
    ("sensitivity SOURCE -o out.json --length 513", "the model knows 512 positions, the text has 513 tokens"),
    ("sensitivity SOURCE -o out.json --sequences 0", "sequences must be at least 1, got 0"),
    ("sensitivity SOURCE -o out.json --dtype int4", "dtype must be one of"),
    ("design --bits 0.1", "no block format has 0.1 bits a weight or less"),
    ("design --bits nan", "a budget must be a number of bits a weight, got nan"),
    ("design --bits 4 --rounding nosuch", "rounding must be one of best, nearest, got 'nosuch'"),
    ("design --bits 4 --model nosuch", "nosuch: no such file or folder"),
    ("rtl -o out.v --bits 99", "unknown format '99'"),
    ("rtl -o nosuch/out.v", "nosuch: no such folder"),
]

ALL = """
import contextlib, io, json, sys
from seedlm.cli import main
found = []
for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(line)
    found.append([said.getvalue(), [name for name in ("torch", "transformers", "numba") if name in sys.modules]])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory, folders):
    """What each line of `REFUSED` is answered, and what has been imported by then. All in one process: none begins to work."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "taken.txt").write_text("Once.")
    (folder / "long.txt").write_text("Once upon a time there was a dog. " * 200)
    (folder / "bytes.txt").write_bytes(b"\xff\xfe" * 400)
    (folder / "damaged.safetensors").write_bytes(b"abc")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"abc")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to("nosuch")
    for name in ("held.partial", "held.safetensors.partial"):
        (folder / name).mkdir()
        (folder / name / "lock").touch()
    (folder / "held.json.partial").touch()
    before = sorted(folder.rglob("*"))
    lines = [[{"SOURCE": STORIES, "PACKED": folders[1]}.get(word, word) for word in line.split()] for line, _ in REFUSED]
    with contextlib.ExitStack() as held:
        for name in ("held.partial/lock", "held.safetensors.partial/lock", "held.json.partial"):
            fcntl.flock(held.enter_context(open(folder / name, "ab")), fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-c", ALL],
            input=json.dumps(lines, default=str),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before  # nothing is left behind
    return {line: answer for (line, _), answer in zip(REFUSED, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_it_is_refused_in_a_line_before_torch_is_imported(line, message, refusals):
    said, slow = refusals[line]
    assert (said.count("\n"), said.startswith("seedlm: "), slow) == (1, True, [])
    assert message in said
