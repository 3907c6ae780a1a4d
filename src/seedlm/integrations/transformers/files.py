"""The files behind a call of `from_pretrained`: opened by the one reader that all ways in share, and verified while they load.

transformers has its own readers, which would believe much that ours refuses: an index that leads out of the folder, a tensor
in two shards, formats in config.json that the files contradict. So ours comes first, twice if need be: as soon as the folder's
name is known, before transformers opens a weight file, and when the files are known, which for a Hub repository is after they
came.

Digests of files that are new here are checked in threads while transformers copies and converts; what is damaged is known
before the model is handed out. ``SEEDLM_VERIFY=1`` in the environment checks every time, 0 never (docs/integrity.md).
"""

import os
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, Final

from seedlm.errors import CheckpointError, SourceError
from seedlm.storage import verified
from seedlm.storage.checkpoint import QUANT_METHOD, Checkpoint
from seedlm.storage.gguf_check import gguf_sizes, read_gguf_header
from seedlm.storage.safetensors import INDEX_NAME, SINGLE_NAME, TensorFiles
from seedlm.storage.untrusted import read_config, read_json

_SHARD: Final = re.compile(r"model-\d+-of-\d+\.safetensors", re.ASCII)
_CODES_OF_A_BYTE: Final = 4
VERIFY_VARIABLE: Final = "SEEDLM_VERIFY"


def check_model(path: Path) -> list[int] | None:
    """Read the headers of a local folder or GGUF file, whatever it holds. Raises SourceError or CheckpointError.

    returns   how many numbers each of its tensors has, packed ones as they are originally, or may have, if another library
              has packed them; None for what is no local path, and for weights in files that are not read here
    """
    if os.path.isfile(path):
        return [prod(tensor.shape) for tensor in read_gguf_header(path, gguf_sizes(path)).tensors.values()]
    if not os.path.isdir(path):
        return None
    if is_packed(path):
        checkpoint = Checkpoint.open(path)
        return [*(info.weights for info in checkpoint.packed.values()), *(prod(i.shape) for i in checkpoint.dense.values())]
    section = read_config(path, SourceError).get("quantization_config")
    if not any(os.path.lexists(path / file) for file in (SINGLE_NAME, INDEX_NAME)):
        return None
    infos = [entry.info for entry in TensorFiles.open(path, SourceError).entries.values()]
    return [_CODES_OF_A_BYTE * info.nbytes if section else prod(info.shape) for info in infos]


def is_packed(path: Path) -> bool:
    """Whether a local path is a folder in our codes, by its config.json. Raises SourceError if that cannot be read."""
    section = read_config(path, SourceError).get("quantization_config") if os.path.isdir(path) else None
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def check_folder(name: Any) -> None:
    """Raise CheckpointError if this names a local folder with weights of the usual names, and it is no sound packed one."""
    folder = Path(name) if isinstance(name, str | os.PathLike) and name else None
    if folder is not None and any(os.path.lexists(folder / file) for file in (SINGLE_NAME, INDEX_NAME)):
        Checkpoint.open(folder)
        if os.path.lexists(folder / INDEX_NAME) and "metadata" not in read_json(folder / INDEX_NAME, CheckpointError):
            raise CheckpointError(f"{folder / INDEX_NAME}: has no metadata, without which transformers does not read it")
    elif folder is not None and os.path.lexists(folder / "config.json"):
        found = [path.name for path in folder.glob("*.safetensors")]
        if not found or any(_SHARD.fullmatch(name) for name in found):  # others may be a variant's
            raise CheckpointError(f"{folder}: has no {SINGLE_NAME} and no {INDEX_NAME}")


def open_files(files: Iterable[str]) -> Checkpoint:
    """The packed folder that these weight files are, all of them. Raises CheckpointError."""
    paths = [Path(file) for file in files]
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: packed weights are stored as safetensors")
    if not paths:
        raise CheckpointError("packed weights are loaded from a folder's files, there are none here")
    folder = paths[0].parent
    if any(os.path.lexists(folder / file) for file in (SINGLE_NAME, INDEX_NAME)):
        opened = TensorFiles.open(folder, CheckpointError)
        if set(opened.metadata) == set(paths):
            return Checkpoint.open(folder, opened)
    return Checkpoint.open(folder, TensorFiles.of(paths, CheckpointError))


class Verification:
    """Holds the files of a checkpoint that are new against their digests from now on, beside whatever else goes on."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._done: Future[None] | None = None
        wanted = os.environ.get(VERIFY_VARIABLE, "")
        self._states = {
            path: verified.state(path)
            for path in checkpoint.files.metadata
            if wanted != "0" and (wanted == "1" or not verified.is_known(path))
        }
        if self._states:
            pool = ThreadPoolExecutor(1, thread_name_prefix="seedlm verify")
            self._done = pool.submit(self._verify)
            pool.shutdown(wait=False)

    def _verify(self) -> None:
        entries = self._checkpoint.files.entries
        self._checkpoint.verify([name for name, entry in entries.items() if entry.path in self._states])
        for path, before in self._states.items():
            if os.environ.get(VERIFY_VARIABLE) != "1":
                verified.remember(path, before)

    def finish(self) -> None:
        """Wait for it. Raises CheckpointError for a tensor that is not what was written."""
        if self._done is not None:
            self._done.result()
