"""Which backend multiplies by a packed weight: one pure predicate over device, format and shape, and what follows from it.

A backend that is asked for by name runs or raises its reason; only "auto" falls back, to the first of a family's that can.
"""

import torch

from seedlm.codes.base import Format, LinearBackend
from seedlm.codes.registry import family_of
from seedlm.errors import BackendError

AUTO = "auto"


def reason_no_backend(name: str, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
    """Why a backend cannot serve such a weight on `device`; None if it can. "auto" asks for any."""
    reasons = explain(device, format, shape)
    if name == AUTO:
        return "; ".join(filter(None, reasons.values())) if all(reasons.values()) else None
    if name not in reasons:
        return f"unknown backend {name!r}, known for {format.family} codes: {', '.join([AUTO, *reasons])}"
    return reasons[name]


def explain(device: torch.device, format: Format, shape: tuple[int, int]) -> dict[str, str | None]:
    """Backends of the format's family, fastest first -> why they cannot serve such a weight there, None if they can."""
    backends = family_of(format).backends()
    return {backend.name: backend.reason_unavailable(device, format, shape) for backend in backends}


def choose(name: str, device: torch.device, format: Format, shape: tuple[int, int]) -> LinearBackend:
    """A backend by name, or for "auto" the first that can serve such a weight. Raises BackendError with the reason."""
    if reason := reason_no_backend(name, device, format, shape):
        raise BackendError(reason)
    return next(
        backend
        for backend in family_of(format).backends()
        if name in (AUTO, backend.name) and backend.reason_unavailable(device, format, shape) is None
    )


def by_name(name: str, format: Format) -> LinearBackend:
    """A backend of the format's family, whether or not it can run here. Raises BackendError if it has none of that name."""
    for backend in family_of(format).backends():
        if backend.name == name:
            return backend
    raise BackendError(f"{format.family} codes have no backend {name!r}")
