"""Tensors of which there may be more than memory: kept on a disk, where the system reads and drops them as it needs to."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def keep(tensor: Tensor, folder: Path | None) -> Tensor:
    """The same values on the CPU, backed by a file without a name in a folder, or in memory for None; not to be written to."""
    tensor = tensor.cpu()
    if folder is None or os.name != "posix" or not tensor.numel():
        return tensor
    with tempfile.NamedTemporaryFile(dir=folder, prefix="spool-") as file:
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(file.name)
        flat = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape)
