"""What numba compiles, as machine code that is kept for later processes: those import neither numba nor LLVM.

A *maker* is a function in a module that imports numba; what it makes of its parameters is bytes. `made` finds these in a file
(`seedlm.kept`) or has them made. Its name is a digest of all that they depend on: the texts of this package and of the maker's
file, the versions of what compiles, the processor, and numba's settings. `load` puts a kernel's bytes into memory, by an image
that `linking` has made ready and that cannot be written to where it is run.

On Linux with an x86-64 or a 64-bit ARM processor. Elsewhere, and where such memory is not given, numba compiles and keeps
kernels in its own way (`compiled`).
"""

import ctypes
import hashlib
import importlib
import importlib.util
import mmap
import os
import platform
import struct
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from seedlm import kept

_COMPILERS: Final = ("numba", "llvmlite", "numpy")
_SETTINGS: Final = ".numba_config.yaml"
_NO_SETTINGS: Final = ("NUMBA_CACHE_DIR",)
_CPUINFO: Final = Path("/proc/cpuinfo")
_PROCESSOR: Final = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
"""How lines of that begin that say what a processor is, x86's and ARM's."""

_NOT_INHERITED: Final = 1
"""MFD_CLOEXEC, of Linux."""


class Code(NamedTuple):
    """A kernel in memory, where it stays as long as the process. address: of its first instruction."""

    address: int


def made(module: str, maker: str, *parameters: Any) -> Any:
    """What a maker makes of parameters, whose `repr` says all about them. Bytes are kept, and found by the next process."""
    texts = _imported(), _text(module)
    known = *texts, _facts()
    name = hashlib.sha256(repr((known, module, maker, parameters)).encode()).hexdigest()[:40] + ".code"
    found = kept.read(name) if all(known) else None
    if found is None:
        found = _make(module, maker, *parameters)
        if all(known) and isinstance(found, bytes) and texts == (_texts(), _text(module)):  # nobody edits them meanwhile
            kept.write(name, found)
    return found


def kernel(module: str, maker: str, *parameters: Any) -> Any:
    """A kernel that a maker makes of parameters: `Code`, or numba's own, which has an address as well."""
    code = (made if loads() else _make)(module, maker, *parameters)
    return load(code) if isinstance(code, bytes) else code


def _make(module: str, maker: str, *parameters: Any) -> Any:
    return getattr(importlib.import_module(module), maker)(*parameters)


@cache
def loads() -> bool:
    """Whether this process can run what it has not compiled."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or struct.calcsize("P") != 8:
        return False
    try:
        _place(bytes(16))
    except (OSError, AttributeError):
        return False
    return True


def load(packed: bytes) -> Code:
    """Put a kernel into memory (`linking.Image.packed`). Raises OSError where the system gives none that can be run."""
    head, _, image = packed.partition(b"\n")
    entry, *functions = head.decode().split()
    library = ctypes.CDLL(None)
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in functions]
    table = struct.pack(f"{len(addresses)}Q", *addresses)
    return Code(_place(table + image[len(table) :]) + int(entry))


def _place(image: bytes) -> int:
    """The address of memory that can be read and run, but not written to: a file without a name, of which nothing else knows.

    It is never given back: threads that help with kernels may be in them until the process has ended.
    """
    library = ctypes.CDLL(None, use_errno=True)  # not `os.memfd_create`, which builds for older systems lack
    to_memory = library.mmap
    to_memory.restype = ctypes.c_void_p
    to_memory.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    number = library.memfd_create(b"seedlm", _NOT_INHERITED)
    if number < 0:
        raise OSError(ctypes.get_errno(), "no file without a name")
    with os.fdopen(number, "wb") as file:
        file.write(image)
        file.flush()
        access = mmap.PROT_READ | mmap.PROT_EXEC
        address: int = to_memory(None, len(image), access, mmap.MAP_PRIVATE, number, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "no memory that code can be run in")
    return address


@cache
def _facts() -> str | None:
    """What machine code depends on, besides texts and its maker's parameters; None where that cannot be found out."""
    try:
        versions = [metadata.version(name) for name in _COMPILERS]
        processor = _CPUINFO.read_text().split("\n\n")[0].splitlines()
        settings = Path(_SETTINGS).read_bytes() if Path(_SETTINGS).exists() else b""
    except (OSError, metadata.PackageNotFoundError):
        return None
    variables = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_") and item[0] not in _NO_SETTINGS)
    lines = [line for line in processor if line.startswith(_PROCESSOR)]
    return repr((platform.machine(), sys.implementation.cache_tag, versions, lines, variables, settings))


def _text(module: str) -> str | None:
    """A digest of a maker's file."""
    found = importlib.util.find_spec(module)
    return _digest([Path(found.origin)]) if found and found.origin else None


def _texts() -> str | None:
    """A digest of this package's files."""
    here = Path(__file__)
    return _digest(sorted(here.parent.rglob(f"*{here.suffix}")))  # compiled ones where no others were installed


def _digest(paths: list[Path]) -> str | None:
    try:
        digests = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    except OSError:
        return None
    return hashlib.sha256(b"".join(digests)).hexdigest()


_imported = cache(_texts)
_imported()  # now: what this process imports from here on is of these texts
