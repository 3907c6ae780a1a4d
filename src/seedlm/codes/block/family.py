"""SeedLM's block code as a family: what `codes.base` asks for, and where each answer is. Imports torch only when it is used."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from seedlm.codes.base import CODES, EncodeOptions, Encoder, Facts, Format, LinearBackend
from seedlm.codes.block import format as formats
from seedlm.codes.block.format import EXPONENT_BIAS_RANGE, PRESETS, BlockFormat, check_rounding
from seedlm.errors import TensorError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NMSE: Final[Mapping[Format, float]] = {
    PRESETS[bits]: nmse
    for bits, nmse in {
        "5": 0.00386,
        "4.5": 0.00644,
        "4": 0.01415,
        "3.5": 0.02617,
        "3": 0.04789,
        "2.5": 0.08061,
        "2": 0.13558,
    }.items()
}

SEARCHES: Final = ("triton", "numba", "torch")
_CHECK_WORDS: Final = 1 << 20
"""Words that `check` looks at together: what it forms for each takes some bytes."""


class BlockFamily:
    """The family ``block``."""

    name: Final = "block"
    since_version: Final = 1
    presets: Mapping[str, Format] = PRESETS
    searches: Final = SEARCHES
    products: Final = ("cuda", "numba", "torch")
    defaults: Mapping[str, str] = {"rounding": "best"}
    mixture = _NMSE
    feedback: Final = "none"
    """The method as published looks at the weights alone, and so does this code unless it is asked otherwise."""

    fused: Final = False
    tables: Format | None = None
    """As published: linear layers alone."""

    def parse(self, text: str) -> Format | None:
        return formats.parse_spec(text)

    def from_dict(self, data: Mapping[str, Any]) -> Format:
        return formats.from_dict(data)

    def check_settings(self, settings: Mapping[str, str]) -> None:
        rounding = settings.get("rounding", "best")
        check_rounding(rounding)

    def check(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> None:
        """Raise TensorError for an exponent bias out of range, a zero seed, a padding bit that is set."""
        from seedlm.codes.block import packing

        assert isinstance(format, BlockFormat)
        low, high = EXPONENT_BIAS_RANGE
        bias = int(parts["exponent_bias"])
        if not low <= bias <= high:
            raise TensorError(f"exponent bias must be {low} .. {high}, got {bias}")
        words, blocks = parts[CODES], format.blocks_per_row(shape[1])
        rows = max(1, _CHECK_WORDS // words.shape[1])
        for start in range(0, len(words), rows):
            try:
                packing.check_codes(words[start : start + rows], blocks, format)
            except TensorError as reason:
                place = f", rows counted from row {start}" if start else ""
                raise TensorError(f"{reason}{place}") from None

    def dequantize(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> "Tensor":
        from seedlm.codes.block import codec

        assert isinstance(format, BlockFormat)
        return codec.dequantize_rows(parts[CODES], int(parts["exponent_bias"]), shape[1], format)

    def rows(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int], indices: "Tensor") -> "Tensor":
        import torch

        from seedlm.codes.block.kernels import torch_dequantize

        assert isinstance(format, BlockFormat)
        words = parts[CODES].index_select(0, indices.flatten())
        tables = torch_dequantize.tables(format.seed_bits, words.device)
        rows = torch_dequantize.dequantize(words, parts["exponent_bias"], *tables, shape[1], format, torch.float32)
        return rows.reshape(*indices.shape, shape[1])

    def encoder(
        self, format: Format, shape: tuple[int, int], facts: Facts, options: EncodeOptions, device: "torch.device"
    ) -> Encoder:
        from seedlm.codes.block.encode import BlockEncoder

        assert isinstance(format, BlockFormat)
        return BlockEncoder(format, facts, options, device)

    def reason_no_encoder(self, backend: str, device: "torch.device", format: Format) -> str | None:
        from seedlm.codes.block.encode import reason_no_search

        assert isinstance(format, BlockFormat)
        return reason_no_search(backend, device, format)

    def reason_slow(self, device: "torch.device", format: Format) -> str | None:
        from seedlm.codes.block.encode import reason_no_search

        assert isinstance(format, BlockFormat)
        reasons = [reason_no_search(name, device, format) for name in SEARCHES if name != "torch"]
        return "; ".join(filter(None, reasons)) if all(reasons) else None

    def backends(self) -> Sequence[LinearBackend]:
        from seedlm.codes.block.kernels import BACKENDS

        return BACKENDS


FAMILY: Final = BlockFamily()
