"""Rows in, streams out: transforms them, scales each row, and lets the Viterbi search find every strip's streams.

A row's scale is its root mean square over that of the state values, times a gain that depends on the rate: what is left over
after coding is shorter than the row by the error, so few bits want a scale below one, and many bits one above, which
stretches the values' short tails (`GAINS`). Everything but the search is elementwise or summed in a written order, and the
search counts in integers, so the codes of the same rows are the same on every device.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from seedlm.codes import hadamard
from seedlm.codes.base import CODES, EncodeOptions, Facts, RowErrors, row_sums
from seedlm.codes.feedback import feedback_for
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.columns import encode_with_feedback
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat
from seedlm.codes.trellis.viterbi import choose, viterbi
from seedlm.errors import BackendError, TensorError
from seedlm.progress import Tell

GAINS: Final[Mapping[int, Mapping[int, float]]] = {
    16: {1: 0.9, 2: 1.0, 3: 1.06, 4: 1.1, 5: 1.13, 6: 1.19, 7: 1.25, 8: 1.33},
    12: {1: 0.94, 2: 1.02, 3: 1.09, 4: 1.14, 5: 1.19, 6: 1.26},
}
"""By state bits and rate: a row's scale is this times its root mean square. Measured on N(0,1), docs/log/encoder.md."""

_LARGEST: Final = 1e36
"""Sums of a block of such numbers are finite in float32."""

_SEQUENCES: Final = 1 << 14
"""Sequences that a search is given at a time."""


class TrellisEncoder:
    """Codes of one matrix (`base.Encoder`)."""

    def __init__(
        self, format: TrellisFormat, shape: tuple[int, int], facts: Facts, options: EncodeOptions, device: torch.device
    ) -> None:
        if reason := _reason(options.backend, device):
            raise BackendError(reason)
        if facts.largest > _LARGEST:
            raise TensorError(f"a weight of {facts.largest:g} is too large for the transform, at most {_LARGEST:g} is allowed")
        self._format, self._backend = format, options.backend
        if options.backend == "auto" and device.type != "cpu" and choose(device) == "reference":
            device = torch.device("cpu")  # a GPU that the search does not know: the processor is faster than plain torch there
        self._device = device
        self._given = feedback_for(facts, format, device)
        self._importance = None if facts.importance is None else facts.importance.to(device)
        self._row = 0
        # The largest row's root mean square is at most the largest magnitude, so scales in this unit are at most about 2^8.
        exponent = math.frexp(facts.largest)[1] if facts.largest else 0
        self._unit = 2.0 ** max(-140, min(120, exponent - 8))

    def rows(self, weight: Tensor, tell: Tell) -> tuple[dict[str, Tensor], RowErrors]:
        format = self._format
        rotated = hadamard.forward(weight.detach().to(self._device).float(), format.transform)
        scales = self.row_scales(rotated)
        units = (scales.float() * self._unit).unsqueeze(1)
        if self._given is not None:
            piece = None if self._importance is None else self._importance[self._row : self._row + len(rotated)]
            self._row += len(rotated)
            words = encode_with_feedback(rotated, units.squeeze(1), self._given, piece, format, self._backend, tell)
        else:
            words = self._search(rotated, units, tell)
        error = (
            (codec.decode_values(words, format, (len(rotated), rotated.shape[1])).float() * units - rotated).double().square_()
        )
        errors = RowErrors(row_sums(error).cpu(), row_sums(rotated.double().square_()).cpu())
        return {CODES: words, "scales": scales}, errors

    def _search(self, rotated: Tensor, units: Tensor, tell: Tell) -> Tensor:
        """Words of rows that are coded as they are."""
        format = self._format
        targets = torch.where(units > 0, rotated / units, 0.0)
        streams = []
        for first, count in format.strips(len(rotated)):
            rows = targets[first * SEGMENT_ROWS : (first + count) * SEGMENT_ROWS]
            padded = torch.nn.functional.pad(rows, (0, 0, 0, count * SEGMENT_ROWS - len(rows))).T.contiguous()
            found = []
            for part in padded.split(_SEQUENCES):
                found.append(viterbi(part, len(rows), format, backend=self._backend)[0])
                tell(len(part) * len(rows))
            streams.append(torch.cat(found))
        return codec.assemble(streams, format)

    def row_scales(self, rotated: Tensor) -> Tensor:
        """float16 [rows]: each row's scale in the tensor's unit."""
        gain = GAINS[self._format.state_bits][self._format.rate] / codec.VALUE_STD
        mean = row_sums(rotated.double().square_()) / rotated.shape[1]
        return (mean.sqrt() * (gain / self._unit)).to(torch.float16)

    def rest(self) -> dict[str, Tensor]:
        return {"scale": torch.tensor([self._unit])}


def _reason(backend: str, device: torch.device) -> str | None:
    from seedlm.codes.trellis import viterbi as searches

    return None if backend == "auto" else searches.reason_no_search(backend, device)
