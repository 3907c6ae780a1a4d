"""Overlapping seeds as a family: what `codes.base` asks for, and where each answer is. Imports torch only when it is used."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from seedlm.codes.base import CODES, EncodeOptions, Encoder, Facts, Format, LinearBackend
from seedlm.codes.trellis import format as formats
from seedlm.codes.trellis.format import PRESETS, TrellisFormat
from seedlm.errors import TensorError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEARCHES: Final = ("cuda", "numba", "reference")
"""Modules of `viterbi` with `search`, or `encode` and `encode_panel`, and `reason_unavailable`."""
_NMSE: Final[Mapping[str, float]] = {"8": 0.0000219, "6": 0.000304, "5": 0.001164, "4": 0.00448, "3": 0.01752, "2": 0.0689}
"""On N(0,1), docs/log/encoder.md."""


class TrellisFamily:
    """The family ``trellis``."""

    name: Final = "trellis"
    since_version: Final = 2
    presets: Mapping[str, Format] = PRESETS
    searches: Final = SEARCHES
    products: Final = ("cuda", "cuda-int8", "numba", "numba-int8", "torch")
    defaults: Mapping[str, str] = {"feedback": "none"}
    """What errors were weighed by, for the record: "none", "own text", or the name of a text that was data."""

    mixture: Mapping[Format, float] = {PRESETS[bits]: nmse for bits, nmse in _NMSE.items()}
    feedback: Final = "own"
    fused: Final = True
    tables: Format | None = PRESETS["6-fast"]
    """It takes a third off SmolLM2's files for 0.001 of KL (docs/log/quality.md)."""

    def parse(self, text: str) -> Format | None:
        return formats.parse_spec(text)

    def from_dict(self, data: Mapping[str, Any]) -> Format:
        return formats.from_dict(data)

    def check_settings(self, settings: Mapping[str, str]) -> None:
        """Nothing but the record of feedback, which `registry.check_settings` looks at."""

    def check(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> None:
        """Raise TensorError for scales that are negative or not finite, or make weights that are not. Every word is valid."""
        import torch

        from seedlm.codes.trellis.codec import VALUE_CENTER

        assert isinstance(format, TrellisFormat)
        for name in ("scales", "scale"):
            bad = (~torch.isfinite(parts[name]) | (parts[name] < 0)).nonzero()
            if len(bad):
                value = float(parts[name][int(bad[0])])
                raise TensorError(f"{name} must be finite and not negative, got {value:g} at {int(bad[0])}")
        most = float(parts["scales"].double().max() * parts["scale"].double().max()) if len(parts["scales"]) else 0.0
        limit = torch.finfo(torch.float32).max / (VALUE_CENTER * format.transform)  # sums of the transform included
        if most > limit:
            raise TensorError(f"scales times scale must be at most {limit:.3g}, got {most:.3g}")

    def dequantize(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> "Tensor":
        from seedlm.codes.trellis import codec

        assert isinstance(format, TrellisFormat)
        return codec.dequantize(parts[CODES], parts["scales"], parts["scale"], format, shape)

    def rows(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int], indices: "Tensor") -> "Tensor":
        from seedlm.codes.trellis import codec

        assert isinstance(format, TrellisFormat)
        if indices.is_cuda:
            from seedlm.codes.trellis.kernels.cuda import CudaBackend

            if CudaBackend().reason_unavailable(indices.device, format, shape) is None:
                from seedlm.codes.trellis.kernels import launch

                return launch.rows([parts[CODES], parts["scales"], parts["scale"]], format, shape, indices)
        else:
            from seedlm.codes.trellis.kernels import cpu

            if (found := cpu.rows(parts, format, shape, indices)) is not None:
                return found
        return codec.dequantize_rows(parts[CODES], parts["scales"], parts["scale"], format, shape, indices)

    def encoder(
        self, format: Format, shape: tuple[int, int], facts: Facts, options: EncodeOptions, device: "torch.device"
    ) -> Encoder:
        from seedlm.codes.trellis.encode import TrellisEncoder

        assert isinstance(format, TrellisFormat)
        return TrellisEncoder(format, shape, facts, options, device)

    def reason_no_encoder(self, backend: str, device: "torch.device", format: Format) -> str | None:
        from seedlm.codes.trellis import viterbi

        return None if backend == "auto" else viterbi.reason_no_search(backend, device)

    def reason_slow(self, device: "torch.device", format: Format) -> str | None:
        import torch

        from seedlm.codes.trellis import viterbi

        reasons = [viterbi.reason_no_search("cuda", device), viterbi.reason_no_search("numba", torch.device("cpu"))]
        return reasons[-1] if all(reasons) else None

    def backends(self) -> Sequence[LinearBackend]:
        from seedlm.codes.trellis.kernels import BACKENDS

        return BACKENDS


FAMILY: Final = TrellisFamily()
