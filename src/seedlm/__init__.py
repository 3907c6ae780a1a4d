"""SeedLM: large language models whose weights are regrown from seeds (Shafipour et al., ICLR 2025).

    seedlm.compress_checkpoint(source, folder, format="4")   a model on disk, tensor by tensor
    seedlm.compress_model(model) / compress_module(linear)   one in memory
    seedlm.encode(weight, "4")                               one matrix

Importing this package also teaches transformers to load compressed folders, whichever of the two is imported first.
It imports neither torch nor transformers itself, which take seconds: a name that needs them is imported when it is used.
"""

import importlib
import typing

from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.registry import parse_format
from seedlm.compress.allocate import Mixture
from seedlm.errors import SeedLMError
from seedlm.integrations.transformers import hook
from seedlm.version import __version__

__all__ = [
    "PRESETS",
    "BlockFormat",
    "Checkpoint",
    "EncodedTensor",
    "Mixture",
    "SeedLMConfig",
    "SeedLMError",
    "SeedLinear",
    "__version__",
    "compress_checkpoint",
    "compress_model",
    "compress_module",
    "dequantize_model",
    "encode",
    "inspect_checkpoint",
    "measure_sensitivity",
    "observe_checkpoint",
    "parse_format",
    "set_backend",
]

if typing.TYPE_CHECKING:
    from seedlm.calibration.sensitivity import measure_sensitivity
    from seedlm.codes.encoded import EncodedTensor, encode
    from seedlm.compress.observe import observe_checkpoint
    from seedlm.compress.run import compress_checkpoint
    from seedlm.integrations.transformers.quantizer import SeedLMConfig
    from seedlm.modeling.linear import SeedLinear, compress_module
    from seedlm.modeling.quantize import compress_model, dequantize_model, set_backend
    from seedlm.storage.checkpoint import Checkpoint
    from seedlm.storage.inspect import inspect_checkpoint
else:  # the same names when they are asked for; type checkers do not see this, to them __getattr__ would allow any name
    _HOMES = {
        "Checkpoint": "storage.checkpoint",
        "EncodedTensor": "codes.encoded",
        "SeedLMConfig": "integrations.transformers.quantizer",
        "SeedLinear": "modeling.linear",
        "compress_checkpoint": "compress.run",
        "compress_model": "modeling.quantize",
        "compress_module": "modeling.linear",
        "encode": "codes.encoded",
        "dequantize_model": "modeling.quantize",
        "set_backend": "modeling.quantize",
        "inspect_checkpoint": "storage.inspect",
        "measure_sensitivity": "calibration.sensitivity",
        "observe_checkpoint": "compress.observe",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return [*__all__]


hook.install()
