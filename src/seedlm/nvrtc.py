"""CUDA C++ without a compiler on the user's machine: NVRTC makes the machine code, the driver runs it on torch's stream.

A kernel is text. `compile_only` turns it into a cubin for one architecture, and needs no GPU. `load` does that for a
device, keeps the cubin on disk for the next process, and returns a `Kernel` to call::

    scale = load(source, "scale", "PPfi", device=x.device, options=("-DWIDTH=4",))
    scale((blocks,), 256, x, y, 0.5, n)

Parameters are described by one letter each, those of Python's `struct`: P a pointer (a tensor, whose data_ptr is taken),
i and I 32-bit integers, q and Q 64-bit ones, f a float. The layout that `struct` gives them is the one that CUDA expects.
Letters in braces are the members of one parameter, a structure whose size is a multiple of its largest member's.

A call costs the host some microseconds, which counts where a matrix product takes fifteen: so the arguments are packed
into a buffer that each thread keeps, the driver is called without building anything, and the error is looked at by
identity. Nothing waits for the device and nothing is allocated, so calls can be captured into a CUDA graph (load before
the capture: loading code may synchronise). Any thread may call; a device other than the current one is made current first.

The compiler and the driver's calls are reached through `cuda-bindings`, which is imported by the first use only.
"""

import ctypes
import hashlib
import re
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedlm import kept
from seedlm.errors import BackendError, extra

REMEDY = extra("cuda")
STANDARD = ("-std=c++17",)
TYPES: Final = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""The dtypes of inputs and outputs that kernels know, and the number that each has in their text."""
_PLAIN_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that any kernel may ask for; more has to be announced to the driver."""


@cache
def common() -> str:
    """The text of kernel.cuh, to be put before a kernel's own."""
    return (Path(__file__).parent / "kernel.cuh").read_text(encoding="utf-8")


def reason_unavailable() -> str | None:
    """Why nothing can be compiled here, in one line with the remedy, or None. Needs no GPU."""
    try:
        _version()
    except BackendError as reason:
        return str(reason)
    return None


def index_of(device: torch.device) -> int:
    """The number of a CUDA device; ``cuda`` alone is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def architecture(index: int) -> int:
    """A CUDA device's compute capability as a number: 90 for an H100."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def processors(index: int) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def compile_only(source: str, arch: int, options: Sequence[str] = (), specific: bool = False) -> bytes:
    """The cubin of CUDA C++ text for one architecture (90 stands for sm_90), through the cache on disk.

    specific: with the instructions that only this very architecture has (sm_90a).

    Raises BackendError with the compiler's own words if the text does not compile, or if there is no compiler.
    """
    flags = (f"-arch=sm_{arch}{'a' if specific else ''}", *STANDARD, *options)
    key = hashlib.sha256("\0".join((source, *flags, _version())).encode()).hexdigest()
    name = f"{key[:40]}.cubin"
    if (cubin := kept.read(name)) is None:
        cubin = _compile(source, flags)
        kept.write(name, cubin)
    return cubin


class Kernel:
    """One kernel on one device, to be called with a grid, a block and its arguments. Made by `load`."""

    def __init__(self, function: Any, context: Any, name: str, signature: str, device: int, overlap: bool) -> None:
        self.name, self.device, self.overlap = name, device, overlap
        self._function, self._context = function, context
        self._pack = struct.Struct(signature.replace("{", "").replace("}", ""))
        self._offsets = _offsets(signature)
        self._thread = threading.local()
        driver = _bindings()[0]
        self._launch, self._launch_configured = driver.cuLaunchKernel, driver.cuLaunchKernelEx
        self._success = driver.CUresult.CUDA_SUCCESS
        self._stream = _raw_stream()

    def __call__(self, grid: tuple[int, ...], block: int, *arguments: Tensor | int | float | None, shared: int = 0) -> None:
        """Put the kernel on torch's current stream of its device.

        grid: one to three numbers of blocks; block: threads along x; shared: bytes of dynamic shared memory. Tensors
        go in as pointers (None is a null one) and must outlive the work, as for torch's own kernels: same stream, or
        record_stream. Raises BackendError with the driver's reason.
        """
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self(grid, block, *arguments, shared=shared)
        try:
            buffer, addresses, config = self._thread.memory
        except AttributeError:
            buffer, addresses, config = self._first_call_of_thread()
        values = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in arguments]
        self._pack.pack_into(buffer, 0, *values)
        x, y, z = (*grid, 1, 1)[:3]
        stream = self._stream(self.device)
        if config is None:
            (result,) = self._launch(self._function, x, y, z, block, 1, 1, shared, stream, addresses, 0)
        else:
            config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
            config.blockDimX, config.sharedMemBytes, config.hStream = block, shared, stream
            (result,) = self._launch_configured(config, self._function, addresses, 0)
        if result is not self._success and result != self._success:
            raise BackendError(f"CUDA kernel {self.name} could not be started: {result.name}, grid {grid}, block {block}")
        return None

    def _first_call_of_thread(self) -> tuple[Any, int, Any]:
        """What a thread keeps: a buffer for arguments, the address of the pointers into it, a launch's settings or None."""
        driver = _bindings()[0]
        if not int(_checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")):
            _checked(driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
        buffer = ctypes.create_string_buffer(max(self._pack.size, 1))
        start = ctypes.addressof(buffer)
        table = (ctypes.c_void_p * max(len(self._offsets), 1))(*(start + offset for offset in self._offsets))
        self._thread.keep = table
        self._thread.memory = buffer, ctypes.addressof(table), self._overlapping() if self.overlap else None
        return self._thread.memory

    @staticmethod
    def _overlapping() -> Any:
        """Settings that let a kernel start before the one in front of it in the stream has ended."""
        driver = _bindings()[0]
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.attrs, config.numAttrs = [attribute], 1
        config.blockDimY = config.blockDimZ = 1
        return config


def _offsets(signature: str) -> list[int]:
    """Where each parameter begins."""
    letters, offsets = "", []
    for parameter in re.findall(r"\{\w+\}|\w", signature):
        members = parameter.strip("{}")
        offsets.append(struct.calcsize(letters + members[0]) - struct.calcsize(members[0]))
        letters += members
    return offsets


_loaded: dict[tuple[Any, ...], Kernel] = {}
_loading = threading.Lock()


def load(
    source: str,
    name: str,
    signature: str,
    *,
    device: torch.device,
    options: Sequence[str] = (),
    shared: int = 0,
    overlap: bool = False,
    specific: bool = False,
) -> Kernel:
    """The kernel `name` (declared extern "C") of CUDA C++ text, ready to run on a device.

    signature   a letter for each parameter (see the module)
    options     further flags for the compiler
    shared      the most dynamic shared memory, in bytes, that a call will ask for
    overlap     from compute capability 9.0 on, start while the kernel before it in the stream still runs, once all of that
                one's blocks have executed griddepcontrol.launch_dependents (or ended); such a kernel has to execute
                griddepcontrol.wait before it touches what others write or read
    specific    see `compile_only`

    Compiled once for each architecture and loaded once for each device. Raises BackendError with the compiler's or the
    driver's reason.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (source, name, signature, index, *options, shared, overlap, specific)
    if (kernel := _loaded.get(key)) is not None:
        return kernel
    with _loading:
        if (kernel := _loaded.get(key)) is None:
            arch = architecture(index)
            cubin = compile_only(source, arch, options, specific)
            kernel = _loaded[key] = _load(cubin, name, signature, index, shared, overlap and arch >= 90)
    return kernel


def _load(cubin: bytes, name: str, signature: str, index: int, shared: int, overlap: bool) -> Kernel:
    driver = _bindings()[0]
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()
        context = _checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
        if not int(context):
            context = _checked(driver.cuDevicePrimaryCtxRetain(index), "cuDevicePrimaryCtxRetain")
            _checked(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        module = _checked(driver.cuModuleLoadData(cubin), f"loading {name}")
        function = _checked(driver.cuModuleGetFunction(module, name.encode()), f"finding {name}")
        if shared > _PLAIN_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, shared), f"{shared} bytes of shared memory for {name}")
    return Kernel(function, context, name, signature, index, overlap)


def _compile(source: str, flags: Sequence[str]) -> bytes:
    nvrtc = _bindings()[1]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"seedlm.cu", 0, [], []), "nvrtcCreateProgram")
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            words = log.decode(errors="replace").strip("\0 \n")
            raise BackendError(f"CUDA source does not compile ({result.name}, {' '.join(flags)}):\n{words}")
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of one of the bindings' (error, value...) tuples. Raises BackendError if the error is one."""
    if int(result[0]):
        raise BackendError(f"CUDA: {what} failed with {result[0].name}")
    return result[1] if len(result) > 1 else None


@cache
def _bindings() -> tuple[Any, Any]:
    """The modules of `cuda-bindings` for the driver and for NVRTC."""
    try:
        from cuda.bindings import driver, nvrtc  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise BackendError(f"CUDA kernels need cuda-bindings and NVRTC: {REMEDY}") from None
    return driver, nvrtc


@cache
def _version() -> str:
    """NVRTC's version, as text."""
    nvrtc = _bindings()[1]
    try:
        result = nvrtc.nvrtcVersion()
    except RuntimeError:  # The bindings' own errors for a library that is not there.
        raise BackendError(f"CUDA kernels need NVRTC, and libnvrtc was not found: {REMEDY}") from None
    if int(result[0]):
        raise BackendError(f"CUDA: NVRTC did not tell its version ({result[0].name})")
    return ".".join(str(number) for number in result[1:])


def _raw_stream() -> Callable[[int], int]:
    """A function from a device's index to torch's current stream there, as a number.

    torch's own shortcut, which its compiled code uses too, takes a tenth of the time of the public way.
    """
    fast = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return fast or (lambda index: torch.cuda.current_stream(index).cuda_stream)
