"""Where to work, by name, how much memory there is, and how much that took. Imports torch only when it is used."""

import ctypes
import os
import re
import sys
from contextlib import suppress
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from seedlm.errors import BackendError

if TYPE_CHECKING:
    import torch

_QUEUES: Final = "32"
"""Queues of a GPU that streams share. With CUDA's 8 the small kernels of one matrix wait behind the long ones of others."""

_KINDS: Final = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "mlu", "musa", "xla", "ve", "maia", "privateuseone")


def check_names(names: str) -> None:
    """Raise BackendError for what no machine has: devices with commas between, without asking torch which are here."""
    for name in (each.strip() for each in names.split(",")):
        match = re.fullmatch(r"(\w+)(:\d+)?", name, re.ASCII)
        known = match is not None and (match[1] in _KINDS or entry_points(group="torch.backends"))
        if name != "auto" and not known:
            raise BackendError(
                f"device {name!r:.80} cannot be used here: known are auto, {', '.join(_KINDS[:4])} and others of torch, "
                "each also with a number, such as cuda:1"
            )


def choose_device(name: str) -> "torch.device":
    """A device by name; "auto" is the first CUDA device, or the CPU. Raises BackendError if it is not there."""
    import torch

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


def choose_devices(names: str) -> "list[torch.device]":
    """Devices by their names with commas between; "cuda" is every CUDA device, and "auto" too, or the CPU if there is none.

    A device that is named twice is listed twice. Many streams will run at once on each, for which CUDA is told if it has not
    started yet. Raises BackendError if one is not there.
    """
    import torch

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", _QUEUES)
    if names == "auto":
        names = "cuda" if torch.cuda.is_available() else "cpu"
    if names == "cuda" and torch.cuda.device_count():
        names = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return [choose_device(name.strip()) for name in names.split(",")]


def free_memory(device: "torch.device") -> int | None:
    """Bytes that could be put on a device now, what torch holds in reserve included; None for anything but a CUDA device."""
    if device.type != "cuda":
        return None
    import torch

    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def free_host_memory() -> int | None:
    """Bytes of the processor's memory that could be used now, the cache of files included; None where Linux does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def resident_memory() -> int | None:
    """Bytes of this process' pages in memory, those of mapped files too; None where Linux does not tell.

    First its C library gives back what it holds free.
    """
    if sys.platform != "linux":  # and Windows' ctypes fails at a library without a name
        return None
    with suppress(OSError, AttributeError):  # musl has no such call
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return None


def peak_host_memory() -> int:
    """The most bytes that this process has had resident; 0 on Windows, which has no such call."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(device: "torch.device") -> tuple[int, int]:
    """The most bytes of host memory that this process has had resident, and of the device's that torch has held, so far.

    The first is 0 on Windows, which has no such call.
    """
    import torch

    return peak_host_memory(), torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
