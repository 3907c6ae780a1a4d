"""Which baselines there are, and whether one can run here (`baselines` does it). Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from seedlm.errors import EvaluationError, extra


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to quantise.

    bits        code widths that it is offered at, as they are written in names
    libraries   the distributions whose code does it
    options     what was chosen there, for the reader
    calibrated  whether it needs the whole model and text; else it takes one weight after the other
    """

    bits: tuple[float, ...]
    libraries: tuple[str, ...]
    options: str
    calibrated: bool = False

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries. Raises PackageNotFoundError for one that is not installed."""
        return {library: version(library) for library in self.libraries}


def baseline_names() -> list[str]:
    """Every baseline, as `parse_baseline` reads it."""
    return [f"{name}-{bits}" for name, method in METHODS.items() for bits in method.bits]


def parse_baseline(text: str) -> tuple[str, Method, float]:
    """The method's name, the method and its bits. Raises EvaluationError for an unknown one, or one that cannot run here."""
    name, _, bits = text.rpartition("-")
    if text not in baseline_names():
        raise EvaluationError(f"unknown baseline {text!r}; known are {', '.join(baseline_names())}")
    method = METHODS[name]
    try:
        _ = method.versions
    except PackageNotFoundError as reason:
        raise EvaluationError(f"{text} needs {reason.name}: {extra('baselines')}") from None
    if name in _NEED_A_GPU:
        import torch

        if not torch.accelerator.is_available():
            raise EvaluationError(f"{text} needs a GPU: {_NEED_A_GPU[name]}")
    return name, method, next(width for width in method.bits if str(width) == bits)


_NEED_A_GPU: Final = {
    "awq": "llm-compressor pins the memory of what AWQ sees, which fails without one",
    "exl3": "exllamav3's quantiser is written in CUDA",
}
_COMPRESSOR: Final = ("llmcompressor", "compressed-tensors")
_INTEGERS: Final = (4, 3, 2)

METHODS: Final[Mapping[str, Method]] = {
    "rtn-channel": Method(
        bits=_INTEGERS,
        libraries=_COMPRESSOR,
        options="round to nearest, asymmetric, a scale for each row",
    ),
    "rtn": Method(
        bits=_INTEGERS,
        libraries=_COMPRESSOR,
        options="round to nearest, asymmetric, groups of 128",
    ),
    "mse": Method(
        bits=_INTEGERS,
        libraries=_COMPRESSOR,
        options="symmetric integers, groups of 128, the clip of least squared error (block floating point)",
    ),
    "nf4": Method(
        bits=(4,),
        libraries=("bitsandbytes",),
        options="NF4, blocks of 64, double quantisation of scales",
    ),
    "hqq": Method(
        bits=_INTEGERS,
        libraries=("hqq",),
        options="groups of 64 along the row, float16 scale and zero",
    ),
    "higgs": Method(
        bits=_INTEGERS,
        libraries=("transformers",),
        options="Hadamard blocks of 512 or what divides the row, grid of pairs, a float16 scale for each group of up to 256",
    ),
    "gptq": Method(
        bits=_INTEGERS,
        libraries=_COMPRESSOR,
        options="asymmetric, groups of 128, static activation order, damping 0.01, 128 windows of calibration text",
        calibrated=True,
    ),
    "awq": Method(
        bits=_INTEGERS,
        libraries=_COMPRESSOR,
        options="asymmetric, groups of 128, 20 scales tried, 128 windows of 512 tokens of calibration text",
        calibrated=True,
    ),
    "exl3": Method(
        bits=(4, 3.5, 3, 2.5, 2),
        libraries=("exllamav3",),
        options="code mul1, Hadamard blocks of 128 both ways, scales of rows and columns, 128 windows of calibration text",
        calibrated=True,
    ),
}
