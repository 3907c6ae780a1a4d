"""Where to work, by name, and how much memory that took."""

import os
import sys
from typing import Final

import torch

from seedlm.errors import BackendError

_QUEUES: Final = "32"
"""Queues of a GPU that streams share. With CUDA's 8 the small kernels of one matrix wait behind the long ones of others."""


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is the first CUDA device, or the CPU. Raises BackendError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as reason:
        raise BackendError(f"device {name!r:.80} cannot be used here ({' '.join(str(reason).split())})") from None
    if device.type == "meta":
        raise BackendError("device 'meta' holds no numbers, so nothing can be computed there")
    return device


def choose_devices(names: str) -> list[torch.device]:
    """Devices by their names with commas between; "cuda" is every CUDA device, and "auto" too, or the CPU if there is none.

    A device that is named twice is listed twice. Many streams will run at once on each, for which CUDA is told if it has not
    started yet. Raises BackendError if one is not there.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", _QUEUES)
    if names == "auto":
        names = "cuda" if torch.cuda.is_available() else "cpu"
    if names == "cuda" and torch.cuda.device_count():
        names = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return [choose_device(name.strip()) for name in names.split(",")]


def peak_host_memory() -> int:
    """The most bytes that this process has had resident; 0 on Windows, which has no such call."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(device: torch.device) -> tuple[int, int]:
    """The most bytes of host memory that this process has had resident, and of the device's that torch has held, so far.

    The first is 0 on Windows, which has no such call.
    """
    return peak_host_memory(), torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
