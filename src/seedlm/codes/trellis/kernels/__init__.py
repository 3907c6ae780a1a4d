"""Products with the trellis code's weights, fastest first. What a backend needs is imported with its first weight."""

from collections.abc import Sequence
from typing import Final

from seedlm.codes.base import LinearBackend
from seedlm.codes.trellis.kernels.cpu import NumbaBackend, NumbaInt8Backend
from seedlm.codes.trellis.kernels.cuda import CudaBackend, CudaInt8Backend
from seedlm.codes.trellis.kernels.torch_dequantize import TorchBackend

BACKENDS: Final[Sequence[LinearBackend]] = (
    CudaBackend(),
    CudaInt8Backend(),
    NumbaBackend(),
    NumbaInt8Backend(),
    TorchBackend(),
)
"""The last serves every device and every format."""
