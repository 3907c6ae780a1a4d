"""Products with the block code's weights, fastest first. What a backend needs is imported when it prepares its first weight."""

from collections.abc import Sequence
from typing import Final

from seedlm.codes.base import LinearBackend
from seedlm.codes.block.kernels.backends import TorchBackend
from seedlm.codes.block.kernels.cpu import NumbaBackend
from seedlm.codes.block.kernels.cuda import CudaBackend

BACKENDS: Final[Sequence[LinearBackend]] = (CudaBackend(), NumbaBackend(), TorchBackend())
"""The last serves every device and every format."""
