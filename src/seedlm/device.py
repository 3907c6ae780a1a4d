"""Where to work, by name."""

import torch

from seedlm.errors import BackendError


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is the first CUDA device, or the CPU. Raises BackendError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as reason:
        raise BackendError(f"device {name!r} cannot be used here ({' '.join(str(reason).split())})") from None
    return device
