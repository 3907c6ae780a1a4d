"""SeedLM: large language models whose weights are regrown from seeds (Shafipour et al., ICLR 2025).

    seedlm.compress_checkpoint(source, folder, format="4")   a model on disk, tensor by tensor
    seedlm.compress_model(model) / compress_module(linear)   one in memory
    seedlm.encode(weight, "4")                               one matrix

Importing this package also teaches transformers to load compressed folders.
"""

from seedlm import hf as _hf
from seedlm.checkpoint import Checkpoint
from seedlm.compress import compress_checkpoint
from seedlm.errors import SeedLMError
from seedlm.format import PRESETS, BlockFormat, parse_format
from seedlm.hf import SeedLMConfig
from seedlm.linear import SeedLinear, compress_module
from seedlm.report import inspect_checkpoint
from seedlm.search import EncodedTensor, encode
from seedlm.version import __version__
from seedlm.walk import compress_model, expand_model

__all__ = [
    "PRESETS",
    "BlockFormat",
    "Checkpoint",
    "EncodedTensor",
    "SeedLMConfig",
    "SeedLMError",
    "SeedLinear",
    "__version__",
    "compress_checkpoint",
    "compress_model",
    "compress_module",
    "encode",
    "expand_model",
    "inspect_checkpoint",
    "parse_format",
]

_hf.register()
